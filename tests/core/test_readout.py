"""P -> labels, confidence, presence: against a reference that visits every pixel, and the description of each class."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nerve_core import readout
from nerve_core.readout import Readout, ReadoutConfig, carry_labels, describe_classes, presence, read_out
from nerve_core.walk.edges import EdgesConfig, pixel_transition
from small_models import picture, slow_bilinear


def probabilities(tokens, queries, seed, sharpness=3.0):
    """Rows that are distributions, float32 [tokens, queries]."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn((tokens, queries), generator=generator)).softmax(-1)


def slow_read_out(G, P, classes, names, grid, size, config):
    """Labels, confidence in 255ths (not rounded), presence, peak, and how clear each pixel's choice is, by loops."""
    G, P = G.double().numpy(), P.double().numpy()
    queries = P.shape[1]
    found = [(G[:, q].max() + P[:, q].max()) / 2 for q in range(queries)]
    present, peak = np.zeros(names), np.zeros(names)
    for q, label in enumerate(classes):
        if label:
            present[label - 1] = max(present[label - 1], found[q])
            peak[label - 1] = max(peak[label - 1], P[:, q].max())
    scores = P
    if config.readout == "presence_minmax":
        scores = np.stack(
            [(P[:, q] - P[:, q].min()) / (P[:, q].max() - P[:, q].min()) * found[q] for q in range(queries)], 1
        )
    elif config.readout == "presence_max":
        scores = np.stack([P[:, q] / P[:, q].max() * found[q] for q in range(queries)], 1)
    elif config.readout == "minmax":
        scores = np.stack([(P[:, q] - P[:, q].min()) / (P[:, q].max() - P[:, q].min()) for q in range(queries)], 1)
    if config.readout in ("presence_max", "minmax"):  # only what was found competes
        for q, label in enumerate(classes):
            if label == 0 or present[label - 1] < config.presence_threshold:
                scores[:, q] = 0
    planes = np.stack([slow_bilinear(scores[:, q].reshape(grid), size) for q in range(queries)])
    labels, sure, clear = (np.zeros(size) for _ in range(3))
    for row, column in np.ndindex(*size):
        of_label = np.full(names + 1, -1.0)  # the best query of the background and of every class
        for q, label in enumerate(classes):
            of_label[label] = max(of_label[label], planes[q, row, column])
        order = np.sort(of_label)[::-1]
        label, best = int(of_label.argmax()), order[0]
        sure[row, column] = best * 255
        clear[row, column] = abs(best - config.threshold)
        if best >= config.threshold and names:
            clear[row, column] = min(clear[row, column], best - order[1])
        if best < config.threshold or (label and present[label - 1] < config.presence_threshold):
            label = 0
        labels[row, column] = label
    return labels, sure, present, peak, clear


def assert_as_slow(G, P, classes, names, grid, size, config):
    ours = read_out(G, P, torch.tensor(classes), names, grid, size, config)
    labels, sure, present, peak, clear = slow_read_out(G, P, classes, names, grid, size, config)
    assert ours.labels.dtype == ours.confidence.dtype == torch.uint8
    assert tuple(ours.labels.shape) == tuple(ours.confidence.shape) == size
    decided = clear > 1e-5
    assert decided.mean() > 0.9 or config.readout == "minmax"  # whose maps all have 0 and 1 somewhere
    np.testing.assert_array_equal(ours.labels.numpy()[decided], labels[decided])
    np.testing.assert_allclose(ours.confidence.numpy(), sure, rtol=0, atol=0.5 + 1e-3)  # rounded to the nearest
    np.testing.assert_allclose(ours.presence.numpy(), present, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.peak.numpy(), peak, rtol=0, atol=1e-6)
    assert_counted(ours, names)
    return ours


@given(seed=st.integers(0, 99), presence_minmax=st.booleans())
@settings(max_examples=25)
def test_a_class_map_is_its_best_querys_score_at_every_pixel_whatever_wins_there(seed, presence_minmax):
    grid, size, classes = (3, 4), (11, 9), [2, 1, 2, 0, 3]
    G, P = probabilities(12, 5, seed), probabilities(12, 5, seed + 1)
    config = ReadoutConfig(readout="presence_minmax" if presence_minmax else "argmax", threshold=0.5)
    read = read_out(G, P, torch.tensor(classes), 3, grid, size, config, maps=[[0, 2], [4]])
    plain = read_out(G, P, torch.tensor(classes), 3, grid, size, config)
    assert torch.equal(read.labels, plain.labels)
    assert torch.equal(read.confidence, plain.confidence)
    assert tuple(plain.maps.shape) == (0, *size)
    scores = P.double().numpy()
    if presence_minmax:
        found = (G.amax(0) + P.amax(0)).double().numpy() / 2
        scores = (scores - scores.min(0)) / (scores.max(0) - scores.min(0)) * found
    planes = np.stack([slow_bilinear(plane.reshape(grid), size) for plane in scores.T]) * 255
    wanted = np.stack([np.maximum(planes[0], planes[2]), planes[4]])
    np.testing.assert_allclose(read.maps.numpy(), wanted, rtol=0, atol=0.5 + 1e-3)
    for plane, label in zip(read.maps, (2, 3), strict=True):
        assert torch.equal(plane[read.labels == label], read.confidence[read.labels == label])


def assert_counted(read, names):
    """The counts of a readout are those of its labels and confidence, by loops."""
    labels, confidence = read.labels.numpy(), read.confidence.numpy()
    by_row, by_column = np.zeros((names + 1, len(labels))), np.zeros((names + 1, labels.shape[1]))
    certainty = np.zeros(names + 1)
    for (row, column), label in np.ndenumerate(labels):
        by_row[label, row] += 1
        by_column[label, column] += 1
        certainty[label] += confidence[row, column]
    np.testing.assert_array_equal(read.by_row, by_row)
    np.testing.assert_array_equal(read.by_column, by_column)
    np.testing.assert_array_equal(read.certainty, certainty)
    assert not any(count.is_floating_point() for count in (read.by_row, read.by_column, read.certainty))


@settings(max_examples=60)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    classes=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    threshold=st.sampled_from([0.0, 0.0, 0.35, 0.6, 1.0]),
    presence_threshold=st.sampled_from([0.0, 0.0, 0.5, 0.8]),
    kind=st.sampled_from(["argmax", "argmax", "presence_minmax", "presence_max", "minmax"]),
    seed=st.integers(0, 99),
)
def test_every_pixel_is_read_as_by_a_loop_over_pixels(grid, size, classes, threshold, presence_threshold, kind, seed):
    tokens = grid[0] * grid[1]
    if kind.endswith("minmax") and (tokens == 1 or len(classes) == 1):
        kind = "argmax"  # a map of one value has no spread
    if kind in ("presence_max", "minmax"):
        threshold = min(threshold or 0.2, 0.9)  # 1 is what many a pixel has there
    if len(classes) == 1:
        threshold = min(threshold, 0.9)  # of one query every probability is 1
    G, P = (probabilities(tokens, len(classes), seed + k) for k in (0, 1000))
    config = ReadoutConfig(kind, threshold, presence_threshold)
    assert_as_slow(G, P, classes, 3, grid, size, config)


@pytest.mark.parametrize("band", [1, 100, 1000])
@pytest.mark.parametrize(("grid", "size"), [((5, 7), (31, 17)), ((9, 3), (4, 5)), ((1, 4), (13, 6)), ((6, 6), (1, 9))])
def test_reading_in_bands_of_rows_equals_reading_the_whole(monkeypatch, grid, size, band):
    tokens, classes = grid[0] * grid[1], [1, 2, 2, 0]
    G, P = probabilities(tokens, 4, 0), probabilities(tokens, 4, 1)
    config = ReadoutConfig(threshold=0.4)
    whole = read_out(G, P, torch.tensor(classes), 2, grid, size, config)
    monkeypatch.setattr(readout, "_CPU_BAND_VALUES", band)
    seen = [(rows, scores.clone()) for rows, scores in readout._resized(P.T.unflatten(-1, grid), size)]
    assert [row for rows, _ in seen for row in range(size[0])[rows]] == list(range(size[0]))
    assert len(seen) == math.ceil(size[0] / max(1, min(size[0], band // (4 * size[1]))))
    planes = [slow_bilinear(P[:, q].double().numpy().reshape(grid), size) for q in range(4)]
    np.testing.assert_allclose(torch.cat([s for _, s in seen], 1).numpy(), np.stack(planes), rtol=0, atol=1e-6)
    banded = assert_as_slow(G, P, classes, 2, grid, size, config)
    assert torch.equal(banded.labels, whole.labels)
    assert (banded.confidence.int() - whole.confidence.int()).abs().max() <= 1


def test_a_large_image_with_many_names_is_never_held_whole():
    maps = torch.rand((255, 4, 4))
    bands = readout._resized(maps, (2000, 1500))
    rows, scores = next(bands)
    assert scores.numel() <= readout._CPU_BAND_VALUES
    assert rows.start == 0


def one_token(*values):
    return torch.tensor([values])


def read_one(P, classes, names, **config):
    """The label and the confidence of a picture of one token and one pixel."""
    found = read_out(P, P, torch.tensor(classes), names, (1, 1), (1, 1), ReadoutConfig(**config))
    return int(found.labels), int(found.confidence)


def test_a_winning_negative_is_background_with_its_own_probability():
    assert read_one(one_token(0.3, 0.1, 0.6), [1, 2, 0], 2) == (0, 153)
    assert read_one(one_token(0.3, 0.6, 0.1), [1, 2, 0], 2) == (2, 153)


def test_synonyms_are_merged_by_their_maximum_and_never_added():
    assert read_one(one_token(0.3, 0.3, 0.4), [1, 1, 2], 2) == (2, 102)
    assert read_one(one_token(0.2, 0.45, 0.35), [1, 1, 2], 2) == (1, 115)


def test_negatives_compete_one_by_one_and_never_as_a_sum():
    assert read_one(one_token(0.3, 0.3, 0.4), [0, 0, 1], 1) == (1, 102)


def test_under_the_threshold_is_background_and_at_it_is_not():
    assert read_one(one_token(0.5, 0.25, 0.25), [1, 2, 0], 2, threshold=0.5) == (1, 128)
    assert read_one(one_token(0.5, 0.25, 0.25), [1, 2, 0], 2, threshold=0.51) == (0, 128)
    assert read_one(one_token(0.5, 0.25, 0.25), [1, 2, 0], 2, threshold=0.0) == (1, 128)
    assert read_one(one_token(1.0, 0.0), [1, 0], 1, threshold=1.0) == (1, 255)


def test_a_class_under_the_presence_threshold_is_nowhere_and_its_pixels_are_background():
    G = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3]])
    P = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    assert torch.allclose(presence(G, P), torch.tensor([0.8, 0.55, 0.3]))  # mean of the maxima before and after

    def labels(**config):
        return read_out(G, P, torch.tensor([1, 2, 0]), 2, (1, 2), (1, 2), ReadoutConfig(**config)).labels.tolist()

    assert labels() == [[1, 2]]
    assert labels(presence_threshold=0.56) == [[1, 0]]
    assert labels(presence_threshold=0.54) == [[1, 2]]
    assert labels(presence_threshold=0.81) == [[0, 0]]
    half = torch.tensor([[0.5, 0.25, 0.25]])
    assert read_one(half, [1, 2, 0], 2, presence_threshold=0.5) == (1, 128)  # at the threshold is not under it


def test_of_equals_the_first_name_wins_and_background_last():
    assert read_one(one_token(0.4, 0.4, 0.2), [1, 2, 0], 2) == (1, 102)
    assert read_one(one_token(0.4, 0.2, 0.4), [0, 1, 2], 2) == (2, 102)
    assert read_one(one_token(0.4, 0.2, 0.4), [2, 1, 0], 2) == (2, 102)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reading_never_waits_for_the_device_and_reads_the_same_there():
    G, P, classes = probabilities(12, 4, 0), probabilities(12, 4, 1), torch.tensor([1, 2, 2, 0])
    config = ReadoutConfig(threshold=0.4, presence_threshold=0.1)
    there = [x.cuda() for x in (G, P, classes)]
    read_out(*there, 2, (3, 4), (31, 17), config)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = read_out(*there, 2, (3, 4), (31, 17), config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here = read_out(G, P, classes, 2, (3, 4), (31, 17), config)
    assert (found.labels.cpu() != here.labels).float().mean() < 0.01
    assert_counted(Readout(*(getattr(found, field.name).cpu() for field in dataclasses.fields(found))), 2)


def test_presence_of_a_class_is_its_best_synonyms():
    P = torch.tensor([[0.6, 0.4], [0.1, 0.9]])
    found = read_out(P, P, torch.tensor([1, 1]), 1, (1, 2), (1, 2), ReadoutConfig(presence_threshold=0.85))
    assert found.labels.tolist() == [[1, 1]]
    assert found.presence.tolist() == pytest.approx([0.9])


def test_confidence_is_linear_in_255ths_and_rounded():
    P = torch.stack([torch.linspace(0.5, 1, 128), 1 - torch.linspace(0.5, 1, 128)], 1)
    found = read_out(P, P, torch.tensor([1, 0]), 1, (1, 128), (1, 128), ReadoutConfig())
    expected = np.floor(np.linspace(0.5, 1, 128) * 255 + 0.5)
    assert np.abs(found.confidence.numpy()[0] - expected).max() <= 1
    assert found.confidence[0, 0] == 128
    assert found.confidence[0, -1] == 255


def test_254_names_have_254_labels():
    tokens = 255
    P = torch.full((tokens, 255), 0.001)
    P[torch.arange(tokens), torch.arange(tokens)] = 0.7
    classes = torch.tensor([*range(1, 255), 0])
    found = read_out(P, P, classes, 254, (1, tokens), (1, tokens), ReadoutConfig())
    assert found.labels[0].tolist() == [*range(1, 255), 0]
    assert found.presence.shape == found.peak.shape == (254,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.labels = None


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 5), (97, 101)])
def test_every_image_size_is_read(size):
    G, P = probabilities(12, 3, 0), probabilities(12, 3, 1)
    assert_as_slow(G, P, [1, 2, 0], 2, (3, 4), size, ReadoutConfig(threshold=0.5))


def test_presence_minmax_stretches_each_map_and_weighs_it_by_presence():
    # the first query is weak everywhere but present in one place; argmax alone never sees it
    P = torch.tensor([[0.31, 0.69], [0.05, 0.95]])
    config = ReadoutConfig("presence_minmax")
    found = read_out(P, P, torch.tensor([1, 2]), 2, (1, 2), (1, 2), config)
    assert found.labels.tolist() == [[1, 2]]
    assert found.confidence.tolist() == [[79, 242]]
    assert found.peak.tolist() == pytest.approx([0.31, 0.95])  # still the probabilities


def test_presence_minmax_of_a_flat_map_is_zero_and_never_wins():
    P = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.1, 0.4]])
    found = read_out(P, P, torch.tensor([1, 2, 0]), 2, (1, 2), (1, 2), ReadoutConfig("presence_minmax"))
    assert found.labels.tolist() == [[2, 0]]
    assert found.confidence.tolist() == [[128, 102]]
    flat = torch.full((4, 2), 0.5)
    nothing = read_out(flat, flat, torch.tensor([1, 0]), 1, (2, 2), (3, 3), ReadoutConfig("presence_minmax"))
    assert nothing.confidence.tolist() == [[0] * 3] * 3


@pytest.mark.parametrize(
    ("kind", "labels", "confidence"),
    [("presence_max", [2, 0, 1], [51, 38, 102]), ("minmax", [2, 2, 1], [255, 128, 255])],
)
def test_as_cliper_reads_its_maps_neither_negatives_nor_what_was_not_found_stand_in_the_way(kind, labels, confidence):
    P = torch.tensor([[0.10, 0.20, 0.70, 0.00], [0.05, 0.15, 0.75, 0.05], [0.40, 0.10, 0.50, 0.00]])
    classes = torch.tensor([1, 2, 0, 3])
    config = ReadoutConfig(kind, threshold=0.19, presence_threshold=0.1)
    read = read_out(P, P, classes, 3, (1, 3), (1, 3), config)
    assert read.labels.tolist() == [labels]
    assert read.confidence.tolist() == [confidence]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"readout": "max"}, "choose one of argmax, presence_minmax, presence_max, minmax"),
        ({"readout": "minmax"}, "'minmax' knows background by threshold alone; set one above 0"),
        ({"readout": "presence_max", "presence_threshold": 0.5}, "set one above 0"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": 1.1}, "0..1"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"presence_threshold": 2}, "presence_threshold is 2"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused_by_name(change, said):
    with pytest.raises(ValueError, match=said):
        ReadoutConfig(**change)


# --- the description of each class ------------------------------------------------------------------------------------


def described(labels, confidence, present, peak):
    """A readout of these labels and this confidence."""
    count = len(present) + 1
    by_row = np.stack([(labels == label).sum(1) for label in range(count)])
    by_column = np.stack([(labels == label).sum(0) for label in range(count)])
    certainty = np.array([confidence[labels == label].sum(dtype=np.int64) for label in range(count)])
    tensors = (torch.from_numpy(x) for x in (labels, confidence))
    counts = (torch.from_numpy(x) for x in (by_row.astype(np.int32), by_column.astype(np.int32), certainty))
    return Readout(*tensors, present, peak, *counts, maps=torch.empty(0))


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    count=st.integers(1, 5),
    top=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_a_class_is_described_as_by_looking_at_its_pixels(size, count, top, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, min(top, count) + 1, size, dtype=np.uint8)
    confidence = rng.integers(0, 256, size, dtype=np.uint8)
    present, peak = torch.from_numpy(rng.random((2, count), dtype=np.float32))
    names = tuple(f"thing {k}" for k in range(count))
    found = describe_classes(names, described(labels, confidence, present, peak))
    assert [item.name for item in found] == list(names)
    assert [item.label for item in found] == list(range(1, count + 1))
    for item in found:
        rows, columns = np.nonzero(labels == item.label)
        assert item.area == len(rows)
        assert item.presence == pytest.approx(float(present[item.label - 1]))
        assert item.peak_probability == pytest.approx(float(peak[item.label - 1]))
        if len(rows) == 0:
            assert item.box is None
            assert item.centroid is None
            assert item.mean_probability == 0
            continue
        left, top_row, width, height = item.box
        assert (left, top_row) == (columns.min(), rows.min())
        assert (left + width - 1, top_row + height - 1) == (columns.max(), rows.max())
        assert item.centroid == pytest.approx((columns.mean(), rows.mean()))
        assert item.mean_probability == pytest.approx(confidence[rows, columns].mean() / 255)
        assert all(type(value) is int for value in (item.area, item.label, *item.box))
        assert all(type(value) is float for value in (item.presence, item.mean_probability, *item.centroid))


def test_a_description_of_254_classes_counts_every_pixel_once():
    labels = np.arange(255, dtype=np.uint8).reshape(15, 17)
    read = described(labels, labels, torch.full((254,), 1.0000001), torch.ones(254))
    found = describe_classes(tuple(f"thing {k}" for k in range(254)), read)
    assert [item.area for item in found] == [1] * 254
    assert found[253].box == (16, 14, 1, 1)
    assert found[253].mean_probability == pytest.approx(254 / 255)
    assert max(item.presence for item in found) == 1  # rounding above 1 is cut


# --- along the image's own pixels ---------------------------------------------------------------------------

READOUTS_OF_ALL_KINDS = [
    ReadoutConfig(),
    ReadoutConfig(threshold=0.4, presence_threshold=0.5),
    ReadoutConfig("presence_minmax", presence_threshold=0.5),
    ReadoutConfig("presence_max", threshold=0.2),
    ReadoutConfig("minmax", threshold=0.5),
]


def drawn_and_read(G, P, classes, names, grid, size, config, maps=(), **edges):
    """Labels carried along a made-up picture's pixels and read; the label maps, and what was read."""
    of = torch.tensor(classes)
    along = pixel_transition(
        picture(*size), EdgesConfig(**{"edge_size": max(size), "edge_steps": 3, "edge_distances": (1, 3), **edges})
    )
    drawn = carry_labels(G, P, of, names, grid, config, along, maps)
    return drawn, read_out(G, P, of, names, grid, size, config, [()] * len(maps), drawn)


@pytest.mark.parametrize("config", READOUTS_OF_ALL_KINDS, ids=str)
@given(seed=st.integers(0, 99))
@settings(max_examples=8)
def test_maps_that_were_carried_are_compared_in_place_of_the_tokens(config, seed):
    grid, size, classes = (4, 5), (13, 17), [2, 1, 2, 0, 3, 0]
    G, P = probabilities(20, 6, seed), probabilities(20, 6, seed + 1)
    drawn, read = drawn_and_read(G, P, classes, 3, grid, size, config)
    plain = read_out(G, P, torch.tensor(classes), 3, grid, size, config)
    planes = drawn.maps.double().numpy()  # of the image's own size: it is small
    assert planes.shape[1:] == size
    best = planes.max(0)
    np.testing.assert_allclose(read.confidence.numpy(), best * 255, rtol=0, atol=0.5 + 1e-3)
    labels = drawn.labels.numpy()[planes.argmax(0)]
    weak = [label for label in (1, 2, 3) if plain.presence[label - 1] < config.presence_threshold]
    labels[(best < config.threshold) | np.isin(labels, weak)] = 0
    ordered = np.sort(np.concatenate((planes, np.full((1, *size), -1.0))), 0)
    clear = (ordered[-1] - ordered[-2] > 1e-5) & (abs(best - config.threshold) > 1e-5)
    np.testing.assert_array_equal(read.labels.numpy()[clear], labels[clear])
    assert torch.equal(read.presence, plain.presence)  # as it is defined: before
    assert_counted(read, 3)


@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from(READOUTS_OF_ALL_KINDS[:2]))
@settings(max_examples=25)
def test_names_that_win_nowhere_change_no_label_and_no_confidence(seed, more, config):
    grid, size, names = (4, 5), (13, 17), 3
    classes = [2, 1, 0, 3]
    G, P = probabilities(20, 4, seed), probabilities(20, 4, seed + 1)
    _, before = drawn_and_read(G, P, classes, names, grid, size, config)
    winners = P.amax(1, keepdim=True)
    losers = torch.rand((20, more), generator=torch.Generator().manual_seed(seed)) * 0.99 * winners
    many = (torch.cat((G, losers), 1), torch.cat((P, losers), 1), [*classes, *range(4, 4 + more)])
    drawn, after = drawn_and_read(*many, names + more, grid, size, config)
    assert len(drawn.maps) <= 4
    assert torch.equal(after.labels, before.labels)
    assert torch.equal(after.confidence, before.confidence)
    assert torch.equal(after.presence[:3], before.presence)


@given(seed=st.integers(0, 99))
@settings(max_examples=25)
def test_rows_stay_distributions_with_what_is_left_out_as_a_remainder(seed):
    G, P = probabilities(20, 9, seed), probabilities(20, 9, seed + 1)
    drawn, read = drawn_and_read(G, P, list(range(9)), 8, (4, 5), (13, 17), ReadoutConfig())
    assert (drawn.maps >= 0).all()
    assert (drawn.maps.sum(0) <= 1 + 1e-5).all()
    for label, plane in zip(drawn.labels.tolist(), drawn.maps, strict=True):
        if label:
            assert read.peak[label - 1] == plane.amax()
            assert plane.amax() <= P[:, label].amax() + 1e-6


def test_a_label_that_wins_nowhere_keeps_the_peak_that_it_has_on_the_tokens():
    P = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]])
    drawn, read = drawn_and_read(P, P, [1, 2, 0], 2, (1, 2), (2, 4), ReadoutConfig(), edge_sigma=100.0)
    assert drawn.labels.tolist() == [1]
    assert read.peak[1] == pytest.approx(0.3)
    assert read.peak[0] < 0.6
    assert set(read.labels.unique().tolist()) == {1}


def test_maps_that_are_asked_for_are_carried_too_and_change_nothing_else():
    grid, size, classes = (4, 5), (13, 17), [1, 2, 3, 0, 2]
    G, P = probabilities(20, 5, 0), probabilities(20, 5, 1)
    P[:, 2] = 0.05 * P[:, [0, 1, 3, 4]].amax(1)  # wins nowhere
    plain, without = drawn_and_read(G, P, classes, 3, grid, size, ReadoutConfig())
    assert 3 not in plain.labels
    drawn, read = drawn_and_read(G, P, classes, 3, grid, size, ReadoutConfig(), maps=(3, 2, 3))
    assert torch.equal(drawn.maps, plain.maps)
    assert torch.equal(read.labels, without.labels)
    assert torch.equal(read.confidence, without.confidence)
    along = pixel_transition(picture(*size), EdgesConfig(edge_size=17, edge_steps=3, edge_distances=(1, 3)))
    wanted = along.carry(torch.stack((P[:, 2], P[:, [1, 4]].amax(1))).unflatten(1, grid))[[0, 1, 0]]
    np.testing.assert_allclose(read.maps.numpy(), 255 * wanted.numpy(), rtol=0, atol=0.5 + 1e-3)
    assert torch.equal(read.maps[1][read.labels == 2], read.confidence[read.labels == 2])


def test_of_nothing_that_competes_everything_is_background():
    P = torch.full((4, 2), 0.5)
    config = ReadoutConfig("presence_max", threshold=0.5, presence_threshold=1.0)
    assert drawn_and_read(P, P, [1, 0], 1, (2, 2), (6, 5), config)[1].labels.eq(0).all()


class _Largest(TorchDispatchMode):
    """Keeps the greatest number of floating-point values that any operation returned."""

    values = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.values = max(self.values, x.numel())
        return result


@pytest.mark.parametrize("names", [6, 60])
def test_no_labels_are_held_as_numbers_at_the_size_of_the_image(names):
    size, grid = (1080, 1920), (36, 48)
    winning = probabilities(grid[0] * grid[1], 6, 0)  # five names and the background
    G = P = torch.cat((winning, torch.full((len(winning), names - 5), 1e-3)), 1)
    classes = torch.arange(names + 1)
    along = pixel_transition(picture(*size), EdgesConfig())
    with _Largest() as largest:
        drawn = carry_labels(G, P, classes, names, grid, ReadoutConfig(), along)
        read = read_out(G, P, classes, names, grid, size, ReadoutConfig(), drawn=drawn)
    assert len(drawn.maps) == 6
    assert tuple(read.labels.shape) == size
    assert largest.values <= size[0] * size[1]  # one plane, not one a label
