"""Collects what the node publishes, by the stamp of the image that it belongs to."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import GetState
from rclpy.client import Client
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future
from sensor_msgs.msg import Image
from std_msgs.msg import Header
from vision_msgs.msg import LabelInfo

from nerve_ros.demo.spinning import Spinning
from nerve_ros.msg import ClassConfidenceArray

NODE = "nerve"
_LATCHED = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
_DEEP = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE)


@dataclass(frozen=True)
class Answer:
    """What the node said of the image of one stamp (nanoseconds).

    arrived: of the mask, in seconds of the steady clock. mask: packed, see :attr:`labels`. classes: name by class id,
    None until the message came. confidence_size: rows and columns of the confidence, None until it came. known: the
    class ids of the last LabelInfo before the mask.
    """

    stamp: int
    arrived: float = 0.0
    size: tuple[int, int] = (0, 0)
    mask: bytes = b""
    classes: dict[int, str] | None = None
    confidence_size: tuple[int, int] | None = None
    known: frozenset[int] = frozenset()

    @property
    def labels(self) -> np.ndarray:
        """The mask: uint8 [height, width] of class ids."""
        return np.frombuffer(zlib.decompress(self.mask), np.uint8).reshape(self.size)

    @property
    def complete(self) -> bool:
        """Whether mask, confidence of the same size and class_confidence are all there."""
        return bool(self.mask) and self.confidence_size == self.size and self.classes is not None


@dataclass
class Heard:
    """Everything that came in, until now. values: the node's last diagnostics. state: of its life cycle."""

    answers: dict[int, Answer] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    level: int = 0
    message: str = ""
    state: str = ""
    classes: dict[int, str] = field(default_factory=dict)


class Collector:
    """A ROS node `nerve_demo` that listens on a thread of its own to the node in `namespace`. Close it when done."""

    def __init__(self, namespace: str = "/") -> None:
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self._lock = threading.Lock()
        self._heard = Heard()
        self._asked_state: Future[GetState.Response] | None = None
        self._node = rclpy.create_node("nerve_demo", namespace=namespace)
        self._named = f"{namespace.strip('/')}/{NODE}:".lstrip("/")
        subscribe = self._node.create_subscription
        subscribe(Image, "segmentation/mask", self._on_mask, _DEEP)
        subscribe(Image, "segmentation/confidence", self._on_confidence, _DEEP)
        subscribe(ClassConfidenceArray, "segmentation/class_confidence", self._on_classes, _DEEP)
        subscribe(LabelInfo, "segmentation/label_info", self._on_label_info, _LATCHED)
        subscribe(DiagnosticArray, "/diagnostics", self._on_diagnostics, _DEEP)
        self._get_state: Client[GetState.Request, GetState.Response] = self._node.create_client(
            GetState, f"{NODE}/get_state"
        )
        self._node.create_timer(0.25, self._ask_state)
        self._spinning = Spinning(self._node)

    def close(self) -> None:
        """Stop listening."""
        self._spinning.close()
        rclpy.try_shutdown()

    def heard(self) -> Heard:
        """What came in until now."""
        with self._lock:
            return replace(self._heard, answers=dict(self._heard.answers))

    def _ask_state(self) -> None:
        """Ask for the state until it is active; a node that configures answers when it is done."""
        if self._asked_state is None and self._get_state.service_is_ready():
            self._asked_state = self._get_state.call_async(GetState.Request())
        elif self._asked_state is not None and self._asked_state.done():
            answer, self._asked_state = self._asked_state.result(), None
            if answer is not None:
                with self._lock:
                    self._heard.state = answer.current_state.label

    def _note(self, header: Header, change: Callable[[Answer], Answer]) -> None:
        """Change what is known of the image with this header; `change` is called with the lock held."""
        stamp = header.stamp.sec * 10**9 + header.stamp.nanosec
        with self._lock:
            self._heard.answers[stamp] = change(self._heard.answers.get(stamp) or Answer(stamp))

    def _on_mask(self, message: Image) -> None:
        arrived = time.monotonic()
        # A mask is a few areas of equal bytes: packed it takes a hundredth of its space.
        packed = zlib.compress(memoryview(message.data), 1)
        size = message.height, message.width

        def change(answer: Answer) -> Answer:
            return replace(answer, arrived=arrived, size=size, mask=packed, known=frozenset(self._heard.classes))

        self._note(message.header, change)

    def _on_confidence(self, message: Image) -> None:
        size = message.height, message.width
        self._note(message.header, lambda answer: replace(answer, confidence_size=size))

    def _on_classes(self, message: ClassConfidenceArray) -> None:
        classes = {entry.id: entry.name for entry in message.classes}
        self._note(message.header, lambda answer: replace(answer, classes=classes))

    def _on_label_info(self, message: LabelInfo) -> None:
        with self._lock:
            self._heard.classes = {entry.class_id: entry.class_name for entry in message.class_map}

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.startswith(self._named):
                with self._lock:
                    self._heard.values = {entry.key: entry.value for entry in status.values}
                    self._heard.level = ord(status.level)
                    self._heard.message = status.message
