"""Damaged storage files -> messages: what can still be read of a bag whose reader has given up on it.

A file is gone through from its beginning, chunk by chunk (mcap) or row by row (sqlite3), without its index, which a
recording that was cut off does not have.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

SUFFIXES = (".mcap", ".db3")
_COMPRESSED = ".zstd"
_ZSTD = b"\x28\xb5\x2f\xfd"
"""What a message compressed by itself begins with; a serialised one begins with its byte order."""
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


def storage_files(bag: Path) -> list[Path]:
    """The storage files of a bag's folder, in the order of their numbers; a file is one itself."""
    if bag.is_file():
        return [bag]
    endings = (*SUFFIXES, *(suffix + _COMPRESSED for suffix in SUFFIXES))
    files = [path for path in bag.iterdir() if path.name.endswith(endings)]
    return sorted(
        files, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
    )


def salvage(file: Path, scratch: Path, problem: Problem) -> Iterator[Stored]:
    """The messages of one storage file up to its damage, in the order of the file; inside a chunk, of time.

    scratch: a folder for what has to be unpacked. problem: called with a sentence for each thing that was lost.
    """
    if file.suffix == _COMPRESSED:
        file = _unpacked(file, scratch, problem)
    read = _read_mcap if file.suffix == ".mcap" else _read_sqlite
    for stored in read(file, problem):
        if stored.data.startswith(_ZSTD):
            try:
                yield Stored(stored.topic, stored.kind, stored.time, _unpack(stored.data))
            except ValueError as error:
                problem(f"{file.name}: a message of {stored.topic} cannot be unpacked ({error})")
        else:
            yield stored


def _unpacked(file: Path, scratch: Path, problem: Problem) -> Path:
    import zstandard

    target = scratch / file.name.removesuffix(_COMPRESSED)
    if not target.exists():
        with file.open("rb") as packed, target.open("wb") as plain:
            try:
                zstandard.ZstdDecompressor().copy_stream(packed, plain)
            except zstandard.ZstdError as error:
                problem(f"{file.name} cannot be unpacked to its end ({error})")
    return target


def _unpack(data: bytes) -> bytes:
    import zstandard

    try:
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _read_mcap(file: Path, problem: Problem) -> Iterator[Stored]:
    from mcap.records import Channel, Chunk, Message, Schema
    from mcap.stream_reader import StreamReader, breakup_chunk

    schemas: dict[int, str] = {}
    channels: dict[int, Channel] = {}

    def stored(records: list) -> list[Stored]:
        found = []
        for record in records:
            if isinstance(record, Schema):
                schemas[record.id] = record.name
            elif isinstance(record, Channel):
                channels[record.id] = record
            elif isinstance(record, Message) and record.channel_id in channels:
                channel = channels[record.channel_id]
                kind = schemas.get(channel.schema_id, "")
                if channel.message_encoding == "cdr":
                    found.append(Stored(channel.topic, kind, record.log_time, record.data))
                else:
                    problem(f"{file.name}: {channel.topic} is encoded as {channel.message_encoding!r}; accepted: cdr")
        return sorted(found, key=lambda one: one.time)

    with file.open("rb") as opened:
        records = StreamReader(opened, emit_chunks=True, record_size_limit=_MAX_RECORD).records
        while True:
            place = opened.tell()
            try:
                record = next(records, None)
            except Exception as error:  # the library raises whatever its parser trips over
                problem(f"{file.name} cannot be read beyond byte {place} of {file.stat().st_size} ({_said(error)})")
                return
            if record is None:
                return
            if not isinstance(record, Chunk):
                yield from stored([record])
                continue
            try:
                inside = stored(breakup_chunk(record, validate_crc=True))
            except Exception as error:
                problem(f"{file.name}: a chunk at byte {place} is damaged, its messages are lost ({_said(error)})")
                continue
            yield from inside


def _read_sqlite(file: Path, problem: Problem) -> Iterator[Stored]:
    connection = sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode=ro", uri=True)
    count = 0
    try:
        # Or else a file that is shorter than it says is not read at all.
        connection.execute("PRAGMA writable_schema=ON")
        topics = {
            number: (name, kind)
            for number, name, kind in connection.execute("SELECT id, name, type FROM topics")
            if isinstance(name, str) and isinstance(kind, str)
        }
        for number, time, data in connection.execute("SELECT topic_id, timestamp, data FROM messages ORDER BY id"):
            count += 1
            if number in topics and isinstance(time, int) and isinstance(data, bytes):
                yield Stored(*topics[number], time, data)
    except sqlite3.Error as error:
        problem(f"{file.name} cannot be read beyond its message {count} ({_said(error)})")
    finally:
        connection.close()


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
