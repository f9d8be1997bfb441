"""What the walk is compared with: every refinement against loops in float64, and its readout."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import reference
from nerve_core import Segmenter, Vocabulary
from nerve_core.evaluation.refinements import REFINEMENTS, iseg, refinement, sd_mean, sfsa
from nerve_core.readout import ReadoutConfig, read_out

heads, tokens, sizes, queries, seeds = (
    st.integers(1, 4),
    st.integers(2, 20),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(0, 999),
)


def drawn(heads, tokens, size, queries, seed, spread=1.5):
    """Q, K of some contrast and a G whose rows are distributions."""
    generator = torch.Generator().manual_seed(seed)
    Q, K = (spread * torch.randn((heads, tokens, size), generator=generator) for _ in range(2))
    return Q, K, (2 * torch.randn((tokens, queries), generator=generator)).softmax(-1)


def exact(*tensors):
    return [x.double().numpy() for x in tensors]


@settings(max_examples=40)
@given(heads, tokens, sizes, queries, seeds)
def test_sd_mean_is_one_product_with_the_mean_of_the_heads_maps(heads, tokens, size, queries, seed):
    Q, K, G = drawn(heads, tokens, size, queries, seed)
    P = sd_mean(Q, K, G)
    np.testing.assert_allclose(P, reference.sd_mean(*exact(Q, K, G)), rtol=0, atol=2e-6)
    torch.testing.assert_close(P.sum(-1), torch.ones(tokens), rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(heads, tokens, sizes, queries, seeds, st.sampled_from([0.0, 0.1, 0.2, 0.9]))
def test_sfsa_is_the_product_of_all_thresholded_maps_in_the_order_asked_for(
    heads, tokens, size, queries, seed, threshold
):
    Q, K, G = drawn(heads, tokens, size, queries, seed)
    order = np.random.default_rng(seed).permutation(heads).tolist()
    wanted = reference.sfsa(*exact(Q, K, G), threshold, order)
    near = min(
        float(np.abs(A / (A.max(0) + 1e-5) - threshold).min())
        for A in (reference.self_attention(q, k) for q, k in zip(*exact(Q, K), strict=True))
    )
    if near > 1e-5:  # else rounding decides what is above
        np.testing.assert_allclose(sfsa(Q, K, G, threshold=threshold, order=order), wanted, rtol=0, atol=5e-6)


def test_sfsa_keeps_a_token_that_no_map_lets_through_at_zero():
    Q = torch.tensor([[[9.0], [9.0], [-9.0]]])
    K = torch.tensor([[[0.0], [0.0], [1.0]]])  # the third token attends to the first two half each, the others to it
    P = sfsa(Q, K, torch.eye(3), threshold=0.6)
    assert P[0].argmax() == P[1].argmax() == 2
    far = sfsa(torch.tensor([[[9.0], [9.0], [0.0]]]), K, torch.eye(3), threshold=1.0)
    assert (far.sum(-1) < 1).all()
    assert torch.equal(far[0], torch.zeros(3))
    assert far.isfinite().all()


@settings(max_examples=40)
@given(heads, tokens, sizes, queries, seeds, st.integers(0, 10), st.sampled_from([0.002, 0.015, 0.2]))
def test_iseg_is_its_equations_and_each_query_keeps_its_peak(heads, tokens, size, queries, seed, products, strength):
    Q, K, G = drawn(heads, tokens, size, queries, seed)
    if queries == 1:
        assert torch.equal(iseg(Q, K, G), torch.zeros_like(G))  # alike everywhere
        return
    wanted = reference.iseg(*exact(Q, K, G), products, strength)
    found = iseg(Q, K, G, products=products, strength=strength)
    if np.isfinite(wanted).all():  # a map that levels a column out has none left to compare
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-3)
        torch.testing.assert_close(found.amax(0), G.amax(0), rtol=0, atol=1e-6)
    assert found.isfinite().all()


def test_iseg_equals_its_equations_to_rounding_where_columns_stay_apart():
    Q, K, G = drawn(3, 30, 6, 4, seed=5)
    torch.testing.assert_close(
        iseg(Q, K, G).double(), torch.from_numpy(reference.iseg(*exact(Q, K, G), 10, 0.015)), rtol=0, atol=2e-5
    )


class LargeTensors(TorchFunctionMode):
    """The most bytes that tensors of at least `count` elements held together, after any call of torch."""

    def __init__(self, count):
        super().__init__()
        self.count, self.seen, self.most = count, [], 0

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.count:
            self.seen.append(weakref.ref(result))
        alive = [tensor for reference in self.seen if (tensor := reference()) is not None]
        held = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in alive)}
        self.most = max(self.most, sum(held.values()))
        return result


@pytest.mark.parametrize("refine", [sd_mean, sfsa, iseg])
def test_no_more_than_three_maps_are_held_at_once_whatever_the_number_of_heads(refine):
    Q, K, G = drawn(8, 32, 4, 3, seed=1)
    with LargeTensors(32 * 32) as large:
        refine(Q, K, G)
    assert 2 * 32 * 32 * 4 <= large.most <= 3 * 32 * 32 * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("refine", [sd_mean, sfsa, iseg])
def test_half_precision_taps_are_worked_on_in_float32(refine, dtype):
    Q, K, G = drawn(3, 20, 4, 3, seed=2)
    Q, K = Q.to(dtype), K.to(dtype)
    P = refine(Q, K, G)
    assert P.dtype == torch.float32
    assert torch.equal(P, refine(Q.float(), K.float(), G))


@pytest.mark.parametrize("name", REFINEMENTS)
def test_what_comes_in_is_left_as_it_was_and_comes_out_the_same_again(segmenter, name):
    Q, K, G = drawn(4, 128, 4, 3, seed=3)
    kept = [x.clone() for x in (Q, K, G)]
    refine = refinement(name, segmenter)
    first = refine(Q, K, G).clone()
    assert torch.equal(first, refine(Q, K, G))
    assert all(torch.equal(x, y) for x, y in zip(kept, (Q, K, G), strict=True))
    assert first.shape == G.shape
    assert first.dtype == torch.float32


@pytest.fixture(scope="module")
def segmenter(whole_pair):
    return Segmenter.from_pretrained(str(whole_pair), device="cpu")


def test_nerve_is_the_segmenters_own_walk_and_none_is_g(segmenter):
    image = np.random.default_rng(0).integers(0, 255, (32, 64, 3), np.uint8)
    G, Q, K = segmenter.frame(image, segmenter.embed(Vocabulary(["mug", "dog"])))
    assert torch.equal(refinement("nerve", segmenter)(Q, K, G), segmenter.refine(Q, K, G).P)
    assert refinement("none", segmenter)(Q, K, G) is G


def test_sfsa_chains_the_later_layers_heads_first():
    taps = SimpleNamespace(settings=SimpleNamespace(diffusion=SimpleNamespace(taps=((3, 0), (3, 1)))))
    Q, K, G = drawn(4, 12, 3, 2, seed=4)
    P = refinement("sfsa", taps)(Q, K, G)
    assert torch.equal(P, sfsa(Q, K, G, order=[2, 3, 0, 1]))
    assert not torch.allclose(P, sfsa(Q, K, G))


def test_an_unknown_refinement_is_refused_with_the_names_there_are(segmenter):
    with pytest.raises(ValueError, match="'crf' is unknown; choose one of nerve, none, iseg, sd_mean, sfsa"):
        refinement("crf", segmenter)


@pytest.mark.parametrize("refine", [sfsa, iseg])
def test_scores_that_are_no_distributions_are_read_by_their_greatest(refine):
    """Labels are those of a plain comparison; what is called confidence is the winner's score, cut to 0..1."""
    Q, K, G = drawn(4, 36, 4, 4, seed=6)
    P = refine(Q, K, G)
    assert (P.sum(-1) - 1).abs().max() > 5e-6
    classes = torch.tensor([1, 2, 3, 0])
    read = read_out(G, P, classes, 3, (4, 9), (4, 9), ReadoutConfig())
    assert torch.equal(read.labels.flatten().long(), classes[P.argmax(-1)])
    torch.testing.assert_close(read.confidence.flatten().float(), P.amax(-1) * 255, rtol=0, atol=0.51)
    doubled = read_out(G, 3 * P, classes, 3, (4, 9), (4, 9), ReadoutConfig())
    assert torch.equal(doubled.labels, read.labels)
    assert doubled.confidence.max() == 255
