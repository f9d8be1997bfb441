"""The baselines of the walk: plain PyTorch, written from the papers' equations, in float32 as one would first write it.

Nothing is made slow on purpose: torch.matmul, torch.softmax, all threads, memory given back as soon as it is of no more
use. Q, K: [H, N, D]. G: [N, C], rows are distributions. Every function returns [N, C].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS_SELF = 0.1
ISEG_HEADS = 2
ISEG_PRODUCTS = 10
ISEG_STRENGTH = 0.01
CHAIN_THRESHOLD = 0.1


def softmax_maps(Q: Tensor, K: Tensor) -> Tensor:
    """Every head's self-attention map, [H, N, N]."""
    return torch.softmax((Q / math.sqrt(Q.shape[-1])) @ K.mT, -1)


def iseg(Q: Tensor, K: Tensor, G: Tensor) -> Tensor:
    """iSeg (arXiv 2409.03209): products with one entropy-reduced map, the mean of two heads'.

    The map is divided by its columns' maxima, takes one step down the gradient of its entropy, a + s (ln a + 1), is cut
    at 0 and its rows normalised. After each of ten products the least of a class is subtracted from all of it and the
    class is normalised over the image.
    """
    A = softmax_maps(Q[:ISEG_HEADS], K[:ISEG_HEADS]).mean(0)  # [N, N]
    A /= A.amax(0)
    A = (A + ISEG_STRENGTH * (A.log() + 1)).clamp_(min=0)
    A /= A.sum(-1, keepdim=True)
    P = G
    for _ in range(ISEG_PRODUCTS):
        P = A @ P
        P = P - P.amin(0)
        P = P / P.sum(0)
    return P


def thresholded_maps(Q: Tensor, K: Tensor) -> Tensor:
    """CLIPer's maps [H, N, N]: divided by their columns' maxima, 0 below a tenth, rows normalised."""
    A = softmax_maps(Q, K)
    A /= A.amax(-2, keepdim=True)
    A.masked_fill_(A < CHAIN_THRESHOLD, 0)
    A /= A.sum(-1, keepdim=True)
    return A


def chain(Q: Tensor, K: Tensor, G: Tensor) -> Tensor:
    """CLIPer (arXiv 2411.13836): the heads' thresholded maps multiplied from left to right, then applied to G."""
    product, *rest = thresholded_maps(Q, K)
    for A in rest:
        product = product @ A
    return product @ G


def neighbours(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The 8 neighbours of each token, int64 [N, 8], and which of them are on the grid, bool [N, 8]."""
    rows, columns = grid
    steps = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
    down, right = torch.tensor(steps, device=device).t()
    token = torch.arange(rows * columns, device=device)[:, None]
    row, column = token // columns + down, token % columns + right
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return torch.where(inside, row * columns + column, token), inside


def dense(
    Q: Tensor,
    K: Tensor,
    G: Tensor,
    grid: tuple[int, int],
    alpha: float,
    beta: float,
    c: float,
    steps: int,
    *,
    fuse_heads: bool = False,
) -> Tensor:
    """NERVE (arXiv 2511.08248) with one dense transition per head, [H, N, N], and the paper's truncated walk (Eq. 16).

    fuse_heads: add the heads' transitions up to one [N, N] before the walk, as Eq. 22 allows; else each step applies
    all of them.
    """
    S = softmax_maps(Q, K)
    P1 = S @ G  # [H, N, C]
    entropies = torch.special.entr(P1).sum(-1).mean(-1)
    weights = torch.softmax(-c * entropies, -1)  # [H]
    near, inside = neighbours(grid, Q.device)
    logits = torch.einsum("hnd,hnkd->hnk", Q / math.sqrt(Q.shape[-1]), K[:, near])
    local = logits.masked_fill(~inside, -math.inf).softmax(-1)
    own = torch.full_like(local[..., :1], EPS_SELF)
    local = torch.cat((local, own), -1) / (1 + EPS_SELF)
    token = torch.arange(len(near), device=Q.device)[:, None]
    S *= beta
    S.scatter_add_(2, torch.cat((near, token), 1).expand_as(local), (1 - beta) * local)
    if fuse_heads:
        S, weights = torch.einsum("h,hnm->nm", weights, S)[None], torch.ones_like(weights[:1])
    restart = (1 - alpha) * G
    P = restart
    for _ in range(steps):
        P = restart + alpha * torch.einsum("h,hnc->nc", weights, S @ P)
    return P / P.sum(-1, keepdim=True)
