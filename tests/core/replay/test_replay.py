"""The offline replay: what it writes, in which order, what it measures, and how it ends when something goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from rosbags.highlevel import AnyReader

import bags
from bags import START, STEP, TOPIC
from nerve_core.output import OutputError
from nerve_core.replay import run as run_module
from nerve_core.replay import video as video_module
from nerve_core.replay.frames import Frame, Selection
from nerve_core.replay.measures import Measures, Steadiness
from nerve_core.replay.messages import CLASS_CONFIDENCES, IMAGE, LABEL_INFO
from nerve_core.replay.reading import BagError
from nerve_core.replay.run import claim_results, replay
from nerve_core.replay.threads import DEPTH, Ahead, Behind
from nerve_core.replay.video import OverlayVideo
from nerve_core.replay.writing import ResultBag
from nerve_core.report import read_report, write_report
from nerve_core.segmenter import Segmentation, Segmenter
from nerve_core.text.vocabulary import Vocabulary
from results_schema import assert_fits, parse, printed, unnoticed

VOCABULARY = Vocabulary(["ball", "mug|cup", "ladder"])
PATIENCE = 120.0


@pytest.fixture(scope="module")
def segmenter(whole_pair, tmp_path_factory) -> Segmenter:
    cache = str(tmp_path_factory.mktemp("cache"))
    return Segmenter.from_pretrained(str(whole_pair), device="cpu", cache_dir=cache, offline=True)


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    return bags.write(tmp_path_factory.mktemp("bags") / "film", bags.film(6))


@pytest.fixture(scope="module")
def done(bag, segmenter, tmp_path_factory):
    out = tmp_path_factory.mktemp("done")
    return out, replay(bag, Selection((TOPIC,)), segmenter, VOCABULARY, out)


def messages(bag: Path) -> dict[tuple[str, str], list]:
    """(log time, message) of every topic and type, by the definitions in the bag itself."""
    found: dict[tuple[str, str], list] = {}
    with AnyReader([bag]) as reader:
        for connection, time, raw in reader.messages():
            message = reader.deserialize(raw, connection.msgtype)
            found.setdefault((connection.topic, connection.msgtype), []).append((time, message))
    return found


# What is written


def test_the_bag_holds_what_the_node_would_publish_under_the_images_own_headers(done, segmenter):
    out, _ = done
    found = messages(out / "bag")
    base = "/camera/segmentation"
    assert {key: len(rows) for key, rows in found.items()} == {
        (f"{base}/label_info", LABEL_INFO): 1,
        (f"{base}/mask", IMAGE): 6,
        (f"{base}/confidence", IMAGE): 6,
        (f"{base}/class_confidence", CLASS_CONFIDENCES): 6,
    }
    ((time, info),) = found[f"{base}/label_info", LABEL_INFO]
    assert time == START
    expected = [(0, "background"), (1, "ball"), (2, "mug"), (3, "ladder")]
    assert [(entry.class_id, entry.class_name) for entry in info.class_map] == expected
    assert info.threshold == pytest.approx(segmenter.settings.readout.threshold)
    for number in range(6):
        seen = segmenter(bags.picture(number), VOCABULARY)
        for (topic, kind), rows in found.items():
            if kind != LABEL_INFO:
                time, message = rows[number]
                assert time == START + number * STEP
                assert message.header.stamp.sec * 10**9 + message.header.stamp.nanosec == time
                assert message.header.frame_id == "camera"
            if kind == IMAGE:
                assert (message.height, message.width, message.step, message.encoding) == (48, 64, 64, "mono8")
                plane = seen.labels if topic.endswith("mask") else seen.confidence_u8
                np.testing.assert_array_equal(message.data.reshape(48, 64), plane)
        _, classes = found[f"{base}/class_confidence", CLASS_CONFIDENCES][number]
        assert [(one.name, one.id) for one in classes.classes] == [("ball", 1), ("mug", 2), ("ladder", 3)]
        for one, theirs in zip(classes.classes, seen.class_confidence, strict=True):
            assert one.area == theirs.area == int((seen.labels == one.id).sum())
            assert one.presence == pytest.approx(theirs.presence)
            assert (one.box.x_offset, one.box.width) == ((theirs.box[0], theirs.box[2]) if theirs.box else (0, 0))
            assert np.isnan(one.centroid_x) == (theirs.centroid is None)


def test_who_subscribes_late_to_a_played_bag_gets_the_labels_names(done):
    out, _ = done
    with AnyReader([out / "bag"]) as reader:
        kept = {
            one.topic.rpartition("/")[2]: one.ext.offered_qos_profiles[0].durability.name for one in reader.connections
        }
    assert kept.pop("label_info") == "TRANSIENT_LOCAL"
    assert set(kept.values()) == {"VOLATILE"}


def test_other_readers_of_mcap_find_definitions_and_messages_in_the_order_of_time(done):
    """What Foxglove and `ros2 bag play` go by: schemas that hold every type they name, an index, statistics."""
    from mcap.reader import make_reader

    out, _ = done
    with (out / "bag" / "bag.mcap").open("rb") as file:
        reader = make_reader(file)
        summary = reader.get_summary()
        times = [message.log_time for _, _, message in reader.iter_messages()]
    assert (times, len(times)) == (sorted(times), summary.statistics.message_count)
    kinds = {schema.name: schema for schema in summary.schemas.values()}
    assert set(kinds) == {IMAGE, LABEL_INFO, CLASS_CONFIDENCES}
    assert {schema.encoding for schema in kinds.values()} == {"ros2msg"}
    definitions = kinds[CLASS_CONFIDENCES].data.decode()
    for needed in ("nerve_ros/ClassConfidence", "sensor_msgs/RegionOfInterest", "std_msgs/Header"):
        assert f"MSG: {needed}\n" in definitions
    assert "float32 presence" in definitions
    assert {channel.message_encoding for channel in summary.channels.values()} == {"cdr"}
    assert {chunk.compression for chunk in summary.chunk_indexes} == {"zstd"}


def test_the_report_says_what_was_seen(done, bag):
    out, replayed = done
    assert (replayed.frames, replayed.interrupted) == (6, False)
    report = replayed.report
    (camera,) = report.cameras
    assert (report.kind, report.bag, report.source) == ("replay", "bag", str(bag))
    assert (camera.topic, camera.size, camera.frames, camera.lost) == (TOPIC, (64, 48), 6, {})
    assert camera.times == pytest.approx([0.1 * number for number in range(6)])
    assert [(name.name, name.label) for name in camera.names] == [("ball", 1), ("mug", 2), ("ladder", 3)]
    for name in camera.names:
        assert len(name.presence) == len(name.area) == len(name.confidence) == 6
        assert sum(name.histogram) == round(sum(name.area) * 48 * 64)
    assert camera.frames_per_second == pytest.approx(6 / replayed.wall_seconds)
    assert camera.score is None
    assert 1 <= len(camera.pictures) <= 6
    assert all((out / part).is_file() for picture in camera.pictures for part in (picture.image, picture.overlay))


def test_the_report_can_be_written_and_read_back(done):
    out, replayed = done
    assert write_report(replayed.report, out).is_file()
    assert read_report(out) == replayed.report


def test_the_video_shows_every_image_at_its_time(done):
    out, replayed = done
    capture = cv2.VideoCapture(str(out / replayed.report.cameras[0].video))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10.0, rel=0.01)
    count = 0
    while capture.read()[0]:
        count += 1
    assert count == 6


def test_a_hole_in_the_recording_is_one_in_the_video_too(tmp_path):
    made = OverlayVideo(tmp_path / "film.webm")
    for number in (0, 1, 2, 8, 9, 500, 501):
        image = bags.picture(number)
        made.take(frame_of(image, number * 0.1), segmentation(np.zeros(image.shape[:2], np.uint8)))
    assert made.close()
    capture, count = cv2.VideoCapture(str(tmp_path / "film.webm")), 0
    while capture.read()[0]:
        count += 1
    assert count == 9 + 20 + 2  # the long hole is two seconds


def test_a_video_without_a_codec_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "_CODEC", "none")
    made = OverlayVideo(tmp_path / "film.webm")
    made.take(frame_of(bags.picture(0), 0.0), segmentation(np.zeros((48, 64), np.uint8)))
    with pytest.raises(RuntimeError, match="--no-video"):
        made.close()


def test_two_cameras_get_results_of_their_own(tmp_path, segmenter):
    rows = bags.film(3, topic="/left/image") + bags.film(3, bags.compressed, topic="/right/image/compressed", width=32)
    bag = bags.write(tmp_path / "bag", sorted(rows, key=lambda one: one[1]))
    topics = ("/left/image", "/right/image/compressed")
    replayed = replay(bag, Selection(topics), segmenter, VOCABULARY, tmp_path / "out")
    found = messages(tmp_path / "out" / "bag")
    for side in ("left", "right"):
        assert len(found[f"/{side}/segmentation/mask", IMAGE]) == 3
        assert len(found[f"/{side}/segmentation/label_info", LABEL_INFO]) == 1
    assert {message.width for _, message in found["/right/segmentation/mask", IMAGE]} == {32}
    assert [(camera.frames, camera.video) for camera in replayed.report.cameras] == [
        (3, "left.webm"),
        (3, "right.webm"),
    ]


def test_bag_and_video_can_be_left_out(bag, segmenter, tmp_path):
    replayed = replay(bag, Selection((TOPIC,), limit=2), segmenter, VOCABULARY, tmp_path, bag=False, video=False)
    assert replayed.report.bag == replayed.report.cameras[0].video == ""
    assert {path.name for path in tmp_path.iterdir()} == {"pictures"}


def test_masks_are_scored_by_the_labels_of_the_bag(tmp_path, segmenter):
    names = [*VOCABULARY.names, "tree"]
    truths = [segmenter(bags.picture(number), VOCABULARY).labels for number in range(4)]
    truths[1] = np.full_like(truths[1], 4)  # tree: not asked for, ignored
    wrong = truths[2].copy()
    wrong[:10] = (wrong[:10] + 1) % 4
    rows = [("/labels/label_info", START, bags.label_info(names)), *bags.film(4)]
    for number, plane in enumerate((truths[0], truths[1], wrong, truths[3])):
        rows.append(("/labels/image", START + number * STEP, bags.labels(plane, START + number * STEP)))
    bag = bags.write(tmp_path / "bag", sorted(rows, key=lambda one: one[1]))
    replayed = replay(
        bag, Selection((TOPIC,)), segmenter, VOCABULARY, tmp_path / "out", labels_topic="/labels/image", video=False
    )
    score = replayed.report.cameras[0].score
    assert score.images == 4
    assert score.pixel_accuracy == pytest.approx(1 - 10 * 64 / (3 * 48 * 64))
    assert any(note.endswith("ignored: tree") for note in replayed.report.notes)


def test_damage_is_told_in_the_report(tmp_path, segmenter):
    bag = bags.write(tmp_path / "bag", bags.film(30, width=320, height=240))
    bags.cut(bags.storage(bag), 0.4)
    replayed = replay(bag, Selection((TOPIC,)), segmenter, VOCABULARY, tmp_path / "out", video=False)
    assert 0 < replayed.frames < 30
    assert any("cannot be read beyond byte" in note for note in replayed.report.notes)


def test_a_bag_without_a_single_readable_image_is_an_error_that_says_why(tmp_path, segmenter):
    bag = bags.write(tmp_path / "bag", bags.film(3, encoding="32FC1"))
    with pytest.raises(BagError, match="3 x encoding '32FC1' cannot be read"):
        replay(bag, Selection((TOPIC,)), segmenter, VOCABULARY, tmp_path / "out")


@pytest.mark.parametrize(
    ("topics", "options", "text"),
    [
        ((TOPIC, "/b"), {"labels_topic": "/labels"}, "one image topic"),
        ((TOPIC,), {"vocabulary": Vocabulary()}, "no name"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(bag, segmenter, tmp_path, topics, options, text):
    vocabulary = options.pop("vocabulary", VOCABULARY)
    with pytest.raises(ValueError, match=text):
        replay(bag, Selection(topics), segmenter, vocabulary, tmp_path, **options)


def test_masks_that_start_from_the_image_before_are_of_one_camera(bag, segmenter, tmp_path, monkeypatch):
    settings = segmenter.settings
    walk = dataclasses.replace(settings.walk, previous_frame_start=True)
    monkeypatch.setattr(segmenter, "settings", dataclasses.replace(settings, walk=walk))
    with pytest.raises(ValueError, match="one camera at a time"):
        replay(bag, Selection((TOPIC, "/b")), segmenter, VOCABULARY, tmp_path)


def test_results_are_never_written_over(bag, segmenter, tmp_path):
    (tmp_path / "bag").mkdir()
    (tmp_path / "bag" / "film.mcap").write_text("mine")
    with pytest.raises(OutputError, match=r"film\.mcap would be replaced"):
        replay(bag, Selection((TOPIC,)), segmenter, VOCABULARY, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bag"]
    assert (tmp_path / "bag" / "film.mcap").read_text() == "mine"


def test_its_own_results_are_replaced(bag, segmenter, tmp_path):
    for limit in (2, 1):
        write_report(replay(bag, Selection((TOPIC,), limit=limit), segmenter, VOCABULARY, tmp_path).report, tmp_path)
        assert len(messages(tmp_path / "bag")["/camera/segmentation/mask", IMAGE]) == limit


def test_what_is_not_ours_is_refused_before_a_replay_begins(tmp_path):
    chosen = {"bag": True, "video": True, "scored": False}
    for name in ("report.html", "results.json", "frames.csv", "camera.webm", "node.log", "bag/bag.mcap"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(OutputError, match=f"{path.name} would be replaced"):
            claim_results(tmp_path, (TOPIC,), log="node.log", **chosen)
        path.unlink()
    (tmp_path / "scores.csv").write_text("mine")
    claim_results(tmp_path, (TOPIC,), log="node.log", **chosen)
    claim_results(tmp_path, (TOPIC,), **{**chosen, "scored": True}, overwrite=True)


def test_a_disk_that_is_full_leaves_no_half_bag_and_no_half_video(bag, segmenter, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        for part in ("bag", "video"):
            chosen = {"bag": part == "bag", "video": part == "video"}
            with pytest.raises((OutputError, RuntimeError), match=r"/bag/bag cannot be written, File too large|webm"):
                replay(bag, Selection((TOPIC,)), segmenter, VOCABULARY, tmp_path / part, **chosen)
            assert list((tmp_path / part).iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# How it ends


def test_an_interrupt_leaves_a_whole_bag_and_a_report_of_what_was_done(bag, segmenter, tmp_path):
    def interrupt(frame, found):
        if frame.time == START + 2 * STEP:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(PATIENCE)  # until it comes

    before = threading.active_count()
    replayed = replay(bag, Selection((TOPIC,)), segmenter, VOCABULARY, tmp_path, seen=interrupt)
    assert threading.active_count() == before
    assert (replayed.frames, replayed.interrupted) == (3, True)
    assert any("interrupted after 3 images" in note for note in replayed.report.notes)
    assert len(messages(tmp_path / "bag")["/camera/segmentation/mask", IMAGE]) == 3
    assert cv2.VideoCapture(str(tmp_path / "camera.webm")).read()[0]


def test_a_writer_that_fails_ends_the_replay_with_its_error(bag, segmenter, tmp_path, monkeypatch):
    real = ResultBag.take

    def full(self, frame, found):
        if frame.time == START + 2 * STEP:
            raise OSError(28, "No space left on device")
        real(self, frame, found)

    monkeypatch.setattr(ResultBag, "take", full)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        replay(bag, Selection((TOPIC,)), segmenter, VOCABULARY, tmp_path)
    assert threading.active_count() == before
    assert len(messages(tmp_path / "bag")["/camera/segmentation/mask", IMAGE]) == 2


def test_a_measure_that_fails_ends_it_too_and_the_bag_is_whole(bag, segmenter, tmp_path, monkeypatch):
    monkeypatch.setattr(Measures, "take", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replay(bag, Selection((TOPIC,)), segmenter, VOCABULARY, tmp_path)
    messages(tmp_path / "bag")


def test_a_segmenter_that_fails_ends_it_and_the_bag_is_whole(bag, segmenter, tmp_path, monkeypatch):
    def fails(self, image, queries):
        raise RuntimeError("the networks' values overflow")

    monkeypatch.setattr(Segmenter, "__call__", fails)
    with pytest.raises(RuntimeError, match="overflow"):
        replay(bag, Selection((TOPIC,)), segmenter, VOCABULARY, tmp_path)
    with AnyReader([tmp_path / "bag"]) as reader:
        assert reader.message_count == 0


def test_what_runs_ahead_keeps_its_order_and_waits_when_it_is_far_enough():
    given = []

    def items():
        for number in range(50):
            given.append(number)
            yield number

    ahead = Ahead(items())
    for number in ahead:
        assert number <= given[-1] <= number + DEPTH + 1
    assert given == list(range(50))
    ahead.close()


def test_what_runs_ahead_raises_where_its_turn_comes_and_stops_when_closed():
    def items():
        yield 1
        raise ValueError("the second")

    ahead, got = Ahead(items()), []
    with pytest.raises(ValueError, match="the second"):
        got.extend(ahead)
    assert got == [1]
    endless = Ahead(iter(int, 1))
    endless.close()


def test_what_runs_behind_keeps_its_order_is_bounded_and_finishes():
    taken, go = [], threading.Event()

    def take(number):
        assert go.wait(PATIENCE)
        taken.append(number)

    behind = Behind(take)
    for number in range(DEPTH):
        behind.put(number)
    filler = threading.Thread(target=lambda: [behind.put(number) for number in range(DEPTH, 40)])
    filler.start()
    filler.join(0.3)
    assert filler.is_alive()  # the queue cannot hold them all
    go.set()
    filler.join(PATIENCE)
    behind.close()
    assert taken == list(range(40))


# Figures


def frame_of(image: np.ndarray, seconds: float) -> Frame:
    moment = START + round(seconds * 1e9)
    return Frame(0, moment, moment, moment, "camera", image, "rgb8")


def segmentation(labels: np.ndarray, names: tuple[str, ...] = ("ball",)) -> Segmentation:
    return Segmentation(labels, np.full(labels.shape, 200, np.uint8), names, (), {"total": 1.0})


def texture(rows: int = 120, columns: int = 400) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), np.uint8)
    blurred = cv2.GaussianBlur(noise, (0, 0), 3).astype(np.float32)
    return np.clip((blurred - 128) * 6 + 128, 0, 255).astype(np.uint8)


def test_flicker_on_a_still_image_is_changes_per_pixel_and_second():
    image = texture(96, 128)
    steady = Steadiness()
    for number in range(11):
        labels = np.zeros((96, 128), np.uint8)
        labels[:, : 32 if number % 2 else 0] = 1  # a quarter of the pixels, ten times a second
        steady.add(number * 0.1, image, labels)
    assert steady.static_share == 1.0
    assert steady.static == pytest.approx(0.25 * 10)
    assert steady.warped == pytest.approx(0.25 * 10, rel=0.01)


def test_labels_that_go_with_a_moving_image_do_not_flicker_along_the_flow():
    film = texture()
    truth = (cv2.GaussianBlur(film[..., 0], (0, 0), 9) > 128).astype(np.uint8)
    moving, shaking = Steadiness(), Steadiness()
    rng = np.random.default_rng(1)
    for number in range(12):
        view = slice(5 * number, 5 * number + 300)
        labels = np.ascontiguousarray(truth[:, view])
        moving.add(number * 0.1, film[:, view].copy(), labels)
        shaking.add(number * 0.1, film[:, view].copy(), labels ^ (rng.random(labels.shape) < 0.1))
    assert moving.static_share < 0.1
    assert moving.warped < 0.25  # a pixel's breadth along the borders, ten times a second
    # Two independent tenths differ in 2 * 0.1 * 0.9 of the pixels.
    assert shaking.warped == pytest.approx(1.8, abs=0.25)
    assert shaking.warped > 5 * moving.warped


def test_what_was_hidden_before_is_not_compared():
    before = texture(240, 320)
    now = before.copy()
    now[:, 160:] = texture(240, 480)[:, 320:]  # nothing of it was there
    steady = Steadiness()
    steady.add(0.0, before, np.zeros((240, 320), np.uint8))
    steady.add(0.1, now, np.repeat(np.array([[0, 1]], np.uint8), 160, axis=1).repeat(240, axis=0))
    # Half of all pixels changed, within a tenth of a second: 5, were they compared.
    assert steady.warped < 2.5


def test_what_is_still_is_not_confused_by_a_cameras_noise():
    rng = np.random.default_rng(2)
    image = texture(240, 320).astype(np.float32) * 0.8 + 20
    steady = Steadiness()
    for number in range(4):
        noisy = np.clip(image + rng.normal(0, 2.5, image.shape), 0, 255).astype(np.uint8)
        steady.add(number * 0.1, noisy, np.zeros((240, 320), np.uint8))
    assert steady.static_share > 0.95


def test_frames_that_cannot_be_compared_are_left_out():
    labels = np.zeros((48, 64), np.uint8)
    for times in ((0.0,), (0.0, 1.5), (1.0, 1.0), (1.0, 0.5)):
        steady = Steadiness()
        for seconds in times:
            steady.add(seconds, bags.picture(0), labels)
        assert (steady.static, steady.warped, steady.static_share) == (None, None, None)
    steady = Steadiness()
    steady.add(0.0, bags.picture(0), labels)
    steady.add(0.1, bags.picture(0, 32, 24), labels[:24, :32])
    assert steady.warped is None


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (15, 15), (16, 16), (1, 500)])
def test_the_smallest_images_are_measured_as_far_as_they_go(size):
    steady = Steadiness()
    for number in range(3):
        steady.add(0.1 * number, bags.picture(number, size[1], size[0]), np.full(size, number, np.uint8))


def test_histograms_count_every_pixel_of_a_name_by_its_confidence():
    names = ("ball", "mug")
    measures = Measures(names)
    labels = np.array([[0, 1, 1, 2], [255, 1, 2, 2]], np.uint8)
    confidence = np.array([[9, 0, 7, 8], [255, 255, 100, 103]], np.uint8)
    for number in range(2):
        found = Segmentation(labels, confidence, names, (), {})
        measures.take(frame_of(np.zeros((2, 4, 3), np.uint8), 0.1 * number), dataclasses.replace(found))
    ball, mug = (measures._histograms[label] for label in (1, 2))
    assert {place: count for place, count in enumerate(ball) if count} == {0: 4, 31: 2}
    assert {place: count for place, count in enumerate(mug) if count} == {1: 2, 12: 4}


# The command


def test_the_command_replays_a_bag(bag, whole_pair, tmp_path, monkeypatch, capsys):
    code, out, err = run_command(
        monkeypatch, capsys, bag, "--names", "ball, mug|cup", "--out", tmp_path / "out", "--model", whole_pair, "--json"
    )
    assert (code, json.loads(out.splitlines()[-1])["images"]) == (0, 6), err
    assert_fits("replay", printed(out))
    assert unnoticed("replay", printed(out)) == []
    assert_fits("results", parse((tmp_path / "out" / "results.json").read_text()))
    assert {"report.html", "results.json", "bag", "camera.webm"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert read_report(tmp_path / "out").cameras[0].frames == 6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--names", "ball", "--image-topic", "/front"], "no topic /front"),
        ([], "--names"),
        (["--names", "ball", "--vocabulary-topic", "/v"], "one of them"),
        (["--vocabulary-topic", "/v"], "is not in"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(bag, tmp_path, monkeypatch, capsys, arguments, text):
    code, _, err = run_command(monkeypatch, capsys, bag, *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert text in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def run_command(monkeypatch, capsys, *arguments):
    from nerve_ros.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["nerve", "replay", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_the_pictures_are_as_far_apart_as_there_are_frames():
    kept = run_module._Pictures()
    for number in range(1000):
        kept.take(number, None)
    assert len(kept._kept) < 2 * run_module.PICTURES
    assert kept._kept[0][0] == 0
    assert kept._kept[-1][0] > 800
