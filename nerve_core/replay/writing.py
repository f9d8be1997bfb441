"""Masks -> bag: what the node would have published of a recording, under the recording's own stamps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from ..output import named
from .frames import Frame, camera_names
from .messages import (
    CLASS_CONFIDENCES,
    IMAGE,
    LABEL_INFO,
    class_confidences_message,
    confidence_of,
    header_message,
    label_info_message,
    mono8_message,
    typestore,
)

if TYPE_CHECKING:
    from ..segmenter import Segmentation


class ResultBag:
    """A rosbag2 bag (mcap, zstd) that is being written: for each camera segmentation/mask, confidence, class_confidence
    and label_info in its namespace, with QoS and definitions as of the node.

    Whatever happens, `close` makes it a whole bag, or none where the disk is full. Raises OutputError where it cannot
    be written.
    """

    def __init__(self, folder: Path, topics: Sequence[str], names: tuple[str, ...], threshold: float) -> None:
        self._folder = folder
        self._names, self._threshold = names, threshold
        # Version 8 of the format is read from Iron on; 9 only by the newest.
        self._writer = Writer(folder, version=8, storage_plugin=StoragePlugin.MCAP)
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        with named(folder):
            self._writer.open()
        self._connections = [
            {
                part: self._writer.add_connection(
                    f"{name}/segmentation/{part}",
                    kind,
                    typestore=typestore(),
                    offered_qos_profiles=[qos(latched=part == "label_info")],
                )
                for part, kind in (
                    ("label_info", LABEL_INFO),
                    ("mask", IMAGE),
                    ("confidence", IMAGE),
                    ("class_confidence", CLASS_CONFIDENCES),
                )
            }
            for name in camera_names(topics)
        ]
        self._explained: set[int] = set()  # cameras whose label_info is written

    def take(self, frame: Frame, found: Segmentation) -> None:
        """Write what there is to say of one image; before a camera's first, what its labels mean."""
        header = header_message(frame.stamp, frame.frame_id)
        if frame.camera not in self._explained:
            self._explained.add(frame.camera)
            self._write(frame, "label_info", label_info_message(header, self._names, self._threshold))
        self._write(frame, "mask", mono8_message(header, found.labels))
        self._write(frame, "confidence", mono8_message(header, confidence_of(found)))
        self._write(frame, "class_confidence", class_confidences_message(header, found))

    def _write(self, frame: Frame, part: str, message: Any) -> None:
        connection = self._connections[frame.camera][part]
        with named(self._folder):
            self._writer.write(connection, frame.time, typestore().serialize_cdr(message, connection.msgtype))

    def close(self) -> None:
        """Write the index and metadata.yaml."""
        with named(self._folder):
            try:
                self._writer.close()
            except OSError:
                shutil.rmtree(self._folder)  # without its index it is no bag
                raise


def qos(latched: bool, depth: int = 1) -> Qos:
    """Reliable, the last `depth` messages; latched: those who come later get them too."""
    never = QosTime(9223372036, 854775807)
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=depth,
        reliability=QosReliability.RELIABLE,
        durability=QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        deadline=never,
        lifespan=never,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=never,
        avoid_ros_namespace_conventions=False,
    )
