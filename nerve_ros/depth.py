"""Computes where a mask's surface is, in metres in the camera's optical frame, from a depth image and camera_info.

:class:`DepthBuffer` receives, on the executor's thread, and looks at no pixel. :class:`Match` finds for one image the
depth image nearest in time, among those that came before and those that come while the image is being segmented, which
takes longer than many depth images: the newest one would show another moment than the mask. :meth:`Match.point`
computes, on whichever thread asks.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

KEPT = 4
"""Depth images that wait for their image: a few, since colour and depth of one moment need not come in this order."""

SAMPLES = 65521
"""Pixels that a point is computed from at most, evenly chosen: more cost milliseconds and move no median. A prime: a
divisor of the rows would take every row's same columns."""

_UNITS = {
    "16UC1": (np.uint16, 1e-3),
    "mono16": (np.uint16, 1e-3),
    "32FC1": (np.float32, 1.0),
    "64FC1": (np.float64, 1.0),
}

_PINHOLE = (4, 5, 8, 12, 14)
"""Numbers of coefficients that OpenCV's pinhole model takes; those that it is not given are 0 there."""
_FISHEYE = (4,)
_COEFFICIENTS = {
    "plumb_bob": _PINHOLE,
    "rational_polynomial": _PINHOLE,
    "equidistant": _FISHEYE,
    "radtan": _PINHOLE,
    "fisheye": _FISHEYE,
}
"""Names of the distortion models that OpenCV can undo, ROS's own and those of Kalibr (radtan) and OpenCV (fisheye), and
how many coefficients each takes. Zeros behind them mean nothing."""


class DepthError(ValueError):
    """There is no point; the text says why and, where it helps, what is needed."""


@dataclass(frozen=True)
class Point:
    """Where the surface of something is, in metres in the camera's optical frame: x right, y down, z forward.

    `position` is its median along each axis, `spread` half the width of the range that holds the middle 68 % of it
    (the size that is seen, and the noise of the depth), `pixels` how many depth pixels it was seen with.
    """

    position: tuple[float, float, float]
    spread: tuple[float, float, float]
    pixels: int


class DepthBuffer:
    """Receives depth images and camera_info and gives them to the images that they belong to. Thread safe.

    `tolerance` returns the seconds that a depth image and its image may lie apart at most.
    """

    def __init__(self, tolerance: Callable[[], float]) -> None:
        self.tolerance = tolerance
        self._lock = threading.Lock()
        self._depths: deque[Image] = deque(maxlen=KEPT)
        self._infos: deque[CameraInfo] = deque(maxlen=KEPT)
        self._matches: weakref.WeakSet[Match] = weakref.WeakSet()

    def depth(self, message: Image) -> None:
        """Take a depth image as it comes."""
        with self._lock:
            self._depths.append(message)
            for match in self._matches:
                match._offer_depth(message)

    def camera_info(self, message: CameraInfo) -> None:
        """Take a calibration as it comes. It may be older than the images: it holds until another one comes."""
        with self._lock:
            self._infos.append(message)
            for match in self._matches:
                match._offer_info(message)

    def follow(self, header: Header) -> Match:
        """The match of the image with this header; it goes on looking for as long as somebody holds it."""
        match = Match(self, header)
        with self._lock:
            # The newest first: of equally near ones, where nothing is stamped say, that is the one to keep.
            for depth in reversed(self._depths):
                match._offer_depth(depth)
            for info in reversed(self._infos):
                match._offer_info(info)
            self._matches.add(match)
        return match

    def clear(self) -> None:
        """Forget what came; a match that somebody holds keeps what it has found."""
        with self._lock:
            self._depths.clear()
            self._infos.clear()


class Match:
    """The depth image and the calibration nearest in time to one image; made by :meth:`DepthBuffer.follow`."""

    def __init__(self, buffer: DepthBuffer, header: Header) -> None:
        self._buffer = buffer
        self._frame = header.frame_id
        self._stamp = _nanoseconds(header)
        self._depth: Image | None = None
        self._info: CameraInfo | None = None

    def _offer_depth(self, message: Image) -> None:
        if self._depth is None or self._distance(message) < self._distance(self._depth):
            self._depth = message

    def _offer_info(self, message: CameraInfo) -> None:
        if self._info is None or self._distance(message) < self._distance(self._info):
            self._info = message

    def _distance(self, message: Image | CameraInfo) -> int:
        return abs(_nanoseconds(message.header) - self._stamp)

    def point(self, mask: np.ndarray) -> Point:
        """Where the surface behind `mask` is.

        mask: bool or uint8 [H, W] of the image's size, not zero where the thing is. Of several pieces that do not touch
        the one with the most depth pixels is taken: a point between two mugs is in neither. Medians, since the rim of
        a mask shows what is behind.
        The image is taken to be what K and D of camera_info describe: as it comes from the camera, or rectified with a
        camera_info that has no D.
        Raises DepthError where there is no point.
        """
        with self._buffer._lock:
            depth, info = self._depth, self._info
        if depth is None:
            raise DepthError("no depth image has come; check the topic depth")
        self._check_time(depth)
        if info is None:
            raise DepthError("no camera_info has come; check the topic camera_info")
        self._check_frame("the depth image", depth, "a depth image registered to the image is needed")
        self._check_frame("camera_info", info, "the camera_info of the image is needed")
        values, unit = _read(depth)
        _check_aspect(values.shape, mask.shape, "the depth image", "the image")
        camera = _Camera.of(info, values.shape)
        piece, left, top = _resample(mask, values.shape)
        rows, columns = _pixels(piece, values[top : top + len(piece), left : left + piece.shape[1]])
        count = len(rows)
        if count > SAMPLES:
            chosen = ((np.arange(SAMPLES) + 0.5) * count / SAMPLES).astype(np.intp)
            rows, columns = rows[chosen], columns[chosen]
        rows, columns = rows + top, columns + left
        z = values[rows, columns].astype(np.float64) * unit
        rays = camera.rays(columns, rows)
        surface = np.stack([rays[:, 0] * z, rays[:, 1] * z, z])
        low, middle, high = np.percentile(surface, (16, 50, 84), axis=1)
        if not np.isfinite([low, middle, high]).all():
            raise DepthError("the distortion in camera_info (d) gives no finite point; calibrate the camera")
        return Point(tuple(middle.tolist()), tuple(((high - low) / 2).tolist()), count)

    def _check_time(self, depth: Image) -> None:
        seconds = (_nanoseconds(depth.header) - self._stamp) / 1e9
        tolerance = self._buffer.tolerance()
        if abs(seconds) > tolerance:
            raise DepthError(
                f"the nearest depth image is {abs(seconds):.3g} s {'newer' if seconds > 0 else 'older'} than the image "
                f"(depth_tolerance is {tolerance:g} s)"
            )

    def _check_frame(self, what: str, message: Image | CameraInfo, needed: str) -> None:
        if message.header.frame_id != self._frame:
            raise DepthError(
                f"{what} is in frame {message.header.frame_id[:80]!r}, the image in {self._frame[:80]!r}; {needed}"
            )


@dataclass(frozen=True)
class _Camera:
    """How the camera sees the pixels of the depth image: `k` float64 [3, 3], `d` the coefficients of `model`."""

    k: np.ndarray
    d: np.ndarray
    model: str

    @classmethod
    def of(cls, info: CameraInfo, shape: tuple[int, int]) -> _Camera:
        """The calibration for depth images of `shape` (rows, columns), whatever size it was made for."""
        k = np.array(info.k, np.float64).reshape(3, 3)
        focal = k[[0, 1], [0, 1]]
        if not np.isfinite(k).all() or (focal <= 0).any():
            raise DepthError(f"camera_info has no calibration (k[0] is {k[0, 0]:g}, k[4] is {k[1, 1]:g})")
        # K counts in pixels of the full sensor; the images show a region of it, with binned pixels.
        region, binning = info.roi, (max(1, info.binning_x), max(1, info.binning_y))
        full = (region.width or info.width, region.height or info.height)
        size = (full[0] // binning[0], full[1] // binning[1])
        if not all(size):
            raise DepthError(f"camera_info says that its images are {size[0]} x {size[1]}")
        _check_aspect(size[::-1], shape, "the image of camera_info", "the depth image")
        for axis, offset in enumerate((region.x_offset, region.y_offset)):
            scale = shape[1 - axis] / size[axis] / binning[axis]
            k[axis] *= scale
            # Whole numbers are the centres of pixels, so that pixel 0 begins at -0.5 at any scale.
            k[axis, 2] += (0.5 - offset) * scale - 0.5
        d = np.array(info.d, np.float64)
        model = info.distortion_model
        if d.any():
            if model not in _COEFFICIENTS:
                raise DepthError(
                    f"the distortion model {model[:40]!r} of camera_info is unknown; known: {', '.join(_COEFFICIENTS)}"
                )
            d = _coefficients(d, model)
        return cls(k, d, model)

    def rays(self, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """x / z and y / z of what these pixels show: float64 [n, 2]."""
        pixels = np.stack([columns, rows], axis=1).astype(np.float64)
        if not self.d.any():
            return (pixels - self.k[:2, 2]) / self.k[[0, 1], [0, 1]]
        if _COEFFICIENTS[self.model] is _FISHEYE:
            return cv2.fisheye.undistortPoints(pixels[:, None], self.k, self.d)[:, 0]
        stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 40, 1e-6)
        same = np.eye(3)  # neither rotated nor projected again
        return np.asarray(cv2.undistortPointsIter(pixels[:, None], self.k, self.d, same, same, stop))[:, 0]


def _coefficients(d: np.ndarray, model: str) -> np.ndarray:
    """`d` as OpenCV takes it for `model`, without the zeros that some drivers fill it up with. Raises DepthError."""
    used = int(np.flatnonzero(d)[-1]) + 1
    for count in _COEFFICIENTS[model]:
        if count in range(used, len(d) + 1):
            return d[:count]
    numbers = " or ".join(map(str, _COEFFICIENTS[model]))
    raise DepthError(
        f"camera_info has {len(d)} coefficients (d), {used} without the zeros at their end; {model} has {numbers}"
    )


def _nanoseconds(header: Header) -> int:
    return header.stamp.sec * 1_000_000_000 + header.stamp.nanosec


def _read(message: Image) -> tuple[np.ndarray, float]:
    """The depth image as [height, width] in its own numbers, and the metres in one of them."""
    if message.encoding not in _UNITS:
        raise DepthError(
            f"encoding {message.encoding[:40]!r} of the depth image cannot be read; accepted: "
            "16UC1 and mono16 (millimetres), 32FC1 and 64FC1 (metres)"
        )
    kind, unit = _UNITS[message.encoding]
    dtype = np.dtype(kind).newbyteorder(">" if message.is_bigendian else "<")
    width, height, step = message.width, message.height, message.step
    if not width or not height:
        raise DepthError(f"the depth image is {width} x {height}")
    row = width * dtype.itemsize
    if step < row:
        raise DepthError(f"step of the depth image is {step}; {width} pixels of {message.encoding} need {row} bytes")
    needed = step * (height - 1) + row
    if len(message.data) < needed:
        raise DepthError(
            f"the depth image has {len(message.data)} bytes; {width} x {height} {message.encoding} with step {step} "
            f"needs {needed}"
        )
    data = np.frombuffer(message.data, np.uint8)
    rows = np.lib.stride_tricks.as_strided(data, (height, row), (step, 1), writeable=False)
    return np.ascontiguousarray(rows).view(dtype), unit


def _check_aspect(shape: tuple[int, ...], other: tuple[int, ...], what: str, whose: str) -> None:
    """Raise DepthError where no scale turns one of these (rows, columns) into the other, rounded to pixels."""
    (height, width), (rows, columns) = shape, other
    if abs(width * rows - height * columns) > max(rows, columns, height, width):
        raise DepthError(
            f"{what} is {width} x {height}, {whose} {columns} x {rows}; they must have the same aspect ratio"
        )


def _resample(mask: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """The part of `mask` that is not empty as uint8, at the size of the depth image, and its left and top there."""
    mask = np.ascontiguousarray(mask).view(np.uint8)
    if mask.shape != shape:
        # The nearest pixel by its centre; cv2.resize takes the one to the left above.
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(np.intp) for new, old in zip(shape, mask.shape, strict=True)
        )
        mask = mask[rows[:, None], columns]
    left, top, width, height = cv2.boundingRect(mask)
    if not width:
        raise DepthError("no pixel of the depth image lies within the mask")
    return mask[top : top + height, left : left + width], left, top


def _pixels(mask: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels with a valid depth, in that piece of the mask that has the most of them."""
    with np.errstate(invalid="ignore"):
        rows, columns = np.nonzero((mask != 0) & (values > 0) & (values < np.inf))
    if not len(rows):
        raise DepthError(f"none of the {np.count_nonzero(mask)} depth pixels within the mask has a valid depth")
    # Pieces of the mask, not of the valid pixels: a hole in the depth cuts nothing in two.
    pieces, labels = cv2.connectedComponents(mask, connectivity=8)
    if pieces > 2:
        piece = labels[rows, columns]
        chosen = piece == np.bincount(piece).argmax()
        rows, columns = rows[chosen], columns[chosen]
    return rows, columns
