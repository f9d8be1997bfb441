"""The log of an evaluation run: one line for each image, added as it is done, checked when it is read again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..output import named, writing

DESCRIPTION, LINES = "run.json", "images.jsonl"
_FLUSH_SECONDS = 2.0
_MARK = ', "sha256": "'
_DIGITS = 16


class RunError(ValueError):
    """A folder that does not hold the run that was asked for; the message says what is wrong with it."""


class RunLog:
    """The folder of one run on one set: run.json says what was run, images.jsonl has a line for each image that is
    done. One process at a time has it. Where the process is killed, at most the line that it was writing is lost; where
    the machine stops, those of the last two seconds."""

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        """Begin a run, or take it up where it was left: `read` gives what is there.

        description: what it depends on, as JSON has it. Raises RunError where the folder holds another run or another
        process is writing into it, and OSError.
        """
        self.path = folder / LINES
        with named(self.path):
            folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("r+b" if self.path.exists() else "x+b")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"another process is writing into {folder}; wait for it, or choose another --out"
                ) from None
            self._describe(folder / DESCRIPTION, json.loads(json.dumps(description)))
        except BaseException:
            self._file.close()
            raise
        self._flushed = time.monotonic()

    def _describe(self, path: Path, description: dict[str, Any]) -> None:
        """Write the description, or compare it with the one that is there."""
        if not path.exists():
            if self.path.stat().st_size:
                raise RunError(f"{self.path} has results and {path.name} is missing; choose another --out")
            with writing(path) as new, new.open("w", encoding="utf-8") as file:
                json.dump(description, file, indent=1, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            return
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} is no JSON ({error}); choose another --out, or delete the folder") from None
        different = list(differences(there, description))
        if different:
            more = f" and {len(different) - 4} more" if len(different) > 4 else ""
            raise RunError(
                f"{path.parent} holds another run: {'; '.join(different[:4])}{more}. "
                "Give the same command again to go on with it, or choose another --out"
            )

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number, from 1, and content of every line. A last line that was cut short is cut off.

        Raises RunError for any other line that is not as it was written.
        """
        self._file.seek(0)
        kept = 0
        for number, line in enumerate(self._file, 1):
            content = _checked(line)
            if content is None:
                if self._file.read(1):
                    raise RunError(
                        f"{self.path}, line {number}: damaged, its checksum does not hold; what it said is lost. "
                        "Delete that line, and its image is done again, or delete the folder"
                    )
                break
            kept += len(line)
            yield number, content
        self._file.seek(kept)
        self._file.truncate()

    def append(self, content: Mapping[str, Any]) -> None:
        """Add a line, after all were read."""
        text = json.dumps(content, ensure_ascii=False)[:-1]
        with named(self.path, kept="every whole line is kept, and the same command goes on from there"):
            self._file.write(f'{text}{_MARK}{_checksum(text)}"}}\n'.encode())
            self._file.flush()  # the kernel has it: it outlives this process
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._sync()

    def close(self) -> None:
        """Write through to the disk, and release the folder."""
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())  # and the machine
        self._flushed = time.monotonic()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _checked(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is not whole."""
    try:
        text, mark, end = line.decode().rpartition(_MARK)
    except UnicodeDecodeError:
        return None
    if not mark or end != f'{_checksum(text)}"}}\n':
        return None
    return json.loads(text + "}")


def differences(there: Any, now: Any, place: str = "") -> Iterator[str]:
    """What differs between two JSON values, each as "settings.alpha is 0.8 there and 0.9 now"."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*there, *now]):
            yield from differences(there.get(key), now.get(key), f"{place}.{key}" if place else key)
    elif there != now:
        yield f"{place} is {_short(there)} there and {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
