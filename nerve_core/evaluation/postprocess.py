"""Post-processing by name: scores -> scores that keep to the image's edges, between refinement and readout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

POST = ("none", "pamr")
"""Post-processing, by name."""
_AROUND = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0))


@torch.inference_mode()
def pamr(
    image: Tensor, scores: Tensor, *, steps: int = 10, dilations: Sequence[int] = (8, 16), longest: int = 640
) -> Tensor:
    """Pixel-adaptive mask refinement: each pixel becomes an average of its neighbours, of like colours most (Araslanov
    and Roth, arXiv 2005.08104).

    image: float32 [1, 3, H, W], RGB, any scale. scores: float32 [C, h, w] of any size. Returns float32 [C, h', w'],
    the image's size, or where its longer side is above `longest`, that with its aspect kept.

    The 8 neighbours at each of `dilations` pixels' distance weigh softmax(-mean_c(|x_c - y_c| / (0.1 s_c + 1e-8))), s_c
    the deviation of colour c over those neighbours and the pixel (counted at each distance); outside the image the
    nearest pixel stands in. What enters as distributions over C stays that. The paper divides by s^2 instead of 0.1 s;
    this is what its authors' code does. Raises ValueError.
    """
    if image.ndim != 4 or image.shape[:2] != (1, 3):
        raise ValueError(f"image must be [1, 3, rows, columns]; got {list(image.shape)}")
    if scores.ndim != 3 or 0 in scores.shape:
        raise ValueError(f"scores must be [queries, rows, columns], none of them 0; got {list(scores.shape)}")
    if steps < 0 or longest < 1 or not dilations or min(dilations) < 1:
        got = f"steps is {steps}, longest is {longest}, dilations are {list(dilations)}"
        raise ValueError(f"{got}; steps must be >= 0, longest >= 1, and dilations one distance in pixels >= 1 or more")
    height, width = image.shape[-2:]
    shrink = min(1.0, longest / max(height, width))
    size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    if shrink < 1:
        image = F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
    scores = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
    weights = _weights(image[0], dilations)
    for _ in range(steps):
        averaged = torch.zeros_like(scores)
        for weight, neighbour in zip(weights, _neighbours(scores, dilations), strict=True):
            averaged.addcmul_(neighbour, weight)
        scores = averaged
    return scores


def _weights(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """The share of each neighbour in each pixel of [3, H, W]: [neighbours, H, W], summing to 1 over the first."""
    neighbours = _neighbours(image, dilations)
    deviation = torch.stack([*neighbours, *[image] * len(dilations)]).std(0)  # [3, H, W]
    unlike = [((x - image).abs() / (1e-8 + 0.1 * deviation)).mean(0) for x in neighbours]
    return torch.stack(unlike).neg().softmax(0)


def _neighbours(x: Tensor, dilations: Sequence[int]) -> list[Tensor]:
    """Eight views of [C, H, W] for each distance, each shifted to one of the neighbours."""
    height, width = x.shape[-2:]
    far = max(dilations)
    padded = F.pad(x[None], [far] * 4, mode="replicate")[0]
    corners = [(far + distance * down, far + distance * right) for distance in dilations for down, right in _AROUND]
    return [padded[:, top : top + height, left : left + width] for top, left in corners]
