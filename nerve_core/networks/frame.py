"""The frame part: runs CLIP and the diffusion model on one image, on CUDA at once and from CUDA graphs."""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
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
    the settings want none. With CUDA graphs all of them are overwritten by the next image of that size.
    """

    patches: PatchFeatures
    Q: Tensor
    K: Tensor
    edges: PixelTransition | None = None


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph, the uint8 image it reads, the tensors it writes, and what it reads of the networks' caches."""

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
        self._run_clip = _Compiled(clip.features) if compiled else clip.features
        self._run_taps = _Compiled(taps) if compiled else taps
        self._second = torch.cuda.Stream(device) if overlap and device.type == "cuda" else None
        self._graphs: OrderedDict[tuple[int, ...], _Captured] | None = None
        if self._second is not None:
            self._graphs, self._pool = OrderedDict(), torch.cuda.graph_pool_handle()
        self._seen: Counter[tuple[int, ...]] = Counter()

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, lap: Callable[[str], None] = lambda stage: None) -> FrameFeatures:
        """image: uint8 [H, W, 3], RGB. lap: called at the end of each stage with its name: "preprocess", then "edges",
        "clip" and "diffusion", or "networks" where they overlap."""
        second = self._second
        captured = None if second is None else self._captured(tuple(image.shape), second)
        raw = torch.empty(image.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        raw.numpy()[...] = image
        if second is None:
            pixels = _pixels(raw.to(self.device, non_blocking=True))
            lap("preprocess")
            edges = pixel_transition(pixels, self.edges)
            lap("edges")
            patches = self._run_clip(pixels)
            lap("clip")
            Q, K = self._run_taps(pixels)
            lap("diffusion")
            return FrameFeatures(patches, Q, K, edges)
        if captured is None:
            raw = raw.to(self.device, non_blocking=True)
            lap("preprocess")
            features = self._both(raw, second)
        else:
            captured.raw.copy_(raw, non_blocking=True)
            lap("preprocess")
            captured.graph.replay()
            features = captured.features
        lap("networks")
        return features

    def forget(self) -> None:
        """Free every graph and the memory it holds; an image size must come again to get one."""
        if self._graphs is not None:
            self._graphs.clear()
        self._seen.clear()

    def _both(self, raw: Tensor, second: torch.cuda.Stream) -> FrameFeatures:
        """The two networks at once; what the second stream allocates is reused by it alone, and only after it has
        waited for the first."""
        main = torch.cuda.current_stream(self.device)
        pixels = _pixels(raw)
        second.wait_stream(main)
        with torch.cuda.stream(second):
            patches = self._run_clip(pixels)
            edges = pixel_transition(pixels, self.edges)
        Q, K = self._run_taps(pixels)
        main.wait_stream(second)
        return FrameFeatures(patches, Q, K, edges)

    def _captured(self, shape: tuple[int, ...], second: torch.cuda.Stream) -> _Captured | None:
        """The graph of a size that has come often enough; None while it has not, or where capture failed."""
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
        raw = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                features = self._both(raw, second)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _log.warning(f"CUDA graphs are off, frames take longer: the networks could not be captured ({error})")
            self._graphs = None
            return None
        self._graphs[shape] = _Captured(graph, raw, features, self.clip.positions(self.clip.grid(*shape[:2])))
        if len(self._graphs) > GRAPHS_KEPT:
            self._graphs.popitem(last=False)
        return self._graphs[shape]


class _Compiled:
    """A function through torch.compile, or as it is after the first time that this fails."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._plain, self._fast = function, torch.compile(function, dynamic=False)

    def __call__(self, *arguments: Tensor) -> Any:
        if self._fast is not self._plain:
            try:
                with torch.inference_mode(False), torch.no_grad():  # the compiler takes no inference tensors
                    return self._fast(*(x.clone() for x in arguments))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers fail in many ways; a fault of the function itself is raised below
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
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
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
