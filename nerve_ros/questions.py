"""Takes the questions of the service ~/locate and sees that each is answered, in time or with the reason why not."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future

from nerve_core import Vocabulary
from nerve_ros.pipeline import Question
from nerve_ros.services import not_located, settle
from nerve_ros.srv import Locate
from nerve_ros.worker import QUESTIONS


class Questions:
    """The questions that wait for their answer. Everything here is called on the executor's thread.

    ask: hands a question to the worker; returns False where too many wait there. state(): of the life cycle.
    obstacle(): why nothing was searched so far. background_name(): what label 0 is called.
    """

    def __init__(
        self,
        *,
        ask: Callable[[Question], bool],
        state: Callable[[], str],
        obstacle: Callable[[], str],
        background_name: Callable[[], str],
    ) -> None:
        self._ask, self._state, self._obstacle, self._background_name = ask, state, obstacle, background_name
        self._questions: list[Question] = []

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(not question.answer.done() for question in self._questions)

    def on_locate(self, request: Locate.Request) -> Future[Locate.Response]:
        """Answer the service `~/locate`."""
        answer: Future[Locate.Response] = Future()
        refused = ""
        try:
            vocabulary = Vocabulary([request.name], background_name=self._background_name())
            if vocabulary.background:
                refused = f"{vocabulary.background[0]!r} is the name of label 0: it is where segmentation/mask is 0"
        except ValueError as error:
            refused = str(error)
        if self._state() != "active":
            refused = f"the node is {self._state()}; activate it first"
        if not refused:
            question = Question(vocabulary, request.want_mask, time.monotonic(), answer)
            self._questions = [asked for asked in self._questions if not asked.answer.done()]
            if self._ask(question):
                self._questions.append(question)
            else:
                refused = f"{QUESTIONS} questions wait already; ask again when one of them is answered"
        if refused:
            settle(answer, not_located(refused))
        return answer

    def expire(self, timeout: float) -> None:
        """Answer those that have waited for more than `timeout` seconds; 0: none."""
        now = time.monotonic()
        for question in self._questions:
            if timeout and now - question.asked > timeout:
                settle(question.answer, not_located(f"not searched within {timeout:g} s: {self._obstacle()}"))
        self._questions = [question for question in self._questions if not question.answer.done()]
