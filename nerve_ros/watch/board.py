"""Holds the newest of everything that `nerve watch` shows; its text is printable, whatever the network sent."""

from __future__ import annotations

import base64
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nerve_core.images.visualize import palette

PATIENCE = 2.0
"""Seconds without anything new after which what is shown is called stale, unless it always comes as slowly."""
WAIT = 1.0
"""Seconds that the page's question for a newer picture waits for one."""
LINGER = 3.0
"""Seconds after such a question in which the next one has to come; then nobody looks any more."""
RESULTS = 8
"""Results that wait for the picture of the same image."""


class Board:
    """The newest of everything that is shown. Thread safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._news = threading.Condition()
        self._closed = False
        self._asked_at = -math.inf
        self._picture: _Picture | None = None
        self._pictures = _Arrivals(clock)
        self._results = _Arrivals(clock)
        self._classes: list[dict[str, Any]] = []
        self._classes_of: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._diagnostics: dict[str, Any] = {}
        self._diagnosed_at = -math.inf
        self.about: dict[str, Any] = {}
        self.reason = ""

    # Coming in.

    def picture(self, jpeg: bytes, stamp: tuple[int, int], pixels: int) -> None:
        """Take the picture of an image: its stamp and the number of its pixels before it was made smaller."""
        with self._news:
            self._pictures.add()
            self._picture = _Picture(self._pictures.count, jpeg, stamp, pixels)
            self._news.notify_all()

    def labels(self, named: list[tuple[int, str]]) -> None:
        """Take the classes that there are from now on; what was seen of new ones is not known yet."""
        with self._news:
            known = {(entry["id"], entry["name"]): entry for entry in self._classes}
            entries = [class_entry(number, name) for number, name in named]
            self._classes = [known.get((entry["id"], entry["name"]), entry) for entry in entries]

    def result(self, classes: list[dict[str, Any]], stamp: tuple[int, int]) -> None:
        """Take what was seen of every class in the image of this stamp."""
        with self._news:
            self._classes = classes
            # Removed before it is set, so that the oldest stands first.
            self._classes_of.pop(stamp, None)
            self._classes_of[stamp] = classes
            if len(self._classes_of) > RESULTS:
                del self._classes_of[next(iter(self._classes_of))]
            self._results.add()

    def diagnostics(self, values: dict[str, Any]) -> None:
        """Take what the node reports about itself: `level`, `message` and `values`."""
        with self._news:
            self._diagnostics = values
            self._diagnosed_at = self._clock()

    def forget_picture(self) -> None:
        """There is no picture until the next one comes, which is waited for from now on."""
        with self._news:
            self._pictures.begin()
            self._picture = None

    def close(self) -> None:
        """Nothing will come any more: nobody is to wait for it."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    # Going out.

    @property
    def watched(self) -> bool:
        """Whether somebody looks at the pictures."""
        with self._news:
            return self._clock() - self._asked_at <= LINGER

    def quiet(self) -> tuple[float, float]:
        """Seconds that a result, and a picture, have been waited for in vain; 0 while they come as they should."""
        with self._news:
            return self._results.silence, self._pictures.silence

    def last_diagnostics(self) -> tuple[dict[str, Any], float]:
        """The last diagnostics (empty: none yet) and the seconds since."""
        with self._news:
            return self._diagnostics, self._clock() - self._diagnosed_at

    def newer(self, number: int) -> dict[str, Any]:
        """All of it with the newest picture in base64, once that is not `number`; without one after WAIT seconds."""
        with self._news:
            self._asked_at = self._clock()
            self._news.wait_for(lambda: self._closed or self._number != number, WAIT)
            self._asked_at = self._clock()
            status, jpeg = self._status(), self._picture.jpeg if self._picture and self._number != number else b""
        return {**status, "jpeg": base64.b64encode(jpeg).decode()}

    def status(self) -> dict[str, Any]:
        """All of it but the picture, as JSON has it. Classes are those of the picture while pictures come."""
        with self._news:
            return self._status()

    @property
    def _number(self) -> int:
        return self._picture.number if self._picture else 0

    def _status(self) -> dict[str, Any]:
        diagnostics, classes, picture = dict(self._diagnostics), self._classes, None
        if diagnostics:
            diagnostics["age"] = round(self._clock() - self._diagnosed_at, 1)
            diagnostics["stale"] = diagnostics["age"] > 2 * PATIENCE
        if self._picture:
            picture = {"number": self._number, "pixels": self._picture.pixels, **self._pictures.summary()}
            if not picture["stale"]:
                classes = self._classes_of.get(self._picture.stamp, classes)
        return {
            **self.about,
            "reason": self.reason,
            "fps": round(self._results.rate, 2),
            "picture": picture,
            "result": {"number": self._results.count, **self._results.summary()} if self._results.count else None,
            "classes": classes,
            "diagnostics": diagnostics,
        }


@dataclass(frozen=True)
class _Picture:
    number: int
    jpeg: bytes
    stamp: tuple[int, int]
    pixels: int


class _Arrivals:
    """When something came, how often, and whether it has stopped coming."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=200)
        self._begun = clock()
        self.count = 0

    def add(self) -> None:
        self._times.append(self._clock())
        self.count += 1

    def begin(self) -> None:
        """It is waited for from now on; the gap before says nothing of its pace."""
        self._begun = self._clock()

    @property
    def age(self) -> float:
        """Seconds since the last one."""
        return self._clock() - self._times[-1] if self._times else math.inf

    @property
    def silence(self) -> float:
        """Seconds that the next one has been waited for; 0 while that is no longer than usual."""
        waited = min(self.age, self._clock() - self._begun)
        return waited if waited > self._usual else 0.0

    @property
    def stale(self) -> bool:
        """Whether the last one is older than it should be by now."""
        return self.age > self._usual

    @property
    def rate(self) -> float:
        """How many came a second, lately."""
        if len(self._times) < 2 or self.stale:
            return 0.0
        recent = [moment for moment in self._times if self._clock() - moment <= 5.0]
        if len(recent) < 2:
            recent = list(self._times)[-2:]
        return (len(recent) - 1) / max(recent[-1] - recent[0], 1e-3)

    def summary(self) -> dict[str, Any]:
        """How old the last one is, for the page; there must be one."""
        return {"age": round(self.age, 1), "stale": self.stale}

    @property
    def _usual(self) -> float:
        last = [moment for moment in self._times if moment >= self._begun][-2:]
        return max(PATIENCE, 3 * (last[-1] - last[0]) if last else 0.0)


def class_entry(
    number: int, name: str, *, presence: float | None = None, confidence: float | None = None, area: int | None = None
) -> dict[str, Any]:
    """A class as the board holds it and JSON has it; what is None of it is not known yet. `area` is in pixels."""
    colour = "#" + palette()[number].tobytes().hex()
    return {
        "id": number,
        "name": printable(name),
        "colour": colour,
        "presence": presence,
        "confidence": confidence,
        "area": area,
    }


def printable(text: str, limit: int = 128) -> str:
    """`text` without anything that moves a terminal's cursor or turns the direction of writing, shortened."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    # The joiners belong to words of some languages, and to emoji.
    return "".join(letter if letter.isprintable() or letter in "\u200c\u200d" else "\ufffd" for letter in text)
