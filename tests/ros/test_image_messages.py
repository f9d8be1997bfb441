"""Image messages to RGB and back, against pixels known beforehand."""

from contextlib import suppress

import cv2
import numpy as np
import pytest
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

import pictures
from nerve_ros.images import ACCEPTED_ENCODINGS, ImageError, check_image, mono8_message, rgb8_message, to_rgb

COLOUR = (200, 120, 40)
# The widest error of a colour through each encoding: chroma of yuv is rounded.
EXACT = {"rgb8": 0, "bgr8": 0, "rgba8": 0, "bgra8": 0, "8UC3": 0} | {
    f"bayer_{pattern}8": 0 for pattern in ("rggb", "bggr", "gbrg", "grbg")
}
ROUNDED = {"yuv422": 4, "yuv422_yuy2": 4, "nv12": 4, "nv21": 4}
GREY = ("mono8", "8UC1", "mono16")


def message(image, encoding, padding=0):
    rows = np.pad(pictures.encode(image, encoding), ((0, 0), (0, padding)), constant_values=0xAA)
    made = Image(height=image.shape[0], width=image.shape[1], encoding=encoding, step=rows.shape[1])
    made.data.frombytes(rows.tobytes())
    return made


def plain(width=12, height=8, colour=COLOUR):
    return np.full((height, width, 3), colour, np.uint8)


def test_every_accepted_encoding_has_a_test():
    assert set(ACCEPTED_ENCODINGS) == {*EXACT, *ROUNDED, *GREY}


@pytest.mark.parametrize("padding", [0, 1, 13])
@pytest.mark.parametrize("encoding", [*EXACT, *ROUNDED])
def test_a_colour_comes_out_as_it_went_in(encoding, padding):
    out = to_rgb(message(plain(), encoding, padding))
    assert out.shape == (8, 12, 3)
    assert out.dtype == np.uint8
    error = np.abs(out.astype(int) - COLOUR).max()
    assert error <= {**EXACT, **ROUNDED}[encoding]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("encoding", GREY)
def test_grey_comes_out_in_all_channels(encoding, padding):
    out = to_rgb(message(plain(), encoding, padding))
    assert out.shape == (8, 12, 3)
    assert (out == COLOUR[1]).all()


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "8UC3"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (1, 9), (9, 1), (33, 17)])
def test_every_pixel_stays_where_it_was(encoding, size):
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    for padding in (0, 5):
        np.testing.assert_array_equal(to_rgb(message(image, encoding, padding)), image)


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_a_bayer_picture_looks_like_itself_in_the_right_colours(pattern):
    image = cv2.GaussianBlur(pictures.scene(64, 48), (0, 0), 2)
    out = to_rgb(message(image, f"bayer_{pattern}8"))
    assert np.abs(out.astype(int) - image)[4:-4, 4:-4].mean() < 4.0


def test_mono16_is_linear_from_black_to_white_in_either_byte_order():
    values = np.array([[0, 257, 128 * 257, 65535, 128, 129]], np.uint16)
    grey = [0, 1, 128, 255, 0, 1]
    for big, order in ((0, "<u2"), (1, ">u2")):
        made = Image(height=1, width=6, encoding="mono16", step=12, is_bigendian=big)
        made.data.frombytes(values.astype(order).tobytes())
        assert to_rgb(made)[0, :, 0].tolist() == grey


@pytest.mark.parametrize("encoding", ["rgb8", "mono8", "bayer_rggb8", "yuv422"])
def test_the_byte_order_flag_means_nothing_for_single_bytes(encoding):
    made = message(plain(), encoding)
    expected = to_rgb(made).copy()
    made.is_bigendian = 1
    np.testing.assert_array_equal(to_rgb(made), expected)


def test_data_beyond_the_last_row_is_ignored_and_the_last_rows_padding_may_lack():
    image = plain()
    made = message(image, "rgb8", padding=7)
    made.data.frombytes(b"x" * 100)
    np.testing.assert_array_equal(to_rgb(made), image)
    made.data = made.data[: made.step * 7 + 36]
    np.testing.assert_array_equal(to_rgb(made), image)
    made.data = made.data[:-1]
    with pytest.raises(ImageError, match="bytes of data"):
        to_rgb(made)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"encoding": "32FC1"}, "encoding", "accepted: rgb8"),
        ({"encoding": ""}, "encoding", "accepted: rgb8"),
        ({"encoding": "16UC1"}, "encoding", "accepted: rgb8"),
        ({"encoding": "%s%n" * 1000}, "encoding", "accepted: rgb8"),
        ({"width": 0}, "size", "0 x 8"),
        ({"height": 0}, "size", "12 x 0"),
        ({"step": 35}, "step", "at least 36"),
        ({"step": 0}, "step", "at least 36"),
        ({"height": 9}, "data", "needs 324"),
        ({"height": 2**32 - 1, "width": 2**32 - 1, "step": 2**32 - 1}, "step", "at least"),
        ({"height": 2**32 - 1}, "data", "needs"),
    ],
)
def test_a_broken_message_is_refused_with_the_reason(change, kind, text):
    made = message(plain(), "rgb8")
    for field, value in change.items():
        setattr(made, field, value)
    for refuse in (check_image, to_rgb):
        with pytest.raises(ImageError, match=text) as caught:
            refuse(made)
        assert caught.value.kind == kind
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("encoding", "size"), [("yuv422", (3, 4)), ("nv12", (4, 3)), ("nv21", (3, 4))])
def test_encodings_that_share_colour_between_pixels_need_even_sides(encoding, size):
    made = Image(width=size[0], height=size[1], encoding=encoding, step=16)
    made.data.frombytes(bytes(16 * 16))
    with pytest.raises(ImageError, match="even"):
        check_image(made)


@pytest.mark.parametrize("encoding", ACCEPTED_ENCODINGS)
def test_the_smallest_images_are_read_or_refused_but_nothing_else(encoding):
    for width, height in ((1, 1), (2, 1), (1, 2), (2, 2), (3, 3)):
        made = Image(width=width, height=height, encoding=encoding, step=16)
        made.data.frombytes(bytes(range(16)) * 6)
        with suppress(ImageError):
            assert to_rgb(made).shape == (height, width, 3)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_compressed_images_are_decoded_to_rgb(kind):
    image = cv2.GaussianBlur(pictures.scene(64, 48), (0, 0), 2)
    made = pictures.message({"width": 64, "height": 48, "encoding": kind}, Header())
    out = to_rgb(made)
    reference = pictures.scene(64, 48)
    assert out.shape == (48, 64, 3)
    if kind == "png":
        np.testing.assert_array_equal(out, reference)
    else:
        assert np.abs(cv2.GaussianBlur(out, (0, 0), 2).astype(int) - image).mean() < 3.0


def test_compressed_grey_and_transparent_and_16_bit_pictures_become_rgb():
    image = pictures.scene(20, 10)
    for kept in (image[..., 0], np.dstack([image[..., ::-1], image[..., 0]]), image[..., ::-1].astype(np.uint16) * 257):
        made = CompressedImage(format="png")
        made.data.frombytes(cv2.imencode(".png", kept)[1].tobytes())
        out = to_rgb(made)
        assert out.shape == (10, 20, 3)
        np.testing.assert_array_equal(out[..., 0], image[..., 0])


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_picture_is_refused(data):
    made = CompressedImage(format="jpeg")
    made.data.frombytes(data)
    with pytest.raises(ImageError, match="JPEG, PNG"):
        to_rgb(made)


def test_outgoing_messages_carry_the_header_and_packed_rows():
    header = Header(frame_id="camera")
    header.stamp.sec = 5
    plane = np.arange(35, dtype=np.uint8).reshape(5, 7)
    made = mono8_message(header, plane)
    assert (made.height, made.width, made.step, made.encoding) == (5, 7, 7, "mono8")
    assert bytes(made.data) == plane.tobytes()
    assert made.header == header
    made = rgb8_message(header, np.repeat(plane[..., None], 3, -1)[:, ::-1])
    assert (made.height, made.width, made.step, made.encoding) == (5, 7, 21, "rgb8")
    assert bytes(made.data) == np.repeat(plane[:, ::-1], 3, 1).tobytes()
