"""Threads beside the segmentation: what runs ahead of it and behind it, in order, with bounded queues."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

DEPTH = 4
"""Items that wait between two threads, at most."""
NICENESS = 15
"""Of these threads: the segmentation's own threads, which are as many as there are cores, come first."""
_POLL = 0.1


class Ahead(Generic[T]):
    """What an iterator gives, in its order, computed on a thread of its own up to DEPTH items ahead.

    Raises what the iterator raises, in its place in that order. Close it when done, at its end or before.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(DEPTH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while True:
            more, item = self._queue.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item

    def close(self) -> None:
        """Stop, and wait until it has."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        _step_back()
        try:
            for item in self._items:
                if not self._offer((True, item)):
                    return
        except BaseException as error:
            self._offer((False, error))
        else:
            self._offer((False, None))

    def _offer(self, item: tuple[bool, Any]) -> bool:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_POLL)
                return True
        return False


class Behind:
    """Hands what is put in to `take`, in order, on a thread of its own; up to DEPTH items wait.

    What `take` raises ends it, and is raised by the next `put` or `close`.
    """

    def __init__(self, take: Callable[..., None]) -> None:
        self._take = take
        self._queue: queue.Queue[tuple | None] = queue.Queue(DEPTH)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="behind", daemon=True)
        self._thread.start()

    def put(self, *item: Any) -> None:
        """Leave an item; waits while the queue is full. Raises what went wrong with one before it."""
        while True:
            self._check()
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_POLL)
                return

    def close(self) -> None:
        """Wait until everything is taken. Raises what went wrong with it."""
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=_POLL)
                break
        self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        _step_back()
        while (item := self._queue.get()) is not None:
            try:
                self._take(*item)
            except BaseException as error:
                self._failed = error
                return


def _step_back() -> None:
    """Let other threads come first. On Linux each has its own niceness."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
