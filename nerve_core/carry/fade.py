"""How much of a keyframe's confidence is left in a mask carried from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fade:
    """c(age) = floor + (1 - floor) exp(-age / tau), times the keyframe's confidence.

    tau: seconds, above 0; the default is what films of objects that move on their own ask for, and more than flat
    drawn scenes do (docs/carrying.md). floor: 0..1, what is left in the end. Raises ValueError.
    """

    tau: float = 10.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ValueError(f"tau is {self.tau}; it must be finite and above 0 s")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is {self.floor}; accepted: 0 to 1")

    def left(self, age: float) -> float:
        """The share of the confidence that is left `age` seconds after the keyframe, 0..1; 1 at 0."""
        return self.floor + (1 - self.floor) * math.exp(-max(0.0, age) / self.tau)

    def table(self, age: float) -> np.ndarray:
        """What each confidence, linear in 0..255, has become: uint8 [256]."""
        return np.rint(np.arange(256) * self.left(age)).astype(np.uint8)
