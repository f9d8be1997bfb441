"""P -> labels, confidence, presence: what each pixel is called, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

UNLABELLED = 255
_BAND_VALUES = 2**25  # of resized probabilities held at once


@dataclass(frozen=True)
class ReadoutConfig:
    """When a pixel is background.

    readout: "argmax", or "presence_minmax" (each class's map stretched to 0..1 and scaled by its presence, as CLIPer
    reads its maps). threshold: least probability of a label, 0..1. presence_threshold: least presence of a class in
    the image,
    0..1. Raises ValueError.
    """

    readout: str = "argmax"
    threshold: float = 0.0
    presence_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.readout not in ("argmax", "presence_minmax"):
            raise ValueError(f"readout {self.readout!r} is unknown; choose argmax or presence_minmax")
        for name in ("threshold", "presence_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0..1")


@dataclass(frozen=True)
class Readout:
    """labels: uint8 [H, W], 0 is background. confidence: uint8 [H, W], the winner's probability in 255ths.

    presence, peak: float32 [names], 0..1.
    """

    labels: Tensor
    confidence: Tensor
    presence: Tensor
    peak: Tensor


def presence(before: Tensor, after: Tensor) -> Tensor:
    """How sure it is that each query is in the image at all: mean of its maximum before and after the walk,
    [queries]."""
    return (before.amax(0) + after.amax(0)) / 2


@torch.inference_mode()
def read_out(
    G: Tensor,
    P: Tensor,
    classes: Tensor,
    names: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    config: ReadoutConfig,
) -> Readout:
    """Name every pixel of an image of `size` (rows, columns).

    G, P: float32 [N, queries], before and after the walk, N tokens of `grid`. classes: int64 [queries], the label of
    each query, 0 for negatives. The queries of a class are merged by their maximum at each pixel, after resizing P
    bilinearly. A pixel is background where a negative wins, where the winner is under `threshold`, or its class
    under `presence_threshold`.
    """
    device = P.device
    found = presence(G, P)
    of_class = torch.zeros(names + 1, device=device).scatter_reduce(0, classes, found, "amax")
    peak = torch.zeros(names + 1, device=device).scatter_reduce(0, classes, P.amax(0), "amax")
    if config.readout == "presence_minmax":
        low, high = P.amin(0), P.amax(0)
        P = (P - low) / (high - low).clamp_min(1e-12) * found
    table = torch.where(of_class < config.presence_threshold, 0, torch.arange(names + 1, device=device))
    label_of = table[classes].to(torch.uint8)
    labels = torch.empty(size, dtype=torch.uint8, device=device)
    confidence = torch.empty(size, dtype=torch.uint8, device=device)
    for rows, scores in _resized(P.T.unflatten(-1, grid), size):
        best, winner = scores.max(0)
        named = label_of[winner]
        labels[rows] = torch.where(best < config.threshold, 0, named) if config.threshold > 0 else named
        confidence[rows] = (best * 255 + 0.5).clamp_(0, 255).to(torch.uint8)
    return Readout(labels, confidence, of_class[1:], peak[1:])


def _resized(maps: Tensor, size: tuple[int, int]):
    """Bands of `maps` [queries, h, w] resized bilinearly to `size`, so that many names on a large image fit in memory.

    Yields (slice of rows, float32 [queries, band, W]). Equal to resizing the whole at once.
    """
    rows, columns = size
    source = maps.shape[1]
    band = max(1, min(rows, _BAND_VALUES // (maps.shape[0] * columns)))
    if band == rows:
        yield slice(0, rows), F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
        return
    wide = F.interpolate(maps[None], (source, columns), mode="bilinear", align_corners=False)[0]
    centres = ((torch.arange(rows, device=maps.device, dtype=torch.float64) + 0.5) * source / rows - 0.5).clamp(
        0, source - 1
    )
    above = centres.floor().long()
    below = (above + 1).clamp_max(source - 1)
    part = (centres - above).to(maps.dtype)[None, :, None]
    for start in range(0, rows, band):
        rows_here = slice(start, min(start + band, rows))
        yield rows_here, torch.lerp(wide[:, above[rows_here]], wide[:, below[rows_here]], part[:, rows_here])
