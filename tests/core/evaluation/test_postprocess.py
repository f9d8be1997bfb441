"""Pixel-adaptive refinement against loops over pixels in float64, and what it must keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from nerve_core.evaluation.postprocess import POST, pamr
from small_models import picture, slow_bilinear


def maps(queries, size, seed):
    """Distributions over queries at every place, [queries, *size]."""
    return (2 * torch.randn((queries, *size), generator=torch.Generator().manual_seed(seed))).softmax(0)


def image_of(height, width, seed):
    return torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([[1], [8, 16], [1, 2], [3]]),
    st.integers(0, 99),
)
def test_it_is_its_equations_pixel_by_pixel(height, width, queries, steps, dilations, seed):
    image, scores = image_of(height, width, seed), maps(queries, (height, width), seed + 1)
    found = pamr(image, scores, steps=steps, dilations=dilations)
    wanted = reference.pamr(image[0].double().numpy(), scores.double().numpy(), steps, dilations)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_scores_of_another_size_are_resized_bilinearly_first():
    image, scores = image_of(9, 13, 0), maps(2, (4, 5), 1)
    planes = np.stack([slow_bilinear(plane, (9, 13)) for plane in scores.double().numpy()])
    np.testing.assert_allclose(pamr(image, scores, steps=0), planes, rtol=0, atol=1e-6)
    wanted = reference.pamr(image[0].double().numpy(), planes, 2, [8, 16])
    np.testing.assert_allclose(pamr(image, scores, steps=2), wanted, rtol=0, atol=1e-5)


def test_ten_steps_at_8_and_16_pixels_are_what_it_does_unasked():
    image, scores = picture(30, 40), maps(3, (8, 8), 0)
    assert torch.equal(pamr(image, scores), pamr(image, scores, steps=10, dilations=(8, 16)))


@pytest.mark.parametrize(("size", "result"), [((30, 90), (20, 60)), ((90, 30), (60, 20)), ((60, 40), (60, 40))])
def test_a_larger_image_is_worked_on_at_a_bounded_size(size, result):
    found = pamr(picture(*size), maps(2, (5, 5), 0), longest=60)
    assert tuple(found.shape) == (2, *result)


@pytest.mark.parametrize("image", [torch.full((1, 3, 20, 24), 0.5), picture(20, 24), torch.zeros((1, 3, 1, 1))])
def test_distributions_stay_distributions(image):
    found = pamr(image, maps(4, (6, 5), 2))
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(0), torch.ones(image.shape[-2:]), rtol=0, atol=1e-5)


def test_scores_do_not_cross_an_edge_and_spread_on_either_side():
    image = torch.zeros((1, 3, 32, 64))
    image[..., 32:] = 1
    scores = torch.zeros((2, 32, 64))
    scores[0, :, :32] = scores[1, :, 32:] = 1
    scores[:, 12:20, 10:14] = scores[:, 12:20, 10:14].flip(0)  # a wrong spot on the left
    found = pamr(image, scores, dilations=(4, 8))
    assert found.argmax(0)[:, :32].eq(0).all()
    assert found.argmax(0)[:, 32:].eq(1).all()


def test_the_scale_of_the_colours_does_not_matter():
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
def test_what_cannot_be_done_is_refused_by_name(change, said):
    arguments = {"image": image_of(8, 8, 0), "scores": maps(2, (8, 8), 0)} | change
    with pytest.raises(ValueError, match=said):
        pamr(**arguments)


def test_post_names_what_there_is():
    assert POST == ("none", "pamr")
