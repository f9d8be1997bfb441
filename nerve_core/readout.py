"""Reads the walk's probabilities P out at the image's size: labels, confidence, and what was found of each name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .walk.edges import PixelTransition

READOUTS = ("argmax", "presence_minmax", "presence_max", "minmax")
"""Names of what is compared at a pixel: see `ReadoutConfig`."""
_CLIPER_READOUTS = ("presence_max", "minmax")
_CPU_BAND_VALUES = 2**19  # of resized probabilities held at once: within the cache
_CUDA_BAND_VALUES = 2**25


@dataclass(frozen=True)
class ReadoutConfig:
    """When a pixel is background.

    readout: what is compared, one of `READOUTS`. "argmax": the probabilities. "presence_minmax": each query's map
    stretched to 0..1, times its presence. "presence_max": each map over its maximum, times its presence; "minmax": each
    map stretched to 0..1; in these two neither negatives nor classes under presence_threshold compete, and background
    is what is under threshold, which must then be above 0. CLIPer's code reads its maps in these ways: "minmax" for the
    21 classes of VOC, "presence_max" elsewhere. threshold: least value of a label, on the scale that is compared, 0..1.
    presence_threshold: least presence of a class in the image, 0..1. Raises ValueError.
    """

    readout: str = "argmax"
    threshold: float = 0.0
    presence_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.readout not in READOUTS:
            raise ValueError(f"readout {self.readout!r} is unknown; choose one of {', '.join(READOUTS)}")
        for name in ("threshold", "presence_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0..1")
        if self.readout in _CLIPER_READOUTS and self.threshold == 0:
            raise ValueError(f"readout {self.readout!r} knows background by threshold alone; set one above 0")


@dataclass(frozen=True)
class Readout:
    """What was read, all on one device.

    labels: uint8 [H, W], 0 is background. confidence: uint8 [H, W], the winner's probability in 255ths.
    presence, peak: float32 [names], 0..1. by_row: int32 [names + 1, H] and by_column: int32 [names + 1, W], pixels of
    each label (0 first) in each row and column. certainty: int64 [names + 1], the sum of a label's confidence. maps:
    uint8 [maps, H, W], the probability of each requested class at every pixel, in 255ths.
    """

    labels: Tensor
    confidence: Tensor
    presence: Tensor
    peak: Tensor
    by_row: Tensor
    by_column: Tensor
    certainty: Tensor
    maps: Tensor

    def to_host(self) -> Readout:
        """The same in host memory, after one wait for the device."""
        if not self.labels.is_cuda:
            return self
        on_device = [getattr(self, part.name) for part in fields(self)]
        on_host = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in on_device]
        for copy, x in zip(on_host, on_device, strict=True):
            copy.copy_(x, non_blocking=True)
        torch.cuda.current_stream(self.labels.device).synchronize()
        return Readout(*on_host)


@dataclass(frozen=True)
class LabelMaps:
    """What competes for the pixels after the edges, on the working size; a label's queries are merged by their maximum.

    maps: float32 [k, rows, columns] of the labels that win at a token or more; on CUDA of all, -1 throughout for those
    that win at none. labels: int64 [k], ascending, 0 the background. asked: float32 [., rows, columns], the maps of
    classes that were asked for, which need not compete.
    """

    maps: Tensor
    labels: Tensor
    asked: Tensor


@dataclass(frozen=True)
class ClassConfidence:
    """What was found of one name.

    presence: 0..1, how sure it is that the image shows it. mean_probability: 0..1 over its pixels, 0 without any.
    peak_probability: 0..1, the highest anywhere. area: pixels. box: (x, y, width, height) in pixels, None without any.
    centroid: (x, y) in pixels, None without any.
    """

    name: str
    label: int
    presence: float
    mean_probability: float
    peak_probability: float
    area: int
    box: tuple[int, int, int, int] | None
    centroid: tuple[float, float] | None


def presence(before: Tensor, after: Tensor) -> Tensor:
    """How sure it is that each query is in the image at all: mean of its maximum before and after the walk,
    [queries]."""
    return (before.amax(0) + after.amax(0)) / 2


def _compared(G: Tensor, P: Tensor, classes: Tensor, names: int, config: ReadoutConfig) -> tuple[Tensor, Tensor]:
    """What is compared, [N, queries], and the presence of each label [names + 1]."""
    found = presence(G, P)
    of_class = torch.zeros(names + 1, device=P.device).scatter_reduce(0, classes, found, "amax")
    if config.readout != "argmax":
        low = P.amin(0) if config.readout.endswith("minmax") else torch.zeros_like(found)
        P = (P - low) / (P.amax(0) - low).clamp_min(1e-12)
        if config.readout.startswith("presence"):
            P = P * found
    if config.readout in _CLIPER_READOUTS:
        P = P * ((classes > 0) & (of_class >= config.presence_threshold)[classes])
    return P, of_class


@torch.inference_mode()
def carry_labels(
    G: Tensor,
    P: Tensor,
    classes: Tensor,
    names: int,
    grid: tuple[int, int],
    config: ReadoutConfig,
    edges: PixelTransition,
    maps: Sequence[int] = (),
) -> LabelMaps:
    """What `read_out` compares, carried along the image's own pixels; never waits for the device.

    G, P, classes, names, grid, config: as for `read_out`. Labels that win at no token do not compete, so that the
    labels do not depend on how many of them there are; as S averages, they and whatever else is left out are the
    remainder to 1 at every pixel. On the CPU they are not carried, so that the time does not either; on CUDA, where to
    count them would be a wait, they are carried and then struck out. maps: labels whose maps are wanted whether they
    win or not.
    """
    values = _compared(G, P, classes, names, config)[0].T  # [queries, N]
    merged = values.new_zeros((names + 1, values.shape[1]))
    merged = merged.scatter_reduce(0, classes[:, None].expand_as(values), values, "amax")
    wins = ((merged == merged.amax(0)) & (merged > 0)).any(1)
    merged = merged.unflatten(1, grid)
    if merged.is_cuda:
        wins[0] |= ~wins.any()
        carried = edges.carry(merged)
        asked = torch.stack([carried[label] for label in maps]) if maps else carried[:0]
        drawn = torch.where(wins[:, None, None], carried, -1)
        return LabelMaps(drawn, torch.arange(names + 1, device=P.device), asked)
    winning = wins.nonzero()[:, 0].tolist() or [0]
    drawn = edges.carry(merged[winning])
    labels = torch.tensor(winning, device=P.device)
    others = [label for label in dict.fromkeys(maps) if label not in winning]
    if not others:
        return LabelMaps(drawn, labels, drawn[[winning.index(label) for label in maps]])
    # By themselves: how many maps are carried at once changes their last bits, and no question may change a label.
    known = [*winning, *others]
    asked = torch.cat((drawn, edges.carry(merged[others])))[[known.index(label) for label in maps]]
    return LabelMaps(drawn, labels, asked)


@torch.inference_mode()
def read_out(
    G: Tensor,
    P: Tensor,
    classes: Tensor,
    names: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    config: ReadoutConfig,
    maps: Sequence[Sequence[int]] = (),
    drawn: LabelMaps | None = None,
) -> Readout:
    """Name every pixel of an image of `size` (rows, columns); never waits for the device, and sends it nothing.

    G, P: float32 [., queries], before and after the walk, P on the tokens of `grid`. classes: int64 [queries], the
    label of each query, 0 for negatives. The queries of a class are merged by their maximum at each pixel, after
    resizing P bilinearly. A pixel is background where a negative wins, where the winner is under `threshold`, or its
    class under `presence_threshold`; of equals the lowest label wins, and background last. maps: for each map that is
    requested too, the queries of its class. drawn: what `carry_labels` made of the same G and P; its maps are compared
    in place of P's, and those requested of it are the maps. Presence is G's and P's all the same; the peak of a label
    that competes is its map's, where the readout compares probabilities.

    P must be >= 0. Where its rows are no distributions, as with some of the refinements that the walk is compared with,
    labels are still those of the greatest value; confidence, presence and peak are then that value, no probability, and
    confidence is clipped to 0..1.
    """
    device = P.device
    compared, of_class = _compared(G, P, classes, names, config)
    peak = torch.zeros(names + 1, device=device).scatter_reduce(0, classes, P.amax(0), "amax")
    if drawn is None:
        source = compared.T.unflatten(-1, grid)
    else:
        source, classes = drawn.maps, drawn.labels
        if config.readout == "argmax":
            top = source.flatten(1).amax(1)
            peak = peak.scatter(0, classes, torch.where(top < 0, peak[classes], top))
    best = torch.empty(size, device=device)
    winner = torch.empty(size, device=device)
    # A maximum over ranks finds the winner's label several times faster than a maximum that keeps its index.
    label_of = torch.where(of_class < config.presence_threshold, 0, torch.arange(names + 1, device=device))[classes]
    dense = torch.empty((len(maps), *size), dtype=torch.uint8, device=device)
    rank = ((names + 1 - label_of) % (names + 1)).float()[:, None, None]  # background 0, the first name highest
    if drawn is not None and len(maps):
        for rows, values in _resized(drawn.asked, size):
            dense[:, rows] = _in_255ths(values)
    for rows, scores in _resized(source, size):
        if drawn is None:
            for plane, queries in zip(dense, maps, strict=True):
                plane[rows] = _in_255ths(torch.stack([scores[query] for query in queries]).amax(0))
        torch.amax(scores, 0, out=best[rows])
        torch.amax(scores.eq_(best[rows]).mul_(rank), 0, out=winner[rows])
    labels = (names + 1 - winner) % (names + 1)
    if config.threshold > 0:
        labels.masked_fill_(best < config.threshold, 0)
    labels = labels.to(torch.uint8)
    confidence = _in_255ths(best)
    return Readout(labels, confidence, of_class[1:], peak[1:], *_statistics(labels, confidence, names), dense)


def _in_255ths(probability: Tensor) -> Tensor:
    """Rounded to uint8; `probability` is overwritten."""
    return probability.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)


def _resized(maps: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Bands of `maps` [queries, h, w] resized bilinearly to `size`, so that they stay in the cache, and many names on
    a large image in memory.

    Yields (slice of rows, float32 [queries, band, W], free to be overwritten). Equal to resizing the whole at once.
    """
    rows, columns = size
    source = maps.shape[1]
    budget = _CUDA_BAND_VALUES if maps.is_cuda else _CPU_BAND_VALUES
    band = max(1, min(rows, budget // (maps.shape[0] * columns)))
    wide = F.interpolate(maps[None], (source, columns), mode="bilinear", align_corners=False)[0]
    centres = (torch.arange(rows, device=maps.device, dtype=torch.float64) + 0.5) * source / rows - 0.5
    centres = centres.clamp(0, source - 1)
    above = centres.floor().long()
    below = (above + 1).clamp_max(source - 1)
    part = (centres - above).to(maps.dtype)[:, None]
    for start in range(0, rows, band):
        here = slice(start, min(start + band, rows))
        yield here, wide.index_select(1, above[here]).lerp_(wide.index_select(1, below[here]), part[here])


def _statistics(labels: Tensor, confidence: Tensor, names: int) -> tuple[Tensor, Tensor, Tensor]:
    """by_row, by_column and certainty of a `Readout`."""
    height, width = labels.shape
    index = labels.long()
    one = torch.ones((), dtype=torch.int32, device=labels.device).expand(height, width)
    zeros = one.new_zeros
    by_row = zeros((height, names + 1)).scatter_add_(1, index, one).t()
    by_column = zeros((names + 1, width)).scatter_add_(0, index, one)
    certainty = zeros((height, names + 1)).scatter_add_(1, index, confidence.int()).sum(0)
    return by_row, by_column, certainty


def describe_classes(names: tuple[str, ...], read: Readout) -> tuple[ClassConfidence, ...]:
    """Presence, probabilities and place of every name; waits for the device."""
    presence, peak, certainty = read.presence.tolist(), read.peak.tolist(), read.certainty.tolist()
    by_row, by_column = read.by_row.cpu().numpy(), read.by_column.cpu().numpy()
    found = []
    for label, name in enumerate(names, 1):
        in_rows, in_columns = by_row[label], by_column[label]
        pixels = int(in_rows.sum())
        box = centroid = None
        if pixels:
            rows, columns = np.flatnonzero(in_rows), np.flatnonzero(in_columns)
            left, top = int(columns[0]), int(rows[0])
            box = (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)
            centroid = (
                float(in_columns[columns] @ columns / pixels),
                float(in_rows[rows] @ rows / pixels),
            )
        found.append(
            ClassConfidence(
                name,
                label,
                min(1.0, presence[label - 1]),
                certainty[label] / pixels / 255 if pixels else 0.0,
                min(1.0, peak[label - 1]),
                pixels,
                box,
                centroid,
            )
        )
    return tuple(found)
