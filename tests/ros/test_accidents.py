"""What happens around the node, over real DDS: whoever listens or films is killed, clocks jump, a name is taken twice.

It goes on, says what concerns it, and needs nobody to put it right.
"""

import json
import signal
import sys

import pytest

import harness
from test_faults import FaultyNode

PICTURE = {"width": 96, "height": 64}
NAMES = ["ball", "ladder"]
WARN = 1
CLOCK = """
import json, sys, threading
import rclpy
from builtin_interfaces.msg import Time
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock

rclpy.init()
node = rclpy.create_node("clock")
publisher = node.create_publisher(Clock, "/clock", QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT))
seconds, ended = None, threading.Event()

def tick():
    while not ended.wait(0.05):
        if seconds is not None:
            publisher.publish(Clock(clock=Time(sec=seconds)))

thread = threading.Thread(target=tick)
thread.start()
print("ready", flush=True)
for line in sys.stdin:
    seconds = json.loads(line)
ended.set()
thread.join()
rclpy.shutdown()
"""


class Clock(harness.Process):
    """A process that publishes /clock: it stands still, and jumps on command."""

    def __init__(self, env):
        super().__init__([sys.executable, "-c", CLOCK], env, steered=True)
        self.until(lambda: "ready" in self.lines, "clock")

    def show(self, seconds):
        self._child.stdin.write(json.dumps(seconds) + "\n")
        self._child.stdin.flush()


@pytest.fixture(scope="module")
def rig(new_rig, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "Node", FaultyNode)
        rig = new_rig(vocabulary=NAMES)
    rig.node.fault(constants={"nerve_ros.graph.NAMESAKE_WARNING": 2.0})
    rig.listen("mask", "label_info", "diagnostics")
    rig.node.wait_active()
    return rig


def set_parameter(rig, name, value):
    answer = rig.talker.do("set_parameter", name=name, value=value)
    assert answer["successful"], answer["reason"]


def more_masks(rig, count=3):
    """Wait for more masks of a stream that runs."""
    since = rig.listener.mark()
    rig.listener.until(lambda: len(rig.listener.seen("mask", since)) >= count, f"{count} masks")


def test_who_listens_may_be_killed(rig, new_peer):
    rig.talker.do("advertise", topic="image")
    rig.talker.do("stream", picture=PICTURE, rate=5.0)
    for kind in ("mask", "overlay", "label_info"):
        victim = new_peer(f"reader_of_{kind}")
        victim.do("subscribe", kind=kind)
        victim.wait(kind)
        victim.send(signal.SIGKILL)
        assert victim.ended() == -signal.SIGKILL
        more_masks(rig)
    rig.talker.do("stop_stream")


def test_the_camera_may_be_killed_and_another_one_take_over(rig, new_peer):
    camera = new_peer("camera")
    camera.do("advertise", topic="image")
    since = rig.listener.mark()
    camera.do("stream", picture=PICTURE, rate=5.0)
    rig.listener.wait("mask", since=since)
    camera.send(signal.SIGKILL)
    assert camera.ended() == -signal.SIGKILL
    rig.listener.wait("diagnostics", lambda event: "no image on /image" in event["message"], since=rig.listener.mark())
    rig.segment(PICTURE)


# Clocks.


def test_stamps_of_another_time_are_segmented_and_left_out_of_the_ages(rig):
    for second in (2**31 - 1, 1, 1_700_000_000, 5):
        rig.segment(PICTURE, stamp=[second, 0])
    figures = rig.listener.wait("diagnostics", since=rig.listener.mark())["values"]
    assert figures["age_p50_ms"] == ""
    assert float(figures["latency_p50_ms"]) > 0.0


@pytest.fixture
def clock(rig):
    set_parameter(rig, "use_sim_time", True)
    set_parameter(rig, "max_image_age", 1.0)
    yield rig.keep(Clock(rig.env))
    set_parameter(rig, "use_sim_time", False)
    set_parameter(rig, "max_image_age", 0.0)


def too_old(rig, stamp, seconds):
    """Send an image until the node says of it that it is so many seconds old."""
    rig.talker.do("advertise", topic="image")

    def said():
        rig.talker.do("image", picture=PICTURE, stamp=[stamp, 0])
        answer = rig.talker.do("locate", name="ball")
        return not answer["success"] and f"its stamp is {seconds:.2f} s old" in answer["message"]

    rig.node.until(said, f"image {seconds} s too old")


def test_a_simulated_clock_may_be_missing_and_jump_back_and_forth(rig, clock):
    # None yet: whatever comes is new.
    rig.segment(PICTURE, stamp=[1000, 0])
    clock.show(1000)
    too_old(rig, 900, 100.0)
    rig.segment(PICTURE, stamp=[1000, 0])
    # Back, as where a bag starts over: what was now is in the future, and no reason to drop anything.
    clock.show(500)
    too_old(rig, 490, 10.0)
    rig.segment(PICTURE, stamp=[500, 0])
    rig.segment(PICTURE, stamp=[1000, 0])
    # Far ahead: only what is stamped by the new time is new.
    clock.show(2_000_000_000)
    too_old(rig, 1000, 1_999_999_000.0)
    rig.segment(PICTURE, stamp=[2_000_000_000, 0])
    # It stands still, and the diagnostics do not.
    since = rig.listener.mark()
    rig.listener.until(lambda: len(rig.listener.seen("diagnostics", since)) >= 3, "three diagnostics")


# One name, two nodes.


def test_two_nodes_of_one_name_both_say_so_until_one_is_gone(rig):
    since = rig.listener.mark()
    other = rig.keep(FaultyNode(rig.env, vocabulary=["mug"]))
    other.fault(constants={"nerve_ros.graph.NAMESAKE_WARNING": 2.0})
    for names in ("'ball', 'ladder'", "'mug'"):
        event = rig.listener.wait(
            "diagnostics",
            lambda event, names=names: (
                event["values"]["vocabulary"] == names and "another node is called /nerve" in event["message"]
            ),
            since=since,
            timeout=harness.LOADING,
        )
        assert event["level"] == WARN
    other.end()
    rig.listener.wait(
        "diagnostics", lambda event: "another node" not in event["message"], since=rig.listener.mark(), timeout=60.0
    )
    rig.segment(PICTURE)
