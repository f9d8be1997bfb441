"""A keyframe's mask and a displacement on a coarse grid in; the mask where the newest image is out, at full size.

The map to the keyframe is made, used and forgotten strip by strip, so that it stays in the processor's cache: at
1920 x 1080 a whole one would be 17 MB.
"""

from __future__ import annotations

import cv2
import numpy as np

from ..text.vocabulary import UNLABELLED

STRIP_PIXELS = 2**16
"""Of a strip, about."""


def paired(labels: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Both, uint8 [H, W], in one value a pixel, uint16 [H, W]: read at once, and faster than as two channels."""
    return cv2.merge([labels, confidence]).view(np.uint16)[..., 0]


_UNKNOWN = int(paired(np.full((1, 1), UNLABELLED, np.uint8), np.zeros((1, 1), np.uint8))[0, 0])


def _weights(size: int, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Linear interpolation from `cells` values, and one before and one after them, to the middles of `size` pixels:
    the place of the lower of two in that row of cells + 2, int [size]; the weight of the upper, float32 [size]; and the
    nearest cell itself, int [size]."""
    at = (np.arange(size) + 0.5) * cells / size - 0.5
    lower = np.floor(at)
    nearest = np.minimum((np.arange(size) + 0.5) * cells / size, cells - 1)
    return lower.astype(np.intp) + 1, (at - lower).astype(np.float32), nearest.astype(np.intp)


def _middles(size: int, cells: int) -> np.ndarray:
    """Where cells -1..cells lie in pixels, float32 [cells + 2]."""
    return ((np.arange(-1, cells + 1) + 0.5) * size / cells - 0.5).astype(np.float32)


class Mover:
    """Moves masks of `size` (rows, columns) by displacements on `grid`. Not safe for use by several threads at once."""

    def __init__(self, size: tuple[int, int], grid: tuple[int, int]) -> None:
        (rows, columns), (grid_rows, grid_columns) = size, grid
        self.size, self.grid = size, grid
        down, across = _middles(rows, grid_rows), _middles(columns, grid_columns)
        self._middles: np.ndarray = np.stack(np.meshgrid(across, down), -1)
        self._left, weight, self._column = _weights(columns, grid_columns)
        self._right_weight = weight[:, None]
        above, lower_weight, self._row = _weights(rows, grid_rows)
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

    def __call__(
        self, both: np.ndarray, displacement: np.ndarray, known: np.ndarray, fade: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Labels and confidence, uint8 [H, W], and the share of pixels whose label is known.

        both: `paired`. displacement: float32 [h, w, 2] in pixels of the grid. known: uint8 [h, w], 255 or 0; label 255
        and confidence 0 where it is 0 or the keyframe is left. fade: uint8 [256], what each confidence becomes.
        """
        (rows, columns), (grid_rows, grid_columns) = self.size, self.grid
        scale = np.array([columns / grid_columns, rows / grid_rows], np.float32)
        at = self._middles + np.pad(displacement * scale, ((1, 1), (1, 1), (0, 0)), "edge")
        wide = at[:, self._left]
        wide += (at[:, self._left + 1] - wide) * self._right_weight
        wide = wide.reshape(grid_rows + 2, 2 * columns)
        known = known[:, self._column]
        unknown = cv2.bitwise_not(known)
        labels, confidence = np.empty(self.size, np.uint8), np.empty(self.size, np.uint8)
        open_pixels = 0
        for strip, source, mix in self._strips:
            there = (mix @ wide[source]).reshape(len(mix), columns, 2)
            found = cv2.remap(
                both, there, _EMPTY, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=_UNKNOWN
            )
            found = found.view(np.uint8).reshape(len(mix), columns, 2)
            nearest = self._row[strip]
            label: np.ndarray = cv2.extractChannel(found, 0)
            cv2.bitwise_or(label, unknown[nearest], dst=labels[strip])
            sure = cv2.LUT(cv2.extractChannel(found, 1), fade)
            cv2.bitwise_and(sure, known[nearest], dst=confidence[strip])
            open_pixels += int(np.count_nonzero(labels[strip] == UNLABELLED))
        return labels, confidence, 1 - open_pixels / labels.size


_EMPTY = np.empty(0, np.float32)
"""An optional array that OpenCV is not given."""
