"""Tuning: what is found, what it may cost, and that nothing of the held-out images is known before the end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from generated_sets import write_folder
from nerve_core.embedded.scenes import draw_scenes
from nerve_core.evaluation.datasets import Dataset
from nerve_core.evaluation.metric import ConfusionMatrix
from nerve_core.evaluation.runner import Tally, make_task, run_set
from nerve_core.evaluation.tune import AXES, OWN, TUNED, Gain, curves, gain, search, split
from nerve_core.evaluation.variants import Variant
from nerve_core.models.pairs import find_pair
from nerve_core.settings import Settings
from small_sets import SIZE, KnownAnswers, SmallScenes

BASE = Settings().replaced(find_pair("embedded").settings)


class Landscape:
    """A score for any settings, without images: best at alpha 0.9, beta 0.25 and kernel softmax."""

    def __init__(self, score=None):
        self.score = score or self.smooth
        self.asked: list[tuple[int, str, list[str]]] = []

    @staticmethod
    def smooth(flat):
        off = abs(flat["alpha"] - 0.9) + abs(flat["beta"] - 0.25) + 0.3 * (flat["kernel"] != "softmax")
        return 0.9 - off / 4

    def __call__(self, number, axis, variants):
        self.asked.append((number, axis, [variant.name for variant in variants]))
        scores = {variant.name: self.score(BASE.replaced(variant.settings).flat()) for variant in variants}
        return SimpleNamespace(
            matrices={name: SimpleNamespace(mean_iou=lambda value=value: value) for name, value in scores.items()}
        )

    @property
    def trials(self):
        return sum(len(names) for _, _, names in self.asked)


def test_the_best_of_a_smooth_landscape_is_found_and_only_what_changed_is_told():
    land = Landscape()
    found, tried = search(land, BASE, ("kernel", "beta", "alpha"), 60)
    assert found == {"kernel": "softmax", "beta": 0.25, "alpha": 0.9}
    assert len(tried) == land.trials
    assert max(trial.miou for trial in tried) == pytest.approx(0.9)
    assert land.asked[0][2][0] == OWN, "the settings as they are come first"
    assert search(Landscape(), BASE, ("kernel", "beta", "alpha"), 60) == (found, tried), "it is deterministic"


def test_nothing_is_tried_twice_and_the_budget_is_kept():
    for trials in (2, 3, 7, 12, 60):
        land = Landscape()
        search(land, BASE, tuple(AXES), trials)
        names = [name for _, _, asked in land.asked for name in asked]
        assert len(names) == len(set(names)) <= trials
        assert [number for number, _, _ in land.asked] == list(range(1, len(land.asked) + 1))


def test_of_equals_the_settings_as_they_are_stay():
    found, _ = search(Landscape(lambda flat: 0.5), BASE, tuple(AXES), 60)
    assert found == {}


def test_axes_that_hang_together_are_found_in_a_second_round():
    # beta pays only once alpha is 0.5, and alpha comes after it
    def score(flat):
        return 0.5 + 0.1 * (flat["alpha"] == 0.5) + 0.2 * ((flat["alpha"], flat["beta"]) == (0.5, 1.0))

    land = Landscape(score)
    found, tried = search(land, BASE, ("beta", "alpha"), 60)
    assert found == {"alpha": 0.5, "beta": 1.0}
    assert {trial.round for trial in tried} == {1, 2}


@pytest.mark.parametrize(
    ("axes", "trials", "said"),
    [(("speed",), 9, "axes speed are unknown; choose of head"), ((), 9, "none are unknown"), (("beta",), 1, "too few")],
)
def test_a_search_that_cannot_be_is_refused(axes, trials, said):
    with pytest.raises(ValueError, match=said):
        search(Landscape(), BASE, axes, trials)


def test_every_setting_that_is_tried_is_one_that_the_pair_can_have():
    for changes in (change for axis in AXES.values() for change in axis):
        BASE.replaced(changes)


def test_the_split_is_disjoint_whole_and_drawn_by_the_seed():
    dataset = numbered_set(20)
    tuning, held = split(dataset, 0.3, 4)
    assert (len(tuning.samples), len(held.samples)) == (14, 6)
    assert sorted([*tuning.samples, *held.samples]) == list(dataset.samples)
    assert split(dataset, 0.3, 4) == (tuning, held)
    assert split(dataset, 0.3, 5)[1] != held
    assert held.samples != dataset.samples[:6]
    for count, share in ((3, 0.5), (20, 0.0), (20, 1.0), (20, 0.99)):
        with pytest.raises(ValueError, match="to tune on and"):
            split(numbered_set(count), share, 0)


def numbered_set(count):
    return Dataset("folder", "", None, ("a",), None, None, None, tuple(range(count)))


def gain_between(task, predicted):
    """A result whose counts are of made-up masks: variant -> (truth -> labels)."""
    tally = Tally([sample.id for sample in task.dataset.samples], list(predicted), 15)
    for sample in task.dataset.samples:
        _, truth = task.dataset.load(sample)
        counts = {}
        for name, make in predicted.items():
            matrix = ConfusionMatrix.of(15)
            matrix.add(truth, make(truth))
            counts[name] = matrix.sparse()
        tally.add(sample.id, counts, dict.fromkeys(counts, 0.1))
    return gain(SimpleNamespace(task=task, tally=tally))


def test_a_gain_has_its_interval_and_whether_it_is_distinguishable_from_none():
    task = make_task(SmallScenes(5, 12), [Variant(OWN), Variant(TUNED)], device="cpu")
    some = np.random.default_rng(0)

    def noisy(share):
        return lambda truth: np.where(some.random(truth.shape) < share, 0, truth).astype(np.uint8)

    better = gain_between(task, {OWN: noisy(0.5), TUNED: noisy(0.1)})
    assert better.distinguishable
    low, high = better.interval
    assert 0 < low < better.gain < high
    assert str(better).startswith("+")
    assert "not distinguishable" not in str(better)
    same = gain_between(task, {OWN: noisy(0.3), TUNED: noisy(0.3)})
    low, high = same.interval
    assert low <= 0 <= high
    assert not same.distinguishable
    assert "not distinguishable from the settings as they are" in str(same)
    worse = gain_between(task, {OWN: noisy(0.1), TUNED: noisy(0.5)})
    assert worse.distinguishable
    assert "worse than the settings as they are, so keep those" in str(worse)


def test_without_labels_nothing_is_said_of_the_gain():
    assert not Gain(float("nan"), None).distinguishable
    assert "nothing can be said" in str(Gain(float("nan"), None))


def test_the_gain_is_zero_of_equals():
    task = make_task(SmallScenes(5, 4), [Variant(OWN), Variant(TUNED)], device="cpu")
    found = gain_between(task, {OWN: lambda truth: truth, TUNED: lambda truth: truth})
    assert (found.gain, found.interval) == (0, (0, 0))
    assert not found.distinguishable
    assert run_set(task, KnownAnswers(task)).tally.matrices.keys() == {OWN, TUNED}


def test_axes_of_numbers_are_curves_over_the_images_tuned_on():
    _, tried = search(Landscape(), BASE, ("kernel", "alpha"), 60)
    (curve,) = curves("folder", BASE, tried)
    assert curve.x_label == "alpha"
    assert curve.x == (0.5, 0.7, 0.9, 0.95), "the value that it had was measured with the axis before"
    assert curve.y[2] == max(curve.y)


# --- the command ---


@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("set"), draw_scenes(7, 5, size=SIZE))


def test_the_command_tunes_on_one_part_judges_by_the_other_and_writes_what_it_found(nerve, scene_folder, tmp_path):
    out = tmp_path / "out"
    arguments = (
        "tune",
        scene_folder,
        "--trials",
        8,
        "--axes",
        "alpha,steps",
        "--device",
        "cpu",
        "--out",
        out,
        "--json",
    )
    code, printed, err = nerve(*arguments)
    assert code == 0, err
    assert "at most 8 settings on 3 images, then 2 on the 2 held out" in err

    def images(folder):
        return {json.loads(line)["image"] for line in (folder / "images.jsonl").read_text().splitlines()}

    tuned_on = [images(folder) for folder in sorted((out / "tuning").iterdir())]
    assert len(tuned_on) >= 2
    assert all(part == tuned_on[0] for part in tuned_on)
    assert images(out / "held-out").isdisjoint(tuned_on[0])
    assert len(images(out / "held-out") | tuned_on[0]) == 5
    report = json.loads((out / "results.json").read_text())["report"]
    assert report["kind"] == "tune"
    assert [score["variant"] for score in report["sets"][0]["scores"]] == [OWN, TUNED]
    assert all(score["images"] == 2 for score in report["sets"][0]["scores"])
    assert any("of mIoU on held-out images" in note for note in report["notes"])
    # what was found can be given again, and scores what was reported
    code, again, err = nerve("eval", "folder", "--root", scene_folder, "--set", f"@{out / 'settings.json'}", "--json")
    assert code == 0, err
    settings = json.loads((out / "settings.json").read_text())
    assert settings.items() <= report["sets"][0]["scores"][1]["settings"].items()
    assert json.loads(again.splitlines()[-1])["sets"][0]["images"] == 5
    # the same command again does nothing but report it again
    before = {path: path.read_bytes() for path in out.rglob("images.jsonl")}
    code, repeated, _ = nerve(*arguments)
    assert code == 0
    assert repeated == printed
    assert {path: path.read_bytes() for path in out.rglob("images.jsonl")} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{folder}",), "needs --out"),
        (("voc21", "--out", "{out}"), "needs --root"),
        (("{folder}", "--root", "{folder}", "--out", "{out}"), "--root has no meaning"),
        (("{out}/nowhere", "--out", "{out}"), "is no folder"),
        (("{folder}", "--axes", "speed", "--out", "{out}"), "axes speed are unknown"),
        (("{folder}", "--held-out", "0.9", "--out", "{out}"), "to tune on and"),
        (("{folder}", "--set", "speed=1", "--out", "{out}"), "unknown settings speed"),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(nerve, scene_folder, tmp_path, arguments, said):
    out = tmp_path / "out"
    code, printed, err = nerve("tune", *(str(part).format(folder=scene_folder, out=out) for part in arguments))
    assert (code, printed) == (2, "")
    assert said in err
    assert "Traceback" not in err
