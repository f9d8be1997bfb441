"""The matrix product x weight^T of affinities, S and the walk, by the fastest exact kernel."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _onednn_linear() -> bool:
    """Whether float32 products go through oneDNN here.

    PyTorch sends them to MKL, which leaves AVX-512 unused on some processors that have it and is then half
    as fast; oneDNN uses it on all of them. The operator is the one that torch.compile emits for a linear
    layer; it is no documented interface, so it is tried once.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    x, weight = torch.eye(3, 5), torch.arange(10.0).reshape(2, 5)
    try:
        product = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(product, F.linear(x, weight))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] weight [N, K]^T -> [M, N], of one dtype and device; float32 stays float32.

    x: contiguous. weight: contiguous, or the transpose of what is: neither is copied.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_linear():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)
