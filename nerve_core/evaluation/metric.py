"""Labels against truth: one confusion matrix over a set, and the intersection over union that it gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = 255


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

    def iou(self) -> np.ndarray:
        """Intersection over union per class, float64 [classes]; NaN for a class that is not in the truth."""
        hits, truth, predicted = np.diag(self.counts), self.counts.sum(1), self.counts.sum(0)
        return np.where(truth > 0, hits / np.maximum(truth + predicted - hits, 1), np.nan)

    def mean_iou(self) -> float:
        """Mean over the classes that are in the truth; NaN where there is none."""
        values = self.iou()
        return float(np.mean(values[~np.isnan(values)])) if (~np.isnan(values)).any() else float("nan")

    def pixel_accuracy(self) -> float:
        """Share of pixels that carry the right label; NaN without pixels."""
        total = self.counts.sum()
        return float(np.trace(self.counts) / total) if total else float("nan")
