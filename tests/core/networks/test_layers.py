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
    """In float32 to rounding; in bfloat16 within 1 % for scores of spread 1, and 4 % for 16."""
    batch, heads, tokens, others, width = size
    q, k = spread * sample(batch, heads, tokens, width, seed=0), spread * sample(batch, heads, others, width, seed=1)
    v = sample(batch, heads, others, width, seed=2)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for scores in (1 << 20, 1000, 3):  # many heads at once, some rows at a time, less than a row
        monkeypatch.setattr(layers, "_SCORES_AT_ONCE", scores)
        torch.testing.assert_close(layers._attend_in_blocks(q, k, v).double(), expected, rtol=1e-4, atol=1e-4)
        if scores > 3:
            ours = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
            assert ours.dtype == torch.bfloat16
            assert (ours - expected).norm() < (0.01 if spread == 1 else 0.04) * expected.norm()


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
