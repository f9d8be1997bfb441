"""The pictures that `nerve watch --save` keeps in a folder."""

from __future__ import annotations

import errno
import itertools
import math
import os
import shutil
import time
from pathlib import Path

from nerve_core.output import OutputError, marked, write

SPARE = 1 << 30
"""Bytes that `--save` leaves free on the disk."""


class Keeper:
    """Keeps pictures in a folder, one every `every` seconds; stops, and says why in `error`, where it cannot."""

    def __init__(self, folder: Path, every: float) -> None:
        self._folder = folder
        self._every = every
        self._last = -math.inf
        self.error = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--save {folder} cannot be used: {error.strerror}") from None
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--save {folder} cannot be used: it may not be written to")

    def keep(self, jpeg: bytes, name: str) -> None:
        """Write a picture as NAME.jpg, if it is time for one."""
        if self.error or time.monotonic() - self._last < self._every:
            return
        self._last = time.monotonic()
        try:
            if shutil.disk_usage(self._folder).free < SPARE + len(jpeg):
                raise OSError(errno.ENOSPC, "less than 1 GB is free")
            write(self._free(name), marked(jpeg), recorded=False)  # none is ever replaced
        except OSError as error:
            self.error = f"no more pictures are kept in {self._folder}: {error.strerror}"
        except OutputError as error:
            self.error = f"no more pictures are kept: {error}"

    def _free(self, name: str) -> Path:
        """NAME.jpg, or with a number where that is there: a clock that was set back gives the same stamps again."""
        numbers = itertools.count(2)
        path = self._folder / f"{name}.jpg"
        while path.exists():
            path = self._folder / f"{name}_{next(numbers)}.jpg"
        return path
