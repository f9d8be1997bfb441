"""Displacements between images and one after another: against slow references, and what is no longer the same scene."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from films import SIZE, noisy, view
from nerve_core.carry.flow import Flow, SmallImage, explained, grid_size, unexplained_share

GRID = grid_size(SIZE, 320)


def slow_compose(first, then):
    """By loops over every pixel, in float64."""
    rows, columns = first.shape[:2]
    moved = np.zeros(first.shape)
    for row, column in np.ndindex(rows, columns):
        x, y = column + float(first[row, column, 0]), row + float(first[row, column, 1])
        left, top = int(np.floor(x)), int(np.floor(y))
        total = np.zeros(2)
        for below, right in np.ndindex(2, 2):
            weight = (1 - abs(x - left - right)) * (1 - abs(y - top - below))
            inside = min(max(top + below, 0), rows - 1), min(max(left + right, 0), columns - 1)
            total += weight * then[inside]
        moved[row, column] = first[row, column] + total
    return moved


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.3, 2.0, 9.0]))
def test_two_displacements_one_after_the_other_are_as_by_loops(seed, reach):
    rng = np.random.default_rng(seed)
    # In 32nds of a pixel, by which OpenCV interpolates.
    first, then = (np.float32(np.rint(rng.uniform(-reach, reach, (16, 20, 2)) * 32) / 32) for _ in range(2))
    np.testing.assert_allclose(Flow((16, 20)).compose(first, then), slow_compose(first, then), atol=1e-4)


@given(st.integers(-6, 6), st.integers(-6, 6), st.integers(-6, 6), st.integers(-6, 6))
def test_whole_steps_add_up_exactly(a, b, c, d):
    shape = (16, 20, 2)
    first, then = (np.full(shape, step, np.float32) for step in ((a, b), (c, d)))
    flow = Flow((16, 20))
    moved = flow.compose(first, then)
    np.testing.assert_array_equal(moved, np.full(shape, (a + c, b + d), np.float32))
    rows, columns = np.arange(16)[:, None] + b + d, np.arange(20)[None, :] + a + c
    np.testing.assert_array_equal(flow.inside(moved), (rows >= 0) & (rows < 16) & (columns >= 0) & (columns < 20))


@pytest.mark.parametrize(
    ("size", "grid"),
    [((480, 640), (120, 160)), ((1080, 1920), (90, 160)), ((640, 480), (160, 120)), ((10, 2000), (16, 160))],
)
def test_the_grid_keeps_the_aspect_and_never_gets_too_small_for_the_flow(size, grid):
    assert grid_size(size, 320) == grid


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (8, 8)])
def test_tiny_and_narrow_images_have_a_flow_too(size):
    grid = grid_size(size, 320)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = Flow(grid).between(SmallImage(image, grid), SmallImage(image, grid))
    assert found.shape == (*grid, 2)
    assert np.isfinite(found).all()


def unexplained(newer, older):
    flow = Flow(GRID)
    one, other = SmallImage(newer, GRID), SmallImage(older, GRID)
    displacement = flow.between(one, other)
    return unexplained_share(*flow.compare(one, other, displacement), flow.inside(displacement))


MOVES = {
    "pan": (view(500)[0], view(510)[0]),
    "zoom": (view(500)[0], view(500, scale=1.05)[0]),
    "roll": (view(500)[0], view(500, roll=0.04)[0]),
    "brighter": (view(500)[0], noisy(view(506)[0], 1, gain=1.3)),
    "darker": (view(500)[0], noisy(view(506)[0], 1, gain=0.7)),
    "noise": (noisy(view(500)[0], 1, 6), noisy(view(500)[0], 2, 6)),
    "rolling exposure": (view(500)[0], view(506, skew=0.06)[0]),
    "blur": (np.mean([view(500 + x)[0] for x in range(-6, 7, 2)], 0).astype(np.uint8), view(510)[0]),
}


@pytest.mark.parametrize("move", MOVES)
def test_what_a_camera_does_is_explained(move):
    assert unexplained(*MOVES[move]) < 0.2


@pytest.mark.parametrize("there", [(900, 5), (500, 6), (300, 7), (1100, 8)])
def test_another_scene_is_not(there):
    x, seed = there
    assert unexplained(view(500)[0], view(x, seed=seed)[0]) > 0.42


def test_an_even_wall_is_explained_whatever_its_light():
    wall = np.full((*SIZE, 3), 120, np.uint8)
    assert unexplained(noisy(wall, 1, 4), noisy(wall, 2, 4, gain=0.6)) == 0


def test_where_two_images_differ_is_said_by_the_place():
    image = view(500)[0]
    other = image.copy()
    other[80:160, 120:200] = np.random.default_rng(1).integers(0, 256, (80, 80, 3))
    flow = Flow(GRID)
    alike = explained(*flow.compare(SmallImage(image, GRID), SmallImage(other, GRID), np.zeros((*GRID, 2), np.float32)))
    rows, columns = GRID
    inner = alike[int(rows * 0.4) : int(rows * 0.6), int(columns * 0.45) : int(columns * 0.55)]
    assert inner.mean() < 0.2
    assert alike[: rows // 5].mean() > 0.97
