"""The whole way from image message to mask message, wired to the life cycle of a ROS 2 node.

The executor only receives: it looks at a message's form, lays it into the worker's slot and goes on. Everything that
takes time happens on the worker's thread, publishing included. What both sides need is immutable (NodeConfig, Snapshot)
or guards itself (LabelRegistry, Health, Mailbox).
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from nerve_core import Vocabulary
from nerve_ros import parameters
from nerve_ros.health import Health, diagnostics
from nerve_ros.images import ImageError, check_image, to_rgb
from nerve_ros.labels import LabelRegistry, Labels
from nerve_ros.msg import Vocabulary as VocabularyMessage
from nerve_ros.outputs import Outputs
from nerve_ros.parameters import NodeConfig
from nerve_ros.worker import Worker

if TYPE_CHECKING:
    from nerve_core import Segmenter
    from nerve_core.settings import Settings
    from nerve_core.text import QueryEmbeddings

NO_IMAGE_WARNING = 2.0
"""Seconds without an image after which the diagnostics of an active node say so."""

THROTTLE = 5.0
"""Seconds between two log lines about images that cannot be used."""

VOCABULARY_QOS = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)
TEXT_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE)


@dataclass(frozen=True)
class Frame:
    """An image message and when it came in, in seconds of the steady clock."""

    message: Image | CompressedImage
    arrived: float


@dataclass
class Request:
    """A vocabulary that was accepted: what it means, its ids, and whether anybody was told of them."""

    config: NodeConfig
    vocabulary: Vocabulary
    labels: Labels
    shown: bool = False


@dataclass(frozen=True)
class Snapshot:
    """Everything an image needs of one vocabulary; an image is worked on with one snapshot from start to end."""

    request: Request
    embeddings: QueryEmbeddings
    id_table: np.ndarray


class Interrupted(BaseException):
    """The process was asked to end while the node waited for the worker; nothing on the way out is to hold it up."""


def _transition(doing: str, done: str) -> Callable:
    """Make a method a transition callback: rclpy swallows what such a callback raises, so it is caught and told here.

    `doing` and `done` are the names of the state on the way and at the end.
    """

    def decorate(method: Callable[[NerveNode, LifecycleState], None]) -> Callable:
        @functools.wraps(method)
        def callback(self: NerveNode, state: LifecycleState) -> TransitionCallbackReturn:
            self.state = doing
            try:
                method(self, state)
            except Exception as error:
                self.state = state.label
                self.transition_error = f"{doing} failed: {error}"
                self.get_logger().error(self.transition_error)
                self.get_logger().debug(traceback.format_exc())
                return TransitionCallbackReturn.FAILURE
            finally:
                self._stage = ""
            self.state = done
            self.transition_error = ""
            self.get_logger().info(done)
            return TransitionCallbackReturn.SUCCESS

        return callback

    return decorate


class NerveNode(LifecycleNode):
    """The lifecycle node `nerve`. Raises parameters.ParameterError where it is started with values it cannot use."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__("nerve", **kwargs)
        self.state = "unconfigured"
        self.transition_error = ""
        self._stage = self._operator = ""
        self._segmenter: Segmenter | None = None
        self._pair_settings: Settings | None = None
        self._applied: NodeConfig | None = None
        self._outputs: Outputs | None = None
        self._image_subscription: Subscription | None = None
        self._image_topic = ""
        self._active_since = 0.0
        self._health = Health()
        self._config = parameters.declare(self)
        self._registry = LabelRegistry()
        self._worker: Worker[Frame, Request, Snapshot] = Worker(
            process=self._process,
            prepare=self._prepare,
            adopt=self._adopt,
            abandon=self._abandon,
            failed=self._failed,
            min_interval=lambda: 1.0 / self._config.max_rate if self._config.max_rate else 0.0,
        )
        for sentence in parameters.unknown_overrides(getattr(self, "_parameter_overrides", {})):
            self.get_logger().warning(sentence)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self.add_post_set_parameters_callback(self._on_parameters_set)
        self.create_subscription(VocabularyMessage, "vocabulary", self._on_vocabulary, VOCABULARY_QOS)
        self.create_subscription(String, "vocabulary_text", self._on_vocabulary_text, TEXT_QOS)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 1)
        # By the steady clock: with use_sim_time a paused simulation would silence it.
        self.create_timer(1.0, self._publish_diagnostics, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def start(self) -> None:
        """Take the vocabulary that the node was started with; configure and activate, if autostart says so.

        Raises ValueError for a vocabulary that cannot be used, Interrupted where the process is asked to end meanwhile.
        """
        # Not here but on the worker's thread: the model libraries take seconds to import, deaf to signals.
        self._stage = "importing the model libraries"
        self._await(self._worker.submit(lambda: importlib.import_module("nerve_core.segmenter")))
        self._stage = ""
        self._ask_for_vocabulary(self._config)
        for trigger in (self.trigger_configure, self.trigger_activate) if self._config.autostart else ():
            succeeded = self.context.ok() and trigger() == TransitionCallbackReturn.SUCCESS
            if not self.context.ok():
                raise Interrupted
            if not succeeded:
                step = "configure" if self.state == "unconfigured" else "activate"
                name = self.get_fully_qualified_name()
                self.get_logger().error(f"not started; put it right, then: ros2 lifecycle set {name} {step}")
                return

    def close(self, timeout: float = 2.0) -> bool:
        """Stop the worker's thread; whether it stopped within `timeout` seconds."""
        return self._worker.close(timeout)

    # The life cycle, on the executor.

    @_transition("configuring", "inactive")
    def on_configure(self, state: LifecycleState) -> None:
        config = self._config
        self._health.reset()
        try:
            self._await(self._worker.submit(lambda: self._load(config)))
            self._outputs = Outputs(self)
        except Exception:
            self._release()
            raise
        self.get_logger().info(f"configured: {self._segmenter.description}")

    @_transition("activating", "active")
    def on_activate(self, state: LifecycleState) -> None:
        super().on_activate(state)
        try:
            self._await(self._worker.submit(self._tell_labels))
            self._active_since = time.monotonic()
            self._image_subscription = self._subscribe()
        except Exception:
            super().on_deactivate(state)
            raise
        self._worker.resume()
        self.get_logger().info(f"waiting for images on {self._image_topic}")

    @_transition("deactivating", "inactive")
    def on_deactivate(self, state: LifecycleState) -> None:
        self._stop()
        super().on_deactivate(state)

    @_transition("cleaningup", "unconfigured")
    def on_cleanup(self, state: LifecycleState) -> None:
        self._release()

    @_transition("shuttingdown", "finalized")
    def on_shutdown(self, state: LifecycleState) -> None:
        self._stop()
        self._release()

    @_transition("errorprocessing", "unconfigured")
    def on_error(self, state: LifecycleState) -> None:
        self._stop()
        self._release()

    # rclpy 7.1 lets the error of an impossible transition escape from its service's callback: whoever asked got no
    # answer and the executor stopped. Later releases do what this does.
    def _LifecycleNodeMixin__change_state(self, transition_id: int) -> TransitionCallbackReturn:
        try:
            return super()._LifecycleNodeMixin__change_state(transition_id)
        except Exception as error:
            self.get_logger().error(f"transition {transition_id} is not possible while {self.state}: {error}")
            return TransitionCallbackReturn.ERROR

    def _subscribe(self) -> Subscription:
        base = self.resolve_topic_name("image")
        compressed = self._config.image_transport == "compressed"
        self._image_topic = f"{base}/compressed" if compressed else base
        policies = (
            QoSPolicyKind.HISTORY,
            QoSPolicyKind.DEPTH,
            QoSPolicyKind.RELIABILITY,
            QoSPolicyKind.DURABILITY,
        )
        return self.create_subscription(
            CompressedImage if compressed else Image,
            self._image_topic,
            self._on_image,
            # A new one each time: the overrides are written into it.
            QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT, durability=DurabilityPolicy.VOLATILE),
            qos_overriding_options=QoSOverridingOptions(policies),
        )

    def _stop(self) -> None:
        self._worker.pause()
        if self._image_subscription is not None:
            self.destroy_subscription(self._image_subscription)
            self._image_subscription = None

    def _release(self) -> None:
        self._await(self._worker.submit(self._unload))
        if self._outputs is not None:
            self._outputs.destroy()
            self._outputs = None

    def _await(self, future: concurrent.futures.Future) -> object:
        """The result of a job on the worker's thread; tells how far it is while it lasts."""
        started = time.monotonic()
        told = published = 0
        while not concurrent.futures.wait([future], timeout=0.2).done:
            if not self.context.ok():
                raise Interrupted
            seconds = time.monotonic() - started
            if seconds >= published + 1:
                published += 1
                self._publish_diagnostics()
            if seconds >= THROTTLE * (told + 1):
                told += 1
                self.get_logger().info(f"{self._stage or self.state}, {seconds:.0f} s so far")
        return future.result()

    # The vocabulary: whatever way it comes, it ends in the parameter, and there in one pair of callbacks.

    def _on_vocabulary(self, message: VocabularyMessage) -> None:
        self._set_vocabulary(lambda: Vocabulary(message.names), "topic vocabulary")

    def _on_vocabulary_text(self, message: String) -> None:
        self._set_vocabulary(lambda: Vocabulary.parse(message.data), "topic vocabulary_text")

    def _set_vocabulary(self, read: Callable[[], Vocabulary], source: str) -> None:
        try:
            vocabulary = read()
        except ValueError as error:
            self._health.vocabulary(accepted=False)
            self._vocabulary_rejected(source, str(error))
            return
        self._warn_of_duplicates(vocabulary)
        names = Parameter("vocabulary", Parameter.Type.STRING_ARRAY, _entries(vocabulary))
        result = self.set_parameters_atomically([names])
        if not result.successful:
            self._vocabulary_rejected(source, result.reason)

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        try:
            config = parameters.changed(self._config, changes, configured=self._outputs is not None)
            if _vocabulary_differs(config, self._config):
                try:
                    self._registry.check(config.make_vocabulary().names, config.id_reuse_delay)
                except ValueError:
                    self._health.vocabulary(accepted=False)
                    raise
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        except Exception as error:
            # An exception would leave whoever asked without an answer.
            self._failed(error)
            return SetParametersResult(successful=False, reason=f"internal error: {error!r}")
        return SetParametersResult(successful=True)

    def _on_parameters_set(self, changes: list[Parameter]) -> None:
        before = self._config
        self._config = parameters.changed(before, changes, configured=self._outputs is not None)
        if _vocabulary_differs(before, self._config):
            self._ask_for_vocabulary(self._config)

    def _vocabulary_rejected(self, source: str, reason: str) -> None:
        self.get_logger().warning(f"the vocabulary by {source} is rejected: {reason}; the one before stays")

    def _ask_for_vocabulary(self, config: NodeConfig) -> None:
        vocabulary = config.make_vocabulary()
        labels = self._registry.assign(vocabulary.names, config.id_reuse_delay)
        replaced = self._worker.request(Request(config, vocabulary, labels))
        if replaced is not None:
            self._abandon(replaced, None)
        self._health.vocabulary(accepted=True)
        log = self.get_logger()
        self._warn_of_duplicates(vocabulary)
        if vocabulary.names:
            log.info(f"vocabulary of {len(vocabulary.names)}: {_listed(vocabulary.names)}")
        else:
            log.warning(
                "the vocabulary is empty: every pixel stays unlabelled (255) until names are set, for example with "
                "ros2 topic pub --once /vocabulary_text std_msgs/msg/String \"data: 'chair, table'\""
            )

    def _warn_of_duplicates(self, vocabulary: Vocabulary) -> None:
        if vocabulary.dropped:
            self.get_logger().warning(
                f"the vocabulary names these more than once; the first counts: {_listed(vocabulary.dropped)}"
            )

    # On the worker's thread.

    def _load(self, config: NodeConfig) -> None:
        from nerve_core import Segmenter
        from nerve_core.models import quiet_libraries

        quiet_libraries()
        self._stage = f"loading model pair '{config.model}'"
        self._segmenter = Segmenter.from_pretrained(
            config.model,
            device=config.device,
            dtype=None if config.precision == "auto" else config.precision,
            preset=config.preset,
            revision=config.revision or None,
            cache_dir=config.cache_dir or None,
            offline=True if config.offline else None,
            settings=config.load_settings(),
            compile=config.compile,
        )
        self._pair_settings = self._segmenter.settings
        self._stage = "embedding the vocabulary"
        self._worker.prepare_now()
        if config.warm_up:
            self._stage = "warming up"
            self._segmenter.warm_up()

    def _unload(self) -> None:
        self._worker.forget()
        if self._segmenter is not None:
            self._segmenter.close()
        self._segmenter = self._pair_settings = self._applied = None

    def _prepare(self, request: Request) -> Generator[None, None, Snapshot]:
        embeddings = yield from self._segmenter.embed_steps(request.vocabulary)
        return Snapshot(request, embeddings, request.labels.id_table())

    def _adopt(self, request: Request, snapshot: Snapshot) -> None:
        self._tell_labels()

    def _tell_labels(self) -> None:
        snapshot = self._worker.snapshot
        if self._outputs is None or snapshot is None:
            return
        self._apply(self._config)
        request = snapshot.request
        request.shown |= self._outputs.label_info(
            request.labels,
            request.config.background_name,
            self._segmenter.settings.readout.threshold,
            self.get_clock().now().to_msg(),
        )

    def _apply(self, config: NodeConfig) -> bool:
        """Have the segmenter go by the settings of `config` that may change between images; whether any changed."""
        if config is self._applied:
            return False
        settings = self._pair_settings.replaced(config.frame_settings())
        different = settings != self._segmenter.settings
        self._segmenter.settings, self._applied = settings, config
        return different

    def _abandon(self, request: Request, error: Exception | None) -> None:
        self._registry.release(request.labels, shown=request.shown)
        if error is not None:
            self._failed(error)
            self.get_logger().error(
                f"the vocabulary {_listed(request.vocabulary.names)} could not be embedded; the one before serves"
            )
            if self.executor is not None:
                self.executor.create_task(self._set_back, request)

    def _set_back(self, request: Request) -> None:
        """Make the parameters say again what serves, after `request` failed (on the executor)."""
        snapshot = self._worker.snapshot
        if snapshot is None or _vocabulary_differs(self._config, request.config):
            return
        serving = snapshot.request.config
        self.set_parameters_atomically(
            [parameters.to_parameter(name, getattr(serving, name)) for name in parameters.VOCABULARY_FIELDS]
        )

    def _process(self, frame: Frame, snapshot: Snapshot) -> None:
        config, header = self._config, frame.message.header
        stamp = header.stamp.sec + 1e-9 * header.stamp.nanosec
        age = self.get_clock().now().nanoseconds * 1e-9 - stamp
        if config.max_image_age and age > config.max_image_age:
            self._health.dropped()
            self.get_logger().warning(
                f"image dropped: its stamp is {age:.2f} s old, max_image_age is {config.max_image_age:g} s",
                throttle_duration_sec=THROTTLE,
            )
            return
        if self._apply(config):
            self._tell_labels()
        started = time.perf_counter()
        try:
            image = to_rgb(frame.message)
        except ImageError as error:
            self._image_rejected(error)
            return
        converted = time.perf_counter()
        segmentation = self._segmenter(image, snapshot.embeddings)
        computed = time.perf_counter()
        self._operator = segmentation.operator
        if self.state != "active" or not self.context.ok():
            self._health.dropped()
            return
        self._outputs.image(
            header, segmentation, snapshot.request.labels, snapshot.id_table, image, config.overlay_alpha
        )
        published = time.perf_counter()
        self._health.segmented(
            stamp=stamp,
            now=self.get_clock().now().nanoseconds * 1e-9,
            latency=time.monotonic() - frame.arrived,
            stages_ms={
                **segmentation.timings,
                "convert": 1e3 * (converted - started),
                "infer": 1e3 * (computed - converted),
                "publish": 1e3 * (published - computed),
            },
        )

    def _failed(self, error: Exception) -> None:
        if not self.context.ok():
            # The process is ending, and what was under way finds its publishers gone.
            return
        self._health.failed(f"{type(error).__name__}: {error}")
        self.get_logger().error(
            f"error in the worker, which goes on: {''.join(traceback.format_exception(error))}",
            throttle_duration_sec=THROTTLE,
        )

    # Images, on the executor.

    def _on_image(self, message: Image | CompressedImage) -> None:
        self._health.arrived()
        try:
            check_image(message)
        except ImageError as error:
            # Before the slot: a broken message must not push a good one out of it.
            self._image_rejected(error)
            return
        if not self._worker.offer(Frame(message, time.monotonic())):
            self._health.dropped()

    def _image_rejected(self, error: ImageError) -> None:
        self._health.rejected(error.kind, str(error))
        self.get_logger().error(f"image on {self._image_topic} dropped: {error}", throttle_duration_sec=THROTTLE)

    # Diagnostics, on the executor.

    def _publish_diagnostics(self) -> None:
        level, message = self._status()
        segmenter = self._segmenter
        values = {"state": self.state, "stage": self._stage}
        values |= {
            "model": segmenter.pair_name if segmenter else self._config.model,
            "device": str(segmenter.device) if segmenter else "",
            "precision": str(segmenter.dtype) if segmenter else "",
            "operator": self._operator,
            "image_topic": self._image_topic,
            "vocabulary": _listed([name for name in self._config.vocabulary if name]),
        }
        self._diagnostics.publish(
            diagnostics(
                name=f"{self.get_fully_qualified_name().lstrip('/')}: segmentation",
                hardware=values["device"],
                level=level,
                message=message,
                values=values | self._health.figures(),
                stamp=self.get_clock().now().to_msg(),
            )
        )

    def _status(self) -> tuple[bytes, str]:
        if self.transition_error:
            return DiagnosticStatus.ERROR, self.transition_error
        if self.state != "active":
            return DiagnosticStatus.OK, self.state
        trouble = self._health.trouble()
        if trouble is not None:
            return trouble
        silence = self._health.seconds_without_image()
        active = time.monotonic() - self._active_since
        silence = active if silence is None else min(silence, active)
        if silence > NO_IMAGE_WARNING:
            publishers = self.count_publishers(self._image_topic)
            who = f"{publishers} publish there" if publishers else "nobody publishes there"
            return DiagnosticStatus.WARN, f"no image on {self._image_topic} for {silence:.0f} s; {who}"
        return DiagnosticStatus.OK, "active"


def _vocabulary_differs(one: NodeConfig, other: NodeConfig) -> bool:
    return any(getattr(one, name) != getattr(other, name) for name in parameters.VOCABULARY_FIELDS)


def _entries(vocabulary: Vocabulary) -> list[str]:
    """The names with their synonyms, as a message or the parameter holds them."""
    return ["|".join(names) for names in vocabulary.synonyms]


def _listed(names: Sequence[str], most: int = 20) -> str:
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + rest
