"""Bags for the tests: written message by message, whole, and then damaged in the ways that recordings are."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import yaml
from rosbags import rosbag1
from rosbags.interfaces import Qos
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from nerve_core.replay.messages import COMPRESSED_IMAGE, IMAGE, LABEL_INFO, typestore

START = 1_700_000_000 * 10**9
STEP = 10**8
"""Nanoseconds between two images."""
TOPIC = "/camera/image_raw"


def picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 [height, width, 3] RGB: another one for every number, with noise that no compression takes away."""
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows * 3 + number * 7, columns * 2, rows + columns + number * 11], -1) % 240
    image += np.random.default_rng(number).integers(0, 16, image.shape)
    image[5:20, 5 + number % 30 : 20 + number % 30] = (250, 40, 20)
    return image.astype(np.uint8)


def header(time: int, frame_id: str = "camera", *, ros1: bool = False) -> object:
    types = typestore(ros1).types
    stamp = types["builtin_interfaces/msg/Time"](*divmod(time, 10**9))
    make = types["std_msgs/msg/Header"]
    return make(0, stamp, frame_id) if ros1 else make(stamp, frame_id)


def raw(number: int, time: int, *, encoding: str = "rgb8", ros1: bool = False, **size: int) -> tuple[str, object]:
    """An Image of picture `number`."""
    image = picture(number, **size)
    data = {"rgb8": image, "bgr8": image[..., ::-1], "mono8": image[..., 1], "32FC1": image[..., 1].astype("<f4")}
    plane = np.ascontiguousarray(data[encoding])
    rows = plane.reshape(len(plane), -1).view(np.uint8)
    make = typestore(ros1).types[IMAGE]
    return IMAGE, make(header(time, ros1=ros1), *image.shape[:2], encoding, 0, rows.shape[1], rows.reshape(-1))


def compressed(number: int, time: int, *, kind: str = ".png", **size: int) -> tuple[str, object]:
    """A CompressedImage of picture `number`."""
    data = cv2.imencode(kind, picture(number, **size)[..., ::-1])[1].ravel()
    return COMPRESSED_IMAGE, typestore().types[COMPRESSED_IMAGE](header(time), kind[1:], data)


def labels(plane: np.ndarray, time: int) -> tuple[str, object]:
    """An Image mono8 of labels."""
    make = typestore().types[IMAGE]
    return IMAGE, make(header(time), *plane.shape, "mono8", 0, plane.shape[1], plane.reshape(-1))


def label_info(names: Iterable[str], time: int = START) -> tuple[str, object]:
    """A LabelInfo whose label 0 is background and whose others are `names`."""
    types = typestore().types
    entries = [types["vision_msgs/msg/VisionClass"](n, name) for n, name in enumerate(("background", *names))]
    return LABEL_INFO, types[LABEL_INFO](header(time), entries, 0.0)


def write(
    folder: Path,
    messages: Iterable[tuple[str, int, tuple[str, object] | tuple[str, bytes]]],
    *,
    plugin: StoragePlugin = StoragePlugin.MCAP,
    compression: CompressionMode = CompressionMode.NONE,
    qos: Qos | None = None,
) -> Path:
    """A bag of (topic, log time, (type, message or its bytes)). qos: that its topics were offered with."""
    store = typestore()
    writer = Writer(folder, version=8, storage_plugin=plugin)
    writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        connections = {}
        for topic, time, (kind, message) in messages:
            if (topic, kind) not in connections:
                connections[topic, kind] = writer.add_connection(
                    topic, kind, typestore=store, offered_qos_profiles=() if qos is None else [qos]
                )
            data = message if isinstance(message, bytes) else store.serialize_cdr(message, kind)
            writer.write(connections[topic, kind], time, data)
    return folder


def split(folder: Path, films: Sequence[list], **options: object) -> Path:
    """A bag of several storage files, bag_0, bag_1, ..., one of each of `films`; options: as of :func:`write`."""
    joined: dict = {}
    for number, messages in enumerate(films):
        part = write(folder.with_name(f"{folder.name} part {number}"), messages, **options)
        file, info = storage(part), metadata(part)
        folder.mkdir(exist_ok=True)
        kept = file.rename(folder / f"{folder.name}_{number}{''.join(file.suffixes)}")
        shutil.rmtree(part)
        info["relative_file_paths"] = [kept.name]
        if joined:
            joined["relative_file_paths"] += info["relative_file_paths"]
            joined["message_count"] += info["message_count"]
            for topic, more in zip(joined["topics_with_message_count"], info["topics_with_message_count"], strict=True):
                topic["message_count"] += more["message_count"]
        joined = joined or info
    return with_metadata(folder, joined)


def metadata(bag: Path) -> dict:
    """What metadata.yaml says."""
    return yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]


def with_metadata(bag: Path, info: dict) -> Path:
    """Have metadata.yaml say `info`."""
    (bag / "metadata.yaml").write_text(yaml.safe_dump({"rosbag2_bagfile_information": info}))
    return bag


def film(count: int, make=raw, topic: str = TOPIC, **options: object) -> list:
    """`count` images, ten a second."""
    return [(topic, START + n * STEP, make(n, START + n * STEP, **options)) for n in range(count)]


def write_ros1(file: Path, count: int) -> Path:
    """A ROS 1 bag of `count` images."""
    store = get_typestore(Stores.ROS1_NOETIC)
    with rosbag1.Writer(file) as writer:
        connection = writer.add_connection(TOPIC, IMAGE, typestore=store)
        for number in range(count):
            time = START + number * STEP
            _, message = raw(number, time, ros1=True)
            writer.write(connection, time, store.serialize_ros1(message, IMAGE))
    return file


def storage(bag: Path) -> Path:
    """The only storage file of a bag."""
    (found,) = [path for path in bag.iterdir() if path.name != "metadata.yaml"]
    return found


def cut(file: Path, share: float) -> None:
    """Keep only the beginning of a file."""
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


def with_checksums(file: Path) -> None:
    """Give the chunks of an mcap file, which are not compressed, the checksums that ROS's own recorder writes."""
    data = bytearray(file.read_bytes())
    place = 8
    while data[place] != 0x0F:
        length = int.from_bytes(data[place + 1 : place + 9], "little")
        if data[place] == 0x06:  # times, size, checksum, no name of a compression, size again, records
            records = data[place + 9 + 40 : place + 9 + length]
            data[place + 33 : place + 37] = zlib.crc32(records).to_bytes(4, "little")
        place += 9 + length
    file.write_bytes(bytes(data))


def without_summary(file: Path) -> None:
    """Make an mcap file one without summary and index, as a recorder leaves it that was ended hard after a chunk."""
    data = file.read_bytes()
    place, end = 8, len(data) - 8
    records = []
    while place < end:
        kind, length = data[place], int.from_bytes(data[place + 1 : place + 9], "little")
        if kind in (0x0F, 0x02):  # the end of the data, the footer
            break
        if kind != 0x07:  # an index of messages
            records.append(data[place : place + 9 + length])
        place += 9 + length
    data_end = b"\x0f" + (4).to_bytes(8, "little") + bytes(4)
    footer = b"\x02" + (20).to_bytes(8, "little") + bytes(20)
    file.write_bytes(data[:8] + b"".join(records) + data_end + footer + data[:8])
