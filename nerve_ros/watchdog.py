"""Notices that an image or question keeps the worker's thread longer than the parameter inference_timeout allows."""

from __future__ import annotations

from collections.abc import Callable

from rclpy.impl.rcutils_logger import RcutilsLogger

from nerve_ros.worker import Worker


class Watchdog:
    """Watches the thread of `worker`. timeout(): seconds that it may take for one image; 0 is for ever."""

    def __init__(self, worker: Worker, *, log: RcutilsLogger, timeout: Callable[[], float]) -> None:
        self._worker, self._log, self._timeout = worker, log, timeout
        self._logged = False

    @property
    def stuck(self) -> str:
        """What is wrong while the image or question under way has taken longer than the timeout; else empty."""
        seconds, timeout = self._worker.busy_for, self._timeout()
        if not timeout or seconds <= timeout:
            return ""
        return f"the image under way has not ended for {seconds:.0f} s (inference_timeout is {timeout:g} s)"

    def check(self) -> str:
        """`stuck`, logged with the thread's stack the first time that it is found. To be called once a second."""
        stuck = self.stuck
        if stuck and not self._logged:
            self._log.error(f"{stuck}. It is here:\n{self._worker.stack()}")
        self._logged = bool(stuck)
        return stuck
