"""Files that commands write: whole or not at all, and never in place of a file that is not ours.

A folder that something is written into has a record of it, `RECORD`: each file's name and SHA-256. A file that is in
its folder's record and still is what was written is ours and may be replaced. Every other one, changed since included,
is the user's. A file is written beside its place and renamed when it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECORD = ".nerve_ros.jsonl"
_PART = ".nerve_ros."
"""What the names of folders with unfinished files begin with."""
_MARK = b"Software\0nerve_ros"
_HEAD = 128
"""Bytes of a picture in which its mark is."""
LOG_HEAD = b"# log of nerve_ros\n"
"""The first line of a log, which is ours from the beginning: it grows until its process ends."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputError(RuntimeError):
    """A file cannot be written, or is not ours to replace; the message says which, why, and what to do.

    full: whether the disk is, so that no other file will fit either.
    """

    def __init__(self, text: str, *, full: bool = False) -> None:
        super().__init__(text)
        self.full = full


def claim(paths: Iterable[Path], overwrite: bool = False, option: str = "--out") -> None:
    """Make sure, before any work is done, that these files may be written.

    overwrite: take files that are not ours as ours from now on. option: which one chooses their place, for the message.
    Raises OutputError where one is there and is not ours, is a folder, a link or a device, or its folder is a file.
    """
    foreign: list[Path] = []
    for path in paths:
        above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise OutputError(f"{above} is a file, no folder: choose another {option}")
        if not os.access(above, os.W_OK | os.X_OK):
            raise OutputError(f"{above} may not be written to: choose another {option}")
        if not os.path.lexists(path):
            continue
        if path.is_symlink() or not path.is_file():
            raise OutputError(f"{path} is {_kind(path)} and is left as it is: remove it, or choose another {option}")
        if not is_own(path):
            foreign.append(path)
    if foreign and not overwrite:
        raise OutputError(
            f"{first_of(foreign)} would be replaced, and nerve did not write "
            f"{'it as it is' if len(foreign) == 1 else 'them as they are'} now: choose another {option}, move what is "
            "there away, or give --overwrite"
        )
    for path in foreign:
        with named(path):
            _add(path, digest(path))


def first_of(paths: Sequence[Path]) -> str:
    """The first of many paths, and how many more there are, for a sentence."""
    return ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def claim_folder(folder: Path, overwrite: bool = False, option: str = "--out") -> None:
    """Make sure that a folder may be replaced, by a bag for one: `claim` for all that is in it."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is {_kind(folder)} and is left as it is: remove it, or choose another {option}")
    inside = [path for path in folder.rglob("*") if path.name != RECORD and (path.is_symlink() or not path.is_dir())]
    claim(inside or [folder / RECORD], overwrite, option)


def _claim_any(path: Path) -> None:
    if path.is_dir():
        claim_folder(path)
    else:
        claim([path])


@contextmanager
def placing(path: Path, *, always: bool = False, recorded: bool = True) -> Iterator[Path]:
    """Gives a path beside `path` to write a file to, or a folder; at the end it becomes `path`, whole, and ours.

    recorded: whether it may be replaced later. always: place it also where an error is raised meanwhile; what is there
    has to be whole then. Else nothing is left. Folders above are made. Raises OutputError where `path` is not ours, or
    cannot be written.
    """
    _claim_any(path)
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=_PART, dir=path.parent))
    part = scratch / path.name
    try:
        try:
            yield part
        except BaseException:
            if always:
                _place(part, path, recorded)
            raise
        _place(part, path, recorded)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _place(part: Path, path: Path, recorded: bool) -> None:
    """Put what was written in its place, and record it; nothing where nothing was written."""
    if not part.exists():
        return
    _claim_any(path)
    with named(path):
        if part.is_dir():
            for file in [file for file in part.rglob("*") if file.is_file()]:
                _add(file, digest(file))
            if path.exists():
                shutil.rmtree(path)
        elif recorded:
            _add(path, digest(part))
        part.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`placing` of one file whose errors, while it is written, are said to be of that file."""
    with placing(path) as part, named(path):
        yield part


def write(path: Path, data: bytes | str, *, recorded: bool = True) -> Path:
    """Write a file's bytes, or text as UTF-8, as `writing` does it. recorded: False for one that is never replaced."""
    with placing(path, recorded=recorded) as part, named(path):
        part.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def is_own(path: Path) -> bool:
    """Whether a file is what nerve wrote under its name, or has not finished to write."""
    if any(name.startswith(_PART) for name in path.parts[-3:]):
        return True
    if path.suffix == ".log":
        return _head(path).startswith(LOG_HEAD)
    known = _records.of(path.parent).get(path.name)
    try:
        return known is not None and path.is_file() and digest(path) in known
    except OSError:
        return False


def digest(path: Path) -> str:
    """A file's SHA-256 in hexadecimal. Raises OSError."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            sha.update(chunk)
    return sha.hexdigest()


def marked(picture: bytes) -> bytes:
    """A PNG or JPEG file's bytes with a mark that nerve made it, for `made_here`; those of another kind as they are."""
    mark = _MARK + b" " + _version().encode()
    if picture.startswith(b"\xff\xd8"):
        end = 4 + int.from_bytes(picture[4:6], "big") if picture[2:4] == b"\xff\xe0" else 2  # of SOI, and JFIF's header
        return picture[:end] + b"\xff\xfe" + (len(mark) + 2).to_bytes(2, "big") + mark + picture[end:]
    if not picture.startswith(b"\x89PNG"):
        return picture
    chunk = b"tEXt" + mark
    end = 33  # of the signature and IHDR
    return picture[:end] + len(mark).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + picture[end:]


def made_here(path: Path) -> bool:
    """Whether a picture is nerve's own output: by its folder's record or, wherever it was copied to, by its mark."""
    if is_own(path):
        return True
    return _MARK in _head(path)


@contextmanager
def named(path: Path, kept: str = "nothing of it is left") -> Iterator[None]:
    """Say of an error of the operating system which file could not be written, as an OutputError.

    kept: what there is of it then, for the message.
    """
    try:
        yield
    except OSError as error:
        of = None if error.filename is None else os.fsdecode(error.filename)
        if of is not None and _PART not in of and not path.is_relative_to(of):
            raise  # of another file, that was to be read
        full, place = error.errno in _FULL, Path(*(name for name in path.parts if not name.startswith(_PART)))
        hint = ": make room, or choose another folder" if full else ""
        raise OutputError(f"{place} cannot be written, {error.strerror or error}{hint}; {kept}", full=full) from error


class _Records:
    """The records of all folders, as far as they were read: they only grow, and only what is new is read again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[Path, tuple[int, int, dict[str, set[str]]]] = {}

    def of(self, folder: Path) -> dict[str, set[str]]:
        """Digests of what was written into a folder, by name."""
        path = folder.absolute() / RECORD
        with self._lock:
            try:
                with path.open("rb") as file:
                    status = os.fstat(file.fileno())
                    inode, offset, known = self._read.get(path, (0, 0, {}))
                    if inode != status.st_ino or offset > status.st_size:
                        inode, offset, known = status.st_ino, 0, {}
                    file.seek(offset)
                    for line in file:
                        if not line.endswith(b"\n"):
                            break
                        offset += len(line)
                        try:
                            entry = json.loads(line)
                            known.setdefault(entry["name"], set()).add(entry["sha256"])
                        except (ValueError, KeyError, TypeError):
                            continue  # a line that was cut short by a full disk speaks for no file
                    self._read[path] = inode, offset, known
                    return known
            except OSError:
                return {}


_records = _Records()


def _add(path: Path, sha256: str) -> None:
    line = json.dumps({"name": path.name, "sha256": sha256, "by": f"nerve_ros {_version()}"}) + "\n"
    handle = os.open(path.parent / RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        data = line.encode()
        if os.write(handle, data) != len(data):  # the disk is full
            os.write(handle, b"\n")
    finally:
        os.close(handle)


def _head(path: Path) -> bytes:
    """A file's first bytes; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def _kind(path: Path) -> str:
    return "a link" if path.is_symlink() else "a folder" if path.is_dir() else "no plain file"


def _version() -> str:
    try:
        return version("nerve_ros")
    except PackageNotFoundError:
        return ""
