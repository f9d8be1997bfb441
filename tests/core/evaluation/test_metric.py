"""Labels against truth: the confusion matrix and what is read from it, against counting pixel by pixel."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nerve_core.evaluation import metric
from nerve_core.evaluation.metric import ConfusionMatrix, interval, resampled_mean_iou


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


@settings(max_examples=30)
@given(classes=st.integers(1, 6), count=st.integers(0, 4), seed=st.integers(0, 999))
def test_sparse_counts_add_up_to_the_same_matrix(classes, count, seed):
    whole, added = ConfusionMatrix.of(classes), ConfusionMatrix.of(classes)
    for truth, predicted in images(classes, count, seed):
        one = ConfusionMatrix.of(classes)
        one.add(truth, predicted)
        whole.add(truth, predicted)
        entries = json.loads(json.dumps(one.sparse()))
        assert all(pixels > 0 for _, _, pixels in entries)
        added.add_sparse(entries)
    assert (added.counts == whole.counts).all()
    assert added.counts.dtype == np.int64


@pytest.mark.parametrize(
    "entries", [[[0, 3, 1]], [[3, 0, 1]], [[-1, 0, 1]], [[0, 0, -1]], [[0, 0]], [["a", 0, 1]], [[0, 0, None]], 7]
)
def test_sparse_counts_that_are_none_are_refused(entries):
    matrix = ConfusionMatrix.of(3)
    with pytest.raises(ValueError, match="counts"):
        matrix.add_sparse(entries)
    assert matrix.counts.sum() == 0


def sums_of(classes, count, seed):
    found = []
    for truth, predicted in images(classes, count, seed):
        matrix = ConfusionMatrix.of(classes)
        matrix.add(truth, predicted)
        found.append(matrix.sums())
    return np.stack(found)


@settings(max_examples=20)
@given(classes=st.integers(1, 5), count=st.integers(1, 6), seed=st.integers(0, 999))
def test_a_resample_scores_what_its_images_score_together(classes, count, seed):
    pairs = list(images(classes, count, seed))
    found = resampled_mean_iou(sums_of(classes, count, seed), resamples=15, seed=seed)
    drawn = np.random.default_rng(seed).integers(0, count, (15, count))
    for value, numbers in zip(found, drawn, strict=True):
        mean = naive([pairs[number] for number in numbers], classes)[1]
        assert value == pytest.approx(mean, rel=1e-12, nan_ok=True)


def test_resamples_are_the_same_however_many_are_worked_out_at_once(monkeypatch):
    sums = sums_of(4, 7, 3)
    whole = resampled_mean_iou(sums, resamples=50, seed=9)
    monkeypatch.setattr(metric, "_CHUNK_VALUES", 30)
    assert (resampled_mean_iou(sums, resamples=50, seed=9) == whole).all()
    assert not (resampled_mean_iou(sums, resamples=50, seed=10) == whole).all()


def test_the_difference_of_two_methods_is_paired():
    sums = sums_of(4, 12, 5)
    better = sums.copy()
    better[:, 0] = np.minimum(better[:, 0] + 1, better[:, 1])
    better[:, 2] = np.maximum(better[:, 2], better[:, 0])
    gains = resampled_mean_iou(better) - resampled_mean_iou(sums)
    unpaired = resampled_mean_iou(better, seed=1) - resampled_mean_iou(sums, seed=2)
    assert np.ptp(interval(gains)) < np.ptp(interval(unpaired)) / 2
    assert interval(resampled_mean_iou(sums) - resampled_mean_iou(sums)) == (0.0, 0.0)


def test_the_interval_has_its_share_of_a_binomial():
    # One class, images all right or all wrong: the mean IoU of a resample is the share of images that are right.
    count, right = 400, 100
    sums = np.zeros((count, 3, 2), np.int64)
    sums[:, 1, 1] = 10
    sums[:right, 0, 1] = 10
    sums[:, 2, 1] = sums[:, 0, 1]
    low, high = interval(resampled_mean_iou(sums, resamples=4000))
    spread = 1.96 * math.sqrt(0.25 * 0.75 / count)
    assert (low, high) == (pytest.approx(0.25 - spread, abs=0.006), pytest.approx(0.25 + spread, abs=0.006))


def test_images_without_labels_leave_no_score_and_no_image_no_interval():
    assert np.isnan(resampled_mean_iou(np.zeros((3, 3, 2), np.int64))).all()
    assert interval(resampled_mean_iou(np.zeros((3, 3, 2), np.int64))) is None
    with pytest.raises(ValueError, match="no image"):
        resampled_mean_iou(np.zeros((0, 3, 2), np.int64))
