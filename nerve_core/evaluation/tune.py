"""A labelled set -> settings that do better on it: searched on one part of the images, judged on the other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..networks.dense_clip import HEADS
from ..report.data import Curve
from ..settings import Settings
from .datasets import Dataset
from .metric import interval, resampled_mean_iou
from .runner import SetResult, Tally
from .variants import Variant

Overrides = Mapping[str, Any]
AXES: dict[str, tuple[Overrides, ...]] = {
    "head": tuple({"head": head} for head in HEADS),
    "kernel": (
        *({"kernel": kernel} for kernel in ("softmax", "relu", "relu_centred")),
        *({"kernel": "exp", "tau": tau} for tau in (0.02, 0.05, 0.1, 0.2)),
    ),
    "beta": tuple({"beta": beta} for beta in (0.0, 0.25, 0.5, 0.75, 1.0)),
    "alpha": tuple({"alpha": alpha} for alpha in (0.5, 0.7, 0.8, 0.9, 0.95)),
    "c": tuple({"c": c} for c in (0.0, 3.0, 10.0, 30.0, 100.0)),
    "steps": tuple({"steps": steps} for steps in (4, 8, 16, 32)),
    "edges": (
        {"edges": "none"},
        *({"edges": "pixels", "edge_sigma": sigma} for sigma in (2.0, 4.0, 8.0)),
        *({"edges": "pixels", "edge_steps": steps} for steps in (4, 16)),
    ),
    "threshold": tuple({"threshold": threshold} for threshold in (0.0, 0.05, 0.1, 0.2, 0.3)),
}
"""What is tried, one axis after the other."""
OWN, TUNED = "as they are", "tuned"


@dataclass(frozen=True)
class Trial:
    """Settings that were tried on the images to tune on, and the mean IoU there. round: from 1."""

    round: int
    axis: str
    settings: dict[str, Any]
    miou: float


@dataclass(frozen=True)
class Gain:
    """What tuning gained on images that it never saw. gain: difference of the mean IoU. interval: its 95 % interval
    (low, high) by a paired bootstrap over images, None where they show no label."""

    gain: float
    interval: tuple[float, float] | None

    @property
    def distinguishable(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def __str__(self) -> str:
        if self.interval is None:
            return "the held-out images show no label, so nothing can be said of the gain"
        low, high = self.interval
        said = f"{100 * self.gain:+.2f} points of mIoU on held-out images (95 % interval {100 * low:+.2f} to "
        said += f"{100 * high:+.2f})"
        if not self.distinguishable:
            return f"{said}: not distinguishable from the settings as they are; more labelled images would tell"
        return said if self.gain > 0 else f"{said}: worse than the settings as they are, so keep those"


def split(dataset: Dataset, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
    """The images to tune on, and those that are held out: a share of them, drawn by a seed. Raises ValueError where
    either would have fewer than two."""
    count = len(dataset.samples)
    kept = round(held_out * count)
    if not 0 < held_out < 1 or kept < 2 or count - kept < 2:
        raise ValueError(
            f"{count} images with a share of {held_out} held out leave {count - kept} to tune on and {kept} to judge "
            "by; each needs two or more, and hundreds to be sure"
        )
    order = np.random.default_rng(seed).permutation(count)
    parts = (sorted(order[kept:]), sorted(order[:kept]))
    tuning, held = (replace(dataset, samples=tuple(dataset.samples[k] for k in part)) for part in parts)
    return tuning, held


def search(
    measured: Callable[[int, str, Sequence[Variant]], Tally],
    base: Settings,
    axes: Sequence[str],
    trials: int,
) -> tuple[dict[str, Any], tuple[Trial, ...]]:
    """The best settings found and all that were tried: one axis after the other, each time keeping the best, in rounds
    until a round changes nothing or `trials` are spent. Of equals the one that is there stays.

    measured: mIoU of variants on the images to tune on, called with the number of the pass and its axis. base: the
    settings as they are. Raises ValueError for an axis that is unknown or fewer than two trials.
    """
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or not axes:
        raise ValueError(f"axes {', '.join(unknown) or 'none'} are unknown; choose of {', '.join(AXES)}")
    if trials < 2:
        raise ValueError(f"{trials} trials are too few: the settings as they are take one, and each other one more")
    known: dict[str, float] = {}  # by name
    tried: list[Trial] = []
    best: dict[str, Any] = {}
    passes, before = 0, None
    for number in range(1, trials):
        if best == before or len(known) == trials:
            break
        before = best
        for axis in axes:
            candidates = {_name(base, changes): changes for changes in (best, *({**best, **c} for c in AXES[axis]))}
            new = [Variant(name, changes) for name, changes in candidates.items() if name not in known]
            new = new[: trials - len(known)]
            if new:
                passes += 1
                tally = measured(passes, axis, new)
                for variant in new:
                    known[variant.name] = tally.matrices[variant.name].mean_iou()
                    tried.append(Trial(number, axis, dict(variant.settings), known[variant.name]))
            best = candidates[max((name for name in candidates if name in known), key=known.__getitem__)]
    return _changed(base, best), tuple(tried)


def _changed(base: Settings, changes: Overrides) -> dict[str, Any]:
    own = base.flat()
    return {name: value for name, value in changes.items() if own[name] != value}


def _name(base: Settings, changes: Overrides) -> str:
    """Settings by what is changed of them."""
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in sorted(_changed(base, changes).items())) or OWN


def gain(result: SetResult) -> Gain:
    """What the second variant of a run gained over its first."""
    own, tuned = (variant.name for variant in result.task.variants)
    tally = result.tally
    # The same seed draws the same images for both: the difference is a paired bootstrap.
    both = [resampled_mean_iou(tally.sums[name][tally.done]) for name in (tuned, own)]
    difference = tally.matrices[tuned].mean_iou() - tally.matrices[own].mean_iou()
    return Gain(difference, interval(both[0] - both[1]))


def curves(set_name: str, base: Settings, trials: Sequence[Trial]) -> tuple[Curve, ...]:
    """mIoU on the split tuned on over each axis of numbers, in the first round, the others as they were by then."""
    found = []
    for axis in dict.fromkeys(trial.axis for trial in trials):
        first = [trial for trial in trials if trial.axis == axis and trial.round == 1]
        if not first or axis in ("head", "kernel", "edges"):
            continue
        points = {float(trial.settings.get(axis, base.flat()[axis])): trial.miou for trial in first}
        values = {x: y for x, y in sorted(points.items()) if not math.isnan(y)}
        if len(values) > 1:
            found.append(Curve("mIoU on the images tuned on", set_name, axis, tuple(values), tuple(values.values())))
    return tuple(found)
