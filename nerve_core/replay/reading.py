"""Bags -> messages: rosbag2 (mcap, sqlite3, compressed or not) and ROS 1 bags, whole or damaged, without ROS."""

from __future__ import annotations

import itertools
import shlex
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rosbags import rosbag1, rosbag2

from .clock import BACK
from .messages import IMAGE_TYPES, typestore
from .salvage import SUFFIXES, Stored, salvage, salvage_in_order, storage_files, unpacked

_ROS1 = (".bag", ".bag.active")
"""What the file of a ROS 1 bag ends with; the latter while it is being recorded."""
_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file of git-lfs begins with whose content was not fetched."""


class BagError(ValueError):
    """A bag cannot be replayed; the text says why, and what can be done."""


class MessageError(ValueError):
    """One message of a bag cannot be read; the text says why."""


@dataclass(frozen=True)
class Topic:
    """A topic of a bag: its name, its type ("sensor_msgs/msg/Image") and how many messages it has."""

    name: str
    kind: str
    count: int


class Bag:
    """A bag that is open. What is lost of a damaged one is said in `notes`, which grow while it is read.

    Raises BagError where there is nothing that could be read. Close it when done; a context manager does.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise BagError(f"there is no bag {path}; give the folder of a rosbag2 bag, or a .mcap, .db3 or .bag file")
        if path.name == "metadata.yaml":
            raise BagError(f"{path} describes a bag; give its folder, {path.parent}")
        _refuse_pointers(path)
        self.path = path
        self.notes: dict[str, None] = {}
        self._stack = ExitStack()
        self._reader: Any = None
        self._files: list[Path] = []
        self.ros1 = path.name.endswith(_ROS1)
        """Whether it is a bag of ROS 1."""
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the files back."""
        self._stack.close()

    def _open(self) -> None:
        try:
            reader = (rosbag1.Reader if self.ros1 else rosbag2.Reader)(self.path)
            self._reader = self._stack.enter_context(reader)
            files = [reader] if self.ros1 else _opened_files(reader)
            counted = Counter[tuple[str, str]]()
            for file in files:
                for connection in file.connections:
                    counted[connection.topic, connection.msgtype] += connection.msgcount
            for connection in reader.connections:  # topics without messages
                counted[connection.topic, connection.msgtype] += 0
            times = [(int(reader.start_time), int(reader.end_time))] if self.ros1 else _times(files)
            self.start = min((first for first, _ in times), default=0)
            if not self.ros1:
                self._compare_with_metadata(reader, files, times)
        except Exception as error:  # rosbags raises whatever its parser trips over
            self._reader = None
            if self.ros1:
                mended = "if it was cut off: rosbag reindex"
                if self.path.suffix == ".active":
                    file = shlex.quote(str(self.path))
                    whole = shlex.quote(str(self.path.with_suffix("")))
                    mended = f"its recording was not ended: rosbag reindex {file}, then rosbag fix {file} {whole}"
                raise BagError(f"{self.path} cannot be read as a ROS 1 bag: {_said(error)}; {mended}") from error
            counted = self._salvage_index(error)
        self.topics = tuple(Topic(*key, count) for key, count in sorted(counted.items()))

    def _compare_with_metadata(self, reader: Any, files: list[Any], times: list[tuple[int, int]]) -> None:
        """Note where metadata.yaml is not of the storage files beside it. Raises BagError where the bag cannot be read
        by it: rosbags takes its files one after the other, and of them what metadata.yaml describes in every detail."""
        if not self.path.is_dir():
            return
        listed = set(_listed_files(self.path))
        for file in storage_files(self.path):
            if file.name not in listed:
                self._note(
                    f"{file.name} was not read: metadata.yaml does not name it; give that file alone, or take "
                    "metadata.yaml away to have every file read"
                )
        if times and reader.start_time > self.start:
            self._note(
                f"metadata.yaml lets the bag begin {(reader.start_time - self.start) / 1e9:.3f} s after its first "
                "message: its time is counted from that message"
            )
        if any(later < end - BACK for (_, end), (later, _) in itertools.pairwise(times)):
            raise BagError("its storage files overlap in time, or metadata.yaml names them in another order")
        described = [(one.topic, one.msgtype, one.ext, one.digest) for one in reader.connections]
        for file in files:
            for one in file.connections:
                digests = ("", one.digest)
                if one.msgcount and not any(
                    (topic, kind, ext) == (one.topic, one.msgtype, one.ext) and (digest in digests or not one.digest)
                    for topic, kind, ext, digest in described
                ):
                    raise BagError(f"metadata.yaml describes {one.topic} otherwise than its storage file")

    def _salvage_index(self, error: Exception) -> Counter[tuple[str, str]]:
        """What is in the storage files by going through them. Raises BagError where that is nothing."""
        self._files = storage_files(self.path)
        if not self._files:
            old = sorted(file.name for file in self.path.iterdir() if file.name.endswith(_ROS1))
            meant = f"; of ROS 1 it holds {', '.join(old[:5])}: give such a file" if old else ""
            raise BagError(
                f"{self.path} cannot be read as a bag ({_said(error)}), and holds no {' or '.join(SUFFIXES)} file"
                f"{meant}"
            ) from error
        self._scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._note(f"the bag cannot be opened as a whole ({_said(error)}); what its storage files still hold was read")
        for name in _listed_files(self.path):
            if not (self.path / name).exists():
                self._note(f"{name} is missing: metadata.yaml names it")
        counted, self.start = Counter[tuple[str, str]](), 0
        for file in self._files:
            for stored in salvage(file, self._scratch, self._note):
                counted[stored.topic, stored.kind] += 1
                self.start = min(self.start or stored.time, stored.time)
        if not counted:
            raise BagError(f"{self.path} holds no message that could be read: {'; '.join(self.notes)}") from error
        return counted

    def images(self) -> tuple[Topic, ...]:
        """The topics whose type is one of images."""
        return tuple(topic for topic in self.topics if topic.kind in IMAGE_TYPES)

    def messages(self, topics: Collection[str], start: int | None = None, stop: int | None = None) -> Iterator[Stored]:
        """The messages of `topics` in the order of time. start, stop: log times in nanoseconds, stop not included.

        Where the bag turns out to be damaged, what its files still hold follows, and `notes` say so.
        """
        last, at_last = -1, Counter[tuple[str, str]]()
        if self._reader is not None:
            wanted = [connection for connection in self._reader.connections if connection.topic in topics]
            found = self._reader.messages(wanted, start, stop) if wanted else iter(())
            while True:
                try:
                    one = next(found, None)
                except Exception as error:
                    if self.ros1:
                        self._note(f"the bag is damaged ({_said(error)}): what follows there is lost")
                        return
                    self._note(f"the bag is damaged ({_said(error)}); what its storage files still hold was read")
                    break
                if one is None:
                    return
                connection, time, data = one
                if time != last:
                    last, at_last = time, Counter()
                at_last[connection.topic, connection.msgtype] += 1
                stored = Stored(connection.topic, connection.msgtype, time, bytes(data))
                yield stored if self.ros1 else unpacked(stored)
            self._files = self._files or storage_files(self.path)
            if not hasattr(self, "_scratch"):
                self._scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        for stored in salvage_in_order(self._files, topics, self._scratch, self._note):
            inside = (start is None or start <= stored.time) and (stop is None or stored.time < stop)
            if not inside or stored.time < last:
                continue
            if stored.time == last and at_last[stored.topic, stored.kind]:
                at_last[stored.topic, stored.kind] -= 1
                continue
            yield stored

    def deserialize(self, stored: Stored) -> Any:
        """The message of `stored`, with the fields that ROS gives it. Raises MessageError."""
        store = typestore(self.ros1)
        try:
            read = store.deserialize_ros1 if self.ros1 else store.deserialize_cdr
            return read(stored.data, stored.kind)
        except KeyError:
            raise MessageError(f"messages of type {stored.kind} are not known here") from None
        except Exception as error:  # rosbags raises whatever its parser trips over
            raise MessageError(f"a {stored.kind} cannot be deserialised ({type(error).__name__})") from error

    def _note(self, sentence: str) -> None:
        self.notes[sentence] = None


def _opened_files(reader: Any) -> list[Any]:
    """The readers of the storage files behind that of a bag, in the order of metadata.yaml."""
    return list(getattr(reader.storage, "storages", [reader.storage]))


def _times(files: Iterable[Any]) -> list[tuple[int, int]]:
    """First log time, and last plus one, in nanoseconds, of each of a bag's files that has messages."""
    return [
        (int(file.metadata.start_time), int(file.metadata.end_time)) for file in files if file.metadata.message_count
    ]


def _refuse_pointers(bag: Path) -> None:
    """Raise BagError where a file of `bag` is a git-lfs pointer instead of what it points to."""
    for file in (bag,) if bag.is_file() else (*storage_files(bag), bag / "metadata.yaml"):
        if not file.is_file():
            continue
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise BagError(
                    f"{file} is a git-lfs pointer, not the file itself; fetch it: git lfs pull (in its repository)"
                )


def _listed_files(bag: Path) -> list[str]:
    """The storage files that metadata.yaml names; none where it cannot be read."""
    try:
        metadata = yaml.safe_load((bag / "metadata.yaml").read_text())
        return [Path(name).name for name in metadata["rosbag2_bagfile_information"]["relative_file_paths"]]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return []


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
