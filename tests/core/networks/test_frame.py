"""The frame part: the same numbers whether networks run in turn, at once, compiled or from a CUDA graph."""

import logging
import time

import numpy as np
import pytest
import torch

from nerve_core import Segmenter
from nerve_core.embedded.scenes import draw_scene
from nerve_core.networks import frame
from nerve_core.networks.frame import GRAPH_AFTER, GRAPHS_KEPT, FramePart, Stopwatch
from nerve_core.walk.edges import pixel_transition

SMALL = {"input_size": (64, 96), "short_side": 72, "templates": ("a {}.",)}
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def part(request, tmp_path_factory):
    return Segmenter.from_pretrained(
        "embedded", device=request.param, cache_dir=tmp_path_factory.mktemp("cache"), settings=SMALL
    ).frame_part


@pytest.fixture(scope="module")
def image():
    return draw_scene(7, size=(120, 160)).image


def of(features):
    weights = [stencil.weights for stencil in features.edges.stencils]
    return [x.float().cpu() for x in (features.patches.embeddings, features.Q, features.K, *weights)]


def assert_same(one, other, **tolerance):
    for a, b in zip(of(one), of(other), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_both_networks_see_the_image_in_0_to_1(part, image):
    pixels = (torch.from_numpy(image).float() / 255).permute(2, 0, 1)[None].to(part.device)
    patches, (Q, K) = part.clip.features(pixels), part.taps(pixels)
    edges = pixel_transition(pixels, part.edges)
    assert_same(part(image), frame.FrameFeatures(patches, Q, K, edges))


@pytest.mark.parametrize("layout", ["read-only", "reversed", "cropped", "columns first"])
def test_any_layout_in_memory_is_the_same_image(part, image, layout):
    other = {
        "read-only": image.copy(),
        "reversed": image[::-1].copy()[::-1],
        "cropped": np.pad(image, ((3, 2), (5, 1), (0, 0)))[3:-2, 5:-1],
        "columns first": np.asfortranarray(image),
    }[layout]
    other.flags.writeable = layout != "read-only"
    before = other.copy()
    expected = of(part(image))
    for a, b in zip(of(part(other)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (other == before).all()


def test_laps_are_reported_in_order(part, image):
    laps = []
    part(image, laps.append)
    assert laps in (["preprocess", "edges", "clip", "diffusion"], ["preprocess", "networks"])


def test_a_stopwatch_adds_up():
    watch = Stopwatch(CPU)
    time.sleep(0.002)
    watch.lap("one")
    watch.lap("two")
    times = watch.milliseconds()
    assert list(times) == ["one", "two", "total"]
    assert times["one"] >= 2 > times["two"] >= 0
    assert times["total"] == times["one"] + times["two"]


# --- torch.compile ------------------------------------------------------------------------------------------


def test_a_compiler_that_fails_is_said_once_and_done_without(monkeypatch, caplog):
    calls = []

    def compiler(function, **options):
        def fail(*arguments):
            calls.append(function)
            raise RuntimeError("no compiler here\nlong trace")

        return fail

    monkeypatch.setattr(torch, "compile", compiler)
    compiled = frame._Compiled(lambda x: 2 * x)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert compiled(torch.ones(())) == 2
    assert len(calls) == 1
    assert [record.message for record in caplog.records] == [
        "torch.compile is off, frames take longer: no compiler here"
    ]


def test_a_fault_of_the_function_itself_is_raised(monkeypatch, caplog):
    def fault(x):
        raise ValueError("wrong x")

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with pytest.raises(ValueError, match="wrong x"):
        frame._Compiled(fault)(torch.ones(()))


def test_a_compiled_network_that_runs_out_of_memory_says_so(monkeypatch):
    def full(x):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", lambda function, **options: full)
    with pytest.raises(torch.OutOfMemoryError):
        frame._Compiled(lambda x: x)(torch.ones(()))


def test_compiled_networks_return_the_same(tmp_path, image, monkeypatch, caplog):
    monkeypatch.setattr(
        "nerve_core.networks.layers._packs", lambda dtype: False
    )  # as on a device without oneDNN's layers
    part = Segmenter.from_pretrained("embedded", device="cpu", cache_dir=tmp_path, settings=SMALL).frame_part
    expected, original = part(image), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: original(function, backend="aot_eager"))
    part._run_clip = frame._Compiled(part.clip.embed)
    monkeypatch.setattr(torch, "compile", lambda function, **options: original(function, backend="eager"))
    part._run_taps = frame._Compiled(
        part.taps.project
    )  # aot_eager itself fails on group norms of images with channels last
    with caplog.at_level(logging.WARNING):
        assert_same(part(image), expected)
    assert not caplog.records  # it was really compiled


def test_networks_are_compiled_once_a_grid_and_not_again(tmp_path, monkeypatch):
    settings = SMALL | {"edges": "none"}
    part = Segmenter.from_pretrained("embedded", device="cpu", cache_dir=tmp_path, settings=settings).frame_part
    monkeypatch.setattr("nerve_core.networks.dense_clip._GRIDS_KEPT", 2)
    original, made = torch.compile, []

    def compiler(function, **options):
        def backend(graph, inputs):
            made.append(function.__name__)
            return graph.forward

        return original(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compiler)
    torch.compiler.reset()
    part._run_clip, part._run_taps = frame._Compiled(part.clip.embed), frame._Compiled(part.taps.project)
    sizes = [(60 + 3 * k, 80 + 4 * k) for k in range(7)]  # of one aspect
    sizes += [(60, 120), (60, 60)]
    grids = {part.clip.grid(*size) for size in sizes}
    assert len(grids) == 3
    for _ in range(2):
        for size in sizes:
            part(draw_scene(1, size=size).image)
    once = made.count("embed") / len(grids)
    assert made.count("project") > 0
    assert (once, made.count("embed")) == (int(once), int(once) * len(grids))
    before = list(made)
    for size in reversed(sizes):
        part(draw_scene(1, size=size).image)
    assert made == before
    torch.compiler.reset()


def test_on_the_cpu_the_option_is_left_out_with_a_message(part, image, caplog):
    if part.device.type != "cpu":
        pytest.skip("of the CPU")
    with caplog.at_level(logging.WARNING):
        assert_same(FramePart(part.clip, part.taps, CPU, edges=part.edges, compiled=True)(image), part(image))
    assert "torch.compile is left out" in caplog.text


# --- CUDA ---------------------------------------------------------------------------------------------------


@needs_cuda
def test_a_graph_returns_what_the_networks_return_in_turn(image):
    made = {}
    for overlap in (False, True):
        part = Segmenter.from_pretrained("embedded", device="cuda", settings=SMALL, overlap=overlap).frame_part
        for other in (image, image[::-1], image[:, ::-1], image):
            made.setdefault(overlap, []).append(of(part(other)))
        assert bool(part._graphs) is overlap
    for one, other in zip(made[False], made[True], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@needs_cuda
def test_graphs_are_made_for_sizes_that_come_again_and_only_so_many(image):
    part = Segmenter.from_pretrained("embedded", device="cuda", settings=SMALL).frame_part
    for size in range(GRAPHS_KEPT + 2):
        for time_seen in range(GRAPH_AFTER + 1):
            part(image[: 100 + size])
            assert (image[: 100 + size].shape in part._graphs) is (time_seen == GRAPH_AFTER)
    assert len(part._graphs) == GRAPHS_KEPT


@needs_cuda
def test_a_capture_that_fails_is_said_and_done_without(image, monkeypatch, caplog):
    part = Segmenter.from_pretrained("embedded", device="cuda", settings=SMALL).frame_part

    def refuse(*arguments, **options):
        raise RuntimeError("not now")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(GRAPH_AFTER + 2):
            part(image)
    assert [record.message for record in caplog.records] == [
        "CUDA graphs are off, frames take longer: the networks could not be captured (not now)"
    ]
