"""Image messages -> RGB or label arrays: every encoding of sensor_msgs/Image and CompressedImage that can be read.

The node and the replay of bags both read images here, so that an image gives the same mask in both and on every
installation.

:func:`check_image` is cheap and says whether a message can be read at all; :func:`to_rgb` reads it, by OpenCV alone. A
message is whatever has the fields of sensor_msgs/Image (`encoding`, `height`, `width`, `step`, `is_bigendian`, `data`)
or of sensor_msgs/CompressedImage (`format`, `data`), and a `header`, as those of rclpy and of rosbags have them.

Messages are not trusted: no buffer is made and no decoder sees a byte before the size is known and bounded.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np

Message = Any
"""A sensor_msgs/Image or sensor_msgs/CompressedImage, of rclpy or of rosbags."""

MAX_SIDE = 16384
"""Pixels along one side of an image, at most. Resizing a strip of a million pixels took 27 s and 9 GB."""

MAX_PIXELS = 2**25
"""Pixels of an image, at most: 8K (7680 x 4320) fits, and takes 100 MB as RGB."""

MAX_SCANS = 100
"""Passes of a JPEG over its image, at most; a usual progressive one has ten. A megabyte can hold thousands, each of
which costs 15 ms for 8K."""

MAX_FRAME_ID = 1024
"""Characters of a header's frame_id, at most: it goes out again with every message about the image."""

_MAX_SEGMENTS = 1000
"""Parts of a JPEG before the one with its size, at most; cameras write about ten."""

_MAX_CHUNKS = 50_000
"""Parts of a PNG, at most; of a large one each holds some kB."""

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_GREY = frozenset({0, 4})
"""Colour types of a PNG without colours; 4 has alpha too."""
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers that the size follows."""


class ImageError(ValueError):
    """An image message cannot be read; the text says why and, where it helps, what can be.

    `kind` is one word for statistics: header, encoding, size, step, data or decode.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class _Encoding:
    """How one encoding is stored in a message's data and how it becomes RGB.

    `convert` takes the rows, uint8 [rows, width * bytes_per_pixel], not always contiguous, and whether numbers of
    several bytes begin with the highest; it returns uint8 [height, width, 3] RGB. There are `rows_per_height` rows of
    data for each row of pixels. Of numbers of 16 bits (`wide`) `convert` takes the rows after they were narrowed to 8.
    """

    bytes_per_pixel: int
    convert: Callable[[np.ndarray, bool], np.ndarray]
    even_width: bool = False
    even_height: bool = False
    rows_per_height: float = 1.0
    wide: bool = False

    def rows(self, height: int) -> int:
        return int(height * self.rows_per_height)


def _packed(rows: np.ndarray, channels: int) -> np.ndarray:
    packed = np.ascontiguousarray(rows)
    return packed if channels == 1 else packed.reshape(len(packed), -1, channels)


def _through_opencv(rows: np.ndarray, big_endian: bool, *, code: int, channels: int = 1) -> np.ndarray:
    return cv2.cvtColor(_packed(rows, channels), code)


def _numbers(rows: np.ndarray, big_endian: bool) -> np.ndarray:
    stored = np.dtype(np.uint16).newbyteorder(">" if big_endian else "<")
    return np.ascontiguousarray(rows).view(stored).astype(np.uint16)


def _nv24(rows: np.ndarray, big_endian: bool) -> np.ndarray:
    height = len(rows) // 3
    luma, chroma = rows[:height], np.ascontiguousarray(rows[height:]).reshape(height, -1, 2)
    # OpenCV has no code for it: each pixel twice, so that two share what one has, and every other one left out.
    pairs = np.empty((height, luma.shape[1], 4), np.uint8)
    pairs[..., 0] = pairs[..., 2] = luma
    pairs[..., 1::2] = chroma
    twice = cv2.cvtColor(pairs.reshape(height, -1, 2), cv2.COLOR_YUV2RGB_YUY2)
    return np.ascontiguousarray(twice[:, ::2])


def _by(code: int, channels: int = 1) -> _Encoding:
    return _Encoding(channels, partial(_through_opencv, code=code, channels=channels))


def _wide(narrow: _Encoding) -> _Encoding:
    """The encoding of 16 bits that becomes `narrow` once each number is narrowed to 8."""
    return dataclasses.replace(narrow, bytes_per_pixel=2 * narrow.bytes_per_pixel, wide=True)


def _packed_yuv(code: int) -> _Encoding:
    return _Encoding(2, partial(_through_opencv, code=code, channels=2), even_width=True)


def _planar_yuv(code: int) -> _Encoding:
    convert = partial(_through_opencv, code=code)
    return _Encoding(1, convert, even_width=True, even_height=True, rows_per_height=1.5)


_BAYER = {
    "bayer_rggb": cv2.COLOR_BayerBG2RGB,
    "bayer_bggr": cv2.COLOR_BayerRG2RGB,
    "bayer_gbrg": cv2.COLOR_BayerGR2RGB,
    "bayer_grbg": cv2.COLOR_BayerGB2RGB,
}
"""OpenCV names a Bayer pattern by its second row's second and third pixels, so that rggb is its BG."""

_EIGHT_BITS: dict[str, _Encoding] = {
    "rgb8": _Encoding(3, lambda rows, big_endian: _packed(rows, 3)),
    "bgr8": _by(cv2.COLOR_BGR2RGB, 3),
    "rgba8": _by(cv2.COLOR_RGBA2RGB, 4),
    "bgra8": _by(cv2.COLOR_BGRA2RGB, 4),
    "mono8": _by(cv2.COLOR_GRAY2RGB),
    "8UC1": _by(cv2.COLOR_GRAY2RGB),
    "8UC3": _by(cv2.COLOR_BGR2RGB, 3),
    "8UC4": _by(cv2.COLOR_BGRA2RGB, 4),
    **{f"{pattern}8": _by(code) for pattern, code in _BAYER.items()},
    "yuv422": _packed_yuv(cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": _packed_yuv(cv2.COLOR_YUV2RGB_YUY2),
    # The names that image_encodings.hpp has for the two since Iron.
    "uyvy": _packed_yuv(cv2.COLOR_YUV2RGB_UYVY),
    "yuyv": _packed_yuv(cv2.COLOR_YUV2RGB_YUY2),
    "nv12": _planar_yuv(cv2.COLOR_YUV2RGB_NV12),
    "nv21": _planar_yuv(cv2.COLOR_YUV2RGB_NV21),
    "nv24": _Encoding(1, _nv24, rows_per_height=3.0),
}

_ENCODINGS: dict[str, _Encoding] = {
    **_EIGHT_BITS,
    **{f"{name}16": _wide(_EIGHT_BITS[f"{name}8"]) for name in ("mono", "rgb", "bgr", "rgba", "bgra", *_BAYER)},
}

_GREY = ("mono8", "mono16", "8UC1")
_COLOURS = ("rgb8", "bgr8", "rgba8", "bgra8", "8UC3", "8UC4", "rgb16", "bgr16", "rgba16", "bgra16")
"""Encodings whose image, compressed in one channel, is simply grey."""

ACCEPTED_ENCODINGS: tuple[str, ...] = tuple(_ENCODINGS)
"""Encodings of sensor_msgs/Image that are read: 8UC1 as grey, 8UC3 as BGR, 8UC4 as BGRA, those of 16 bits
linearly (ValueRange says which number is white)."""


class ValueRange:
    """Which number is white in one camera's images of 16 bits, of which many cameras use 10 or 12.

    The largest of the fewest bits, of BITS, that hold every value so far: it may grow and never shrinks, so that
    brightness does not jump to and fro.
    """

    BITS = (8, 10, 12, 14, 16)

    def __init__(self) -> None:
        self.bits = 0
        """Of the values so far; 0 before any image of 16 bits."""
        self.largest = 0
        self._said = 16

    def white(self, values: np.ndarray) -> int:
        """The number that is white in `values`, uint16 of any shape, and from here on."""
        self.largest = max(self.largest, int(values.max(initial=0)))
        self.bits = next(bits for bits in self.BITS if self.largest < 2**bits)
        return 2**self.bits - 1

    def news(self) -> str:
        """A sentence where `bits` are other than this said last, at first other than 16; else nothing."""
        if self.bits in (0, self._said):
            return ""
        self._said = self.bits
        return (
            f"no value above {self.largest} in images of 16 bits so far: {2**self.bits - 1} ({self.bits} bits) is "
            "taken as white"
        )


def _narrowed(values: np.ndarray, value_range: ValueRange | None) -> np.ndarray:
    """`values`, uint16 of any shape, as uint8 of that shape, rounded; white is what `value_range` says, or 65535."""
    white = 65535 if value_range is None else value_range.white(values)
    return cv2.convertScaleAbs(values, alpha=255 / white).reshape(values.shape)


def is_compressed(message: Message) -> bool:
    """Whether `message` is a sensor_msgs/CompressedImage."""
    return hasattr(message, "format")


def check_image(message: Message) -> None:
    """Raise ImageError where `message` cannot hold the image it says it holds. Looks at no pixel."""
    _check_frame_id(message)
    if is_compressed(message):
        if _check_compressed(message) == 1:
            _check_one_channel(message)
        return
    encoding = _ENCODINGS.get(message.encoding)
    if encoding is None:
        raise ImageError(
            "encoding", f"encoding {message.encoding[:40]!r} cannot be read; accepted: {', '.join(ACCEPTED_ENCODINGS)}"
        )
    _check_rows(message, encoding)


def _check_frame_id(message: Message) -> None:
    if len(message.header.frame_id) > MAX_FRAME_ID:
        raise ImageError(
            "header", f"the frame_id has {len(message.header.frame_id)} characters; accepted: at most {MAX_FRAME_ID}"
        )


def _check_rows(message: Message, encoding: _Encoding) -> None:
    width, height = message.width, message.height
    if (encoding.even_width and width % 2) or (encoding.even_height and height % 2):
        sides = "width and height" if encoding.even_height else "width"
        raise ImageError("size", f"the image is {width} x {height}; {message.encoding} needs an even {sides}")
    row_bytes = width * encoding.bytes_per_pixel
    if message.step < row_bytes:
        raise ImageError(
            "step", f"step is {message.step}; {width} pixels of {message.encoding} need at least {row_bytes} bytes"
        )
    needed = message.step * (encoding.rows(height) - 1) + row_bytes
    if len(message.data) < needed:
        raise ImageError(
            "data",
            f"there are {len(message.data)} bytes of data; {width} x {height} {message.encoding} with step "
            f"{message.step} needs {needed}",
        )
    _check_size(width, height)


def _check_size(width: int, height: int) -> None:
    if width == 0 or height == 0:
        raise ImageError("size", f"the image is {width} x {height}; accepted: at least 1 x 1")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(
            "size",
            f"the image is {width} x {height}; accepted: sides of at most {MAX_SIDE} and {MAX_PIXELS} pixels in all",
        )


def _check_compressed(message: Message) -> int:
    """The number of channels of the compressed data, without alpha. Raises ImageError where they cannot be read."""
    # By what the data are, never by what `format` says: only JPEG and PNG may reach OpenCV's many decoders.
    data, kind = message.data.tobytes(), message.format[:40]
    if not data:
        raise ImageError("data", "the compressed image is empty; accepted: JPEG, PNG")
    if "compressedDepth" in message.format:
        raise ImageError(
            "encoding",
            f"the compressed image (format {kind!r}) is one of depth, without colours; accepted: JPEG, PNG",
        )
    if data.startswith(_JPEG):
        channels = _check_jpeg(data)
    elif data.startswith(_PNG):
        channels = _check_png(data)
    else:
        raise ImageError(
            "encoding",
            f"the compressed image (format {kind!r}) begins with the bytes {data[:8].hex(' ')}: it is {_format(data)}"
            "neither JPEG nor PNG; accepted: JPEG, PNG; have the camera publish one of them (of "
            "compressed_image_transport that is the parameter format)",
        )
    return channels


def _format(data: bytes) -> str:
    """The name of a format that cameras use and that is not decoded, and ", "; or nothing."""
    if data[:4] == b"\0\0\0\1" or data[:3] == b"\0\0\1":  # Annex B of H.264 and H.265
        return "a part of a video (H.264 or H.265), "
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF, "
    return "WebP, " if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def _original_encoding(message: Message) -> str:
    """The encoding of the image that was compressed, as compressed_image_transport writes it before the semicolon:
    "bayer_rggb8" of "bayer_rggb8; jpeg compressed ". Empty where `format` names none."""
    before, semicolon, _ = message.format.partition(";")
    before = before.strip()
    return before if semicolon or before in _ENCODINGS or before.startswith("bayer_") else ""


def _bayer_pattern(encoding: str) -> str | None:
    """The pattern, "bayer_rggb", of an encoding of 8 or 16 bits; None where it is of no known one."""
    pattern = encoding.removesuffix("16").removesuffix("8")
    return pattern if pattern in _BAYER and pattern != encoding else None


def _check_one_channel(message: Message) -> None:
    """Raise ImageError where compressed data of one channel are not grey and no mosaic that is known."""
    encoding = _original_encoding(message)
    if not encoding or encoding in _GREY or encoding in _COLOURS or _bayer_pattern(encoding):
        return
    accepted = ", ".join((*_GREY, *(f"{pattern}8, {pattern}16" for pattern in _BAYER)))
    raise ImageError(
        "encoding",
        f"the compressed image has one channel of {encoding[:40]!r}, which cannot be read; accepted there: {accepted}",
    )


def _check_png(data: bytes) -> int:
    """The number of the PNG's channels, without alpha. Raises ImageError where it is cut off, too large, or has
    a part that says it is larger than the whole."""
    if len(data) < 26 or data[12:16] != b"IHDR":
        raise ImageError("decode", "the PNG is damaged: it does not begin with its size")
    _check_size(*struct.unpack_from(">II", data, 16))
    place = len(_PNG)
    for _ in range(_MAX_CHUNKS):
        if len(data) < place + 12:
            raise ImageError("data", "the PNG is cut off: its end is missing")
        length, name = struct.unpack_from(">I4s", data, place)
        if name == b"IEND" and not length:
            return 1 if data[25] in _PNG_GREY else 3
        # OpenCV makes a buffer of this size before it reads on: 200 bytes took 4 GB and five seconds.
        place += 12 + length
    raise ImageError("decode", f"the PNG is damaged: it has more than {_MAX_CHUNKS} parts")


def _check_jpeg(data: bytes) -> int:
    """The number of the JPEG's channels. Raises ImageError where it is cut off, too large, or of another kind than grey
    or colour."""
    place = 2
    for _ in range(_MAX_SEGMENTS):
        if len(data) < place + 10 or data[place] != 0xFF:
            break
        marker = data[place + 1]
        if marker in _FRAME_HEADERS:
            height, width, components = struct.unpack_from(">HHB", data, place + 5)
            _check_size(width, height)
            if components not in (1, 3):
                raise ImageError("encoding", f"the JPEG has {components} channels (CMYK has 4); accepted: 1 or 3")
            if data.count(b"\xff\xda", place) > MAX_SCANS:
                raise ImageError("data", f"the JPEG goes over its image more than {MAX_SCANS} times; accepted: fewer")
            # Decoders paint grey what is missing, and grey is segmented like anything else.
            if data.rfind(b"\xff\xd9") < place:
                raise ImageError("data", "the JPEG is cut off: its end is missing")
            return int(components)
        # Any number of 0xFF may stand before a marker.
        place += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, place + 2)[0]
    raise ImageError("decode", "the JPEG is damaged: its size was not found")


def to_rgb(message: Message, value_range: ValueRange | None = None) -> np.ndarray:
    """The image of `message` as uint8 [height, width, 3], RGB.

    value_range: of the camera, for images of 16 bits; where None, 65535 is white.
    May be a view of the message's data: not to be written to. Raises ImageError where it cannot be read.
    """
    check_image(message)
    if is_compressed(message):
        return _decode(message, value_range)
    encoding = _ENCODINGS[message.encoding]
    try:
        rows, big_endian = _rows(message, encoding), bool(message.is_bigendian)
        if encoding.wide:
            rows = _narrowed(_numbers(rows, big_endian), value_range)
        image = encoding.convert(rows, big_endian)
    except (cv2.error, TypeError, ValueError, KeyError) as error:
        raise ImageError("decode", f"{message.encoding} could not be converted: {error!r}") from error
    return image


def _rows(message: Message, encoding: _Encoding) -> np.ndarray:
    rows, row_bytes = encoding.rows(message.height), message.width * encoding.bytes_per_pixel
    data = np.frombuffer(message.data, np.uint8)
    if message.encoding == "nv24" and message.step > row_bytes:
        # A row of chroma is two of luma long, its padding too.
        height, step = message.height, message.step
        luma = np.lib.stride_tricks.as_strided(data, (height, row_bytes), (step, 1), writeable=False)
        chroma = np.lib.stride_tricks.as_strided(
            data[height * step :], (height, 2 * row_bytes), (2 * step, 1), writeable=False
        )
        return np.concatenate([luma, chroma.reshape(-1, row_bytes)])
    return np.lib.stride_tricks.as_strided(data, (rows, row_bytes), (message.step, 1), writeable=False)


_LABELS = {
    "mono8": _Encoding(1, lambda rows, big_endian: rows),
    "8UC1": _Encoding(1, lambda rows, big_endian: rows),
    "mono16": _Encoding(2, _numbers),
    "16UC1": _Encoding(2, _numbers),
}
"""Encodings in which an image of labels comes: one number a pixel."""


def to_labels(message: Message) -> np.ndarray:
    """The label of every pixel, as the image of `message` holds it: uint8 or uint16 [height, width].

    Raises ImageError where it cannot be read, or is no image of one whole number a pixel.
    """
    if is_compressed(message):
        _check_frame_id(message)
        _check_compressed(message)
        labels = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_UNCHANGED)
        if labels is None:
            raise ImageError("decode", "the compressed labels are damaged: nothing came of them")
        if labels.ndim != 2 or labels.dtype not in (np.uint8, np.uint16):
            raise ImageError("encoding", "labels are in colour; accepted: PNG of one channel, 8 or 16 bits")
        return labels
    encoding = _LABELS.get(message.encoding)
    if encoding is None:
        raise ImageError(
            "encoding", f"labels come as {message.encoding[:40]!r}; accepted: {', '.join(_LABELS)}, PNG of one channel"
        )
    _check_rows(message, encoding)
    return encoding.convert(_rows(message, encoding), bool(message.is_bigendian))


def _decode(message: Message, value_range: ValueRange | None) -> np.ndarray:
    pattern = _bayer_pattern(_original_encoding(message))
    mosaic = pattern is not None and _check_compressed(message) == 1
    # The pixels as stored: a camera's orientation tag would turn the mask away from camera_info.
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION | (0 if mosaic else cv2.IMREAD_COLOR)
    try:
        image = cv2.imdecode(np.frombuffer(message.data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError("decode", f"the compressed image could not be decoded: {error.err}") from error
    if image is None:
        raise ImageError(
            "decode", f"the compressed image (format {message.format[:40]!r}) is damaged: nothing came of it"
        )
    if image.dtype == np.uint16:
        image = _narrowed(image, value_range)
    if pattern is not None and mosaic:
        return cv2.cvtColor(image, _BAYER[pattern])
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
