"""The frame part: runs CLIP and the diffusion model on one image, on CUDA at once and from CUDA graphs."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..walk.edges import EdgesConfig, PixelTransition, pixel_transition
from .dense_clip import DenseClip, PatchFeatures
from .diffusion import DiffusionTaps

GRAPHS_KEPT = 4
"""Image sizes with a CUDA graph; the least recently used is freed for a fifth."""
GRAPH_AFTER = 2
"""Times that an image size runs without a graph, which a capture needs, before it gets one."""
_SIZES_COUNTED = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrameFeatures:
    """The networks' output for one image, for any vocabulary.

    patches: of CLIP. Q, K: [heads, N, D] in the networks' dtype. edges: S between the image's own pixels, None where
    the settings want none. They stay as they are while they are held, whatever is run meanwhile.
    """

    patches: PatchFeatures
    Q: Tensor
    K: Tensor
    edges: PixelTransition | None = None

    def copied(self) -> FrameFeatures:
        """The same in memory of its own, on the current stream."""
        patches = dataclasses.replace(
            self.patches,
            embeddings=self.patches.embeddings.clone(),
            affinity=None if self.patches.affinity is None else self.patches.affinity.clone(),
        )
        edges = None if self.edges is None else self.edges.copied()
        return FrameFeatures(patches, self.Q.clone(), self.K.clone(), edges)


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph, the uint8 image it reads, the tensors it writes, and what it reads of the networks' caches.

    Graphs share a pool of memory: what this one writes, a replay of any other may overwrite.
    """

    graph: torch.cuda.CUDAGraph
    raw: Tensor
    features: FrameFeatures
    positions: Tensor


class FramePart:
    """Both networks on one image. On CUDA: pinned upload, two streams, one graph per image size."""

    def __init__(
        self,
        clip: DenseClip,
        taps: DiffusionTaps,
        device: torch.device,
        *,
        edges: EdgesConfig,
        overlap: bool = True,
        compiled: bool = False,
    ) -> None:
        """edges: how S between pixels is made. overlap: on CUDA, run the networks at once on two streams, from
        a graph for image sizes that come again; else one after the other, each timed by itself. compiled: run them
        through torch.compile; where that fails, a warning says why and they run as they are."""
        self.clip, self.taps, self.edges, self.device = clip, taps, edges, device
        if compiled and device.type == "cpu":
            _log.warning("torch.compile is left out: on the CPU the networks' layers are oneDNN's own already")
            compiled = False
        self._run_clip = _Compiled(clip.embed) if compiled else clip.embed
        self._run_taps = _Compiled(taps.project) if compiled else taps.project
        self._side = _Side(device) if overlap and device.type == "cuda" else None
        self._graphs: OrderedDict[tuple[int, ...], _Captured] | None = None if self._side is None else OrderedDict()
        self._seen: Counter[tuple[int, ...]] = Counter()

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, lap: Callable[[str], None] = lambda stage: None) -> FrameFeatures:
        """image: uint8 [H, W, 3], RGB. lap: called at the end of each stage with its name: "preprocess", then "edges",
        "clip" and "diffusion", or "networks" where they overlap."""
        with on_device(self.device):
            return self._run(image, lap)

    def _run(self, image: np.ndarray, lap: Callable[[str], None]) -> FrameFeatures:
        captured = None if self._side is None else self._captured(tuple(image.shape), self._side)
        raw = torch.empty(image.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        raw.numpy()[...] = image
        if self._side is None:
            pixels = _pixels(raw.to(self.device, non_blocking=True))
            lap("preprocess")
            edges = pixel_transition(pixels, self.edges)
            lap("edges")
            patches = self._patches(pixels)
            lap("clip")
            Q, K = self._run_taps(self.taps.prepared(pixels))
            lap("diffusion")
            return FrameFeatures(patches, Q, K, edges)
        if captured is None:
            raw = raw.to(self.device, non_blocking=True)
            lap("preprocess")
            features = self._both(raw, self._side.second)
        else:
            captured.raw.copy_(raw, non_blocking=True)
            lap("preprocess")
            captured.graph.replay()
            features = captured.features.copied()
        lap("networks")
        return features

    def forget(self) -> None:
        """Free every graph and the memory it holds; an image size must come again to get one."""
        if self._graphs is not None:
            self._graphs.clear()
        if self._side is not None:
            self._side = _Side(self.device)
        self._seen.clear()

    def _patches(self, pixels: Tensor) -> PatchFeatures:
        return self._run_clip(self.clip.prepared(pixels), self.clip.positions(self.clip.grid(*pixels.shape[2:])))

    def _both(self, raw: Tensor, second: torch.cuda.Stream) -> FrameFeatures:
        """The two networks at once; what the second stream allocates is reused by it alone, and only after it has
        waited for the first."""
        main = torch.cuda.current_stream(self.device)
        pixels = _pixels(raw)
        second.wait_stream(main)
        try:
            with torch.cuda.stream(second):
                patches = self._patches(pixels)
                edges = pixel_transition(pixels, self.edges)
            Q, K = self._run_taps(self.taps.prepared(pixels))
        finally:  # a capture cannot end with a stream that was forked and not joined
            main.wait_stream(second)
        return FrameFeatures(patches, Q, K, edges)

    def _captured(self, shape: tuple[int, ...], side: _Side) -> _Captured | None:
        """The graph of a size that has come often enough; None while it has not, or where capture failed.

        Raises what an allocator raised, also within a capture, where PyTorch may hide it behind an error of its own.
        """
        if self._graphs is None:
            return None
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            return self._graphs[shape]
        self._seen[shape] += 1
        if self._seen[shape] <= GRAPH_AFTER:
            if len(self._seen) > _SIZES_COUNTED:
                self._seen.clear()
            return None
        try:
            captured = self._capture(shape, side)
        except RuntimeError as error:
            self._side = _Side(self.device)  # the streams of a capture that failed may be of no use any more
            lacking = lack_of_memory(error)
            if lacking is error:
                raise
            if lacking is not None:
                raise lacking from None
            _log.warning(f"CUDA graphs are off, frames take longer: the networks could not be captured ({error})")
            self._graphs = None
            return None
        self._graphs[shape] = captured
        if len(self._graphs) > GRAPHS_KEPT:
            self._graphs.popitem(last=False)
        return captured

    def _capture(self, shape: tuple[int, ...], side: _Side) -> _Captured:
        raw = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        capture = torch.cuda.graph(graph, pool=side.pool, stream=side.capturing, capture_error_mode="thread_local")
        with torch.cuda.stream(main), capture:  # which leaves its own stream behind where the capture fails
            features = self._both(raw, side.second)
        return _Captured(graph, raw, features, self.clip.positions(self.clip.grid(*shape[:2])))


class _Side:
    """What a CUDA device needs besides its main stream. Both streams are of this device: left to itself, PyTorch
    captures on a stream of the device that was current when the process made its first graph.

    second: where CLIP runs. capturing: in place of the main stream in a capture. pool: of all graphs' memory; one whose
    graphs are all gone is not used again.
    """

    def __init__(self, device: torch.device) -> None:
        self.second, self.capturing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one; does nothing for others."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def lack_of_memory(error: BaseException) -> BaseException | None:
    """The error of an allocator among an error, its causes and what it was raised in the wake of; None without one.

    PyTorch's allocator for the CPU raises a plain RuntimeError, CUDA itself too.
    """
    return next((one for one in _behind(error) if _is_lack_of_memory(one)), None)


def _is_lack_of_memory(error: BaseException) -> bool:
    words = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in words)
    )


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def free_cached_memory() -> None:
    """Give what CUDA's allocator keeps for later back to the device, where it can.

    After a capture that CUDA itself has ended, the allocator takes it to be under way for good and refuses; what is
    kept is then still used for tensors to come.
    """
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        _log.debug(f"CUDA's allocator keeps its cache: {error}")


class _Compiled:
    """A function through torch.compile, or as it is after the first time that this fails.

    It is compiled once for each shape of its arguments, by PyTorch's default for the first eight; more run as it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._plain, self._fast = function, torch.compile(function, dynamic=False)

    def __call__(self, *arguments: Tensor) -> Any:
        if self._fast is not self._plain:
            try:
                with torch.inference_mode(False), torch.no_grad():  # the compiler takes no inference tensors
                    return self._fast(*(x.clone() for x in arguments))
            except Exception as error:  # compilers fail in many ways; a fault of the function itself is raised below
                if lack_of_memory(error) is not None:
                    raise
                reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
                _log.warning(f"torch.compile is off, frames take longer: {reason}")
                self._fast = self._plain
        return self._plain(*arguments)


def _pixels(raw: Tensor) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, H, W] in 0..1."""
    return raw.permute(2, 0, 1)[None].float().div_(255)


class Stopwatch:
    """Times of stages by the device's own clock: CUDA events, read after the one synchronisation that a frame needs
    anyway."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def lap(self, stage: str) -> None:
        """End a stage, where the next begins."""
        self._marks.append((stage, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Time of each stage, and "total"."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        times = {
            stage: self._between(before, after)
            for (_, before), (stage, after) in zip(self._marks[:-1], self._marks[1:], strict=True)
        }
        return {**times, "total": sum(times.values())}

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) if self._cuda else (after - before) * 1e3
