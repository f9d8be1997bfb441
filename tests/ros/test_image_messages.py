"""Image messages to RGB and back, against pixels known beforehand."""

import re
import struct
import zlib
from contextlib import suppress
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from cv_bridge import CvBridge
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

import pictures
from nerve_core.images import encodings
from nerve_core.images.encodings import MAX_PIXELS, MAX_SCANS, MAX_SIDE
from nerve_core.replay.messages import typestore
from nerve_ros.images import (
    ACCEPTED_ENCODINGS,
    MAX_FRAME_ID,
    ImageError,
    ValueRange,
    check_image,
    mono8_message,
    rgb8_message,
    to_rgb,
)
from nerve_ros.pipeline import Frame, Pipeline

COLOUR = (200, 120, 40)
# The widest error of a colour through each encoding: chroma of yuv is rounded.
EXACT = {"rgb8": 0, "bgr8": 0, "rgba8": 0, "bgra8": 0, "8UC3": 0, "8UC4": 0} | {
    f"bayer_{pattern}{bits}": 0 for pattern in ("rggb", "bggr", "gbrg", "grbg") for bits in (8, 16)
}
EXACT |= dict.fromkeys(("rgb16", "bgr16", "rgba16", "bgra16"), 0)
ROUNDED = dict.fromkeys(("yuv422", "yuv422_yuy2", "uyvy", "yuyv", "nv12", "nv21", "nv24"), 4)
GREY = ("mono8", "8UC1", "mono16")
# What no cv_bridge is asked for: the one on PyPI does not know some, and each scales mono16 in a way of its own.
NOT_OF_CV_BRIDGE = (*ROUNDED, "bayer_grbg8", *(name for name in ACCEPTED_ENCODINGS if name.endswith("16")))
# cv_bridge takes colours only from encodings that say which these are.
TO_CV_BRIDGE = {"8UC1": "mono8", "8UC3": "bgr8", "8UC4": "bgra8"}


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
@pytest.mark.parametrize("encoding", [name for name in (*EXACT, *ROUNDED) if name != "nv24"])
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


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "8UC3", "8UC4", "rgb16", "bgra16"])
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


@pytest.mark.parametrize("encoding", [name for name in ACCEPTED_ENCODINGS if name not in NOT_OF_CV_BRIDGE])
@pytest.mark.parametrize("size", [(64, 48), (6, 4), (34, 2)])
@pytest.mark.parametrize("read", [to_rgb, encodings.to_rgb], ids=["node", "replay"])
def test_the_pixels_are_those_of_cv_bridge(encoding, size, read):
    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    made = message(image, encoding)
    theirs = message(image, TO_CV_BRIDGE.get(encoding, encoding))
    np.testing.assert_array_equal(read(made), CvBridge().imgmsg_to_cv2(theirs, "rgb8"))


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_the_pixels_of_compressed_images_are_those_of_cv_bridge(kind):
    made = compressed(encoded(kind, pictures.scene(64, 48)))
    np.testing.assert_array_equal(to_rgb(made), CvBridge().compressed_imgmsg_to_cv2(made, "rgb8"))


@pytest.mark.parametrize("encoding", [*ACCEPTED_ENCODINGS, "jpeg", "png"])
def test_a_message_read_from_a_bag_without_ros_gives_the_same_pixels(encoding):
    description = {"width": 64, "height": 48, "encoding": encoding, "padding": 0 if encoding in ("jpeg", "png") else 6}
    made = pictures.message(description, Header(frame_id="camera"))
    kind = f"sensor_msgs/msg/{type(made).__name__}"
    theirs = typestore().deserialize_cdr(serialize_message(made), kind)
    np.testing.assert_array_equal(to_rgb(theirs), to_rgb(made))


def test_mono16_is_linear_from_black_to_white_in_either_byte_order():
    values = np.array([[0, 257, 128 * 257, 65535, 128, 129]], np.uint16)
    grey = [0, 1, 128, 255, 0, 1]
    for big, order in ((0, "<u2"), (1, ">u2")):
        made = Image(height=1, width=6, encoding="mono16", step=12, is_bigendian=big)
        made.data.frombytes(values.astype(order).tobytes())
        assert to_rgb(made)[0, :, 0].tolist() == grey


@pytest.mark.parametrize("padding", [0, 6])
def test_nv24_has_the_colour_of_every_pixel(padding):
    image = pictures.scene(33, 17)
    rows = pictures.encode(image, "nv24").reshape(-1)
    luma, chroma = rows[: 33 * 17].reshape(17, 33), rows[33 * 17 :].reshape(17, 66)
    made = Image(width=33, height=17, encoding="nv24", step=33 + padding)
    for plane, beyond in ((luma, padding), (chroma, 2 * padding)):
        made.data.frombytes(np.pad(plane, ((0, 0), (0, beyond)), constant_values=0xAA).tobytes())
    assert np.abs(to_rgb(made).astype(int) - image).max() <= 4


def sixteen(values, encoding="mono16", *, compress=False):
    """An image of these values, uint16 [H, W] or [H, W, 3], raw or as a PNG."""
    if compress:
        return compressed(encoded("png", values), f"{encoding}; png compressed")
    made = Image(height=values.shape[0], width=values.shape[1], encoding=encoding, step=values[0].nbytes)
    made.data.frombytes(np.ascontiguousarray(values).tobytes())
    return made


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("read", [to_rgb, encodings.to_rgb], ids=["node", "replay"])
def test_numbers_of_fewer_than_16_bits_fill_the_range_and_that_is_said_once(bits, read):
    image = pictures.scene(64, 48)
    image[0, 0], image[0, 1] = 0, 255
    values = np.round(image * ((2**bits - 1) / 255)).astype(np.uint16)
    for made in (
        sixteen(values, "rgb16"),
        sixteen(values[..., ::-1], "bgr16"),
        sixteen(values[..., ::-1], "rgb16", compress=True),
    ):
        used = ValueRange()
        for _ in range(3):
            assert np.abs(read(made, used).astype(int) - image).max() <= (1 if bits > 8 else 0)
        assert used.bits == bits
        news = used.news()
        assert (f"{2**bits - 1} ({bits} bits) is taken as white" in news) == (bits < 16)
        assert used.news() == ""
    grey = sixteen(values[..., 1])
    assert np.abs(read(grey, ValueRange())[..., 0].astype(int) - image[..., 1]).max() <= 1
    whole = read(message(image, "bayer_rggb8")).astype(int)
    mosaic_values = np.round(pictures.encode(image, "bayer_rggb8") * ((2**bits - 1) / 255)).astype(np.uint16)
    for made in (sixteen(mosaic_values, "bayer_rggb16"), sixteen(mosaic_values, "bayer_rggb16", compress=True)):
        assert np.abs(read(made, ValueRange()) - whole).max() <= 2


def test_a_brighter_image_widens_the_range_and_a_darker_one_does_not_narrow_it():
    used = ValueRange()
    seen = [int(to_rgb(sixteen(np.full((2, 2), value, np.uint16)), used)[0, 0, 0]) for value in (900, 4095, 900, 5000)]
    assert seen == [224, 255, 56, 78]
    assert "4095" not in used.news()
    assert used.bits == 14
    to_rgb(sixteen(np.full((2, 2), 65535, np.uint16)), used)
    assert "65535 (16 bits) is taken as white" in used.news()


@pytest.mark.parametrize(("ending", "name"), [("tiff", "TIFF"), ("webp", "WebP")])
def test_formats_that_no_decoder_is_trusted_with_are_named(ending, name, no_decoder):
    made = compressed(encoded(ending, pictures.scene(64, 48)), f"rgb8; {ending} compressed bgr8")
    assert_refused(made, "encoding", f"it is {name}, neither JPEG nor PNG; accepted: JPEG, PNG; .*the parameter format")


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
        ({"encoding": "\x1b[31m\nrgb8\u202e\u200b"}, "encoding", r"\\x1b\[31m\\nrgb8\\u202e\\u200b"),
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


def test_a_frame_id_that_is_no_name_is_not_passed_on():
    made = message(plain(), "rgb8")
    made.header.frame_id = "f" * MAX_FRAME_ID
    assert to_rgb(made).shape == (8, 12, 3)
    for refused in (made, compressed(encoded("jpg"))):
        refused.header.frame_id = "f" * (MAX_FRAME_ID + 1)
        assert_refused(refused, "header", "at most 1024")


@pytest.mark.parametrize(
    ("encoding", "size"), [("yuv422", (3, 4)), ("yuyv", (3, 4)), ("uyvy", (5, 4)), ("nv12", (4, 3)), ("nv21", (3, 4))]
)
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


def compressed(data, format="jpeg"):
    made = CompressedImage(format=format)
    made.data.frombytes(data)
    return made


def encoded(kind, image=None):
    return cv2.imencode(f".{kind}", plain() if image is None else image)[1].tobytes()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, *chunks):
    """A PNG that says it is RGB of this size and may not hold it."""
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", size, *chunks, chunk(b"IEND", b"")])


def jpeg(width=None, height=None, channels=None):
    """A JPEG that says it has this size and this many channels, whatever it holds."""
    data = bytearray(encoded("jpg"))
    place = data.index(b"\xff\xc0") + 5
    told = struct.unpack_from(">HHB", data, place)
    wanted = (height, width, channels)
    struct.pack_into(">HHB", data, place, *(b if a is None else a for a, b in zip(wanted, told, strict=True)))
    return bytes(data)


def in_front(segments, data):
    """The JPEG `data` with `segments` before all of its own."""
    return data[:2] + segments + data[2:]


@pytest.fixture
def no_decoder(monkeypatch):
    """Fails the test where anything is decoded."""
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("the data have reached a decoder"))


def assert_refused(message, kind, text):
    for refuse in (check_image, to_rgb):
        with pytest.raises(ImageError, match=text) as caught:
            refuse(message)
        assert caught.value.kind == kind
        assert len(str(caught.value)) < 400
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\xff\xd8", b"\x89PNG"])
def test_what_is_no_picture_is_refused(data, no_decoder):
    assert_refused(compressed(data), "encoding" if data else "data", "JPEG, PNG")


@pytest.mark.parametrize(("width", "height"), [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1), (MAX_SIDE, 2049), (65535, 65535)])
def test_images_beyond_the_limits_are_refused_before_anything_is_made_of_them(width, height, no_decoder):
    raw = Image(width=width, height=height, step=width, encoding="mono8")
    raw.data.frombytes(bytes(min(width * height, MAX_PIXELS + MAX_SIDE)))
    if len(raw.data) == width * height:
        assert_refused(raw, "size", f"{width} x {height}.*{MAX_SIDE} and {MAX_PIXELS} pixels")
    for data in (png(width, height), jpeg(width, height)):
        assert_refused(compressed(data), "size", f"{width} x {height}.*{MAX_SIDE} and {MAX_PIXELS} pixels")


def test_the_largest_images_are_read():
    raw = Image(width=MAX_SIDE, height=MAX_PIXELS // MAX_SIDE, step=MAX_SIDE, encoding="mono8")
    raw.data.frombytes(bytes(MAX_PIXELS))
    assert to_rgb(raw).shape == (2048, 16384, 3)
    assert to_rgb(compressed(encoded("png", np.zeros((1, MAX_SIDE, 3), np.uint8)))).shape == (1, MAX_SIDE, 3)


@pytest.mark.parametrize("kind", ["bmp", "tiff", "webp", "ppm", "jp2", "gif"])
def test_other_formats_never_reach_a_decoder(kind, no_decoder):
    if not cv2.haveImageWriter(f"file.{kind}"):
        pytest.skip(f"this OpenCV writes no {kind}")
    assert_refused(compressed(encoded(kind, pictures.scene(64, 48)), "jpeg"), "encoding", "neither JPEG nor PNG")


@pytest.mark.parametrize(
    "format", ["jpeg", "png", "rgb8; jpeg compressed bgr8", "bgr8; png compressed ", "", "%s\x1b[2J"]
)
def test_the_data_tell_the_format_whatever_the_message_says(format):
    image = np.full((8, 12, 3), COLOUR, np.uint8)
    for kind, error in (("jpg", 3), ("png", 0)):
        out = to_rgb(compressed(encoded(kind, image[..., ::-1]), format))
        assert np.abs(out.astype(int) - image).max() <= error


def mosaic(pattern, image, ending="jpg"):
    """The mosaic of an image as a file of one channel, as compressed_image_transport writes it."""
    return encoded(ending, pictures.encode(image, f"bayer_{pattern}8"))


@pytest.mark.parametrize("read", [to_rgb, encodings.to_rgb], ids=["node", "replay"])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_a_compressed_mosaic_is_turned_into_colours_by_its_encoding(pattern, read):
    image = cv2.GaussianBlur(pictures.scene(64, 48), (0, 0), 2)
    raw = read(message(image, f"bayer_{pattern}8"))
    for kept in (f"bayer_{pattern}8; png compressed ", f"bayer_{pattern}8", f" bayer_{pattern}16 ; png compressed"):
        np.testing.assert_array_equal(read(compressed(mosaic(pattern, image, "png"), kept)), raw)
    out = read(compressed(mosaic(pattern, image), f"bayer_{pattern}8; jpeg compressed "))
    assert np.abs(out.astype(int) - image)[4:-4, 4:-4].mean() < 8.0


def test_a_mosaic_that_was_turned_into_colours_before_it_was_compressed_is_left_alone():
    image = pictures.scene(64, 48)
    made = compressed(encoded("png", image[..., ::-1]), "bayer_rggb8; png compressed bgr8")
    np.testing.assert_array_equal(to_rgb(made), image)


@pytest.mark.parametrize("encoding", ["bayer_rgbw8", "bayer_", "bayer_rggb", "bayer_rggb12", "nv12", "16UC1", "%s\x1b"])
def test_one_channel_of_something_unknown_is_not_taken_for_grey(encoding, no_decoder):
    for ending in ("jpg", "png"):
        made = compressed(mosaic("rggb", pictures.scene(64, 48), ending), f"{encoding}; {ending} compressed ")
        assert_refused(made, "encoding", "has one channel of .*accepted there: mono8.*bayer_rggb8")


@pytest.mark.parametrize("encoding", ["mono8", "mono16", "8UC1", "rgb8", ""])
def test_one_channel_of_grey_stays_grey(encoding):
    image = pictures.scene(64, 48)[..., 1]
    out = to_rgb(compressed(encoded("png", image), f"{encoding}; png compressed "))
    np.testing.assert_array_equal(out, np.repeat(image[..., None], 3, -1))


def test_compressed_depth_is_refused(no_decoder):
    data = bytes(12) + encoded("png", np.zeros((4, 4), np.uint16))
    assert_refused(compressed(data, "16UC1; compressedDepth png"), "encoding", "one of depth, without colours")


def test_a_jpeg_that_is_cut_off_anywhere_is_refused(no_decoder):
    data = encoded("jpg")
    for end in range(3, len(data) - 1):
        with pytest.raises(ImageError):
            check_image(compressed(data[:end]))


def test_a_png_that_is_cut_off_anywhere_is_refused(no_decoder):
    data = encoded("png")
    # Its last four bytes are the sum of nothing.
    for end in range(8, len(data) - 4):
        with pytest.raises(ImageError):
            check_image(compressed(data[:end]))


@pytest.mark.parametrize("length", [10**6, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("name", [b"IDAT", b"tEXt", b"xxxx", b"IEND"])
def test_a_png_with_a_part_larger_than_itself_is_refused(name, length, no_decoder):
    """The decoder would allocate memory for it first."""
    data = png(4, 4, chunk(b"tEXt", b"k\0v"))
    broken = data[:33] + struct.pack(">I", length) + name + data[41:]
    assert_refused(compressed(broken), "data", "cut off")


def test_a_png_of_endless_parts_is_refused(no_decoder):
    assert_refused(compressed(png(4, 4, chunk(b"tEXt", b"") * 1_000_000)), "decode", "more than 50000 parts")


def test_what_cameras_put_around_a_jpeg_is_no_reason_to_refuse_it():
    data = encoded("jpg")
    expected = to_rgb(compressed(data))
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(data)) + data
    for padded in (data + bytes(1000), data + data, in_front(thumbnail, data), in_front(b"\xff\xff\xff", data)):
        np.testing.assert_array_equal(to_rgb(compressed(padded)), expected)


def test_a_picture_stays_as_it_lies_whatever_its_orientation_says():
    image = cv2.GaussianBlur(pictures.scene(32, 16), (0, 0), 2)
    data = encoded("jpg", image)
    turned = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    tagged = in_front(b"\xff\xe1" + struct.pack(">H", 2 + len(turned)) + turned, data)
    assert cv2.imdecode(np.frombuffer(tagged, np.uint8), cv2.IMREAD_COLOR).shape == (32, 16, 3)
    np.testing.assert_array_equal(to_rgb(compressed(tagged)), to_rgb(compressed(data)))


def test_an_animation_is_its_first_picture():
    rows = b"".join(b"\0" + bytes(COLOUR) * 4 for _ in range(3))
    frame = (4, 3, 0, 0, 1, 1, 0, 0)
    data = png(
        4,
        3,
        chunk(b"acTL", struct.pack(">II", 2, 0)),
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, *frame)),
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 1, *frame)),
        chunk(b"fdAT", struct.pack(">I", 2) + zlib.compress(bytes(len(rows)))),
    )
    assert (to_rgb(compressed(data)) == COLOUR).all()


def test_a_jpeg_of_four_channels_is_refused(no_decoder):
    assert_refused(compressed(jpeg(channels=4)), "encoding", "4 channels")


def test_a_jpeg_that_goes_over_its_image_again_and_again_is_refused(no_decoder):
    data = encoded("jpg")
    scan = data[data.index(b"\xff\xda") : -2]
    assert_refused(compressed(data[:-2] + scan * MAX_SCANS + data[-2:]), "data", f"more than {MAX_SCANS} times")


@pytest.mark.parametrize("segment", [b"\xff\xe0\0\2", b"\xff", b"\xff\xfe\0\0", b"\xff\xe0\0\1"])
def test_a_jpeg_without_end_before_its_size_is_refused(segment, no_decoder):
    assert_refused(compressed(in_front(segment * 5_000_000, encoded("jpg"))), "decode", "size was not found")


def test_a_png_that_does_not_begin_with_its_size_is_refused(no_decoder):
    data = png(4, 4)
    for broken in (data[:8] + chunk(b"tEXt", b"k\0v") + data[8:], data[:20], b"\x89PNG\r\n\x1a\n" + bytes(50)):
        assert_refused(compressed(broken, "png"), "decode", "does not begin with its size")


def test_text_in_a_png_that_unfolds_to_a_gigabyte_is_not_unfolded():
    rows = b"".join(b"\0" + bytes(COLOUR) * 4 for _ in range(3))
    folded = zlib.compress(bytes(50_000_000), 9)
    for extra in (chunk(b"zTXt", b"k\0\0" + folded), chunk(b"iCCP", b"k\0\0" + folded)):
        assert (to_rgb(compressed(png(4, 3, extra, chunk(b"IDAT", zlib.compress(rows))))) == COLOUR).all()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "it has no stamp.*set max_image_age to 0.0"), (40, "its stamp is 60.00 s old")]
)
def test_an_image_that_is_too_old_or_has_no_stamp_is_dropped_with_the_reason(seconds, text):
    warned, reasons = [], []
    pipeline = Pipeline(
        log=SimpleNamespace(warning=lambda said, **_: warned.append(said)),
        clock=SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=100 * 10**9)),
        health=SimpleNamespace(dropped=lambda: reasons.append("dropped")),
        config=lambda: SimpleNamespace(max_image_age=1.0),
        publishing=lambda: True,
        too_often_out_of_memory=lambda: None,
    )
    made = message(plain(), "rgb8")
    made.header.stamp.sec = seconds
    pipeline.process(Frame(made, 0.0), None)
    assert reasons == ["dropped"]
    (said,) = warned
    assert re.search(f"image dropped: {text}", said)


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
