"""The ROS node: its life cycle and parameters, who subscribes to what, and how the parts are connected.

The executor's thread only receives: it checks a message's form, puts it into the worker's slot and goes on. Everything
that takes time happens on the worker's thread (pipeline.py), publishing included. What both threads use is immutable
(NodeConfig, Snapshot) or locks itself (LabelRegistry, Health, Mailbox, DepthBuffer).
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import time
import traceback
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock
from rclpy.clock_type import ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import String
from std_srvs.srv import SetBool

from nerve_ros import parameters
from nerve_ros.diagnostics import Diagnostics, Phase
from nerve_ros.health import Health
from nerve_ros.image_input import ImageInput
from nerve_ros.msg import Vocabulary as VocabularyMessage
from nerve_ros.outputs import Outputs
from nerve_ros.parameters import NodeConfig, vocabulary_differs
from nerve_ros.pipeline import OUT_OF_MEMORY_LIMIT, THROTTLE, Frame, Pipeline, Question, Request, Snapshot
from nerve_ros.questions import Questions
from nerve_ros.services import create_deferred_service, not_located, settle
from nerve_ros.srv import Locate, SetVocabulary
from nerve_ros.vocabulary_input import VocabularyInput
from nerve_ros.watchdog import Watchdog
from nerve_ros.worker import Worker

STUCK_EXIT_CODE = 70
"""What the process ends with where exit_when_stuck says so (EX_SOFTWARE of sysexits.h)."""

VOCABULARY_QOS = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)
TEXT_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE)

_CHANGE_STATE = "_LifecycleNodeMixin__change_state"
"""rclpy's method behind every transition, private to its mixin."""

Result = TypeVar("Result")
_Step: TypeAlias = Callable[["NerveNode", LifecycleState], None]
_Transition: TypeAlias = Callable[["NerveNode", LifecycleState], TransitionCallbackReturn]


class Interrupted(BaseException):
    """The process was asked to end while the node waited for the worker; nothing may delay its end."""


def _transition(doing: str, done: str) -> Callable[[_Step], _Transition]:
    """Make a method a transition callback: rclpy swallows what such a callback raises, so it is caught and logged here.

    `doing` and `done` are the names of the states meanwhile and at the end.
    """

    def decorate(method: _Step) -> _Transition:
        @functools.wraps(method)
        def callback(self: NerveNode, state: LifecycleState) -> TransitionCallbackReturn:
            self.phase.state = doing
            try:
                method(self, state)
            except Exception as error:
                self.phase.state = state.label
                self.phase.error = f"{doing} failed: {error}"
                self.get_logger().error(self.phase.error)
                self.get_logger().debug(traceback.format_exc())
                return TransitionCallbackReturn.FAILURE
            finally:
                self._pipeline.stage = ""
            self.phase.state = done
            self.phase.error = ""
            self.get_logger().info(done)
            return TransitionCallbackReturn.SUCCESS

        return callback

    return decorate


class NerveNode(LifecycleNode):
    """The lifecycle node `nerve`. Raises parameters.ParameterError where it is started with values it cannot use."""

    def __init__(self, *, parameter_overrides: list[Parameter] | None = None) -> None:
        super().__init__("nerve", parameter_overrides=parameter_overrides)
        self.phase = Phase()
        self.exit_code = 0
        self._health = Health()
        self._config = parameters.declare(self)
        self._pipeline = Pipeline(
            log=self.get_logger(),
            clock=self.get_clock(),
            health=self._health,
            config=lambda: self._config,
            publishing=lambda: self.phase.state == "active" and self.context.ok(),
            too_often_out_of_memory=self._too_often_out_of_memory,
        )
        self._worker: Worker[Frame, Request, Snapshot, Question] = Worker(
            process=self._pipeline.process,
            prepare=self._pipeline.prepare,
            adopt=lambda request, snapshot: self._pipeline.publish_labels(snapshot),
            abandon=lambda request, error: self._vocabularies.abandon(request, error),
            answer=self._pipeline.answer,
            failed=self._failed,
            min_interval=lambda: 1.0 / self._config.max_rate if self._config.max_rate else 0.0,
            enabled=lambda: self._config.enabled,
        )
        self._images = ImageInput(self, health=self._health, config=lambda: self._config, offer=self._worker.offer)
        self._watchdog = Watchdog(self._worker, log=self.get_logger(), timeout=lambda: self._config.inference_timeout)
        self._questions = Questions(
            ask=self._worker.ask,
            state=lambda: self.phase.state,
            obstacle=lambda: self._watchdog.stuck or f"no image came on {self._images.topic}",
            background_name=lambda: self._config.background_name,
        )
        self._vocabularies = VocabularyInput(
            log=self.get_logger(),
            health=self._health,
            config=lambda: self._config,
            set_parameters=self.set_parameters_atomically,
            request=self._worker.request,
            serving=lambda: self._worker.snapshot,
            doubts=self._pipeline.doubts_about,
            failed=self._failed,
            on_executor=self._on_executor,
        )
        for sentence in parameters.unknown_overrides(getattr(self, "_parameter_overrides", {})):
            self.get_logger().warning(sentence)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self.add_post_set_parameters_callback(self._on_parameters_set)
        self.create_subscription(VocabularyMessage, "vocabulary", self._vocabularies.on_vocabulary, VOCABULARY_QOS)
        self.create_subscription(String, "vocabulary_text", self._vocabularies.on_vocabulary_text, TEXT_QOS)
        self.create_service(SetVocabulary, "~/set_vocabulary", self._vocabularies.on_set_vocabulary)
        self.create_service(SetBool, "~/enable", self._on_enable)
        create_deferred_service(self, Locate, "~/locate", self._questions.on_locate, self._failed)
        self._diagnostics = Diagnostics(
            self,
            phase=self.phase,
            config=lambda: self._config,
            health=self._health,
            pipeline=self._pipeline,
            watchdog=self._watchdog,
            images=self._images,
            questions=self._questions,
        )
        # By the steady clock: with use_sim_time a paused simulation would silence it.
        self.create_timer(1.0, self._every_second, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def start(self) -> None:
        """Take the vocabulary that the node was started with; configure and activate, if autostart says so.

        Raises ValueError for a vocabulary that cannot be used, Interrupted where the process is asked to end meanwhile.
        """
        # Not here but on the worker's thread: the model libraries take seconds to import, deaf to signals.
        self._pipeline.stage = "importing the model libraries"
        self._await(self._worker.submit(lambda: importlib.import_module("nerve_core.segmenter")))
        self._pipeline.stage = ""
        self._vocabularies.ask_for(self._config)
        for trigger in (self.trigger_configure, self.trigger_activate) if self._config.autostart else ():
            succeeded = self.context.ok() and trigger() == TransitionCallbackReturn.SUCCESS
            if not self.context.ok():
                raise Interrupted
            if not succeeded:
                step = "configure" if self.phase.state == "unconfigured" else "activate"
                name = self.get_fully_qualified_name()
                self.get_logger().error(f"not started; put it right, then: ros2 lifecycle set {name} {step}")
                return

    def close(self, timeout: float = 2.0) -> bool:
        """Stop the worker's thread; returns whether it stopped within `timeout` seconds."""
        return self._worker.close(timeout)

    def destroy_node(self) -> None:
        """Give back all that DDS holds for the node; rclpy leaves the state machine, and all with it, to the garbage
        collector."""
        self._state_machine.destroy_when_not_in_use()
        super().destroy_node()

    # The life cycle, on the executor.

    @_transition("configuring", "inactive")
    def on_configure(self, state: LifecycleState) -> None:
        config = self._config
        self._health.reset()
        self.phase.fallen_back = ""
        try:
            description = self._await(self._worker.submit(lambda: self._load(config, config.device)))
            self._pipeline.outputs = Outputs(self)
        except Exception:
            self._release()
            raise
        self.get_logger().info(f"configured: {description}")

    @_transition("activating", "active")
    def on_activate(self, state: LifecycleState) -> None:
        super().on_activate(state)
        try:
            self._await(self._worker.submit(lambda: self._pipeline.publish_labels(self._worker.snapshot)))
            self._images.open()
        except Exception:
            super().on_deactivate(state)
            raise
        self._pipeline.forget(f"no image has come on {self._images.topic} yet")
        self._worker.resume()
        self.get_logger().info(f"waiting for images on {self._images.topic}")

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
            return getattr(super(), _CHANGE_STATE)(transition_id)
        except Exception as error:
            self.get_logger().error(f"transition {transition_id} is not possible while {self.phase.state}: {error}")
            return TransitionCallbackReturn.ERROR

    def _stop(self) -> None:
        waiting, questions = self._worker.pause()
        if waiting is not None:
            self._health.dropped()
        for question in questions:
            settle(question.answer, not_located("the node was deactivated"))
        self._images.close()

    def _load(self, config: NodeConfig, device: str) -> str:
        """Load the model pair and prepare the vocabulary; the pair's description for the log."""
        description = self._pipeline.load(config, device)
        self._worker.prepare_now()
        if config.warm_up:
            self._pipeline.warm_up()
        return description

    def _unload(self) -> None:
        self._worker.forget()
        self._pipeline.unload()

    def _release(self) -> None:
        self._await(self._worker.submit(self._unload))
        if self._pipeline.outputs is not None:
            self._pipeline.outputs.destroy()
            self._pipeline.outputs = None

    def _await(self, future: concurrent.futures.Future[Result]) -> Result:
        """The result of a job on the worker's thread; logs what is being done while it lasts."""
        started = time.monotonic()
        logged = published = 0
        while not concurrent.futures.wait([future], timeout=0.2).done:
            if not self.context.ok():
                raise Interrupted
            seconds = time.monotonic() - started
            stuck = self._watchdog.stuck
            if stuck:
                raise RuntimeError(f"{stuck}; nothing can be loaded or given back until it does")
            if seconds >= published + 1:
                published += 1
                self._diagnostics.publish()
            if seconds >= THROTTLE * (logged + 1):
                logged += 1
                doing = self._pipeline.stage or self.phase.state
                self.get_logger().info(f"{doing}, {seconds:.0f} s so far")
        return future.result()

    # Parameters, on the executor.

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        try:
            config = parameters.changed(self._config, changes, configured=self._pipeline.outputs is not None)
            self._vocabularies.check(config)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        except Exception as error:
            # An exception would leave whoever asked without an answer.
            self._failed(error)
            return SetParametersResult(successful=False, reason=f"internal error: {error!r}")
        return SetParametersResult(successful=True)

    def _on_parameters_set(self, changes: list[Parameter]) -> None:
        before = self._config
        self._config = parameters.changed(before, changes, configured=self._pipeline.outputs is not None)
        if vocabulary_differs(before, self._config):
            self._vocabularies.ask_for(self._config)
        self._worker.wake()

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        result = self.set_parameters_atomically([Parameter("enabled", value=request.data)])
        response.success, response.message = result.successful, result.reason
        return response

    # On the worker's thread.

    def _too_often_out_of_memory(self) -> None:
        segmenter = self._pipeline.segmenter
        if self._config.on_out_of_memory == "cpu" and segmenter is not None and segmenter.device.type != "cpu":
            self._worker.submit(self._fall_back)
        else:
            self._on_executor(lambda: self._give_up(f"out of memory {OUT_OF_MEMORY_LIMIT} times in a row: deactivated"))

    def _fall_back(self) -> None:
        self.phase.fallen_back = f"running on the CPU: out of memory {OUT_OF_MEMORY_LIMIT} times in a row"
        self.get_logger().error(f"out of memory {OUT_OF_MEMORY_LIMIT} times in a row: loading the models on the CPU")
        try:
            self._unload()
            description = self._load(self._config, "cpu")
        except Exception as error:
            self._failed(error)
            reason = f"the models could not be loaded on the CPU: {error}"
            self._on_executor(lambda: self._give_up(reason))
            return
        finally:
            self._pipeline.stage = ""
        self.get_logger().warning(f"{self.phase.fallen_back}; {description}")

    def _on_executor(self, do: Callable[[], None]) -> None:
        if self.executor is not None:
            self.executor.create_task(do)

    def _give_up(self, reason: str) -> None:
        if self.phase.state == "active":
            self.trigger_deactivate()
        if self._pipeline.segmenter is None and self.phase.state == "inactive":
            self.trigger_cleanup()
        self.phase.error = reason
        self.get_logger().error(reason)

    def _failed(self, error: Exception) -> None:
        if not self.context.ok():
            # The process is ending, and the work in progress finds its publishers gone.
            return
        self._health.failed(f"{type(error).__name__}: {error}")
        self.get_logger().error(
            f"error in the worker, which goes on: {''.join(traceback.format_exception(error))}",
            throttle_duration_sec=THROTTLE,
        )

    # Once a second, on the executor.

    def _every_second(self) -> None:
        stuck = self._watchdog.check()
        if stuck and self._config.exit_when_stuck:
            self.get_logger().fatal(f"{stuck}: the process ends, as exit_when_stuck says")
            self.exit_code = STUCK_EXIT_CODE
            self.context.try_shutdown()
            return
        self._images.look_again()
        self._questions.expire(self._config.inference_timeout)
        self._diagnostics.publish()
