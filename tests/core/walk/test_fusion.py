"""Transitions -> S: entropy weights (Eq. 12-14), both ways to combine heads, S in each of its forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from nerve_core.walk import fusion
from nerve_core.walk.affinity import KERNELS, Affinity, AffinityConfig, random_directions
from nerve_core.walk.fusion import (
    FusionConfig,
    build_transition,
    choose_operator,
    entropy_weights,
    fuse,
    head_entropies,
    row_chunks,
)
from nerve_core.walk.workspace import Workspace
from tokens import (
    DEVICES,
    POSITIVE_KERNELS,
    STOCHASTIC_KERNELS,
    image_like,
    label_probabilities,
    queries_and_keys,
    scenes,
    tensors,
)

COMBINES = ("transitions", "affinities")
KERNELS_AND_OPERATORS = [
    (name, operator)
    for name, kernel in KERNELS.items()
    for operator in ("dense fused", "chunked", "low rank")
    if operator != "low rank" or kernel.low_rank
]
KERNELS_AND_SCENES = st.one_of(
    st.tuples(scenes(), st.sampled_from(POSITIVE_KERNELS)), st.tuples(scenes(("positive",)), st.just("raw"))
)


def matrix(transition: fusion.Transition, tokens: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """S [N, N] as what it makes of the identity."""
    return transition.apply(torch.eye(tokens, dtype=dtype))


def affinity_of(scene: tuple, kernel: str, dtype: torch.dtype = torch.float64) -> tuple[Affinity, torch.Tensor]:
    Q, K, G, grid = scene
    return Affinity(*tensors(Q, K), grid, AffinityConfig(kernel), dtype=dtype), tensors(G, dtype=dtype)[0]


@settings(max_examples=80)
@given(KERNELS_AND_SCENES, st.integers(1, 30))
def test_eq_12_and_13_entropy_of_one_step_of_each_head(drawn, rows_per_chunk):
    scene, kernel = drawn
    affinity, G = affinity_of(scene, kernel)
    found = head_entropies(affinity, G, rows_per_chunk)
    steps = [
        reference.normalised(reference.global_affinity(q, k, kernel, 0.05))
        for q, k in zip(scene[0], scene[1], strict=True)
    ]
    np.testing.assert_allclose(found, reference.entropies(steps, scene[2]), rtol=1e-6, atol=1e-9)


def test_eq_12_to_14_by_hand():
    # Two tokens that see only themselves: P_1 is G, its entropies 0 and ln 2. All alike: P_1 is G's mean.
    Q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    affinity = Affinity(Q, Q, (1, 2), AffinityConfig("exp", tau=0.001), dtype=torch.float64)
    G = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    entropies = head_entropies(affinity, G)
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(entropies, torch.tensor([math.log(2) / 2, mixed], dtype=torch.float64))
    odds = math.exp(-4 * (math.log(2) / 2 - mixed))
    weights = entropy_weights(entropies, 4.0)
    torch.testing.assert_close(weights[0] / weights[1], torch.tensor(odds, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))


@given(st.lists(st.floats(0, 5), min_size=1, max_size=10), st.floats(0, 50))
def test_eq_14_a_surer_head_never_weighs_less(entropies, c):
    weights = entropy_weights(torch.tensor(entropies, dtype=torch.float64), c)
    np.testing.assert_allclose(weights, reference.weights(np.array(entropies), c), rtol=1e-9, atol=1e-12)
    order = np.argsort(entropies)
    assert (np.diff(weights.numpy()[order]) <= 1e-15).all()


def test_a_head_of_noise_weighs_least_and_equal_heads_weigh_the_same():
    Q, K, G = image_like(4, (12, 10), 16, 5)
    Q[3], K[3] = Q[3] * 0, K[3] * 0  # sees everything alike
    Q[1], K[1] = Q[0], K[0]
    fused = fuse(Q, K, G, (12, 10), AffinityConfig(), FusionConfig())
    assert fused.weights.argmin() == 3
    assert fused.weights[3] < 0.5 * fused.weights[0]
    assert fused.weights[0] == fused.weights[1]


@settings(max_examples=150)
@given(
    KERNELS_AND_SCENES,
    st.sampled_from((0.0, 0.3, 1.0)),
    st.sampled_from(COMBINES),
    st.sampled_from(("entropy", "mean", "single", 0)),
    st.sampled_from(("auto", "dense fused", "chunked", "low rank")),
    st.integers(1, 30),
)
def test_eq_2_15_and_22_in_every_form_of_s(drawn, beta, combine, head_weights, operator, rows_per_chunk):
    scene, kernel = drawn
    Q, K, G, grid = scene
    if operator == "low rank" and not KERNELS[kernel].low_rank:
        operator = "auto"
    fused = fuse(
        *tensors(Q, K, G),
        grid,
        AffinityConfig(kernel),
        FusionConfig(beta, head_weights=head_weights, combine=combine),
        operator=operator,
        rows_per_chunk=rows_per_chunk,
    )
    S, w = reference.transition(Q, K, G, grid, kernel=kernel, beta=beta, head_weights=head_weights, combine=combine)
    np.testing.assert_allclose(fused.weights, w, rtol=1e-6, atol=1e-9)
    found = matrix(fused.transition, len(G))
    # All cosines -1 leave `shifted` with its floor of 1e-6 alone: low-rank products lose six digits to it.
    loose = kernel == "shifted"
    np.testing.assert_allclose(found, S, rtol=1e-6, atol=1e-7 if loose else 1e-9)
    np.testing.assert_allclose(found.sum(1), 1, rtol=0, atol=1e-7 if loose else 1e-9)


@pytest.mark.parametrize(("kernel", "operator"), KERNELS_AND_OPERATORS)
@pytest.mark.parametrize("combine", COMBINES)
def test_every_kernel_combination_and_form_is_the_same_s(kernel, combine, operator):
    Q, K = queries_and_keys("positive" if kernel == "raw" else "random", 3, 20, 4)
    Q, K = Q * [[[1]], [[2]], [[3]]], K * [[[1]], [[2]], [[3]]]  # heads of unlike norm and mass
    G = label_probabilities(20, 4)
    W = random_directions(4, 256, torch.float64, torch.device("cpu")).numpy()
    S, w = reference.transition(Q, K, G, (5, 4), kernel=kernel, combine=combine, beta=0.4, directions=W)
    fused = fuse(
        *tensors(Q, K, G),
        (5, 4),
        AffinityConfig(kernel),
        FusionConfig(0.4, combine=combine),
        operator=operator,
        rows_per_chunk=6,
    )
    np.testing.assert_allclose(fused.weights, w, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(matrix(fused.transition, 20), S, rtol=1e-9, atol=1e-12)


@settings(max_examples=60)
@given(
    scenes(),
    st.sampled_from(STOCHASTIC_KERNELS),
    st.sampled_from(COMBINES),
    st.floats(0, 1),
    st.sampled_from(DEVICES),
)
def test_theorem_1_fused_s_keeps_distributions_distributions(scene, kernel, combine, beta, device):
    Q, K, G, grid = scene
    Q, K = tensors(Q, K, dtype=torch.float16, device=device)
    G = tensors(G, dtype=torch.float32, device=device)[0]
    for operator in ("dense fused", "chunked"):
        fused = fuse(
            Q,
            K,
            G,
            grid,
            AffinityConfig(kernel),
            FusionConfig(beta, combine=combine),
            operator=operator,
            storage=torch.float32,
        )
        P = fused.transition.apply(G)
        assert (P >= 0).all()
        torch.testing.assert_close(P.sum(-1), torch.ones_like(P[:, 0]), rtol=0, atol=1e-5)


def test_beta_0_is_local_and_beta_1_is_global():
    scene = (*queries_and_keys("random", 2, 20, 4), label_probabilities(20, 3), (5, 4))
    affinity, _ = affinity_of(scene, "exp")
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    local = build_transition(affinity, weights, FusionConfig(0.0))
    assert local.name == "local"
    S = matrix(local, 20)
    assert ((S > 0).sum(1) <= 9).all()
    forced = build_transition(affinity, weights, FusionConfig(0.0), operator="dense fused")
    torch.testing.assert_close(matrix(forced, 20), S)
    for operator in ("dense fused", "chunked"):
        found = build_transition(affinity, weights, FusionConfig(1.0), operator=operator)
        expected = sum(
            w * reference.normalised(reference.global_affinity(q, k, "exp", 0.05))
            for w, q, k in zip((0.25, 0.75), scene[0], scene[1], strict=True)
        )
        np.testing.assert_allclose(matrix(found, 20), expected, rtol=1e-6, atol=1e-12)


def test_eq_15_and_22_differ_where_heads_differ_in_mass():
    Q, K, G = image_like(3, (5, 4), 4, 3)
    S22, S15 = (
        matrix(fuse(Q, K, G, (5, 4), AffinityConfig(), FusionConfig(combine=c)).transition, 20, torch.float32)
        for c in COMBINES
    )
    assert (S22 - S15).abs().max() > 1e-3


@pytest.mark.parametrize("operator", ["dense fused", "chunked", "low rank"])
def test_a_single_head_is_that_head_alone(operator):
    Q, K, G = image_like(3, (5, 4), 4, 3)
    kernel = AffinityConfig("shifted")
    one = fuse(Q, K, G, (5, 4), kernel, FusionConfig(head_weights=2), operator=operator)
    alone = fuse(Q[2:], K[2:], G, (5, 4), kernel, FusionConfig(head_weights="mean"), operator=operator)
    assert one.weights.tolist() == [0, 0, 1]
    assert one.entropies is None
    torch.testing.assert_close(one.transition.apply(G), alone.transition.apply(G))


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    ("kernel", "operator", "most"),
    [
        ("exp", "dense fused", 400 * 400),
        ("softmax", "dense fused", 400 * 400),
        ("relu", "dense fused", 400 * 400),
        ("exp", "chunked", 100 * 400),
        ("shifted", "low rank", 8 * 9 * 400),
    ],
)
def test_no_tensor_of_all_heads_and_all_pairs_exists(kernel, operator, most, combine):
    Q, K, G = image_like(8, (20, 20), 8, 3)
    config = FusionConfig(combine=combine)
    with LargestTensor() as seen:
        S = fuse(Q, K, G, (20, 20), AffinityConfig(kernel), config, operator=operator, rows_per_chunk=100)
        S.transition.apply(G)
    # The stencil's padded neighbours, 8 heads x 400 tokens x 9 places, are the floor of this measure.
    assert seen.elements <= max(most, 8 * 400 * 9)


def test_by_default_one_heads_rows_in_work_fit_the_chunk():
    Q = torch.ones(3, 4096, 1)
    chunks = row_chunks(Affinity(Q, Q, (64, 64), AffinityConfig()))
    assert fusion.CPU_CHUNK_BYTES == 512 * 4096 * 4
    assert [rows.start for rows in chunks] == list(range(0, 4096, 512))
    assert [rows.stop - rows.start for rows in chunks] == [512] * 8


def test_the_rule_that_picks_the_form_of_s(monkeypatch):
    def picked(
        kernel: str, tokens: int, beta: float = 0.5, storage: torch.dtype = torch.float32, columns: int = 32
    ) -> str:
        Q = torch.ones(2, tokens, 3)
        return choose_operator(Affinity(Q, Q, (1, tokens), AffinityConfig(kernel)), beta, storage, columns)

    assert picked("exp", 64) == "dense fused"
    assert picked("exp", 64, beta=0.0) == "local"
    # Multiplications over 2 N, low rank: 2 H R columns; dense: N (H R + columns). H R is 8, 6 and 512.
    assert picked("shifted", 13) == "low rank"  # 512 <= 520
    assert picked("shifted", 12) == "dense fused"  # 512 > 480
    assert picked("shifted", 12, columns=16) == "low rank"  # 256 <= 288
    assert picked("raw", 11) == "low rank"  # 384 <= 418
    assert picked("raw", 10) == "dense fused"  # 384 > 380
    assert picked("favor", 61) == "low rank"  # 32768 <= 33184
    assert picked("favor", 60) == "dense fused"  # 32768 > 32640
    monkeypatch.setattr(fusion, "DENSE_BYTES", 64 * 64 * 4)
    assert picked("exp", 64) == "chunked"
    assert picked("exp", 63) == "dense fused"
    assert picked("exp", 64, storage=torch.float16) == "dense fused"
    monkeypatch.setattr(fusion, "DENSE_BYTES", 1)
    assert picked("shifted", 9) == "low rank"


@pytest.mark.parametrize("kernel", ["exp", "softmax", "relu"])
def test_a_workspace_changes_speed_and_nothing_else(kernel):
    workspace = Workspace()
    for seed, grid in ((0, (6, 5)), (1, (6, 5)), (2, (4, 3)), (3, (7, 5))):
        Q, K, G = image_like(3, grid, 8, 4, seed)
        plain = fuse(Q, K, G, grid, AffinityConfig(kernel), FusionConfig())
        reused = fuse(Q, K, G, grid, AffinityConfig(kernel), FusionConfig(), workspace=workspace)
        torch.testing.assert_close(reused.transition.apply(G), plain.transition.apply(G), rtol=0, atol=0)
        torch.testing.assert_close(reused.weights, plain.weights, rtol=0, atol=0)
    assert workspace.nbytes == 4 * (35 * 35 + 3 * 35 * 35)


def test_a_workspace_keeps_rows_only_within_the_budget(monkeypatch):
    monkeypatch.setattr(fusion, "KEEP_BYTES", 3 * 30 * 30 * 4 - 1)
    workspace = Workspace()
    Q, K, G = image_like(3, (6, 5), 8, 4)
    fuse(Q, K, G, (6, 5), AffinityConfig(), FusionConfig(), workspace=workspace)
    assert workspace.nbytes == 4 * 30 * 30


def test_a_workspace_may_pass_between_inference_mode_and_none():
    workspace = Workspace()
    first = workspace.take("a", (4,), torch.float32, torch.device("cpu"))
    again = workspace.take("a", (2, 2), torch.float32, torch.device("cpu"))
    assert again.data_ptr() == first.data_ptr()
    assert workspace.take("a", (5,), torch.float32, torch.device("cpu")).numel() == 5


@pytest.mark.parametrize("kernel", ["exp", "softmax", "relu"])
@pytest.mark.parametrize(("storage", "bound"), [(torch.float16, 6e-4), (torch.bfloat16, 5e-3)])
def test_a_narrow_s_stays_close_and_its_rows_still_sum_to_one(kernel, storage, bound):
    Q, K, G = image_like(4, (16, 12), 16, 5)
    wide = fuse(Q, K, G, (16, 12), AffinityConfig(kernel), FusionConfig()).transition
    narrow = fuse(Q, K, G, (16, 12), AffinityConfig(kernel), FusionConfig(), storage=storage).transition
    assert narrow.matrix.dtype == storage
    rows = narrow.matrix.float() * narrow.row_scale[:, None]
    torch.testing.assert_close(rows.sum(-1), torch.ones(192), rtol=0, atol=1e-5)
    assert (narrow.apply(G) - wide.apply(G)).abs().max() < bound


def test_a_float16_s_holds_the_even_share_of_a_large_grid_as_a_normal_number():
    half = torch.finfo(torch.float16)
    assert half.smallest_normal < fusion.HALF_SCALE / 16384
    assert half.max > fusion.HALF_SCALE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 1.5}, "beta is 1.5"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"c": -1.0}, "c is -1.0"),
        ({"c": float("inf")}, "c is inf"),
        ({"head_weights": "best"}, "head_weights is 'best'; choose entropy, mean, single"),
        ({"head_weights": -1}, "head_weights is -1"),
        ({"head_weights": True}, "head_weights is True"),
        ({"combine": "both"}, "combine is 'both'"),
    ],
)
def test_a_setting_out_of_range_says_what_is_accepted(fields, message):
    with pytest.raises(ValueError, match=message):
        FusionConfig(**fields)


def test_what_does_not_fit_is_refused():
    Q, K, G = image_like(2, (3, 4), 4, 3)
    with pytest.raises(ValueError, match="head 2; there are heads 0 to 1"):
        fuse(Q, K, G, (3, 4), AffinityConfig(), FusionConfig(head_weights=2))
    with pytest.raises(ValueError, match="'exp' is not low rank"):
        fuse(Q, K, G, (3, 4), AffinityConfig(), FusionConfig(), operator="low rank")
    with pytest.raises(ValueError, match="needs beta 0, not"):
        fuse(Q, K, G, (3, 4), AffinityConfig(), FusionConfig(), operator="local")
    with pytest.raises(ValueError, match="operator 'sparse' is unknown; choose one of auto, dense fused"):
        fuse(Q, K, G, (3, 4), AffinityConfig(), FusionConfig(), operator="sparse")
    with pytest.raises(ValueError, match="rows_per_chunk is 0"):
        fuse(Q, K, G, (3, 4), AffinityConfig(), FusionConfig(), rows_per_chunk=0)
