"""The life cycle over real DDS: transitions, failures in them, signals, and a node killed and started again."""

import signal
import subprocess
import sys

import pytest

import harness

PICTURE = {"width": 96, "height": 64}
NAMES = ["ball", "ladder"]


@pytest.fixture(scope="module")
def rig(new_rig):
    rig = new_rig(vocabulary=NAMES, autostart=False, forked=False)
    rig.listen("label_info", "mask", "diagnostics")
    return rig


def go(rig, label):
    return rig.talker.do("transition", label=label, timeout=harness.LOADING)["success"]


def state(rig):
    return rig.talker.do("state")["state"]


def silent(rig, stamp):
    """Whether the node says nothing of an image sent now; asks it something afterwards, so that it had its chance."""
    since = rig.listener.mark()
    for _ in range(3):
        rig.talker.do("image", picture=PICTURE, stamp=stamp)
        state(rig)
    rig.listener.wait("diagnostics", since=since)
    rig.listener.wait("diagnostics", since=rig.listener.mark())
    return not rig.listener.seen("mask", since)


def test_without_autostart_the_node_waits_to_be_configured(rig):
    assert state(rig) == "unconfigured"
    assert silent(rig, [1, 1])


def test_impossible_transitions_are_refused_and_do_no_harm(rig):
    for label in ("activate", "deactivate", "cleanup", "no such thing"):
        assert not go(rig, label)
    for number in (0, 3, 4, 10, 99, 200):
        assert not rig.talker.do("transition_by_id", number=number)["success"]
    assert state(rig) == "unconfigured"


def test_a_model_that_does_not_exist_fails_configure_with_the_reason_and_another_one_works(rig):
    missing = "/no/such/folder/of a model"
    assert rig.talker.do("set_parameter", name="model", value=missing)["successful"]
    assert not go(rig, "configure")
    assert state(rig) == "unconfigured"
    line = rig.node.wait_log("configuring failed")
    assert missing in "\n".join(rig.node.lines[rig.node.lines.index(line) :])
    event = rig.listener.wait("diagnostics", lambda event: "configuring failed" in event["message"])
    assert event["level"] == 2
    assert rig.talker.do("set_parameter", name="model", value="embedded")["successful"]
    assert go(rig, "configure")
    assert state(rig) == "inactive"


def test_the_whole_way_down_and_up_again(rig):
    assert state(rig) == "inactive"
    assert silent(rig, [2, 2])
    assert not rig.listener.seen("label_info")

    assert go(rig, "activate")
    assert state(rig) == "active"
    rig.segment(PICTURE)
    first = rig.listener.wait("label_info")
    assert sorted(first["classes"].values()) == ["background", *NAMES]

    # Inactive: no masks; the model stays, and nobody's costs are thrown away by a LabelInfo that says nothing new.
    assert go(rig, "deactivate")
    assert silent(rig, [3, 3])
    place = len(rig.node.lines)
    assert go(rig, "activate")
    rig.segment(PICTURE)
    # By now, however slow the machine, an image that was taken while inactive would have its mask.
    assert not [event for event in rig.listener.seen("mask") if event["stamp"] in ([2, 2], [3, 3])]
    assert len(rig.listener.seen("label_info")) == 1
    assert not [line for line in rig.node.lines[place:] if "configured" in line]

    # A vocabulary that is set while inactive is there from the first mask on.
    assert go(rig, "deactivate")
    since = rig.listener.mark()
    assert rig.talker.do("set_parameter", name="vocabulary", value=["mug", "ladder"])["successful"]
    assert go(rig, "activate")
    mask = rig.segment(PICTURE)["mask"]
    info = rig.listener.wait("label_info", lambda event: "mug" in event["classes"].values(), since=since)
    assert info["sent"] < mask["sent"]

    # Cleaned up: the models are gone, and what was set meanwhile holds when they are back; ids stay.
    assert go(rig, "deactivate")
    assert go(rig, "cleanup")
    assert state(rig) == "unconfigured"
    assert rig.talker.do("set_parameter", name="vocabulary", value=["ladder", "cone"])["successful"]
    since = rig.listener.mark()
    assert go(rig, "configure")
    assert go(rig, "activate")
    rig.segment(PICTURE)
    again = rig.listener.wait("label_info", since=since)["classes"]
    assert again == {"0": "background", "2": "ladder", "4": "cone"}


def test_compressed_images_are_read_where_configured(rig):
    raw = rig.segment(PICTURE)["mask"]
    assert go(rig, "deactivate")
    assert go(rig, "cleanup")
    assert rig.talker.do("set_parameter", name="image_transport", value="compressed")["successful"]
    assert go(rig, "configure")
    assert go(rig, "activate")
    rig.node.wait_log("waiting for images on /image/compressed")
    assert rig.segment(PICTURE | {"encoding": "png"})["mask"]["digest"] == raw["digest"]
    assert rig.segment(PICTURE | {"encoding": "jpeg"})["mask"]["length"] == raw["length"]
    since = rig.listener.mark()
    for _ in range(3):
        rig.talker.do("image", picture=PICTURE | {"encoding": "png", "keep": 40}, stamp=[5, 5])
    rig.listener.wait("diagnostics", lambda event: "the PNG" in event["message"], since=since)
    rig.segment(PICTURE | {"encoding": "jpeg"})


def test_what_configure_reads_cannot_be_changed_while_configured(rig):
    assert state(rig) == "active"
    for name, value in (("model", "elsewhere"), ("device", "cuda"), ("precision", "bf16"), ("warm_up", False)):
        answer = rig.talker.do("set_parameter", name=name, value=value)
        assert not answer["successful"]
        assert "clean up first" in answer["reason"]
    assert rig.talker.do("set_parameter", name="model", value="embedded")["successful"]


def test_shutdown_ends_the_life_cycle_but_answers_are_still_given(rig):
    assert go(rig, "shutdown")
    assert state(rig) == "finalized"
    assert silent(rig, [4, 4])


def end(rig, number):
    """Send a signal to the node and see it end as if nothing were under way."""
    rig.node.send(number)
    code = rig.node.ended()
    assert code == 0, rig.node.report()
    # Not "Failed to publish log message": rcl says so of a line that was on its way when the context went.
    noise = ("Traceback", "terminate", "Aborted", "Segmentation fault")
    assert not [line for line in rig.node.lines if any(word in line for word in noise)], rig.node.report()


INTERRUPTED_WHILE_IMPORTING = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "nerve_ros.lifecycle":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from nerve_ros.node import main
sys.exit(main())
"""


def test_an_interrupt_while_importing_ends_the_process_cleanly(environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WHILE_IMPORTING],
        env=environment,
        cwd=tmp_path,  # not the repository, whose folder nerve_ros would be imported instead of the installed package
        capture_output=True,
        text=True,
        timeout=harness.LOADING,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_interrupt_while_loading_ends_the_node_cleanly(rig):
    rig.restart(vocabulary=NAMES)
    rig.node.wait_log("vocabulary of 2", harness.LOADING)
    end(rig, signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["Ctrl-C", "the terminal is closed"])
def test_an_interrupt_in_mid_stream_ends_the_node_cleanly(rig, number):
    rig.restart(vocabulary=NAMES)
    rig.node.wait_active()
    rig.talker.do("advertise", topic="image")
    since = rig.listener.mark()
    rig.talker.do("stream", picture=PICTURE, rate=20.0)
    rig.listener.wait("mask", since=since)
    end(rig, number)


def test_a_killed_node_comes_back_with_the_vocabulary_that_is_still_published(rig):
    rig.restart(vocabulary=NAMES)
    rig.node.wait_active()
    since = rig.listener.mark()
    rig.talker.do("vocabulary", names=["cone", "mug"])
    rig.listener.wait("label_info", lambda event: "cone" in event["classes"].values(), since=since)
    rig.talker.do("stream", picture=PICTURE, rate=20.0)
    rig.listener.wait("mask", since=since)
    rig.node.send(signal.SIGKILL)
    assert rig.node.ended() == -signal.SIGKILL

    since = rig.listener.mark()
    rig.restart(vocabulary=NAMES)
    rig.node.wait_active()
    info = rig.listener.wait("label_info", lambda event: "cone" in event["classes"].values(), since=since)
    mask = rig.listener.wait("mask", lambda event: event["sent"] > info["sent"], since=since)
    assert {int(value) for value in mask["counts"]} <= {int(number) for number in info["classes"]}
    end(rig, signal.SIGTERM)
    rig.talker.do("stop_stream")


def test_a_node_started_with_what_it_cannot_use_says_so_and_ends(environment):
    node = harness.Node(environment, threshold=1.5, forked=False)
    try:
        code = node.ended(harness.LOADING)
    finally:
        node.kill()
    assert code == 2
    assert "threshold" in "\n".join(node.lines)
    assert "Traceback" not in "\n".join(node.lines)


def test_a_misspelt_parameter_is_told_with_the_one_that_was_meant(environment):
    node = harness.Node(environment, autostart=False, treshold=0.5)
    try:
        node.wait_log("'treshold' is unknown and has no effect; did you mean 'threshold'", harness.LOADING)
    finally:
        node.kill()
