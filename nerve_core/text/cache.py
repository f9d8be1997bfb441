"""Text embeddings on disk, from one run to the next: arrays in one SQLite file, by model and word."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

LIMIT = 256 * 2**20
"""Bytes that the file may have: some 80 thousand words of a full-size CLIP."""
_FILE = "embeddings-1.sqlite"  # another schema takes another number, so that two releases never share a file
_PATIENCE = 2.0  # seconds to wait for another process that writes
_TABLE = (
    "CREATE TABLE embeddings (space TEXT NOT NULL, name TEXT NOT NULL, shape TEXT NOT NULL, data BLOB NOT NULL, "
    "checksum INTEGER NOT NULL, used INTEGER NOT NULL, UNIQUE (space, name))"
)
_INDEX = "CREATE INDEX by_use ON embeddings (used)"
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where embeddings are kept: NERVE_CACHE, else nerve_ros in the user's cache folder. Raises OSError for a user
    without a home folder, as containers have them."""
    try:
        if own := os.environ.get("NERVE_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nerve_ros"
    except RuntimeError:
        raise OSError(
            "this user has no home folder: there is no HOME, and no entry among the users; name a folder by NERVE_CACHE"
        ) from None


def space_of(*parts: str) -> str:
    """A digest of all that decides what a name's embedding is (model, revision, precision, templates), in order."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class EmbeddingCache:
    """Float32 arrays on disk by (space, name), for several threads and processes at once.

    A cache is never a reason to fail: a damaged file is replaced, and where the folder cannot be read or written the
    run goes on without; each is logged once, as a warning. Reads never write, so that a read-only folder serves.
    """

    def __init__(self, folder: Path, *, limit: int = LIMIT) -> None:
        """folder: made when first written to. limit: bytes of the file, beyond which what was not used for longest
        goes."""
        self.path, self.limit = folder / _FILE, limit
        self._reads = self._writes = True
        self._replaced = False
        self._used: set[tuple[str, str]] = set()  # found since the last write, which marks them as used

    @property
    def nbytes(self) -> int:
        """Size of the file, 0 without one."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def get(self, space: str, names: Iterable[str]) -> dict[str, np.ndarray]:
        """What is known of `names`: float32 arrays of any shape. A row that is not whole counts as unknown."""
        found: dict[str, np.ndarray] = {}
        if not self._reads or not self.nbytes:
            return found
        try:
            with self._transaction("DEFERRED") as db:
                for name in names:
                    row = db.execute(
                        "SELECT shape, data, checksum FROM embeddings WHERE space = ? AND name = ?", (space, name)
                    ).fetchone()
                    array = None if row is None else _unpacked(space, name, *row)
                    if array is not None:
                        found[name] = array
        except (sqlite3.Error, OSError) as error:
            if not self._replace(error):
                self._reads = self._writes = False
                _log.warning(f"text embeddings cannot be read from {self.path} and are worked out anew: {error}")
            return {}
        self._used.update((space, name) for name in found)
        return found

    def put(self, space: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep float32 arrays, all or none. Raises ValueError for values that are not finite."""
        rows = [(space, name, *_packed(space, name, array)) for name, array in arrays.items()]
        if rows:
            self._write(rows)

    def close(self) -> None:
        """Write down what was used since the last `put`; the cache may be used again afterwards."""
        if self._used:
            self._write([])

    def clear(self) -> int:
        """Forget everything; returns the bytes that this freed. Raises OSError where the file cannot be written."""
        before = self.nbytes
        if not before:
            return 0
        try:
            with self._transaction("IMMEDIATE") as db:
                db.execute("DELETE FROM embeddings")
        except (sqlite3.Error, OSError) as error:
            if not self._replace(error):
                raise OSError(f"{self.path} cannot be cleared: {error}; is it yours to write?") from error
        self._used.clear()
        return before - self.nbytes

    def _write(self, rows: list[tuple]) -> None:
        """Insert rows (space, name, shape, data, checksum), mark what was used, and keep to the limit."""
        while self._writes:
            try:
                with self._transaction("IMMEDIATE") as db:
                    # Turns are counted: the clock of a robot may stand in 1970 until it finds a network.
                    (turn,) = db.execute("SELECT coalesce(max(used), 0) + 1 FROM embeddings").fetchone()
                    db.executemany(
                        "UPDATE embeddings SET used = ? WHERE space = ? AND name = ?",
                        [(turn, *key) for key in self._used],
                    )
                    db.executemany(
                        "INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?, ?, ?)", [(*row, turn) for row in rows]
                    )
                    self._shrink(db)
                self._used.clear()
                return
            except (sqlite3.Error, OSError) as error:
                if not self._replace(error):
                    self._writes = False
                    _log.warning(
                        f"text embeddings are not kept in {self.path}: {error}; "
                        "make room, or name another folder (cache_dir, or NERVE_CACHE in the environment)"
                    )

    def _shrink(self, db: sqlite3.Connection) -> None:
        """Delete what was not used for longest until the file is within the limit."""
        while (excess := _pages_in_use(db) - self.limit) > 0:
            gone = []
            for number, size in db.execute("SELECT rowid, length(data) FROM embeddings ORDER BY used, rowid"):
                gone.append((number,))
                excess -= size
                if excess <= 0:
                    break
            if not gone:
                return
            db.executemany("DELETE FROM embeddings WHERE rowid = ?", gone)

    @contextlib.contextmanager
    def _transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        """A transaction on a connection of its own, so that threads and forks share none. IMMEDIATE may write."""
        writes = kind == "IMMEDIATE"
        if writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        address = f"{self.path.absolute().as_uri()}?mode={'rwc' if writes else 'rw'}"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=_PATIENCE, isolation_level=None)) as db:
            if writes and not self.nbytes:
                db.execute("PRAGMA auto_vacuum = FULL")  # rows that are deleted make the file smaller
            # A put must not wait for the disk while images do. Where the power fails, what is damaged is noticed: by
            # SQLite or, of a row, by its checksum.
            db.execute("PRAGMA synchronous = OFF")
            db.execute(f"BEGIN {kind}")
            tables = db.execute("SELECT sql FROM sqlite_master WHERE type = 'table'").fetchall()
            if writes and not tables:
                db.execute(_TABLE)
                db.execute(_INDEX)
            elif tables != [(_TABLE,)]:
                raise sqlite3.DatabaseError("it holds other tables")
            yield db
            db.execute("COMMIT")

    def _replace(self, error: Exception) -> bool:
        """Remove the file where `error` says that it is damaged or not a cache, once a run; whether it is gone."""
        if type(error) is not sqlite3.DatabaseError or self._replaced:  # subclasses: locked, full, not allowed
            return False
        self._replaced = True
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            return False
        _log.warning(f"{self.path} was damaged ({error}): it is replaced, and text embeddings are worked out anew")
        return True


def _pages_in_use(db: sqlite3.Connection) -> int:
    """Bytes the file will have once the transaction is committed, from three numbers in its header."""
    header = ("page_size", "page_count", "freelist_count")
    size, pages, free = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in header)
    return size * (pages - free)


def _packed(space: str, name: str, array: np.ndarray) -> tuple[str, bytes, int]:
    """An array as (shape, data, checksum); ValueError for values that are not finite."""
    if not np.isfinite(array).all():
        raise ValueError(f"the embedding of {name!r} is not finite and cannot be kept")
    shape, data = json.dumps(array.shape), np.ascontiguousarray(array, "<f4").tobytes()
    return shape, data, _checksum(space, name, shape, data)


def _unpacked(space: str, name: str, shape: str, data: bytes, checksum: int) -> np.ndarray | None:
    """An array that was packed, or None where the row is not as it was written."""
    try:
        if _checksum(space, name, shape, data) != checksum:
            return None
        sizes = json.loads(shape)
        if math.prod(sizes) * 4 != len(data):
            return None
        array = np.frombuffer(data, "<f4").reshape(sizes).astype(np.float32)
    except (TypeError, ValueError, AttributeError):  # SQLite keeps a value of any type in any column
        return None
    return array if np.isfinite(array).all() else None


def _checksum(space: str, name: str, shape: str, data: bytes) -> int:
    """SQLite has none of its own: a bit that flipped on an old card would give a wrong embedding for ever."""
    return zlib.crc32(data, zlib.crc32("\0".join((space, name, shape)).encode()))
