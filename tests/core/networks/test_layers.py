"""Attention in blocks and layers with packed weights return what the library's own layers do."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nerve_core.networks import layers
from nerve_core.networks.layers import attend, pack_weights

SIZES = [(1, 2, 6, 9, 8), (2, 3, 769, 77, 40), (1, 1, 700, 1900, 16), (1, 3, 2, 5, 4)]


def sample(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention_in_blocks_equals_the_library_s(size, spread, monkeypatch):
    """In float32 to rounding; in bfloat16 within 1 % whether scores spread over 1 or over 16."""
    batch, heads, tokens, others, width = size
    q, k = spread * sample(batch, heads, tokens, width, seed=0), spread * sample(batch, heads, others, width, seed=1)
    v = sample(batch, heads, others, width, seed=2)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    narrow = [x.bfloat16() for x in (q, k, v)]
    of_narrow = F.scaled_dot_product_attention(*(x.double() for x in narrow))
    for scores in (1 << 20, 1000, 3):  # many heads at once, some rows at a time, less than a row
        monkeypatch.setattr(layers, "_SCORES_AT_ONCE", scores)
        torch.testing.assert_close(layers._attend_in_blocks(q, k, v).double(), expected, rtol=1e-4, atol=1e-4)
        if scores > 3:
            ours = attend(*narrow)
            assert ours.dtype == torch.bfloat16
            assert (ours - of_narrow).norm() < 0.005 * of_narrow.norm()


def error_of(made, expected):
    return float((made.double() - expected).norm() / expected.norm())


def large_scores(dtype):
    """q, k, v [2, 300, 40] in that dtype, and the attention in float64: each query has some thirty keys of nearly the
    same scores, the greatest, between 37 and 62."""
    of = torch.arange(300) % 10
    centres = F.normalize(sample(2, 10, 40, seed=0), dim=-1) * (49 * 40**0.5) ** 0.5
    q, k = (centres[:, of] * (1 + 0.02 * sample(2, 300, 1, seed=seed)) for seed in (1, 2))
    q, k, v = (x.to(dtype) for x in (q, k, sample(2, 300, 40, seed=3)))
    scores = q.double() @ k.double().mT / 40**0.5
    assert 37 < scores.amax(-1).min() < scores.amax() < 62
    weights = scores.softmax(-1)
    assert weights.square().sum(-1).reciprocal().median() > 5  # keys that share a query's weight
    return q, k, v, weights @ v.double()


def test_attention_in_bfloat16_is_as_exact_as_the_library_s_where_scores_are_large():
    q, k, v, expected = large_scores(torch.bfloat16)
    ours, library = (attention(q[None], k[None], v[None])[0] for attention in (attend, F.scaled_dot_product_attention))
    assert error_of(ours, expected) < 1.5 * error_of(library, expected)
    assert error_of(ours, expected) < 0.004


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float16, 5e-4), (torch.bfloat16, 5e-4)])
def test_weights_are_float32_s_whatever_the_network_runs_in(dtype, most):
    q, k, _, _ = large_scores(dtype)
    weights = layers.attention_weights(q, k, out=torch.empty(2, 300, 300))
    assert error_of(weights, (q.double() @ k.double().mT / 40**0.5).softmax(-1)) < most


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize(("mean", "spread"), [(0, 1), (30, 1), (-3, 40), (5, 0)])
def test_a_group_norm_with_channels_last_is_the_library_s(dtype, most, mean, spread):
    norm = nn.GroupNorm(4, 24).requires_grad_(False)
    norm.weight.copy_(1 + 0.3 * sample(24, seed=1))
    norm.bias.copy_(sample(24, seed=2))
    x = (mean + spread * sample(2, 24, 9, 13, seed=3)).to(dtype)
    expected = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
    ours = layers.GroupNormLast(norm.to(dtype))
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        made = ours(image)
        assert made.dtype == dtype
        assert made.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(made.double(), expected, rtol=most, atol=most)


def test_attention_takes_heads_that_are_interleaved_in_memory():
    q, k, v = (sample(2, 30, 3, 8, seed=seed).transpose(1, 2) for seed in range(3))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        ours = attend(q.to(dtype), k.to(dtype), v.to(dtype)).float()
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=tolerance)


class Network(nn.Module):
    """Every kind of convolution and linear layer that the networks have."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(3, 16, 3, padding=1),
                nn.Conv2d(16, 8, 3, stride=2, padding=1),
                nn.Conv2d(8, 24, 1),
                nn.Conv2d(24, 8, 2, stride=2, bias=False),
            ]
        )
        self.linears = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 5, bias=False))

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return x, self.linears(x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("size", [(12, 20), (33, 9), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_network_with_packed_weights_returns_the_same(dtype, size):
    torch.manual_seed(0)
    plain = Network().to(dtype).eval()
    ours = pack_weights(copy.deepcopy(plain))
    x = sample(2, 3, *size, seed=3).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        for mine, other in zip(ours(image), plain(image), strict=True):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_a_network_with_packed_weights_holds_them_once():
    if not layers._packs(torch.float32):
        pytest.skip("oneDNN keeps no weights in its blocked layout here")
    kept = {name for name, _ in pack_weights(Network()).named_parameters()}
    assert not [name for name in kept if name.endswith("weight") and "linears.0" not in name]


def test_without_the_operators_layers_stay_as_they_are(monkeypatch):
    def gone(*_):
        raise AttributeError("no such operator")

    monkeypatch.setitem(layers._PACKED, nn.Linear, gone)
    layers._packs.cache_clear()
    try:
        assert not layers._packs(torch.float32)
        network = pack_weights(Network())
        assert [type(layer) for layer in network.convs] == [nn.Conv2d] * 4
        assert network.convs[0].weight.is_contiguous(memory_format=torch.channels_last)
    finally:
        layers._packs.cache_clear()


def test_trying_the_operators_leaves_the_random_numbers_alone():
    layers._packs.cache_clear()
    state = torch.get_rng_state()
    layers._packs(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
