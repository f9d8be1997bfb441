"""Predicted labels against true ones: a confusion matrix over a set, the intersection over union and its interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = 255
RESAMPLES = 2000
"""Of a bootstrap: the ends of a 95 % interval rest on 50 of them each."""
_CHUNK_VALUES = 2**24  # numbers held at once while resampling


@dataclass
class ConfusionMatrix:
    """Pixel counts, int64 [classes, classes]: row is the truth, column the prediction. Exact, and order does not
    matter."""

    counts: np.ndarray

    @classmethod
    def of(cls, classes: int) -> ConfusionMatrix:
        """An empty one for labels 0..classes - 1."""
        return cls(np.zeros((classes, classes), np.int64))

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Count one image: uint8 arrays of one shape; pixels whose truth is 255 are left out.

        Raises ValueError for shapes that differ or labels that are out of range.
        """
        if truth.shape != predicted.shape:
            raise ValueError(
                f"truth is {list(truth.shape)}, the prediction {list(predicted.shape)}; they must be equal"
            )
        if not (np.issubdtype(truth.dtype, np.integer) and np.issubdtype(predicted.dtype, np.integer)):
            raise ValueError(f"labels are {truth.dtype} and {predicted.dtype}; they must be whole numbers")
        valid = truth != IGNORED
        rows, columns = truth[valid].astype(np.int64), predicted[valid].astype(np.int64)
        classes = len(self.counts)
        wrong = [label for labels in (rows, columns) for label in labels[(labels < 0) | (labels >= classes)][:1]]
        if wrong:
            raise ValueError(f"label {wrong[0]} is out of range: labels are 0..{classes - 1}, or 255 in the truth")
        self.counts += np.bincount(rows * classes + columns, minlength=classes**2).reshape(classes, classes)

    def sparse(self) -> list[list[int]]:
        """[truth, prediction, pixels] of every pair of labels that occurs, in ascending order."""
        rows, columns = np.nonzero(self.counts)
        return np.stack([rows, columns, self.counts[rows, columns]], 1).tolist()

    def add_sparse(self, entries: list[list[int]]) -> None:
        """Add what `sparse` gave. Raises ValueError for anything else."""
        try:
            rows, columns, pixels = np.array(entries, np.int64).reshape(-1, 3).T
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"counts must be lists [truth, prediction, pixels] of whole numbers: {error}") from None
        classes = len(self.counts)
        if ((rows < 0) | (rows >= classes) | (columns < 0) | (columns >= classes) | (pixels < 0)).any():
            raise ValueError(f"counts have a label outside of 0..{classes - 1}, or fewer than 0 pixels")
        np.add.at(self.counts, (rows, columns), pixels)

    def sums(self) -> np.ndarray:
        """int64 [3, classes]: pixels that are right, that the truth has and that were predicted, of every label. All
        that intersection over union needs."""
        return np.stack([np.diag(self.counts), self.counts.sum(1), self.counts.sum(0)])

    def iou(self) -> np.ndarray:
        """Intersection over union per class, float64 [classes]; NaN for a class that is not in the truth."""
        return _iou(self.sums())

    def mean_iou(self) -> float:
        """Mean over the classes that are in the truth; NaN where there is none."""
        return float(mean_iou(self.sums()))

    def pixel_accuracy(self) -> float:
        """Share of pixels that carry the right label; NaN without pixels."""
        total = self.counts.sum()
        return float(np.trace(self.counts) / total) if total else float("nan")


def mean_iou(sums: np.ndarray) -> np.ndarray:
    """Mean IoU of each of several `ConfusionMatrix.sums`, [..., 3, classes] -> float64 [...]; NaN without pixels."""
    there = sums[..., 1, :] > 0
    count = there.sum(-1)
    total = np.where(there, _iou(sums), 0.0).sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _iou(sums: np.ndarray) -> np.ndarray:
    """[..., 3, classes] -> [..., classes]; NaN where the truth has no pixel."""
    hits, truth, predicted = sums[..., 0, :], sums[..., 1, :], sums[..., 2, :]
    return np.where(truth > 0, hits / np.maximum(truth + predicted - hits, 1), np.nan)


def resampled_mean_iou(sums: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Mean IoU of sets of as many images drawn with replacement, float64 [resamples]: the bootstrap (Efron 1979).

    sums: whole numbers [images, 3, classes], `ConfusionMatrix.sums` of each image. Labels that a resample does not show
    are left out, as in `mean_iou`; it is NaN where it shows none. The images drawn depend on the seed and on how many
    there are alone, so that the difference of two such arrays is a paired bootstrap. Raises ValueError without images.
    """
    images, _, classes = sums.shape
    if not images:
        raise ValueError("there is no image to resample; an interval needs at least one")
    rng = np.random.default_rng(seed)
    flat = sums.reshape(images, -1).astype(np.float64)  # sums of pixels stay far below 2**53: exact
    step = max(1, _CHUNK_VALUES // max(images, 3 * classes))
    means = np.empty(resamples)
    for start in range(0, resamples, step):
        here = means[start : start + step]
        drawn = rng.integers(0, images, (len(here), images))
        drawn += images * np.arange(len(here))[:, None]
        often = np.bincount(drawn.ravel(), minlength=len(here) * images).reshape(len(here), images)
        here[:] = mean_iou((often.astype(np.float64) @ flat).reshape(len(here), 3, classes))
    return means


def interval(resampled: np.ndarray) -> tuple[float, float] | None:
    """The 95 % percentile interval of resampled values, NaN left out; None where nothing is left."""
    finite = resampled[~np.isnan(resampled)]
    if not len(finite):
        return None
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)
