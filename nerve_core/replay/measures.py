"""Masks -> figures: how steady they are over time, how confident and, where the bag has labels, how good."""

from __future__ import annotations

import math

import cv2
import numpy as np

from ..evaluation.metric import ConfusionMatrix
from ..report.data import Presence, Score
from ..segmenter import Segmentation
from .frames import Frame

SIDE = 320
"""Pixels of an image's longer side, at most, on which steadiness is measured; the labels at the same points."""
STATIC_DIFFERENCE = 4
"""Grey levels (of 255) that the smoothed, scaled image differs by at most between two frames where it stands still.
Ours: above the noise of a camera, below what a moving edge does."""
SMOOTHING = 5
"""Side of the Gaussian window, in scaled pixels, by which images are smoothed before they are compared."""
NEIGHBOURHOOD = 15
"""Side of the square around a pixel, in scaled pixels, that has to stand still with it: inside a moving thing of one
colour nothing differs but near its edges. A larger one still counts as still in its middle."""
MAX_GAP = 1.0
"""Seconds between two frames, at most, for them to be compared."""
BINS = 32

_EMPTY = np.empty(0, np.float32)
"""An optional array that OpenCV is not given: C++ takes it as it takes None, which OpenCV's type stubs do not allow."""
_OCCLUSION = (0.01, 0.5)
"""A pixel is hidden where the flow there and the flow back do not cancel: |f + b|^2 > 0.01 (|f|^2 + |b|^2) + 0.5, as in
Sundaram, Brox and Keutzer, Dense point trajectories by GPU-accelerated large displacement optical flow, 2010."""


class Steadiness:
    """How often labels change that should not, over one camera's frames.

    static: label changes per pixel and second where the image stands still (STATIC_DIFFERENCE, NEIGHBOURHOOD). warped:
    the same over all pixels, each compared with the label it came from along the optical flow (DIS), hidden ones left
    out. Pairs of frames without time between them, more than MAX_GAP apart or of two sizes are left out.
    """

    def __init__(self) -> None:
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self._before: tuple[float, np.ndarray, np.ndarray] | None = None
        self._still = self._pixels = 0
        self._changes = {"static": 0, "warped": 0}
        self._pixel_seconds = {"static": 0.0, "warped": 0.0}

    @property
    def static(self) -> float | None:
        """Label changes per pixel and second where the image stands still; None where it never does."""
        return self._rate("static")

    @property
    def warped(self) -> float | None:
        """Label changes per pixel and second along the optical flow; None without two frames to compare."""
        return self._rate("warped")

    @property
    def static_share(self) -> float | None:
        """Share of pixels that stood still, 0..1."""
        return self._still / self._pixels if self._pixels else None

    def _rate(self, kind: str) -> float | None:
        return self._changes[kind] / self._pixel_seconds[kind] if self._pixel_seconds[kind] else None

    def add(self, seconds: float, image: np.ndarray, labels: np.ndarray) -> None:
        """Take the next frame: uint8 [H, W, 3] RGB and uint8 [H, W], at `seconds`."""
        scale = min(1.0, SIDE / max(labels.shape))
        size = tuple(max(1, round(side * scale)) for side in labels.shape[::-1])
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        now = seconds, grey, cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
        before, self._before = self._before, now
        if before is None or before[1].shape != grey.shape or not 0 < seconds - before[0] <= MAX_GAP:
            return
        passed = seconds - before[0]
        smooth = [cv2.GaussianBlur(picture, (SMOOTHING, SMOOTHING), 0) for picture in (before[1], grey)]
        moved = (cv2.absdiff(*smooth) > STATIC_DIFFERENCE).astype(np.uint8)
        still = cv2.dilate(moved, np.ones((NEIGHBOURHOOD, NEIGHBOURHOOD), np.uint8)) == 0
        self._still += int(still.sum())
        self._pixels += still.size
        self._count("static", still, before[2] != now[2], passed)
        source, seen = self._where_from(before[1], grey)
        came_from = cv2.remap(before[2], source, _EMPTY, cv2.INTER_NEAREST)
        self._count("warped", seen, came_from != now[2], passed)

    def _count(self, kind: str, where: np.ndarray, changed: np.ndarray, passed: float) -> None:
        self._changes[kind] += int((where & changed).sum())
        self._pixel_seconds[kind] += passed * int(where.sum())

    def _where_from(self, before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each pixel of `now` its place in `before`, float32 [h, w, 2] (column, row); whether it was seen there."""
        rows, columns = now.shape
        if min(rows, columns) < 16:  # DIS needs a patch of 8 pixels on a level of its pyramid
            grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).astype(np.float32)
            return grid, np.zeros(now.shape, bool)
        back: np.ndarray = self._flow.calc(now, before, _EMPTY)
        there: np.ndarray = self._flow.calc(before, now, _EMPTY)
        grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).astype(np.float32)
        source = grid + back
        met = cv2.remap(there, source, _EMPTY, cv2.INTER_LINEAR)
        share, least = _OCCLUSION
        apart = ((back + met) ** 2).sum(-1)
        seen = apart <= share * ((back**2).sum(-1) + (met**2).sum(-1)) + least
        inside = (source >= 0).all(-1) & (source[..., 0] <= columns - 1) & (source[..., 1] <= rows - 1)
        return source, seen & inside


class Measures:
    """All figures of one camera: its names over time, their confidence, steadiness and, with labels, the score."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self.first = 0  # when the first image was taken, in nanoseconds
        self.times: list[float] = []
        self.size = (0, 0)
        self.encodings: dict[tuple[str, int, int], int] = {}
        self.steadiness = Steadiness()
        self.stage_ms: dict[str, float] = {}
        self._presence: list[tuple[float, ...]] = []
        self._confidence: list[tuple[float | None, ...]] = []
        self._area: list[tuple[float, ...]] = []
        self._histograms = np.zeros((256, BINS), np.int64)
        self.matrix = ConfusionMatrix.of(len(names) + 1)
        self.per_image: dict[str, float | None] = {}
        self.scored = 0

    def take(self, frame: Frame, found: Segmentation) -> None:
        """Count one segmented image."""
        rows, columns = found.labels.shape
        if not self.times:
            self.first, self.size = frame.moment, (columns, rows)
        how = frame.encoding, columns, rows
        self.encodings[how] = self.encodings.get(how, 0) + 1
        seconds = (frame.moment - self.first) * 1e-9
        self.times.append(seconds)
        seen, pixels = found.class_confidence, rows * columns
        self._presence.append(tuple(float(one.presence) for one in seen))
        self._confidence.append(tuple(float(one.mean_probability) if one.area else None for one in seen))
        self._area.append(tuple(one.area / pixels for one in seen))
        bins = found.labels.astype(np.uint16) * BINS + found.confidence_u8 // (256 // BINS)
        self._histograms += np.bincount(bins.ravel(), minlength=256 * BINS).reshape(256, BINS)
        self.steadiness.add(seconds, frame.image, found.labels)
        for stage, spent in found.timings.items():
            self.stage_ms[stage] = self.stage_ms.get(stage, 0.0) + spent
        if frame.truth is not None:
            alone = ConfusionMatrix.of(len(self._names) + 1)
            alone.add(frame.truth, found.labels)
            self.matrix.counts += alone.counts
            self.per_image[f"{seconds:.3f} s"] = _number(alone.mean_iou())
            self.scored += 1

    def mean_stage_ms(self) -> dict[str, float]:
        """Ms of each stage of a frame, in the mean."""
        return {stage: spent / len(self.times) for stage, spent in self.stage_ms.items()}

    def names(self) -> tuple[Presence, ...]:
        """Every name over the recording."""
        return tuple(
            Presence(
                name,
                label,
                tuple(values[label - 1] for values in self._presence),
                tuple(values[label - 1] for values in self._confidence),
                tuple(values[label - 1] for values in self._area),
                tuple(map(int, self._histograms[label])),
            )
            for label, name in enumerate(self._names, 1)
        )

    def score(self, variant: str, seconds: float) -> Score | None:
        """The masks against the labels of the bag; None where no image had any. No interval: the images of a recording
        resemble each other, and drawing among them would call too sure what is one place on one day."""
        if not self.scored:
            return None
        counts = self.matrix.counts
        return Score(
            variant,
            {},
            self.scored,
            seconds,
            _number(self.matrix.mean_iou()),
            None,
            _number(self.matrix.pixel_accuracy()),
            dict(zip(("background", *self._names), map(_number, self.matrix.iou()), strict=True)),
            tuple((int(row), int(column), int(counts[row, column])) for row, column in np.argwhere(counts)),
            self.per_image,
        )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
