"""Masks -> video: overlays in the recording's own time, as a file that browsers play."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import cv2
import numpy as np

from ..images.visualize import overlay
from ..output import OutputError
from .frames import Frame

if TYPE_CHECKING:
    from ..segmenter import Segmentation

WIDTH = 480
"""Pixels of the video's longer side, at most: VP8 takes as long for 640 as a third of the embedded pair's frame on two
cores, which the masks would wait for."""
MAX_RATE = 60.0
HOLD = 2.0
"""Seconds that a picture stays, at most, where the recording has a hole."""
_CODEC = "VP80"
_LOOK_AHEAD = 10
"""Pictures by whose times the video's rate is chosen."""


class OverlayVideo:
    """A WebM file (VP8, which OpenCV's wheels write and browsers play) of one camera's images with their masks.

    A picture stays until the next one's time. Raises RuntimeError where OpenCV cannot write it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: cv2.VideoWriter | None = None  # None until the rate is chosen
        self._pending: list[tuple[float, np.ndarray]] = []
        self._interval = 0.1
        self._size = (0, 0)

    def take(self, frame: Frame, found: Segmentation) -> None:
        """Draw and write one image."""
        rows, columns = found.labels.shape
        scale = min(1.0, WIDTH / max(rows, columns))
        # VP8 has its colours in blocks of two by two.
        size = tuple(max(2, round(side * scale / 2) * 2) for side in (columns, rows))
        image = cv2.resize(frame.image, size, interpolation=cv2.INTER_AREA)
        labels = cv2.resize(found.labels, size, interpolation=cv2.INTER_NEAREST)
        self._pending.append((frame.moment * 1e-9, overlay(image, labels, found.names)[..., ::-1]))
        if self._writer is None and len(self._pending) == _LOOK_AHEAD:
            self._writer = self._open()
        if self._writer is not None:
            self._write(self._writer)

    def close(self) -> bool:
        """Write what is left; whether there was anything."""
        if not self._pending:
            return False
        writer = self._writer or self._open()
        self._write(writer)
        self._put(writer, self._pending.pop()[1], 1)
        writer.release()
        if not _is_whole(self._path):
            raise OutputError(f"the video {self._path.name} was not written to its end: the disk is full", full=True)
        if not opens(self._path):
            raise RuntimeError(
                f"the video {self._path.name} was written, but OpenCV {cv2.__version__} cannot read it back"
            )
        return True

    def _open(self) -> cv2.VideoWriter:
        """A writer at the rate of the images that wait, and of the size of the first."""
        times = [time for time, _ in self._pending]
        steps = [after - before for before, after in itertools.pairwise(times) if after > before]
        self._interval = max(1 / MAX_RATE, min(HOLD, median(steps) if steps else self._interval))
        self._size = self._pending[0][1].shape[1::-1]
        code = cv2.VideoWriter.fourcc(*_CODEC)
        with _standard_error() as said:
            writer = cv2.VideoWriter(str(self._path), cv2.CAP_FFMPEG, code, 1 / self._interval, self._size)
        if not writer.isOpened():
            raise RuntimeError(
                f"OpenCV {cv2.__version__} cannot write the video {self._path.name}: {' '.join(said).strip()}; "
                "its FFmpeg needs VP8 (the wheels on PyPI have it); or do without, by --no-video"
            )
        return writer

    def _write(self, writer: cv2.VideoWriter) -> None:
        """Write all that wait but the last, whose end is not known."""
        while len(self._pending) > 1:
            time, picture = self._pending.pop(0)
            lasts = min(HOLD, self._pending[0][0] - time)
            self._put(writer, picture, max(1, round(lasts / self._interval)))

    def _put(self, writer: cv2.VideoWriter, picture: np.ndarray, times: int) -> None:
        if picture.shape[1::-1] != self._size:  # a camera that changed its size meanwhile
            picture = cv2.resize(picture, self._size, interpolation=cv2.INTER_AREA)
        for _ in range(times):
            writer.write(picture)


@contextmanager
def _standard_error() -> Iterator[Sequence[str]]:
    """What C code writes to standard error meanwhile: of every WebM, FFmpeg says that its tag is not VP8's."""
    said: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def _is_whole(path: Path) -> bool:
    """Whether a WebM file is as long as its Segment says (RFC 9559): FFmpeg says nothing of a disk that is full."""
    with path.open("rb") as file:
        head = file.read(4096)
    start = head.find(b"\x18\x53\x80\x67") + 4
    size = int.from_bytes(head[start : start + 8], "big") & ((1 << 56) - 1)
    return start >= 4 and start + 8 + size == path.stat().st_size


def opens(path: Path) -> bool:
    """Whether a video's first picture can be read."""
    capture = cv2.VideoCapture(str(path))
    try:
        return capture.read()[0]
    finally:
        capture.release()
