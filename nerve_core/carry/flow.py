"""Two small grey images in, and where each pixel of one lies in the other out; several such maps put one after another.

A displacement d [h, w, 2] (float32; column, row) says that what is at x in the newer image is at x + d(x) in the older,
in pixels of its own grid. Displacements lie on a grid of half the small images' sides: DIS in its fastest setting finds
motion at a quarter of them.
"""

from __future__ import annotations

import cv2
import numpy as np

LEAST_SIDE = 32
"""Pixels of a small image's side, at least: DIS matches patches of 8 pixels on a pyramid."""
DETAIL, WINDOW = 15, 7
"""Sides in pixels of the displacements' grid of the mean that an image is compared without, and of the window over
which it is compared."""
NOISE, CONTRAST = 3.0, 0.35
"""Two images agree where they differ by less than so many grey levels plus this share of their contrast."""
TEXTURE = 9.0
"""Contrast in grey levels from which on a place says anything about motion."""

NO_ARRAY = np.empty(0, np.float32)
"""An optional array that OpenCV is not given: C++ takes it as it takes None, which OpenCV's type stubs do not allow."""


def grid_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(rows, columns) of the displacements' grid for images of `size`: half of the small images' sides, whose longer
    one is `longest`; aspect kept, no side of the small images under 32."""
    shrink = longest / max(size)
    rows, columns = (max(LEAST_SIDE // 2, round(side * shrink / 2)) for side in size)
    return rows, columns


class SmallImage:
    """One image as motion is looked for in it: `grey`, uint8 [2 h, 2 w]; `half`, the same as uint8 [h, w]; `detail`,
    float32 [h, w], that without its local mean."""

    def __init__(self, image: np.ndarray, grid: tuple[int, int]) -> None:
        """image: uint8 [H, W, 3], RGB; not kept. grid: (h, w)."""
        rows, columns = grid
        if image.shape[1] >= 8 * columns:  # averaging every pixel of a large image costs more than the flow
            step = image.shape[1] // (4 * columns)
            image = np.ascontiguousarray(image[::step, ::step])
        small = cv2.resize(image, (2 * columns, 2 * rows), interpolation=cv2.INTER_AREA)
        self.grey: np.ndarray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        self.half: np.ndarray = cv2.resize(self.grey, (columns, rows), interpolation=cv2.INTER_AREA)
        levels = self.half.astype(np.float32)
        self.detail: np.ndarray = levels - cv2.blur(levels, (DETAIL, DETAIL))

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps."""
        return self.grey.nbytes + self.half.nbytes + self.detail.nbytes


class Flow:
    """Motion between images of one size, on a grid of (rows, columns).

    Dense inverse search (Kroeger et al., Fast Optical Flow using Dense Inverse Search, 2016) in OpenCV's fastest
    setting. Not safe for use by several threads at once.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        rows, columns = grid
        places = np.meshgrid(np.arange(columns), np.arange(rows))
        self._places: np.ndarray = np.stack(places, -1).astype(np.float32)

    def between(self, newer: SmallImage, older: SmallImage, start: np.ndarray | None = None) -> np.ndarray:
        """The displacement from `newer` to `older`, float32 [h, w, 2]; start: one to begin at, which is not changed."""
        rows, columns = self.grid
        if start is None:
            large = self._dis.calc(newer.grey, older.grey, NO_ARRAY)
        else:
            large = self._dis.calc(newer.grey, older.grey, 2 * cv2.resize(start, (2 * columns, 2 * rows)))
        return cv2.resize(large, (columns, rows), interpolation=cv2.INTER_AREA) / 2

    def compose(self, first: np.ndarray, then: np.ndarray) -> np.ndarray:
        """Two displacements, one after the other: d(x) = first(x) + then(x + first(x)), float32 [h, w, 2].

        first: from the newest image to one before it; then: from there to an older one, continued evenly where `first`
        leaves the view.
        """
        at = self._places + first
        return first + cv2.remap(then, at, NO_ARRAY, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    def compare(self, newer: SmallImage, older: SmallImage, displacement: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far the newer image differs from what the displacement makes of the older one, and the contrast of both.

        Float32 [h, w], grey levels, mean over WINDOW pixels, of images without their local means: a light that changes
        does not count.
        """
        at = self._places + displacement
        seen = cv2.remap(older.detail, at, NO_ARRAY, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        window = (WINDOW, WINDOW)
        return (
            cv2.blur(cv2.absdiff(newer.detail, seen), window),
            cv2.blur(np.abs(newer.detail) + np.abs(seen), window),
        )

    def inside(self, displacement: np.ndarray) -> np.ndarray:
        """Where a displacement stays in the view, bool [h, w]."""
        rows, columns = self.grid
        at = self._places + displacement
        across, down = at[..., 0], at[..., 1]
        return (across >= -0.5) & (across <= columns - 0.5) & (down >= -0.5) & (down <= rows - 0.5)


def unchanged(one: SmallImage, other: SmallImage) -> np.ndarray:
    """Where two images are equal without any motion, but for noise: bool [h, w]."""
    apart = cv2.absdiff(one.half, other.half).astype(np.float32)
    return cv2.blur(apart, (WINDOW, WINDOW)) <= NOISE


def explained(difference: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Where what `Flow.compare` gives is noise and interpolation, and no other scene; bool [h, w]."""
    return difference < NOISE + CONTRAST * contrast


def unexplained_share(difference: np.ndarray, contrast: np.ndarray, inside: np.ndarray) -> float:
    """The share of the textured pixels inside the view that the displacement does not explain, 0..1; 0 where almost
    nothing has a texture; 1 where next to nothing is inside the view."""
    if inside.mean() < 0.02:
        return 1.0
    textured = inside & (contrast > TEXTURE)
    count = int(textured.sum())
    if count < 0.02 * inside.size:
        return 0.0
    return float((textured & ~explained(difference, contrast)).sum() / count)
