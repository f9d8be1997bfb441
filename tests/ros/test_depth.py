"""Depth, calibration and mask to a point in metres, against surfaces known beforehand and a slow reference."""

import gc
import math
import threading
import weakref

import cv2
import numpy as np
import pytest
from builtin_interfaces.msg import Time
from hypothesis import given
from hypothesis import strategies as st
from sensor_msgs.msg import CameraInfo, Image, RegionOfInterest
from std_msgs.msg import Header

from nerve_ros.depth import KEPT, SAMPLES, DepthBuffer, DepthError

FRAME = "camera_optical"
DISTORTIONS = {
    "plumb_bob": [-0.28, 0.09, 0.0011, -0.0007, 0.01],
    "rational_polynomial": [0.21, -0.11, 0.0009, -0.0006, 0.01, 0.55, -0.18, 0.02],
    "equidistant": [0.02, -0.01, 0.004, -0.001],
}


def header(seconds=10.0, frame=FRAME):
    return Header(stamp=Time(sec=math.floor(seconds), nanosec=round(seconds % 1 * 1e9)), frame_id=frame)


def depth_image(metres, seconds=10.0, *, encoding="32FC1", big_endian=False, padding=0, frame=FRAME):
    kind, unit = {"32FC1": ("f4", 1.0), "64FC1": ("f8", 1.0), "16UC1": ("u2", 1e-3), "mono16": ("u2", 1e-3)}[encoding]
    values = metres / unit if kind[0] == "f" else np.round(metres / unit)
    rows = np.ascontiguousarray(values.astype((">" if big_endian else "<") + kind)).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=0xAA)
    height, width = metres.shape
    made = Image(header=header(seconds, frame), height=height, width=width, encoding=encoding, step=rows.shape[1])
    made.is_bigendian = int(big_endian)
    made.data.frombytes(rows.tobytes())
    return made


def camera_info(
    width, height, seconds=10.0, *, focal=None, centre=None, d=(), model="plumb_bob", frame=FRAME, **fields
):
    fx, fy = focal or (width * 0.9, width * 0.95)
    cx, cy = centre or (width * 0.48, height * 0.53)
    return CameraInfo(
        header=header(seconds, frame),
        width=width,
        height=height,
        k=[fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0],
        d=list(d),
        distortion_model=model,
        **fields,
    )


def match_of(depth, info, seconds=10.0, tolerance=0.1, frame=FRAME):
    buffer = DepthBuffer(lambda: tolerance)
    if depth is not None:
        buffer.depth(depth)
    if info is not None:
        buffer.camera_info(info)
    return buffer.follow(header(seconds, frame))


def full(width=16, height=12):
    return np.ones((height, width), np.uint8)


def slow_point(depth, mask, k):
    """Position and spread of what `mask` shows by a loop over the pixels of a depth image of its size; no D."""
    points = []
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            z = float(depth[row, column])
            if mask[row, column] and math.isfinite(z) and z > 0:
                points.append(((column - k[2]) * z / k[0], (row - k[5]) * z / k[4], z))

    def quantile(values, share):
        values, place = sorted(values), share * (len(values) - 1)
        low = math.floor(place)
        return values[low] + (values[min(low + 1, len(values) - 1)] - values[low]) * (place - low)

    axes = list(zip(*points, strict=True))
    return (
        [quantile(axis, 0.5) for axis in axes],
        [(quantile(axis, 0.84) - quantile(axis, 0.16)) / 2 for axis in axes],
        len(points),
    )


def sphere(width, height, k, centre, radius):
    """Depth [height, width] of a sphere as a pinhole camera sees it, NaN beside it."""
    rows, columns = np.mgrid[0:height, 0:width]
    rays = np.stack([(columns - k[2]) / k[0], (rows - k[5]) / k[4], np.ones((height, width))], -1)
    a, b = (rays**2).sum(-1), rays @ centre
    inside = b**2 - a * (centre @ centre - radius**2)
    return np.where(inside >= 0, (b - np.sqrt(np.maximum(inside, 0))) / a, np.nan)


# Geometry.


@given(
    size=st.tuples(st.integers(8, 60), st.integers(8, 60)),
    z=st.floats(0.2, 30.0),
    part=st.tuples(*[st.floats(0.0, 1.0)] * 4),
    encoding=st.sampled_from(["32FC1", "64FC1", "16UC1", "mono16"]),
    big_endian=st.booleans(),
    padding=st.integers(0, 5),
)
def test_a_wall_is_where_it_was_put(size, z, part, encoding, big_endian, padding):
    width, height = size
    left, right = sorted(round(share * (width - 1)) for share in part[:2])
    top, bottom = sorted(round(share * (height - 1)) for share in part[2:])
    mask = np.zeros((height, width), bool)
    mask[top : bottom + 1, left : right + 1] = True
    info = camera_info(width, height)
    wall = depth_image(np.full((height, width), z), encoding=encoding, big_endian=big_endian, padding=padding)
    point = match_of(wall, info).point(mask)
    z = z if encoding in ("32FC1", "64FC1") else round(z * 1000) / 1000
    expected = (
        ((left + right) / 2 - info.k[2]) * z / info.k[0],
        ((top + bottom) / 2 - info.k[5]) * z / info.k[4],
        z,
    )
    assert point.position == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert point.spread[2] == pytest.approx(0.0, abs=1e-6)
    assert point.pixels == mask.sum()


@given(
    centre=st.tuples(st.floats(-0.2, 0.2), st.floats(-0.2, 0.2), st.floats(2.0, 6.0)),
    radius=st.floats(0.15, 0.35),
)
def test_a_ball_is_where_it_was_put(centre, radius):
    width, height = 96, 72
    info = camera_info(width, height, centre=(47.5, 35.5))
    depth = sphere(width, height, info.k, np.array(centre), radius)
    mask = np.isfinite(depth)
    point = match_of(depth_image(depth), info).point(mask)
    pixel = (centre[2] + radius) / info.k[0]
    # The middle of what is seen of it, to a pixel and the slant of perspective; it is seen from the front.
    assert point.position[:2] == pytest.approx(centre[:2], abs=pixel + 0.15 * radius)
    assert centre[2] - radius - 1e-6 <= point.position[2] <= centre[2]
    assert point.pixels == mask.sum()
    position, spread, pixels = slow_point(depth.astype(np.float32), mask, info.k)
    assert point.position == pytest.approx(position, rel=1e-6, abs=1e-6)
    assert point.spread == pytest.approx(spread, rel=1e-6, abs=1e-6)
    assert point.pixels == pixels


@given(data=st.data(), seed=st.integers(0, 2**32 - 1), encoding=st.sampled_from(["32FC1", "16UC1"]))
def test_any_depth_agrees_with_the_slow_reference(data, seed, encoding):
    width, height = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    random = np.random.default_rng(seed)
    depth = np.round(random.uniform(0.2, 9.0, (height, width)), 3)
    depth[random.uniform(size=depth.shape) < 0.3] = 0.0
    if encoding == "32FC1":
        for bad in (np.nan, np.inf, -np.inf, -1.0):
            depth[random.uniform(size=depth.shape) < 0.1] = bad
    # One piece whatever is drawn: a row and a column cross each other.
    mask = np.zeros((height, width), np.uint8)
    mask[random.integers(height)] = 255
    mask[:, random.integers(width)] = 1
    info = camera_info(width, height)
    match = match_of(depth_image(depth, encoding=encoding), info)
    seen = depth.astype(np.float32) if encoding == "32FC1" else depth
    if not ((mask > 0) & np.isfinite(depth) & (depth > 0)).any():
        with pytest.raises(DepthError, match="has a valid depth"):
            match.point(mask)
        return
    position, spread, pixels = slow_point(seen, mask, info.k)
    point = match.point(mask)
    assert point.position == pytest.approx(position, rel=1e-6, abs=1e-6)
    assert point.spread == pytest.approx(spread, rel=1e-6, abs=1e-6)
    assert point.pixels == pixels


@pytest.mark.parametrize("model", list(DISTORTIONS))
def test_a_lens_that_bends_is_straightened(model):
    width, height, z = 64, 48, 2.0
    d = DISTORTIONS[model]
    info = camera_info(width, height, d=d, model=model)
    k = np.array(info.k).reshape(3, 3)
    # A spot in the world, where the lens shows it, and a mask of the one pixel nearest to there.
    for x, y in ((0.0, 0.0), (0.7, -0.4), (-0.8, 0.5)):
        ray = np.array([[[x / z, y / z]]])
        if model == "equidistant":
            pixel = cv2.fisheye.distortPoints(ray, k, np.array(d))[0, 0]
        else:
            pixel = cv2.projectPoints(np.array([[x, y, z]]), np.zeros(3), np.zeros(3), k, np.array(d))[0][0, 0]
        # The calibration shifted by the rest of a pixel, so that the spot is at the centre of one.
        column, row = np.round(pixel).astype(int)
        shifted = camera_info(
            width,
            height,
            d=d,
            model=model,
            focal=(k[0, 0], k[1, 1]),
            centre=(k[0, 2] + column - pixel[0], k[1, 2] + row - pixel[1]),
        )
        mask = np.zeros((height, width), bool)
        mask[row, column] = True
        point = match_of(depth_image(np.full((height, width), z)), shifted).point(mask)
        assert point.position == pytest.approx((x, y, z), abs=1e-5)


@pytest.mark.parametrize("model", [*DISTORTIONS, "", "of the future"])
@pytest.mark.parametrize("d", [(), (0.0,) * 5])
def test_no_coefficients_mean_no_distortion_whatever_the_model_is_called(model, d):
    plain = match_of(depth_image(np.full((12, 16), 2.0)), camera_info(16, 12)).point(full())
    same = match_of(depth_image(np.full((12, 16), 2.0)), camera_info(16, 12, d=d, model=model)).point(full())
    assert same == plain


SHORT, FISHEYE = [-0.28, 0.09, 0.0011, -0.0007], DISTORTIONS["equidistant"]


@pytest.mark.parametrize(
    ("model", "d", "as_model", "as_d"),
    [
        ("plumb_bob", [*DISTORTIONS["plumb_bob"], 0.0, 0.0, 0.0], "plumb_bob", DISTORTIONS["plumb_bob"]),
        ("plumb_bob", [*SHORT, 0.0, 0.0], "plumb_bob", SHORT),
        ("plumb_bob", DISTORTIONS["rational_polynomial"], "rational_polynomial", DISTORTIONS["rational_polynomial"]),
        ("rational_polynomial", DISTORTIONS["plumb_bob"], "plumb_bob", DISTORTIONS["plumb_bob"]),
        (
            "rational_polynomial",
            [*DISTORTIONS["rational_polynomial"], *[0.0] * 6],
            "rational_polynomial",
            DISTORTIONS["rational_polynomial"],
        ),
        ("radtan", SHORT, "plumb_bob", SHORT),
        ("equidistant", [*FISHEYE, 0.0], "equidistant", FISHEYE),
        ("equidistant", [*FISHEYE, *[0.0] * 10], "equidistant", FISHEYE),
        ("fisheye", FISHEYE, "equidistant", FISHEYE),
    ],
)
def test_calibrations_as_drivers_write_them_are_read(model, d, as_model, as_d):
    """Other names of the same model, and zeros behind its coefficients."""
    mask = np.zeros((48, 64), bool)
    mask[40, 58] = True
    wall = depth_image(np.full((48, 64), 2.0))
    found = match_of(wall, camera_info(64, 48, d=d, model=model)).point(mask)
    assert found == match_of(wall, camera_info(64, 48, d=as_d, model=as_model)).point(mask)
    assert found != match_of(wall, camera_info(64, 48)).point(mask)


def test_the_biggest_piece_with_depth_is_taken():
    depth, mask = np.full((40, 60), 5.0), np.zeros((40, 60), np.uint8)
    for rows in (slice(2, 6), slice(33, 37)):
        mask[rows, 2:6] = 1
        depth[rows, 2:6] = 1.0
    mask[20:30, 20:30] = 1
    depth[20:30, 20:30] = 2.0
    # As large as both and of glass.
    mask[1:35, 40:59] = 1
    depth[1:35, 40:59] = 0.0
    point = match_of(depth_image(depth), camera_info(60, 40)).point(mask)
    assert point.position[2] == pytest.approx(2.0)
    assert point.pixels == 100


def test_a_hole_in_the_depth_does_not_cut_a_thing_in_two():
    depth, mask = np.full((20, 30), 3.0), np.zeros((20, 30), np.uint8)
    mask[5:15, 5:25] = 1
    depth[:, 14] = np.nan
    point = match_of(depth_image(depth), camera_info(30, 20)).point(mask)
    assert point.pixels == 10 * 19


def test_what_touches_at_a_corner_is_one_piece():
    assert match_of(GOOD, INFO).point(np.eye(12, 16, dtype=bool)).pixels == 12


def test_what_shows_at_the_rim_of_the_mask_moves_nothing():
    depth, mask = np.full((40, 40), 8.0), np.zeros((40, 40), np.uint8)
    depth[11:29, 11:29] = 1.5
    mask[10:30, 10:30] = 1
    info = camera_info(40, 40, centre=(19.5, 19.5))
    point = match_of(depth_image(depth), info).point(mask)
    assert point.position == pytest.approx((0.0, 0.0, 1.5), abs=0.03)


def test_the_spread_is_that_of_a_normal_distribution():
    depth = np.random.default_rng(0).normal(2.0, 0.05, (200, 200))
    point = match_of(depth_image(depth), camera_info(200, 200)).point(full(200, 200))
    assert point.spread[2] == pytest.approx(0.05, rel=0.03)


# Sizes.


@given(
    small=st.tuples(st.integers(4, 20), st.integers(4, 20)),
    scale=st.integers(2, 5),
    depth_is_small=st.booleans(),
    info_of_the_image=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_depth_of_another_size_gives_the_same_place(small, scale, depth_is_small, info_of_the_image, seed):
    large = (small[0] * scale, small[1] * scale)
    of_depth, of_image = (small, large) if depth_is_small else (large, small)
    mask = np.zeros(of_image[::-1], np.uint8)
    left, top = (int(part) for part in np.random.default_rng(seed).integers(0, np.array(of_image) // 2 + 1))
    mask[top:, left:] = 1
    info = camera_info(*of_image)
    if not info_of_the_image:
        ratio = of_depth[0] / of_image[0]
        info = camera_info(
            *of_depth,
            focal=(info.k[0] * ratio, info.k[4] * ratio),
            centre=((info.k[2] + 0.5) * ratio - 0.5, (info.k[5] + 0.5) * ratio - 0.5),
        )
    point = match_of(depth_image(np.full(of_depth[::-1], 2.0)), info).point(mask)
    # The same by a loop: which pixels of the depth image have their centre in the mask, and where those look.
    expected = np.zeros(of_depth[::-1], bool)
    for row in range(of_depth[1]):
        for column in range(of_depth[0]):
            expected[row, column] = mask[
                int((row + 0.5) * of_image[1] / of_depth[1]), int((column + 0.5) * of_image[0] / of_depth[0])
            ]
    assert point.pixels == expected.sum()
    reference = camera_info(*of_image).k
    ratio = of_image[0] / of_depth[0]
    rows, columns = np.nonzero(expected)
    x = (np.median((columns + 0.5) * ratio - 0.5) - reference[2]) / reference[0] * 2.0
    y = (np.median((rows + 0.5) * ratio - 0.5) - reference[5]) / reference[4] * 2.0
    assert point.position == pytest.approx((x, y, 2.0), abs=1e-6)


@pytest.mark.parametrize("binning", [(0, 0), (1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("region", [(0, 0, 0, 0), (16, 8, 32, 24)])
def test_binning_and_region_of_interest_are_honoured(binning, region):
    """The calibration is of the whole sensor; the images are a region of it with pixels put together."""
    x, y, width, height = region
    info = camera_info(80, 60, binning_x=binning[0], binning_y=binning[1])
    info.roi = RegionOfInterest(x_offset=x, y_offset=y, width=width, height=height)
    across, down = max(1, binning[0]), max(1, binning[1])
    of_image = ((width or 80) // across, (height or 60) // down)
    mask = np.zeros(of_image[::-1], np.uint8)
    mask[3, 5] = 1
    point = match_of(depth_image(np.full(of_image[::-1], 2.0)), info).point(mask)
    column, row = x + (5 + 0.5) * across - 0.5, y + (3 + 0.5) * down - 0.5
    expected = ((column - info.k[2]) / info.k[0] * 2.0, (row - info.k[5]) / info.k[4] * 2.0, 2.0)
    assert point.position == pytest.approx(expected, abs=1e-6)


def test_very_many_pixels_are_sampled_evenly():
    # A power of two of samples would take the same columns of every row.
    height, width = 1024, 2048
    slope = np.linspace(1.0, 3.0, width)[None].repeat(height, 0)
    info = camera_info(width, height, d=DISTORTIONS["plumb_bob"])
    point = match_of(depth_image(slope, encoding="16UC1"), info).point(full(width, height))
    assert point.pixels == width * height > 10 * SAMPLES
    assert point.position[2] == pytest.approx(2.0, abs=0.005)
    assert point.spread[2] == pytest.approx(0.68, abs=0.005)


# Which depth image belongs to an image.


def wall(z, seconds, **fields):
    return depth_image(np.full((12, 16), z), seconds, **fields)


def z_of(match):
    return match.point(full()).position[2]


def test_the_depth_nearest_in_time_is_taken_of_those_before_and_after():
    buffer = DepthBuffer(lambda: 0.1)
    buffer.camera_info(camera_info(16, 12))
    buffer.depth(wall(1.0, 9.91))
    buffer.depth(wall(2.0, 9.95))
    buffer.depth(wall(3.0, 9.90))
    match = buffer.follow(header(10.0))
    assert z_of(match) == pytest.approx(2.0)
    buffer.depth(wall(4.0, 10.02))
    assert z_of(match) == pytest.approx(4.0)
    for later in range(1, 100):
        buffer.depth(wall(5.0, 10.02 + 0.03 * later))
    assert z_of(match) == pytest.approx(4.0)
    assert z_of(buffer.follow(header(12.97))) == pytest.approx(5.0)


def test_the_calibration_nearest_in_time_is_taken_however_old():
    buffer = DepthBuffer(lambda: 0.1)
    buffer.depth(wall(2.0, 10.0))
    buffer.camera_info(camera_info(16, 12, 0.0, focal=(10.0, 10.0), centre=(0.0, 0.0)))
    match = buffer.follow(header(10.0))
    assert match.point(full()).position[0] == pytest.approx(1.5)
    buffer.camera_info(camera_info(16, 12, 10.0, focal=(20.0, 20.0), centre=(0.0, 0.0)))
    buffer.camera_info(camera_info(16, 12, 99.0, focal=(40.0, 40.0), centre=(0.0, 0.0)))
    assert match.point(full()).position[0] == pytest.approx(0.75)


def test_of_images_without_a_stamp_the_newest_depth_is_taken():
    buffer = DepthBuffer(lambda: 0.1)
    buffer.camera_info(camera_info(16, 12, 0.0))
    for number in range(1, 8):
        buffer.depth(wall(float(number), 0.0))
    match = buffer.follow(header(0.0))
    buffer.depth(wall(8.0, 0.0))
    assert z_of(match) == pytest.approx(7.0)


def test_stamps_that_jump_back_match_anew():
    buffer = DepthBuffer(lambda: 0.1)
    buffer.camera_info(camera_info(16, 12, 100.0))
    buffer.depth(wall(1.0, 100.0))
    old = buffer.follow(header(100.0))
    new = buffer.follow(header(3.0))
    with pytest.raises(DepthError, match="97 s newer than the image"):
        new.point(full())
    buffer.depth(wall(2.0, 3.0))
    assert z_of(new) == pytest.approx(2.0)
    assert z_of(old) == pytest.approx(1.0)


def test_stamps_at_the_ends_of_their_range_are_told_apart():
    first, last = Time(sec=-(2**31), nanosec=0), Time(sec=2**31 - 1, nanosec=2**32 - 1)
    buffer = DepthBuffer(lambda: 0.1)
    buffer.camera_info(camera_info(16, 12))
    depth = wall(1.0, 0.0)
    depth.header.stamp = first
    buffer.depth(depth)
    with pytest.raises(DepthError, match=r"4\.29e\+09 s older"):
        buffer.follow(Header(stamp=last, frame_id=FRAME)).point(full())


def test_few_depth_images_are_kept_and_a_dropped_match_keeps_none():
    buffer = DepthBuffer(lambda: 0.1)
    images = [wall(1.0, number) for number in range(20)]
    match = buffer.follow(header(5.0))
    alive = weakref.ref(match)
    for image in images:
        buffer.depth(image)
    assert len(buffer._depths) == KEPT
    assert match._depth is images[5]
    del match
    gc.collect()
    assert alive() is None
    assert not len(buffer._matches)
    buffer.depth(images[0])


def test_cleared_forgets_what_came_and_spares_a_match_that_is_held():
    buffer = DepthBuffer(lambda: 0.1)
    buffer.depth(wall(2.0, 10.0))
    buffer.camera_info(camera_info(16, 12))
    held = buffer.follow(header(10.0))
    buffer.clear()
    with pytest.raises(DepthError, match="no depth image has come"):
        buffer.follow(header(10.0)).point(full())
    assert z_of(held) == pytest.approx(2.0)


def test_threads_may_come_and_go_while_depth_comes():
    buffer = DepthBuffer(lambda: 1.0)
    buffer.camera_info(camera_info(16, 12))
    depth, stop, errors = wall(2.0, 10.0), threading.Event(), []

    def receive():
        while not stop.is_set():
            buffer.depth(depth)

    def ask():
        try:
            for _ in range(300):
                assert z_of(buffer.follow(header(10.0))) == pytest.approx(2.0)
        except Exception as error:
            errors.append(error)

    buffer.depth(depth)
    receiver = threading.Thread(target=receive)
    askers = [threading.Thread(target=ask) for _ in range(3)]
    for thread in (receiver, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    receiver.join()
    assert not errors
    gc.collect()
    assert not len(buffer._matches)


# Why there is no point.


def test_the_tolerance_is_read_when_asked():
    tolerance = [0.5]
    buffer = DepthBuffer(lambda: tolerance[0])
    buffer.depth(wall(2.0, 9.6))
    buffer.camera_info(camera_info(16, 12))
    match = buffer.follow(header(10.0))
    assert z_of(match) == pytest.approx(2.0)
    tolerance[0] = 0.1
    with pytest.raises(DepthError, match=r"0\.4 s older than the image \(depth_tolerance is 0\.1 s\)"):
        match.point(full())


def broken(**fields):
    image = wall(2.0, 10.0)
    for name, value in fields.items():
        setattr(image, name, value)
    return image


GOOD = wall(2.0, 10.0)
INFO = camera_info(16, 12)
REASONS = {
    "no depth": (None, INFO, "no depth image has come; check the topic depth"),
    "no camera_info": (GOOD, None, "no camera_info has come; check the topic camera_info"),
    "another frame": (
        wall(2.0, 10.0, frame="depth_optical"),
        INFO,
        "the depth image is in frame 'depth_optical', the image in 'camera_optical'; a depth image registered",
    ),
    "camera_info of another frame": (GOOD, camera_info(16, 12, frame="left"), "camera_info is in frame 'left'"),
    "encoding": (broken(encoding="16SC1"), INFO, "encoding '16SC1' .* accepted: 16UC1 and mono16 .* 32FC1 and 64FC1"),
    "no width": (broken(width=0), INFO, "the depth image is 0 x 12"),
    "no height": (broken(height=0), INFO, "the depth image is 16 x 0"),
    "step": (broken(step=63), INFO, "step of the depth image is 63; 16 pixels of 32FC1 need 64 bytes"),
    "huge step": (broken(step=2**32 - 1), INFO, "with step 4294967295 needs"),
    "short data": (broken(data=GOOD.data[:-1]), INFO, "has 767 bytes; 16 x 12 32FC1 with step 64 needs 768"),
    "huge": (broken(width=2**30, step=2**32 - 1, height=2**32 - 1), INFO, "step of the depth image"),
    "other aspect": (
        depth_image(np.full((12, 20), 2.0)),
        INFO,
        "the depth image is 20 x 12, the image 16 x 12; they must have the same aspect ratio",
    ),
    "camera_info of another aspect": (GOOD, camera_info(20, 12), "the image of camera_info is 20 x 12"),
    "camera_info without a size": (GOOD, camera_info(0, 0, focal=(9.0, 9.0)), "its images are 0 x 0"),
    "binned to nothing": (GOOD, camera_info(16, 12, binning_x=17), "its images are 0 x 12"),
    "not calibrated": (GOOD, camera_info(16, 12, focal=(0.0, 0.0)), r"no calibration \(k\[0\] is 0"),
    "half calibrated": (GOOD, camera_info(16, 12, focal=(9.0, -9.0)), "no calibration .*k.4. is -9"),
    "calibrated to nonsense": (GOOD, camera_info(16, 12, centre=(math.nan, 1.0)), "no calibration"),
    "distortion model": (
        GOOD,
        camera_info(16, 12, d=[0.1], model="thin_prism"),
        (
            "distortion model 'thin_prism' of camera_info is unknown; known: plumb_bob, rational_polynomial, "
            "equidistant, radtan, fisheye"
        ),
    ),
    "coefficients beyond those of a fisheye": (
        GOOD,
        camera_info(16, 12, d=[0.1] * 5, model="equidistant"),
        r"has 5 coefficients \(d\), 5 without the zeros at their end; equidistant has 4",
    ),
    "coefficients between": (GOOD, camera_info(16, 12, d=[0.1] * 6), "6 coefficients .*has 4 or 5 or 8 or 12 or 14"),
    "coefficients": (GOOD, camera_info(16, 12, d=[0.1] * 3), "3 coefficients .*; plumb_bob has 4 or 5"),
    "distortion to nowhere": (GOOD, camera_info(16, 12, d=[math.nan] * 5), "gives no finite point"),
    "no valid depth": (
        depth_image(np.full((12, 16), np.nan)),
        INFO,
        "none of the 192 depth pixels within the mask has a valid depth",
    ),
    "depth of zero": (depth_image(np.zeros((12, 16)), encoding="16UC1"), INFO, "has a valid depth"),
}


@pytest.mark.parametrize("case", list(REASONS))
def test_the_reason_is_told(case):
    depth, info, reason = REASONS[case]
    with pytest.raises(DepthError, match=reason):
        match_of(depth, info).point(full())


def test_an_empty_mask_has_no_place():
    with pytest.raises(DepthError, match="no pixel of the depth image lies within the mask"):
        match_of(GOOD, INFO).point(full() * 0)


def test_what_is_too_thin_for_the_depth_image_is_told():
    mask = np.zeros((48, 64), np.uint8)
    mask[1] = 1
    with pytest.raises(DepthError, match="no pixel of the depth image lies within the mask"):
        match_of(GOOD, INFO).point(mask)


@pytest.mark.parametrize("size", [(16, 12), (64, 48), (17, 13), (1920, 1440), (5, 4)])
def test_sizes_that_are_one_aspect_but_for_rounding_are_accepted(size):
    assert match_of(GOOD, INFO).point(full(*size)).position[2] == pytest.approx(2.0)


def test_names_from_the_network_are_cut_short():
    far = wall(2.0, 10.0, frame="x" * 10_000)
    with pytest.raises(DepthError) as told:
        match_of(far, INFO).point(full())
    assert len(str(told.value)) < 400


@given(
    k=st.just(INFO.k) | st.lists(st.floats(), min_size=9, max_size=9),
    d=st.sampled_from([4, 5, 8, 14]).flatmap(
        lambda n: st.lists(st.floats() | st.floats(-2, 2), min_size=n, max_size=n)
    ),
    model=st.sampled_from(["plumb_bob", "rational_polynomial", "equidistant", "x"]),
    sizes=st.just((16, 12, 0, 0, 0, 0)) | st.tuples(*[st.integers(0, 2**32 - 1)] * 4, st.just(16), st.just(12)),
    binning=st.just((1, 1)) | st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
    values=st.lists(st.floats(width=32), min_size=192, max_size=192),
)
def test_whatever_comes_there_is_a_finite_point_or_a_reason(k, d, model, sizes, binning, values):
    info = CameraInfo(header=header(), width=sizes[0], height=sizes[1], k=k, d=d, distortion_model=model)
    info.binning_x, info.binning_y = binning
    info.roi = RegionOfInterest(x_offset=sizes[2], y_offset=sizes[3], width=sizes[4], height=sizes[5])
    with np.errstate(all="ignore"):
        depth = depth_image(np.array(values, np.float32).reshape(12, 16))
        try:
            point = match_of(depth, info).point(full())
        except DepthError:
            return
    assert np.isfinite([*point.position, *point.spread]).all()
