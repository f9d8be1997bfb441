"""The frame benchmark: its plain side computes the same masks, and its random pairs have the true architectures."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from nerve_benchmarks.plain_frame import PlainNerve
from nerve_benchmarks.random_pair import ARCHITECTURES, Architecture, write_random_pair
from nerve_benchmarks.task import names, picture
from nerve_core import Segmenter, Vocabulary
from nerve_core.models.pairs import find_pair, pair_names
from results_schema import assert_fits, unnoticed

_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
NARROW = Architecture(
    clip_text=_TOWER,
    clip_vision={**_TOWER, "patch_size": 14, "image_size": 56},
    projection=16,
    text=_TOWER,
    unet={
        **ARCHITECTURES["sd21-clipl14"].unet,
        "block_out_channels": (20, 40, 80, 80),
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
    },
    vae={**ARCHITECTURES["sd21-clipl14"].vae, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4},
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    write_random_pair("sd21-clipl14", folder, architecture=NARROW, dtype=torch.float32)
    description = json.loads((folder / "pair.json").read_text())
    description["settings"] |= {"input_size": [128, 192], "short_side": 112, "logit_scale": 300.0, "alpha": 0.5}
    (folder / "pair.json").write_text(json.dumps(description))
    return folder


def test_the_plain_side_computes_what_ours_does(pair, monkeypatch, tmp_path):
    monkeypatch.setenv("NERVE_CACHE", str(tmp_path))
    image = picture((96, 128))
    walk = {"method": "truncated", "steps": 40, "edges": "none"}  # as the plain side does
    segmenter = Segmenter.from_pretrained(str(pair), device="cpu", dtype="fp32", settings=walk)
    queries = segmenter.embed(Vocabulary(names(6)))
    plain = PlainNerve(find_pair(str(pair)), torch.device("cpu"), torch.float32)
    G, Q, K = segmenter.frame(image, queries)
    torch.testing.assert_close(plain.probabilities(image, queries.embeddings), G, atol=2e-5, rtol=0)
    P = segmenter.refine(Q, K, G).P
    torch.testing.assert_close(plain.walk(G, plain.transitions(image)), P, atol=2e-5, rtol=0)
    best = queries.classes.numpy()[plain(image, queries.embeddings)]
    assert (best == segmenter(image, queries).labels).mean() > 0.999
    assert len(np.unique(best)) > 2


def test_every_full_size_pair_has_an_architecture_to_time():
    assert set(ARCHITECTURES) == set(pair_names()) - {"embedded"}


@pytest.mark.parametrize("count", [1, 21, 60, 150])
def test_names_are_different(count):
    assert len(set(names(count))) == count


@pytest.fixture
def bench(nerve):
    """`nerve bench frame` on the CPU."""
    return partial(nerve, "bench", "frame", "--device", "cpu")


def test_the_command_measures_both_sides_in_processes_of_their_own(pair, bench):
    code, out, err = bench("--model", pair, "--frames", 2, "--names", 3, "--size", "128x96", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    for key in ("p50_ms", "p95_ms", "fps", "peak_memory_mb", "load_s", "baseline_p50_ms", "baseline_peak_memory_mb"):
        assert found[key] > 0
    assert {"clip", "diffusion", "probabilities", "refine", "edges", "readout"} < set(found["stages"])
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"].keys() == found["stages"].keys()
    assert sum(stage["p50_ms"] for stage in found["stages"].values()) == pytest.approx(found["p50_ms"], rel=0.5)
    assert found["speedup"] == found["baseline_p50_ms"] / found["p50_ms"]
    assert (found["baseline_precision"], found["operator"]) == ("float32", "dense fused")
    assert "plain diffusers + transformers" in err
    assert_fits("bench_frame", found)
    assert unnoticed("bench_frame", found) == []


def test_a_side_that_fails_is_told_with_its_reason(bench, tmp_path):
    code, _, err = bench("--model", tmp_path, "--no-plain")
    assert code == 2
    assert "the benchmark's ours side failed" in err
    assert "pair.json" in err


@pytest.mark.parametrize("size", ["640", "640x", "0x480", "axb", "640x480x3", ""])
def test_a_size_that_is_none_is_refused(bench, size):
    code, _, err = bench("--size", size)
    assert code == 2
    assert "write WIDTHxHEIGHT, as in 640x480" in err


def test_weights_are_made_up_only_for_architectures_that_are_known(bench):
    code, _, err = bench("--random-weights", "--model", "embedded")
    assert code == 2
    assert "no architecture is known for 'embedded'; choose one of sd21-clipl14" in err
