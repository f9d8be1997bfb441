"""What the benchmarks of a whole frame measure: a process's task, the names that are asked for, a made-up image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike person plant sheep sofa train "
    "monitor"
)
"""Pascal VOC's twenty classes; with "lamp" they are the 21 names that a frame is timed with."""


@dataclass(frozen=True)
class Task:
    """What one process measures.

    side: "ours", "plain" or "checks". pair: its name or folder. device, precision: as for `Segmenter.from_pretrained`.
    names: how many are asked for. size: (rows, columns) of the image. frames: timed, after `warm_up` more. options:
    more arguments of `Segmenter.from_pretrained`.
    """

    side: str
    pair: str
    device: str
    precision: str | None
    names: int
    size: tuple[int, int]
    frames: int
    warm_up: int
    options: dict[str, Any]


def names(count: int) -> list[str]:
    """So many names of everyday things, all different."""
    words = [*VOC.split(), "lamp"]
    kinds = ("", "red ", "small ", "old ", "wooden ", "broken ", "toy ", "large ")
    return [kind + word for kind in kinds for word in words][:count]


def picture(size: tuple[int, int]) -> np.ndarray:
    """A smooth made-up photograph, uint8 [rows, columns, 3]."""
    import cv2

    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
