"""Takes vocabularies from topics, service and parameters, gives names their class ids, and hands both to the worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rcl_interfaces.msg import SetParametersResult
from rclpy.impl.rcutils_logger import RcutilsLogger
from rclpy.parameter import Parameter
from std_msgs.msg import String

from nerve_core import Vocabulary
from nerve_core.text.parsing import split_names
from nerve_core.text.vocabulary import listed
from nerve_ros import parameters
from nerve_ros.health import Health
from nerve_ros.labels import LabelRegistry
from nerve_ros.log_burst import LogBurst
from nerve_ros.msg import Vocabulary as VocabularyMessage
from nerve_ros.parameters import NodeConfig, vocabulary_differs
from nerve_ros.pipeline import THROTTLE, Request, Snapshot
from nerve_ros.srv import SetVocabulary

VOCABULARIES_LOGGED = 60
"""Accepted vocabularies that are logged within THROTTLE seconds, at most."""

REJECTIONS_LOGGED = 20
"""Rejected vocabularies that are logged within THROTTLE seconds, each with its reason; the others are counted."""


class VocabularyInput:
    """Whatever way a vocabulary comes, it ends in the parameter ``vocabulary``, and there in `check` and `ask_for`.

    config(): the parameters now. set_parameters: sets them, and says whether it did. request: has the worker prepare a
    vocabulary; returns the one that this replaces before its preparation began. serving(): what images are segmented
    by now. doubts(vocabulary): sentences on what the loaded model pair cannot make of it. failed(error): counts and
    logs an error. on_executor: has a function run on the executor's thread.
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
        doubts: Callable[[Vocabulary], Sequence[str]],
        failed: Callable[[Exception], None],
        on_executor: Callable[[Callable[[], None]], None],
    ) -> None:
        self._log, self._health, self._config = log, health, config
        self._set_parameters, self._request, self._serving = set_parameters, request, serving
        self._doubts, self._failed, self._on_executor = doubts, failed, on_executor
        self._registry = LabelRegistry()
        self._acceptances = LogBurst(VOCABULARIES_LOGGED, THROTTLE)
        self._rejections = LogBurst(REJECTIONS_LOGGED, THROTTLE)

    def on_vocabulary(self, message: VocabularyMessage) -> None:
        """Take the topic `vocabulary`."""
        self._set_vocabulary(lambda: self._read(message.names), "topic vocabulary")

    def on_vocabulary_text(self, message: String) -> None:
        """Take the topic `vocabulary_text`."""
        self._set_vocabulary(lambda: self._read(split_names(message.data)), "topic vocabulary_text")

    def on_set_vocabulary(
        self, request: SetVocabulary.Request, response: SetVocabulary.Response
    ) -> SetVocabulary.Response:
        """Answer the service `~/set_vocabulary`."""
        reason = self._set_vocabulary(lambda: self._read(request.names), "service set_vocabulary")
        response.accepted, response.message = not reason, reason
        if not reason:
            vocabulary = self._config().make_vocabulary()
            response.ids = self._registry.ids(vocabulary.names)
            response.message = "; ".join([*self._read(request.names).remarks, *self._doubts(vocabulary)])
        return response

    def _read(self, names: Sequence[str]) -> Vocabulary:
        return Vocabulary(names, background_name=self._config().background_name)

    def _set_vocabulary(self, read: Callable[[], Vocabulary], source: str) -> str:
        """Have the vocabulary that `read` gives, or say why not; the empty string where it was taken."""
        try:
            vocabulary = read()
        except ValueError as error:
            self._health.vocabulary(accepted=False)
            return self._vocabulary_rejected(source, str(error))
        if vocabulary.dropped:  # the parameter will not hold them
            self._warn(vocabulary.remarks[:1])
        names = Parameter("vocabulary", Parameter.Type.STRING_ARRAY, list(vocabulary.entries))
        result = self._set_parameters([names])
        return "" if result.successful else self._vocabulary_rejected(source, result.reason)

    def check(self, config: NodeConfig) -> None:
        """Raise ValueError where `config`, which is asked for, has a vocabulary that cannot be used."""
        before = self._config()
        if vocabulary_differs(config, before):
            try:
                vocabulary = config.make_vocabulary()
                if config.vocabulary == before.vocabulary:
                    _check_background(vocabulary, before.make_vocabulary())
                self._registry.check(vocabulary.names, config.id_reuse_delay)
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
        self._warn(vocabulary.remarks)
        if vocabulary.names:
            log.info(f"vocabulary of {len(vocabulary.names)}: {listed(vocabulary.names)}")
        else:
            log.warning(
                "the vocabulary is empty: every pixel stays unlabelled (255) until names are set, for example with "
                "ros2 topic pub --once /vocabulary_text std_msgs/msg/String \"data: 'chair, table'\""
            )

    def _warn(self, remarks: Sequence[str]) -> None:
        for remark in remarks:
            self._log.warning(f"in the vocabulary: {remark}")

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


def _check_background(vocabulary: Vocabulary, before: Vocabulary) -> None:
    """Raise ValueError where a change of background_name alone would take a class from the vocabulary `before`."""
    taken = [name for name in before.names if name not in vocabulary.names]
    if taken and vocabulary.background:
        raise ValueError(
            f"background_name {vocabulary.background_name!r} is a name of the vocabulary, and no two labels may have "
            "one name; choose another, or take it from the vocabulary first"
        )
