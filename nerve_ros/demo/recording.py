"""Before the way message -> ... -> message: a bag of camera images and their truth, read without ROS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from rosbags.highlevel import AnyReader, AnyReaderError

IMAGE_TOPIC = "/camera/image/compressed"
CAMERA_INFO_TOPIC = "/camera/camera_info"
LABELS_TOPIC = "/camera/labels/compressed"
LABEL_INFO_TOPIC = "/camera/labels/label_info"


class RecordingError(ValueError):
    """A bag is not what is needed; the text says what is."""


@dataclass(frozen=True)
class Recorded:
    """One image of a bag: stamp in nanoseconds, the image's frame_id and compressed bytes, its labels' compressed bytes
    and its CameraInfo as serialised in the bag (CDR)."""

    stamp: int
    frame_id: str
    image: bytes
    labels: bytes
    camera_info: bytes


@dataclass(frozen=True)
class Recording:
    """A bag's images in the order of time; label k of their truth is names[k - 1], 0 is background."""

    frames: tuple[Recorded, ...]
    names: tuple[str, ...]

    @property
    def interval(self) -> float:
        """Seconds from one image to the next, in the mean."""
        return self.seconds / len(self.frames)

    @property
    def seconds(self) -> float:
        """How long the bag lasts, the last image's time until a next one included."""
        if len(self.frames) < 2:
            return 0.1
        return (self.frames[-1].stamp - self.frames[0].stamp) * 1e-9 * len(self.frames) / (len(self.frames) - 1)

    def beginning(self, seconds: float) -> Recording:
        """The first `seconds` of it: one image at least."""
        end = self.frames[0].stamp + round(seconds * 1e9)
        kept = tuple(frame for frame in self.frames if frame.stamp < end)
        return Recording(kept or self.frames[:1], self.names)

    def image(self, index: int) -> np.ndarray:
        """Image `index`: uint8 [height, width, 3], BGR."""
        return _decoded(self.frames[index].image, cv2.IMREAD_COLOR)

    def labels(self, index: int) -> np.ndarray:
        """The truth of image `index`: uint8 [height, width]."""
        return _decoded(self.frames[index].labels, cv2.IMREAD_UNCHANGED)


def read_recording(bag: Path) -> Recording:
    """Read the bag in the folder `bag` into memory. Raises RecordingError where it lacks something."""
    topics = (IMAGE_TOPIC, LABELS_TOPIC, CAMERA_INFO_TOPIC, LABEL_INFO_TOPIC)
    if not bag.is_dir():
        raise RecordingError(f"there is no bag {bag}; to make one: python tools/sample_bag.py --out {bag}")
    found: dict[str, dict[int, object]] = {topic: {} for topic in topics}
    try:
        with AnyReader([bag]) as reader:
            connections = [connection for connection in reader.connections if connection.topic in topics]
            for connection, stamp, raw in reader.messages(connections):
                message = reader.deserialize(raw, connection.msgtype)
                kept = (message, bytes(raw)) if connection.topic == CAMERA_INFO_TOPIC else message
                found[connection.topic][stamp] = kept
    except (AnyReaderError, OSError) as error:
        raise RecordingError(f"{bag} cannot be read as a rosbag2 bag: {error}") from error
    stamps = sorted(set(found[IMAGE_TOPIC]) & set(found[LABELS_TOPIC]) & set(found[CAMERA_INFO_TOPIC]))
    if not stamps or not found[LABEL_INFO_TOPIC]:
        counts = ", ".join(f"{len(found[topic])} on {topic}" for topic in topics)
        raise RecordingError(
            f"{bag} has no image with labels and camera_info of one stamp, or no label_info ({counts}); "
            "tools/sample_bag.py makes a bag that does"
        )
    info = next(iter(found[LABEL_INFO_TOPIC].values()))
    return Recording(
        tuple(
            Recorded(
                stamp,
                found[IMAGE_TOPIC][stamp].header.frame_id,
                found[IMAGE_TOPIC][stamp].data.tobytes(),
                found[LABELS_TOPIC][stamp].data.tobytes(),
                found[CAMERA_INFO_TOPIC][stamp][1],
            )
            for stamp in stamps
        ),
        _names(info.class_map),
    )


def _names(class_map: Sequence) -> tuple[str, ...]:
    by_id = {int(entry.class_id): entry.class_name for entry in class_map if entry.class_id}
    if sorted(by_id) != list(range(1, len(by_id) + 1)):
        raise RecordingError(f"the labels of the bag are {sorted(by_id)}; accepted: 1, 2, 3, ... without a gap")
    return tuple(by_id[number] for number in sorted(by_id))


def _decoded(data: bytes, flags: int) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise RecordingError("an image of the bag cannot be decoded; accepted: JPEG, PNG")
    return image
