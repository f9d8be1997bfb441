"""Settings: one flat mapping overrides any parameter, and nothing wrong is accepted in silence."""

import dataclasses
import json
import math

import pytest

from nerve_core.models.pairs import find_pair, pair_names
from nerve_core.settings import PRESETS, Settings, preset


def test_every_parameter_has_one_name_and_one_section():
    sections = dataclasses.fields(Settings)
    names = [item.name for section in sections for item in dataclasses.fields(getattr(Settings(), section.name))]
    assert sorted(names) == sorted(set(names)) == sorted(Settings.names())
    assert {"kernel", "tau", "alpha", "beta", "c", "steps", "combine", "head_weights", "head", "logit_scale"} <= set(
        names
    )
    assert {"timestep", "threshold", "presence_threshold", "taps", "input_size", "method"} <= set(names)
    for name, section in Settings.names().items():
        assert hasattr(getattr(Settings(), section), name)


def test_flat_shows_every_value_and_builds_the_same_settings_again():
    changed = Settings().replaced({"alpha": 0.5, "kernel": "relu", "input_size": [64, 128], "taps": [[1, 0], [1, 1]]})
    assert set(changed.flat()) == set(Settings.names())
    assert changed.flat()["alpha"] == changed.walk.alpha == 0.5
    assert Settings().replaced(changed.flat()) == changed
    assert Settings().replaced(json.loads(json.dumps(changed.flat()))) == changed  # JSON has no tuples


def test_an_override_changes_one_parameter_and_leaves_the_rest():
    base = Settings()
    changed = base.replaced({"beta": 0.25})
    assert changed.fusion.beta == 0.25
    assert {name for name in base.flat() if base.flat()[name] != changed.flat()[name]} == {"beta"}
    assert base.fusion.beta != 0.25
    assert base.replaced({}) == base
    assert changed.replaced({"c": 3.0}).fusion.beta == 0.25  # of the same section


def test_lists_become_tuples_so_that_settings_can_be_compared_and_hashed():
    changed = Settings().replaced(
        {"taps": [[2, 0]], "templates": ["a {}"], "negatives": ["wall"], "input_size": [64, 64]}
    )
    assert changed.diffusion.taps == ((2, 0),)
    assert changed.diffusion.input_size == (64, 64)
    assert changed.clip.templates == ("a {}",)
    assert hash(changed) == hash(Settings().replaced(changed.flat()))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown settings alhpa, zeta; known are .*alpha.*timestep") as error:
        Settings().replaced({"alhpa": 0.5, "zeta": 1, "beta": 0.5})
    assert "beta," in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 1.0},
        {"alpha": "high"},
        {"alpha": None},
        {"beta": 2},
        {"beta": "half"},
        {"tau": -1},
        {"tau": [0.1]},
        {"c": "10"},
        {"kernel": "gauss"},
        {"kernel": ["exp"]},
        {"method": "forever"},
        {"steps": 2.5},
        {"head": "last"},
        {"head": ["vanilla"]},
        {"short_side": "336"},
        {"logit_scale": "50"},
        {"logit_scale": math.inf},
        {"edges": "crf"},
        {"edge_steps": 2.5},
        {"edge_distances": 4},
        {"edge_distances": [0]},
        {"edge_sigma": 0},
        {"edge_size": "320"},
        {"threshold": "0.5"},
        {"presence_threshold": [1]},
        {"readout": "max"},
        {"timestep": "100"},
        {"input_size": 512},
        {"input_size": [512]},
        {"taps": [3, 1]},
        {"combine": "sum"},
        {"head_weights": "best"},
        {"stretch": "no"},
        {"mean_negative": 1},
        {"templates": "imagenet"},
        {"templates": ["no place"]},
        {"templates": []},
        {"templates": [3]},
        {"negatives": "wall"},
        {"negatives": [3]},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_a_value_error_that_names_it(change):
    with pytest.raises(ValueError, match={"templates": "template"}.get(next(iter(change)), next(iter(change)))):
        Settings().replaced(change)


def test_presets_are_overrides_of_known_parameters():
    assert preset("pair") == {}
    for name in PRESETS:
        Settings().replaced(preset(name))
    paper = Settings().replaced(preset("paper"))
    assert (paper.walk.method, paper.walk.steps) == ("truncated", 40)
    assert (paper.affinity.kernel, paper.fusion.beta, paper.fusion.c) == ("relu", 0.3, 10)
    assert (paper.fusion.combine, paper.fusion.head_weights) == ("transitions", "entropy")
    assert (paper.walk.alpha, paper.diffusion.timestep, paper.edges.edges) == (0.85, 100, "none")
    with pytest.raises(ValueError, match="pair, paper"):
        preset("best")


@pytest.mark.parametrize("name", pair_names())
def test_the_settings_of_every_known_pair_are_valid(name):
    chosen = Settings().replaced(find_pair(name).settings)
    assert chosen.clip.negatives
    assert chosen.edges.edges == "pixels"
    assert chosen.walk.method == "fixed_point"


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().walk = None
