"""Masks -> ROS messages, and the types of all messages that a replay reads or writes, without ROS."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from ..text.vocabulary import BACKGROUND, UNLABELLED

if TYPE_CHECKING:
    from ..segmenter import Segmentation

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
LABEL_INFO = "vision_msgs/msg/LabelInfo"
VOCABULARY = "nerve_ros/msg/Vocabulary"
STRING = "std_msgs/msg/String"
CLASS_CONFIDENCES = "nerve_ros/msg/ClassConfidenceArray"
IMAGE_TYPES = (IMAGE, COMPRESSED_IMAGE)

_VISION_MSGS = {
    LABEL_INFO: "std_msgs/Header header\nvision_msgs/VisionClass[] class_map\nfloat32 threshold\n",
    "vision_msgs/msg/VisionClass": "uint16 class_id\nstring class_name\n",
}


@functools.cache
def typestore(ros1: bool = False) -> Typestore:
    """The standard messages of ROS 2 (or of ROS 1), LabelInfo and this package's own."""
    store = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_JAZZY)
    for kind, text in {**_VISION_MSGS, **_own_definitions()}.items():
        store.register(get_types_from_msg(text, kind))
    return store


def _own_definitions() -> dict[str, str]:
    # Installed, the files are beside this module (setup.py and CMakeLists.txt put them there); in a clone, in msg/.
    here = Path(__file__).parent / "msg"
    folder = here if here.is_dir() else Path(__file__).parents[2] / "msg"
    found = {f"nerve_ros/msg/{path.stem}": path.read_text() for path in sorted(folder.glob("*.msg"))}
    if CLASS_CONFIDENCES not in found:
        raise RuntimeError(
            f"the definitions of nerve_ros's messages are neither in {here} nor in {folder}; install this package "
            "again, by scripts/setup or pip"
        )
    return found


def header_message(stamp: int, frame_id: str) -> Any:
    """A std_msgs/Header. stamp: nanoseconds."""
    types = typestore().types
    seconds, nanoseconds = divmod(stamp, 10**9)
    return types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](seconds, nanoseconds), frame_id)


def mono8_message(header: Any, plane: np.ndarray) -> Any:
    """A sensor_msgs/Image mono8 of `plane`, uint8 [height, width], with step == width."""
    height, width = plane.shape
    return typestore().types[IMAGE](header, height, width, "mono8", 0, width, np.ascontiguousarray(plane).reshape(-1))


def label_info_message(header: Any, names: tuple[str, ...], threshold: float) -> Any:
    """The vision_msgs/LabelInfo of masks whose label k is names[k - 1]: background and every name."""
    types = typestore().types
    make = types["vision_msgs/msg/VisionClass"]
    return types[LABEL_INFO](
        header, [make(number, name) for number, name in enumerate(("background", *names))], threshold
    )


def class_confidences_message(header: Any, found: Segmentation) -> Any:
    """The nerve_ros/ClassConfidenceArray of one segmented image: an entry for each name, its label as id."""
    types = typestore().types
    entry, region = types["nerve_ros/msg/ClassConfidence"], types["sensor_msgs/msg/RegionOfInterest"]
    classes = []
    for label, seen in enumerate(found.class_confidence, 1):
        x, y, width, height = map(int, seen.box or (0, 0, 0, 0))
        column, row = map(float, seen.centroid or (math.nan, math.nan))
        chances = map(float, (seen.presence, seen.mean_probability, seen.peak_probability))
        box = region(x, y, height, width, False)
        classes.append(entry(seen.name, label, *chances, int(seen.area), box, column, row))
    return types[CLASS_CONFIDENCES](header, classes)


def confidence_of(found: Segmentation) -> np.ndarray:
    """The confidence as it is published: uint8 [height, width], 0 where a pixel is unlabelled."""
    if found.labels.max(initial=BACKGROUND) < UNLABELLED:
        return found.confidence_u8
    return np.where(found.labels == UNLABELLED, np.uint8(0), found.confidence_u8)
