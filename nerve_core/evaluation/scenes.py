"""The embedded pair's own protocol: drawn scenes of a seed, every name asked for, one confusion matrix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..embedded.scenes import NAMES, draw_scenes
from ..readout import read_out
from ..segmenter import Segmenter
from ..vocabulary import Vocabulary
from .metric import ConfusionMatrix

Refine = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Q, K [heads, N, D], G [N, queries] -> P [N, queries]."""


@dataclass(frozen=True)
class Score:
    """miou: background included. per_class: by name; NaN where no scene shows it. seconds_per_image: of segmenting
    alone."""

    miou: float
    pixel_accuracy: float
    per_class: dict[str, float]
    count: int
    seconds_per_image: float


def evaluate_scenes(
    segmenter: Segmenter,
    seed: int,
    count: int,
    *,
    refine: bool = True,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Score:
    """Segment `count` scenes of a seed with every name in the vocabulary, with the walk or with G alone."""
    nerve = nerve_refinement(segmenter) if refine else no_refinement
    return compare_on_scenes(segmenter, seed, count, {"": nerve}, progress=progress)[""]


def nerve_refinement(segmenter: Segmenter) -> Refine:
    """The segmenter's own walk."""
    return lambda Q, K, G: segmenter.refine(Q, K, G).P


def no_refinement(Q: Tensor, K: Tensor, G: Tensor) -> Tensor:
    """G alone: CLIP's word, resized."""
    return G


@torch.inference_mode()
def compare_on_scenes(
    segmenter: Segmenter,
    seed: int,
    count: int,
    refinements: Mapping[str, Refine],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Score]:
    """Several refinements of the same G, Q and K on the same scenes: a score for each."""
    queries = segmenter.embed(Vocabulary(NAMES))
    matrices = {name: ConfusionMatrix.of(len(NAMES) + 1) for name in refinements}
    seconds = dict.fromkeys(refinements, 0.0)
    for scene in progress(draw_scenes(seed, count)):
        began = time.perf_counter()
        G, Q, K = segmenter.frame(scene.image, queries)
        shared = time.perf_counter() - began
        for name, refine in refinements.items():
            began = time.perf_counter()
            P = refine(Q, K, G)
            grid, size = segmenter.grid, scene.labels.shape
            read = read_out(G, P, queries.classes, len(NAMES), grid, size, segmenter.settings.readout)
            labels = read.labels.cpu().numpy()
            seconds[name] += shared + time.perf_counter() - began
            matrices[name].add(scene.labels, labels)
    return {name: _score(matrix, count, seconds[name]) for name, matrix in matrices.items()}


def _score(matrix: ConfusionMatrix, count: int, seconds: float) -> Score:
    values = matrix.iou()
    names = ("background", *NAMES)
    return Score(
        matrix.mean_iou(),
        matrix.pixel_accuracy(),
        {name: float(np.round(value, 6)) for name, value in zip(names, values, strict=True)},
        count,
        seconds / max(count, 1),
    )
