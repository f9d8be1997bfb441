"""Attention, convolutions and linear layers of the networks, each in the fastest exact form that the device has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Network = TypeVar("Network", bound=nn.Module)
_SCORES_AT_ONCE = 1 << 19
"""Attention scores of a block, 2 MB in float32: they stay in a core's cache between the two products."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: q [B, heads, T, D], k and v [B, heads, S, D] -> [B, heads, T, D].

    PyTorch's own kernel, except for bfloat16 on the CPU, where that one does not use the processor's bfloat16 products:
    it took two to four times as long as plain products over blocks of rows with scores in bfloat16, of which there are
    now two in place of one for the scores.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _attend_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` with at most `_SCORES_AT_ONCE` scores at a time, or one row where it is longer than that."""
    Q, K, V = (x.flatten(0, 1) for x in (q, k, v))
    (maps, tokens, _), others = Q.shape, K.shape[1]
    rows = min(tokens, max(1, _SCORES_AT_ONCE // others))
    heads = min(maps, max(1, _SCORES_AT_ONCE // (rows * others)))
    attended = torch.empty_like(Q)
    weights = Q.new_empty((heads, rows, others), dtype=torch.float32)
    for head in range(0, maps, heads):
        h = slice(head, head + heads)
        for row in range(0, tokens, rows):
            part = Q[h, row : row + rows]
            block = (slice(len(part)), slice(part.shape[1]))
            attention_weights(part, K[h], out=weights[block])
            attended[h, row : row + rows] = weights[block].to(V.dtype) @ V[h]
    return attended.view_as(q)


def attention_weights(q: Tensor, k: Tensor, *, out: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) of q [maps, T, D], k [maps, S, D] -> out [maps, T, S], float32 whatever q is.

    A product of two bfloat16 matrices is rounded to bfloat16, by up to 0.12 where it is above 32, which would change a
    weight by an eighth. What the rounding took away is a second product; their sum is nearly float32's.
    """
    scale = q.shape[-1] ** -0.5
    if q.dtype == out.dtype:
        torch.baddbmm(out, q, k.mT, beta=0, alpha=scale, out=out)
    else:
        rounded = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=scale)
        out.copy_(rounded).add_(torch.baddbmm(rounded, q, k.mT, beta=-1, alpha=scale))
    return torch.softmax(out, -1, out=out)


def pack_weights(network: Network) -> Network:
    """Store the weights of a network that is only run from now on, in place, in the memory layout that its device reads
    fastest: channels last, and on the CPU oneDNN's blocked layout, into which it would else convert at every call. On
    CUDA, group norms become such that leave channels last.

    Convolutions and linear layers are then no parameters any more. What they return is the same to rounding, and to
    the bit in bfloat16.
    """
    parents = [module for module in network.modules() if type(module) not in _PACKED]  # a layer kept here is not freed
    for parent in parents:
        for name, child in list(parent.named_children()):
            if type(child) is nn.GroupNorm and child.affine and child.weight.is_cuda:
                setattr(parent, name, GroupNormLast(child))
            if not isinstance(child, (nn.Conv2d, nn.Linear)):
                continue
            packed = _PACKED.get(type(child))  # not for a subclass, which may compute something else
            if packed is not None and child.weight.device.type == "cpu" and _packs(child.weight.dtype):
                setattr(parent, name, packed(child))
    convert: Callable[..., nn.Module] = network.to  # whose types leave memory_format out
    convert(memory_format=torch.channels_last)
    return network


class GroupNormLast(nn.Module):
    """A group norm of images whose channels lie last in memory, which is how it returns them.

    PyTorch's own does so on the CPU; on CUDA it returns channels first whatever comes in, so that it and the
    convolution after it would each change the layout of the whole image. Here a group's mean and deviation are taken in
    float32 and folded with weight and bias into one factor and one summand a channel.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        """norm: with weight and bias."""
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight = nn.Parameter(norm.weight.detach().float(), requires_grad=False)
        self.bias = nn.Parameter(norm.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, channels, h, w] of a float dtype -> the same shape and dtype, channels last."""
        x = x.contiguous(memory_format=torch.channels_last)
        grouped = x.permute(0, 2, 3, 1).unflatten(-1, (self.groups, -1)).flatten(1, 2)  # [B, h * w, groups, size]
        if x.dtype == torch.float32:
            variance, mean = torch.var_mean(grouped, (1, 3), correction=0)
        else:  # no copy in float32 of the whole: what cancels is less than what a narrow type rounds away
            mean = grouped.mean((1, 3), dtype=torch.float32)
            squares = torch.linalg.vector_norm(grouped, dim=(1, 3), dtype=torch.float32).square()
            variance = (squares / (grouped.shape[1] * grouped.shape[3]) - mean.square()).clamp_min(0)
        factor = (variance + self.eps).rsqrt()[..., None] * self.weight.unflatten(0, (self.groups, -1))
        summand = self.bias - (mean[..., None] * factor).flatten(1)
        image = (..., None, None)
        return torch.addcmul(summand[image], x, factor.flatten(1)[image], out=torch.empty_like(x))


class _PackedConv(nn.Module):
    """A convolution by oneDNN with its weight in oneDNN's blocked layout."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.bias, self._rest = conv.bias, (conv.padding, conv.stride, conv.dilation, conv.groups)
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *self._rest)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self._weight, self.bias, *self._rest, "none", [], "")


class _PackedLinear(nn.Module):
    """A linear layer by oneDNN with its weight in oneDNN's blocked layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")


_PACKED: dict[type[nn.Module], Callable[..., nn.Module]] = {nn.Conv2d: _PackedConv, nn.Linear: _PackedLinear}


@functools.cache
@torch.inference_mode()
def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN can keep weights of this dtype in its blocked layout here.

    The operators are those that torch.compile emits when it freezes a network. They are no documented interface, so
    they are tried once.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    with torch.random.fork_rng(devices=()):
        tried = ((nn.Conv2d(8, 16, 3, padding=1), torch.randn(1, 8, 5, 6)), (nn.Linear(8, 16), torch.randn(2, 5, 8)))
    try:
        for layer, x in tried:
            layer, x = layer.to(dtype), x.to(dtype)
            torch.testing.assert_close(_PACKED[type(layer)](layer)(x), layer(x))
    except (AssertionError, AttributeError, RuntimeError, TypeError):
        return False
    return True
