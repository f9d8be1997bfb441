"""The embedded pair through its CUDA path, on a stand-in for CUDA: masks as on the CPU, no race, one wait a frame.

No GPU takes part. What the stand-in checks, and what it cannot, is in emulated_cuda.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging

import pytest
import torch

from emulated_cuda import emulated_cuda
from nerve_benchmarks.checks import _synchronisations
from nerve_core import Segmenter, Vocabulary
from nerve_core.embedded.scenes import draw_scene
from nerve_core.errors import OutOfMemory
from nerve_core.models.loading import load_clip
from nerve_core.models.pairs import find_pair
from nerve_core.networks.dense_clip import HEADS, ClipConfig, DenseClip
from nerve_core.networks.frame import GRAPH_AFTER, GRAPHS_KEPT, FramePart, Stopwatch
from nerve_core.readout import ReadoutConfig, carry_labels, read_out
from nerve_core.segmenter import find_device
from nerve_core.walk.edges import EdgesConfig, pixel_transition

# a fraction of the pair's tokens, heads and templates: the same path in a fraction of the time
SMALL = {"input_size": (64, 96), "taps": ((2, 0),), "short_side": 72, "templates": ("a {}.",)}
WHOLE = ("vanilla", "cliper")  # heads that are run as whole pairs; the others by themselves
NAMES = Vocabulary(["ball", "cube|box", "door", "mug", "plant", "chair"], negatives=["wall"])
AGREE = 0.998  # share of pixels with the label that the CPU gives in float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
ONE_WAIT = ["stream.synchronize"]


@pytest.fixture(scope="module")
def gpu():
    with emulated_cuda(2) as gpu:
        yield gpu


@pytest.fixture(autouse=True)
def nothing_goes_wrong(gpu):
    """Whatever a test looks at, no race and nothing like it."""
    yield
    found, gpu.faults[:] = list(gpu.faults), []
    assert not found


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def load(cache, device, **more):
    settings = SMALL | {"edges": "none"} | more.pop("settings", {})  # a third of the time; those with edges are below
    return Segmenter.from_pretrained("embedded", device=device, cache_dir=cache, settings=settings, **more)


class Both:
    """One pair twice: on the CPU, whose segmentations are kept, and on the stand-in."""

    def __init__(self, cache, dtype=None, **settings):
        self.cpu = load(cache, "cpu", settings=settings)
        self.cuda = load(cache, "cuda:0", dtype=dtype, settings=settings)
        self._known = {}

    def __call__(self, seen, vocabulary=NAMES):
        """What the stand-in makes of an image, once it agrees with the CPU."""
        key = seen.tobytes(), seen.shape, vocabulary
        if key not in self._known:
            self._known[key] = self.cpu(seen, vocabulary)
        found = self.cuda(seen, vocabulary)
        assert_agree(self._known[key], found)
        return found

    def captured(self, seen):
        """Run an image until its size has a graph."""
        while seen.shape not in self.cuda.frame_part._graphs:
            self.cuda(seen, NAMES)


@pytest.fixture(scope="module")
def heads(gpu, cache):
    """The pairs with the heads of `WHOLE`, each loaded when it is first asked for."""
    return functools.cache(lambda head: Both(cache, head=head))


@pytest.fixture(scope="module")
def pair(heads):
    """With the pair's own head, and an image that is encoded on (the CPU, the stand-in)."""
    both = heads("vanilla")
    return both, [segmenter.encode(image(0)) for segmenter in (both.cpu, both.cuda)]


@functools.cache
def image(seed, size=(120, 160)):
    return draw_scene(seed, size=size).image


def assert_agree(one, other):
    assert one.names == other.names
    assert (one.labels == other.labels).mean() >= AGREE
    assert abs(one.confidence_u8.astype(int) - other.confidence_u8).max() <= 3
    for mine, theirs in zip(one.class_confidence, other.class_confidence, strict=True):
        assert mine.presence == pytest.approx(theirs.presence, abs=0.01)
        assert mine.area == pytest.approx(theirs.area, abs=20)


# --- frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", WHOLE)
def test_a_frame_is_the_cpu_s_step_by_step_and_from_a_graph_with_one_wait(gpu, heads, head):
    both = heads(head)
    both.cuda.embed(NAMES)
    for number in range(GRAPH_AFTER + 2):
        gpu.reset_counts()
        found = both(image(number))
        captures = number == GRAPH_AFTER
        assert gpu.waits == (["device.synchronize"] if captures else []) + ONE_WAIT
        assert gpu.counts["replay"] == (number >= GRAPH_AFTER)
        assert len(set(found.labels.ravel())) > 2
        assert ("networks" in found.timings, "clip" in found.timings) == (True, False)
        assert all(time >= 0 for time in found.timings.values())


def test_sizes_come_by_turns_each_with_its_graph(gpu, heads):
    both, first, others = heads("vanilla"), image(0), [image(1, (97, 131)), image(2, (64, 200))]
    both.captured(first)
    for number in range(GRAPH_AFTER + 2):
        for seen in others if number < GRAPH_AFTER else [*others, first]:
            gpu.reset_counts()
            both(seen)
            assert gpu.counts["replay"] == (number >= GRAPH_AFTER)
    assert len(both.cuda.frame_part._graphs) == 3 < GRAPHS_KEPT


def test_another_vocabulary_needs_no_other_graph(gpu, heads):
    both, seen = heads("cliper"), image(0)
    both.captured(seen)
    for names in (["star"], [f"thing {k}" for k in range(40)], ["mug|cup|beaker", "ball"], [], ["ball"]):
        vocabulary = Vocabulary(names)
        both.cuda.embed(vocabulary)
        gpu.reset_counts()
        both(seen, vocabulary)
        assert gpu.waits == (ONE_WAIT if names else [])
        assert gpu.counts["replay"] == bool(names)


def test_networks_in_turn_give_the_same_step_by_step(gpu, pair):
    both, seen = pair[0], image(0)
    overlapping = both.cuda.frame_part
    both.cuda.frame_part = FramePart(overlapping.clip, overlapping.taps, CUDA, edges=overlapping.edges, overlap=False)
    for _ in range(GRAPH_AFTER + 1):
        gpu.reset_counts()
        found = both(seen)
        assert gpu.waits == ONE_WAIT
        assert gpu.counts["replay"] == 0
        assert ("networks" in found.timings, "clip" in found.timings) == (False, True)
    both.cuda.frame_part = overlapping


def test_in_float32_it_is_the_same_too(gpu, cache, pair):
    segmenter = load(cache, "cuda:0", dtype="fp32")
    for _ in range(GRAPH_AFTER + 1):
        assert_agree(pair[0].cpu(image(0), NAMES), segmenter(image(0), NAMES))
    assert segmenter.device_memory > 0
    segmenter.close()


# --- devices, failures, what is held --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_second(gpu, cache, pair):
    """The same pair on the second device, loaded while the first has had its graphs."""
    pair[0].captured(image(0))
    segmenter = load(cache, "cuda:1")
    segmenter.embed(NAMES)
    return segmenter


def test_two_devices_in_one_process_each_give_the_cpu_s_labels(gpu, pair, on_second):
    both = pair[0]
    for number in range(GRAPH_AFTER + 2):
        expected = both.cpu(image(number), NAMES)
        for segmenter in (both.cuda, on_second):
            gpu.reset_counts()
            assert_agree(expected, segmenter(image(number), NAMES))
            captures = gpu.counts["replay"] and "device.synchronize" in gpu.waits
            assert gpu.waits == (["device.synchronize"] if captures else []) + ONE_WAIT
            assert torch.cuda.current_device() == 0
    assert gpu.counts["replay"] == 1
    assert {segmenter.device.index for segmenter in (both.cuda, on_second)} == {0, 1}


def test_what_is_not_a_whole_segmentation_is_on_its_device_too(gpu, pair, on_second):
    queries = on_second.embed(NAMES)
    for _ in range(GRAPH_AFTER + 1):
        G, Q, K = on_second.frame(image(0), queries)
    assert {x.device for x in (G, Q, K)} == {on_second.device}
    expected = pair[0].cpu.frame(image(0), pair[0].cpu.embed(NAMES))
    for mine, known in zip((G, Q, K), expected, strict=True):
        torch.testing.assert_close(mine.cpu().float(), known, rtol=0.05, atol=0.05)
    watch = Stopwatch(on_second.device)
    watch.lap("nothing")
    assert watch.milliseconds()["nothing"] >= 0


def test_a_device_without_an_index_is_the_current_one_for_good(gpu):
    for name in ("auto", "cuda"):
        assert find_device(name) == torch.device("cuda:0")
        with torch.cuda.device(1):
            assert find_device(name) == torch.device("cuda:1")


def full(pixels):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (made up).")


def fault(pixels):
    raise RuntimeError("no kernel for this (made up)")


def wait(pixels):
    pixels.sum().item()  # which a capture forbids, and which makes it invalid


def wait_and_lack(pixels):
    try:
        wait(pixels)
    finally:
        full(pixels)


@pytest.fixture
def breaking(gpu, cache, pair, monkeypatch):
    """A segmenter about to be captured, and a way to make its networks fail within the capture and nowhere else."""
    segmenter = load(cache, "cuda:0")
    for _ in range(GRAPH_AFTER):
        segmenter(image(0), NAMES)

    def set_up(network, error):
        part = segmenter.frame_part
        run = getattr(part, network)

        def breaks(*arguments):
            made = run(*arguments)
            if torch.cuda.is_current_stream_capturing():
                error(arguments[0])
            return made

        monkeypatch.setattr(part, network, breaks)

    yield segmenter, set_up
    monkeypatch.undo()
    segmenter.close()  # asks for an empty cache
    gpu.recover()


@pytest.mark.parametrize("network", ["_run_clip", "_run_taps"])
@pytest.mark.parametrize("error", [fault, wait])
def test_a_capture_that_fails_is_said_once_and_frames_go_on(gpu, pair, breaking, caplog, network, error):
    segmenter, set_up = breaking
    set_up(network, error)
    here = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            gpu.reset_counts()
            assert_agree(pair[0].cpu(image(number), NAMES), segmenter(image(number), NAMES))
            assert gpu.counts["replay"] == 0
    assert torch.cuda.current_stream() is here
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("CUDA graphs are off, frames take longer: the networks could not be captured (")


@pytest.mark.parametrize("network", ["_run_clip", "_run_taps"])
@pytest.mark.parametrize("error", [full, wait_and_lack])
def test_a_lack_of_memory_within_a_capture_is_told_as_that(gpu, pair, breaking, caplog, network, error):
    segmenter, set_up = breaking
    set_up(network, error)
    with pytest.raises(OutOfMemory, match=r"2\.00 GiB"):
        segmenter(image(0), NAMES)
    assert not caplog.records
    for _ in range(GRAPH_AFTER):
        assert_agree(pair[0].cpu(image(0), NAMES), segmenter(image(0), NAMES))


def test_after_a_lack_of_memory_graphs_are_made_again(gpu, breaking, pair, caplog):
    segmenter, _ = breaking
    segmenter(image(0), NAMES)
    assert segmenter.frame_part._graphs
    held = segmenter.encode(image(0))
    with pytest.raises(OutOfMemory):
        segmenter._no_memory("made up")
    for number in range(GRAPH_AFTER + 2):
        gpu.reset_counts()
        assert_agree(pair[0].cpu(image(number), NAMES), segmenter(image(number), NAMES))
        assert gpu.counts["replay"] == (number >= GRAPH_AFTER)
    assert not caplog.records
    queries = segmenter.embed(NAMES)
    assert_agree(pair[0].cpu(image(0), NAMES), segmenter.segment(held, queries))


def test_an_encoded_image_stays_as_it_is_while_others_are_encoded(gpu, heads):
    both, sizes = heads("cliper"), [(120, 160), (97, 131), (120, 160)]
    for size in sizes:
        both.captured(image(0, size))
    gpu.reset_counts()
    held = [both.cuda.encode(image(number, size)) for number, size in enumerate(sizes)]
    assert gpu.counts["replay"] == len(sizes)
    for number, (size, encoded) in enumerate(zip(sizes, held, strict=True)):
        expected = both.cpu(image(number, size), NAMES)
        assert_agree(expected, both.cuda.segment(encoded, both.cuda.embed(NAMES)))


# --- layouts --------------------------------------------------------------------------------------------------


def test_channels_stay_last_from_layer_to_layer(gpu, pair):
    part = pair[0].cuda.frame_part
    in_turn = FramePart(part.clip, part.taps, CUDA, edges=part.edges, overlap=False)
    gpu.reset_counts()
    in_turn(image(0))
    assert gpu.counts["conv2d"] > 40
    assert gpu.counts["layout change"] <= 7  # of the image itself, and two of attention's operands that are none


# --- edges ----------------------------------------------------------------------------------------------------

EDGES = {"edges": "pixels", "edge_size": 80}


@pytest.fixture(scope="module")
def drawn(gpu, cache):
    """The pair with edges and a graph for the image's size; in float32, as edges hand small differences on."""
    both = Both(cache, dtype="fp32", **EDGES)
    both.captured(image(0))
    return both


def test_edges_are_made_in_the_graph_and_cost_no_wait(gpu, drawn):
    for number, maps in ((0, ()), (1, (2, 5)), (2, (6, 6, 1))):
        queries, expected = drawn.cuda.embed(NAMES), drawn.cpu.embed(NAMES)
        expected = drawn.cpu.segment(drawn.cpu.encode(image(number)), expected, maps=maps)
        gpu.reset_counts()
        encoded = drawn.cuda.encode(image(number))
        assert gpu.counts["replay"] == 1
        assert gpu.counts["exp"] == gpu.counts["pow"] == 0  # of colours: they are in the graph
        found = drawn.cuda.segment(encoded, queries, maps=maps)
        assert gpu.waits == ONE_WAIT
        assert gpu.counts["_embedding_bag_forward_only"] == 10
        assert_agree(expected, found)
        assert found.maps.shape == expected.maps.shape
        assert (abs(found.maps.astype(int) - expected.maps) <= 3).all()


@pytest.mark.parametrize("case", ["exp", "thresholds", "presence_minmax", "presence_max", "minmax"])
def test_labels_that_win_nowhere_do_not_compete_on_cuda_either(gpu, pair, case):
    """G and P of sixty names of which six win somewhere, carried and read on both."""
    draw, names, grid = torch.Generator().manual_seed(1), 60, (16, 24)
    classes = torch.cat((torch.arange(names + 1), torch.tensor([0, 3])))
    scores = 8 * torch.rand((6, *grid), generator=draw)
    P = torch.zeros((len(classes), *grid))
    P[[0, 4, 9, 30, 31, 60]] = scores
    P = P.flatten(1).T.softmax(-1)
    G = (P + 0.01).softmax(-1)
    pixels = torch.from_numpy(image(3)).permute(2, 0, 1)[None].float().div_(255)
    with set_to((pair[0].cpu,), **WALKS[case]):
        config = pair[0].cpu.settings.readout
    found = []
    for device in (CPU, CUDA):
        given = [x.to(device) for x in (G, P, classes)]
        edges = pixel_transition(pixels.to(device), EdgesConfig(edge_size=80))
        gpu.reset_counts()
        drawn = carry_labels(*given, names, grid, config, edges, (9, 2, 9))
        read = read_out(*given, names, grid, (120, 160), config, [()] * 3, drawn)
        assert gpu.waits == []
        found.append(read.to_host())
    mine, theirs = found
    assert len(set(mine.labels.flatten().tolist())) > 2
    assert (mine.labels == theirs.labels).float().mean() >= 0.9999
    for a, b in ((mine.confidence, theirs.confidence), (mine.maps, theirs.maps)):
        assert a.shape == b.shape
        assert (a.int() - b.int()).abs().max() <= 1
    torch.testing.assert_close(mine.peak, theirs.peak, rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.presence, theirs.presence, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["presence_minmax", "presence_max", "minmax", "thresholds"])
def test_edges_of_every_readout_are_the_cpu_s(gpu, drawn, case):
    segmenters = drawn.cpu, drawn.cuda
    with set_to(segmenters, **WALKS[case]):
        assert_agree(*(segmenter(image(4), NAMES) for segmenter in segmenters))


def test_without_edges_maps_that_are_asked_for_are_merged_on_the_device(gpu, pair):
    both, encoded = pair
    segmenters, maps = (both.cpu, both.cuda), (2, 5)
    queries = [segmenter.embed(NAMES) for segmenter in segmenters]
    gpu.reset_counts()
    expected, found = (
        segmenter.segment(*given, maps=maps) for segmenter, *given in zip(segmenters, encoded, queries, strict=True)
    )
    assert gpu.waits == ONE_WAIT
    assert (abs(found.maps.astype(int) - expected.maps) <= 3).all()


def test_the_check_of_a_gpu_s_figures_counts_hidden_waits_and_no_others(gpu, drawn):
    assert _synchronisations(lambda: drawn.cuda(image(0), NAMES)) == 0

    def waits_twice_more():
        drawn.cuda(image(0), NAMES)
        torch.ones(3, device="cuda:0").sum().item()
        torch.ones(3, device="cuda:0").nonzero()

    assert _synchronisations(waits_twice_more) == 2


# --- heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", sorted(set(HEADS) - set(WHOLE)))
def test_every_head_says_what_it_says_on_the_cpu(gpu, pair, head):
    queries, labels = pair[0].cpu.embed(NAMES), []
    for device, dtype in ((CPU, torch.float32), (CUDA, torch.float16)):
        clip = load_clip(find_pair("embedded").clip, device, dtype, cache_dir=None, offline=True)
        dense = DenseClip(clip.model, dataclasses.replace(pair[0].cpu.settings.clip, head=head))
        pixels = torch.from_numpy(image(5)).permute(2, 0, 1)[None].float().div_(255).to(device)
        gpu.reset_counts()
        with torch.inference_mode():
            G = dense.probabilities(dense.features(pixels), queries.embeddings.to(device), (16, 24))
            read = read_out(G, G, queries.classes.to(device), len(NAMES), (16, 24), (120, 160), ReadoutConfig())
        assert not [wait for wait in gpu.waits if wait != "copy to the device"]  # of queries and classes, above
        labels.append(read.to_host().labels)
    assert labels[0].any()
    assert (labels[0] == labels[1]).float().mean() >= AGREE
    assert isinstance(dense.config, ClipConfig)


# --- the walk and the readout -----------------------------------------------------------------------------------

WALKS = {
    "exp": {"kernel": "exp"},
    "exp, affinities": {"kernel": "exp", "combine": "affinities"},
    "softmax": {"kernel": "softmax"},
    "softmax, affinities": {"kernel": "softmax", "combine": "affinities"},
    "relu": {"kernel": "relu"},
    "relu, affinities": {"kernel": "relu", "combine": "affinities"},
    "relu_centred": {"kernel": "relu_centred", "alpha": 0.5},
    "shifted": {"kernel": "shifted", "alpha": 0.5},
    "shifted, affinities": {"kernel": "shifted", "alpha": 0.5, "combine": "affinities"},
    "favor": {"kernel": "favor", "tau": 0.5, "features": 64},
    "truncated": {"method": "truncated", "steps": 40},
    "exact": {"method": "exact"},  # which waits, as it says
    "far": {"alpha": 0.85, "steps": 40},
    "mean of the heads": {"head_weights": "mean"},
    "one head": {"head_weights": 1},
    "local": {"beta": 0.0},
    "global": {"beta": 1.0},
    "presence_minmax": {"readout": "presence_minmax"},
    "presence_max": {"readout": "presence_max", "threshold": 0.2},
    "minmax": {"readout": "minmax", "threshold": 0.5},
    "thresholds": {"threshold": 0.3, "presence_threshold": 0.4},
}


@contextlib.contextmanager
def set_to(segmenters, **changes):
    before = [segmenter.settings for segmenter in segmenters]
    for segmenter, settings in zip(segmenters, before, strict=True):
        segmenter.settings = settings.replaced(changes)
    try:
        yield
    finally:
        for segmenter, settings in zip(segmenters, before, strict=True):
            segmenter.settings = settings


@pytest.mark.parametrize("case", WALKS)
def test_a_walk_is_the_cpu_s(gpu, pair, case):
    both, encoded = pair[0], pair[1]
    segmenters = both.cpu, both.cuda
    queries = [segmenter.embed(NAMES) for segmenter in segmenters]
    with set_to(segmenters, **WALKS[case]):
        if case == "favor":  # uploads its directions, once
            both.cuda.segment(encoded[1], queries[1])
        gpu.reset_counts()
        results = [segmenter.segment(*given) for segmenter, *given in zip(segmenters, encoded, queries, strict=True)]
    assert_agree(*results)
    assert results[1].operator == results[0].operator
    assert [wait for wait in gpu.waits if case != "exact" or wait == ONE_WAIT[0]] == ONE_WAIT


def test_a_walk_from_the_frame_before_is_the_cpu_s(gpu, pair):
    segmenters = pair[0].cpu, pair[0].cuda
    with set_to(segmenters, previous_frame_start=True, steps=2):
        for number in range(2):
            assert_agree(*(segmenter(image(number, (66, 88)), NAMES) for segmenter in segmenters))
    for segmenter in segmenters:
        segmenter._previous = None
