"""Variants side by side: each gives what it gives alone, and what they share is computed once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from nerve_core import Segmenter, Vocabulary
from nerve_core.embedded.scenes import NAMES, draw_scene
from nerve_core.evaluation import variants as variants_module
from nerve_core.evaluation.variants import Variant, Variants, combinations, settings_of
from nerve_core.text.cache import EmbeddingCache

SCENE = draw_scene(5, size=(90, 120))
VOCABULARY = Vocabulary(NAMES[:6])
COARSE = {"edges": "none"}  # on an image as small as this the edges give several variants one mask
ROWS = (
    Variant("nerve", COARSE),
    Variant("L = 3", {"steps": 3, **COARSE}),
    Variant("no walk", COARSE, refine="none"),
    Variant("local", {"beta": 0.0, **COARSE}),
    Variant("maskclip", {"head": "maskclip", **COARSE}),
    Variant("timestep", {"timestep": 50, **COARSE}),
    Variant("min-max", {"readout": "presence_minmax", **COARSE}),
    Variant("low rank", {"kernel": "shifted", "steps": 4, **COARSE}),
    Variant("exact", {"method": "exact", **COARSE}),
    Variant("edges"),
    Variant("pamr", {"edges": "pamr"}),
)


@pytest.fixture(scope="module")
def together():
    return Variants("embedded", ROWS, device="cpu")


@pytest.fixture(scope="module")
def masks(together):
    return together(SCENE.image, VOCABULARY)


@pytest.mark.parametrize("row", [row for row in ROWS if row.refine == "nerve"], ids=lambda row: row.name)
def test_a_variant_beside_others_gives_the_mask_that_a_segmenter_of_its_settings_gives(masks, row):
    alone = Segmenter.from_pretrained("embedded", device="cpu", settings=row.settings)
    assert (masks[row.name].labels == alone(SCENE.image, VOCABULARY).labels).all()
    assert masks[row.name].seconds > 0


def test_variants_differ(masks):
    different = {mask.labels.tobytes() for mask in masks.values()}
    assert len(different) >= len(ROWS) - 2  # a step or two more may change no pixel


def test_a_mask_does_not_depend_on_the_images_before(together, masks):
    together(draw_scene(6, size=(64, 64)).image, VOCABULARY)
    again = together(SCENE.image, VOCABULARY)
    assert all((again[name].labels == mask.labels).all() for name, mask in masks.items())


def test_what_other_runs_have_kept_of_the_names_does_not_touch_a_mask(masks, monkeypatch):
    kept = np.eye(1, 128, dtype=np.float32)[0]
    monkeypatch.setattr(EmbeddingCache, "get", lambda self, space, names: dict.fromkeys({*names} & {*NAMES}, kept))
    remembering = Segmenter.from_pretrained("embedded", device="cpu")
    assert (remembering.text(["ball"]).numpy() == kept).all(), "a robot's segmenter takes what is kept"
    rows = [row for row in ROWS if row.name in ("nerve", "no walk")]
    again = Variants("embedded", rows, device="cpu")(SCENE.image, VOCABULARY)
    assert all((again[row.name].labels == masks[row.name].labels).all() for row in rows)


def test_what_variants_share_of_an_image_is_worked_out_once(together, monkeypatch):
    ran = Counter()
    towers = {id(s.frame_part.clip): s.frame_part.clip for s in together.segmenters.values()}
    branches = {id(s.frame_part.taps): s.frame_part.taps for s in together.segmenters.values()}
    assert (len(towers), len(branches)) == (2, 2), "one for each head, one for each timestep"
    for tower in towers.values():
        monkeypatch.setattr(tower, "features", counted(ran, f"clip {id(tower)}", tower.features))
    for branch in branches.values():
        monkeypatch.setattr(branch, "project", counted(ran, f"taps {id(branch)}", branch.project))
    monkeypatch.setattr(variants_module, "fuse", counted(ran, "S", variants_module.fuse))
    together(SCENE.image, VOCABULARY)
    # nerve, L = 3, min-max, edges and pamr share one S; local, maskclip, timestep, low rank have their own, exact too
    assert ran.pop("S") == 5
    assert sorted(ran.values()) == [1, 1, 1, 1]


def counted(ran, name, function):
    def counting(*arguments, **options):
        ran[name] += 1
        return function(*arguments, **options)

    return counting


def test_time_that_is_shared_counts_for_every_variant(together, monkeypatch):
    clock = iter(range(10**6))  # every look at the clock is a second later than the one before
    monkeypatch.setattr(variants_module.time, "perf_counter", lambda: float(next(clock)))
    found = together(SCENE.image, VOCABULARY)
    # by itself a variant that shares S has to build it too
    assert found["L = 3"].seconds >= found["no walk"].seconds
    assert min(mask.seconds for mask in found.values()) >= 5, "pixels, CLIP, Q and K, G, P are each a second at least"


def test_masks_have_the_size_that_is_asked_for_and_only_those_asked_for_are_made(together):
    found = together(SCENE.image, VOCABULARY, (33, 44), only=["local"])
    assert {name: mask.labels.shape for name, mask in found.items()} == {"local": (33, 44)}
    assert found["local"].labels.dtype == np.uint8


def test_words_of_a_protocol_are_queries_as_they_stand(together):
    segmenter = together.segmenters["nerve"]
    vocabulary = Vocabulary(["ball|sphere", "cube", "cone"], negatives=["beach ball", "wall"])
    queries = together._embed(segmenter, vocabulary)
    assert queries.classes.tolist() == [1, 1, 2, 3, 0, 0]
    wanted = segmenter.text(["ball", "sphere", "cube", "cone", "beach ball", "wall"])
    assert torch.equal(queries.embeddings, wanted)
    # for a robot a negative near to a name is left out
    assert len(segmenter.embed(vocabulary).embeddings) < 6


def test_pixels_are_compared_before_the_readout_and_once_for_two_readouts(monkeypatch):
    ran, original = Counter(), variants_module.pixel_transition

    def transition(pixels, config):
        ran[config.edges] += 1
        return original(pixels, config)

    monkeypatch.setattr(variants_module, "pixel_transition", transition)
    rows = combinations({"edges": ("none", "pixels", "pamr"), "readout": ("argmax", "presence_minmax")})
    found = Variants("embedded", rows, device="cpu")(SCENE.image, VOCABULARY)
    assert ran == {"none": 1, "pixels": 1, "pamr": 1}
    for edges in ("pixels", "pamr"):
        assert (found[f"{edges}, argmax"].labels != found["none, argmax"].labels).any()
        assert (found[f"{edges}, presence_minmax"].labels != found["none, presence_minmax"].labels).any()
    assert (found["pamr, argmax"].labels != found["pixels, argmax"].labels).any()


def test_values_that_overflow_are_said_and_not_scored(together, monkeypatch):
    taps = together.segmenters["nerve"].frame_part.taps
    monkeypatch.setattr(type(taps), "__call__", lambda self, image: (torch.full((10, 1728, 16), float("nan")),) * 2)
    with pytest.raises(RuntimeError, match="not finite in float32"):
        together(SCENE.image, VOCABULARY, only=["nerve"])


def test_combinations_are_named_by_what_varies():
    rows = combinations({"refine": ("nerve", "none"), "head": ("vanilla",), "edges": ("none", "pamr"), "readout": ()})
    assert [row.name for row in rows] == ["nerve, none", "nerve, pamr", "none, none", "none, pamr"]
    assert [row.refine for row in rows] == ["nerve", "nerve", "none", "none"]
    assert [row.settings for row in rows] == 2 * [{"head": "vanilla", "edges": edges} for edges in ("none", "pamr")]
    assert [row.name for row in combinations({})] == ["nerve"]
    assert [row.name for row in combinations({"refine": ("none",)})] == ["none"]


def test_a_variants_own_settings_stand_above_shared_ones_and_those_above_the_preset():
    rows = [Variant("a", {"alpha": 0.3}), Variant("b")]
    found = settings_of("embedded", rows, preset="paper", shared={"alpha": 0.6, "steps": 7})
    assert (found["a"].walk.alpha, found["b"].walk.alpha) == (0.3, 0.6)
    assert found["a"].walk.steps == 7
    assert found["a"].affinity.kernel == "relu"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([Variant("a"), Variant("a", {"alpha": 0.1})], "names of their own; got a"),
        ([], "no variant"),
        ([Variant("a", {"previous_frame_start": True})], "previous_frame_start"),
        ([Variant("a", {"speed": 1})], "unknown settings speed"),
        ([Variant("a", {"head": "clever"})], "head 'clever' is unknown"),
        ([Variant("a", {"edges": "crf"})], "edges 'crf' is unknown; choose one of none, pixels, pamr"),
    ],
)
def test_variants_that_cannot_be_are_refused_before_anything_is_loaded(rows, said):
    with pytest.raises(ValueError, match=said):
        settings_of("embedded", rows, preset="pair", shared={})


def test_unknown_refinements_are_refused_by_name():
    with pytest.raises(ValueError, match="refinement 'magic' is unknown; choose one of nerve"):
        Variant("a", refine="magic")
