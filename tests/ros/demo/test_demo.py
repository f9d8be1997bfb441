"""The demonstration: its player as a camera, its figures against figures computed by hand, and end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, Image
from vision_msgs.msg import LabelInfo, VisionClass

from nerve_ros.demo.collector import Answer
from nerve_ros.demo.recording import Recorded, Recording, RecordingError, read_recording
from nerve_ros.demo.report import Asked, Published, make_report, match
from nerve_ros.demo.schedule import Asking, dump_schedule, load_schedule, schedule_of, usual_schedule
from nerve_ros.msg import Vocabulary

ROOT = Path(__file__).parents[3]
SECONDS = 3.0
IMAGES = 30
PATIENCE = 240.0
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
LATCHED = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "bag"
    command = [sys.executable, str(ROOT / "tools" / "sample_bag.py"), "--out", str(out), "--seconds", str(SECONDS)]
    subprocess.run(command, check=True, timeout=PATIENCE)
    return out


@pytest.fixture(scope="module")
def recording(bag) -> Recording:
    return read_recording(bag)


# The recording and the schedule


def test_a_recording_is_what_the_bag_holds(recording):
    assert len(recording.frames) == IMAGES
    assert recording.seconds == pytest.approx(SECONDS)
    assert recording.names[:3] == ("ball", "cube", "cone")
    assert recording.image(7).shape == (480, 640, 3)
    assert set(np.unique(recording.labels(7))) <= set(range(len(recording.names) + 1))


def test_the_beginning_of_a_recording_holds_at_least_one_image(recording):
    assert [len(recording.beginning(seconds).frames) for seconds in (0.01, 0.5, 99.0)] == [1, 5, IMAGES]


def test_the_bag_of_moving_objects_is_a_recording_too(tmp_path):
    out = tmp_path / "bag"
    command = [sys.executable, str(ROOT / "tools" / "sample_bag.py"), "--out", str(out)]
    subprocess.run([*command, "--seconds", "0.3", "--bag", "moving"], check=True, timeout=PATIENCE)
    moving = read_recording(out)
    assert len(moving.frames) == 3
    assert moving.names[:3] == ("ball", "cube", "cone")
    assert moving.image(2).shape == (480, 640, 3)
    assert moving.labels(2).any()


def test_what_is_no_bag_is_refused_with_the_way_to_make_one(tmp_path):
    with pytest.raises(RecordingError, match=r"sample_bag\.py"):
        read_recording(tmp_path / "nothing")
    with pytest.raises(RecordingError, match="cannot be read"):
        read_recording(tmp_path)


def test_schedules_survive_their_way_to_the_player():
    schedule = (Asking(0.0, ("mug|cup", "Käfig")), Asking(1.5, ("ball",)))
    assert load_schedule(dump_schedule(schedule)) == schedule
    assert schedule[0].names == ("mug", "Käfig")


def test_names_of_the_command_line_share_the_time():
    assert schedule_of(["ball, mug|cup", "star"], 8.0) == (
        Asking(0.0, ("ball", "mug|cup")),
        Asking(4.0, ("star",)),
    )
    with pytest.raises(ValueError, match="no name"):
        schedule_of(["ball", " , "], 8.0)


def test_the_usual_schedule_asks_for_a_few_then_all_then_the_few_again():
    first, everything, last = usual_schedule(8.0, ("star", "ball", "mug"))
    assert (first.at, everything.at, last.at) == (0.0, 2.0, 6.0)
    assert first.entries == last.entries == ("ball", "mug")
    assert everything.entries == ("star", "ball", "mug")


@pytest.mark.parametrize("text", ["[]", "{}", '[{"at": 1.0, "entries": []}]', '[{"entries": ["ball"]}]', "ball"])
def test_broken_schedules_are_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        load_schedule(text)


# The report


def png(labels: np.ndarray) -> bytes:
    return cv2.imencode(".png", labels.astype(np.uint8))[1].tobytes()


def film(*truths: list[list[int]]) -> Recording:
    """A recording of tiny labels, of "ball" (1), "cube" (2) and "star" (3), ten a second."""
    frames = tuple(
        Recorded(10**8 * number, "camera", png(np.zeros_like(truth)), png(np.array(truth)), b"")
        for number, truth in enumerate(map(np.array, truths))
    )
    return Recording(frames, ("ball", "cube", "star"))


def answer(stamp: int, arrived: float, labels: list[list[int]], classes: dict[int, str], **values) -> Answer:
    mask = np.array(labels, np.uint8)
    given = {"confidence_size": mask.shape, "known": frozenset(classes)} | values
    return Answer(stamp, arrived, mask.shape, zlib.compress(mask.tobytes()), classes, **given)


TRUTH = [[1, 1, 2, 0], [1, 1, 3, 3]]


def test_the_score_counts_names_that_were_not_asked_for_as_background():
    """Asked for "star" (id 9) and "ball" (id 4): "cube" is background in the truth."""
    said = [[4, 4, 0, 0], [4, 9, 9, 0]]
    report = make_report(
        film(TRUTH),
        [Published(0, 100, 10.0)],
        [Asked(("star", "ball"), 9.0)],
        {100: answer(100, 10.5, said, {9: "star", 4: "ball"})},
        {},
    )
    # background: 2 hit, 1 more said; ball: 3 of 4 hit; star: 1 hit of 2, 1 more said
    assert report.iou == pytest.approx({"background": 2 / 3, "ball": 3 / 4, "star": 1 / 3}, abs=1e-4)
    assert report.miou == pytest.approx((2 / 3 + 3 / 4 + 1 / 3) / 3, abs=1e-4)
    assert report.vocabularies[0].miou == report.miou


def test_every_mask_is_scored_by_the_vocabulary_it_was_made_with():
    """Ids may differ between vocabularies, and one name's mask is perfect where another's is empty."""
    report = make_report(
        film(TRUTH, TRUTH),
        [Published(0, 1, 10.0), Published(1, 2, 10.1)],
        [Asked(("cube",), 9.0), Asked(("ball",), 10.05)],
        {
            1: answer(1, 10.2, [[0, 0, 7, 0], [0, 0, 0, 0]], {7: "cube"}),
            2: answer(2, 10.4, [[0, 0, 0, 0], [0, 0, 0, 0]], {1: "ball"}),
        },
        {},
    )
    assert [(asked.names, asked.frames) for asked in report.vocabularies] == [(("cube",), 1), (("ball",), 1)]
    assert report.vocabularies[0].miou == 1.0
    assert report.vocabularies[1].miou == pytest.approx((4 / 8 + 0) / 2)
    assert report.vocabularies[1].answered_after_ms == pytest.approx(350.0)


def test_frames_ages_and_stages_are_counted():
    published = [Published(number, number, 10.0 + number) for number in range(5)]
    answers = {
        number: answer(number, 10.0 + number + late, TRUTH, {1: "ball", 2: "cube", 3: "star"})
        for number, late in ((0, 0.1), (2, 0.2), (4, 0.3))
    }
    answers[3] = Answer(3, confidence_size=(2, 4))  # its mask never came
    diagnostics = {
        "images_received": "5",
        "stage_clip_p50_ms": "12.5",
        "stage_clip_p95_ms": "20.0",
        "stage_convert_p50_ms": "0.5",
        "age_p50_ms": "1.0",
        "stage_diffusion_p50_ms": "",
    }
    report = make_report(film(*[TRUTH] * 5), published, [Asked(("ball", "cube", "star"), 9.0)], answers, diagnostics)
    assert (report.frames_in, report.frames_segmented, report.frames_dropped) == (5, 3, 2)
    assert report.frames_received == 5
    assert report.age_p50_ms == pytest.approx(200.0)
    assert report.age_p95_ms == pytest.approx(290.0)
    assert report.frames_per_second == pytest.approx(2 / 4.2, abs=0.01)
    assert list(report.stage_ms.items()) == [("convert", 0.5), ("clip", 12.5)]
    assert report.stage_p95_ms == {"clip": 20.0}
    assert report.miou == 1.0
    json.loads(json.dumps(report.as_dict()))


def test_ids_of_names_that_were_not_asked_for_are_noticed():
    report = make_report(
        film(TRUTH),
        [Published(0, 1, 10.0)],
        [Asked(("ball",), 9.0)],
        {1: answer(1, 10.5, [[1, 1, 2, 0], [1, 255, 3, 0]], {1: "ball"}, known=frozenset(), confidence_size=None)},
        {},
    )
    assert report.foreign_pixels == 3
    assert report.unannounced_masks == 1
    assert report.incomplete == 1


def test_a_vocabulary_that_comes_back_is_told_from_its_first_time():
    asked = [Asked(("ball",), 1.0), Asked(("star",), 3.0), Asked(("ball",), 5.0)]
    published = [Published(0, 0, 2.0), Published(1, 1, 4.0), Published(2, 2, 6.0), Published(3, 3, 7.0)]
    classes = ({1: "Ball"}, {2: "star"}, {1: "ball"}, {5: "cube"})
    answers = {number: answer(number, 2.5 + 2 * number, TRUTH, names) for number, names in enumerate(classes)}
    assert [seen.vocabulary for seen in match(published, asked, answers)] == [0, 1, 2]


# The player


@contextmanager
def listener(env: dict[str, str], classes: tuple[str, ...]) -> Iterator[dict[str, list]]:
    """A node in this process that stands for the one that segments; gives what it heard, with the time."""
    context = rclpy.Context()
    rclpy.init(
        args=[],
        context=context,
        domain_id=int(env["ROS_DOMAIN_ID"]),
        signal_handler_options=SignalHandlerOptions.NO,
    )
    heard: dict[str, list] = {"image": [], "camera_info": [], "vocabulary": []}
    node = rclpy.create_node("nerve", context=context)

    def note(topic: str) -> Callable:
        return lambda message: heard[topic].append((time.monotonic(), message))

    best_effort = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)
    node.create_subscription(Image, "image", note("image"), best_effort)
    node.create_subscription(CameraInfo, "camera_info", note("camera_info"), best_effort)
    node.create_subscription(Vocabulary, "vocabulary", note("vocabulary"), LATCHED)
    publisher = node.create_publisher(LabelInfo, "segmentation/label_info", LATCHED)
    publisher.publish(LabelInfo(class_map=[VisionClass(class_id=k, class_name=name) for k, name in enumerate(classes)]))
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    ended = threading.Event()

    def spin() -> None:
        while not ended.is_set():
            executor.spin_once(timeout_sec=0.1)

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        ended.set()
        thread.join(10.0)
        executor.shutdown()
        context.try_shutdown()


def player_command(bag: Path, *options: str) -> list[str]:
    return [sys.executable, "-P", "-m", "nerve_ros.demo.player", str(bag), *options]


def test_the_player_plays_every_image_as_it_is_at_its_time_and_asks_for_names(environment, bag, recording):
    schedule = (Asking(0.0, ("ball", "mug|cup")), Asking(1.05, ("star",)))
    with listener(environment, ("background", "ball", "mug")) as heard:
        played = subprocess.run(
            player_command(bag, "--schedule", dump_schedule(schedule), "--seconds", "2", "--rate", "0.5"),
            env=environment,
            stdout=subprocess.PIPE,
            timeout=PATIENCE,
            check=True,
            text=True,
        )
    told = [json.loads(line) for line in played.stdout.splitlines()]
    frames = [event for event in told if event["event"] == "frame"]
    assert [event["event"] for event in told][:3] == ["asked", "ready", "frame"]
    assert told[-1] == {"event": "end", "published": 20}
    assert [event["index"] for event in frames] == list(range(20))
    assert [list(message.names) for _, message in heard["vocabulary"]] == [["ball", "mug|cup"], ["star"]]
    asked = [event for event in told if event["event"] == "asked"]
    assert frames[10]["time"] < asked[1]["time"] < frames[11]["time"]

    # Half as fast as filmed: the bag's 0.1 s are 0.2 s, in stamps and on the clock; the first stamp is now.
    stamps = [event["stamp"] for event in frames]
    assert np.diff(stamps) == pytest.approx(2e8, abs=2)
    assert abs(stamps[0] * 1e-9 - time.time()) < PATIENCE
    late = np.array([event["time"] for event in frames]) - frames[0]["time"] - 0.2 * np.arange(20)
    assert -0.05 < late.min() <= np.median(late) < 0.2

    by_stamp = {event["stamp"]: event["index"] for event in frames}
    assert len(heard["image"]) >= 18, "best effort, but on one machine"
    for arrived, message in heard["image"]:
        index = by_stamp[message.header.stamp.sec * 10**9 + message.header.stamp.nanosec]
        assert arrived >= frames[index]["time"]
        assert message.header.frame_id == "camera"
        assert (message.encoding, message.width, message.height, message.step) == ("bgr8", 640, 480, 1920)
        image = np.frombuffer(message.data, np.uint8).reshape(480, 640, 3)
        np.testing.assert_array_equal(image, recording.image(index))
    for _, message in heard["camera_info"]:
        assert message.header.stamp.sec * 10**9 + message.header.stamp.nanosec in by_stamp
        assert message.k[0] > 0


def test_the_player_does_not_begin_before_the_names_are_served(environment, bag):
    with listener(environment, ("background", "ladder")) as heard:
        schedule = dump_schedule([Asking(0.0, ("ball",))])
        played = subprocess.run(
            player_command(bag, "--schedule", schedule, "--patience", "15"),
            env=environment,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
            text=True,
        )
    assert played.returncode == 1
    assert "ladder" in played.stderr
    assert not heard["image"]


# All of it


def demo_command(bag: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-P", "-m", "nerve_ros.demo", "--bag", str(bag), "--out", str(out), *options]


def children_of(pid: int) -> set[int]:
    """Processes that `pid` started and that run."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state not in "ZX":
            found.add(int(path.parent.name))
    return found


def running(pids: set[int]) -> set[int]:
    """Those of `pids` that still run."""
    alive = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            alive.add(pid)
    return alive


def until(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> object:
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {patience:.0f} s"
        time.sleep(0.1)
    return value


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen]:
    """The demonstration under way."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def child_named(process: subprocess.Popen, name: str) -> int:
    """The child whose command line has `name` in it."""
    return until(lambda: next((pid for pid in children_of(process.pid) if name in command_line(pid)), None), name)


@pytest.fixture(scope="module")
def demonstrated(bag, tmp_path_factory) -> tuple[dict, Path, str]:
    """Figures, folder and standard error of a run that asks for the ball alone, slowly enough for any machine."""
    out = tmp_path_factory.mktemp("demo") / "out"
    ran = subprocess.run(
        demo_command(bag, out, "--names", "ball", "--rate", "0.2", "--json"),
        env=ENVIRONMENT,
        capture_output=True,
        timeout=2 * PATIENCE,
        check=False,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1]), out, ran.stderr


def test_the_demonstration_segments_and_measures(demonstrated):
    figures, _, _ = demonstrated
    assert figures["frames_in"] == IMAGES
    assert 0 < figures["frames_segmented"] <= IMAGES
    assert figures["frames_dropped"] == figures["frames_in"] - figures["frames_segmented"]
    assert 0 < figures["age_p50_ms"] <= figures["age_p95_ms"]
    assert 0.0 <= figures["miou"] <= 1.0
    assert figures["device"].startswith(("cpu", "cuda"))
    assert {"convert", "clip", "diffusion", "publish"} <= set(figures["stage_ms"])
    assert all(milliseconds >= 0 for milliseconds in figures["stage_ms"].values())


def test_the_masks_hold_what_was_asked_for_and_nothing_else(demonstrated):
    figures, _, _ = demonstrated
    assert [asked["names"] for asked in figures["vocabularies"]] == [["ball"]]
    assert set(figures["iou"]) <= {"background", "ball"}
    assert figures["foreign_pixels"] == 0
    assert figures["unannounced_masks"] == 0
    assert figures["incomplete"] == 0


def test_the_video_and_the_contact_sheet_can_be_opened(demonstrated):
    figures, out, _ = demonstrated
    assert Path(figures["video"]).parent == Path(figures["contact_sheet"]).parent == out
    video = cv2.VideoCapture(figures["video"])
    pictures = []
    while (read := video.read())[0]:
        pictures.append(read[1])
    assert 0 < len(pictures) <= IMAGES
    assert {picture.shape for picture in pictures} == {(512, 640, 3)}
    assert max(picture[:480].std() for picture in pictures) > 10
    sheet = cv2.imread(figures["contact_sheet"])
    assert sheet.shape[1] == 3 * 640
    assert sheet.shape[0] % 512 == 0


def test_the_table_is_for_people_and_the_last_line_for_programs(demonstrated):
    _, _, shown = demonstrated
    for words in ("frames in", "dropped", "age p95", "mIoU", "ms per stage", "contact sheet"):
        assert words in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_running_when_it_is_interrupted(bag, tmp_path, number):
    with started(*demo_command(bag, tmp_path / "out")) as demo:
        children = {child_named(demo, "nerve_node"), child_named(demo, "player")}
        demo.send_signal(number)
        code = demo.wait(PATIENCE)
        until(lambda: not running(children), "end of the children", 30.0)
    assert code == (-number if number == signal.SIGKILL else 128 + number)


def test_it_says_so_when_the_node_dies(bag, tmp_path):
    with started(*demo_command(bag, tmp_path / "out")) as demo:
        node = child_named(demo, "nerve_node")
        player = child_named(demo, "player")
        os.kill(node, signal.SIGKILL)
        output, _ = demo.communicate(timeout=PATIENCE)
    assert demo.returncode == 1
    assert "the node ended with -9" in output
    assert not running({node, player})


def test_it_ends_with_the_nodes_reason_when_the_model_is_not_there(bag, tmp_path):
    with started(*demo_command(bag, tmp_path / "out", "--model", "no-such-pair")) as demo:
        output, _ = demo.communicate(timeout=PATIENCE)
    assert demo.returncode == 1
    assert "no-such-pair" in output
    assert "node.log" in output


def test_demonstrations_at_the_same_time_use_domains_of_their_own():
    from nerve_ros.demo.processes import own_domain

    with own_domain() as one, own_domain() as other:
        assert one != other
        assert not {one, other} & {0, *range(1, 101)}


def test_the_command_explains_itself_without_set_up():
    shown = subprocess.run(
        ["bash", str(ROOT / "scripts" / "demo"), "--help"], capture_output=True, check=True, text=True, timeout=30.0
    ).stdout
    for option in ("--seconds", "--names", "--bag", "--json"):
        assert option in shown


def test_the_command_says_which_bags_there_are_before_it_sets_anything_up():
    refused = subprocess.run(
        ["bash", str(ROOT / "scripts" / "demo"), "--seconds", "1", "--bag"],
        capture_output=True,
        check=False,
        text=True,
        timeout=30.0,
    )
    assert refused.returncode == 2
    assert "panning, moving" in refused.stderr
