"""Image messages for the tests, from a short description: the same picture in any encoding, whole or broken."""

from __future__ import annotations

import cv2
import numpy as np
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

# Y, U, V of R, G, B in the range that video uses: luma 16 to 235.
BT601 = np.array([[0.257, 0.504, 0.098], [-0.148, -0.291, 0.439], [0.439, -0.368, -0.071]])

FIRST_SECOND = 1_600_000_000
"""The second of the stamp of the frame numbered 0."""
NUMBERED_SIZES = ((96, 64), (64, 48), (81, 61))


def numbered(number: int) -> dict:
    """What peer.py's `image` publishes as frame `number`: everything about it follows from its second alone."""
    width, height = NUMBERED_SIZES[number % len(NUMBERED_SIZES)]
    return {
        "picture": {"width": width, "height": height, "seed": 1 + number % 5},
        "stamp": [FIRST_SECOND + number, number * 7_919_003 % 10**9],
        "frame_id": f"camera {number % 4}",
    }


def scene(width: int, height: int, seed: int = 1) -> np.ndarray:
    """uint8 [height, width, 3] RGB: coloured discs and bars on a slope of brightness, the same for the same seed."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    slope = (rows / max(height - 1, 1) + columns / max(width - 1, 1))[..., None]
    image = random.uniform(40, 90, 3) * slope
    for _ in range(6):
        centre = random.uniform(0, 1, 2) * (height, width)
        radius = random.uniform(0.08, 0.25) * min(height, width)
        inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
        if random.uniform() < 0.4:
            inside = (abs(rows - centre[0]) < radius) & (abs(columns - centre[1]) < radius / 3)
        image[inside] = random.uniform(0, 255, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def encode(image: np.ndarray, encoding: str) -> np.ndarray:
    """`image`, uint8 [height, width, 3] RGB, as rows of bytes of `encoding`: uint8 [rows, bytes per row]."""
    height, width = image.shape[:2]
    red, green, blue = (image[..., channel] for channel in range(3))
    full = np.full((height, width), 255, np.uint8)
    if encoding.endswith("16"):
        return (encode(image, f"{encoding[:-2]}8").astype("<u2") * 257).view(np.uint8)
    if encoding == "rgb8":
        planes = [red, green, blue]
    elif encoding in ("bgr8", "8UC3"):
        planes = [blue, green, red]
    elif encoding == "rgba8":
        planes = [red, green, blue, full]
    elif encoding in ("bgra8", "8UC4"):
        planes = [blue, green, red, full]
    elif encoding in ("mono8", "8UC1"):
        planes = [green]
    elif encoding.startswith("bayer_"):
        mosaic = np.empty((height, width), np.uint8)
        for place, colour in enumerate(encoding[len("bayer_") : len("bayer_") + 4]):
            row, column = divmod(place, 2)
            mosaic[row::2, column::2] = image[row::2, column::2, "rgb".index(colour)]
        return mosaic
    elif encoding in ("yuv422", "yuv422_yuy2", "uyvy", "yuyv"):
        luma, u, v = np.moveaxis(np.rint(image @ BT601.T + (16, 128, 128)).astype(np.uint8), -1, 0)
        chroma = np.where(np.arange(width) % 2, np.roll(v, 1, axis=1), u)
        return np.stack([chroma, luma] if encoding in ("yuv422", "uyvy") else [luma, chroma], -1).reshape(height, -1)
    elif encoding == "nv24":
        yuv = np.rint(image @ BT601.T + (16, 128, 128)).astype(np.uint8)
        return np.concatenate([yuv[..., 0], yuv[..., 1:].reshape(2 * height, width)])
    elif encoding in ("nv12", "nv21"):
        yuv = cv2.cvtColor(image, cv2.COLOR_RGB2YUV_I420)
        u, v = yuv[height:].reshape(2, height // 2, width // 2)
        chroma = np.stack([u, v] if encoding == "nv12" else [v, u], -1).reshape(height // 2, width)
        return np.concatenate([yuv[:height], chroma])
    else:
        raise ValueError(encoding)
    return np.stack(planes, -1).reshape(height, -1)


def message(description: dict, header: Header) -> Image | CompressedImage:
    """The message that `description` asks for.

    width, height, seed: the picture. grey, swap: all channels are the green one, red and blue change places. encoding:
    how it is written (default rgb8; "jpeg" and "png" make a CompressedImage). padding: bytes of 0xAA after each row.
    override: fields written over at the end, whatever they then say. keep: only this many bytes of the data.
    """
    image = scene(description["width"], description["height"], description.get("seed", 1))
    if description.get("grey"):
        image = np.repeat(image[..., 1:2], 3, -1)
    if description.get("swap"):
        image = np.ascontiguousarray(image[..., ::-1])
    encoding = description.get("encoding", "rgb8")
    if encoding in ("jpeg", "png"):
        made = CompressedImage(header=header, format=encoding)
        data = cv2.imencode(f".{encoding}", image[..., ::-1])[1]
    else:
        rows = encode(image, encoding)
        padding = description.get("padding", 0)
        data = np.pad(rows, ((0, 0), (0, padding)), constant_values=0xAA)
        made = Image(header=header, height=image.shape[0], width=image.shape[1], encoding=encoding, step=data.shape[1])
    made.data.frombytes(np.ascontiguousarray(data).tobytes()[: description.get("keep")])
    for field, value in description.get("override", {}).items():
        setattr(made, field, value)
    return made
