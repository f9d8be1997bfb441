"""Labels -> pictures: colours, overlays, legends; no name, label or size makes them fail."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nerve_core.images.visualize import _printable, contact_sheet, overlay, palette


def image_of(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_every_label_has_a_colour_and_the_first_twenty_are_far_apart():
    colours = palette()
    assert colours.shape == (256, 3)
    assert colours.dtype == np.uint8
    assert colours[0].tolist() == [0, 0, 0]
    assert len(set(colours[255].tolist())) == 1  # grey
    first = colours[1:21].astype(int)
    for one, other in itertools.combinations(first, 2):
        assert np.abs(one - other).sum() >= 40
    for one, other in itertools.pairwise(colours[1:255].astype(int)):
        assert np.abs(one - other).sum() >= 150  # neighbours in number
    assert len({tuple(colour) for colour in colours}) == 256
    assert (colours[1:].max(1) >= 90).all()  # none as dark as the background


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 60)),
    labels=st.integers(0, 254),
    names=st.lists(st.text(max_size=40), min_size=0, max_size=254),
    legend=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_size_labels_and_names_make_a_picture_of_the_images_size(size, labels, names, legend, seed):
    image = image_of(size, seed)
    mask = np.random.default_rng(seed).integers(0, labels + 1, size, dtype=np.uint8)
    before = image.copy(), mask.copy()
    drawn = overlay(image, mask, names, legend=legend)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (image == before[0]).all()
    assert (mask == before[1]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (7, 5), (480, 640)])
@pytest.mark.parametrize(
    "names",
    [["ball"] * 254, ["منضدة", "机器人", "👩\u200d🚀", "é" * 128] * 60, ["x" * 128] * 254, ["\x00%s{}\n"] * 254],
    ids=["plain", "unicode", "long", "odd"],
)
def test_254_labels_with_any_names_fit_any_picture(size, names):
    mask = (np.arange(size[0] * size[1]) % 255).reshape(size).astype(np.uint8)
    assert overlay(image_of(size), mask, names).shape == (*size, 3)


def test_background_stays_as_it_is_and_the_inside_of_a_label_is_mixed():
    image, mask = image_of((40, 60)), np.zeros((40, 60), np.uint8)
    assert (overlay(image, mask, ["ball"]) == image).all()
    mask[10:30, 20:40] = 1
    drawn = overlay(image, mask, ["ball"], legend=False, alpha=0.25)
    assert (drawn[mask == 0] == image[mask == 0]).all()
    inside = np.s_[12:28, 22:38]
    mixed = 0.75 * image[inside].astype(float) + 0.25 * palette()[1].astype(float)
    assert np.abs(drawn[inside] - mixed).max() <= 1
    outline = mask.astype(bool)
    outline[11:29, 21:39] = False
    assert (drawn[outline] == 255).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_goes_from_the_image_alone_to_the_colours_alone(alpha):
    image, mask = image_of((20, 20)), np.full((20, 20), 7, np.uint8)
    drawn = overlay(image, mask, [], alpha=alpha)
    assert (drawn == (image if alpha == 0 else palette()[7])).all()


def test_unlabelled_pixels_are_grey_and_have_no_entry_in_the_legend():
    image, mask = image_of((60, 60)), np.full((60, 60), 255, np.uint8)
    drawn = overlay(image, mask, ["ball"] * 254, alpha=1.0)
    assert (drawn == palette()[255]).all()


def test_the_legend_shows_the_colours_of_what_is_there_alone():
    image = np.full((480, 640, 3), 200, np.uint8)
    mask = np.zeros((480, 640), np.uint8)
    mask[400:, 500:] = 3
    drawn = overlay(image, mask, ["ball", "cube", "cone"])
    corner = drawn[:200, :300].reshape(-1, 3).tolist()
    assert palette()[3].tolist() in corner
    assert palette()[1].tolist() not in corner
    assert max(min(pixel) for pixel in corner) > 220  # the text, on what was 200
    without = overlay(image, mask, ["ball", "cube", "cone"], legend=False)
    assert (without[:200, :300] == 200).all()
    beyond = overlay(image, mask, ["ball"])  # a label that has no name has no entry
    assert (beyond[:200, :300] == 200).all()


def test_a_legend_shortens_names_and_marks_what_its_font_lacks():
    assert _printable("ball") == "ball"
    assert _printable("é机") == "??"  # one mark a letter, not one a byte
    assert _printable("x" * 24) == "x" * 24
    assert _printable("x" * 25) == "x" * 23 + "~"


@pytest.mark.parametrize("layout", ["reversed", "read-only", "transposed"])
def test_any_memory_layout_is_drawn_on_the_same(layout):
    image, mask = image_of((30, 30)), np.zeros((30, 30), np.uint8)
    mask[5:20, 5:25] = 2
    expected = overlay(image, mask, ["a", "b"])
    if layout == "reversed":
        image, mask = image[:, :, ::-1].copy()[:, :, ::-1], mask[::-1].copy()[::-1]
    elif layout == "transposed":
        image, mask = np.asfortranarray(image), np.asfortranarray(mask)
    else:
        image.flags.writeable = mask.flags.writeable = False
    assert (overlay(image, mask, ["a", "b"]) == expected).all()


def test_sizes_that_differ_are_refused_with_both():
    with pytest.raises(ValueError, match="image is 6 x 4, labels are 5 x 4"):
        overlay(image_of((4, 6)), np.zeros((4, 5), np.uint8), [])


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_a_contact_sheet_has_every_picture_in_rows(count):
    pictures = [np.full((48, 64, 3), 10 * (k + 1), np.uint8) for k in range(count)]
    sheet = contact_sheet(pictures, columns=4, width=32)
    assert sheet.shape == (24 * -(-count // 4), 32 * 4, 3)
    for k in range(count):
        row, column = divmod(k, 4)
        assert sheet[row * 24 + 12, column * 32 + 16].tolist() == [10 * (k + 1)] * 3


def test_a_contact_sheet_takes_pictures_of_any_shape_and_refuses_none():
    assert contact_sheet([image_of((1, 2000)), image_of((9, 9))], columns=2, width=20).shape == (1, 40, 3)
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
