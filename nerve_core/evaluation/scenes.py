"""The embedded pair's own set: scenes drawn in memory from a seed, with masks that are exact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..embedded.scenes import NAMES, draw_scene
from ..text.vocabulary import Vocabulary
from .datasets import Sample


@dataclass(frozen=True)
class DrawnScenes:
    """Scenes 0 to count - 1 of a seed as a set: every name is asked for, with the pair's own negatives."""

    seed: int
    count: int
    name: str = "scenes"
    notes: tuple[str, ...] = ()
    values: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """For a reader."""
        return f"{self.count} drawn scenes of seed {self.seed}"

    @property
    def root(self) -> Path:
        """No file is read."""
        return Path(f"seed {self.seed}")

    @property
    def samples(self) -> tuple[Sample, ...]:
        """A scene each; its number is its id."""
        return tuple(Sample(f"{k:06d}", self.root / str(k), self.root / str(k)) for k in range(self.count))

    @property
    def vocabulary(self) -> Vocabulary:
        """Every name that a scene can show."""
        return Vocabulary(NAMES)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the mask labels."""
        return ("background", *NAMES)

    @property
    def settings(self) -> dict[str, Any]:
        """The protocol changes nothing of the pair's settings."""
        return {}

    def load(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """One scene: uint8 [H, W, 3] RGB and its mask, uint8 [H, W]."""
        scene = draw_scene((self.seed, int(sample.id)))
        return scene.image, scene.labels
