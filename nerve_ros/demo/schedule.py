"""Which names the demonstration asks for, and when."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nerve_core.text.parsing import split_names

FEW_NAMES = ("ball", "mug")
"""What the demonstration asks for first, and again at the end."""


@dataclass(frozen=True)
class Asking:
    """From `at` seconds of the bag on, these names are asked for; an entry may carry synonyms ("mug|cup")."""

    at: float
    entries: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The entries without their synonyms: what the classes are called."""
        return tuple(entry.split("|")[0].strip() for entry in self.entries)


def usual_schedule(seconds: float, names: Sequence[str]) -> tuple[Asking, ...]:
    """A few names for a quarter of the time, all of them for half of it, then the few again."""
    few = tuple(name for name in FEW_NAMES if name in names) or tuple(names[:2])
    return Asking(0.0, few), Asking(seconds / 4, tuple(names)), Asking(3 * seconds / 4, few)


def schedule_of(texts: Sequence[str], seconds: float) -> tuple[Asking, ...]:
    """Each text (names with commas) for an equal part of the time. Raises ValueError for a text without a name."""
    asked = []
    for number, text in enumerate(texts):
        entries = tuple(split_names(text))
        if not entries:
            raise ValueError(f"there is no name in '{text}'; accepted: names with commas, 'ball, mug|cup'")
        asked.append(Asking(seconds * number / len(texts), entries))
    return tuple(asked)


def dump_schedule(schedule: Sequence[Asking]) -> str:
    """The schedule as one line of JSON."""
    return json.dumps([asdict(asking) for asking in schedule])


def load_schedule(text: str) -> tuple[Asking, ...]:
    """What :func:`dump_schedule` wrote. Raises ValueError for anything else, and for an empty or unordered one."""
    try:
        schedule = tuple(Asking(float(item["at"]), tuple(map(str, item["entries"]))) for item in json.loads(text))
    except (KeyError, TypeError) as error:
        raise ValueError(f'a schedule is [{{"at": seconds, "entries": [names]}}, ...], not {text[:80]}') from error
    times = [asking.at for asking in schedule]
    if not schedule or times != sorted(times) or times[0] != 0.0:
        raise ValueError(f"the times of a schedule begin with 0 and grow; they are {times}")
    return schedule
