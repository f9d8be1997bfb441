"""Room: numpy -> message, and the reading of messages: what nerve_core's decoder has, under the node's roof.

`check_image` and `to_rgb` are nerve_core.encodings': a bag that is replayed without ROS gives the same pixels.
"""

from __future__ import annotations

import numpy as np
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from nerve_core.encodings import ACCEPTED_ENCODINGS, MAX_FRAME_ID, ImageError, check_image, to_rgb

__all__ = [
    "ACCEPTED_ENCODINGS",
    "MAX_FRAME_ID",
    "ImageError",
    "check_image",
    "mono8_message",
    "rgb8_message",
    "to_rgb",
]


def mono8_message(header: Header, plane: np.ndarray) -> Image:
    """An Image mono8 of `plane`, uint8 [height, width], with `header` as it is and step == width."""
    return _message(header, plane, "mono8")


def rgb8_message(header: Header, image: np.ndarray) -> Image:
    """An Image rgb8 of `image`, uint8 [height, width, 3], with `header` as it is and step == 3 * width."""
    return _message(header, image, "rgb8")


def _message(header: Header, image: np.ndarray, encoding: str) -> Image:
    height, width = image.shape[:2]
    message = Image(
        header=header, height=height, width=width, encoding=encoding, step=width * (image.size // (height * width))
    )
    # Assigning an ndarray to `data` makes rclpy look at every element: 123 ms for 2.8 MB, where this takes 0.06 ms.
    message.data.frombytes(memoryview(np.ascontiguousarray(image)))
    return message
