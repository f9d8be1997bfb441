"""The walk's benchmark: its plain versions are what the papers' equations say, and its figures are what they claim."""

import json
import math
import sys

import numpy as np
import pytest
import torch

import reference
from nerve_benchmarks import plain_walks, walk
from nerve_benchmarks.walk import Problem
from nerve_core.walk.random_walk import fixed_point
from tokens import label_probabilities, queries_and_keys, tensors

GRID = (5, 4)


def drawn(heads=3, size=4, classes=3):
    """Q, K and G as arrays and as tensors, in float64."""
    arrays = (*queries_and_keys("random", heads, 20, size), label_probabilities(20, classes))
    return arrays, tensors(*arrays)


def soft_maps(Q, K):
    """Every head's softmax map by loops."""
    return [reference.global_affinity(q, k, "softmax", 1) for q, k in zip(Q, K, strict=True)]


@pytest.mark.parametrize("fuse_heads", [False, True])
def test_the_dense_walk_is_the_papers_equations(fuse_heads):
    (Q, K, G), inputs = drawn()
    found = plain_walks.dense(*inputs, GRID, 0.8, 0.4, 5.0, 7, fuse_heads=fuse_heads)
    S, _ = reference.transition(Q, K, G, GRID, kernel="softmax", beta=0.4, c=5.0)
    np.testing.assert_allclose(found, reference.truncated(S, G, 0.8, 7), rtol=0, atol=1e-12)


def test_the_chain_is_the_product_of_thresholded_maps():
    (Q, K, G), inputs = drawn()
    product = np.eye(20)
    for A in soft_maps(Q, K):
        A = A / A.max(0)
        A[A < 0.1] = 0
        product = product @ (A / A.sum(1, keepdims=True))
    np.testing.assert_allclose(plain_walks.chain(*inputs), product @ G, rtol=0, atol=1e-12)


def test_iseg_is_ten_products_with_the_entropy_reduced_mean_of_two_maps():
    (Q, K, G), inputs = drawn()
    A = np.mean(soft_maps(Q, K)[:2], 0)
    A = A / A.max(0)
    A = np.maximum(A + 0.01 * (np.log(A) + 1), 0)
    A = A / A.sum(1, keepdims=True)
    for _ in range(10):
        G = A @ G
        G = G - G.min(0)
        G = G / G.sum(0)
    np.testing.assert_allclose(plain_walks.iseg(*inputs), G, rtol=0, atol=1e-12)


def test_the_scene_is_the_same_at_each_draw_and_its_maps_are_neither_uniform_nor_the_identity():
    Q, K, G = Problem(16, 5).draw()
    for once, again in zip((Q, K, G), Problem(16, 5).draw(), strict=True):
        assert torch.equal(once, again)
    assert (Q.shape, K.shape, G.shape) == ((10, 256, 64), (10, 256, 64), (256, 5))
    torch.testing.assert_close(G.sum(-1), torch.ones(256))
    assert all(5 < spread < 128 for spread in walk.effective_tokens(Q, K))


def test_ours_and_the_dense_walk_tend_to_the_same_limit():
    problem = Problem(8, 3)
    limit = walk.limits(problem)
    Q, K, G = problem.draw()
    with torch.inference_mode():
        assert walk.row_error(problem.dense(Q, K, G, 120), limit["nerve"]) < 1e-5
        assert walk.row_error(problem.refine(Q, K, G, "softmax", 120).P, limit["nerve"]) < 1e-5
        assert walk.row_error(plain_walks.chain(Q, K, G), limit["chain"]) < 1e-5
        assert walk.row_error(plain_walks.iseg(Q, K, G), limit["iseg"]) < 1e-4


def test_a_side_takes_the_fewest_steps_that_bring_its_worst_row_within_the_error():
    problem = Problem(8, 3)
    limit = walk.limits(problem)["nerve"]
    steps = walk.steps_to(problem, "softmax", fixed_point, limit)
    Q, K, G = problem.draw()
    errors = [walk.row_error(problem.refine(Q, K, G, "softmax", L).P, limit) for L in (steps - 1, steps)]
    assert errors[0] > 1e-3 >= errors[1]
    assert walk.row_error(torch.tensor([[0.5, 0.5], [1, 0]]), torch.tensor([[0.5, 0.5], [0.75, 0.25]])) == 0.5


def test_the_exponent_is_the_slope_of_the_logarithms():
    assert walk.fitted_exponent({str(side): 3 * side**3.0 for side in (4, 8, 16)}) == pytest.approx(1.5)


def test_memory_is_the_peak_above_what_was_there_before():
    problem = Problem(48, 3)
    steps = dict.fromkeys(("nerve", "low rank", "favor", "dense"), 2)
    maps = 10 * 2304 * 2304 * 4 / 1e6  # MB of one [H, N, N]
    assert maps < walk.peak_memory_apart(problem, "dense", steps) < 4 * maps
    assert 0 < walk.peak_memory_apart(problem, "nerve", steps) < maps / 3
    with pytest.raises(RuntimeError, match="memory of nothing could not be measured"):
        walk.peak_memory_apart(problem, "nothing", steps)


@pytest.fixture
def quick(monkeypatch):
    """Memory is not measured here, and the sides' sizes are small."""
    monkeypatch.setattr(walk, "peak_memory_apart", lambda problem, side, steps: {"dense": 40.0}.get(side, 8.0))
    monkeypatch.setattr(walk, "LARGE_GRID", 8)
    monkeypatch.setattr(walk, "SCALING_GRIDS", (4, 6))


def test_the_figures_are_ratios_of_what_was_measured(quick):
    found = walk.compare_walks(8, 3, repeats=1, large=True)
    ms = found["times_ms"]
    assert all(value > 0 for value in ms.values())
    assert found["speedup_vs_dense"] == ms["dense"] / ms["nerve"]
    assert found["speedup_vs_chain"] == ms["chain"] / ms["nerve"]
    assert found["speedup_vs_iseg"] == ms["iseg"] / ms["nerve"]
    assert found["speedup_low_rank_vs_chain"] == ms["chain"] / ms["low rank"]
    assert found["speedup_favor_vs_chain"] == ms["chain"] / ms["favor"]
    assert found["memory_vs_dense"] == 0.2
    assert {side: set(times) for side, times in found["scaling_ms"].items()} == {
        "low rank": {"4", "6"},
        "favor": {"4", "6"},
    }
    assert math.isfinite(found["exponent"])
    assert math.isfinite(found["exponent_favor"])
    assert all(error <= 1e-3 for error in found["errors"].values())
    assert found["steps"]["nerve"] < found["steps"]["dense"]
    assert found["kernels"] == {"nerve": "softmax", "low rank": "shifted", "favor": "favor"}
    assert found["operators"]["nerve"] == "dense fused"
    assert found["large"]["sides"]["low rank"]["ms"] > 0
    json.dumps(found)


def test_nerve_bench_walk_prints_a_table_and_one_json_object(quick, nerve):
    options = ("--grid", "6", "--names", "2", "--repeats", "1", "--device", "cpu", "--json")
    code, out, err = nerve("bench", "walk", *options)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert {"speedup_vs_dense", "speedup_vs_chain", "speedup_vs_iseg", "memory_vs_dense", "exponent"} <= set(found)
    assert "6 x 6 tokens, 10 heads of 64, 2 names, cpu" in err
    assert "CLIPer's chain" in err


def test_without_the_benchmarks_nerve_bench_says_so(nerve, monkeypatch):
    monkeypatch.setitem(sys.modules, "nerve_benchmarks", None)
    monkeypatch.delitem(sys.modules, "nerve_benchmarks.walk")
    code, out, err = nerve("bench", "walk")
    assert code == 2
    assert "the benchmarks are not installed here" in err
    assert "Traceback" not in err
    assert out == ""
