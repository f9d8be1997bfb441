"""P on tokens -> maps that keep to the image's outlines: the local transition (Eq. 9) between pixels of like colour.

P lies on a coarse grid, and bilinear upsampling alone would draw every outline. Here the maps of the labels that can
win are put on pixels of a bounded working size and averaged a few times over neighbours at several distances, those of
like colour most. S between pixels depends on the image alone: it is made beside the networks and serves every
vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ._grid import CENTRE, OFFSETS

SELF = 0.1
"""Affinity of a pixel with itself, as eps_self is on tokens: what is like none of its neighbours keeps its value."""
CLOSING_STEPS, CLOSING_SIGMA = 2, 2.0
"""The last steps, between next neighbours: how many, and their sigma over `edge_sigma`."""
PAMR_STEPS, PAMR_DISTANCES, PAMR_SIZE = 10, (8, 16), 640
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
"""Linear sRGB to CIE XYZ, a row each."""
_AROUND = tuple(offset for place, offset in enumerate(OFFSETS) if place != CENTRE)


@dataclass(frozen=True)
class EdgesConfig:
    """How labels are carried along the image's own pixels, between the walk and the readout.

    edges: one of `EDGES`. "none": P is upsampled bilinearly. "pixels": the settings below. "pamr": pixel-adaptive mask
    refinement as published (`pamr`), by settings of its own. edge_steps: products with S, >= 0; 0
    is upsampling alone. edge_distances: of the
    8 neighbours each, >= 1, in pixels where the working size has its longer side at edge_size; where it is smaller
    they are smaller in proportion, never below 1. edge_sigma: colour difference (CIELAB, L in 0..100) at which
    an affinity has fallen to 0.61; smaller is sharper, at least 0.1. edge_size: longer side of the working size in
    pixels, >= 1; a smaller image is worked on at its own size. Raises ValueError.
    """

    edges: str = "pixels"
    edge_steps: int = 8
    edge_distances: tuple[int, ...] = (4, 16)
    edge_sigma: float = 4.0
    edge_size: int = 320

    def __post_init__(self) -> None:
        if self.edges not in EDGES:
            raise ValueError(f"edges {self.edges!r} is unknown; choose one of {', '.join(EDGES)}")
        if not _whole(self.edge_steps) or self.edge_steps < 0:
            raise ValueError(f"edge_steps is {self.edge_steps!r}; it must be a whole number >= 0 (8 is usual)")
        distances = self.edge_distances
        if not distances or not all(_whole(distance) and distance >= 1 for distance in distances):
            raise ValueError(
                f"edge_distances is {list(distances)}; it must be one or more whole numbers >= 1, as in [4, 16]"
            )
        if not (math.isfinite(self.edge_sigma) and self.edge_sigma >= 0.1):
            raise ValueError(f"edge_sigma is {self.edge_sigma}; it must be finite and at least 0.1 (4 is usual)")
        if not _whole(self.edge_size) or self.edge_size < 1:
            raise ValueError(f"edge_size is {self.edge_size!r}; it must be a whole number >= 1 (320 is usual)")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Stencil:
    """A sparse S between N pixels, row by row, and how often it is applied.

    neighbours: int32 [N, n], the columns in which a row of S is not 0. weights: float32 or float64 [N, n], >= 0, its
    values there; they sum to 1. steps: products.
    """

    neighbours: Tensor
    weights: Tensor
    steps: int

    def apply(self, X: Tensor) -> Tensor:
        """X [N, C] of the weights' dtype, contiguous -> S X [N, C]."""
        return F.embedding_bag(self.neighbours, X, per_sample_weights=self.weights, mode="sum")


@dataclass(frozen=True)
class PixelTransition:
    """Where P is carried to along one image's own pixels.

    size: (rows, columns) of the working size. stencils: applied one after the other.
    """

    size: tuple[int, int]
    stencils: tuple[Stencil, ...]

    def copied(self) -> PixelTransition:
        """The same in memory of its own."""
        stencils = (Stencil(one.neighbours.clone(), one.weights.clone(), one.steps) for one in self.stencils)
        return PixelTransition(self.size, tuple(stencils))

    def carry(self, maps: Tensor) -> Tensor:
        """Float32 maps [C, h, w] on any grid -> [C, rows, columns] of the working size: upsampled, then carried.

        What enters as distributions over C leaves as distributions; each map depends on itself alone.
        """
        maps = maps[None].contiguous(memory_format=torch.channels_last)
        maps = F.interpolate(maps, self.size, mode="bilinear", align_corners=False)[0]
        X = maps.permute(1, 2, 0).flatten(0, 1).contiguous()
        for stencil in self.stencils:
            for _ in range(stencil.steps):
                X = stencil.apply(X)
        return X.T.contiguous().unflatten(1, self.size)


def working_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(rows, columns) of an image with its longer side brought down to `longest`, aspect kept; smaller ones stay."""
    shrink = min(1.0, longest / max(size))
    return max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))


def _neighbours(size: tuple[int, int], offsets: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int32 [N, offsets]: the pixel at each offset (rows down, columns right), outside the image the nearest inside."""
    if device.type == "cpu":
        return _cpu_neighbours(size, offsets)
    return _places(size, offsets, device)  # what is made while a graph is captured must not be kept for others


@functools.lru_cache(maxsize=8)
def _cpu_neighbours(size: tuple[int, int], offsets: tuple[tuple[int, int], ...]) -> Tensor:
    return _places(size, offsets, torch.device("cpu"))


def _places(size: tuple[int, int], offsets: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    rows, columns = torch.arange(size[0], device=device), torch.arange(size[1], device=device)
    places = [
        (rows + down).clamp(0, size[0] - 1)[:, None] * size[1] + (columns + right).clamp(0, size[1] - 1)
        for down, right in offsets
    ]
    return torch.stack(places, -1).flatten(0, 1).int()


def _offsets(distances: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The 8 neighbours at each distance."""
    return tuple((distance * down, distance * right) for distance in distances for down, right in _AROUND)


def lab(pixels: Tensor) -> Tensor:
    """sRGB in 0..1 [3, ...] -> CIELAB under D65 [3, ...], L in 0..100 (IEC 61966-2-1, CIE 15)."""
    linear = torch.where(pixels > 0.04045, ((pixels + 0.055) / 1.055).pow(2.4), pixels / 12.92)
    red, green, blue = linear.unbind(
        0
    )  # numbers and no tensor of them: a graph that is captured copies none from the host
    white = [sum(row) for row in _XYZ]
    xyz = torch.stack(
        [red * (r / w) + green * (g / w) + blue * (b / w) for (r, g, b), w in zip(_XYZ, white, strict=True)]
    )
    f = torch.where(xyz > 216 / 24389, xyz.pow(1 / 3), xyz * (24389 / 3132) + 4 / 29)
    return torch.stack((116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])))


def _by_colour(pixels: Tensor, config: EdgesConfig) -> PixelTransition:
    """Steps at the distances that are set, then `CLOSING_STEPS` between next neighbours: those that lie 4 or 16 pixels
    apart never meet the ones between them, and specks would be left."""
    size = working_size((pixels.shape[2], pixels.shape[3]), config.edge_size)
    colours = lab(_shrunk(pixels, size)) / (math.sqrt(2) * config.edge_sigma)  # [3, rows, columns]
    scale = max(size) / config.edge_size
    distances = sorted({max(1, round(scale * distance)) for distance in config.edge_distances})
    far = _stencil(colours, distances, config.edge_steps)
    near = _stencil(colours / CLOSING_SIGMA, (1,), CLOSING_STEPS if config.edge_steps else 0)
    return PixelTransition(size, (far, near))


def _stencil(colours: Tensor, distances: Sequence[int], steps: int) -> Stencil:
    """exp(-|x_i - x_j|^2) of colours x [3, rows, columns] at some distances, `SELF` on the diagonal, rows normalised.

    Neighbours outside the image are dropped. Affinities are symmetric: each pair is compared once.
    """
    size = (colours.shape[1], colours.shape[2])
    offsets = (*_offsets(distances), (0, 0))
    affinity = colours.new_zeros((len(offsets), *size))
    affinity[-1] = SELF
    for place, (down, right) in enumerate(offsets):
        if (down, right) <= (0, 0) or down >= size[0] or abs(right) >= size[1]:
            continue
        here, there = _overlap(size, down, right)
        unlike = (colours[(..., *here)] - colours[(..., *there)]).square_().sum(0)
        affinity[(place, *here)] = unlike.neg_().exp_()
        affinity[(offsets.index((-down, -right)), *there)] = unlike
    affinity /= affinity.sum(0)
    return Stencil(_neighbours(size, offsets, colours.device), affinity.flatten(1).T.contiguous(), steps)


def _overlap(size: tuple[int, int], down: int, right: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The pixels that have one at an offset (down >= 0) inside the image, and those which are there."""
    rows, columns = size
    left, end = max(0, -right), columns - max(0, right)
    here = slice(0, rows - down), slice(left, end)
    return here, (slice(down, rows), slice(left + right, end + right))


def _shrunk(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, 3, H, W] -> [3, *size], each pixel the mean of what it covers."""
    return (pixels if pixels.shape[2:] == size else F.interpolate(pixels, size, mode="area"))[0]


def pamr_transition(
    pixels: Tensor, *, steps: int = PAMR_STEPS, distances: Sequence[int] = PAMR_DISTANCES, longest: int = PAMR_SIZE
) -> PixelTransition:
    """S of pixel-adaptive mask refinement for pixels float [1, 3, H, W] in any scale; see `pamr`."""
    size = working_size((pixels.shape[2], pixels.shape[3]), longest)
    if pixels.shape[2:] != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    offsets, far = _offsets(distances), max(distances)
    image, padded = pixels[0], F.pad(pixels, [far] * 4, mode="replicate")[0]
    around = [
        padded[:, far + down : far + down + size[0], far + right : far + right + size[1]] for down, right in offsets
    ]
    deviation = torch.stack([*around, *[image] * len(distances)]).std(0)  # [3, rows, columns]
    unlike = torch.stack([((x - image).abs() / (1e-8 + 0.1 * deviation)).mean(0) for x in around])
    weights = unlike.neg_().softmax(0).flatten(1).T.contiguous()
    return PixelTransition(size, (Stencil(_neighbours(size, offsets, pixels.device), weights, steps),))


@torch.inference_mode()
def pamr(
    image: Tensor,
    scores: Tensor,
    *,
    steps: int = PAMR_STEPS,
    dilations: Sequence[int] = PAMR_DISTANCES,
    longest: int = PAMR_SIZE,
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
    return pamr_transition(image, steps=steps, distances=dilations, longest=longest).carry(scores)


EDGES: dict[str, Callable[[Tensor, EdgesConfig], PixelTransition | None]] = {
    "none": lambda pixels, config: None,
    "pixels": _by_colour,
    "pamr": lambda pixels, config: pamr_transition(pixels),
}
"""S between an image's pixels, by name."""


def pixel_transition(pixels: Tensor, config: EdgesConfig) -> PixelTransition | None:
    """S between the pixels of an image, float [1, 3, H, W], RGB in 0..1; None where `edges` is "none"."""
    return EDGES[config.edges](pixels, config)
