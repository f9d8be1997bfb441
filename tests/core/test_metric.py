"""Labels against truth: the confusion matrix and what is read from it, against counting pixel by pixel."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nerve_core.evaluation.metric import ConfusionMatrix


def images(classes, count, seed, *, ignored=True):
    """Pairs of truth and prediction of different sizes; some truth is 255."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        size = tuple(rng.integers(1, 9, 2))
        truth = rng.integers(0, classes, size, dtype=np.uint8)
        predicted = np.where(rng.random(size) < 0.5, truth, rng.integers(0, classes, size)).astype(np.uint8)
        if ignored:
            truth[rng.random(size) < 0.2] = 255
        yield truth, predicted


def naive(pairs, classes):
    """IoU of every class, mean and accuracy, by looking at every pixel."""
    hits, truths, found, right, total = [0] * classes, [0] * classes, [0] * classes, 0, 0
    for truth, predicted in pairs:
        for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
            if t == 255:
                continue
            total += 1
            right += t == p
            truths[t] += 1
            found[p] += 1
            hits[t] += t == p
    ious = [hits[k] / (truths[k] + found[k] - hits[k]) if truths[k] else math.nan for k in range(classes)]
    there = [value for value in ious if not math.isnan(value)]
    return ious, sum(there) / len(there) if there else math.nan, right / total if total else math.nan


@settings(max_examples=60)
@given(classes=st.integers(1, 6), count=st.integers(0, 4), seed=st.integers(0, 999))
def test_the_scores_of_a_set_are_those_of_counting_pixel_by_pixel(classes, count, seed):
    pairs = list(images(classes, count, seed))
    matrix = ConfusionMatrix.of(classes)
    for truth, predicted in pairs:
        matrix.add(truth, predicted)
    ious, mean, accuracy = naive(pairs, classes)
    np.testing.assert_allclose(matrix.iou(), ious, rtol=1e-12)
    np.testing.assert_allclose([matrix.mean_iou(), matrix.pixel_accuracy()], [mean, accuracy], rtol=1e-12)
    assert matrix.counts.sum() == sum((truth != 255).sum() for truth, _ in pairs)


def test_it_is_one_matrix_over_the_set_and_not_a_mean_over_images():
    matrix = ConfusionMatrix.of(2)
    matrix.add(np.ones((1, 1), np.uint8), np.zeros((1, 1), np.uint8))  # all wrong, small
    matrix.add(np.ones((9, 11), np.uint8), np.ones((9, 11), np.uint8))  # all right, large
    assert matrix.iou()[1] == pytest.approx(99 / 100)


def test_rows_are_the_truth_and_columns_the_prediction():
    matrix = ConfusionMatrix.of(3)
    matrix.add(np.array([[0, 1, 1]], np.uint8), np.array([[0, 2, 2]], np.uint8))
    assert matrix.counts.tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 0]]
    assert matrix.counts.dtype == np.int64
    # class 2 was only predicted: it has no score of its own, and class 1 pays
    assert matrix.iou()[:2].tolist() == [1, 0]
    assert math.isnan(matrix.iou()[2])
    assert matrix.mean_iou() == 0.5


def test_the_order_of_images_does_not_matter():
    pairs = list(images(4, 5, 7))
    forward, backward = ConfusionMatrix.of(4), ConfusionMatrix.of(4)
    for one, other in zip(pairs, pairs[::-1], strict=True):
        forward.add(*one)
        backward.add(*other)
    assert (forward.counts == backward.counts).all()


def test_an_empty_set_has_no_score():
    matrix = ConfusionMatrix.of(3)
    matrix.add(np.full((2, 2), 255, np.uint8), np.full((2, 2), 9, np.uint8))  # ignored, whatever was predicted
    assert math.isnan(matrix.mean_iou())
    assert math.isnan(matrix.pixel_accuracy())
    assert np.isnan(matrix.iou()).all()


@pytest.mark.parametrize(
    ("truth", "predicted", "said"),
    [
        (np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), r"\[2, 3\].*\[3, 2\]"),
        (np.full((1, 1), 3, np.uint8), np.zeros((1, 1), np.uint8), "label 3 is out of range"),
        (np.zeros((1, 1), np.uint8), np.full((1, 1), 255, np.uint8), "label 255 is out of range.*0..2"),
        (np.zeros((1, 1), np.uint8), np.full((1, 1), -1, np.int8), "label -1 is out of range"),
        (np.zeros((1, 1)), np.zeros((1, 1), np.uint8), "whole numbers"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_not_counted(truth, predicted, said):
    matrix = ConfusionMatrix.of(3)
    with pytest.raises(ValueError, match=said):
        matrix.add(truth, predicted)
    assert matrix.counts.sum() == 0
