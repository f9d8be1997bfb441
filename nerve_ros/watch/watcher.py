"""The ROS node behind `nerve watch`: subscribes to a node's outputs and finds out why nothing comes."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import cv2
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import Image
from vision_msgs.msg import LabelInfo

from nerve_ros.images import ImageError, to_rgb
from nerve_ros.msg import ClassConfidenceArray
from nerve_ros.watch.board import PATIENCE, Board, class_entry, printable
from nerve_ros.watch.keeper import Keeper

SIDE = 1920
"""Pixels that the longer side of a picture has on the page at most."""
ENTRIES = 255
"""Classes and diagnostic values that are taken from one message at most."""

_LIVE_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE)
_LATCHED_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
_LEVELS = {
    DiagnosticStatus.OK: "ok",
    DiagnosticStatus.WARN: "warn",
    DiagnosticStatus.ERROR: "error",
    DiagnosticStatus.STALE: "stale",
}


class Watcher(Node):
    """Subscribes to the node `nerve` of a namespace, and to its overlay only while somebody wants pictures."""

    def __init__(self, namespace: str, board: Board, keeper: Keeper | None) -> None:
        super().__init__(f"nerve_watch_{os.getpid()}", namespace=namespace, enable_rosout=False)
        self._board = board
        self._keeper = keeper
        self._overlay: Subscription | None = None
        self._complaint = ""
        self._looked = -math.inf
        self.target = f"{namespace.rstrip('/')}/nerve"
        self._overlay_topic = self.resolve_topic_name("segmentation/overlay")
        self._results_topic = self.resolve_topic_name("segmentation/class_confidence")
        board.about = {"node": self.target, "topic": self._overlay_topic, "domain": self.context.get_domain_id()}
        self.create_subscription(ClassConfidenceArray, self._results_topic, self._on_result, _LIVE_QOS)
        self.create_subscription(LabelInfo, "segmentation/label_info", self._on_labels, _LATCHED_QOS)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def look_after(self) -> None:
        """Subscribe to the overlay or leave it, as viewers come and go; now and then look why nothing comes."""
        wanted = self._board.watched or (self._keeper is not None and not self._keeper.error)
        if wanted and self._overlay is None:
            self._board.forget_picture()
            self._overlay = self.create_subscription(Image, self._overlay_topic, self._on_overlay, _LIVE_QOS)
        elif not wanted and self._overlay is not None:
            self.destroy_subscription(self._overlay)
            self._overlay, self._complaint = None, ""
            # Whoever looks next is not to see what was there before.
            self._board.forget_picture()
        if time.monotonic() - self._looked >= 0.5:
            self._looked = time.monotonic()
            self._board.reason = printable(self._trouble(), 600)

    def _on_result(self, message: ClassConfidenceArray) -> None:
        self._board.result(
            [
                class_entry(
                    seen.id,
                    seen.name,
                    presence=_share(seen.presence),
                    confidence=_share(seen.mean_probability),
                    area=seen.area,
                )
                for seen in message.classes[:ENTRIES]
            ],
            _stamp(message),
        )

    def _on_labels(self, message: LabelInfo) -> None:
        named = [(entry.class_id, entry.class_name) for entry in message.class_map[:ENTRIES]]
        self._board.labels([(number, name) for number, name in named if 0 < number < 255])

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        name = f"{self.target.lstrip('/')}: segmentation"
        for status in message.status:
            if status.name == name:
                self._board.diagnostics(
                    {
                        "level": _LEVELS.get(status.level, "error"),
                        "message": printable(status.message, 500),
                        "values": {printable(pair.key): printable(pair.value, 500) for pair in status.values[:ENTRIES]},
                    }
                )

    def _on_overlay(self, message: Image) -> None:
        try:
            image = to_rgb(message)
        except ImageError as error:
            self._complaint = f"a picture on {self._overlay_topic} cannot be shown: {error}"
            return
        self._complaint = ""
        height, width = image.shape[:2]
        if max(height, width) > SIDE:
            scale = SIDE / max(height, width)
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, 88))[1].tobytes()
        self._board.picture(jpeg, _stamp(message), height * width)
        if self._keeper is not None:
            self._keeper.keep(jpeg, "{}_{:09d}".format(*_stamp(message)))

    def _trouble(self) -> str:
        """What keeps the page from showing all that it should, in a sentence; empty while all is well."""
        if self._keeper is not None and self._keeper.error:
            return self._keeper.error
        no_results, no_pictures = self._board.quiet()
        if no_results:
            return self._why(self._results_topic, "nerve_ros/msg/ClassConfidenceArray", no_results)
        if self._overlay is not None and (self._complaint or no_pictures):
            return self._complaint or self._why(self._overlay_topic, "sensor_msgs/msg/Image", no_pictures)
        last, age = self._board.last_diagnostics()
        return last["message"] if last and last["level"] != "ok" and age <= 2 * PATIENCE else ""

    def _why(self, topic: str, message_type: str, silence: float) -> str:
        """Why nothing comes on a topic that is subscribed reliable and volatile, as far as this machine can see."""
        last, age = self._board.last_diagnostics()
        current = last if age <= 2 * PATIENCE else {}
        state = current.get("values", {}).get("state", "")
        publishers = self.get_publishers_info_by_topic(topic)
        if not publishers:
            return f"nobody publishes on {topic}: {self._why_nobody(topic, message_type, current, state)}"
        for publisher in publishers:
            who = f"{publisher.node_namespace.rstrip('/')}/{publisher.node_name}"
            if publisher.topic_type != message_type:
                return f"{who} publishes {publisher.topic_type} on {topic}, where {message_type} is expected"
            if publisher.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT:
                return f"{who} publishes on {topic} with reliability best_effort, where reliable is expected"
        if state == "inactive":
            return f"{self.target} is inactive; ros2 lifecycle set {self.target} activate"
        if current and (current["level"] != "ok" or current["message"] != "active"):
            return current["message"]
        if last and not current:
            return f"{self.target} has told nothing for {age:.0f} s: it was ended, or it hangs"
        return f"nothing has come on {topic} for {silence:.0f} s"

    def _why_nobody(self, topic: str, message_type: str, current: dict[str, Any], state: str) -> str:
        name, namespace = "nerve", self.get_namespace()
        nodes = self.get_node_names_and_namespaces()
        if state == "unconfigured":
            return f"{self.target} is unconfigured; ros2 lifecycle set {self.target} configure"
        if state or (name, namespace) in nodes:
            stage = current.get("values", {}).get("stage", "")
            return f"{self.target} is {state or 'there and has told nothing yet'}{stage and f' ({stage})'}"
        suffix = topic[len(namespace.rstrip("/")) :]
        elsewhere = sorted(
            (other[: -len(suffix)] or "/")
            for other, types in self.get_topic_names_and_types()
            if other.endswith(suffix) and message_type in types and self.count_publishers(other)
        )
        if elsewhere:
            return f"there is one in another namespace, use --namespace {' or '.join(elsewhere[:5])}"
        others = sum(entry != (self.get_name(), namespace) for entry in nodes)
        reach = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "")
        return (
            f"there is no node {self.target} in ROS domain {self.context.get_domain_id()} "
            f"({reach and f'discovery range {reach}, '}{others} other nodes are seen); start it, or give this terminal "
            "its ROS_DOMAIN_ID"
        )


def _stamp(message: Image | ClassConfidenceArray) -> tuple[int, int]:
    return message.header.stamp.sec, message.header.stamp.nanosec


def _share(value: float) -> float | None:
    return round(min(max(value, 0.0), 1.0), 3) if math.isfinite(value) else None
