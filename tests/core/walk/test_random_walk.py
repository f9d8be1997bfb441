"""S, G -> P: the three walks against powers and inverses of S, both theorems, and `refine` end to end."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from nerve_core.walk import random_walk
from nerve_core.walk.affinity import AffinityConfig
from nerve_core.walk.fusion import FusionConfig
from nerve_core.walk.random_walk import (
    Refinement,
    WalkConfig,
    choose_steps,
    exact,
    fixed_point,
    gmres,
    refine,
    residual_bound,
    truncated,
    walk_from,
)
from tokens import (
    DEVICES,
    KINDS,
    POSITIVE_KERNELS,
    STOCHASTIC_KERNELS,
    image_like,
    label_probabilities,
    queries_and_keys,
    scenes,
    tensors,
)

WALKS = {"truncated": reference.truncated, "fixed_point": reference.fixed_point}
ALPHAS = st.floats(0, 0.95)


class Given:
    """A transition that is a matrix, and counts how often it is applied."""

    name = "given"

    def __init__(self, S: np.ndarray) -> None:
        self.S, self.calls = torch.from_numpy(S), 0

    def apply(self, X: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.S @ X


@st.composite
def walks(draw) -> tuple[np.ndarray, np.ndarray]:
    """S [N, N] row-stochastic, some entries 0, and G [N, C]."""
    tokens, classes, seed = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    S = rng.random((tokens, tokens)) ** draw(st.sampled_from((0.1, 1, 20))) * (rng.random((tokens, tokens)) > 0.4)
    S += np.eye(tokens) * 1e-3
    return S / S.sum(1, keepdims=True), label_probabilities(tokens, classes, seed)


@settings(max_examples=80)
@given(walks(), ALPHAS, st.integers(0, 45))
def test_eq_16_the_truncated_walk_is_the_normalised_sum_of_powers(walk, alpha, steps):
    S, G = walk
    found = truncated(Given(S), torch.from_numpy(G), alpha, steps)
    np.testing.assert_allclose(found, reference.truncated(S, G, alpha, steps), rtol=1e-9, atol=1e-12)


@settings(max_examples=80)
@given(walks(), ALPHAS, st.integers(0, 45))
def test_eq_19_the_fixed_point_recursion_restarts_from_g(walk, alpha, steps):
    S, G = walk
    found = fixed_point(Given(S), torch.from_numpy(G), alpha, steps)
    np.testing.assert_allclose(found, reference.fixed_point(S, G, alpha, steps), rtol=1e-9, atol=1e-12)
    following = (1 - alpha) * G + alpha * S @ found.numpy()
    again = fixed_point(Given(S), torch.from_numpy(G), alpha, steps + 1)
    np.testing.assert_allclose(again, following, rtol=1e-9, atol=1e-12)


@settings(max_examples=60)
@given(walks(), ALPHAS)
def test_eq_3_exact_is_the_inverse_and_the_limit_of_both_walks(walk, alpha):
    S, G = walk
    expected = reference.exact(S, G, alpha)
    found = exact(Given(S), torch.from_numpy(G), alpha)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    steps = choose_steps(alpha, 1e-10)
    for method in (truncated, fixed_point):
        np.testing.assert_allclose(method(Given(S), torch.from_numpy(G), alpha, steps), expected, rtol=0, atol=1e-9)


@settings(max_examples=60)
@given(walks(), ALPHAS, st.integers(0, 20))
def test_theorem_1_every_iterate_is_a_distribution_in_every_row(walk, alpha, steps):
    S, G = walk
    for found in (
        truncated(Given(S), torch.from_numpy(G), alpha, steps),
        fixed_point(Given(S), torch.from_numpy(G), alpha, steps),
        exact(Given(S), torch.from_numpy(G), alpha),
    ):
        assert (found >= -1e-15).all()
        np.testing.assert_allclose(found.sum(-1), 1, rtol=0, atol=1e-12)


@settings(max_examples=100)
@given(walks(), ALPHAS, st.integers(0, 30))
def test_theorem_2_the_error_of_a_row_falls_as_2_alpha_to_the_l_plus_1(walk, alpha, steps):
    S, G = walk
    limit = reference.exact(S, G, alpha)
    bound = 2 * alpha ** (steps + 1) + 1e-12
    for method in (truncated, fixed_point):
        found = method(Given(S), torch.from_numpy(G), alpha, steps).numpy()
        assert np.abs(found - limit).sum(1).max() <= bound


def test_theorem_2_the_bound_is_reached_so_no_smaller_one_would_do():
    # Token 0 steps to token 1 and stays there; their labels differ.
    S, G, alpha = np.array([[0.0, 1.0], [0.0, 1.0]]), np.eye(2), 0.7
    limit = reference.exact(S, G, alpha)
    for steps in range(1, 8):
        error = np.abs(truncated(Given(S), torch.from_numpy(G), alpha, steps).numpy() - limit).sum(1).max()
        assert error == pytest.approx(2 * alpha ** (steps + 1) * (1 - alpha) / (1 - alpha ** (steps + 1)), rel=1e-9)


def test_from_g_the_fixed_point_has_no_slow_mode_where_the_truncated_walk_has():
    Q, K, G = image_like(3, (16, 12), 16, 5)
    config = (AffinityConfig(), FusionConfig(0.4))

    def steps_to(method: str) -> int:
        limit = refine(Q, K, G.double(), (16, 12), *config, WalkConfig("exact")).P
        for steps in range(60):
            P = refine(Q, K, G.double(), (16, 12), *config, WalkConfig(method, 0.85, steps)).P
            if (P - limit).abs().sum(-1).max() < 1e-2:
                return steps
        raise AssertionError(method)

    assert steps_to("fixed_point") <= steps_to("truncated")


@given(st.floats(0, 0.99), st.floats(1e-12, 3))
def test_choose_steps_is_the_least_that_meets_the_tolerance(alpha, tolerance):
    steps = choose_steps(alpha, tolerance)
    assert 2 * alpha ** (steps + 1) <= tolerance * (1 + 1e-6)
    assert steps == 0 or 2 * alpha**steps > tolerance * (1 - 1e-6)


def test_choose_steps_by_hand():
    assert choose_steps(0.5, 2 * 0.5**8) == 7
    assert choose_steps(0.85, 1e-3) == 46
    assert choose_steps(0.0, 1e-9) == 0


@settings(max_examples=60)
@given(walks(), ALPHAS, st.integers(1, 20))
def test_the_residual_bounds_the_distance_to_the_limit(walk, alpha, steps):
    S, G = walk
    last, before = (fixed_point(Given(S), torch.from_numpy(G), alpha, L) for L in (steps, steps - 1))
    distance = np.abs(last.numpy() - reference.exact(S, G, alpha)).sum(1).max()
    assert distance <= float(residual_bound(alpha, last, before)) + 1e-12


@settings(max_examples=80)
@given(walks(), ALPHAS, st.integers(0, 30), st.integers(0, 99))
def test_from_any_start_the_fixed_point_has_the_same_limit_and_comes_within_2_alpha_to_the_l(walk, alpha, steps, seed):
    S, G = walk
    limit = reference.exact(S, G, alpha)
    start = torch.from_numpy(label_probabilities(*G.shape, seed + 7))
    found = fixed_point(Given(S), torch.from_numpy(G), alpha, steps, start).numpy()
    assert np.abs(found - limit).sum(1).max() <= 2 * alpha**steps + 1e-12
    np.testing.assert_allclose(found.sum(1), 1, rtol=0, atol=1e-12)
    if steps == 0:
        np.testing.assert_array_equal(found, start)
    else:
        before = fixed_point(Given(S), torch.from_numpy(G), alpha, steps - 1, start).numpy()
        np.testing.assert_allclose(found, (1 - alpha) * G + alpha * S @ before, rtol=1e-9, atol=1e-12)
    stays = fixed_point(Given(S), torch.from_numpy(G), alpha, steps, torch.from_numpy(limit))
    np.testing.assert_allclose(stays, limit, rtol=0, atol=1e-12)


def test_refine_starts_from_the_previous_frame_where_it_is_told_to():
    grid = (16, 12)
    Q, K, G = image_like(3, grid, 16, 5)
    short, long = (WalkConfig(steps=steps, previous_frame_start=True) for steps in (3, 80))
    first = refine(Q, K, G, grid, walk=long).P
    torch.testing.assert_close(first, refine(Q, K, G, grid, walk=WalkConfig(steps=80)).P, rtol=0, atol=0)
    moved = (0.9 * G + 0.1 * G.roll(1, 0)).contiguous()  # the next frame, nearly the same
    limit = refine(Q, K, moved, grid, walk=long).P

    def error(**options) -> float:
        return float((refine(Q, K, moved, grid, walk=short, **options).P - limit).abs().sum(-1).max())

    assert error(previous=first) < 0.5 * error()
    assert (refine(Q, K, moved, grid, walk=long, previous=G).P - limit).abs().sum(-1).max() < 1e-4
    bound = refine(Q, K, moved, grid, walk=short, previous=first, residual=True).residual
    assert error(previous=first) <= bound + 1e-5


@pytest.mark.parametrize("method", ["truncated", "fixed_point"])
def test_a_walk_of_l_steps_applies_s_l_times(method):
    S = Given(np.full((3, 3), 1 / 3))
    walk_from(S, torch.eye(3, dtype=torch.float64), WalkConfig(method, 0.5, 7))
    assert S.calls == 7


@pytest.mark.parametrize("method", ["truncated", "fixed_point", "exact"])
def test_alpha_0_leaves_g_as_it_is(method):
    Q, K, G = image_like(2, (4, 3), 4, 3)
    P = refine(Q, K, G, (4, 3), walk=WalkConfig(method, 0.0)).P
    torch.testing.assert_close(P, G, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["truncated", "fixed_point", "exact"])
def test_g_that_is_the_same_everywhere_is_left_as_it_is(method):
    Q, K, _ = image_like(2, (4, 3), 4, 3)
    G = torch.tensor([[0.5, 0.2, 0.3]]).repeat(12, 1)
    torch.testing.assert_close(refine(Q, K, G, (4, 3), walk=WalkConfig(method)).P, G, rtol=0, atol=1e-6)


@settings(max_examples=150)
@given(
    st.one_of(
        st.tuples(scenes(), st.sampled_from(POSITIVE_KERNELS)),
        st.tuples(scenes(("positive",)), st.just("raw")),
    ),
    st.sampled_from(("transitions", "affinities")),
    st.sampled_from(("truncated", "fixed_point", "exact")),
    st.floats(0, 1),
    st.floats(0, 0.9),
)
def test_refine_is_the_equations_end_to_end(drawn, combine, method, beta, alpha):
    (Q, K, G, grid), kernel = drawn
    S, w = reference.transition(Q, K, G, grid, kernel=kernel, beta=beta, combine=combine)
    steps = 6
    expected = reference.exact(S, G, alpha) if method == "exact" else WALKS[method](S, G, alpha, steps)
    found = refine(
        *tensors(Q, K, G),
        grid,
        AffinityConfig(kernel),
        FusionConfig(beta, combine=combine),
        WalkConfig(method, alpha, steps),
    )
    assert found.P.dtype == torch.float64
    np.testing.assert_allclose(found.P, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.head_weights, w, rtol=1e-6, atol=1e-9)
    assert found.effective_heads == pytest.approx(1 / (w**2).sum(), rel=1e-5)


@settings(max_examples=60)
@given(scenes(), st.sampled_from(STOCHASTIC_KERNELS), st.sampled_from(DEVICES))
def test_refine_of_float16_taps_is_finite_and_stochastic(scene, kernel, device):
    Q, K, G, grid = scene
    Q, K = tensors(Q, K, dtype=torch.float16, device=device)
    G = tensors(G, dtype=torch.float32, device=device)[0]
    found = refine(Q, K, G, grid, AffinityConfig(kernel))
    assert found.P.dtype == torch.float32
    assert found.P.shape == G.shape
    assert found.P.is_contiguous()
    # Opposite tokens leave `shifted` its floor alone, and a low-rank product in float32 cannot resolve it.
    if kernel != "shifted" or found.operator != "low rank":
        assert (found.P >= 0).all()
        torch.testing.assert_close(found.P.sum(-1), torch.ones_like(found.P[:, 0]), rtol=0, atol=2e-5)
    assert found.P.isfinite().all()


@settings(max_examples=40)
@given(scenes(("random", "positive")), st.sampled_from(STOCHASTIC_KERNELS), st.integers(0, 99))
def test_reordering_classes_reorders_p(scene, kernel, seed):
    Q, K, G, grid = scene
    order = torch.randperm(G.shape[1], generator=torch.Generator().manual_seed(seed))
    Q, K, G = tensors(Q, K, G)
    P = refine(Q, K, G, grid, AffinityConfig(kernel)).P
    moved = refine(Q, K, G[:, order], grid, AffinityConfig(kernel)).P
    torch.testing.assert_close(moved, P[:, order], rtol=1e-9, atol=1e-12)


def test_mirroring_the_image_mirrors_p():
    grid = (5, 7)
    Q, K, G = image_like(2, grid, 6, 4)

    def mirrored(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:-2], *grid, x.shape[-1]).flip(-2).reshape(x.shape)

    for kernel in STOCHASTIC_KERNELS:
        P = refine(Q, K, G, grid, AffinityConfig(kernel)).P
        Pm = refine(mirrored(Q), mirrored(K), mirrored(G), grid, AffinityConfig(kernel)).P
        torch.testing.assert_close(Pm, mirrored(P), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", POSITIVE_KERNELS)
@pytest.mark.parametrize("method", ["truncated", "fixed_point"])
@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_float16_taps_and_operands_over_40_steps_against_float64(kernel, method, storage, device):
    grid = (20, 16)
    Q, K, G = (x.to(device) for x in image_like(4, grid, 16, 21))
    walk = WalkConfig(method, 0.85, 40)
    narrow = refine(Q, K, G, grid, AffinityConfig(kernel), walk=walk, operator="dense fused", storage=storage).P
    G64 = G.double() / G.double().sum(-1, keepdim=True)
    wide = refine(Q, K, G64, grid, AffinityConfig(kernel), walk=walk).P
    error = (narrow.double() - wide).abs()
    assert error.mean() < (7e-5 if storage == torch.float16 else 5e-7)
    assert error.max() < (5e-4 if storage == torch.float16 else 1e-5)
    best = wide.topk(2, -1).values
    certain = best[:, 0] - best[:, 1] > 1e-3
    assert certain.float().mean() > 0.5
    assert torch.equal(narrow.argmax(-1)[certain], wide.argmax(-1)[certain])


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_and_one_class(kind):
    Q, K = tensors(*queries_and_keys(kind, 2, 1, 4), dtype=torch.float16)
    for kernel in POSITIVE_KERNELS:
        for method in ("truncated", "fixed_point", "exact"):
            found = refine(Q, K, torch.ones(1, 1), (1, 1), AffinityConfig(kernel), walk=WalkConfig(method))
            torch.testing.assert_close(found.P, torch.ones(1, 1), rtol=0, atol=1e-6)
            torch.testing.assert_close(found.head_weights, torch.full_like(found.head_weights, 0.5))


def test_effective_heads_run_from_one_to_all():
    for weights, expected in (([1.0, 0.0, 0.0], 1.0), ([1 / 3] * 3, 3.0), ([0.5, 0.5, 0.0], 2.0)):
        found = Refinement(torch.ones(1, 1), torch.tensor(weights), None, "dense fused")
        assert found.effective_heads == pytest.approx(expected, rel=1e-6)


def test_refine_reports_entropies_operator_and_residual():
    Q, K, G = image_like(3, (6, 5), 4, 4)
    found = refine(Q, K, G, (6, 5), residual=True)
    assert found.operator == "dense fused"
    assert found.head_entropies.shape == (3,)
    limit = refine(Q, K, G, (6, 5), walk=WalkConfig("exact")).P
    assert 0 < (found.P - limit).abs().sum(-1).max() <= found.residual + 1e-5
    assert refine(Q, K, G, (6, 5), AffinityConfig("shifted")).operator == "low rank"
    assert refine(Q, K, G, (6, 5), operator="chunked").operator == "chunked"
    assert refine(Q, K, G, (6, 5), fusion=FusionConfig(0.0)).operator == "local"
    assert refine(Q, K, G, (6, 5), fusion=FusionConfig(head_weights="mean")).head_entropies is None
    assert refine(Q, K, G, (6, 5)).residual is None


def test_gmres_solves_every_column_though_s_is_not_symmetric():
    draw = torch.Generator().manual_seed(0)
    S = torch.rand(60, 60, generator=draw, dtype=torch.float64) ** 8
    A = torch.eye(60, dtype=torch.float64) - 0.95 * S / S.sum(1, keepdim=True)
    b = torch.rand(60, 4, generator=draw, dtype=torch.float64)
    b[:, 3] = 0
    for restart in (3, 24, 70):
        x = gmres(lambda v: A @ v, b, torch.zeros_like(b), restart=restart)
        torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=0, atol=1e-11)


def test_gmres_says_when_it_does_not_arrive():
    A = torch.zeros(5, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="GMRES missed 1e-13 after 2 restarts; lower alpha"):
        gmres(lambda v: A @ v, torch.ones(5, 1, dtype=torch.float64), torch.zeros(5, 1).double(), cycles=2)


@pytest.mark.parametrize("kernel", ["exp", "shifted"])
def test_above_1024_tokens_exact_is_the_same_solution_by_gmres(kernel, monkeypatch):
    grid = (15, 8)
    Q, K, G = image_like(2, grid, 4, 3)
    walk = WalkConfig("exact", 0.9)
    direct = refine(Q, K, G.double(), grid, AffinityConfig(kernel), walk=walk).P
    monkeypatch.setattr(random_walk, "DENSE_SOLVE_TOKENS", 100)
    iterative = refine(Q, K, G.double(), grid, AffinityConfig(kernel), walk=walk).P
    assert not torch.equal(direct, iterative)
    torch.testing.assert_close(iterative, direct, rtol=0, atol=1e-10)


def test_exact_is_worked_out_in_float64_whatever_comes_in():
    Q, K, G = image_like(3, (6, 5), 8, 4)
    walk = WalkConfig("exact", 0.95)
    narrow, wide = refine(Q, K, G, (6, 5), walk=walk).P, refine(Q, K, G.double(), (6, 5), walk=walk).P
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=7e-8, atol=0)


def test_low_rank_and_dense_agree_on_a_grid_of_ordinary_size():
    grid = (24, 32)
    Q, K, G = image_like(5, grid, 16, 10)
    low, dense, chunked = (
        refine(Q, K, G, grid, AffinityConfig("shifted"), operator=o).P for o in ("low rank", "dense fused", "chunked")
    )
    torch.testing.assert_close(low, dense, rtol=0, atol=3e-6)
    torch.testing.assert_close(chunked, dense, rtol=0, atol=3e-6)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    Q, K, G = (x.cuda() for x in image_like(4, (16, 12), 16, 5))
    refine(Q, K, G, (16, 12), AffinityConfig("favor"))  # uploads its directions, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kernel in STOCHASTIC_KERNELS:
            refine(Q, K, G, (16, 12), AffinityConfig(kernel), residual=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lazy"}, "walk method 'lazy' is unknown; choose fixed_point"),
        ({"alpha": 1.0}, "alpha is 1.0; it must be at least 0 and below 1"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"method": "truncated", "previous_frame_start": True}, "for the fixed_point walk, not for truncated"),
    ],
)
def test_a_setting_out_of_range_says_what_is_accepted(fields, message):
    with pytest.raises(ValueError, match=message):
        WalkConfig(**fields)


def test_inputs_that_do_not_fit_are_refused():
    Q, K, G = image_like(2, (3, 4), 4, 3)
    with pytest.raises(ValueError, match="Q and K must both be"):
        refine(Q[0], K[0], G, (3, 4))
    with pytest.raises(ValueError, match="Q and K must both be"):
        refine(Q, K[:1], G, (3, 4))
    with pytest.raises(ValueError, match=r"G must be \[tokens, queries\] with 12 tokens"):
        refine(Q, K, G[:11], (3, 4))
    with pytest.raises(ValueError, match="G must be"):
        refine(Q, K, G[:, :0], (3, 4))
    with pytest.raises(ValueError, match="does not hold the 12 tokens"):
        refine(Q, K, G, (3, 5))
    with pytest.raises(ValueError, match="floating point"):
        refine(Q.int(), K, G, (3, 4))
    with pytest.raises(ValueError, match="one device"):
        refine(Q, K, G.to("meta"), (3, 4))
    with pytest.raises(ValueError, match="must be a distribution"):
        refine(Q, K, 2 * G, (3, 4))
    with pytest.raises(ValueError, match="must be a distribution"):
        refine(Q, K, G * math.nan, (3, 4))
    refine(Q, K, 2 * G, (3, 4), validate=False)
    with pytest.raises(ValueError, match="not finite everywhere"):
        refine(Q * math.inf, K, G, (3, 4))
    with pytest.raises(ValueError, match="residual is a bound for the fixed_point walk"):
        refine(Q, K, G, (3, 4), walk=WalkConfig("exact"), residual=True)
    with pytest.raises(ValueError, match="previous_frame_start is off"):
        refine(Q, K, G, (3, 4), previous=G)
    from_before = WalkConfig(previous_frame_start=True)
    with pytest.raises(ValueError, match=r"previous must be floating point \[12, 3\] on cpu, as G is; got .*\[11, 3\]"):
        refine(Q, K, G, (3, 4), walk=from_before, previous=G[:11])
    with pytest.raises(ValueError, match="previous must be floating point"):
        refine(Q, K, G, (3, 4), walk=from_before, previous=G.to("meta"))
    with pytest.raises(ValueError, match="tolerance is 0"):
        choose_steps(0.5, 0)
    with pytest.raises(ValueError, match="alpha is 1"):
        choose_steps(1, 0.1)
