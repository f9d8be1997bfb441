"""Bags of every kind, whole and damaged: what is read of them, and what is said to be lost."""

from __future__ import annotations

import itertools

import cv2
import mcap.writer
import numpy as np
import pytest
import zstandard
from rosbags.rosbag2 import CompressionMode, StoragePlugin

import bags
from bags import START, STEP, TOPIC
from nerve_core.images.encodings import ImageError, to_labels
from nerve_core.replay.frames import (
    Losses,
    Selection,
    Truth,
    camera_names,
    choose_topics,
    read_frames,
    read_vocabulary,
)
from nerve_core.replay.messages import COMPRESSED_IMAGE, IMAGE, STRING, VOCABULARY, typestore
from nerve_core.replay.reading import Bag, BagError
from nerve_core.replay.writing import qos
from nerve_core.text.vocabulary import Vocabulary

COUNT = 40
"""Images of a test's bag: several chunks of mcap, many pages of sqlite3."""
SIZE = {"width": 320, "height": 240}


def read(path, *topics, **selection):
    """The frames of a bag, what was lost of each topic, and the notes."""
    losses = [Losses() for _ in topics or (TOPIC,)]
    with Bag(path) as bag:
        frames = list(read_frames(bag, Selection(topics or (TOPIC,), **selection), losses, None))
        return frames, [dict(one.reasons) for one in losses], list(bag.notes)


def numbers(frames):
    return [(frame.time - START) // STEP for frame in frames]


def assert_are_the_pictures(frames, **size):
    for frame in frames:
        np.testing.assert_array_equal(frame.image, bags.picture((frame.time - START) // STEP, **size))


@pytest.mark.parametrize("make", [bags.raw, bags.compressed])
@pytest.mark.parametrize(
    ("plugin", "compression"),
    [
        (StoragePlugin.MCAP, CompressionMode.NONE),
        (StoragePlugin.MCAP, CompressionMode.STORAGE),
        (StoragePlugin.MCAP, CompressionMode.MESSAGE),
        (StoragePlugin.MCAP, CompressionMode.FILE),
        (StoragePlugin.SQLITE3, CompressionMode.NONE),
        (StoragePlugin.SQLITE3, CompressionMode.MESSAGE),
        (StoragePlugin.SQLITE3, CompressionMode.FILE),
    ],
)
def test_every_image_is_read_as_it_was_recorded(tmp_path, plugin, compression, make):
    bag = bags.write(tmp_path / "bag", bags.film(5, make), plugin=plugin, compression=compression)
    frames, lost, notes = read(bag)
    assert [(frame.time, frame.stamp, frame.frame_id) for frame in frames] == [
        (START + n * STEP, START + n * STEP, "camera") for n in range(5)
    ]
    assert_are_the_pictures(frames)
    assert (lost, notes) == ([{}], [])


def test_a_bag_of_ros_1_is_read(tmp_path):
    frames, lost, notes = read(bags.write_ros1(tmp_path / "old.bag", 5))
    assert numbers(frames) == list(range(5))
    assert_are_the_pictures(frames)
    assert (lost, notes) == ([{}], [])


def test_two_cameras_are_read_in_the_order_of_time(tmp_path):
    left = bags.film(4, topic="/left/image")
    right = [(f"/right{topic[5:]}", time + STEP // 2, made) for topic, time, made in left]
    bag = bags.write(tmp_path / "bag", sorted(left + right, key=lambda one: one[1]))
    frames, _, _ = read(bag, "/right/image", "/left/image")
    assert [frame.camera for frame in frames] == [1, 0] * 4
    assert [frame.time for frame in frames] == sorted(frame.time for frame in frames)


def test_a_part_of_a_bag_can_be_chosen(tmp_path):
    bag = bags.write(tmp_path / "bag", bags.film(20))
    for selection, expected in (
        ({"every": 3, "limit": 4}, [0, 3, 6, 9]),
        ({"start": 0.5}, list(range(5, 20))),
        ({"start": 0.5, "duration": 0.3}, [5, 6, 7]),
        ({"limit": 2}, [0, 1]),
    ):
        assert numbers(read(bag, **selection)[0]) == expected
    with Bag(bag) as opened:
        assert Selection((TOPIC,), every=3).count(opened) == 7
        assert Selection((TOPIC,), limit=2).count(opened) == 2
        assert Selection((TOPIC,), start=1.0).count(opened) is None


@pytest.mark.parametrize("wrong", [{"start": -1.0}, {"duration": 0.0}, {"every": 0}, {"limit": 0}])
def test_a_selection_of_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="accepted"):
        Selection((TOPIC,), **wrong)


def test_the_only_image_topic_need_not_be_named(tmp_path):
    bag = bags.write(tmp_path / "bag", [*bags.film(2), ("/other", START, bags.label_info(["ball"]))])
    with Bag(bag) as opened:
        assert choose_topics(opened, []) == (TOPIC,)
        assert choose_topics(opened, ["camera/image_raw"]) == (TOPIC,)


def test_where_there_are_several_image_topics_or_none_they_are_listed(tmp_path):
    two = bags.write(tmp_path / "two", bags.film(2) + bags.film(3, bags.compressed, "/b"))
    none = bags.write(tmp_path / "none", [("/info", START, bags.label_info(["ball"]))])
    with Bag(two) as bag:
        with pytest.raises(BagError, match=r"/b \(sensor_msgs/msg/CompressedImage, 3\).*--image-topic"):
            choose_topics(bag, [])
        assert choose_topics(bag, [], labels_topic="/b") == (TOPIC,)
        with pytest.raises(BagError, match=f"no topic /front.*{TOPIC}"):
            choose_topics(bag, ["/front"])
    with Bag(none) as bag:
        there = r"no image topic; its topics are /info \(vision_msgs/msg/LabelInfo, 1\)"
        with pytest.raises(BagError, match=f"{there}; accepted: sensor_msgs/msg/Image") as caught:
            choose_topics(bag, [])
        assert "--image-topic" not in str(caught.value)
        with pytest.raises(BagError, match=f"no topic /front; it has {there}"):
            choose_topics(bag, ["/front"])
        with pytest.raises(BagError, match="of type vision_msgs/msg/LabelInfo; accepted: sensor_msgs/msg/Image"):
            choose_topics(bag, ["/info"])


def test_of_very_many_topics_some_are_listed(tmp_path):
    bag = bags.write(tmp_path / "bag", [(f"/info_{n}", START, bags.label_info(["ball"])) for n in range(50)])
    with Bag(bag) as opened, pytest.raises(BagError, match="and 10 more"):
        choose_topics(opened, [])


def test_what_is_given_instead_of_a_bag_is_named(tmp_path):
    bag = bags.write(tmp_path / "bag", bags.film(2))
    with pytest.raises(BagError, match=f"describes a bag; give its folder, {bag}"):
        Bag(bag / "metadata.yaml")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345678\n"
    for name in ("bag.mcap", "metadata.yaml"):
        kept = (bag / name).read_bytes()
        (bag / name).write_text(pointer)
        with pytest.raises(BagError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
            Bag(bag)
        (bag / name).write_bytes(kept)
    for name in ("alone.mcap", "alone.db3", "old.bag", "old.bag.active"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(BagError, match="is a git-lfs pointer"):
            Bag(tmp_path / name)


def test_a_recording_of_ros_1_that_was_not_ended_is_read_or_says_what_mends_it(tmp_path):
    whole = bags.write_ros1(tmp_path / "old.bag", 4)
    active = whole.rename(tmp_path / "old.bag.active")
    assert numbers(read(active)[0]) == list(range(4))
    with pytest.raises(BagError, match=r"of ROS 1 it holds old\.bag\.active: give such a file"):
        Bag(tmp_path)
    bags.cut(active, 0.5)
    with pytest.raises(BagError, match=r"rosbag reindex .*old\.bag\.active, then rosbag fix .*active .*old\.bag$"):
        Bag(active)


def test_results_are_called_after_the_cameras_namespace():
    assert camera_names(["/front/image_raw"]) == ("/front",)
    assert camera_names(["/image"]) == ("",)
    assert camera_names(["/camera/image/compressed", "/back/image"]) == ("/camera", "/back")
    assert camera_names(["/camera/left", "/camera/right/compressed"]) == ("/camera/left", "/camera/right")
    assert camera_names(["/a/image", "/a/image/compressed"]) == ("/a/image", "/a/image/compressed")


# Times

SIM = 12 * 10**9
"""Where the stamps of a simulation begin, in nanoseconds."""
LAST = (2**31 - 1) * 10**9
"""The last second that a stamp can name."""


def timed(tmp_path, times):
    """The seconds of the frames since the first, of (log time, stamp) in nanoseconds each; and the notes."""
    film = [(TOPIC, log, bags.raw(number, stamp)) for number, (log, stamp) in enumerate(times)]
    frames, lost, notes = read(bags.write(tmp_path / "bag", film))
    assert lost == [{}]
    assert [frame.stamp for frame in frames] == [stamp for _, stamp in times]
    return [round((frame.moment - frames[0].moment) * 1e-9, 6) for frame in frames], notes


def log(number):
    return START + number * STEP


@pytest.mark.parametrize(
    ("stamps", "words"),
    [
        ([0] * 6, "the first image of /camera/image_raw has no stamp"),
        ([n * STEP for n in range(6)], "the first image of /camera/image_raw has no stamp"),
        ([0 if n == 3 else SIM + n * STEP for n in range(6)], "1 of 6 images of /camera/image_raw have no stamp"),
        ([SIM + n * STEP if n < 2 else 0 for n in range(6)], "4 of 6 images"),
    ],
    ids=["never", "simulation from zero", "once not", "no more"],
)
def test_the_times_of_a_camera_are_of_one_clock(tmp_path, stamps, words):
    seconds, notes = timed(tmp_path, [(log(n), stamp) for n, stamp in enumerate(stamps)])
    assert seconds == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    (note,) = notes
    assert words in note


def test_stamps_are_the_times_wherever_there_are_any(tmp_path):
    seconds, notes = timed(tmp_path, [(log(n) + n % 2 * 10**7, SIM + n * STEP) for n in range(5)])
    assert (seconds, notes) == ([0.0, 0.1, 0.2, 0.3, 0.4], [])
    overtaken = [(TOPIC, log(number), bags.raw(number, SIM + later)) for number, later in ((0, 9), (1, 5))]
    frames, _, _ = read(bags.write(tmp_path / "overtaken", overtaken))
    assert [frame.moment - SIM for frame in frames] == [9, 5]


@pytest.mark.parametrize(
    ("times", "seconds", "words"),
    [
        (
            [(0, 0), (0, 0), *((log(n), log(n)) for n in range(2, 4))],
            [0.0, 0.0, 0.0, 0.1],
            "jumps once by +1700000000 s before image 3",
        ),
        (
            [(log(n), SIM + n % 3 * STEP * 20) for n in range(8)],
            [0.0, 2.0, 4.0, 4.0, 6.0, 8.0, 8.0, 10.0],
            "jumps 2 times, first by -4 s before image 4",
        ),
        ([(log(0), log(0)), (log(1), LAST), (log(2), LAST + STEP)], [0.0, 0.0, 0.1], "jumps once by +447483647 s"),
    ],
    ids=["no time yet", "played in a loop", "an unset clock"],
)
def test_a_clock_that_jumps_is_noted_and_leaves_the_times_readable(tmp_path, times, seconds, words):
    found, notes = timed(tmp_path, times)
    assert found == seconds
    assert any(words in note for note in notes)


# metadata.yaml that is not of the files beside it

PLUGINS = pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])


@PLUGINS
@pytest.mark.parametrize("folder", ["{}", "bag/{}", "/home/robot/bag/{}"])
def test_a_split_bag_is_read_whatever_folder_its_metadata_puts_before_its_files(tmp_path, plugin, folder):
    film = bags.film(9)
    bag = bags.split(tmp_path / "bag", [film[:3], film[3:6], film[6:]], plugin=plugin)
    info = bags.metadata(bag)
    info["relative_file_paths"] = [folder.format(name) for name in info["relative_file_paths"]]
    frames, lost, notes = read(bags.with_metadata(bag, info))
    assert (numbers(frames), lost, notes) == (list(range(9)), [{}], [])


@PLUGINS
def test_a_bag_begins_with_its_first_message_whatever_its_metadata_says(tmp_path, plugin):
    """As recorders wrote it that took the start of the last part for that of the whole."""
    film = bags.film(9)
    bag = bags.split(tmp_path / "bag", [film[:3], film[3:6], film[6:]], plugin=plugin)
    info = bags.metadata(bag)
    info["starting_time"]["nanoseconds_since_epoch"] = START + 6 * STEP
    info["duration"]["nanoseconds"] = 2 * STEP
    bags.with_metadata(bag, info)
    for selection, expected in (({"start": 0.3}, [3, 4, 5, 6, 7, 8]), ({"duration": 0.3}, [0, 1, 2])):
        frames, _, notes = read(bag, **selection)
        assert numbers(frames) == expected
        assert any("begin 0.600 s after its first message" in note for note in notes)


@PLUGINS
def test_a_storage_file_that_the_metadata_does_not_name_is_noted(tmp_path, plugin):
    film = bags.film(9)
    bag = bags.split(tmp_path / "bag", [film[:3], film[3:6], film[6:]], plugin=plugin)
    info = bags.metadata(bag)
    last = info["relative_file_paths"].pop()
    frames, _, notes = read(bags.with_metadata(bag, info))
    assert numbers(frames) == list(range(6))
    assert any(f"{last} was not read: metadata.yaml does not name it" in note for note in notes)
    (bag / "metadata.yaml").unlink()
    assert numbers(read(bag)[0]) == list(range(9))


def test_the_count_of_images_is_what_the_files_hold(tmp_path):
    film = bags.film(9)
    bag = bags.split(tmp_path / "bag", [film[:3], film[3:]])
    info = bags.metadata(bag)
    info["topics_with_message_count"][0]["message_count"] = 100
    with Bag(bags.with_metadata(bag, info)) as opened:
        assert Selection((TOPIC,)).count(opened) == 9


@PLUGINS
def test_messages_compressed_one_by_one_are_read_where_the_metadata_forgot_it(tmp_path, plugin):
    bag = bags.write(tmp_path / "bag", bags.film(4), plugin=plugin, compression=CompressionMode.MESSAGE)
    frames, lost, _ = read(
        bags.with_metadata(bag, bags.metadata(bag) | {"compression_format": "", "compression_mode": ""})
    )
    assert (numbers(frames), lost) == (list(range(4)), [{}])
    assert_are_the_pictures(frames)


@PLUGINS
def test_a_packed_file_and_what_playing_it_unpacked_beside_it_are_one(tmp_path, plugin):
    bag = bags.write(tmp_path / "bag", bags.film(4), plugin=plugin, compression=CompressionMode.FILE)
    packed = bags.storage(bag)
    packed.with_suffix("").write_bytes(zstandard.ZstdDecompressor().decompressobj().decompress(packed.read_bytes()))
    frames, _, notes = read(bag)
    assert (numbers(frames), notes) == (list(range(4)), [])
    (bag / "metadata.yaml").unlink()
    assert numbers(read(bag)[0]) == list(range(4))


@PLUGINS
def test_files_that_the_metadata_names_in_another_order_are_read_in_the_order_of_time(tmp_path, plugin):
    film = [(topic, time * 20 - 19 * START, made) for topic, time, made in bags.film(9)]  # two seconds apart
    bag = bags.split(tmp_path / "bag", [film[:3], film[3:6], film[6:]], plugin=plugin)
    info = bags.metadata(bag)
    info["relative_file_paths"].reverse()
    frames, _, notes = read(bags.with_metadata(bag, info))
    assert [frame.time for frame in frames] == [time for _, time, _ in film]
    assert any("in another order" in note for note in notes)


@PLUGINS
def test_a_topic_that_the_metadata_describes_otherwise_than_the_file_is_read(tmp_path, plugin):
    bag = bags.write(tmp_path / "bag", bags.film(4), plugin=plugin)
    info = bags.metadata(bag)
    other = bags.metadata(bags.write(tmp_path / "other", bags.film(1), plugin=plugin, qos=qos(latched=True)))
    info["topics_with_message_count"][0]["topic_metadata"]["offered_qos_profiles"] = other["topics_with_message_count"][
        0
    ]["topic_metadata"]["offered_qos_profiles"]
    frames, _, notes = read(bags.with_metadata(bag, info))
    assert numbers(frames) == list(range(4))
    assert any(f"describes {TOPIC} otherwise" in note for note in notes)


def test_the_only_image_topic_need_not_be_named_though_it_has_images_of_two_types(tmp_path):
    bag = bags.write(
        tmp_path / "bag", bags.film(3) + [(t, time + STEP // 2, m) for t, time, m in bags.film(3, bags.compressed)]
    )
    with Bag(bag) as opened:
        assert choose_topics(opened, []) == (TOPIC,)
    frames, lost, _ = read(bag)
    assert ([frame.encoding for frame in frames], lost) == (["rgb8", "compressed"] * 3, [{}])


def test_a_bag_whose_only_images_are_a_video_says_that_videos_are_not_decoded(tmp_path):
    with (tmp_path / "bag.mcap").open("wb") as opened:
        writer = mcap.writer.Writer(opened)
        writer.start("ros2", "a recorder")
        schema = writer.register_schema("foxglove_msgs/msg/CompressedVideo", "ros2msg", b"string format\n")
        channel = writer.register_channel("/camera/video", "cdr", schema)
        writer.add_message(channel, START, bytes(12), START)
        writer.finish()
    with Bag(tmp_path / "bag.mcap") as bag, pytest.raises(BagError, match=r"no image topic.*videos are not decoded"):
        choose_topics(bag, [])


@pytest.mark.parametrize("start", [b"\0\0\0\1\x67", b"\0\0\1\x40\1"])
def test_a_part_of_a_video_in_a_compressed_image_is_named(tmp_path, start):
    data = np.frombuffer(start + bytes(40), np.uint8)
    made = COMPRESSED_IMAGE, typestore().types[COMPRESSED_IMAGE](bags.header(START), "h264", data)
    _, lost, _ = read(bags.write(tmp_path / "bag", [(TOPIC, START, made)]))
    (reason,) = lost[0]
    assert "a part of a video (H.264 or H.265), neither JPEG nor PNG" in reason


# Damage


@PLUGINS
def test_a_packed_file_that_is_cut_off_gives_its_beginning_and_says_so(tmp_path, plugin):
    bag = bags.write(tmp_path / "bag", bags.film(COUNT, **SIZE), plugin=plugin, compression=CompressionMode.FILE)
    bags.cut(bags.storage(bag), 0.6)
    frames, _, notes = read(bag)
    assert numbers(frames) == list(range(len(frames)))
    assert COUNT // 4 < len(frames) < COUNT
    assert any(".zstd is cut off" in note for note in notes)


def mcap_bag(tmp_path, compression=CompressionMode.NONE):
    return bags.write(tmp_path / "bag", bags.film(COUNT, **SIZE), compression=compression)


def test_an_mcap_file_that_is_cut_off_gives_its_beginning(tmp_path):
    bag = mcap_bag(tmp_path)
    whole = bags.storage(bag).read_bytes()
    got = []
    for share in (0.2, 0.5, 0.9):
        bags.storage(bag).write_bytes(whole[: int(len(whole) * share)])
        frames, _, notes = read(bag)
        assert numbers(frames) == list(range(len(frames)))
        assert_are_the_pictures(frames, **SIZE)
        assert any("cannot be read beyond byte" in note for note in notes)
        got.append(len(frames))
    assert got[0] > 0
    # All but what was in the chunk that is cut.
    assert all(COUNT * share - 6 <= count <= COUNT * share for count, share in zip(got, (0.2, 0.5, 0.9), strict=True))


def test_an_mcap_file_without_index_is_read_whole(tmp_path):
    bag = mcap_bag(tmp_path, CompressionMode.STORAGE)
    bags.without_summary(bags.storage(bag))
    frames, lost, _ = read(bag)
    assert numbers(frames) == list(range(COUNT))
    assert lost == [{}]


def test_a_damaged_chunk_costs_its_own_images_alone(tmp_path):
    bag = mcap_bag(tmp_path)
    file = bags.storage(bag)
    bags.with_checksums(file)
    data = bytearray(file.read_bytes())
    place = len(data) // 2
    data[place : place + 40] = bytes(40)
    file.write_bytes(bytes(data))
    frames, _, notes = read(bag)
    assert COUNT - 6 <= len(frames) < COUNT
    assert {0, COUNT - 1} <= set(numbers(frames))
    assert numbers(frames) == sorted(set(numbers(frames)))
    assert_are_the_pictures(frames, **SIZE)
    assert any("damaged" in note for note in notes)


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
@pytest.mark.parametrize("compression", [CompressionMode.NONE, CompressionMode.MESSAGE, CompressionMode.FILE])
def test_a_bag_without_metadata_is_read_from_its_files(tmp_path, plugin, compression):
    bag = bags.write(tmp_path / "bag", bags.film(6), plugin=plugin, compression=compression)
    (bag / "metadata.yaml").unlink()
    frames, _, notes = read(bag)
    assert numbers(frames) == list(range(6))
    assert_are_the_pictures(frames)
    assert any("cannot be opened as a whole" in note for note in notes)


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
@pytest.mark.parametrize("compression", [CompressionMode.NONE, CompressionMode.MESSAGE, CompressionMode.FILE])
def test_what_is_salvaged_comes_in_the_order_of_time_whatever_the_order_of_the_file(tmp_path, plugin, compression):
    """Several chunks, and rows of a recorder that wrote its topics one after the other."""
    film = bags.film(COUNT, **SIZE)
    shuffled = [film[number] for number in np.random.default_rng(3).permutation(COUNT)]
    bag = bags.write(tmp_path / "bag", shuffled, plugin=plugin, compression=compression)
    (bag / "metadata.yaml").unlink()
    if plugin == StoragePlugin.MCAP and compression == CompressionMode.NONE:
        bags.without_summary(bags.storage(bag))
    frames, lost, _ = read(bag)
    assert numbers(frames) == list(range(COUNT))
    assert_are_the_pictures(frames, **SIZE)
    assert lost == [{}]


def test_what_is_salvaged_of_several_files_comes_in_the_order_of_time(tmp_path):
    film = bags.film(8)
    bag, other = bags.write(tmp_path / "bag", film[::2]), bags.write(tmp_path / "other", film[1::2])
    bags.storage(other).rename(bag / "bag_1.mcap")
    (bag / "metadata.yaml").unlink()
    assert numbers(read(bag)[0]) == list(range(8))


def test_a_sqlite_file_that_is_cut_off_gives_its_beginning(tmp_path):
    bag = bags.write(tmp_path / "bag", bags.film(COUNT, **SIZE), plugin=StoragePlugin.SQLITE3)
    whole = bags.storage(bag).read_bytes()
    for share in (0.3, 0.8):
        bags.storage(bag).write_bytes(whole[: int(len(whole) * share)])
        frames, _, notes = read(bag)
        assert COUNT * share - 4 <= len(frames) <= COUNT * share
        assert_are_the_pictures(frames, **SIZE)
        assert any("cannot be read beyond its message" in note for note in notes)


@pytest.mark.parametrize("suffix", [".mcap", ".db3"])
def test_a_bag_of_which_nothing_can_be_read_says_so(tmp_path, suffix):
    bag = tmp_path / "bag"
    bag.mkdir()
    (bag / f"bag_0{suffix}").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(BagError, match="no message that could be read"):
        Bag(bag)
    (bag / f"bag_0{suffix}").unlink()
    with pytest.raises(BagError, match=r"holds no \.mcap or \.db3 file"):
        Bag(bag)
    with pytest.raises(BagError, match="there is no bag"):
        Bag(tmp_path / "elsewhere")


def test_a_damaged_ros_1_bag_says_what_mends_it(tmp_path):
    bag = bags.write_ros1(tmp_path / "old.bag", 5)
    bags.cut(bag, 0.5)
    with pytest.raises(BagError, match="rosbag reindex"):
        Bag(bag)


def test_a_split_bag_of_which_a_file_is_missing_gives_the_others(tmp_path):
    bag = bags.write(tmp_path / "bag", bags.film(4))
    metadata = (bag / "metadata.yaml").read_text()
    (bag / "metadata.yaml").write_text(metadata.replace("- bag.mcap", "- bag.mcap\n  - bag_1.mcap"))
    frames, _, notes = read(bag)
    assert numbers(frames) == list(range(4))
    assert any("bag_1.mcap is missing" in note for note in notes)


def test_an_empty_bag_has_no_image_topic(tmp_path):
    bag = bags.write(tmp_path / "bag", [])
    with Bag(bag) as opened, pytest.raises(BagError, match="no image topic"):
        choose_topics(opened, [])


def test_what_cannot_be_read_is_counted_by_its_reason_and_the_rest_is_read(tmp_path):
    film = bags.film(8)
    film[1] = (TOPIC, film[1][1], bags.raw(1, film[1][1], encoding="32FC1"))
    kind, message = bags.compressed(3, film[3][1])
    message.data = message.data[: len(message.data) // 2]
    film[3] = (TOPIC, film[3][1], (kind, message))
    film[5] = (TOPIC, film[5][1], (IMAGE, b"\0\1\0\0short"))
    film[6] = (TOPIC, film[6][1], bags.label_info(["ball"]))
    frames, (lost,), _ = read(bags.write(tmp_path / "bag", film))
    assert numbers(frames) == [0, 2, 4, 7]
    assert sum(lost.values()) == 4
    for part in ("'32FC1' cannot be read", "cut off", "cannot be deserialised", "of type vision_msgs/msg/LabelInfo"):
        assert any(part in reason for reason in lost)


def test_encodings_may_change_on_the_way(tmp_path):
    film = [
        (TOPIC, START + n * STEP, make(n, START + n * STEP, **options))
        for n, (make, options) in enumerate(
            [(bags.raw, {}), (bags.raw, {"encoding": "bgr8"}), (bags.compressed, {}), (bags.raw, {"encoding": "mono8"})]
        )
    ]
    frames, lost, _ = read(bags.write(tmp_path / "bag", film))
    assert [frame.encoding for frame in frames] == ["rgb8", "bgr8", "compressed", "mono8"]
    assert_are_the_pictures(frames[:3])
    assert lost == [{}]


def test_values_of_12_bits_in_images_of_16_fill_the_range_and_are_noted(tmp_path):
    make = typestore().types[IMAGE]
    film = []
    for number in range(3):
        values = np.round(bags.picture(number).astype(np.float32) * (4095 / 255)).astype("<u2")
        values[0, 0] = 4095
        data = values.view(np.uint8).reshape(-1)
        time = START + number * STEP
        film.append((TOPIC, time, (IMAGE, make(bags.header(time), 48, 64, "rgb16", 0, 384, data))))
    frames, lost, notes = read(bags.write(tmp_path / "bag", film))
    assert lost == [{}]
    for number, frame in enumerate(frames):
        assert np.abs(frame.image.astype(int) - bags.picture(number))[1:].max() <= 1
    assert notes == [f"{TOPIC}: no value above 4095 in images of 16 bits so far: 4095 (12 bits) is taken as white"]


def test_ever_new_reasons_are_counted_together_at_last():
    losses = Losses()
    for number in range(100):
        losses.add(f"reason {number}")
    assert len(losses.reasons) == 21
    assert losses.reasons["other reasons"] == 80


# Labels and names


def labelled(tmp_path, planes, names=("ball", "Mug", "tree"), shift=0):
    """A bag of images and labels; shift: how much later a label is in the bag than its image."""
    messages = [("/labels/label_info", START, bags.label_info(names)), *bags.film(len(planes))]
    for number, plane in enumerate(planes):
        time = START + number * STEP
        messages.append(("/labels/image", time + shift, bags.labels(plane, time)))
    return bags.write(tmp_path / "bag", sorted(messages, key=lambda one: one[1]))


@pytest.mark.parametrize("shift", [-STEP, 0, 5 * STEP])
def test_labels_are_found_by_stamp_and_taken_by_name(tmp_path, shift):
    planes = [np.full((48, 64), number % 5, np.uint8) for number in range(8)]
    bag = labelled(tmp_path, planes, shift=shift)
    vocabulary = Vocabulary(["cup|MUG", "ball", "ladder"])
    truth = Truth(bag, "labels/image", vocabulary)
    with Bag(bag) as opened:
        frames = list(read_frames(opened, Selection((TOPIC,)), [Losses()], truth))
    truth.close()
    # background, ball, Mug (a synonym), tree (not asked for), 4 (without a name)
    assert [int(frame.truth[0, 0]) for frame in frames] == [(0, 2, 1, 255, 255)[number % 5] for number in range(8)]
    assert truth.notes[0].endswith("ignored: tree")
    assert truth.notes[1].endswith("wrong wherever they win: ladder")


def test_labels_that_are_missing_or_of_another_size_are_no_truth(tmp_path):
    bag = labelled(tmp_path, [np.zeros((48, 64), np.uint8), np.zeros((24, 32), np.uint8)])
    truth = Truth(bag, "/labels/image", Vocabulary(["ball"]))
    assert truth.at(START, START, (48, 64)) is not None
    assert truth.at(START + STEP, START + STEP, (48, 64)) is None
    assert truth.at(START + STEP // 2, START + STEP, (48, 64)) is None
    assert truth.at(0, START + STEP, (48, 64)) is None
    assert dict(truth.losses.reasons) == {
        "labels are 32 x 24, the image is 64 x 48": 1,
        "labels: the image has no stamp, by which they are found": 1,
    }
    truth.close()


def test_labels_without_names_are_refused(tmp_path):
    bag = bags.write(tmp_path / "bag", bags.film(2) + bags.film(2, topic="/labels", encoding="mono8"))
    with pytest.raises(BagError, match="which label is which name"):
        Truth(bag, "/labels", Vocabulary(["ball"]))


def test_labels_come_in_one_number_a_pixel():
    plane = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)
    make = typestore().types[IMAGE]
    for order, big in (("<u2", 0), (">u2", 1)):
        data = plane.astype(order).view(np.uint8).reshape(-1)
        np.testing.assert_array_equal(to_labels(make(bags.header(START), 48, 64, "16UC1", big, 128, data)), plane)
    _, png = bags.compressed(0, START)
    png.data = cv2.imencode(".png", plane)[1].ravel()
    np.testing.assert_array_equal(to_labels(png), plane)
    for wrong in (bags.raw(0, START)[1], bags.compressed(0, START)[1]):
        with pytest.raises(ImageError, match="accepted"):
            to_labels(wrong)


def test_names_can_be_those_of_a_topic(tmp_path):
    types = typestore().types
    said = types[STRING]("ball, mug|cup")
    asked = types[VOCABULARY](bags.header(START), ["ball", "mug|cup"])
    rows = [("/text", START, (STRING, said)), ("/vocabulary", START, (VOCABULARY, asked))]
    rows += [("/label_info", START, bags.label_info(["ball", "mug"])), ("/nothing", START, (STRING, types[STRING]("")))]
    with Bag(bags.write(tmp_path / "bag", rows)) as bag:
        for topic in ("text", "/vocabulary"):
            assert read_vocabulary(bag, topic) == Vocabulary(["ball", "mug|cup"])
        assert read_vocabulary(bag, "/label_info") == Vocabulary(["ball", "mug"])
        for topic, text in (("/nothing", "names anything"), ("/no", "is not in"), ("/label_info ", "is not in")):
            with pytest.raises(BagError, match=text):
                read_vocabulary(bag, topic)


def test_a_bag_is_read_to_its_end_wherever_it_is_damaged(tmp_path):
    """Nothing but BagError comes of any damage, and what is read is right."""
    bag = mcap_bag(tmp_path)
    file = bags.storage(bag)
    bags.with_checksums(file)
    whole = file.read_bytes()
    rng = np.random.default_rng(5)
    for place, damage in itertools.product(rng.integers(0, len(whole), 12), (b"\xff" * 9, bytes(30))):
        data = bytearray(whole)
        data[place : place + len(damage)] = damage
        file.write_bytes(bytes(data))
        try:
            frames, _, _ = read(bag)
        except BagError:
            continue
        assert numbers(frames) == sorted(set(numbers(frames)))
        assert_are_the_pictures(frames, **SIZE)
