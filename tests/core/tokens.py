"""Queries, keys and node-to-label probabilities for the tests of the maths, friendly and hostile.

Every value fits float16, so that all dtypes hold the same numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

KINDS = (
    "random",
    "positive",
    "zero rows",
    "all zero",
    "opposite",
    "identical",
    "huge",
    "tiny",
    "axes",
    "mixed",
)
POSITIVE_KERNELS = ("exp", "softmax", "relu", "relu_centred", "shifted")
STOCHASTIC_KERNELS = (*POSITIVE_KERNELS, "favor")
GRIDS = ((1, 1), (1, 2), (1, 7), (7, 1), (2, 2), (2, 3), (3, 2), (3, 5), (5, 4))
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def queries_and_keys(kind: str, heads: int, tokens: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Q, K: float64 [H, N, D] of one of `KINDS`."""
    rng = np.random.default_rng(seed)
    Q, K = rng.normal(size=(2, heads, tokens, size))
    if kind == "positive":
        Q, K = np.abs(Q) + 0.3, np.abs(K) + 0.3
    elif kind == "zero rows":
        Q[:, ::2], K[:, ::3] = 0, 0
    elif kind == "all zero":
        Q, K = 0 * Q, 0 * K
    elif kind == "opposite":
        Q = np.broadcast_to(Q[:, :1], Q.shape)
        K = -Q
    elif kind == "identical":
        Q = np.broadcast_to(Q[:, :1], Q.shape)
        K = Q
    elif kind == "huge":
        Q, K = np.clip(Q * 20000, -6e4, 6e4), np.clip(K * 20000, -6e4, 6e4)
    elif kind == "tiny":
        Q, K = Q * 1e-6, K * 1e-6
    elif kind == "axes":
        Q, K = (np.eye(size)[rng.integers(size, size=(heads, tokens))] for _ in range(2))
        K = -K
    elif kind == "mixed":
        Q, K = (np.clip(x * 10 ** rng.uniform(-4, 4, (heads, tokens, 1)), -6e4, 6e4) for x in (Q, K))
    return Q.astype(np.float16).astype(np.float64), K.astype(np.float16).astype(np.float64)


def label_probabilities(tokens: int, classes: int, seed: int = 0) -> np.ndarray:
    """G: float64 [N, C], rows are distributions, some entries exactly 0."""
    rng = np.random.default_rng(seed + 1)
    G = rng.gamma(0.5, size=(tokens, classes)) + 1e-3
    if classes > 1:
        G[:, 0] *= rng.random(tokens) > 0.3
    return G / G.sum(1, keepdims=True)


def scenes(kinds: tuple[str, ...] = KINDS, grids: tuple[tuple[int, int], ...] = GRIDS) -> st.SearchStrategy:
    """(Q, K, G, grid) as float64 arrays: any kind, 1-3 heads, any grid, 1-4 classes."""

    def build(kind: str, heads: int, grid: tuple[int, int], size: int, classes: int, seed: int) -> tuple:
        tokens = grid[0] * grid[1]
        Q, K = queries_and_keys(kind, heads, tokens, size, seed)
        return Q, K, label_probabilities(tokens, classes, seed), grid

    return st.builds(
        build,
        st.sampled_from(kinds),
        st.integers(1, 3),
        st.sampled_from(grids),
        st.integers(1, 5),
        st.integers(1, 4),
        st.integers(0, 2**16),
    )


def tensors(*arrays: np.ndarray, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[torch.Tensor]:
    """The arrays as tensors."""
    return [torch.from_numpy(np.array(array)).to(device, dtype) for array in arrays]


def image_like(
    heads: int, grid: tuple[int, int], size: int, classes: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K float16 [H, N, D] and G float32 [N, C] of an image of a dozen regions; later heads are noisier."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    places = torch.stack((rows, columns), -1).reshape(-1, 1, 2)
    centres = torch.rand(12, 2, generator=draw) * torch.tensor(grid)
    region = (places - centres).square().sum(-1).argmin(-1)  # [N]
    features = torch.randn(heads, 12, size, generator=draw)[:, region]
    noise = torch.linspace(0.2, 1.5, heads)[:, None, None]
    Q, K = (1.5 * (features + noise * torch.randn(features.shape, generator=draw)) for _ in range(2))
    logits = 2 * torch.randn(len(region), classes, generator=draw)
    logits[torch.arange(len(region)), torch.randint(classes, (12,), generator=draw)[region]] += 3
    return Q.half(), K.half(), logits.softmax(-1)
