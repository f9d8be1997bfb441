"""A camera a hundred times too fast, over real DDS: nothing queues, nothing is lost uncounted, memory stays.

Ages and processor time are measured by benchmarks/overload.py; here is what must hold on any machine, however slow.
"""

import json
import sys

import pytest

import harness
from nerve_benchmarks.overload import resident_mb

pytestmark = pytest.mark.alone
SIZES = {"640x480": (640, 480), "1920x1080": (1920, 1080)}
NAMES = ["ball", "ladder", "chair"]
ENDS = ("images_segmented", "images_dropped", "images_rejected")
MASKS = 6
EXTRA_MB = 200.0
"""Memory that a stream may take beyond what single images of its size took. A queue of it would take gigabytes."""


class Camera(harness.Process):
    """The camera of the benchmarks: it publishes what was serialized beforehand, as fast as it is asked to."""

    def __init__(self, env):
        code = "import sys; from nerve_benchmarks.node import camera; sys.exit(camera())"
        super().__init__([sys.executable, "-c", code], env, steered=True)

    def ask(self, **command):
        line = len(self.lines)
        self._child.stdin.write(json.dumps(command) + "\n")
        self._child.stdin.flush()
        answer = self.until(
            lambda: next((text for text in self.lines[line:] if text.startswith("{")), None),
            f"answer to {command}",
            harness.LOADING,
        )
        return json.loads(answer)


@pytest.fixture(scope="module")
def rig(new_rig):
    rig = new_rig(vocabulary=NAMES)
    rig.listen("mask", "diagnostics")
    rig.node.wait_active()
    return rig


@pytest.fixture(scope="module")
def camera(rig):
    return rig.keep(Camera(rig.env))


def idle(rig):
    """The node's figures once nothing of an image is left to do: they add up, and stay."""

    def adds_up(event):
        return int(event["values"]["images_received"]) == sum(int(event["values"][name]) for name in ENDS)

    last = rig.listener.wait("diagnostics", adds_up, since=rig.listener.mark())["values"]
    while True:
        values = rig.listener.wait("diagnostics", adds_up, since=rig.listener.mark())["values"]
        if values["images_received"] == last["images_received"]:
            return values
        last = values


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_a_camera_a_hundred_times_too_fast_fills_neither_memory_nor_a_queue(rig, camera, size):
    def stream(rate, masks):
        since = rig.listener.mark()
        camera.ask(do="start", size=size, encoding="rgb8", rate=rate)
        try:
            rig.listener.until(
                lambda: len(rig.listener.seen("mask", since)) >= masks, f"{masks} masks", harness.LOADING
            )
        finally:
            told = camera.ask(do="stop")
        return told, since

    stream(2.0, 2)
    before = idle(rig)
    resident = resident_mb(rig.node._child.pid)
    inference = float(before["stage_infer_p50_ms"]) / 1e3
    told, since = stream(100.0 / inference, MASKS)
    most = resident_mb(rig.node._child.pid)
    after = idle(rig)
    gained = {name: int(after[name]) - int(before[name]) for name in ("images_received", *ENDS)}

    masks = rig.listener.seen("mask", since)
    # Best effort: some of what was sent may never have come. What came was segmented or dropped, and nothing else.
    assert gained["images_received"] <= told["sent"]
    assert gained["images_received"] == sum(gained[name] for name in ENDS)
    assert gained["images_segmented"] >= len(masks)
    assert gained["images_rejected"] == 0
    assert gained["images_dropped"] > gained["images_segmented"]
    # When the camera stops, one image is under way and one waits: no queue is worked off.
    stamps = [event["stamp"][0] + 1e-9 * event["stamp"][1] for event in masks]
    assert stamps == sorted(stamps)
    spent = masks[-1]["received"] - masks[0]["received"]
    ages = sorted(event["sent"] - stamp for event, stamp in zip(masks, stamps, strict=True))
    slowest = max(inference, spent / (len(masks) - 1))
    assert ages[len(ages) // 2] <= 4.0 * slowest + 0.5
    assert most - resident < EXTRA_MB + 4 * 3e-6 * size[0] * size[1]


def test_a_single_image_after_all_that_is_segmented(rig):
    rig.segment({"width": 96, "height": 64})
