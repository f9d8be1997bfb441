"""Lets a few lines of a kind through to the log: rclpy's own throttle would let through only the first."""

from __future__ import annotations

import time
from collections import deque


class LogBurst:
    """At most `most` lines within `seconds`."""

    def __init__(self, most: int, seconds: float) -> None:
        self._times: deque[float] = deque(maxlen=most)
        self._seconds = seconds

    def allows(self) -> bool:
        """Whether one more may be logged now; it then counts as logged."""
        now = time.monotonic()
        if len(self._times) == self._times.maxlen and now - self._times[0] <= self._seconds:
            return False
        self._times.append(now)
        return True
