"""Q, K, G -> P by the refinements of other systems, which the walk is compared with, by name.

All of them read the network's own self-attention, softmax(Q K^T / sqrt(D)) of each tapped head, whatever kernel the
pair's walk uses, in float32, one head at a time: at 4096 tokens a map is 67 MB, and no more than three exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..segmenter import Segmenter

Refine = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Q, K [heads, N, D] of any float dtype, G float32 [N, queries], rows are distributions -> P float32 [N, queries]."""

ISEG_PRODUCTS = 10
ISEG_STRENGTH = 0.015
SFSA_THRESHOLD = 0.2
_TINY = torch.finfo(torch.float32).tiny


def self_attention(Q: Tensor, K: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) of one head, Q, K [N, D] -> float32 [N, N]."""
    return torch.softmax((Q.float() / math.sqrt(Q.shape[-1])) @ K.float().mT, -1)


def _mean_attention(Q: Tensor, K: Tensor) -> Tensor:
    """The mean map of all heads, [N, N]."""
    mean = self_attention(Q[0], K[0])
    for q, k in zip(Q[1:], K[1:], strict=True):
        mean += self_attention(q, k)
    return mean.div_(len(Q))


@torch.inference_mode()
def sd_mean(Q: Tensor, K: Tensor, G: Tensor) -> Tensor:
    """P = mean_h(A_h) G: one product with the mean of all heads' self-attention. Rows of P are distributions."""
    return _mean_attention(Q, K) @ G


@torch.inference_mode()
def sfsa(
    Q: Tensor, K: Tensor, G: Tensor, *, threshold: float = SFSA_THRESHOLD, order: Sequence[int] | None = None
) -> Tensor:
    """P = M_1 (M_2 (... (M_H G))): the heads' thresholded maps as a chain (CLIPer, arXiv 2411.13836).

    M_h is A_h over its columns' maxima, 0 below `threshold`, over its rows' sums; to each maximum and sum the authors'
    code adds 1e-5. The chain is multiplied from its right end: 2 N^2 (queries) a head instead of 2 N^3. order: heads
    from left to right; theirs is the later layer's heads first. Rows of P sum to a little less than one, and to zero
    where a token is above the threshold of no other: no distributions.
    """
    P = G
    for head in reversed(range(len(Q)) if order is None else order):
        A = self_attention(Q[head], K[head])
        A /= A.amax(0).add_(1e-5)
        A.masked_fill_(A.lt(threshold), 0)
        mass = A.sum(-1, keepdim=True)
        P = (A @ P).div_(mass.add_(1e-5))
    return P


@torch.inference_mode()
def iseg(Q: Tensor, K: Tensor, G: Tensor, *, products: int = ISEG_PRODUCTS, strength: float = ISEG_STRENGTH) -> Tensor:
    """Products with one self-attention map of less entropy (iSeg, arXiv 2409.03209).

    A, the heads' mean, over its columns' maxima, takes one step against its entropy, a + strength log10(e a), is cut at
    0, and its rows are normalised. Before the products and after each of them, the least of a column of P is taken from
    all of it and the column is divided by its sum.

    After that each column ranks tokens, and columns cannot be compared. iSeg is given the classes that the image shows;
    here each column is stretched from 0 to its greatest value in G, so that queries can be compared again (ours). Rows
    of P are no distributions; a query that G has alike everywhere is 0.
    """
    A = _mean_attention(Q, K)
    A /= A.amax(0).clamp_min_(_TINY)
    A.add_(A.log().add_(1), alpha=strength / math.log(10)).clamp_(min=0)  # log10(e a) = (1 + ln a) / ln 10; of 0: -inf
    A /= A.sum(-1, keepdim=True).clamp_min_(_TINY)
    P = _spread(G)
    for _ in range(products):
        P = _spread(A @ P)
    return P * (G.amax(0) / P.amax(0).clamp_min(_TINY))


def _spread(P: Tensor) -> Tensor:
    """Columns less their least value, over their sum."""
    P = P - P.amin(0)
    return P.div_(P.sum(0).clamp_min_(_TINY))


def _later_layers_first(segmenter: Segmenter, heads: int) -> list[int]:
    """Heads as CLIPer chains them: its layers from the last to the first, each layer's heads in their order."""
    layers = torch.arange(heads).view(len(segmenter.settings.diffusion.taps), -1)
    return layers.flip(0).flatten().tolist()


REFINEMENTS: dict[str, Callable[[Segmenter], Refine]] = {
    "nerve": lambda segmenter: lambda Q, K, G: segmenter.refine(Q, K, G).P,
    "none": lambda segmenter: lambda Q, K, G: G,
    "iseg": lambda segmenter: iseg,
    "sd_mean": lambda segmenter: sd_mean,
    "sfsa": lambda segmenter: lambda Q, K, G: sfsa(Q, K, G, order=_later_layers_first(segmenter, len(Q))),
}
"""How P is made of Q, K and G, by name, for what a segmenter's `frame` returns. `nerve` is the segmenter's own walk,
`none` is G as it is. Rows are distributions of `nerve`, `none` and `sd_mean` alone; see the others for what theirs
are, and `read_out` for what confidence then means."""


def refinement(name: str, segmenter: Segmenter) -> Refine:
    """The refinement of that name, one of `REFINEMENTS`. Raises ValueError for an unknown name."""
    if name not in REFINEMENTS:
        raise ValueError(f"refinement {name!r} is unknown; choose one of {', '.join(REFINEMENTS)}")
    return REFINEMENTS[name](segmenter)
