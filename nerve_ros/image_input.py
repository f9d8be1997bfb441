"""Subscribes to images, depth images and camera_info, hands good images on, and says why none comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from nerve_ros.depth import DepthBuffer
from nerve_ros.graph import published_types, why_no_image, wrong_type
from nerve_ros.health import Health
from nerve_ros.images import ImageError, check_image
from nerve_ros.parameters import NodeConfig
from nerve_ros.pipeline import THROTTLE, Frame

NO_IMAGE_WARNING = 2.0
"""Seconds without an image after which the diagnostics of an active node, and the log, say so."""

RAW, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"


class ImageInput:
    """The subscriptions of an active node. Everything here is called on the executor's thread.

    node: subscribes and logs. config(): the parameters now. offer: hands a frame to the worker; returns False where it
    replaced one that still waited.
    """

    def __init__(
        self, node: Node, *, health: Health, config: Callable[[], NodeConfig], offer: Callable[[Frame], bool]
    ) -> None:
        self._node, self._health, self._config, self._offer = node, health, config, offer
        self._inputs: list[Subscription] = []
        self._active_since = 0.0
        self._silence_logged = False
        self._wrong_logged: set[str] = set()
        self._depth = DepthBuffer(lambda: config().depth_tolerance)
        self.topic = ""

    def _published(self) -> tuple[type, str] | None:
        """Type and topic of images by what is published, as a subscription takes them; None where nothing fits.

        image_transport asks for the topic `image`, raw, or for the one beside it. A topic is read by the type that it
        has, the one asked for before the other; where `image` is itself the compressed one, that is read.
        """
        if self._config().image_transport != "compressed":
            types = published_types(self._node, self._node.resolve_topic_name("image"))
            return (Image, "image") if RAW in types else (CompressedImage, "image") if COMPRESSED in types else None
        beside = self._beside()
        types = published_types(self._node, self._node.resolve_topic_name(beside))
        if types & {RAW, COMPRESSED}:
            return (CompressedImage if COMPRESSED in types else Image), beside
        types = published_types(self._node, self._node.resolve_topic_name("image"))
        return (CompressedImage, "image") if COMPRESSED in types else None

    def _called(self) -> tuple[type, str]:
        """The same by name, while nobody publishes: one that ends with /compressed is a compressed one."""
        topic, beside = self._node.resolve_topic_name("image"), self._beside()
        compressed = self._config().image_transport == "compressed"
        if topic.endswith("/compressed"):
            doubled = self._node.resolve_topic_name(beside) == f"{topic}/compressed"
            return CompressedImage, beside if compressed and not doubled else "image"
        return (CompressedImage, beside) if compressed else (Image, "image")

    def _beside(self) -> str:
        """The topic of compressed images: whatever `image/compressed` is remapped to; where that is left alone, the
        one beside the topic that `image` is remapped to."""
        name = "image/compressed"
        if self._node.resolve_topic_name(name) == self._node.resolve_topic_name(name, only_expand=True):
            name = f"{self._node.resolve_topic_name('image')}/compressed"
        return name

    def open(self) -> None:
        """Subscribe; `topic` is then the full name of the images' topic, also after :meth:`close`."""
        self._active_since = time.monotonic()
        self._silence_logged = False
        self._wrong_logged.clear()
        self._subscribe_image(self._published() or self._called())
        if self._config().use_depth:
            self._inputs.append(self._subscribe(Image, "depth", self._depth.depth))
            self._inputs.append(self._subscribe(CameraInfo, "camera_info", self._depth.camera_info))

    def _subscribe_image(self, chosen: tuple[type, str]) -> None:
        kind, name = chosen
        self._inputs.insert(0, self._subscribe(kind, name, self.on_image))
        self.topic = self._inputs[0].topic_name
        asked = self._beside() if self._config().image_transport == "compressed" else "image"
        usual = CompressedImage if self._config().image_transport == "compressed" else Image
        if chosen != (usual, asked):
            self._node.get_logger().info(
                f"{self.topic} is read as sensor_msgs/msg/{kind.__name__}, as it is published or called, though "
                f"image_transport is {self._config().image_transport}"
            )

    def _subscribe(self, kind: type, topic: str, callback: Callable[[Any], None]) -> Subscription:
        # A quality of service of its own each time: the overrides are written into it.
        qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT, durability=DurabilityPolicy.VOLATILE)
        policies = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
        overrides = QoSOverridingOptions(policies)
        return self._node.create_subscription(kind, topic, callback, qos, qos_overriding_options=overrides)

    def look_again(self) -> None:
        """Once a second: where no image comes, subscribe anew if the camera that is there now publishes otherwise."""
        silence = self._health.seconds_without_image()
        if not self._inputs or (silence is not None and silence < 1.0):
            return
        chosen, old = self._published(), self._inputs[0]
        if chosen and (old.msg_type, old.topic_name) != (chosen[0], self._node.resolve_topic_name(chosen[1])):
            self._node.destroy_subscription(self._inputs.pop(0))
            self._subscribe_image(chosen)
            self._node.get_logger().info(f"waiting for images on {self.topic}")

    def close(self) -> None:
        """Unsubscribe and forget the depth images."""
        for subscription in self._inputs:
            self._node.destroy_subscription(subscription)
        self._inputs.clear()
        self._depth.clear()

    def on_image(self, message: Image | CompressedImage) -> None:
        """Take an image."""
        self._health.arrived()
        try:
            check_image(message)
        except ImageError as error:
            # Before the slot: a broken message must not push a good one out of it.
            self._image_rejected(error)
            return
        match = self._depth.follow(message.header) if self._config().use_depth else None
        if not self._offer(Frame(message, time.monotonic(), match)):
            self._health.dropped()

    def _image_rejected(self, error: ImageError) -> None:
        self._health.rejected(error.kind, str(error))
        self._node.get_logger().error(f"image on {self.topic} dropped: {error}", throttle_duration_sec=THROTTLE)

    def silence(self) -> str:
        """For how long no image has come and why, logged once each time; empty while they come.

        Only while subscribed.
        """
        silence = self._health.seconds_without_image()
        active = time.monotonic() - self._active_since
        silence = active if silence is None else min(silence, active)
        if silence <= NO_IMAGE_WARNING:
            self._silence_logged = False
            return ""
        image = self._inputs[0]
        kind = "sensor_msgs/msg/" + image.msg_type.__name__
        text = f"no image on {self.topic} for {silence:.0f} s; "
        text += why_no_image(self._node, self.topic, kind, (RAW, COMPRESSED), image.qos_profile) + self._elsewhere()
        if not self._silence_logged:
            self._silence_logged = True
            self._node.get_logger().warning(text)
        return text

    def _elsewhere(self) -> str:
        """What is published on the camera's other topic, where nothing is on the one that is read."""
        if published_types(self._node, self.topic):
            return ""
        for name, transport, kind in (("image", "raw", RAW), (self._beside(), "compressed", COMPRESSED)):
            topic = self._node.resolve_topic_name(name)
            if topic != self.topic and kind in published_types(self._node, topic):
                return f", but {kind} on {topic}: set image_transport to {transport}"
        return ""

    def wrong_side(self) -> str:
        """What is wrong with the depth or camera_info topic, logged once each; empty where it fits or nobody publishes.

        Only while subscribed.
        """
        found = []
        for subscription in self._inputs[1:]:
            kind = "sensor_msgs/msg/" + subscription.msg_type.__name__
            if text := wrong_type(self._node, subscription.topic_name, kind):
                if subscription.msg_type is Image:
                    text += (
                        ", as it comes from the camera or its driver (16UC1, 32FC1, 64FC1); compressed depth "
                        "(compressedDepth, zstd, ...) is not: republish it raw with image_transport"
                    )
                found.append(text)
                if subscription.topic_name not in self._wrong_logged:
                    self._wrong_logged.add(subscription.topic_name)
                    self._node.get_logger().warning(text)
            else:
                self._wrong_logged.discard(subscription.topic_name)
        return "; ".join(found)
