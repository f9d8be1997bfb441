"""Publishes everything the node finds in images: mask, confidence, classes, overlay, dense maps and LabelInfo.

A LabelInfo goes out before the first mask that uses it and only where it differs from the one before: a costmap
throws away what was set at run time with each one it gets, and reads past its end without one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
from builtin_interfaces.msg import Time
from rclpy.event_handler import PublisherEventCallbacks
from rclpy.lifecycle import LifecycleNode, LifecyclePublisher
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, RegionOfInterest
from std_msgs.msg import Header
from vision_msgs.msg import LabelInfo

from nerve_ros.images import mono8_message, rgb8_message
from nerve_ros.labels import UNLABELLED_ID, Labels, label_info_message, topic_slug
from nerve_ros.msg import ClassConfidence, ClassConfidenceArray, DenseConfidence

if TYPE_CHECKING:
    from nerve_core import ClassConfidence as SeenClass
    from nerve_core import Segmentation

OUTPUT_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE)
DENSE_LIMIT = 64 * 2**20
"""Bytes of maps that go into one message at most: the shared memory that config/fastdds.xml gives a process."""
LATCHED_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@dataclass(frozen=True)
class Masks:
    """What is said of one image: `mask` and `confidence` uint8 [height, width], and one entry for each name."""

    mask: np.ndarray
    confidence: np.ndarray
    classes: list[ClassConfidence]


def with_ids(segmentation: Segmentation, labels: Labels, id_table: np.ndarray) -> Masks:
    """`segmentation` in class ids instead of labels; where a pixel is unlabelled (255) its confidence is 0."""
    mask = cv2.LUT(segmentation.labels, id_table)
    confidence = segmentation.confidence_u8
    if cv2.minMaxLoc(mask)[1] == UNLABELLED_ID:
        confidence = np.where(mask == UNLABELLED_ID, np.uint8(0), confidence)
    entries = zip(segmentation.class_confidence, labels.names, labels.ids, strict=True)
    return Masks(mask, confidence, [_class_message(seen, name, number) for seen, name, number in entries])


def _class_message(seen: SeenClass, name: str, number: int) -> ClassConfidence:
    x, y, width, height = seen.box or (0, 0, 0, 0)
    centroid_x, centroid_y = seen.centroid or (math.nan, math.nan)
    return ClassConfidence(
        name=name,
        id=number,
        presence=float(seen.presence),
        mean_probability=float(seen.mean_probability),
        peak_probability=float(seen.peak_probability),
        area=int(seen.area),
        box=RegionOfInterest(x_offset=int(x), y_offset=int(y), width=int(width), height=int(height)),
        centroid_x=float(centroid_x),
        centroid_y=float(centroid_y),
    )


class Outputs:
    """The publishers of a configured node. All but the making and `destroy` is called by one thread, the worker's."""

    def __init__(self, node: LifecycleNode) -> None:
        def publisher(kind: type, topic: str, qos: QoSProfile = OUTPUT_QOS) -> LifecyclePublisher:
            name = topic if topic.startswith("~") else f"segmentation/{topic}"
            return node.create_lifecycle_publisher(kind, name, qos)

        self._node = node
        self._label_info = publisher(LabelInfo, "label_info", LATCHED_QOS)
        self._mask = publisher(Image, "mask")
        self._confidence = publisher(Image, "confidence")
        self._classes = publisher(ClassConfidenceArray, "class_confidence")
        self._overlay = publisher(Image, "overlay")
        self._dense = publisher(DenseConfidence, "~/dense")
        self._maps: dict[str, tuple[int, Publisher]] = {}
        self._last_labels: LabelInfo | None = None

    def destroy(self) -> None:
        """Give the publishers back; this object is of no use afterwards."""
        for publisher in (self._label_info, self._mask, self._confidence, self._classes, self._overlay, self._dense):
            self._node.destroy_lifecycle_publisher(publisher)
        for _, topic in self._maps.values():
            self._node.destroy_publisher(topic)

    def label_info(self, labels: Labels, background_name: str, threshold: float, stamp: Time) -> bool:
        """Publish the LabelInfo of `labels`, unless it says what the last one said.

        Returns whether it is in force now, sent or already known; it is not while the node is inactive.
        """
        if not self._label_info.is_activated:
            return False
        message, last = label_info_message(labels, background_name, threshold, stamp), self._last_labels
        if last is None or last.class_map != message.class_map or last.threshold != message.threshold:
            self._label_info.publish(message)
            self._last_labels = message
        return True

    def confidence_topics(self, labels: Labels, names: frozenset[str]) -> None:
        """Have a topic for the dense map of each of `labels` that is in `names` (casefolded), and of no other."""
        ids = dict(zip(labels.names, labels.ids, strict=True))
        wanted = {topic_slug(name, number): number for name, number in ids.items() if name.casefold() in names}
        for slug in self._maps.keys() - wanted.keys():
            self._node.destroy_publisher(self._maps.pop(slug)[1])
        for slug in wanted.keys() - self._maps.keys():
            # Plain ones without events: they come and go while the executor runs, which must not meet them half made.
            # Nothing is published on them but from `image`, which is not called while the node is inactive.
            topic, no_events = f"segmentation/confidence/{slug}", PublisherEventCallbacks(use_default_callbacks=False)
            publisher = self._node.create_publisher(Image, topic, OUTPUT_QOS, event_callbacks=no_events)
            self._maps[slug] = wanted[slug], publisher

    def wanted_maps(self, labels: Labels) -> tuple[int, ...]:
        """The labels whose dense maps somebody subscribes to now."""
        if self._dense.get_subscription_count():
            return tuple(range(1, len(labels.ids) + 1))
        ids = {number for number, publisher in self._maps.values() if publisher.get_subscription_count()}
        return tuple(label for label, number in enumerate(labels.ids, 1) if number in ids)

    def image(
        self,
        header: Header,
        segmentation: Segmentation,
        labels: Labels,
        id_table: np.ndarray,
        image: np.ndarray,
        alpha: float,
        maps: tuple[int, ...] = (),
    ) -> None:
        """Publish all there is to say of `image`, uint8 [height, width, 3] RGB, whose `header` goes out as it came.

        The overlay is drawn only while somebody subscribes to it. maps: the labels that the segmentation has maps of.
        """
        from nerve_core.images.visualize import overlay

        masks = with_ids(segmentation, labels, id_table)
        self._mask.publish(mono8_message(header, masks.mask))
        self._confidence.publish(mono8_message(header, masks.confidence))
        self._classes.publish(ClassConfidenceArray(header=header, classes=masks.classes))
        if maps:
            self._publish_maps(header, segmentation.maps, labels, maps)
        if self._overlay.get_subscription_count():
            # Drawn by id, not by label: a name keeps its colour as it keeps its id.
            names = [""] * max(labels.ids, default=0)
            for number, name in zip(labels.ids, labels.names, strict=True):
                names[number - 1] = name
            self._overlay.publish(rgb8_message(header, overlay(image, masks.mask, names, alpha=alpha)))

    def _publish_maps(self, header: Header, planes: np.ndarray, labels: Labels, maps: tuple[int, ...]) -> None:
        plane_of = {labels.ids[label - 1]: plane for label, plane in zip(maps, planes, strict=True)}
        for number, publisher in self._maps.values():
            if number in plane_of and publisher.get_subscription_count():
                publisher.publish(mono8_message(header, plane_of[number]))
        if len(maps) < len(labels.ids) or not self._dense.get_subscription_count():
            return
        if planes.nbytes > DENSE_LIMIT:
            self._node.get_logger().warning(
                f"~/dense is not published: {len(maps)} maps of this size take {planes.nbytes >> 20} MiB, and "
                f"{DENSE_LIMIT >> 20} are accepted; ask for fewer names, or use confidence_classes",
                throttle_duration_sec=5.0,
            )
            return
        height, width = planes.shape[1:]
        message = DenseConfidence(header=header, height=height, width=width, names=labels.names, ids=labels.ids)
        message.data.frombytes(planes.data.cast("B"))
        self._dense.publish(message)
