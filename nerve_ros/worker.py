"""The one thread that uses the models, and the slot in which the next image waits for it.

Whatever touches a model runs here, in this order of urgency: jobs (load, unload), then, alternating, an image and a
step of the next vocabulary. Images do not queue: the newest replaces the one that waits. A vocabulary is prepared in
steps between images while the one before it is in use, so that a long list of names never stops the stream. A question
is answered from the newest image: the one that waits, once it was processed, else the last one that was.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Image = TypeVar("Image")
Request = TypeVar("Request")
Snapshot = TypeVar("Snapshot")
Question = TypeVar("Question")
Result = TypeVar("Result")

QUESTIONS = 8
"""Questions that may wait; one more is turned away, so that whoever asks too often does not stop the rest."""


class Mailbox(Generic[Item]):
    """One slot, newest wins. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._item: Item | None = None

    def put(self, item: Item) -> Item | None:
        """Put `item` into the slot and return the one it replaces, which nobody will take any more."""
        with self._lock:
            before, self._item = self._item, item
            return before

    def put_if_empty(self, item: Item) -> bool:
        """Put `item` into the slot unless one waits there; returns whether it was put there."""
        with self._lock:
            if self._item is not None:
                return False
            self._item = item
            return True

    def take(self) -> Item | None:
        """Empty the slot and return what was in it."""
        with self._lock:
            item, self._item = self._item, None
            return item

    @property
    def waiting(self) -> bool:
        """Whether something is in the slot."""
        return self._item is not None


class Worker(Generic[Image, Request, Snapshot, Question]):
    """A thread that works on images with the snapshot of a vocabulary, and on the next vocabulary in between.

    process(image, snapshot): one image, from conversion to publishing.
    prepare(request): a generator that yields between steps and returns the snapshot of a vocabulary.
    adopt(request, snapshot): the new snapshot is in use from now on; called before the first image that it is used for.
    abandon(request, error): a request was given up, for a newer one (error None) or because of an error.
    answer(question): a question about the image that was worked on last.
    failed(error): one of the others raised; the thread goes on.
    All of them are called on the thread. `min_interval()`: seconds between the starts of two images, at least.
    `enabled()`: whether images are worked on as they come; if not, only where a question waits.
    """

    def __init__(
        self,
        *,
        process: Callable[[Image, Snapshot], None],
        prepare: Callable[[Request], Generator[None, None, Snapshot]],
        adopt: Callable[[Request, Snapshot], None],
        abandon: Callable[[Request, Exception | None], None],
        answer: Callable[[Question], None],
        failed: Callable[[Exception], None],
        min_interval: Callable[[], float] = lambda: 0.0,
        enabled: Callable[[], bool] = lambda: True,
    ) -> None:
        self._process = process
        self._prepare = prepare
        self._adopt = adopt
        self._abandon = abandon
        self._answer = answer
        self._failed = failed
        self._min_interval = min_interval
        self._enabled = enabled
        self._wake = threading.Condition()
        self._jobs: deque[tuple[Future, Callable[[], object]]] = deque()
        self._images: Mailbox[Image] = Mailbox()
        self._requests: Mailbox[Request] = Mailbox()
        self._questions: deque[Question] = deque()
        self._preparing: tuple[Request, Generator[None, None, Snapshot]] | None = None
        self._snapshot: tuple[Request, Snapshot] | None = None
        self._last_start = -float("inf")
        self._busy_since: float | None = None
        self._vocabulary_turn = False
        self._seen_one = False
        self._running = False
        self._ready = False
        self._closing = False
        # A daemon, so that a model that hangs cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="nerve-worker", daemon=True)
        self._thread.start()

    # From any thread.

    def submit(self, job: Callable[[], Result]) -> Future[Result]:
        """Have `job` run on the thread as soon as what runs there now is done."""
        future: Future[Result] = Future()
        with self._wake:
            self._jobs.append((future, job))
            self._wake.notify()
        return future

    def offer(self, image: Image) -> bool:
        """Put `image` into the slot; False where it replaced one that still waited."""
        replaced = self._images.put(image)
        with self._wake:
            self._wake.notify()
        return replaced is None

    def request(self, request: Request) -> Request | None:
        """Ask for a vocabulary; returns the request that this one replaces before its preparation began."""
        replaced = self._requests.put(request)
        with self._wake:
            self._wake.notify()
        return replaced

    def ask(self, question: Question) -> bool:
        """Have `question` answered; False where too many wait already."""
        with self._wake:
            if len(self._questions) >= QUESTIONS:
                return False
            self._questions.append(question)
            self._wake.notify()
        return True

    def wake(self) -> None:
        """Look again at what there is to do: `enabled` or `min_interval` may say something else now."""
        with self._wake:
            self._wake.notify()

    def resume(self) -> None:
        """Work on images from now on."""
        with self._wake:
            self._running, self._seen_one = True, False
            self._wake.notify()

    def pause(self) -> tuple[Image | None, list[Question]]:
        """Begin no further image; returns the one that waited, and the questions that nobody will answer now."""
        with self._wake:
            self._running = False
            left = list(self._questions)
            self._questions.clear()
        return self._images.take(), left

    @property
    def snapshot(self) -> Snapshot | None:
        """What images are worked on with now."""
        current = self._snapshot
        return None if current is None else current[1]

    @property
    def busy_for(self) -> float:
        """Seconds since the current image, question or vocabulary step began; 0 between them. Jobs do not count."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def stack(self) -> str:
        """The thread's current traceback, as text."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else "the thread has ended"

    def close(self, timeout: float) -> bool:
        """End the thread; whether it ended within `timeout` seconds."""
        with self._wake:
            self._closing = True
            self._running = False
            self._wake.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # On the thread, from within a job.

    def prepare_now(self) -> None:
        """Prepare and adopt the vocabulary that was asked for last, in one go; from now on others follow by themselves.

        Raises whatever `prepare` raises; the request then waits for the next call.
        """
        request = self._requests.take()
        if request is not None:
            try:
                snapshot = _exhaust(self._prepare(request))
            except Exception:
                self._requests.put_if_empty(request)
                raise
            self._switch(request, snapshot)
        self._ready = True

    def forget(self) -> None:
        """Drop the snapshot and what is being prepared; the newest request waits for :meth:`prepare_now`."""
        self._ready = False
        requests = []
        if self._preparing is not None:
            requests.append(self._preparing[0])
            self._preparing[1].close()
        if self._snapshot is not None:
            requests.append(self._snapshot[0])
        self._preparing = self._snapshot = None
        for request in requests:
            if not self._requests.put_if_empty(request):
                self._abandon(request, None)

    # The thread.

    def _run(self) -> None:
        while (work := self._wait()) is not None:
            if work != self._job:
                self._busy_since = time.monotonic()
            try:
                work()
            except Exception as error:
                self._failed(error)
            self._busy_since = None

    def _wait(self) -> Callable[[], None] | None:
        """What there is to do, as soon as there is something; None where the thread is to end."""
        with self._wake:
            while not self._closing:
                work = self._next()
                if work is not None:
                    return work
                self._wake.wait(self._pause_before_image())
        return None

    def _next(self) -> Callable[[], None] | None:
        if self._jobs:
            return self._job
        vocabulary = self._ready and (self._preparing is not None or self._requests.waiting)
        image = self._image_waits() and self._pause_before_image() is None
        question = self._serving() and self._seen_one and bool(self._questions)
        if vocabulary and (self._vocabulary_turn or not (image or question)):
            return self._vocabulary_step
        if image:
            return self._image
        return self._answers if question else None

    def _serving(self) -> bool:
        return self._running and self._ready and self._snapshot is not None

    def _image_waits(self) -> bool:
        return self._serving() and self._images.waiting and (bool(self._questions) or self._enabled())

    def _pause_before_image(self) -> float | None:
        if not self._image_waits() or self._questions:
            return None
        left = self._last_start + self._min_interval() - time.monotonic()
        return left if left > 0.0 else None

    def _job(self) -> None:
        future, job = self._jobs.popleft()
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    def _image(self) -> None:
        self._vocabulary_turn = True
        image, current = self._images.take(), self._snapshot
        if image is None or current is None:
            return
        self._last_start = time.monotonic()
        try:
            self._process(image, current[1])
        finally:
            self._seen_one = True
        self._answers()

    def _answers(self) -> None:
        self._vocabulary_turn = True
        with self._wake:
            questions = list(self._questions)
            self._questions.clear()
        for question in questions:
            self._answer(question)

    def _vocabulary_step(self) -> None:
        self._vocabulary_turn = False
        request = self._requests.take()
        if request is not None:
            if self._preparing is not None:
                self._preparing[1].close()
                self._abandon(self._preparing[0], None)
            self._preparing = (request, self._prepare(request))
        if self._preparing is None:
            return
        request, steps = self._preparing
        try:
            next(steps)
        except StopIteration as done:
            self._preparing = None
            self._switch(request, done.value)
        except Exception as error:
            self._preparing = None
            self._abandon(request, error)

    def _switch(self, request: Request, snapshot: Snapshot) -> None:
        before, self._snapshot = self._snapshot, (request, snapshot)
        try:
            self._adopt(request, snapshot)
        finally:
            if before is not None:
                self._abandon(before[0], None)


def _exhaust(steps: Generator[None, None, Result]) -> Result:
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value
