"""The folder of drawn scenes: the same as the scenes in memory, and never mixed with another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from nerve_core.embedded.scenes import NAMES, draw_scenes
from nerve_core.evaluation.datasets import open_dataset

TOOL = Path(__file__).parents[3] / "tools" / "scene_dataset.py"


def make(out: Path, *options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), "--out", str(out), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_the_folder_holds_the_scenes_of_the_seed_to_the_pixel(tmp_path):
    made = make(tmp_path / "new" / "scenes", "--seed", 11, "--count", 2)
    assert made.returncode == 0, made.stderr
    found = open_dataset("folder", tmp_path / "new" / "scenes")
    assert found.names == NAMES
    assert found.background is None
    assert found.notes == ()
    for sample, scene in zip(found.samples, draw_scenes(11, 2), strict=True):
        image, labels = found.load(sample)
        assert np.array_equal(image, scene.image)
        assert np.array_equal(labels, scene.labels)


def test_a_folder_that_is_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    made = make(tmp_path, "--count", 1)
    assert made.returncode == 1
    assert "is not empty" in made.stderr
    assert "Traceback" not in made.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
