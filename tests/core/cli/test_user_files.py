"""What a user's folder may hold: the `nerve` command loses nothing of it, and one odd entry ends no batch."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from generated_sets import write_folder
from nerve_core.embedded.scenes import draw_scene, draw_scenes
from nerve_core.output import RECORD
from results_schema import assert_fits, printed
from unprivileged import without_privileges

NAMES = ("--names", "ball", "--device", "cpu")


def photo(path: Path, size: tuple[int, int] = (48, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = cv2.imencode(path.suffix, draw_scene(5, size=size).image[:, :, ::-1])[1]
    path.write_bytes(encoded.tobytes())
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Nothing is replaced that nerve did not write


@pytest.mark.parametrize("part", ["mask.png", "overlay.png", "confidence.json"])
def test_segment_keeps_a_file_that_it_did_not_write(nerve, tmp_path, part):
    photo(tmp_path / "own" / "a.png")
    photo(tmp_path / "own" / "b.png")
    (tmp_path / "own" / f"b_{part}").write_bytes(b"mine")
    before = contents(tmp_path / "own")
    code, out, err = nerve("segment", tmp_path / "own", *NAMES, "--out", tmp_path / "own")
    assert (code, out) == (2, "")
    assert f"b_{part} would be replaced" in err
    assert "--overwrite" in err
    assert contents(tmp_path / "own") == before, "it was refused before any work was done"
    code, _, err = nerve("segment", tmp_path / "own" / "b.png", *NAMES, "--out", tmp_path / "own", "--overwrite")
    assert code == 0, err
    assert (tmp_path / "own" / f"b_{part}").read_bytes() != b"mine"


def test_segment_keeps_a_mask_that_was_corrected_by_hand(nerve, tmp_path):
    path = photo(tmp_path / "a.png")
    assert nerve("segment", path, *NAMES, "--out", tmp_path / "out")[0] == 0
    assert nerve("segment", path, *NAMES, "--out", tmp_path / "out")[0] == 0, "its own it may replace"
    mask = tmp_path / "out" / "a_mask.png"
    mask.write_bytes(mask.read_bytes() + b"edited")
    code, _, err = nerve("segment", path, *NAMES, "--out", tmp_path / "out")
    assert code == 2
    assert "a_mask.png would be replaced, and nerve did not write it as it is now" in err
    assert mask.read_bytes().endswith(b"edited")


@pytest.mark.parametrize("name", ["results.json", "report.html", "scores.csv", "per_class.csv", "confusion.csv"])
def test_eval_keeps_a_file_that_it_did_not_write(nerve, tmp_path, name):
    (tmp_path / name).write_text("mine")
    code, out, err = nerve("eval", "scenes", "--count", 1, "--refine", "none", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert f"{name} would be replaced" in err
    assert contents(tmp_path) == {name: b"mine"}


def test_eval_with_overwrite_and_again_without(nerve, tmp_path):
    (tmp_path / "results.json").write_text("mine")
    options = ("eval", "scenes", "--count", 1, "--refine", "none", "--out", tmp_path)
    for more in (("--overwrite",), ()):
        code, _, err = nerve(*options, *more)
        assert code == 0, err
    assert json.loads((tmp_path / "results.json").read_text())["format"] == "nerve report"


def test_tune_keeps_settings_that_were_changed_by_hand(nerve, tmp_path):
    root = write_folder(tmp_path / "set", draw_scenes(7, 2, size=(60, 80)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text('{"alpha": 0.5}')
    code, _, err = nerve("tune", root, "--trials", 2, "--axes", "alpha", "--out", tmp_path / "out")
    assert code == 2
    assert "settings.json would be replaced" in err
    assert inside(tmp_path / "out") == ["settings.json"]


def test_reports_keep_a_page_that_they_did_not_write(nerve, tmp_path):
    run = tmp_path / "run"
    assert nerve("eval", "scenes", "--count", 1, "--refine", "none", "--out", run)[0] == 0
    assert nerve("report", "show", run)[0] == 0
    (run / "report.html").write_text("mine")
    code, _, err = nerve("report", "show", run)
    assert code == 2
    assert "report.html would be replaced" in err
    assert (run / "report.html").read_text() == "mine"
    assert nerve("report", "show", run, "--overwrite")[0] == 0
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "comparison.html").write_text("mine")
    code, _, err = nerve("report", "compare", run, run, "--out", tmp_path / "both")
    assert code == 2
    assert "comparison.html would be replaced" in err
    assert nerve("report", "compare", run, run, "--out", tmp_path / "both", "--overwrite")[0] == 0


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != RECORD)


# Its own output is not segmented


def test_segment_does_not_segment_what_it_wrote(nerve, tmp_path):
    own = tmp_path / "own"
    photo(own / "a.png")
    for done_before in (0, 2, 2):
        code, out, err = nerve("segment", own, *NAMES, "--out", own, "--json")
        assert code == 0, err
        found = printed(out)
        assert_fits("segment", found)
        assert [Path(item["image"]).name for item in found["images"]] == ["a.png"]
        assert len(found["own"]) == done_before
        assert err.count("that nerve wrote itself") == min(done_before, 1), err
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in own.glob("*.png"):  # as a shell's * does, without what is hidden
        (copied / path.name).write_bytes(path.read_bytes())
    code, out, _ = nerve("segment", copied, *NAMES, "--out", tmp_path / "out", "--json")
    assert code == 0
    assert [Path(item["image"]).name for item in printed(out)["images"]] == ["a.png"]
    code, _, err = nerve("segment", own / "a_mask.png", *NAMES, "--out", tmp_path / "out")
    assert code == 2
    assert "nerve wrote itself" in err


# One odd entry ends no batch


def test_segment_leaves_out_what_cannot_be_read_and_says_what(nerve, tmp_path):
    folder = tmp_path / "in"
    good = [photo(folder / "good.png"), photo(folder / "frames.jpg" / "inside.png")]
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "empty.jpg").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "._good.png").write_bytes(b"\0\5\x16\7" + bytes(200))
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for kind in (".png", ".jpg"):
        whole = photo(folder / f"cut{kind}", (120, 160))
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    photo(folder / ("n" * 251 + ".png"))
    missing = tmp_path / "missing.png"
    reasons = {
        "dangling.png": "is a link to nowhere.png, which cannot be read",
        "circle.png": "is a link to circle.png, which cannot be read",
        "empty.jpg": "is an empty folder",
        "pipe.png": "is no plain file",
        "._good.png": "macOS",
        "zero.png": "is empty",
        "text.png": "nothing that OpenCV can decode",
        "lfs.png": "git lfs pull",
        "cut.png": "is cut short",
        "cut.jpg": "is cut short",
        "n" * 251 + ".png": "too long",
        "missing.png": "is neither a file nor a folder",
    }
    code, out, err = nerve("segment", missing, folder, *NAMES, "--out", tmp_path / "out", "--json")
    found = printed(out)
    assert_fits("segment", found)
    assert sorted(item["image"] for item in found["images"]) == sorted(map(str, good))
    assert {Path(item["image"]).name for item in found["unread"]} == set(reasons)
    for item in found["unread"]:
        assert reasons[Path(item["image"]).name] in item["reason"], item
        assert item["image"] in err
    assert code == 2
    assert "12 of 14 are left out" in err
    assert "Traceback" not in err


def test_segment_leaves_out_what_may_not_be_read(nerve, tmp_path):
    photo(tmp_path / "in" / "good.png")
    photo(tmp_path / "in" / "shut.png").chmod(0)
    photo(tmp_path / "in" / "closed" / "a.png").parent.chmod(0)

    def job() -> None:
        code, out, _ = nerve("segment", tmp_path / "in", *NAMES, "--out", tmp_path / "out", "--json")
        assert code == 2
        found = printed(out)
        assert len(found["images"]) == 1
        reasons = {Path(item["image"]).name: item["reason"] for item in found["unread"]}
        assert reasons == {
            "shut.png": "cannot be read: Permission denied",
            "closed": "cannot be looked into: Permission denied",
        }

    try:
        without_privileges(job)
    finally:
        (tmp_path / "in" / "closed").chmod(0o700)


def test_segment_of_nothing_but_odd_entries_is_refused(nerve, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").symlink_to("nowhere")
    code, out, err = nerve("segment", tmp_path / "in", *NAMES, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "there is no image to segment" in err
    assert "is a link to nowhere" in err
    assert not (tmp_path / "out").exists()


# A full disk


def test_a_full_disk_is_named_and_leaves_nothing_half_written(nerve, tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        photo(tmp_path / "in" / name, (240, 320) if name == "b.png" else (48, 64))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        code, out, err = nerve("segment", tmp_path / "in", *NAMES, "--out", tmp_path / "out", "--json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    found = printed(out)
    assert [Path(item["image"]).name for item in found["images"]] == ["a.png"]
    assert [Path(item["image"]).name for item in found["unread"]] == ["b.png", "c.png"]
    assert "b_overlay.png cannot be written, File too large" in found["unread"][0]["reason"]
    assert "disk was full" in found["unread"][1]["reason"]
    assert "b_overlay.png cannot be written" in err
    assert {"a_mask.png", "a_overlay.png", "a_confidence.json"} <= set(inside(tmp_path / "out"))
    assert "b_overlay.png" not in inside(tmp_path / "out")
    for path in (tmp_path / "out").glob("*.png"):
        assert cv2.imread(str(path)) is not None, f"{path} is half a picture"


def test_a_disk_of_a_few_kilobytes(nerve, tmp_path):
    """A file system of its own, where that may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("a file system cannot be mounted here")
    try:
        noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "a.png"), noise)
        code, out, err = nerve("segment", tmp_path / "a.png", *NAMES, "--out", disk, "--json")
        assert code == 2
        assert "No space left on device: make room" in printed(out)["unread"][0]["reason"], err
        assert all(path.stat().st_size for path in disk.iterdir()), "half a file"
    finally:
        subprocess.run(["umount", disk], check=True)
