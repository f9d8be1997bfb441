"""Bad input over real DDS: it is named, counted and reported, and the next good image is segmented.

Here is what needs a node of its own: publishers that do not match, compressed images, images beyond the limits, time
that jumps. Raw images that are broken are in test_stream.py, names in test_vocabulary_changes.py, a camera that is too
fast and one that is silent in test_stream.py, models that are missing in test_life_cycle.py.
"""

import base64
import struct
import time
from contextlib import suppress

import cv2
import pytest

import pictures
from nerve_ros.images import MAX_FRAME_ID, MAX_SIDE

PICTURE = {"width": 96, "height": 64}
STRICT = {
    "qos_overrides./image.subscription.reliability": "reliable",
    "qos_overrides./image.subscription.durability": "transient_local",
}
MATCHING = {"topic": "image", "reliability": "reliable", "durability": "transient_local"}


@pytest.fixture(scope="module")
def rig(new_rig):
    rig = new_rig(vocabulary=["ball", "ladder"], **STRICT)
    rig.node.wait_active()
    rig.listen("mask", "diagnostics")
    return rig


def warned(rig, *words):
    """Wait until the diagnostics warn of a silent topic with all these words; what they say."""
    told = rig.listener.wait(
        "diagnostics",
        lambda event: event["level"] == 1 and all(word in event["message"] for word in words),
        since=rig.listener.mark(),
        what=f"a warning with {words}\n{rig.node.report()}",
    )
    return told["message"]


# The publisher and the subscription do not match. In the order of the file: publishers come and go.

MISMATCHES = {
    "unreliable": (
        {"reliability": "best_effort", "durability": "transient_local"},
        ("reliability best_effort", "qos_overrides./image.subscription.reliability to best_effort"),
    ),
    "volatile": (
        {"reliability": "reliable", "durability": "volatile"},
        ("durability volatile", "qos_overrides./image.subscription.durability to volatile"),
    ),
    "of another type": (
        {"type": "CameraInfo"},
        ("sensor_msgs/msg/CameraInfo", "accepted: sensor_msgs/msg/Image, sensor_msgs/msg/CompressedImage"),
    ),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_publisher_that_does_not_match_is_named_with_the_way_out(rig, mismatch):
    offered, words = MISMATCHES[mismatch]
    rig.talker.do("advertise", topic="image", wait=False, **offered)
    message = warned(rig, "no image on /image", "/talker", *words)
    assert message.isprintable()
    rig.talker.do("withdraw", topic="image")
    # Images that come end the warning, and with them the next one is told in the log again.
    rig.talker.do("advertise", **MATCHING)
    rig.segment(PICTURE)
    rig.talker.do("withdraw", topic="image")


def test_a_topic_is_read_by_the_type_that_is_published_there_whatever_image_transport_says(rig):
    line = len(rig.node.lines)
    strict = MATCHING | {"type": "CompressedImage"}
    rig.talker.do("advertise", **strict)  # returns when it is subscribed to
    rig.node.wait_log("/image is read as sensor_msgs/msg/CompressedImage.*though image_transport is raw", since=line)
    show(rig, "image")
    # A camera that comes back raw is read raw.
    rig.talker.do("withdraw", topic="image")
    rig.talker.do("advertise", **MATCHING)
    rig.segment(PICTURE)
    rig.talker.do("withdraw", topic="image")
    told = [text for text in rig.node.lines[line:] if "is read as" in text]
    assert len(told) == 1, told


def show(rig, topic):
    """Publish a JPEG on any topic until its mask comes."""
    since, data = rig.listener.mark(), base64.b64encode(picture_file("jpg")).decode()
    for attempt in range(30):
        stamp = [1_900_000_000 + attempt, 3]
        rig.talker.do("message", topic=topic, type="CompressedImage", fields={"format": "jpeg"}, data=data, stamp=stamp)
        with suppress(AssertionError):
            rig.listener.wait("mask", lambda event: event["stamp"][0] >= 1_900_000_000, since=since, timeout=5.0)
            return
    raise AssertionError(rig.node.report())


def test_images_on_the_cameras_other_topic_are_told_with_the_setting_that_reads_them(rig):
    rig.talker.do("advertise", topic="image/compressed", wait=False)
    warned(
        rig, "no image on /image", "but sensor_msgs/msg/CompressedImage on /image/compressed", "image_transport to comp"
    )
    rig.talker.do("withdraw", topic="image/compressed")


def test_the_log_names_the_policy_too(rig):
    """Each time anew that images stop coming; one look a second must fall between, so that it may take two."""
    rig.listener.do("advertise", topic="image", wait=False, reliability="best_effort")
    rig.talker.do("advertise", **MATCHING)
    line = len(rig.node.lines)
    for _ in range(10):
        rig.segment(PICTURE)
        with suppress(AssertionError):
            rig.node.wait_log("no image on /image.*'/listener' publishes with reliability best_effort", 6.0, since=line)
            break
    else:
        raise AssertionError(rig.node.report())
    rig.listener.do("withdraw", topic="image")
    rig.talker.do("withdraw", topic="image")


# Raw images.


def rejected(rig, kind):
    event = rig.listener.wait("diagnostics", since=rig.listener.mark())
    return int(event["values"].get(f"rejected_for_{kind}", "0"))


def assert_dropped(rig, topic, kind, reason, **message):
    """Publish a message until it is counted as rejected for `kind`; the reason is reported, and no mask comes of it."""
    before, since, stamp = rejected(rig, kind), rig.listener.mark(), [77, 77]

    def told():
        return next(
            (
                event
                for event in rig.listener.seen("diagnostics", since)
                if int(event["values"].get(f"rejected_for_{kind}", "0")) > before
            ),
            None,
        )

    for _ in range(30):
        # What is large may be lost on its way.
        rig.talker.do("message", topic=topic, stamp=stamp, **message)
        try:
            event = rig.listener.until(told, f"rejection for {kind}\n{rig.node.report()}", timeout=2.0)
            break
        except AssertionError:
            assert rig.node.running, rig.node.report()
    assert reason in event["values"]["last_error"]
    assert event["level"] == 1
    good = PICTURE | ({"encoding": "jpeg"} if topic.endswith("compressed") else {})
    rig.segment(good)
    assert not [event for event in rig.listener.seen("mask", since) if event["stamp"] == stamp]


@pytest.mark.parametrize(("width", "height"), [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1)])
def test_an_image_beyond_the_limits_is_dropped(rig, width, height):
    rig.talker.do("advertise", **MATCHING)
    fields = {"width": width, "height": height, "step": width, "encoding": "mono8"}
    data = base64.b64encode(bytes(width * height)).decode()
    assert_dropped(rig, "image", "size", f"{width} x {height}", type="Image", fields=fields, data=data)


def test_a_header_that_would_be_sent_on_four_times_is_bounded(rig):
    rig.talker.do("advertise", **MATCHING)
    fields = {"width": 4, "height": 1, "step": 4, "encoding": "mono8"}
    data = base64.b64encode(bytes(4)).decode()
    frame_id = "f" * (MAX_FRAME_ID + 1)
    assert_dropped(rig, "image", "header", "frame_id", type="Image", fields=fields, data=data, frame_id=frame_id)


def test_a_stamp_that_jumps_back_starts_the_ages_anew(rig):
    rig.talker.do("advertise", **MATCHING)

    def show(seconds_ago):
        now = time.time_ns() - int(seconds_ago * 1e9)
        rig.segment(PICTURE, stamp=[now // 10**9, now % 10**9])

    for _ in range(5):
        show(0.0)
    rig.listener.wait("diagnostics", lambda event: 0.0 <= float(event["values"]["age_p50_ms"] or -1.0) < 60_000.0)
    since = rig.listener.mark()
    show(300.0)
    # Were the ages before it still there, one of six would not move the median.
    rig.listener.wait("diagnostics", lambda event: float(event["values"]["age_p50_ms"] or 0.0) > 299_000.0, since=since)


# Compressed images: the same node, configured anew.


@pytest.fixture(scope="module")
def compressed(rig):
    for label in ("deactivate", "cleanup"):
        assert rig.talker.do("transition", label=label)["success"]
    assert rig.talker.do("set_parameter", name="image_transport", value="compressed")["successful"]
    for label in ("configure", "activate"):
        assert rig.talker.do("transition", label=label)["success"]
    rig.talker.do("advertise", topic="image/compressed")
    return rig


def picture_file(kind):
    return cv2.imencode(f".{kind}", pictures.scene(48, 32))[1].tobytes()


def bomb(kind):
    """A small file that says it is 65535 x 65535."""
    data = bytearray(picture_file(kind))
    if kind == "png":
        struct.pack_into(">II", data, 16, 65535, 65535)
    else:
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 65535, 65535)
    return bytes(data)


@pytest.mark.parametrize(
    ("format", "data", "kind", "reason"),
    [
        ("jpeg", b"", "data", "empty"),
        ("jpeg", b"no picture at all", "encoding", "neither JPEG nor PNG"),
        ("png", picture_file("bmp"), "encoding", "neither JPEG nor PNG"),
        ("16UC1; compressedDepth png", bytes(12) + picture_file("png"), "encoding", "one of depth"),
        ("jpeg", picture_file("jpg")[:-100], "data", "cut off"),
        ("png", picture_file("png")[:-100], "data", "cut off"),
        ("png", picture_file("png")[:60] + bytes(60) + picture_file("png")[120:], "decode", "damaged"),
        ("jpeg", bomb("jpg"), "size", "65535 x 65535"),
        ("png", bomb("png"), "size", "65535 x 65535"),
    ],
)
def test_a_compressed_image_that_is_none_is_dropped(compressed, format, data, kind, reason):
    encoded = base64.b64encode(data).decode()
    assert_dropped(
        compressed, "image/compressed", kind, reason, type="CompressedImage", fields={"format": format}, data=encoded
    )


@pytest.mark.parametrize("format", ["jpeg", "png"])
def test_good_compressed_images_are_segmented(compressed, format):
    mask = compressed.segment(PICTURE | {"encoding": format})["mask"]
    assert (mask["width"], mask["height"]) == (96, 64)


def test_the_topic_beside_is_read_by_its_type_too_and_the_cameras_own_where_that_is_the_compressed_one(compressed):
    rig, line = compressed, len(compressed.node.lines)
    rig.talker.do("withdraw", topic="image/compressed")
    rig.talker.do("advertise", topic="image", wait=False)
    warned(rig, "no image on /image/compressed", "but sensor_msgs/msg/Image on /image: set image_transport to raw")
    rig.talker.do("withdraw", topic="image")
    rig.talker.do("advertise", **(MATCHING | {"type": "CompressedImage"}))
    rig.node.wait_log("/image is read as sensor_msgs/msg/CompressedImage.*image_transport is compressed", since=line)
    show(rig, "image")
    rig.talker.do("withdraw", topic="image")


# Depth.


@pytest.mark.parametrize(
    ("topic", "type", "accepted"),
    [
        ("depth", "CompressedImage", "accepted: sensor_msgs/msg/Image, as it"),
        ("camera_info", "Image", "msg/CameraInfo"),
    ],
)
def test_a_depth_topic_of_another_type_is_named_with_what_is_accepted(compressed, topic, type, accepted):
    rig = compressed
    for label in ("deactivate", "cleanup"):
        assert rig.talker.do("transition", label=label)["success"]
    for name, value in (("image_transport", "raw"), ("use_depth", True)):
        assert rig.talker.do("set_parameter", name=name, value=value)["successful"]
    for label in ("configure", "activate"):
        assert rig.talker.do("transition", label=label)["success"]
    line = len(rig.node.lines)
    rig.talker.do("advertise", **MATCHING)
    rig.talker.do("stream", picture=PICTURE, rate=5.0)
    try:
        rig.talker.do("advertise", topic=topic, type=type, wait=False)
        told = warned(rig, f"/{topic} is published as 'sensor_msgs/msg/{type}'", accepted)
        assert told.isprintable()
        rig.node.wait_log(f"/{topic} is published as", since=line)
    finally:
        rig.talker.do("stop_stream")
        rig.talker.do("withdraw", topic=topic)
