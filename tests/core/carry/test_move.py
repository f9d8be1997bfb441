"""Masks moved by displacements on a coarse grid: against a reference that visits every pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nerve_core.carry import move
from nerve_core.carry.move import Mover, paired


def slow_move(labels, confidence, displacement, known, fade):
    """Labels, confidence, and how far each pixel's place is from being between two pixels; by loops."""
    rows, columns = labels.shape
    grid_rows, grid_columns = known.shape
    found, sure, clear = np.full(labels.shape, 255), np.zeros(labels.shape, int), np.zeros(labels.shape)
    for row, column in np.ndindex(rows, columns):
        y, x = (row + 0.5) * grid_rows / rows - 0.5, (column + 0.5) * grid_columns / columns - 0.5
        total = np.zeros(2)
        for below, right in np.ndindex(2, 2):
            weight = (1 - abs(x - np.floor(x) - right)) * (1 - abs(y - np.floor(y) - below))
            cell = int(np.floor(y)) + below, int(np.floor(x)) + right
            total += weight * displacement[min(max(cell[0], 0), grid_rows - 1), min(max(cell[1], 0), grid_columns - 1)]
        there = row + total[1] * rows / grid_rows, column + total[0] * columns / grid_columns
        clear[row, column] = min(abs(value - np.floor(value) - 0.5) for value in there)
        at = tuple(int(np.floor(value + 0.5)) for value in there)
        holds = known[int((row + 0.5) * grid_rows / rows), int((column + 0.5) * grid_columns / columns)]
        if holds and 0 <= at[0] < rows and 0 <= at[1] < columns:
            found[row, column], sure[row, column] = labels[at], fade[confidence[at]]
    return found, sure, clear


@settings(max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(24, 32), (30, 41), (17, 23), (64, 20)]),
    st.sampled_from([(8, 10), (12, 16), (16, 16), (20, 30)]),
    st.sampled_from([0.2, 1.0, 4.0]),
)
def test_moved_masks_are_as_by_loops(seed, size, grid, reach):
    rng = np.random.default_rng(seed)
    labels, confidence = (rng.integers(0, 256, size, dtype=np.uint8) for _ in range(2))
    displacement = rng.uniform(-reach, reach, (*grid, 2)).astype(np.float32)
    known = (rng.random(grid) < 0.8).astype(np.uint8) * 255
    fade = np.sort(rng.integers(0, 256, 256)).astype(np.uint8)
    fade[0] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(move, "STRIP_PIXELS", 5 * size[1])
        found, sure, coverage = Mover(size, grid)(paired(labels, confidence), displacement, known, fade)
    expected, expected_sure, clear = slow_move(labels, confidence, displacement, known, fade)
    sharp = clear > 1e-3
    np.testing.assert_array_equal(found[sharp], expected[sharp])
    np.testing.assert_array_equal(sure[sharp], expected_sure[sharp])
    assert coverage == pytest.approx((found != 255).mean())


@pytest.mark.parametrize("size", [(1, 1), (480, 640), (1080, 1920), (1, 2000)])
def test_no_displacement_changes_nothing(size):
    labels, confidence = (np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8) for _ in range(2))
    grid = (16, 160)
    known = np.full(grid, 255, np.uint8)
    same = np.arange(256, dtype=np.uint8)
    found, sure, coverage = Mover(size, grid)(paired(labels, confidence), np.zeros((*grid, 2), np.float32), known, same)
    np.testing.assert_array_equal(found, labels)
    np.testing.assert_array_equal(sure, confidence)
    assert coverage == 1
