"""Assigns names class ids that stay the same while the node lives, and makes the LabelInfo.

Labels of a segmentation (k = k-th name) are a matter of one vocabulary; ids are a matter of everybody who has seen a
LabelInfo. A costmap keeps old tiles by id, so an id never changes hands while it may still be in one of them.
"""

from __future__ import annotations

import heapq
import re
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from builtin_interfaces.msg import Time
from std_msgs.msg import Header
from vision_msgs.msg import LabelInfo, VisionClass

BACKGROUND_ID = 0
FIRST_ID = 1
LAST_ID = 254
UNLABELLED_ID = 255


class LabelsExhausted(ValueError):
    """A vocabulary needs more class ids than are free now; the text says how many, and when more will be."""


@dataclass(frozen=True)
class Labels:
    """The ids of one vocabulary: `ids[k - 1]` (1..254) is the class id of `names[k - 1]`, which labels call k."""

    names: tuple[str, ...]
    ids: tuple[int, ...]

    def id_table(self) -> np.ndarray:
        """uint8 [256]: class id by label. 0 stays background; whatever no name stands for is 255, unlabelled."""
        table = np.full(256, UNLABELLED_ID, np.uint8)
        table[BACKGROUND_ID] = BACKGROUND_ID
        table[1 : len(self.ids) + 1] = self.ids
        return table


def topic_slug(name: str, number: int) -> str:
    """What a name with the class id `number` is called in a topic's name: its ASCII letters and digits, and the id.

    "Mug, blue" with id 3 is mug_blue_3; a name without any ASCII letter is class_3.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "_", plain).strip("_")[:40].strip("_")
    if not words or words[0].isdigit():
        words = f"class_{words}".strip("_")
    return f"{words}_{number}"


class LabelRegistry:
    """Gives names their class ids. Safe to use from several threads.

    A name (compared without regard to case) keeps its id for the life of the registry, in use or not, until the id is
    needed for another name: ids never given out come first, then those whose names have been out of use the longest,
    but none that was out of use for less than `reuse_delay` seconds, and never one of a name in use.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._ids: dict[str, int] = {}
        self._uses: Counter[str] = Counter()
        self._last_shown: dict[str, float] = {}

    def check(self, names: Sequence[str], reuse_delay: float) -> None:
        """Raise LabelsExhausted if :meth:`assign` would, and change nothing."""
        with self._lock:
            self._plan(names, reuse_delay)

    def assign(self, names: Sequence[str], reuse_delay: float) -> Labels:
        """The ids of `names` (distinct without regard to case), in use from now until :meth:`release`.

        Raises LabelsExhausted, and changes nothing, where there are not enough free ids.
        """
        with self._lock:
            planned, evicted = self._plan(names, reuse_delay)
            for key in evicted:
                del self._ids[key]
                self._last_shown.pop(key, None)
            self._ids.update(planned)
            keys = [name.casefold() for name in names]
            self._uses.update(keys)
            return Labels(tuple(names), tuple(self._ids[key] for key in keys))

    def ids(self, names: Sequence[str]) -> list[int]:
        """The ids of `names`, which are in use."""
        with self._lock:
            return [self._ids[name.casefold()] for name in names]

    def release(self, labels: Labels, *, shown: bool) -> None:
        """End one use of `labels`. `shown`: whether a LabelInfo or a mask with them ever went out."""
        with self._lock:
            now = self._clock()
            for name in labels.names:
                key = name.casefold()
                self._uses[key] -= 1
                if self._uses[key] <= 0:
                    del self._uses[key]
                if shown:
                    self._last_shown[key] = now

    def _plan(self, names: Sequence[str], reuse_delay: float) -> tuple[dict[str, int], list[str]]:
        keys = [name.casefold() for name in names]
        missing = [key for key in keys if key not in self._ids]
        taken = set(self._ids.values())
        free = [number for number in range(FIRST_ID, LAST_ID + 1) if number not in taken][: len(missing)]
        wanted = len(missing) - len(free)
        if wanted <= 0:
            return dict(zip(missing, free, strict=True)), []
        keep = set(keys)
        resting = [key for key in self._ids if self._uses[key] == 0 and key not in keep]
        never = -float("inf")
        oldest = heapq.nsmallest(wanted, resting, key=lambda key: self._last_shown.get(key, never))
        waits = [self._last_shown.get(key, never) + reuse_delay - self._clock() for key in oldest]
        ready = [key for key, wait in zip(oldest, waits, strict=True) if wait <= 0.0]
        if len(ready) < wanted:
            when = (
                f"enough are free in {max(waits):.0f} s"
                if len(oldest) == wanted
                else "the others belong to the names in use"
            )
            raise LabelsExhausted(
                f"{len(missing)} new names need a class id and {len(free) + len(ready)} are free: a name that left "
                f"the vocabulary keeps its id for id_reuse_delay ({reuse_delay:g} s); {when}"
            )
        return dict(zip(missing, free + [self._ids[key] for key in ready], strict=True)), ready


def label_info_message(labels: Labels, background_name: str, threshold: float, stamp: Time) -> LabelInfo:
    """The LabelInfo of `labels`: background and every name, in the order of ids; never 255."""
    classes = sorted([(BACKGROUND_ID, background_name), *zip(labels.ids, labels.names, strict=True)])
    return LabelInfo(
        header=Header(stamp=stamp),
        class_map=[VisionClass(class_id=number, class_name=name) for number, name in classes],
        threshold=threshold,
    )
