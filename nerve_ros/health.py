"""Counts what the node receives, publishes and drops, and measures how long it takes.

Latency runs from an image's arrival to its mask's publishing, by the steady clock. Age is the node's clock less the
image's stamp at that moment: it holds the camera's own delay too, and says nothing where the two clocks differ (a bag
played without use_sim_time), so that such ages are left out.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus

WINDOW = 100
"""Images that percentiles are taken over."""

RECENT = 5.0
"""Seconds for which an error or a rejected image colours the diagnostics, and that fps is taken over."""

PLAUSIBLE_AGE = (-0.1, 600.0)
"""Seconds. An age outside means that stamp and clock are not of one time."""


class Health:
    """Counters and timings of one node since it was configured last. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._counts: Counter[str] = Counter()
            self._rejections: Counter[str] = Counter()
            self._stages: dict[str, deque[float]] = {}
            self._ages: deque[float] = deque(maxlen=WINDOW)
            self._latencies: deque[float] = deque(maxlen=WINDOW)
            self._finished: deque[float] = deque(maxlen=WINDOW)
            self._located: deque[float] = deque(maxlen=WINDOW)
            self._last_stamp = -float("inf")
            self._last_arrival: float | None = None
            self._last_error = ""
            self._last_failure = self._last_rejection = -float("inf")

    def arrived(self) -> None:
        """An image message came in, good or bad."""
        with self._lock:
            self._counts["images_received"] += 1
            self._last_arrival = self._clock()

    def dropped(self) -> None:
        """A good image will not be segmented: a newer one took its place, or it was too old."""
        with self._lock:
            self._counts["images_dropped"] += 1

    def rejected(self, kind: str, reason: str) -> None:
        """An image message could not be read."""
        with self._lock:
            self._counts["images_rejected"] += 1
            self._rejections[kind] += 1
            self._last_error = reason
            self._last_rejection = self._clock()

    def failed(self, reason: str) -> None:
        """Something went wrong inside; of an image or not."""
        with self._lock:
            self._counts["errors"] += 1
            self._last_error = reason
            self._last_failure = self._clock()

    def located(self, seconds: float) -> None:
        """A question was answered, `seconds` after it was asked."""
        with self._lock:
            self._counts["locates"] += 1
            self._located.append(seconds)

    def vocabulary(self, accepted: bool) -> None:
        """A vocabulary was asked for, by whatever way."""
        with self._lock:
            self._counts["vocabularies_accepted" if accepted else "vocabularies_rejected"] += 1

    def segmented(self, *, stamp: float, now: float, latency: float, stages_ms: Mapping[str, float]) -> None:
        """An image was published: its stamp and the node's clock in seconds, its latency in seconds, ms per stage."""
        with self._lock:
            self._counts["images_segmented"] += 1
            if stamp < self._last_stamp:
                # A bag that starts over, or a clock that was set back: what came before does not compare.
                self._ages.clear()
                self._finished.clear()
            self._last_stamp = stamp
            if PLAUSIBLE_AGE[0] <= now - stamp <= PLAUSIBLE_AGE[1]:
                self._ages.append(now - stamp)
            self._latencies.append(latency)
            self._finished.append(self._clock())
            for stage, milliseconds in stages_ms.items():
                self._stages.setdefault(stage, deque(maxlen=WINDOW)).append(milliseconds)

    def seconds_without_image(self) -> float | None:
        """Since the last image message came in; None where none ever did."""
        with self._lock:
            return None if self._last_arrival is None else self._clock() - self._last_arrival

    def trouble(self) -> tuple[bytes, str] | None:
        """The diagnostic level and text of what went wrong within the last RECENT seconds; None where all went well."""
        with self._lock:
            now = self._clock()
            if now - self._last_failure <= RECENT:
                return DiagnosticStatus.ERROR, self._last_error
            return (DiagnosticStatus.WARN, self._last_error) if now - self._last_rejection <= RECENT else None

    def figures(self) -> dict[str, str]:
        """All counts and percentiles, as diagnostics show them."""
        with self._lock:
            shown = {
                name: str(self._counts[name])
                for name in (
                    "images_received",
                    "images_segmented",
                    "images_dropped",
                    "images_rejected",
                    "errors",
                    "vocabularies_accepted",
                    "vocabularies_rejected",
                    "locates",
                )
            }
            shown |= {f"rejected_for_{kind}": str(count) for kind, count in sorted(self._rejections.items())}
            shown["fps"] = f"{_rate(self._finished, self._clock()):.2f}"
            for name, seconds in (("age", self._ages), ("latency", self._latencies), ("locate", self._located)):
                shown |= _percentiles(name, [1e3 * value for value in seconds])
            for stage, values in self._stages.items():
                shown |= _percentiles(f"stage_{stage}", values)
            shown["last_error"] = self._last_error
            return shown


def _percentiles(name: str, milliseconds: Sequence[float]) -> dict[str, str]:
    if not milliseconds:
        return {f"{name}_p50_ms": "", f"{name}_p95_ms": ""}
    p50, p95 = np.percentile(milliseconds, (50, 95))
    return {f"{name}_p50_ms": f"{p50:.1f}", f"{name}_p95_ms": f"{p95:.1f}"}


def _rate(times: Sequence[float], now: float) -> float:
    """Events a second over the last RECENT seconds."""
    recent = [moment for moment in times if now - moment <= RECENT]
    return (len(recent) - 1) / max(recent[-1] - recent[0], 1e-3) if len(recent) > 1 else len(recent) / RECENT
