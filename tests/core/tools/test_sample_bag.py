"""The sample bag: what is in it, that its labels lie on its images, and that it is made when it must be."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rosbags.highlevel import AnyReader

from nerve_core.embedded.scenes import NAMES, STUFF, Scene

SOURCE = Path(__file__).parents[3] / "tools" / "sample_bag.py"
SECONDS = 2.0
LIMIT = 15e6
"""Bytes that half a minute of film may take."""


def load_generator():
    specification = importlib.util.spec_from_file_location("sample_bag", SOURCE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["sample_bag"] = module
    specification.loader.exec_module(module)
    return module


sample_bag = load_generator()


def read(bag: Path) -> dict[str, list]:
    """(log time, message) of every topic."""
    found: dict[str, list] = {}
    with AnyReader([bag]) as reader:
        for connection, stamp, raw in reader.messages():
            kind, message = connection.msgtype, reader.deserialize(raw, connection.msgtype)
            found.setdefault(f"{connection.topic} {kind}", []).append((stamp, message))
    return found


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bags") / "short"
    assert sample_bag.ensure(out, sample_bag.Options(seconds=SECONDS))
    return out


@pytest.fixture(scope="module")
def messages(bag) -> dict[str, list]:
    return read(bag)


@pytest.fixture(scope="module")
def images(messages) -> list[np.ndarray]:
    compressed = messages["/camera/image/compressed sensor_msgs/msg/CompressedImage"]
    return [cv2.imdecode(message.data, cv2.IMREAD_COLOR) for _, message in compressed]


@pytest.fixture(scope="module")
def labels(messages) -> list[np.ndarray]:
    compressed = messages["/camera/labels/compressed sensor_msgs/msg/CompressedImage"]
    return [cv2.imdecode(message.data, cv2.IMREAD_UNCHANGED) for _, message in compressed]


def test_the_topics_are_there_with_one_message_of_each_kind_for_every_image(messages):
    assert {topic: len(found) for topic, found in messages.items()} == {
        "/camera/image/compressed sensor_msgs/msg/CompressedImage": 20,
        "/camera/camera_info sensor_msgs/msg/CameraInfo": 20,
        "/camera/labels/compressed sensor_msgs/msg/CompressedImage": 20,
        "/camera/labels/label_info vision_msgs/msg/LabelInfo": 1,
    }


def test_what_belongs_together_has_one_stamp_ten_a_second(messages):
    stamps = []
    for topic, found in messages.items():
        for time, message in found:
            assert message.header.stamp.sec * 10**9 + message.header.stamp.nanosec == time
            assert message.header.frame_id == "camera"
        if "label_info" not in topic:
            stamps.append([time for time, _ in found])
    assert stamps[0] == stamps[1] == stamps[2]
    assert set(np.diff(stamps[0])) == {10**8}


def test_images_are_jpeg_and_labels_lossless_png_of_one_size(messages, images, labels):
    for _, message in messages["/camera/image/compressed sensor_msgs/msg/CompressedImage"]:
        assert "jpeg" in message.format
        assert bytes(message.data[:3]) == b"\xff\xd8\xff"
    for _, message in messages["/camera/labels/compressed sensor_msgs/msg/CompressedImage"]:
        assert "png" in message.format
        assert bytes(message.data[:4]) == b"\x89PNG"
    assert {image.shape for image in images} == {(480, 640, 3)}
    assert {(label.shape, label.dtype.name) for label in labels} == {((480, 640), "uint8")}


def test_the_names_of_the_labels_are_in_the_bag(messages, labels):
    ((_, info),) = messages["/camera/labels/label_info vision_msgs/msg/LabelInfo"]
    assert [(entry.class_id, entry.class_name) for entry in info.class_map] == list(enumerate(("background", *NAMES)))
    assert set(np.unique(labels)) <= set(range(len(NAMES) + 1))


def test_the_label_info_reaches_who_subscribes_late(bag):
    with AnyReader([bag]) as reader:
        (connection,) = [one for one in reader.connections if one.topic.endswith("label_info")]
        (profile,) = connection.ext.offered_qos_profiles
    assert profile.durability.name == "TRANSIENT_LOCAL"


def test_half_a_minute_stays_below_the_limit_whatever_the_scenes(bag, messages):
    parts = [
        max(len(message.data) for _, message in found)
        for topic, found in messages.items()
        if topic.endswith("CompressedImage")
    ]
    assert sum(file.stat().st_size for file in bag.iterdir()) * 32 / SECONDS < LIMIT
    assert parts[0] <= sample_bag.JPEG_BYTES
    assert (sample_bag.JPEG_BYTES + 5500) * 320 < LIMIT


def test_a_noisy_image_is_written_in_a_lower_quality():
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    calm = np.full((480, 640, 3), 127, np.uint8)
    busy = cv2.resize(noise[:120, :160], (640, 480), interpolation=cv2.INTER_CUBIC)

    def quality(image: np.ndarray) -> int:
        data = sample_bag._jpeg(image).tobytes()
        tried = {
            sample_bag._encoded(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, value]).tobytes(): value
            for value in sample_bag.JPEG_QUALITIES
        }
        return tried[data]

    assert quality(calm) == sample_bag.JPEG_QUALITIES[0] > quality(busy)


def test_the_labels_lie_on_the_objects_to_the_pixel(images, labels):
    """Along the labels' borders the images' contrast is greatest where the labels are, and less two pixels away."""
    total = dict.fromkeys(itertools.product((-2, 0, 2), repeat=2), 0.0)
    for image, label in zip(images, labels, strict=True):
        grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float32)
        contrast = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
        border = cv2.morphologyEx(label, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        border[:8] = border[-8:] = border[:, :8] = border[:, -8:] = False
        for dy, dx in total:
            total[dy, dx] += contrast[np.roll(border, (dy, dx), (0, 1))].mean()
    here = total.pop((0, 0))
    assert here > 1.1 * max(total.values())


@pytest.mark.parametrize("pose", [(200.0, 150.0, 0.25, 0.0), (150.25, 160.5, 0.3, 0.06), (180.0, 140.0, 0.2, -0.5)])
def test_image_and_labels_show_the_same_points_of_the_scene(pose):
    rng = np.random.default_rng(5)
    world = cv2.resize(rng.integers(0, 256, (75, 100, 3), np.uint8), (400, 300), interpolation=cv2.INTER_CUBIC)
    truth = np.kron(rng.integers(0, 15, (30, 40), np.uint8), np.ones((10, 10), np.uint8))
    image, labels = sample_bag.film(Scene(world, truth, truth), sample_bag.Pose(*pose))
    x0, y0, scale, roll = pose
    for v, u in rng.integers(0, (480, 640), (2000, 2)):
        dx, dy = u - 319.5, v - 239.5
        x = x0 + scale * (math.cos(roll) * dx - math.sin(roll) * dy)
        y = y0 + scale * (math.sin(roll) * dx + math.cos(roll) * dy)
        left, top = math.floor(x), math.floor(y)
        a, b = x - left, y - top
        corners = world[top : top + 2, left : left + 2].astype(np.float64)
        mixed = np.einsum("y,x,yxc->c", [1 - b, b], [1 - a, a], corners)
        assert np.abs(image[v, u] - mixed).max() < 4  # OpenCV looks between pixels in steps of 1/32
        if min(abs(a - 0.5), abs(b - 0.5)) > 1e-6:
            assert labels[v, u] == truth[round(y), round(x)]


@given(st.tuples(*[st.floats(0, 2 * math.pi)] * 5), st.floats(0, 100))
def test_the_camera_moves_smoothly_and_never_sees_the_end_of_the_world(phases, seconds):
    path = sample_bag.CameraPath(phases)
    pose, after = path.pose(seconds), path.pose(seconds + 0.1)
    rows, columns = sample_bag.WORLD
    for u, v in itertools.product((-320, 320), (-240, 240)):
        x = pose.x + pose.scale * (math.cos(pose.roll) * u - math.sin(pose.roll) * v)
        y = pose.y + pose.scale * (math.sin(pose.roll) * u + math.cos(pose.roll) * v)
        assert 0 <= x <= columns - 1
        assert 0 <= y <= rows - 1
    assert math.hypot(after.x - pose.x, after.y - pose.y) < 60
    assert abs(after.scale - pose.scale) < 0.03
    assert abs(after.roll - pose.roll) < 0.01


def test_no_two_images_are_alike(images):
    for one, other in itertools.pairwise(images):
        assert np.abs(one.astype(int) - other).mean() > 1


def test_the_camera_info_is_that_of_the_images(messages):
    focal = set()
    for _, info in messages["/camera/camera_info sensor_msgs/msg/CameraInfo"]:
        assert (info.width, info.height, info.distortion_model) == (640, 480, "plumb_bob")
        K = info.k.reshape(3, 3)
        assert K[0, 0] == K[1, 1]
        assert (K[0, 2], K[1, 2]) == (319.5, 239.5)
        np.testing.assert_array_equal(info.p.reshape(3, 4)[:, :3], K)
        np.testing.assert_array_equal(info.r.reshape(3, 3), np.eye(3))
        focal.add(float(K[0, 0]))
    assert len(focal) > 1
    assert 350 < min(focal) < max(focal) < 650


@pytest.mark.parametrize("seed", [sample_bag.Options.seed, 11])
def test_there_are_worlds_indoors_and_in_yards_by_turns(monkeypatch, seed):
    monkeypatch.setattr(sample_bag, "WORLD", (120, 360))
    places = [{STUFF[k - 1] for k in np.unique(scene.stuff)} for scene, _ in sample_bag.draw_worlds(seed)]
    indoors, yards = {"tiles", "floor", "carpet"}, {"grass", "gravel", "road"}
    assert [bool(place & indoors) for place in places] == [True, False, True, False]
    assert [bool(place & yards) for place in places] == [False, True, False, True]


def test_the_same_options_give_the_same_bag_and_another_seed_another_one(tmp_path):
    bags = {}
    for folder, seed in (("one", 3), ("two", 3), ("three", 4)):
        out = tmp_path / folder / "bag"
        sample_bag.ensure(out, sample_bag.Options(seconds=0.3, seed=seed))
        bags[folder] = [file.read_bytes() for file in sorted(out.iterdir())]
    assert bags["one"] == bags["two"]
    assert bags["one"] != bags["three"]


class TestEnsure:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        """Nothing is drawn: what counts here is when."""
        scene = Scene(*(np.zeros((*sample_bag.WORLD, *more), np.uint8) for more in ((3,), (), ())))
        path = sample_bag.CameraPath((0.0,) * 5)
        monkeypatch.setattr(sample_bag, "draw_worlds", lambda seed: iter([(scene, path)] * sample_bag.WORLDS))

    def test_makes_a_bag_once(self, tmp_path):
        out = tmp_path / "deep" / "bag"
        assert sample_bag.ensure(out, sample_bag.Options(seconds=0.2))
        before = (out / "bag.mcap").stat()
        assert not sample_bag.ensure(out, sample_bag.Options(seconds=0.2))
        assert (out / "bag.mcap").stat() == before

    def test_makes_it_again_for_other_options_and_for_another_generator(self, tmp_path, monkeypatch):
        out = tmp_path / "bag"
        assert sample_bag.ensure(out, sample_bag.Options(seconds=0.2))
        assert sample_bag.ensure(out, sample_bag.Options(seconds=0.3))
        changed = tmp_path / "changed.py"
        changed.write_text(SOURCE.read_text() + "# another one\n")
        monkeypatch.setattr(sample_bag, "__file__", str(changed))
        assert sample_bag.ensure(out, sample_bag.Options(seconds=0.3))
        assert len(read(out)["/camera/image/compressed sensor_msgs/msg/CompressedImage"]) == 3

    def test_replaces_nothing_that_is_no_sample_bag(self, tmp_path):
        out = tmp_path / "precious"
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        with pytest.raises(FileExistsError, match="no sample bag"):
            sample_bag.ensure(out, sample_bag.Options(seconds=0.2))
        assert (out / "thesis.tex").read_text() == "years of work"

    def test_deletes_nothing_that_was_put_beside_an_old_bag(self, tmp_path):
        out = tmp_path / "bag"
        sample_bag.ensure(out, sample_bag.Options(seconds=0.2))
        (out / "thesis.tex").write_text("years of work")
        with pytest.raises(FileExistsError, match=r"holds thesis\.tex besides the old bag"):
            sample_bag.ensure(out, sample_bag.Options(seconds=0.3))
        assert not sample_bag.ensure(out, sample_bag.Options(seconds=0.2))
        assert (out / "thesis.tex").read_text() == "years of work"

    def test_leaves_nothing_behind_where_it_fails(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sample_bag, "expose", lambda *anything: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample_bag.ensure(tmp_path / "bag", sample_bag.Options(seconds=0.2))
        assert [path.name for path in tmp_path.iterdir()] == [".bag.lock"]

    def test_says_in_the_bag_how_it_was_made(self, tmp_path):
        out = tmp_path / "bag"
        sample_bag.ensure(out, sample_bag.Options(seconds=0.2, seed=8))
        metadata = yaml.safe_load((out / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
        said = json.loads(metadata["custom_data"][sample_bag.CUSTOM_DATA])
        assert (said["seconds"], said["seed"]) == (0.2, 8)


# The bag of worlds with depth, whose two places are a second each here


@pytest.fixture(scope="module")
def moving_bag(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bags") / "moving"
    assert sample_bag.ensure(out, sample_bag.Options(seconds=SECONDS, bag="moving"))
    return out


@pytest.fixture(scope="module")
def moving_messages(moving_bag) -> dict[str, list]:
    return {topic.split()[0]: [message for _, message in found] for topic, found in read(moving_bag).items()}


@pytest.fixture(scope="module")
def moving_truth(moving_messages) -> list[dict]:
    return [json.loads(message.data) for message in moving_messages["/camera/objects"]]


@pytest.fixture(scope="module")
def moving_planes(moving_messages) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Labels, instances and depth in millimetres of every image."""
    labels, instances = (
        [cv2.imdecode(one.data, cv2.IMREAD_UNCHANGED) for one in moving_messages[f"/camera/{part}/compressed"]]
        for part in ("labels", "instances")
    )
    depth = [one.data.view("<u2").reshape(one.height, one.width) for one in moving_messages["/camera/depth/image"]]
    return list(zip(labels, instances, depth, strict=True))


def test_the_moving_bag_holds_what_the_other_bag_does_and_depth_instances_and_objects(moving_bag):
    found = read(moving_bag)
    assert {topic: len(there) for topic, there in found.items()} == {
        "/camera/image/compressed sensor_msgs/msg/CompressedImage": 20,
        "/camera/camera_info sensor_msgs/msg/CameraInfo": 20,
        "/camera/labels/compressed sensor_msgs/msg/CompressedImage": 20,
        "/camera/labels/label_info vision_msgs/msg/LabelInfo": 1,
        "/camera/depth/image sensor_msgs/msg/Image": 20,
        "/camera/instances/compressed sensor_msgs/msg/CompressedImage": 20,
        "/camera/objects std_msgs/msg/String": 20,
    }
    times = [time for time, _ in found["/camera/image/compressed sensor_msgs/msg/CompressedImage"]]
    assert set(np.diff(times)) == {10**8}
    for topic, there in found.items():
        if "label_info" not in topic:
            assert [time for time, _ in there] == times
        if "objects" not in topic:
            stamps = [message.header.stamp.sec * 10**9 + message.header.stamp.nanosec for _, message in there]
            assert stamps == [time for time, _ in there]
            assert {message.header.frame_id for _, message in there} == {"camera"}


def test_half_a_minute_of_the_moving_bag_stays_below_forty_megabytes(moving_bag):
    assert sum(file.stat().st_size for file in moving_bag.iterdir()) * 32 / SECONDS < 40e6


def test_the_depth_is_as_a_depth_camera_gives_it(moving_messages, moving_planes):
    info, *_ = moving_messages["/camera/camera_info"]
    assert (info.k[0], info.k[2], info.k[5]) == (540, 319.5, 239.5)
    for message, (_, instances, depth) in zip(moving_messages["/camera/depth/image"], moving_planes, strict=True):
        assert (message.encoding, message.step, message.is_bigendian) == ("16UC1", 1280, 0)
        assert depth.shape == (480, 640)
        assert depth.max() <= 10_000
        assert depth[instances > 0].min() > 500
    room, yard = moving_planes[0][2], moving_planes[-1][2]
    assert room.all()
    assert not yard[:40][moving_planes[-1][1][:40] == 0].any()  # the sky


def test_labels_instances_and_objects_agree(moving_truth, moving_planes, moving_messages):
    ((info,), times) = moving_messages["/camera/labels/label_info"], moving_messages["/camera/image/compressed"]
    names = {entry.class_id: entry.class_name for entry in info.class_map}
    assert names == dict(enumerate(("background", *NAMES)))
    kinds: dict[int, str] = {}
    for said, (labels, instances, _), message in zip(moving_truth, moving_planes, times, strict=True):
        assert said["stamp"] == message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        assert said["frame_id"] == "camera"
        assert instances.dtype == np.uint16
        there = {one["id"]: one for one in said["objects"]}
        assert set(np.unique(instances)) - {0} <= set(there)
        assert ((labels > 0) == (instances > 0)).all()
        for number, one in there.items():
            assert one["pixels"] == np.count_nonzero(instances == number)
            assert {names[k] for k in np.unique(labels[instances == number])} <= {one["name"]}
            assert kinds.setdefault(number, one["name"]) == one["name"]
    assert max(kinds) > sample_bag.IDS > min(kinds)  # two places, whose objects have ids of their own


def test_the_depth_of_an_object_that_is_seen_whole_is_that_of_its_centre(moving_truth, moving_planes, moving_messages):
    K = moving_messages["/camera/camera_info"][0].k.reshape(3, 3)
    checked = 0
    for said, (_, instances, depth) in zip(moving_truth, moving_planes, strict=True):
        for one in said["objects"]:
            if one["occluded"] > 0.01 or one["outside"] > 0 or one["pixels"] < 500:
                continue
            rows, columns = np.nonzero(instances == one["id"])
            z = depth[rows, columns] / 1000
            points = np.stack([(columns - K[0, 2]) / K[0, 0] * z, (rows - K[1, 2]) / K[1, 1] * z, z])
            middle = (points.min(1) + points.max(1)) / 2
            np.testing.assert_allclose(middle, one["centre"], atol=0.06)
            checked += 1
    assert checked > 20


def test_some_objects_move_by_themselves_and_the_camera_turns(moving_truth):
    """In the camera's frame nothing stays; the distance between two objects that stand does."""
    gaps: dict[tuple[int, int], list[float]] = {}
    for said in moving_truth[:10]:
        for one, other in itertools.combinations(sorted(said["objects"], key=lambda thing: thing["id"]), 2):
            gap = math.dist(one["centre"], other["centre"])
            gaps.setdefault((one["id"], other["id"]), []).append(gap)
    changed = [max(found) - min(found) for found in gaps.values() if len(found) > 5]
    assert min(changed) < 1e-3 < 0.1 < max(changed)


def test_the_moving_bag_is_the_same_for_the_same_options(tmp_path):
    bags = []
    for folder, seed in (("one", 3), ("two", 3), ("three", 4)):
        out = tmp_path / folder / "bag"
        sample_bag.ensure(out, sample_bag.Options(seconds=0.2, seed=seed, bag="moving"))
        bags.append([file.read_bytes() for file in sorted(out.iterdir())])
    assert bags[0] == bags[1] != bags[2]


def test_the_bag_of_flat_scenes_is_made_again_in_place_of_the_other_one(tmp_path):
    out = tmp_path / "bag"
    assert sample_bag.ensure(out, sample_bag.Options(seconds=0.1, bag="moving"))
    assert not sample_bag.ensure(out, sample_bag.Options(seconds=0.1, bag="moving"))
    assert sample_bag.ensure(out, sample_bag.Options(seconds=0.1))
    assert len(read(out)) == 4


def test_depth_beyond_the_range_and_none_are_zero():
    depth = np.array([[np.nan, 0.0014, 9.9999, 10.001, 400.0]], np.float32)
    assert sample_bag._millimetres(depth).tolist() == [[0, 1, 10000, 0, 0]]


@pytest.mark.parametrize(
    ("values", "accepted"),
    [({"seconds": 0}, "0.1 to 3600"), ({"seed": -1}, "0 and above"), ({"bag": "static"}, "panning, moving")],
)
def test_options_that_cannot_be_used_are_refused_with_the_range(values, accepted):
    with pytest.raises(ValueError, match=accepted):
        sample_bag.Options(**values)
