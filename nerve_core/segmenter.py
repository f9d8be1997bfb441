"""The frame, start to end: image -> (CLIP patches; Q, K) -> G -> S -> P -> labels. What everything else calls."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._workspace import Workspace
from .dense_clip import DenseClip
from .diffusion import DiffusionTaps
from .models import load_clip, load_diffusion
from .pairs import ModelError, find_pair
from .random_walk import Refinement, refine
from .readout import UNLABELLED, Readout, read_out
from .settings import Settings
from .settings import preset as preset_overrides
from .templates import template_set
from .text import QueryEmbeddings, TextEncoder, embed_vocabulary
from .vocabulary import Vocabulary

_VOCABULARIES_KEPT = 32
STAGES = ("preprocess", "clip", "diffusion", "refine", "readout")


@dataclass(frozen=True)
class ClassConfidence:
    """What was found of one name.

    presence: 0..1, how sure it is that the image shows it. mean_probability: 0..1 over its pixels, 0 without any.
    peak_probability: 0..1, the highest anywhere. area: pixels. box: (x, y, width, height) in pixels, None without any.
    centroid: (x, y) in pixels, None without any.
    """

    name: str
    label: int
    presence: float
    mean_probability: float
    peak_probability: float
    area: int
    box: tuple[int, int, int, int] | None
    centroid: tuple[float, float] | None


@dataclass(frozen=True)
class Segmentation:
    """One segmented image.

    labels: uint8 [H, W]; 0 is background, k is names[k - 1]; all 255 where the vocabulary was empty.
    confidence_u8: uint8 [H, W], the winning label's probability, linear in 0..255. timings: ms per stage, and "total".
    """

    labels: np.ndarray
    confidence_u8: np.ndarray
    names: tuple[str, ...]
    class_confidence: tuple[ClassConfidence, ...]
    timings: dict[str, float] = field(default_factory=dict)

    @cached_property
    def confidence(self) -> np.ndarray:
        """The winning label's probability, float32 [H, W] in 0..1 in steps of 1/255."""
        return self.confidence_u8.astype(np.float32) / 255


class Segmenter:
    """A model pair, ready to segment. Not safe for use by several threads at once."""

    def __init__(
        self,
        pair_name: str,
        clip: DenseClip,
        taps: DiffusionTaps,
        text: TextEncoder,
        settings: Settings,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """From loaded parts; `from_pretrained` is the usual way in."""
        self.pair_name, self.settings, self.device, self.dtype = pair_name, settings, device, dtype
        self.clip, self.taps, self.text = clip, taps, text
        self._workspace = Workspace()
        self._vocabularies: OrderedDict[Vocabulary, QueryEmbeddings] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        pair: str = "embedded",
        *,
        device: str = "auto",
        dtype: torch.dtype | str | None = None,
        preset: str = "pair",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Segmenter:
        """Load a model pair by name ("embedded", "sd21-clipl14") or from a folder with a pair.json.

        device: "auto" is CUDA where there is one, else the CPU. dtype: float16, bfloat16 or float32 (or its name);
        None is float16 on CUDA
        and float32 on the CPU. preset: "pair" (the pair's own settings) or "paper". revision: of the diffusion model.
        cache_dir: for downloaded weights and text embeddings; None takes the usual places. offline: never ask the hub;
        None follows HF_HUB_OFFLINE. settings: overrides by name, see `Settings.names`.
        Raises ModelError, which names what was looked for and the remedy, and ValueError for a wrong setting.
        """
        where = _device(device)
        precision = _precision(dtype, where)
        found = find_pair(pair)
        try:
            own = Settings().replaced(found.settings)
        except ValueError as error:
            raise ModelError(f"the settings of pair {pair!r} cannot be used: {error}; correct its pair.json") from error
        chosen = own.replaced(preset_overrides(preset)).replaced(settings or {})
        if offline is None:
            offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        cache = None if cache_dir is None or cache_dir == "" else Path(cache_dir).expanduser()
        if where.type == "cuda":  # sums of half-precision products stay in float32
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        places: dict[str, Any] = {"cache_dir": None if cache is None else str(cache), "offline": offline}
        diffusion = found.diffusion if not revision else type(found.diffusion)(found.diffusion.location, revision)
        clip = load_clip(found.clip, where, precision, **places)
        branch = load_diffusion(diffusion, where, precision, **places)
        text = TextEncoder(
            clip.model,
            clip.tokenizer,
            template_set(chosen.clip.templates),
            identity=clip.identity,
            cache=cache or _cache_folder(),
        )
        try:
            taps = DiffusionTaps(branch.vae, branch.unet, branch.scheduler, branch.prompt, chosen.diffusion)
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"the diffusion model of pair {found.name!r} does not fit its settings: {error}"
            ) from error
        return cls(found.name, DenseClip(clip.model, chosen.clip), taps, text, chosen, where, precision)

    @property
    def description(self) -> str:
        """One line for a log: pair, device, precision, grid and the walk."""
        s = self.settings
        rows, columns = self.taps.grid
        return (
            f"{self.pair_name} on {self.device} in {str(self.dtype).removeprefix('torch.')}, "
            f"{rows} x {columns} tokens, head {s.clip.head}, kernel {s.affinity.kernel}, alpha {s.walk.alpha:g}, "
            f"beta {s.fusion.beta:g}, {s.walk.method} with {s.walk.steps} steps"
        )

    def embed(self, vocabulary: Vocabulary) -> QueryEmbeddings:
        """The vocabulary's queries; worked out once and remembered for the last 32 vocabularies."""
        if vocabulary not in self._vocabularies:
            clip = self.settings.clip
            self._vocabularies[vocabulary] = embed_vocabulary(
                vocabulary, self.text, clip.negatives, mean_negative=clip.mean_negative
            )
            if len(self._vocabularies) > _VOCABULARIES_KEPT:
                self._vocabularies.popitem(last=False)
        self._vocabularies.move_to_end(vocabulary)
        return self._vocabularies[vocabulary]

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, vocabulary: Vocabulary | QueryEmbeddings) -> Segmentation:
        """Segment one image: uint8 [H, W, 3], RGB, any size.

        Raises ValueError for anything else, and RuntimeError where the networks overflow in the chosen precision.
        """
        check_image(image)
        queries = self.embed(vocabulary) if isinstance(vocabulary, Vocabulary) else vocabulary
        height, width = image.shape[:2]
        if not queries.names:
            empty = np.full((height, width), UNLABELLED, np.uint8)
            return Segmentation(empty, np.zeros_like(empty), (), (), dict.fromkeys((*STAGES, "total"), 0.0))
        watch = _Stopwatch(self.device)
        pixels = self._pixels(image)
        watch.lap("preprocess")
        features = self.clip.features(pixels)
        G = self.clip.probabilities(features, queries.embeddings, self.taps.grid)
        watch.lap("clip")
        Q, K = self.taps(pixels)
        watch.lap("diffusion")
        refined = self.refine(Q, K, G)
        watch.lap("refine")
        read = read_out(
            G,
            refined.P,
            queries.classes,
            len(queries.names),
            self.taps.grid,
            (height, width),
            self.settings.readout,
        )
        labels, confidence = read.labels.cpu().numpy(), read.confidence.cpu().numpy()
        if not bool(read.presence.isfinite().all()):
            raise RuntimeError(
                f"the networks' values overflow in {str(self.dtype).removeprefix('torch.')}; use precision bf16 or fp32"
            )
        found = describe_classes(queries.names, labels, confidence, read)
        watch.lap("readout")
        return Segmentation(labels, confidence, queries.names, found, watch.milliseconds())

    @torch.inference_mode()
    def frame(self, image: np.ndarray, queries: QueryEmbeddings) -> tuple[Tensor, Tensor, Tensor]:
        """What the walk starts from: G [N, queries], and Q, K [heads, N, D], of one image as in `__call__`."""
        check_image(image)
        pixels = self._pixels(image)
        G = self.clip.probabilities(self.clip.features(pixels), queries.embeddings, self.taps.grid)
        return (G, *self.taps(pixels))

    def refine(self, Q: Tensor, K: Tensor, G: Tensor) -> Refinement:
        """G [N, queries] carried along the transition of Q, K [heads, N, D] by this pair's settings."""
        s = self.settings
        return refine(Q, K, G, self.taps.grid, s.affinity, s.fusion, s.walk, workspace=self._workspace, validate=False)

    def warm_up(self, image_size: tuple[int, int] = (480, 640)) -> None:
        """Segment a grey image of (rows, columns) once, so that the first real frame is as fast as the next."""
        grey = np.full((*image_size, 3), 127, np.uint8)
        self(grey, Vocabulary(["object"]))

    def close(self) -> None:
        """Give the models' memory back to the device; the segmenter is of no use afterwards."""
        del self.clip, self.taps, self.text
        self._workspace = Workspace()
        self._vocabularies.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _pixels(self, image: np.ndarray) -> Tensor:
        """float32 [1, 3, H, W] in 0..1 on the device."""
        raw = torch.tensor(np.ascontiguousarray(image), device=self.device)  # a copy: frames may be read-only
        return raw.permute(2, 0, 1)[None].float().div_(255)


def check_image(image: np.ndarray) -> None:
    """Raise ValueError unless `image` is uint8 [H, W, 3] with at least one pixel."""
    if (
        not isinstance(image, np.ndarray)
        or image.dtype != np.uint8
        or image.ndim != 3
        or image.shape[2] != 3
        or 0 in image.shape
    ):
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be a uint8 array [rows, columns, 3] in RGB order, none of them 0; got {got}")


def describe_classes(
    names: tuple[str, ...], labels: np.ndarray, confidence: np.ndarray, read: Readout
) -> tuple[ClassConfidence, ...]:
    """Presence, probabilities and place of every name; labels and confidence: uint8 [H, W]."""
    height, width = labels.shape
    count = len(names) + 1
    flat = labels.ravel().astype(np.intp)
    by_row = np.bincount(flat + count * np.repeat(np.arange(height), width), minlength=count * height).reshape(
        height, count
    )
    by_column = np.bincount(flat + count * np.tile(np.arange(width), height), minlength=count * width).reshape(
        width, count
    )
    area = by_row.sum(0)
    sure = np.bincount(flat, weights=confidence.ravel(), minlength=count)
    presence, peak = read.presence.tolist(), read.peak.tolist()
    found = []
    for label, name in enumerate(names, 1):
        pixels = int(area[label])
        box = centroid = None
        if pixels:
            rows, columns = np.flatnonzero(by_row[:, label]), np.flatnonzero(by_column[:, label])
            box = (
                int(columns[0]),
                int(rows[0]),
                int(columns[-1] - columns[0] + 1),
                int(rows[-1] - rows[0] + 1),
            )
            centroid = (
                float(by_column[:, label] @ np.arange(width) / pixels),
                float(by_row[:, label] @ np.arange(height) / pixels),
            )
        found.append(
            ClassConfidence(
                name,
                label,
                min(1.0, presence[label - 1]),
                float(sure[label] / pixels / 255) if pixels else 0.0,
                min(1.0, peak[label - 1]),
                pixels,
                box,
                centroid,
            )
        )
    return tuple(found)


class _Stopwatch:
    """Laps by the device's own clock: CUDA events, read after the one synchronisation that a frame needs anyway."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Time of each lap, and "total"."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        times = {
            name: self._between(before, after)
            for (_, before), (name, after) in zip(self._marks[:-1], self._marks[1:], strict=True)
        }
        return {**times, "total": sum(times.values())}

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) if self._cuda else (after - before) * 1e3


def _device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:1" as a device that is there; raises ModelError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is unknown; auto, cpu, cuda and cuda:N are accepted") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} is not supported; auto, cpu, cuda and cuda:N are accepted")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {name!r} is not there: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
            "use device auto or cpu, or install a CUDA build of PyTorch that fits the driver"
        )
    return device


def _precision(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype networks run in; raises ValueError."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    names |= {str(value).removeprefix("torch."): value for value in names.values()}
    chosen = names.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in names.values():
        raise ValueError(f"precision {dtype!r} is unknown; choose one of {', '.join(names)}")
    return chosen


def _cache_folder() -> Path:
    """Where text embeddings are kept: NERVE_CACHE, else nerve_ros in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("NERVE_CACHE") or Path(base) / "nerve_ros")
