"""Q, K -> transitions against explicit loops: every kernel (Eq. 8), the stencil (Eq. 9), hostile inputs."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import reference
from nerve_core.walk import _grid
from nerve_core.walk._products import linear
from nerve_core.walk.affinity import KERNELS, Affinity, AffinityConfig, random_directions, unit_rows
from tokens import (
    DEVICES,
    KINDS,
    POSITIVE_KERNELS,
    STOCHASTIC_KERNELS,
    label_probabilities,
    queries_and_keys,
    scenes,
    tensors,
)

TAUS = st.sampled_from((0.02, 0.05, 0.5))


def transitions(affinity: Affinity) -> torch.Tensor:
    """Every head's S_global: [H, N, N]."""
    found = []
    for head in range(affinity.heads):
        A, sums = affinity.rows(head, slice(0, affinity.tokens))
        found.append(A if sums is None else A / sums[:, None])
    return torch.stack(found)


def dense(stencil: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """A stencil [N, 9] as the [N, N] matrix it stands for, by explicit loops."""
    matrix = np.zeros((len(stencil), len(stencil)))
    for i in range(len(stencil)):
        row, column = divmod(i, grid[1])
        for place, (down, right) in enumerate(_grid.OFFSETS):
            if 0 <= row + down < grid[0] and 0 <= column + right < grid[1]:
                matrix[i, (row + down) * grid[1] + column + right] = stencil[i, place]
            else:
                assert stencil[i, place] == 0
    return matrix


@settings(max_examples=120)
@given(scenes(), st.sampled_from(POSITIVE_KERNELS), TAUS)
def test_global_transition_is_eq_8_normalised(scene, kernel, tau):
    Q, K, _, grid = scene
    found = transitions(Affinity(*tensors(Q, K), grid, AffinityConfig(kernel, tau), dtype=torch.float64))
    for head in range(len(Q)):
        expected = reference.normalised(reference.global_affinity(Q[head], K[head], kernel, tau))
        np.testing.assert_allclose(found[head], expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=80)
@given(scenes(), st.sampled_from(POSITIVE_KERNELS), TAUS, st.sampled_from((0.1, 1.0)))
def test_local_stencil_is_eq_9(scene, kernel, tau, eps_self):
    Q, K, _, grid = scene
    config = AffinityConfig(kernel, tau, eps_self)
    found = Affinity(*tensors(Q, K), grid, config, dtype=torch.float64).stencils()
    for head in range(len(Q)):
        expected = reference.local_affinity(Q[head], K[head], grid, kernel, tau, eps_self)
        np.testing.assert_allclose(dense(found[head], grid), expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=120)
@given(
    scenes(),
    st.sampled_from(STOCHASTIC_KERNELS),
    st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    st.sampled_from(DEVICES),
)
def test_theorem_1_a_transition_keeps_distributions_distributions(scene, kernel, dtype, device):
    Q, K, G, grid = scene
    affinity = Affinity(*tensors(Q, K, dtype=dtype, device=device), grid, AffinityConfig(kernel))
    stencils = affinity.stencils()
    assert (stencils >= 0).all()
    assert (stencils[..., _grid.CENTRE] > 0).all()
    S = transitions(affinity)
    assert (S >= 0).all()
    torch.testing.assert_close(S.sum(-1), torch.ones_like(S[..., 0]), rtol=0, atol=1e-5)
    P = S @ torch.from_numpy(G).to(S)
    assert (P >= 0).all()
    torch.testing.assert_close(P.sum(-1), torch.ones_like(P[..., 0]), rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(
    scenes(("random", "positive", "zero rows", "axes", "tiny", "mixed")),
    st.sampled_from(("exp", "relu", "shifted")),
    st.sampled_from((torch.float16, torch.float32)),
)
def test_float32_is_the_float64_reference_to_rounding(scene, kernel, dtype):
    Q, K, _, grid = scene
    found = transitions(Affinity(*tensors(Q, K, dtype=dtype), grid, AffinityConfig(kernel)))
    for head in range(len(Q)):
        expected = reference.normalised(reference.global_affinity(Q[head], K[head], kernel, 0.05))
        np.testing.assert_allclose(found[head], expected, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", STOCHASTIC_KERNELS)
def test_no_kernel_gives_nan_or_infinity_in_float32_on_float16_taps(kernel, kind):
    Q, K = tensors(*queries_and_keys(kind, 2, 12, 64), dtype=torch.float16)
    affinity = Affinity(Q, K, (3, 4), AffinityConfig(kernel, 0.001))
    assert transitions(affinity).isfinite().all()
    assert affinity.stencils().isfinite().all()


def test_row_sums_beyond_float16_are_no_harm():
    Q, _ = tensors(*queries_and_keys("identical", 1, 4096, 8), dtype=torch.float16)
    affinity = Affinity(Q, Q, (64, 64), AffinityConfig("shifted"))
    torch.testing.assert_close(affinity.mass(), torch.full((1, 4096), 4096.0), rtol=1e-5, atol=0)


def test_cosine_with_a_zero_vector_is_zero():
    Q, K = torch.ones(1, 4, 3), torch.ones(1, 4, 3)
    Q[0, 0] = 0
    K[0, 1] = 0
    assert (unit_rows(Q)[0, 0] == 0).all()
    relu, _ = Affinity(Q, K, (2, 2), AffinityConfig("relu")).rows(0, slice(0, 4))
    expected = torch.full((4, 4), 1 + 1e-6)
    expected[0], expected[:, 1] = 1e-6, 1e-6
    torch.testing.assert_close(relu, expected)


def test_unit_rows_have_length_one_at_any_magnitude():
    x = torch.tensor([[3.0, 4.0]]) * 10.0 ** torch.arange(-28, 37, 4)[:, None]
    torch.testing.assert_close(unit_rows(x), torch.tensor([[0.6, 0.8]]).expand_as(x), rtol=1e-6, atol=0)


def test_centring_takes_away_what_all_tokens_share():
    rng = np.random.default_rng(0)
    Q, K = rng.normal(size=(2, 1, 12, 3))
    plain = transitions(Affinity(*tensors(Q, K), (3, 4), AffinityConfig("relu_centred"), dtype=torch.float64))
    moved = Affinity(*tensors(Q + 5, K - 3), (3, 4), AffinityConfig("relu_centred"), dtype=torch.float64)
    torch.testing.assert_close(transitions(moved), plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kernel", STOCHASTIC_KERNELS)
def test_reordering_tokens_reorders_the_global_transition(kernel):
    Q, K = tensors(*queries_and_keys("random", 2, 12, 4))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    config = AffinityConfig(kernel)
    S = transitions(Affinity(Q, K, (3, 4), config, dtype=torch.float64))
    moved = transitions(Affinity(Q[:, order], K[:, order], (3, 4), config, dtype=torch.float64))
    torch.testing.assert_close(moved, S[:, order][:, :, order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", ["exp", "softmax", "relu", "shifted"])
@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (2, -1), (-1, 2)])
def test_moving_the_image_moves_the_stencil_inside_it(kernel, shift):
    grid = (7, 9)
    Q, K = tensors(*queries_and_keys("random", 1, 63, 4))

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, *grid, -1).roll(shift, (1, 2)).reshape(1, 63, -1)

    config = AffinityConfig(kernel)
    before = Affinity(Q, K, grid, config, dtype=torch.float64).stencils().reshape(*grid, 9)
    after = Affinity(moved(Q), moved(K), grid, config, dtype=torch.float64).stencils().reshape(*grid, 9)
    for row in range(1, 6):
        for column in range(1, 8):
            if 1 <= row + shift[0] < 6 and 1 <= column + shift[1] < 8:
                there = after[row + shift[0], column + shift[1]]
                torch.testing.assert_close(there, before[row, column], rtol=1e-9, atol=1e-12)


@settings(max_examples=40)
@given(scenes(), st.integers(0, 100), st.integers(1, 100), st.integers(0, 4))
def test_applying_and_adding_a_stencil_are_its_matrix(scene, seed, height, classes):
    grid = scene[3]
    tokens = grid[0] * grid[1]
    draw = torch.Generator().manual_seed(seed)
    stencil = torch.rand(tokens, 9, generator=draw, dtype=torch.float64) * _grid.inside(grid)
    matrix = torch.from_numpy(dense(stencil, grid))
    X = torch.rand(tokens, classes + 1, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(_grid.apply_stencil(stencil, X, grid), matrix @ X)
    base = torch.rand(tokens, tokens, generator=draw, dtype=torch.float64)
    total = base.clone()
    for first in range(0, tokens, height):
        _grid.add_stencil_(total[first : first + height], stencil, grid, first)
    torch.testing.assert_close(total, base + matrix)


@settings(max_examples=40)
@given(scenes(("positive",)))
def test_raw_is_eq_8_where_that_is_a_transition(scene):
    Q, K, _, grid = scene
    affinity = Affinity(*tensors(Q, K), grid, AffinityConfig("raw"), dtype=torch.float64)
    for head in range(len(Q)):
        A, sums = affinity.rows(head, slice(0, affinity.tokens))
        expected = reference.global_affinity(Q[head], K[head], "raw", 0.05)
        np.testing.assert_allclose(A, expected, rtol=1e-9)
        np.testing.assert_allclose(sums, expected.sum(1), rtol=1e-9)
        np.testing.assert_allclose(affinity.mass()[head], expected.sum(1), rtol=1e-9)
        local = reference.local_affinity(Q[head], K[head], grid, "raw", 0.05, 0.1)
        np.testing.assert_allclose(dense(affinity.stencils()[head], grid), local, rtol=1e-9)


@settings(max_examples=40)
@given(scenes(("positive",)))
def test_relu_equals_raw_where_raw_is_a_transition(scene):
    Q, K, _, grid = scene
    raw, relu = (Affinity(*tensors(Q, K), grid, AffinityConfig(k), dtype=torch.float64) for k in ("raw", "relu"))
    torch.testing.assert_close(transitions(relu), transitions(raw), rtol=0, atol=2e-5)


@settings(max_examples=60)
@given(scenes(("random", "zero rows", "opposite", "all zero", "axes", "positive")))
def test_raw_is_refused_exactly_where_a_row_sum_is_below_a_twentieth_of_n(scene):
    Q, K, _, grid = scene
    tokens = grid[0] * grid[1]
    sums = np.array([reference.global_affinity(q, k, "raw", 0.05).sum(1) for q, k in zip(Q, K, strict=True)])
    assume(np.abs(sums / tokens - 0.05).min() > 1e-9)
    if sums.min() < 0.05 * tokens:
        with pytest.raises(ValueError, match=r"kernel 'raw' gives no transition.*global.*use 'relu'"):
            Affinity(*tensors(Q, K), grid, AffinityConfig("raw"), dtype=torch.float64)
    else:
        Affinity(*tensors(Q, K), grid, AffinityConfig("raw"), dtype=torch.float64)


def test_a_row_sum_of_a_twentieth_of_n_is_where_raw_begins():
    Q, K = torch.ones(1, 200, 1), torch.ones(1, 200, 1)
    K[0, :95] = -1
    Affinity(Q, K, (10, 20), AffinityConfig("raw"))
    K[0, 95] = -1
    with pytest.raises(ValueError, match=r"a row's mean global affinity is 0\.04, below 0\.05"):
        Affinity(Q, K, (10, 20), AffinityConfig("raw"))


def test_raw_is_refused_where_neighbours_differ_though_rows_do_not():
    Q, K = torch.ones(1, 9, 1), torch.ones(1, 9, 1)
    K[0, 1] = -1  # the only neighbour of token 0, one of nine in a row
    affinity = Affinity(Q, K, (1, 9), AffinityConfig("raw"))
    with pytest.raises(ValueError, match="local"):
        affinity.stencils()


@pytest.mark.parametrize("kernel", STOCHASTIC_KERNELS)
@pytest.mark.parametrize("pieces", [1, 5, 12])
def test_rows_do_not_depend_on_the_chunk_or_on_being_kept(kernel, pieces):
    Q, K = tensors(*queries_and_keys("random", 2, 12, 4))
    config = AffinityConfig(kernel)
    whole = Affinity(Q, K, (3, 4), config, dtype=torch.float64)
    kept = Affinity(Q, K, (3, 4), config, dtype=torch.float64, keep=torch.empty(2, 12, 12, dtype=torch.float64))
    for _ in range(2):  # the second time from what was kept
        for head in range(2):
            A, sums = whole.rows(head, slice(0, 12))
            for first in range(0, 12, pieces):
                rows = slice(first, min(first + pieces, 12))
                part, part_sums = kept.rows(head, rows)
                torch.testing.assert_close(part, A[rows])
                assert (sums is None) == (part_sums is None)
                if sums is not None:
                    torch.testing.assert_close(part_sums, sums[rows])


@pytest.mark.parametrize("kernel", ["exp", "relu", "shifted"])
def test_log_mass_is_the_logarithm_of_eq_8s_row_sums_up_to_a_constant(kernel):
    Q, K = queries_and_keys("random", 2, 12, 4)
    affinity = Affinity(*tensors(Q, K), (3, 4), AffinityConfig(kernel), dtype=torch.float64)
    found = torch.stack([affinity.log_mass(head, slice(0, 12)) for head in range(2)]).numpy()
    expected = np.log([reference.global_affinity(q, k, kernel, 0.05).sum(1) for q, k in zip(Q, K, strict=True)])
    np.testing.assert_allclose(found - found[0, 0], expected - expected[0, 0], rtol=0, atol=1e-9)


def test_only_kernels_without_a_pointwise_rule_are_low_rank():
    assert {name for name, kernel in KERNELS.items() if kernel.low_rank} == {"shifted", "favor", "raw"}
    Q, K = tensors(*queries_and_keys("positive", 1, 12, 4))
    for name, rank in (("shifted", 5), ("favor", 256), ("raw", 4)):
        affinity = Affinity(Q, K, (3, 4), AffinityConfig(name), dtype=torch.float64)
        A, sums = affinity.rows(0, slice(0, 12))
        torch.testing.assert_close(affinity.left[0] @ affinity.right[0].T, A)
        torch.testing.assert_close(affinity.mass()[0], sums)
        assert affinity.left.shape[-1] == rank


def directions(size: int, features: int = 256) -> torch.Tensor:
    return random_directions(size, features, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 5, 64])
def test_favors_directions_are_orthogonal_in_blocks_as_long_as_gaussian_ones_and_always_the_same(size):
    W = directions(size, 256)
    assert W.shape == (256, size)
    for block in W.split(size):
        lengths = block.norm(dim=1)
        torch.testing.assert_close(block @ block.T, torch.diag(lengths.square()), rtol=0, atol=1e-12 * size)
    many = directions(size, 4096)
    # A length squared is chi-squared: mean D, variance 2 D. Four standard errors of 4096 of them.
    assert abs(float(many.square().sum(1).mean()) - size) < 4 * (2 * size / 4096) ** 0.5
    assert many.mean(0).abs().max() < 6 / 4096**0.5
    random_directions.cache_clear()
    torch.testing.assert_close(directions(size, 256), W, rtol=0, atol=0)
    torch.testing.assert_close(random_directions(size, 256, torch.float32, torch.device("cpu")), W.float())


@settings(max_examples=25)
@given(scenes(("random", "zero rows", "axes", "tiny")), st.sampled_from(("exp", "softmax")), st.integers(1, 9))
def test_favor_is_the_mean_over_its_directions(scene, favor_of, features):
    Q, K, _, grid = scene
    config = AffinityConfig("favor", 0.5, favor_of=favor_of, features=features)
    affinity = Affinity(*tensors(Q, K), grid, config, dtype=torch.float64)
    found = transitions(affinity)
    W = directions(Q.shape[-1], features).numpy()
    for head in range(len(Q)):
        expected = reference.favor(Q[head], K[head], W, favor_of, 0.5)
        np.testing.assert_allclose(found[head], reference.normalised(expected), rtol=1e-9, atol=1e-12)
        if favor_of == "exp":
            every = slice(0, affinity.tokens)
            mass = affinity.log_mass(head, every) - affinity.log_mass(0, every)[0]
            first = reference.favor(Q[0], K[0], W, favor_of, 0.5)
            np.testing.assert_allclose(mass, np.log(expected.sum(1)) - np.log(first[0].sum()), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("favor_of", "scale"), [("exp", 1.0), ("softmax", 0.5)])
def test_favor_is_unbiased_and_comes_closer_as_features_grow(favor_of, scale):
    Q, K = (scale * x for x in tensors(*queries_and_keys("random", 1, 12, 8)))
    exact = transitions(Affinity(Q, K, (3, 4), AffinityConfig(favor_of, 1.0), dtype=torch.float64))

    def error(features: int) -> float:
        config = AffinityConfig("favor", 1.0, favor_of=favor_of, features=features)
        found = transitions(Affinity(Q, K, (3, 4), config, dtype=torch.float64))
        return float((found - exact).abs().sum(-1).mean())

    # A bias would stay; noise falls by 32.
    assert error(2**16) < error(2**6) / 8
    assert error(2**16) < 0.01


@pytest.mark.parametrize("favor_of", ["exp", "softmax"])
@pytest.mark.parametrize("kind", KINDS)
def test_favor_neither_overflows_nor_loses_a_row(kind, favor_of):
    Q, K = tensors(*queries_and_keys(kind, 2, 12, 64), dtype=torch.float16)
    affinity = Affinity(Q, K, (3, 4), AffinityConfig("favor", 0.001, favor_of=favor_of))
    assert (affinity.mass() >= 1 - 1e-5).all()
    for operand in (affinity.left, affinity.right):
        assert operand.isfinite().all()
        assert (operand >= 0).all()
        assert (operand <= 1).all()
    torch.testing.assert_close(transitions(affinity).sum(-1), torch.ones(2, 12), rtol=0, atol=1e-5)
    assert affinity.stencils().isfinite().all()


@pytest.mark.parametrize("favor_of", ["exp", "softmax"])
def test_favor_compares_neighbours_by_the_kernel_that_it_estimates(favor_of):
    Q, K = tensors(*queries_and_keys("random", 2, 12, 4))
    found = Affinity(Q, K, (3, 4), AffinityConfig("favor", favor_of=favor_of), dtype=torch.float64)
    exact = Affinity(Q, K, (3, 4), AffinityConfig(favor_of), dtype=torch.float64)
    torch.testing.assert_close(found.stencils(), exact.stencils(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 16, 7), (40, 300, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_is_the_product_with_the_transpose(shape, dtype):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape[0], shape[1], generator=draw, dtype=dtype)
    weight = torch.randn(shape[2], shape[1], generator=draw, dtype=dtype)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(linear(x, weight).double(), exact, rtol=0, atol=5e-5)
    assert linear(x, weight).dtype == dtype


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel": "gauss"}, "kernel 'gauss' is unknown; choose one of exp, softmax, relu"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"eps_self": 0.0}, "eps_self is 0.0"),
        ({"eps_self": float("inf")}, "eps_self is inf"),
        ({"favor_of": "relu"}, "favor_of is 'relu'; favor estimates exp or softmax"),
        ({"features": 0}, "features is 0"),
        ({"features": 2.0}, "features is 2.0"),
        ({"features": True}, "features is True"),
    ],
)
def test_a_setting_out_of_range_says_what_is_accepted(fields, message):
    with pytest.raises(ValueError, match=message):
        AffinityConfig(**fields)


@pytest.mark.parametrize(
    ("Q", "K", "grid", "message"),
    [
        ((2, 6, 3), (2, 6, 4), (2, 3), "Q and K must both be"),
        ((6, 3), (6, 3), (2, 3), "Q and K must both be"),
        ((2, 0, 3), (2, 0, 3), (0, 3), "none of them 0"),
        ((2, 6, 3), (2, 6, 3), (3, 3), "a grid of 3 x 3 does not hold the 6 tokens"),
        ((2, 6, 3), (2, 6, 3), (-2, -3), "a grid of -2 x -3 does not hold"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(Q, K, grid, message):
    with pytest.raises(ValueError, match=message):
        Affinity(torch.ones(Q), torch.ones(K), grid, AffinityConfig())


def test_a_lone_token_is_its_own_only_neighbour():
    for kernel in STOCHASTIC_KERNELS:
        Q, K = tensors(*queries_and_keys("random", 2, 1, 4))
        affinity = Affinity(Q, K, (1, 1), AffinityConfig(kernel), dtype=torch.float64)
        expected = torch.zeros(2, 1, 9, dtype=torch.float64)
        expected[..., 4] = 0.1
        torch.testing.assert_close(affinity.stencils(), expected)
        torch.testing.assert_close(transitions(affinity), torch.ones(2, 1, 1, dtype=torch.float64))
    assert label_probabilities(1, 1).shape == (1, 1)
