"""Steps between pixels of like colour against loops over pixels in float64, and what they must keep."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from nerve_core.walk.edges import EDGES, SELF, EdgesConfig, lab, pamr, pixel_transition, working_size
from small_models import picture, slow_bilinear

NEAR = {"edge_steps": 5, "edge_distances": (1, 2)}


def at_its_own_size(height, width, **config):
    """Settings under which an image is worked on as it is, at the distances that are given."""
    return EdgesConfig(edge_size=max(height, width), **config)


def maps(queries, size, seed):
    """Distributions over queries at every place, [queries, *size]."""
    return (2 * torch.randn((queries, *size), generator=torch.Generator().manual_seed(seed))).softmax(0)


def image_of(height, width, seed, contrast=1.0):
    """Random colours around grey, float32 [1, 3, height, width]."""
    colours = torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return 0.5 + contrast * (colours - 0.5)


def weights(S):
    """Of all stencils side by side."""
    return torch.cat([stencil.weights for stencil in S.stencils], 1)


@settings(max_examples=25)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([(1,), (4, 16), (1, 2), (3,), (2, 2)]),
    st.sampled_from([(0.05, 5.0), (1.0, 20.0), (1.0, 1.0)]),
    st.integers(0, 99),
)
def test_steps_are_their_equations_pixel_by_pixel(height, width, queries, steps, distances, colours, seed):
    contrast, sigma = colours
    image, scores = image_of(height, width, seed, contrast), maps(queries, (height, width), seed + 1)
    config = at_its_own_size(height, width, edge_steps=steps, edge_distances=distances, edge_sigma=sigma)
    S = pixel_transition(image, config)
    wanted = scores.double().numpy().reshape(queries, -1)
    if steps:
        colours = image[0].double().numpy()
        far = reference.pixel_transition(colours, sorted(set(distances)), sigma, SELF)
        near = reference.pixel_transition(colours, [1], 2 * sigma, SELF)
        wanted = wanted @ np.linalg.matrix_power(far.T, steps) @ near.T @ near.T
    np.testing.assert_allclose(S.carry(scores), wanted.reshape(queries, height, width), rtol=0, atol=5e-5)


@pytest.mark.parametrize("edges", ["pixels", "pamr"])
@pytest.mark.parametrize("image", [torch.full((1, 3, 20, 24), 0.5), picture(20, 24), torch.zeros((1, 3, 1, 1))])
def test_rows_are_distributions_and_keep_distributions(edges, image):
    S = pixel_transition(image, EdgesConfig(edges))
    for stencil in S.stencils:
        assert (stencil.weights >= 0).all()
        torch.testing.assert_close(stencil.weights.sum(1), torch.ones(image[0, 0].numel()), rtol=0, atol=1e-5)
    found = S.carry(maps(4, (6, 5), 2))
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(0), torch.ones(image.shape[-2:]), rtol=0, atol=1e-5)


def test_what_is_left_out_is_carried_as_its_sum_would_be():
    S, scores = pixel_transition(picture(20, 24), at_its_own_size(20, 24, **NEAR)), maps(5, (6, 5), 4)
    remainder = S.carry(scores[2:].sum(0, keepdim=True))
    torch.testing.assert_close(S.carry(scores[:2]).sum(0) + remainder[0], torch.ones(20, 24), rtol=0, atol=1e-5)


def test_maps_of_another_grid_are_upsampled_bilinearly_first():
    image, scores = image_of(9, 13, 0, 0.05), maps(2, (4, 5), 1)
    planes = np.stack([slow_bilinear(plane, (9, 13)) for plane in scores.double().numpy()])
    still = pixel_transition(image, EdgesConfig(edge_steps=0))
    np.testing.assert_allclose(still.carry(scores), planes, rtol=0, atol=1e-6)
    colours = image[0].double().numpy()
    far, near = (reference.pixel_transition(colours, *what, SELF) for what in (([2], 5.0), ([1], 10.0)))
    moved = pixel_transition(image, at_its_own_size(9, 13, edge_steps=1, edge_distances=(2,), edge_sigma=5.0))
    np.testing.assert_allclose(
        moved.carry(scores).flatten(1), planes.reshape(2, -1) @ far.T @ near.T @ near.T, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("size", "longest"), [((12, 16), 8), ((11, 7), 5), ((5, 9), 9)])
def test_a_larger_image_is_averaged_down_to_the_working_size(size, longest):
    image = image_of(*size, 3, 0.2)
    S = pixel_transition(image, EdgesConfig(edge_size=longest, **NEAR))
    small = torch.from_numpy(reference.shrunk(image[0].double().numpy(), S.size)).float()[None]
    torch.testing.assert_close(
        weights(S), weights(pixel_transition(small, at_its_own_size(*S.size, **NEAR))), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ((480, 640), (240, 320)),
        ((1080, 1920), (180, 320)),
        ((2160, 3840), (180, 320)),
        ((640, 480), (320, 240)),
        ((100, 90), (100, 90)),
        ((1, 5000), (1, 320)),
    ],
)
def test_large_images_share_one_working_size(size, found):
    assert working_size(size, 320) == found


def test_a_smaller_image_has_distances_in_proportion():
    image = picture(30, 40)
    S = pixel_transition(image, EdgesConfig(edge_size=320, edge_distances=(3, 16, 40)))
    T = pixel_transition(image, at_its_own_size(30, 40, edge_distances=(1, 2, 5)))
    assert torch.equal(S.stencils[0].neighbours, T.stencils[0].neighbours)
    assert torch.equal(weights(S), weights(T))


def test_colours_are_cielab():
    colours = np.random.default_rng(0).random((50, 3), dtype=np.float32)
    found = lab(torch.from_numpy(colours).T).T.numpy()
    np.testing.assert_allclose(found, [reference.lab(x) for x in colours.astype(float)], rtol=0, atol=1e-3)
    # OpenCV interpolates in a table of its own: up to 0.25 away from the formula
    np.testing.assert_allclose(found, cv2.cvtColor(colours[None], cv2.COLOR_RGB2LAB)[0], rtol=0, atol=0.4)
    ends = lab(torch.tensor([[0.0, 1], [0, 1], [0, 1]]))
    torch.testing.assert_close(ends, torch.tensor([[0.0, 100], [0, 0], [0, 0]]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("edges", ["pixels", "pamr"])
def test_maps_do_not_cross_an_edge_and_spread_on_either_side(edges):
    image = torch.zeros((1, 3, 48, 96))
    image[..., 48:] = 1
    scores = torch.zeros((2, 48, 96))
    scores[0, :, :44] = scores[1, :, 44:] = 1  # the outline lies 4 pixels too far to the left
    found = pixel_transition(image, EdgesConfig(edges, edge_steps=8)).carry(scores)
    assert found.argmax(0)[:, :48].eq(0).all()
    assert found.argmax(0)[:, 48:].eq(1).all()


def test_a_pixel_like_none_of_its_neighbours_keeps_its_value():
    image = torch.zeros((1, 3, 9, 9))
    image[..., 4, 4] = 1
    scores = torch.zeros((2, 9, 9))
    scores[0] = 1
    scores[:, 4, 4] = torch.tensor([0.0, 1.0])
    found = pixel_transition(image, at_its_own_size(9, 9, **NEAR)).carry(scores)
    torch.testing.assert_close(found, scores, rtol=0, atol=1e-6)


def ladder(rows, columns):
    """A ladder of bars 6 pixels wide on a wall: image [1, 3, rows, columns], and where it is bool [rows, columns]."""
    there = torch.zeros((rows, columns), dtype=torch.bool)
    there[10:-10, 30:36] = there[10:-10, 58:64] = True
    for top in range(18, rows - 20, 24):
        there[top : top + 6, 30:64] = True
    wall, bars = torch.tensor([0.75, 0.72, 0.65]), torch.tensor([0.45, 0.3, 0.15])
    image = torch.where(there, bars[:, None, None], wall[:, None, None])
    noise = torch.randn((3, rows, columns), generator=torch.Generator().manual_seed(0))
    return (image + 0.015 * noise).clamp(0, 1)[None], there


def test_holes_of_a_ladder_are_not_filled_but_opened():
    image, there = ladder(240, 320)
    bars = there[None, None].float()
    coarse = torch.nn.functional.interpolate(bars, (18, 24), mode="area")[0]  # tokens of 13 pixels: the holes blur away
    coarse = torch.cat((0.15 + 0.85 * coarse, 0.85 - 0.85 * coarse))
    before = pixel_transition(image, EdgesConfig(edge_steps=0)).carry(coarse).argmax(0) == 0
    after = pixel_transition(image, EdgesConfig()).carry(coarse).argmax(0) == 0
    holes = torch.zeros_like(there)
    holes[18 : there.nonzero()[:, 0].max(), 36:58] = True
    holes &= ~there
    assert (after & holes).sum() < 0.5 * (before & holes).sum()
    assert (after & there).sum() >= (before & there).sum()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"edges": "crf"}, "edges 'crf' is unknown; choose one of none, pixels, pamr"),
        ({"edge_steps": -1}, "edge_steps is -1"),
        ({"edge_steps": 2.0}, "edge_steps is 2.0"),
        ({"edge_distances": ()}, r"edge_distances is \[\]"),
        ({"edge_distances": (0, 8)}, r"edge_distances is \[0, 8\]"),
        ({"edge_distances": (4, True)}, r"edge_distances is \[4, True\]"),
        ({"edge_sigma": 0.0}, "edge_sigma is 0.0"),
        ({"edge_sigma": float("nan")}, "edge_sigma is nan"),
        ({"edge_size": 0}, "edge_size is 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_by_name(change, said):
    with pytest.raises(ValueError, match=said):
        EdgesConfig(**change)


def test_edges_names_what_there_is():
    assert tuple(EDGES) == ("none", "pixels", "pamr")
    assert pixel_transition(picture(8, 8), EdgesConfig("none")) is None


@settings(max_examples=25)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([[1], [8, 16], [1, 2], [3]]),
    st.integers(0, 99),
)
def test_pamr_is_its_equations_pixel_by_pixel(height, width, queries, steps, dilations, seed):
    image, scores = image_of(height, width, seed), maps(queries, (height, width), seed + 1)
    found = pamr(image, scores, steps=steps, dilations=dilations)
    wanted = reference.pamr(image[0].double().numpy(), scores.double().numpy(), steps, dilations)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_pamr_resizes_scores_bilinearly_first():
    image, scores = image_of(9, 13, 0), maps(2, (4, 5), 1)
    planes = np.stack([slow_bilinear(plane, (9, 13)) for plane in scores.double().numpy()])
    np.testing.assert_allclose(pamr(image, scores, steps=0), planes, rtol=0, atol=1e-6)
    wanted = reference.pamr(image[0].double().numpy(), planes, 2, [8, 16])
    np.testing.assert_allclose(pamr(image, scores, steps=2), wanted, rtol=0, atol=1e-5)


def test_pamr_takes_ten_steps_at_8_and_16_pixels_unasked():
    image, scores = picture(30, 40), maps(3, (8, 8), 0)
    assert torch.equal(pamr(image, scores), pamr(image, scores, steps=10, dilations=(8, 16)))
    assert torch.equal(pamr(image, scores), pixel_transition(image, EdgesConfig("pamr")).carry(scores))


@pytest.mark.parametrize(("size", "result"), [((30, 90), (20, 60)), ((90, 30), (60, 20)), ((60, 40), (60, 40))])
def test_pamr_works_on_a_larger_image_at_a_bounded_size(size, result):
    found = pamr(picture(*size), maps(2, (5, 5), 0), longest=60)
    assert tuple(found.shape) == (2, *result)


@pytest.mark.parametrize("image", [torch.full((1, 3, 20, 24), 0.5), picture(20, 24), torch.zeros((1, 3, 1, 1))])
def test_pamr_keeps_distributions(image):
    found = pamr(image, maps(4, (6, 5), 2))
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(0), torch.ones(image.shape[-2:]), rtol=0, atol=1e-5)


def test_pamr_does_not_cross_an_edge_and_spreads_on_either_side():
    image = torch.zeros((1, 3, 32, 64))
    image[..., 32:] = 1
    scores = torch.zeros((2, 32, 64))
    scores[0, :, :32] = scores[1, :, 32:] = 1
    scores[:, 12:20, 10:14] = scores[:, 12:20, 10:14].flip(0)  # a wrong spot on the left
    found = pamr(image, scores, dilations=(4, 8))
    assert found.argmax(0)[:, :32].eq(0).all()
    assert found.argmax(0)[:, 32:].eq(1).all()


def test_the_scale_of_the_colours_does_not_matter_to_pamr():
    image, scores = picture(24, 30), maps(2, (6, 6), 3)
    torch.testing.assert_close(pamr(image, scores), pamr(255 * image - 100, scores), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": torch.zeros((3, 8, 8))}, "image must be"),
        ({"scores": torch.zeros((8, 8))}, "scores must be"),
        ({"scores": torch.zeros((0, 8, 8))}, "scores must be"),
        ({"steps": -1}, "steps is -1"),
        ({"dilations": ()}, "dilations are"),
        ({"dilations": (0, 8)}, r"\[0, 8\]"),
        ({"longest": 0}, "longest is 0"),
    ],
    ids=str,
)
def test_what_pamr_cannot_do_is_refused_by_name(change, said):
    arguments = {"image": image_of(8, 8, 0), "scores": maps(2, (8, 8), 0)} | change
    with pytest.raises(ValueError, match=said):
        pamr(**arguments)


def test_no_lattice_of_specks_is_left_where_a_label_gives_way():
    """Neighbours at 4 and 16 pixels alone would part an even surface into lattices that never meet."""
    image = 0.5 + 0.03 * torch.randn((1, 3, 96, 128), generator=torch.Generator().manual_seed(0))
    scores = 0.5 + 0.05 * torch.randn((1, 96, 128), generator=torch.Generator().manual_seed(1))
    scores[0, 30:60, 40:90] += 0.4
    S = pixel_transition(image.clamp(0, 1), EdgesConfig(edge_size=128))
    coarse, fine = dataclasses.replace(S, stencils=S.stencils[:1]), S
    parts = [
        cv2.connectedComponents((of.carry(scores)[0] > 0.6).numpy().astype(np.uint8), connectivity=4)[0]
        for of in (coarse, fine)
    ]
    assert parts[1] <= max(2, parts[0] // 3)
