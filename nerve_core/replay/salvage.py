"""Damaged storage files -> messages: what can still be read of a bag whose reader has given up on it.

A file is gone through from its beginning, chunk by chunk (mcap) or row by row (sqlite3), without its index, which a
recording that was cut off does not have. Messages in the order of time take a second pass: the first notes where each
one lies, so that no more than one chunk is held at a time.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

if TYPE_CHECKING:
    from mcap.records import Channel, McapRecord

SUFFIXES = (".mcap", ".db3")
_COMPRESSED = ".zstd"
_ZSTD = b"\x28\xb5\x2f\xfd"
"""What a message compressed by itself begins with; a serialised one begins with its byte order."""
_MAGIC = 8
"""Bytes of an mcap file before its first record."""
_PART = 2**20
"""Bytes of a packed file that are unpacked at a time."""
_MAX_RECORD = 2**31
"""Bytes of one record of an mcap file, at most: a damaged length is not believed."""

Problem = Callable[[str], None]


@dataclass(frozen=True)
class Stored:
    """One message of a bag, serialised: topic, type ("sensor_msgs/msg/Image"), log time in nanoseconds, its bytes."""

    topic: str
    kind: str
    time: int
    data: bytes


class _Source(Protocol):
    """An opened storage file; a context manager."""

    def __enter__(self) -> _Source: ...

    def __exit__(self, *_: object) -> None: ...

    def groups(self) -> Iterator[tuple[int, list[Stored]]]:
        """The messages in groups that lie together, and the place of each group; up to the damage."""

    def at(self, place: int) -> list[Stored]:
        """The group at this place again."""


def storage_files(bag: Path) -> list[Path]:
    """The storage files of a bag's folder, in the order of their numbers; a file is one itself.

    Of a file that lies there packed and unpacked, as playing it leaves it, the packed one.
    """
    if bag.is_file():
        return [bag]
    endings = (*SUFFIXES, *(suffix + _COMPRESSED for suffix in SUFFIXES))
    found = {path.name: path for path in bag.iterdir() if path.name.endswith(endings)}
    files = [path for name, path in found.items() if name + _COMPRESSED not in found]
    return sorted(
        files, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
    )


def salvage(file: Path, scratch: Path, problem: Problem) -> Iterator[Stored]:
    """The messages of one storage file up to its damage, in the order of the file; inside a chunk, of time.

    scratch: a folder for what has to be unpacked. problem: called with a sentence for each thing that was lost.
    """
    with _opened(file, scratch, problem) as source:
        for _, found in source.groups():
            for stored in found:
                if (whole := _whole(stored, file, problem)) is not None:
                    yield whole


def salvage_in_order(
    files: Sequence[Path], topics: Collection[str], scratch: Path, problem: Problem
) -> Iterator[Stored]:
    """The messages of `topics` in all of `files` up to their damage, in the order of time; of one time, of the files.

    scratch, problem: as of :func:`salvage`.
    """
    with ExitStack() as stack:
        sources = [stack.enter_context(_opened(file, scratch, problem)) for file in files]
        places = [
            (stored.time, number, place, index)
            for number, source in enumerate(sources)
            for place, found in source.groups()
            for index, stored in enumerate(found)
            if stored.topic in topics
        ]
        held: tuple[int, int, Sequence[Stored]] = (-1, -1, ())
        for _, number, place, index in sorted(places):
            if held[:2] != (number, place):
                held = number, place, sources[number].at(place)
            if index < len(held[2]) and (whole := _whole(held[2][index], files[number], problem)) is not None:
                yield whole


def unpacked(stored: Stored) -> Stored:
    """`stored`, unpacked where it was compressed by itself. Raises ValueError where that cannot be done."""
    if not stored.data.startswith(_ZSTD):
        return stored
    return Stored(stored.topic, stored.kind, stored.time, _unpack(stored.data))


def _whole(stored: Stored, file: Path, problem: Problem) -> Stored | None:
    """`stored`, unpacked where it was compressed by itself; None where that cannot be done."""
    try:
        return unpacked(stored)
    except ValueError as error:
        problem(f"{file.name}: a message of {stored.topic} cannot be unpacked ({error})")
        return None


def _opened(file: Path, scratch: Path, problem: Problem) -> _Source:
    if file.suffix == _COMPRESSED:
        file = _unpacked(file, scratch, problem)
    return _Mcap(file, problem) if file.suffix == ".mcap" else _Sqlite(file, problem)


def _unpacked(file: Path, scratch: Path, problem: Problem) -> Path:
    import zstandard

    target = scratch / file.name.removesuffix(_COMPRESSED)
    if not target.exists():
        unpacking = zstandard.ZstdDecompressor().decompressobj()
        with file.open("rb") as packed, target.open("wb") as plain:
            try:
                while not unpacking.eof and (part := packed.read(_PART)):
                    plain.write(unpacking.decompress(part))
            except zstandard.ZstdError as error:
                problem(f"{file.name} cannot be unpacked to its end ({error})")
            else:
                if not unpacking.eof:
                    problem(f"{file.name} is cut off: what could be unpacked of it was read")
    return target


def _unpack(data: bytes) -> bytes:
    import zstandard

    try:
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


class _Mcap:
    """An mcap file: its messages by chunk, and where each chunk begins. A context manager."""

    def __init__(self, file: Path, problem: Problem) -> None:
        self._file, self._problem = file, problem
        self._schemas: dict[int, str] = {}
        self._channels: dict[int, Channel] = {}
        self._opened = file.open("rb")

    def __enter__(self) -> _Mcap:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def groups(self) -> Iterator[tuple[int, list[Stored]]]:
        """Each chunk's first byte and its messages in the order of time; a message outside of chunks is one itself."""
        from mcap.stream_reader import StreamReader

        self._opened.seek(0)
        records = StreamReader(self._opened, emit_chunks=True, record_size_limit=_MAX_RECORD).records
        while True:
            place = self._opened.tell()
            try:
                record = next(records, None)
            except Exception as error:  # the library raises whatever its parser trips over
                size = self._file.stat().st_size
                self._problem(f"{self._file.name} cannot be read beyond byte {place} of {size} ({_said(error)})")
                return
            if record is None:
                return
            try:
                found = self._messages(record)
            except Exception as error:
                self._problem(
                    f"{self._file.name}: a chunk at byte {place} is damaged, its messages are lost ({_said(error)})"
                )
                continue
            if found:
                # The first record begins behind the file's magic bytes, which are read with it.
                yield max(place, _MAGIC), found

    def at(self, place: int) -> list[Stored]:
        """The messages of the chunk that begins there, as :meth:`groups` gave them."""
        from mcap.stream_reader import StreamReader

        self._opened.seek(place)
        reader = StreamReader(self._opened, skip_magic=True, emit_chunks=True, record_size_limit=_MAX_RECORD)
        record = next(reader.records, None)
        return [] if record is None else self._messages(record)

    def _messages(self, record: McapRecord) -> list[Stored]:
        from mcap.records import Channel, Chunk, Message, Schema
        from mcap.stream_reader import breakup_chunk

        found = []
        for one in breakup_chunk(record, validate_crc=True) if isinstance(record, Chunk) else [record]:
            if isinstance(one, Schema):
                self._schemas[one.id] = one.name
            elif isinstance(one, Channel):
                self._channels[one.id] = one
            elif isinstance(one, Message) and one.channel_id in self._channels:
                channel = self._channels[one.channel_id]
                kind = self._schemas.get(channel.schema_id, "")
                if channel.message_encoding == "cdr":
                    found.append(Stored(channel.topic, kind, one.log_time, one.data))
                else:
                    self._problem(
                        f"{self._file.name}: {channel.topic} is encoded as {channel.message_encoding!r}; accepted: cdr"
                    )
        return sorted(found, key=lambda stored: stored.time)


class _Sqlite:
    """A sqlite3 file: its messages by row. A context manager."""

    def __init__(self, file: Path, problem: Problem) -> None:
        self._file, self._problem = file, problem
        self._topics: dict[int, tuple[str, str]] = {}
        self._connection = sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode=ro", uri=True)

    def __enter__(self) -> _Sqlite:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def groups(self) -> Iterator[tuple[int, list[Stored]]]:
        """Each row's number and its message, in the order of the numbers."""
        count = 0
        try:
            # Or else a file that is shorter than it says is not read at all.
            self._connection.execute("PRAGMA writable_schema=ON")
            self._topics = {
                number: (name, kind)
                for number, name, kind in self._connection.execute("SELECT id, name, type FROM topics")
                if isinstance(name, str) and isinstance(kind, str)
            }
            for row, *message in self._connection.execute(
                "SELECT id, topic_id, timestamp, data FROM messages ORDER BY id"
            ):
                count += 1
                if found := self._message(*message):
                    yield row, found
        except sqlite3.Error as error:
            self._problem(f"{self._file.name} cannot be read beyond its message {count} ({_said(error)})")

    def at(self, place: int) -> list[Stored]:
        """The message of that row, as :meth:`groups` gave it."""
        try:
            row = self._connection.execute(
                "SELECT topic_id, timestamp, data FROM messages WHERE id = ?", (place,)
            ).fetchone()
        except sqlite3.Error as error:
            self._problem(f"{self._file.name}: its message {place} cannot be read again ({_said(error)})")
            return []
        return self._message(*row) if row else []

    def _message(self, topic: object, time: object, data: object) -> list[Stored]:
        if isinstance(topic, int) and topic in self._topics and isinstance(time, int) and isinstance(data, bytes):
            return [Stored(*self._topics[topic], time, data)]
        return []


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
