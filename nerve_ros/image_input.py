"""Subscribes to images, depth images and camera_info, hands good images on, and says why none comes."""

from __future__ import annotations

import time
from collections.abc import Callable

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from nerve_ros.depth import DepthBuffer
from nerve_ros.graph import why_no_image
from nerve_ros.health import Health
from nerve_ros.images import ImageError, check_image
from nerve_ros.parameters import NodeConfig
from nerve_ros.pipeline import THROTTLE, Frame

NO_IMAGE_WARNING = 2.0
"""Seconds without an image after which the diagnostics of an active node, and the log, say so."""


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
        self._depth = DepthBuffer(lambda: config().depth_tolerance)
        self.topic = ""

    def _image_input(self) -> tuple[type, str]:
        """Type and topic of images, as a subscription takes them. Compressed ones are on whatever `image/compressed` is
        remapped to; where that is left alone, beside the topic that `image` is remapped to."""
        if self._config().image_transport != "compressed":
            return Image, "image"
        name = "image/compressed"
        if self._node.resolve_topic_name(name) == self._node.resolve_topic_name(name, only_expand=True):
            name = f"{self._node.resolve_topic_name('image')}/compressed"
        return CompressedImage, name

    def open(self) -> None:
        """Subscribe; `topic` is then the full name of the images' topic, also after :meth:`close`."""
        self._active_since = time.monotonic()
        self._silence_logged = False
        policies = (
            QoSPolicyKind.HISTORY,
            QoSPolicyKind.DEPTH,
            QoSPolicyKind.RELIABILITY,
            QoSPolicyKind.DURABILITY,
        )

        def subscribe(kind: type, topic: str, callback: Callable[[object], None]) -> None:
            # A quality of service of its own each time: the overrides are written into it.
            qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT, durability=DurabilityPolicy.VOLATILE)
            overrides = QoSOverridingOptions(policies)
            self._inputs.append(
                self._node.create_subscription(kind, topic, callback, qos, qos_overriding_options=overrides)
            )

        subscribe(*self._image_input(), self.on_image)
        self.topic = self._inputs[0].topic_name
        if self._config().use_depth:
            subscribe(Image, "depth", self._depth.depth)
            subscribe(CameraInfo, "camera_info", self._depth.camera_info)

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
        text += why_no_image(self._node, self.topic, kind, image.qos_profile)
        if not self._silence_logged:
            self._silence_logged = True
            self._node.get_logger().warning(text)
        return text
