"""What fails inside the node, over real DDS: it says so, loses no more than it must, and works again by itself.

The node is the real one with faults put in from outside (faulty_node.py).
"""

import json
import shutil
import signal

import pytest

import harness

PICTURE = {"width": 96, "height": 64}
NAMES = ["ball", "ladder"]
OK, WARN, ERROR = 0, 1, 2
STAGES = ("preprocess", "clip", "diffusion", "probabilities", "refine", "edges", "readout", "to_host")
STUCK_AFTER = 4.0
"""Seconds of inference_timeout: more than an image of this size takes on a slow and busy machine."""
COUNTS = ("images_received", "images_segmented", "images_dropped", "images_rejected")


class FaultyNode(harness.Node):
    """A process of faulty_node.py: the node, in which anything can be made to fail."""

    def __init__(self, env, **parameters):
        given = [text for name, value in parameters.items() for text in ("-p", f"{name}:={json.dumps(value)}")]
        command = [str(harness.HERE / "faulty_node.py"), "--ros-args", *given]
        harness.Process.__init__(self, command, env, steered=True, forked=True)

    def fault(self, **faults):
        """Have these happen from now on, and nothing else: clip=("out of memory", 3)."""
        line = len(self.lines)
        self._child.stdin.write(json.dumps(faults) + "\n")
        self._child.stdin.flush()
        self.wait_log("^faults: ", harness.LOADING, line)

    def happened(self, place, since):
        """Wait until a fault took place there; `since` is a number of lines."""
        self.wait_log(f"^fault at {place}$", since=since)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def unloaded(new_rig, cache):
    """The rig, whose node nobody has configured yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "Node", FaultyNode)
        rig = new_rig(vocabulary=NAMES, autostart=False, cache_dir=str(cache))
    rig.listen("mask", "label_info", "diagnostics")
    rig.listener.wait("diagnostics", timeout=harness.LOADING)
    return rig


@pytest.fixture
def rig(unloaded):
    """The same, whose node is active, whatever the test before left."""
    for label, before in (("configure", "unconfigured"), ("activate", "inactive")):
        if state(unloaded) == before:
            assert go(unloaded, label)
    return unloaded


@pytest.fixture(autouse=True)
def nothing_fails_afterwards(unloaded):
    yield
    if unloaded.node.running:
        unloaded.node.fault()


def go(rig, label):
    return rig.talker.do("transition", label=label, timeout=harness.LOADING)["success"]


def state(rig):
    return rig.talker.do("state")["state"]


def told(rig, level, text, since):
    """The first diagnostics from place `since` on of that level and with that text."""
    return rig.listener.wait(
        "diagnostics", lambda event: event["level"] == level and text in event["message"], since=since
    )


def all_is_well(rig):
    """Wait until the diagnostics say so while images come."""
    since = rig.listener.mark()
    rig.talker.do("stream", picture=PICTURE, rate=5.0)
    rig.listener.wait("diagnostics", lambda event: (event["level"], event["message"]) == (OK, "active"), since=since)
    rig.talker.do("stop_stream")


def set_parameter(rig, name, value):
    answer = rig.talker.do("set_parameter", name=name, value=value)
    assert answer["successful"], answer["reason"]


def serve(rig, names):
    """Ask for names and wait until they serve."""
    since = rig.listener.mark()
    assert rig.talker.do("set_vocabulary", names=names)["accepted"]
    wanted = sorted(["background", *names])
    rig.listener.wait("label_info", lambda event: sorted(event["classes"].values()) == wanted, since=since)


def send_until(rig, done, what):
    """Send images, one after the other, until `done`."""
    rig.talker.do("advertise", topic="image")
    for _ in range(60):
        rig.talker.do("image", picture=PICTURE)
        try:
            rig.node.until(done, what, timeout=1.0)
            return
        except AssertionError:
            assert rig.node.running, rig.node.report()
    raise AssertionError(f"no {what}\n{rig.node.report()}")


def fail_once(rig, place, what):
    """Have one image meet a fault; the number of lines before it."""
    lines = len(rig.node.lines)
    rig.node.fault(**{place: (what, 1)})
    send_until(rig, lambda: f"fault at {place}" in rig.node.lines[lines:], f"fault at {place}")
    return lines


# Loading.


@pytest.mark.parametrize("place", ["text", "load_clip", "load_diffusion", "warm_up"])
def test_memory_that_is_missing_while_loading_fails_configure_and_the_next_one_works(unloaded, place):
    since = unloaded.listener.mark()
    unloaded.node.fault(**{place: ("out of memory", 1)})
    assert not go(unloaded, "configure")
    assert state(unloaded) == "unconfigured"
    told(unloaded, ERROR, "out of memory", since)
    assert go(unloaded, "configure")
    assert go(unloaded, "cleanup")


def test_a_weight_file_that_is_damaged_or_gone_fails_configure_until_it_is_mended(unloaded, tmp_path):
    import nerve_core.embedded

    whole, broken = next(iter(nerve_core.embedded.__path__)), tmp_path / "pair"
    shutil.copytree(whole, broken, symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    set_parameter(unloaded, "model", str(broken))
    weights = broken / "diffusion" / "unet" / "diffusion_pytorch_model.safetensors"
    good = weights.read_bytes()
    flipped = bytearray(good)
    flipped[8] ^= 0xFF
    for bad in (good[: len(good) // 2], bytes(flipped), b"", None):
        since = unloaded.listener.mark()
        if bad is None:
            weights.unlink()
        else:
            weights.write_bytes(bad)
        assert not go(unloaded, "configure")
        assert state(unloaded) == "unconfigured"
        event = told(unloaded, ERROR, "configuring failed", since)
        assert str(broken / "diffusion") in event["message"]
    weights.write_bytes(good)
    assert go(unloaded, "configure")
    assert go(unloaded, "cleanup")
    set_parameter(unloaded, "model", "embedded")


def test_a_cache_that_nobody_can_write_does_not_matter(unloaded, cache):
    set_parameter(unloaded, "cache_dir", "/dev/null/cache")
    lines = len(unloaded.node.lines)
    assert go(unloaded, "configure")
    unloaded.node.wait_log("text embeddings are not kept in /dev/null/cache", since=lines)
    assert go(unloaded, "activate")
    unloaded.segment(PICTURE)
    assert go(unloaded, "deactivate")
    assert go(unloaded, "cleanup")
    set_parameter(unloaded, "cache_dir", str(cache))


# One image.


@pytest.mark.parametrize(
    ("place", "what"), [*((place, "out of memory") for place in STAGES), ("refine", "out of host memory")]
)
def test_an_image_without_memory_is_dropped_and_the_next_one_is_segmented(rig, place, what):
    since = rig.listener.mark()
    fail_once(rig, place, what)
    event = told(rig, ERROR, "out of memory on cpu", since)
    assert "image dropped" in event["message"]
    assert event["values"]["state"] == "active"
    rig.segment(PICTURE)


@pytest.mark.parametrize("place", ["refine", "publish"])
def test_an_error_costs_one_image_and_is_told(rig, place):
    since = rig.listener.mark()
    fail_once(rig, place, "error")
    event = told(rig, ERROR, "simulated fault", since)
    assert event["values"]["state"] == "active"
    rig.segment(PICTURE)


def test_a_label_info_that_could_not_be_published_is_told_before_the_next_mask(rig):
    since, lines = rig.listener.mark(), len(rig.node.lines)
    rig.node.fault(label_info=("error", 1))
    set_parameter(rig, "threshold", 0.125)
    send_until(rig, lambda: "fault at label_info" in rig.node.lines[lines:], "fault at label_info")
    rig.segment(PICTURE)
    rig.listener.wait("label_info", lambda event: event["threshold"] == 0.125, since=since)
    set_parameter(rig, "threshold", -1.0)

    since, lines = rig.listener.mark(), len(rig.node.lines)
    rig.node.fault(label_info=("error", 1))
    assert rig.talker.do("set_vocabulary", names=["cone"])["accepted"]
    rig.node.happened("label_info", lines)
    mask = rig.segment(PICTURE)["mask"]
    info = rig.listener.wait("label_info", lambda event: "cone" in event["classes"].values(), since=since)
    assert mask["sent"] > info["sent"]
    serve(rig, NAMES)


def test_every_image_that_came_in_is_accounted_for(rig):
    all_is_well(rig)

    def adds_up(event):
        received, *ended = (int(event["values"][name]) for name in COUNTS)
        return received == sum(ended)

    rig.listener.wait("diagnostics", adds_up, since=rig.listener.mark(), timeout=20.0)


# Vocabularies.


@pytest.mark.parametrize("what", ["out of memory", "error"])
def test_a_vocabulary_that_cannot_be_embedded_leaves_the_one_before(rig, what):
    names = [f"{what} {number}" for number in range(3)]
    since, lines = rig.listener.mark(), len(rig.node.lines)
    rig.node.fault(text=(what, 1))
    assert rig.talker.do("set_vocabulary", names=names)["accepted"]
    rig.node.wait_log("could not be embedded; the one before serves", since=lines)
    told(rig, ERROR, "out of memory" if what == "out of memory" else "simulated fault", since)
    mask = rig.segment(PICTURE)["mask"]
    classes = rig.listener.seen("label_info")[-1]["classes"]
    assert sorted(classes.values()) == ["background", *NAMES]
    assert set(mask["counts"]) <= set(classes)
    rig.talker.until(lambda: rig.talker.do("get_parameter", name="vocabulary")["value"] == NAMES, "old names")
    # Asked for again, it serves.
    serve(rig, names)
    serve(rig, NAMES)


def test_a_full_disk_under_the_cache_does_not_stop_new_names(rig, cache):
    size = sum(path.stat().st_size for path in cache.iterdir())
    lines = len(rig.node.lines)
    rig.node.fault(disk=("full", 0))
    serve(rig, [f"thing {number}" for number in range(60)])
    rig.node.wait_log("text embeddings are not kept in .*full", since=lines)
    rig.segment(PICTURE)
    assert sum(path.stat().st_size for path in cache.iterdir()) <= size
    rig.node.fault()
    serve(rig, NAMES)


# Locating.


def test_a_question_that_fails_is_answered_and_the_next_one_too(rig):
    rig.segment(PICTURE)
    for what in ("out of memory", "error"):
        rig.node.fault(refine=(what, 1))
        answer = rig.talker.do("locate", name=f"strange thing of {what}")
        assert not answer["success"]
        assert what.replace("error", "simulated fault") in answer["message"]
        assert rig.talker.do("locate", name="something else")["success"]


# An image that does not end.


def test_a_stuck_image_is_told_questions_are_answered_and_it_goes_on_when_that_ends(rig):
    set_parameter(rig, "inference_timeout", STUCK_AFTER)
    since, lines = rig.listener.mark(), len(rig.node.lines)
    rig.node.fault(clip=("hang", 1))
    send_until(rig, lambda: "fault at clip" in rig.node.lines[lines:], "fault at clip")
    event = told(rig, ERROR, "has not ended for", since)
    assert f"inference_timeout is {STUCK_AFTER:g} s" in event["message"]
    assert "faulty_node.py" in "\n".join(rig.node.lines[lines:])  # where it is
    answer = rig.talker.do("locate", name="ball")
    assert not answer["success"]
    assert "has not ended for" in answer["message"]
    rig.node.fault()
    rig.segment(PICTURE)
    all_is_well(rig)
    assert rig.talker.do("locate", name="ball")["success"]


def test_a_stuck_image_does_not_hold_up_deactivate(rig):
    set_parameter(rig, "inference_timeout", STUCK_AFTER)
    lines = len(rig.node.lines)
    rig.node.fault(diffusion=("hang", 1))
    send_until(rig, lambda: "fault at diffusion" in rig.node.lines[lines:], "fault at diffusion")
    assert go(rig, "deactivate")
    since = rig.listener.mark()
    # What needs the thread says why it cannot be.
    assert not go(rig, "activate")
    event = told(rig, ERROR, "has not ended for", since)
    assert event["values"]["state"] == "inactive"
    rig.node.fault()
    rig.node.until(lambda: go(rig, "activate"), "activation")  # once the image has come to its end
    rig.segment(PICTURE)


# No memory again and again.


def run_out_of_memory(rig):
    """Three images in a row without memory."""
    lines = len(rig.node.lines)
    rig.node.fault(clip=("out of memory", 3))
    send_until(rig, lambda: rig.node.lines[lines:].count("fault at clip") == 3, "third fault at clip")


def test_out_of_memory_three_times_in_a_row_deactivates_where_that_is_asked_for(rig):
    since = rig.listener.mark()
    set_parameter(rig, "on_out_of_memory", "deactivate")
    run_out_of_memory(rig)
    event = told(rig, ERROR, "out of memory 3 times in a row", since)
    assert event["values"]["state"] == "inactive"
    assert state(rig) == "inactive"
    assert go(rig, "activate")
    rig.segment(PICTURE)


def test_out_of_memory_three_times_in_a_row_goes_on_on_the_cpu(rig):
    assert go(rig, "deactivate")
    assert go(rig, "cleanup")
    set_parameter(rig, "on_out_of_memory", "cpu")
    rig.node.fault(pretend="cuda:0")
    assert go(rig, "configure")
    assert go(rig, "activate")
    since = rig.listener.mark()
    assert rig.listener.wait("diagnostics", since=since)["values"]["device"] == "cuda:0"
    run_out_of_memory(rig)
    since = rig.listener.mark()
    rig.talker.do("stream", picture=PICTURE, rate=5.0)  # silence would be told first
    event = told(rig, WARN, "running on the CPU", since)
    rig.talker.do("stop_stream")
    assert event["values"]["device"] == "cpu"
    mask = rig.segment(PICTURE)["mask"]
    assert set(mask["counts"]) <= set(rig.listener.seen("label_info")[-1]["classes"])
    # The next configure tries the device again.
    assert go(rig, "deactivate")
    assert go(rig, "cleanup")
    rig.node.fault(pretend="")
    assert go(rig, "configure")
    assert go(rig, "activate")
    rig.segment(PICTURE)
    all_is_well(rig)


# The end.


def test_a_node_killed_in_mid_inference_works_again_once_it_is_started_again(rig, cache):
    lines = len(rig.node.lines)
    rig.node.fault(clip=("hang", 1))
    send_until(rig, lambda: "fault at clip" in rig.node.lines[lines:], "fault at clip")
    rig.node.send(signal.SIGKILL)
    assert rig.node.ended() == -signal.SIGKILL
    since = rig.listener.mark()
    rig.node = rig.keep(FaultyNode(rig.env, vocabulary=NAMES, cache_dir=str(cache), exit_when_stuck=True))
    rig.node.wait_active()
    rig.segment(PICTURE)
    assert rig.listener.wait("label_info", since=since)["classes"] == {"0": "background", "1": "ball", "2": "ladder"}


def test_a_node_that_is_to_end_when_stuck_ends_with_code_70(rig):
    set_parameter(rig, "inference_timeout", STUCK_AFTER)
    lines = len(rig.node.lines)
    rig.node.fault(readout=("hang", 1))
    send_until(rig, lambda: "fault at readout" in rig.node.lines[lines:], "fault at readout")
    assert rig.node.ended() == 70
    assert "exit_when_stuck" in "\n".join(rig.node.lines[lines:])
