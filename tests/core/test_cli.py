"""The `nerve` command: what it writes, what it prints, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from nerve_core import Segmenter, Vocabulary
from nerve_core.embedded.scenes import draw_scene
from nerve_core.visualize import palette


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two scenes of different sizes, one of them in a folder below, and a file that is no image."""
    inside = tmp_path / "in" / "below"
    inside.mkdir(parents=True)
    for path, size in ((tmp_path / "in" / "a.png", (120, 160)), (inside / "a.jpg", (99, 75))):
        cv2.imwrite(str(path), draw_scene(5, size=size).image[:, :, ::-1])
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def test_segment_writes_a_mask_with_a_palette_an_overlay_and_confidence_for_every_image(nerve, folder, tmp_path):
    code, out, _ = nerve("segment", folder, "--names", "ball, cube|box", "--out", tmp_path / "out", "--json")
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert [Path(item["image"]).name for item in result["images"]] == ["a.png", "a.jpg"]
    assert len({item["mask"] for item in result["images"]}) == 2, "two images of one name overwrote each other"
    for item, size in zip(result["images"], ((120, 160), (99, 75)), strict=True):
        mask = Image.open(item["mask"])
        assert mask.mode == "P"
        assert np.array_equal(np.array(mask.getpalette()).reshape(-1, 3), palette())
        assert np.array(mask).shape == size
        assert cv2.imread(item["overlay"]).shape[:2] == size
        assert [entry["name"] for entry in item["classes"]] == ["ball", "cube"]


def test_the_mask_is_what_the_segmenter_says(nerve, folder, tmp_path):
    _, out, _ = nerve("segment", folder / "a.png", "--names", "ball, cube", "--out", tmp_path / "out", "--json")
    item = json.loads(out.splitlines()[-1])["images"][0]
    image = cv2.cvtColor(cv2.imread(str(folder / "a.png")), cv2.COLOR_BGR2RGB)
    expected = Segmenter.from_pretrained("embedded", device="cpu")(image, Vocabulary(["ball", "cube"]))
    assert np.array_equal(np.array(Image.open(item["mask"])), expected.labels)
    for entry, wanted in zip(item["classes"], expected.class_confidence, strict=True):
        assert entry["area"] == wanted.area
        assert entry["presence"] == pytest.approx(wanted.presence)


def test_settings_and_preset_reach_the_segmenter(nerve, folder, tmp_path):
    arguments = ("--preset", "paper", "--set", "alpha=0.5", "--set", "kernel=softmax", "--json", "--out", tmp_path)
    _, out, _ = nerve("segment", folder / "a.png", "--names", "ball", *arguments)
    description = json.loads(out.splitlines()[-1])["model"]
    assert "alpha 0.5" in description
    assert "kernel softmax" in description
    assert "truncated with 40 steps" in description


def test_an_unreadable_image_is_named_and_the_others_are_done(nerve, folder, tmp_path):
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "empty.png").write_bytes(b"")
    code, out, err = nerve("segment", folder, "--names", "ball", "--out", tmp_path / "out", "--json")
    assert code == 2
    assert "broken.png" in err
    assert "empty.png" in err
    assert len(json.loads(out.splitlines()[-1])["images"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("segment", "nowhere.png", "--names", "ball"), "nowhere.png is neither a file nor a folder"),
        (("segment", "{folder}", "--names", " , "), "--names is empty"),
        (("segment", "{folder}", "--names", "ball", "--model", "nothing"), "neither a known pair"),
        (("segment", "{folder}", "--names", "ball", "--device", "tpu"), "auto, cpu, cuda"),
        (("segment", "{folder}", "--names", "ball", "--precision", "int4"), "fp16"),
        (("segment", "{folder}", "--names", "ball", "--set", "alpha"), "NAME=VALUE"),
        (("segment", "{folder}", "--names", "ball", "--set", "alpha=2"), "alpha is 2"),
        (("segment", "{folder}", "--names", "ball", "--set", "speed=2"), "unknown settings speed"),
        (("segment", "{folder}", "--names", "x" * 129), "at most 128"),
        (("eval", "scenes", "--count", "1", "--kernel", "cubic"), "choose one of"),
        (("eval", "scenes", "--count", "1", "--refine", "all"), "nerve or none"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(nerve, folder, tmp_path, arguments, said):
    arguments = [str(part).replace("{folder}", str(folder)) for part in arguments]
    code, out, err = nerve(*arguments, *(("--out", tmp_path / "out") if arguments[0] == "segment" else ()))
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert out == ""


def test_eval_scenes_prints_one_json_object_that_any_run_repeats(nerve):
    runs = [nerve("eval", "scenes", "--seed", "5", "--count", "2", "--json") for _ in range(2)]
    first, second = (json.loads(out.splitlines()[-1]) for _, out, _ in runs)
    assert first["count"] == 2
    assert first["seed"] == 5
    assert first["seconds_per_image"] > 0
    assert set(first["per_class"]) >= {"background", "ball", "ladder"}
    assert first["miou"] == second["miou"]
    alone = json.loads(
        nerve("eval", "scenes", "--seed", "5", "--count", "2", "--refine", "none", "--json")[1].splitlines()[-1]
    )
    assert alone["miou"] != first["miou"]
