"""Reads a bag of camera images and their true labels, without ROS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from nerve_core.replay.frames import label_names
from nerve_core.replay.reading import Bag, BagError, MessageError
from nerve_core.replay.salvage import Stored
from nerve_core.text.vocabulary import BACKGROUND

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
    topics = (IMAGE_TOPIC, LABELS_TOPIC, CAMERA_INFO_TOPIC)
    found: dict[str, dict[int, Stored]] = {topic: {} for topic in topics}
    try:
        with Bag(bag) as opened:
            names = _names(label_names(opened, LABEL_INFO_TOPIC, beside=LABELS_TOPIC))
            for stored in opened.messages(topics):
                found[stored.topic][stored.time] = stored
            images, labels, camera_infos = (found[topic] for topic in topics)
            frames = tuple(
                _recorded(
                    stamp, opened.deserialize(images[stamp]), opened.deserialize(labels[stamp]), camera_infos[stamp]
                )
                for stamp in sorted(set(images) & set(labels) & set(camera_infos))
            )
    except (BagError, MessageError) as error:
        raise RecordingError(f"{error}; a bag that will do: python tools/sample_bag.py --out NEW_FOLDER") from error
    if not frames:
        counts = ", ".join(f"{len(found[topic])} on {topic}" for topic in topics)
        raise RecordingError(
            f"{bag} has no image with labels and camera_info of one stamp ({counts}); tools/sample_bag.py makes a bag "
            "that does"
        )
    return Recording(frames, names)


def _recorded(stamp: int, image: Any, labels: Any, camera_info: Stored) -> Recorded:
    return Recorded(stamp, image.header.frame_id, image.data.tobytes(), labels.data.tobytes(), camera_info.data)


def _names(by_id: dict[int, str]) -> tuple[str, ...]:
    labels = sorted(number for number in by_id if number != BACKGROUND)
    if labels != list(range(1, len(labels) + 1)):
        raise RecordingError(f"the labels of the bag are {labels}; accepted: 1, 2, 3, ... without a gap")
    return tuple(by_id[number] for number in labels)


def _decoded(data: bytes, flags: int) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise RecordingError("an image of the bag cannot be decoded; accepted: JPEG, PNG")
    return image
