"""`nerve locate` as a person types it, beside a running node."""

import json
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest

import harness
from results_schema import assert_fits, printed, unnoticed

PICTURE = {"width": 160, "height": 120}


@pytest.fixture(scope="module")
def rig(new_rig):
    rig = new_rig(vocabulary=["ball", "mug|cup", "chair"])
    rig.listen("mask", "class_confidence")
    rig.node.wait_active()
    return rig


def nerve(rig, *arguments):
    command = [sys.executable, "-m", "nerve_ros.cli", "locate", *arguments]
    return subprocess.run(command, env=rig.env, capture_output=True, text=True, timeout=180.0, check=False)


def test_it_says_where_and_writes_the_mask(rig, tmp_path):
    events = rig.segment(PICTURE, kinds=("mask", "class_confidence"))
    entry = max(events["class_confidence"]["classes"], key=lambda entry: entry["area"])
    assert entry["area"]
    done = nerve(rig, entry["name"], "--json", "--mask", str(tmp_path / "mask.png"))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert_fits("locate", printed(done.stdout))
    assert unnoticed("locate", answer) == []
    assert answer["box"] == entry["box"]
    assert answer["stamp"] == pytest.approx(events["mask"]["stamp"][0] + 1e-9 * events["mask"]["stamp"][1])
    mask = cv2.imread(str(tmp_path / "mask.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (PICTURE["height"], PICTURE["width"])
    assert np.count_nonzero(mask == 255) == entry["area"]
    text = nerve(rig, entry["name"]).stdout
    assert f"{entry['name']}: found, confidence " in text
    assert "use_depth is false" in text


def test_a_mask_replaces_no_file_that_it_did_not_write(rig, tmp_path):
    rig.segment(PICTURE)
    mask = tmp_path / "mask.png"
    mask.write_text("mine")
    done = nerve(rig, "ball", "--mask", str(mask))
    assert done.returncode == 2
    assert "mask.png would be replaced" in done.stderr
    assert mask.read_text() == "mine"
    for more in (["--overwrite"], []):
        done = nerve(rig, "ball", "--mask", str(mask), *more)
        assert done.returncode in (0, 1), done.stderr
        assert cv2.imread(str(mask), cv2.IMREAD_UNCHANGED).shape == (PICTURE["height"], PICTURE["width"])


def test_a_name_is_printed_as_text(rig, tmp_path):
    rig.segment(PICTURE)
    name = "[/mug] [red]x[/] :smile:\u202e"
    done = nerve(rig, name)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.startswith("[/mug] [red]x[/] :smile:\\u202e: ")
    assert json.loads(nerve(rig, name, "--json").stdout)["name"] == name
    done = nerve(rig, "ball", "--mask", str(tmp_path / "no[/mug]\x1b[31m" / "mask.png"))
    assert done.returncode == 2
    assert r"no[/mug]\x1b[31m/mask.png cannot be written" in " ".join(done.stderr.split())


def test_what_is_not_in_the_image_ends_with_one(rig):
    assert rig.talker.do("set_parameter", name="presence_threshold", value=1.0)["successful"]
    try:
        rig.segment(PICTURE)
        done = nerve(rig, "ball")
    finally:
        assert rig.talker.do("set_parameter", name="presence_threshold", value=-1.0)["successful"]
    assert done.returncode == 1
    assert done.stdout.startswith("ball: not in the newest image")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["ball", "--namespace", "/nobody", "--wait", "1"], "nobody answers /nobody/nerve/locate in domain "),
        (["ball", "--namespace", "no body"], "it is written like /front/left"),
        (["x" * 200], "200 characters"),
        (["ball", "--mask", "/no/such/folder/mask.png"], "cannot be written"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence_and_two(rig, arguments, reason):
    rig.segment(PICTURE)
    done = nerve(rig, *arguments)
    assert done.returncode == 2
    assert reason in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order_with_a_sentence_and_its_own_exit_code(environment, number):
    nobody = ("ball", "--namespace", "/nobody", "--wait", "300")
    said = harness.assert_ends_by(number, "locate", *nobody, env=environment)
    assert "nobody answers" not in "\n".join(said)
