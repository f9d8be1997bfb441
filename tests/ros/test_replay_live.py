"""`nerve replay --live` over real DDS: what is timed, and that live masks equal offline ones."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image

import harness
from nerve_core.replay.frames import Frame
from nerve_core.report import read_report
from nerve_core.segmenter import Segmentation
from nerve_core.text.vocabulary import Vocabulary
from nerve_ros.cli import main
from nerve_ros.demo.collector import Answer, Heard
from nerve_ros.live import Comparison, Played, Rig, figures
from nerve_ros.parameters import NodeConfig
from results_schema import assert_fits, parse, printed

ROOT = Path(__file__).parents[2]
PATIENCE = 400.0
NAMES = "ball, mug|cup, ladder"
TOPIC = "/camera/image/compressed"
FIRST = 1_700_000_000
"""Second of the bag's first stamp."""


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("live") / "bag"
    command = [sys.executable, str(ROOT / "tools" / "sample_bag.py"), "--out", str(out), "--seconds", "1"]
    subprocess.run(command, check=True, timeout=PATIENCE)
    return out


def nerve(environment, *arguments, before="") -> subprocess.CompletedProcess:
    """Run the command; before: Python that runs first."""
    code = f"{before}\nfrom nerve_ros.cli import main\nmain()"
    command = [sys.executable, "-P", "-c", code, "replay", *map(str, arguments)]
    env = {**environment, "COLUMNS": "200"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)


def assert_measured(live, count):
    assert live.published == count
    assert 1 <= live.masks == count - live.dropped
    assert 0 < live.age_p50_ms <= live.age_p95_ms <= live.age_p99_ms
    assert live.cpu > 0
    assert live.memory_mb > 50
    assert (live.compared, live.different) == (live.masks, ())
    assert live.equal == live.masks


def test_a_node_that_runs_is_played_to_and_its_masks_equal_the_offline_ones(environment, bag, tmp_path):
    clock, stamps = [], []
    with heard(environment, "/front/segmentation/mask", stamps, clock):
        node = harness.Node(environment, arguments=["-r", "__ns:=/front"], vocabulary=["nothing of the kind"])
        try:
            node.wait_active()
            # Slow: /clock is new to those that listen, and may be found after a second or two.
            done = nerve(
                *(environment, bag, "--image-topic", TOPIC, "--names", NAMES, "--out", tmp_path / "out"),
                *("--live", "--namespace", "/front", "--node-pid", node._child.pid, "--rate", "0.1"),
                *("--limit", "6", "--no-video", "--json"),
            )
        finally:
            node.end()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["images"] == 6
    assert_fits("replay", printed(done.stdout))
    assert_fits("results", parse((tmp_path / "out" / "results.json").read_text()))
    report = read_report(tmp_path / "out")
    (live,) = report.live
    assert (live.topic, live.rate) == (TOPIC, 0.1)
    assert_measured(live, 6)
    # With the bag's own stamps, which masks carry on, and its time on /clock.
    assert len(stamps) == live.masks
    assert set(stamps) <= {FIRST * 10**9 + number * 10**8 for number in range(6)}
    assert clock == sorted(clock)
    assert FIRST * 10**9 <= clock[0] < clock[-1]


def test_a_node_can_be_started_for_the_measurement(environment, bag, tmp_path):
    """It reads the bag's own compressed images."""
    done = nerve(
        *(environment, bag, "--image-topic", TOPIC, "--names", NAMES, "--out", tmp_path / "out"),
        *("--live", "--start-node", "--limit", "4", "--no-video"),
    )
    assert done.returncode == 0, done.stderr
    assert_measured(read_report(tmp_path / "out").live[0], 4)
    assert "waiting for images on /image/compressed" in (tmp_path / "out" / "node.log").read_text()


@pytest.mark.parametrize(
    ("options", "text"), [((), "is not there after"), (("--namespace", "no good"), "write it like /front")]
)
def test_a_node_that_is_not_there_is_told_of_in_one_line(environment, bag, tmp_path, options, text):
    arguments = (bag, "--image-topic", TOPIC, "--names", NAMES, "--out", tmp_path / "out", "--live", *options)
    done = nerve(environment, *arguments, before="import nerve_ros.live; nerve_ros.live.THERE = 1.0")
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--live", "--model", "other"), "leave these options out"),
        (("--live", "--set", "alpha=0.5"), "its own parameters"),
        (("--live", "--start-node", "--node-pid", "7"), "leave out its number"),
        (("--rate", "2"), "are for --live"),
        (("--start-node",), "are for --live"),
    ],
)
def test_options_that_do_not_go_together_are_refused(bag, tmp_path, monkeypatch, capsys, options, text):
    arguments = (bag, "--image-topic", TOPIC, "--names", NAMES, "--out", tmp_path / "out", *options)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["nerve", "replay", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_a_rate_beyond_reason_is_refused():
    with pytest.raises(ValueError, match="accepted"):
        Rig(rate=0.0)


# Comparison, on masks made by hand


def frame(number: int) -> Frame:
    stamp = FIRST * 10**9 + number * 10**8
    return Frame(0, stamp, stamp, stamp, "camera", np.zeros((2, 4, 3), np.uint8), "rgb8")


def segmentation(labels) -> Segmentation:
    labels = np.array(labels, np.uint8)
    return Segmentation(labels, labels, ("ball", "mug"), ())


def played(*masks, classes=None) -> Played:
    """A play whose mask `number` arrived a tenth of a second after it was published, None: it was dropped."""
    made = Played(TOPIC, 1.0, NodeConfig())
    made.heard = Heard(classes=classes or {0: "background", 1: "ball", 2: "mug"})
    for number, mask in enumerate(masks):
        stamp = frame(number).stamp
        made.published[stamp] = 10.0 + number
        if mask is not None:
            plane = np.array(mask, np.uint8)
            packed = zlib.compress(plane.tobytes())
            made.heard.answers[stamp] = Answer(stamp, 10.1 + number + 0.01 * number, plane.shape, packed)
    return made


LABELS = [[0, 1, 2, 255], [0, 1, 2, 2]]


def compare(made: Played, *offline) -> Comparison:
    comparison = Comparison(made, Vocabulary(["ball", "mug"]))
    for number, labels in enumerate(offline):
        comparison.see(frame(number), segmentation(labels))
    return comparison


def test_masks_are_compared_by_stamp_and_dropped_ones_not_at_all():
    other = [[0, 1, 2, 255], [0, 1, 1, 1]]
    made = played(LABELS, None, other)
    comparison = compare(made, LABELS, LABELS, LABELS)
    live = figures(made, comparison)
    assert (live.published, live.masks, live.dropped) == (3, 2, 1)
    assert (live.compared, live.equal, live.different) == (2, 1, ((2, 0.25),))
    assert live.age_p50_ms == pytest.approx(110.0)
    assert live.age_p99_ms == pytest.approx(119.8)


def test_ids_are_matched_by_name():
    made = played([[0, 7, 3, 255], [0, 7, 3, 3]], classes={0: "nothing", 3: "Mug", 7: "BALL", 9: "tree"})
    assert compare(made, LABELS).different == []
    assert compare(dataclasses.replace(made), [[0, 2, 1, 255], [0, 2, 1, 1]]).different == [(0, 5 / 8)]


def test_an_id_of_another_name_or_another_size_is_never_equal():
    made = played([[0, 9, 2, 255], [0, 1, 2, 2]], [[0, 1]], classes={0: "background", 1: "ball", 2: "mug", 9: "tree"})
    assert compare(made, LABELS, LABELS).different == [(0, 1 / 8), (1, 1.0)]


def test_jitter_is_how_unevenly_masks_come():
    even = figures(played(LABELS, LABELS, LABELS), compare(played(), LABELS))
    assert even.jitter_ms == pytest.approx(0.0, abs=1e-6)
    assert figures(played(LABELS), compare(played())).jitter_ms is None
    silent = figures(played(None, None), compare(played()))
    assert (silent.age_p50_ms, silent.masks, silent.dropped) == (None, 0, 2)


class heard:
    """Listens to masks on `topic` and to /clock meanwhile: stamps and times in nanoseconds."""

    def __init__(self, environment, topic, stamps, clock):
        self._context = rclpy.Context()
        domain = int(environment["ROS_DOMAIN_ID"])
        os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", environment["FASTDDS_DEFAULT_PROFILES_FILE"])
        options = SignalHandlerOptions.NO
        rclpy.init(args=[], context=self._context, domain_id=domain, signal_handler_options=options)
        self._node = rclpy.create_node("stand_in", context=self._context)
        reliable = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)

        def nanoseconds(stamp) -> int:
            return stamp.sec * 10**9 + stamp.nanosec

        self._node.create_subscription(Image, topic, lambda it: stamps.append(nanoseconds(it.header.stamp)), reliable)
        self._node.create_subscription(Clock, "/clock", lambda it: clock.append(nanoseconds(it.clock)), reliable)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)

    def _spin(self):
        while not self._ended.is_set():
            self._executor.spin_once(timeout_sec=0.1)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join(10.0)
        self._executor.shutdown()
        self._context.try_shutdown()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_playing_in_order_with_its_own_exit_code(environment, bag, tmp_path, number):
    arguments = (bag, "--image-topic", TOPIC, "--names", NAMES, "--out", tmp_path / "out", "--live")
    harness.assert_ends_by(number, "replay", *arguments, env=environment)
