"""A keyframe's mask and a displacement on a coarse grid in; the mask where the newest image is out, at full size.

The map to the keyframe is made, used and forgotten strip by strip, so that it stays in the processor's cache: at
1920 x 1080 a whole one would be 17 MB.
"""

from __future__ import annotations

import cv2
import numpy as np

from ..text.vocabulary import UNLABELLED
from .flow import NO_ARRAY

STRIP_PIXELS = 2**15
"""Of a strip, about."""


def paired(labels: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Both, uint8 [H, W], in one value a pixel, uint16 [H, W]: read at once, and faster than as two channels."""
    return cv2.merge([labels, confidence]).view(np.uint16)[..., 0]


_UNKNOWN = int(paired(np.full((1, 1), UNLABELLED, np.uint8), np.zeros((1, 1), np.uint8))[0, 0])


def _nearest(size: int, cells: int) -> np.ndarray:
    """The cell in which each of `size` pixels has its middle, int [size]."""
    return np.minimum((np.arange(size) + 0.5) * cells / size, cells - 1).astype(np.intp)


class Mover:
    """Moves masks of `size` (rows, columns) by displacements on `grid`. Not safe for use by several threads at once."""

    def __init__(self, size: tuple[int, int], grid: tuple[int, int]) -> None:
        (rows, columns), (grid_rows, grid_columns) = size, grid
        self.size, self.grid = size, grid
        # Of the rows of cells, and of one row above them and one below; the places of the pixels' columns.
        middles = (np.arange(-1, grid_rows + 1) + 0.5) * rows / grid_rows - 0.5
        self._places: np.ndarray = np.stack(np.meshgrid(np.arange(columns), middles), -1).astype(np.float32)
        self._row, self._column = _nearest(rows, grid_rows), _nearest(columns, grid_columns)
        at = (np.arange(rows) + 0.5) * grid_rows / rows + 0.5  # in those rows
        above = np.floor(at).astype(np.intp)
        lower_weight = (at - above).astype(np.float32)
        self._strips = []
        step = max(1, STRIP_PIXELS // columns)
        for start in range(0, rows, step):
            strip = slice(start, min(start + step, rows))
            first, last = int(above[strip][0]), int(above[strip][-1]) + 1
            mix = np.zeros((strip.stop - start, last - first + 1), np.float32)
            line = np.arange(len(mix))
            mix[line, above[strip] - first] = 1 - lower_weight[strip]
            mix[line, above[strip] - first + 1] += lower_weight[strip]
            self._strips.append((strip, slice(first, last + 1), mix))
        # Used again for every strip and every mask: new memory costs as much as what is done in it.
        self._there: np.ndarray = np.empty((step, 2 * columns), np.float32)
        self._found: np.ndarray = np.empty((step, columns), np.uint16)
        self._channel: np.ndarray = np.empty((step, columns), np.uint8)

    def __call__(
        self, both: np.ndarray, displacement: np.ndarray, known: np.ndarray, fade: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Labels and confidence, uint8 [H, W], and the share of pixels whose label is known.

        both: `paired`. displacement: float32 [h, w, 2] in pixels of the grid. known: uint8 [h, w], 255 or 0; label 255
        and confidence 0 where it is 0 or the keyframe is left. fade: uint8 [256], what each confidence becomes.
        """
        (rows, columns), (grid_rows, grid_columns) = self.size, self.grid
        scale = np.array([columns / grid_columns, rows / grid_rows], np.float32)
        padded = np.pad(displacement * scale, ((1, 1), (0, 0), (0, 0)), "edge")
        wide = cv2.resize(padded, (columns, grid_rows + 2), interpolation=cv2.INTER_LINEAR)
        wide = cv2.add(wide, self._places).reshape(grid_rows + 2, 2 * columns)
        known = known[:, self._column]
        unknown = cv2.bitwise_not(known)
        labels, confidence = np.empty(self.size, np.uint8), np.empty(self.size, np.uint8)
        open_pixels = 0
        for strip, source, mix in self._strips:
            count = len(mix)
            there = np.matmul(mix, wide[source], out=self._there[:count]).reshape(count, columns, 2)
            found, channel = self._found[:count], self._channel[:count]
            cv2.remap(both, there, NO_ARRAY, cv2.INTER_NEAREST, found, cv2.BORDER_CONSTANT, _UNKNOWN)
            halves = found.view(np.uint8).reshape(count, columns, 2)
            nearest = self._row[strip]
            cv2.extractChannel(halves, 0, dst=channel)
            cv2.bitwise_or(channel, unknown[nearest], dst=labels[strip])
            cv2.extractChannel(halves, 1, dst=channel)
            cv2.LUT(channel, fade, dst=channel)
            cv2.bitwise_and(channel, known[nearest], dst=confidence[strip])
            open_pixels += int(np.count_nonzero(labels[strip] == UNLABELLED))
        return labels, confidence, 1 - open_pixels / labels.size
