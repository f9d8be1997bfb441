"""Takes vocabularies from topics, service and parameters, gives names their class ids, and hands both to the worker."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rcl_interfaces.msg import SetParametersResult
from rclpy.impl.rcutils_logger import RcutilsLogger
from rclpy.parameter import Parameter
from std_msgs.msg import String

from nerve_core import Vocabulary
from nerve_ros import parameters
from nerve_ros.health import Health
from nerve_ros.labels import LabelRegistry
from nerve_ros.msg import Vocabulary as VocabularyMessage
from nerve_ros.parameters import NodeConfig, entries, listed, vocabulary_differs
from nerve_ros.pipeline import THROTTLE, Request, Snapshot
from nerve_ros.srv import SetVocabulary

VOCABULARIES_LOGGED = 60
"""Accepted vocabularies that are logged within THROTTLE seconds, at most."""

REJECTIONS_LOGGED = 20
"""Rejected vocabularies that are logged within THROTTLE seconds, each with its reason; the others are counted."""


class LogBurst:
    """At most `most` lines of a kind within THROTTLE seconds: rclpy's own throttle would let through only the first."""

    def __init__(self, most: int) -> None:
        self._times: deque[float] = deque(maxlen=most)

    def allows(self) -> bool:
        """Whether one more may be logged now; it then counts as logged."""
        now = time.monotonic()
        if len(self._times) == self._times.maxlen and now - self._times[0] <= THROTTLE:
            return False
        self._times.append(now)
        return True


class VocabularyInput:
    """Whatever way a vocabulary comes, it ends in the parameter ``vocabulary``, and there in `check` and `ask_for`.

    config(): the parameters now. set_parameters: sets them, and says whether it did. request: has the worker prepare a
    vocabulary; returns the one that this replaces before its preparation began. serving(): what images are segmented
    by now. failed(error): counts and logs an error. on_executor: has a function run on the executor's thread.
    `abandon` is called on the worker's thread, everything else on the executor's.
    """

    def __init__(
        self,
        *,
        log: RcutilsLogger,
        health: Health,
        config: Callable[[], NodeConfig],
        set_parameters: Callable[[list[Parameter]], SetParametersResult],
        request: Callable[[Request], Request | None],
        serving: Callable[[], Snapshot | None],
        failed: Callable[[Exception], None],
        on_executor: Callable[[Callable[[], None]], None],
    ) -> None:
        self._log, self._health, self._config = log, health, config
        self._set_parameters, self._request, self._serving = set_parameters, request, serving
        self._failed, self._on_executor = failed, on_executor
        self._registry = LabelRegistry()
        self._acceptances, self._rejections = LogBurst(VOCABULARIES_LOGGED), LogBurst(REJECTIONS_LOGGED)

    def on_vocabulary(self, message: VocabularyMessage) -> None:
        """Take the topic `vocabulary`."""
        self._set_vocabulary(lambda: Vocabulary(message.names), "topic vocabulary")

    def on_vocabulary_text(self, message: String) -> None:
        """Take the topic `vocabulary_text`."""
        self._set_vocabulary(lambda: Vocabulary.parse(message.data), "topic vocabulary_text")

    def on_set_vocabulary(
        self, request: SetVocabulary.Request, response: SetVocabulary.Response
    ) -> SetVocabulary.Response:
        """Answer the service `~/set_vocabulary`."""
        reason = self._set_vocabulary(lambda: Vocabulary(request.names), "service set_vocabulary")
        response.accepted, response.message = not reason, reason
        if not reason:
            vocabulary = self._config().make_vocabulary()
            response.ids = self._registry.ids(vocabulary.names)
            dropped = Vocabulary(request.names).dropped
            response.message = f"named more than once, the first counts: {listed(dropped)}" if dropped else ""
        return response

    def _set_vocabulary(self, read: Callable[[], Vocabulary], source: str) -> str:
        """Have the vocabulary that `read` gives, or say why not; the empty string where it was taken."""
        try:
            vocabulary = read()
        except ValueError as error:
            self._health.vocabulary(accepted=False)
            return self._vocabulary_rejected(source, str(error))
        self._warn_of_duplicates(vocabulary)
        names = Parameter("vocabulary", Parameter.Type.STRING_ARRAY, entries(vocabulary))
        result = self._set_parameters([names])
        return "" if result.successful else self._vocabulary_rejected(source, result.reason)

    def check(self, config: NodeConfig) -> None:
        """Raise ValueError where `config`, which is asked for, has a vocabulary that cannot be used."""
        if vocabulary_differs(config, self._config()):
            try:
                self._registry.check(config.make_vocabulary().names, config.id_reuse_delay)
            except ValueError:
                self._health.vocabulary(accepted=False)
                raise

    def _vocabulary_rejected(self, source: str, reason: str) -> str:
        if self._rejections.allows():
            self._log.warning(f"the vocabulary by {source} is rejected: {reason}; the one before stays")
        return reason

    def ask_for(self, config: NodeConfig) -> None:
        """Have the vocabulary of `config` prepared. Raises ValueError where it cannot be used."""
        vocabulary = config.make_vocabulary()
        labels = self._registry.assign(vocabulary.names, config.id_reuse_delay)
        replaced = self._request(Request(config, vocabulary, labels))
        if replaced is not None:
            self.abandon(replaced, None)
        self._health.vocabulary(accepted=True)
        if not self._acceptances.allows():
            return
        log = self._log
        self._warn_of_duplicates(vocabulary)
        if vocabulary.names:
            log.info(f"vocabulary of {len(vocabulary.names)}: {listed(vocabulary.names)}")
        else:
            log.warning(
                "the vocabulary is empty: every pixel stays unlabelled (255) until names are set, for example with "
                "ros2 topic pub --once /vocabulary_text std_msgs/msg/String \"data: 'chair, table'\""
            )

    def _warn_of_duplicates(self, vocabulary: Vocabulary) -> None:
        if vocabulary.dropped:
            self._log.warning(
                f"the vocabulary names these more than once; the first counts: {listed(vocabulary.dropped)}"
            )

    def abandon(self, request: Request, error: Exception | None) -> None:
        """Give back the ids of a request that was replaced (`error` is None) or could not be prepared."""
        self._registry.release(request.labels, shown=request.shown)
        if error is not None:
            self._failed(error)
            self._log.error(
                f"the vocabulary {listed(request.vocabulary.names)} could not be embedded; the one before serves"
            )
            self._on_executor(lambda: self._set_back(request))

    def _set_back(self, request: Request) -> None:
        """Set the parameters to the vocabulary in use again, after `request` failed."""
        snapshot = self._serving()
        if snapshot is None or vocabulary_differs(self._config(), request.config):
            return
        serving = snapshot.request.config
        self._set_parameters(
            [parameters.to_parameter(name, getattr(serving, name)) for name in parameters.VOCABULARY_FIELDS]
        )
