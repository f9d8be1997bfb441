"""The `nerve` command: what it writes, what it prints, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from generated_sets import write_folder
from nerve_core import Segmenter, Vocabulary
from nerve_core.cli.options import read_settings
from nerve_core.embedded.scenes import draw_scene, draw_scenes
from nerve_core.images.visualize import palette


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


def test_a_name_that_the_pair_does_not_know_is_told_with_what_to_do(nerve, folder, tmp_path):
    arguments = ("segment", folder, "--out", tmp_path / "out", "--json", "--names")
    _, out, err = nerve(*arguments, "cat, ball")
    (note,) = json.loads(out.splitlines()[-1])["notes"]
    assert "'embedded' does not know 'cat': it was trained on drawn scenes, no photographs" in note
    assert "nerve models pull sd21-clipl14, then --model sd21-clipl14" in note
    assert err.count(note) == 1  # once for all images, on one line
    _, out, err = nerve(*arguments, "ball")
    assert "was trained on drawn scenes, no photographs. For photographs" in err
    assert json.loads(out.splitlines()[-1])["notes"][0] in err


def test_names_may_be_a_list_or_a_file_and_the_background_is_label_0(nerve, folder, tmp_path):
    (tmp_path / "names.txt").write_text("# mine\n- ball\n- Background|wall\n- cube|box\n")
    for names in (tmp_path / "names.txt", f"@{tmp_path}/names.txt", "['ball', 'background|wall', 'cube']"):
        _, out, err = nerve("segment", folder, "--names", names, "--out", tmp_path / "out", "--json")
        result = json.loads(out.splitlines()[-1])
        assert [entry["name"] for entry in result["images"][0]["classes"]] == ["ball", "cube"]
        assert "is the name of label 0" in result["notes"][0]
        assert result["notes"][0] in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("segment", "{folder}", "--names", "background"), "--names is empty"),
        (("segment", "{folder}", "--names", '["ball", "cube"'), "bracket without its partner"),
        (("segment", "{folder}", "--names", "none.txt"), "there is no such file"),
        (("segment", "{folder}", "--names", "ball", "--negatives", '["wall"'), "bracket without its partner"),
        (("segment", "nowhere.png", "--names", "ball"), "nowhere.png is neither a file nor a folder"),
        (("segment", "{folder}", "--names", " , "), "--names is empty"),
        (("segment", "{folder}", "--names", "ball", "--model", "nothing"), "neither a known pair"),
        (("segment", "{folder}", "--names", "ball", "--device", "tpu"), "auto, cpu, cuda"),
        (("segment", "{folder}", "--names", "ball", "--precision", "int4"), "fp16"),
        (("segment", "{folder}", "--names", "ball", "--set", "alpha"), "NAME=VALUE"),
        (("segment", "{folder}", "--names", "ball", "--set", "alpha=2"), "alpha is 2"),
        (("segment", "{folder}", "--names", "ball", "--set", "speed=2"), "unknown settings speed"),
        (("segment", "{folder}", "--names", "x" * 129), "at most 128"),
        (("eval", "scenes", "--count", "1", "--set", "kernel=cubic"), "choose one of"),
        (("eval", "scenes", "--count", "1", "--refine", "all"), "refinement 'all' is unknown; choose one of nerve"),
        (("eval", "scenes", "--count", "1", "--head", "none"), "head 'none' is unknown"),
        (("eval", "scenes", "--count", "1", "--edges", "crf"), "edges 'crf' is unknown"),
        (("eval", "scenes", "--count", "1", "--device", "tpu"), "auto, cpu, cuda"),
        (("eval", "scenes", "--count", "1", "--set", "previous_frame_start=true"), "leave it off"),
        (("eval", "scenes", "--count", "1", "--set", "@nowhere.json"), "nowhere.json"),
        (("eval", "voc21", "--root", "nowhere"), "nowhere is no folder"),
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
    arguments = ("eval", "scenes", "--seed", 5, "--count", 2, "--refine", "nerve,none", "--json")
    runs = [nerve(*arguments) for _ in range(2)]
    first, second = (json.loads(out.splitlines()[-1])["sets"][0] for _, out, _ in runs)
    assert first["images"] == 2
    assert [score["variant"] for score in first["scores"]] == ["nerve", "none"]
    for score, other in zip(first["scores"], second["scores"], strict=True):
        assert score["seconds"] > 0
        assert set(score["per_class"]) >= {"background", "ball", "ladder"}
        assert score["interval"][0] <= score["miou"] <= score["interval"][1]
        assert {**score, "seconds": 0} == {**other, "seconds": 0}
    assert first["scores"][0]["miou"] != first["scores"][1]["miou"]
    assert "mIoU" in runs[0][2]


def test_a_report_and_pictures_are_written_where_out_is_given(nerve, tmp_path):
    arguments = ("eval", "scenes", "--count", 2, "--refine", "none", "--out", tmp_path / "out")
    code, out, err = nerve(*arguments)
    assert (code, out) == (0, ""), err
    report = json.loads((tmp_path / "out" / "results.json").read_text())["report"]
    assert report["kind"] == "evaluation"
    pictures = report["sets"][0]["pictures"]
    assert [picture["rank"] for picture in pictures] == ["worst", "worst"], "two images, each once"
    assert pictures[0]["miou"] <= pictures[1]["miou"]
    assert all((tmp_path / "out" / picture["overlay"]).is_file() for picture in pictures)
    assert (tmp_path / "out" / "report.html").is_file()
    # another run is refused, and the same one again draws no picture anew
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pictures").iterdir()}
    assert nerve(*arguments)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pictures").iterdir()} == kept
    code, _, err = nerve("eval", "scenes", "--count", 3, "--refine", "none", "--out", tmp_path / "out")
    assert code == 2
    assert "set.images is 2 there and 3 now" in err
    code, _, err = nerve("eval", "folder", "--root", tmp_path, "--out", tmp_path / "out")
    assert code == 2


def test_a_folder_with_another_sets_run_is_refused(nerve, tmp_path):
    (tmp_path / "out" / "voc21").mkdir(parents=True)
    (tmp_path / "out" / "voc21" / "run.json").write_text("{}")
    code, _, err = nerve("eval", "scenes", "--count", 1, "--out", tmp_path / "out")
    assert code == 2
    assert "holds runs on voc21, which this command does not measure" in err


def test_an_image_that_cannot_be_read_is_named_or_left_out(nerve, tmp_path):
    root = write_folder(tmp_path / "set", draw_scenes(7, 3, size=(60, 80)))
    broken = sorted((root / "JPEGImages").iterdir())[1]
    broken.write_bytes(b"no picture")
    arguments = ("eval", "folder", "--root", root, "--refine", "none", "--json")
    code, out, err = nerve(*arguments)
    assert (code, out) == (2, "")
    assert broken.name in err
    assert "--keep-going" in err
    assert "Traceback" not in err
    code, out, err = nerve(*arguments, "--keep-going")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["sets"][0]["scores"][0]["images"] == 2
    assert f"image {broken.stem} is left out" in err


def test_settings_can_come_from_a_file_and_later_ones_win(tmp_path):
    (tmp_path / "a.json").write_text('{"alpha": 0.4, "kernel": "relu"}')
    assert read_settings([f"@{tmp_path / 'a.json'}", "alpha=0.5"]) == {"alpha": 0.5, "kernel": "relu"}
    (tmp_path / "windows.json").write_bytes(b'\xef\xbb\xbf{\r\n"alpha": 0.5\r\n}\r\n')
    assert read_settings([f"@{tmp_path / 'windows.json'}"]) == {"alpha": 0.5}
    for text, said in (("[1]", "one JSON object"), ("{", "is no JSON")):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_settings([f"@{tmp_path / 'b.json'}"])
