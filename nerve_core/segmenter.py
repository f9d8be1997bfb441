"""The Segmenter labels every pixel of an image: (CLIP patches; Q, K) -> G -> S -> P -> edges -> labels."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import ModelError, OutOfMemory, not_finite
from .models.loading import bfloat16_is_faster, load_clip, load_diffusion
from .models.pairs import ModelPair, Source, find_pair
from .models.weights import hub_is_off
from .networks.dense_clip import DenseClip
from .networks.diffusion import DiffusionConfig, DiffusionTaps
from .networks.frame import (
    GRAPH_AFTER,
    FrameFeatures,
    FramePart,
    Stopwatch,
    free_cached_memory,
    lack_of_memory,
    on_device,
)
from .readout import ClassConfidence, carry_labels, describe_classes, read_out
from .settings import Settings
from .text.cache import EmbeddingCache, cache_folder
from .text.encoder import QueryEmbeddings, TextEncoder, exhaust, vocabulary_steps
from .text.limits import Doubt
from .text.templates import template_set
from .text.vocabulary import UNLABELLED, Vocabulary
from .walk.random_walk import Refinement, refine
from .walk.workspace import Workspace

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_VOCABULARIES_KEPT = 32
_log = logging.getLogger(__name__)
STAGES = ("preprocess", "clip", "diffusion", "probabilities", "refine", "edges", "readout")
"""Stages that are timed; on CUDA "networks" stands for "clip" and "diffusion", which overlap, and for S between pixels,
which elsewhere counts among "edges"."""


@dataclass(frozen=True)
class Segmentation:
    """One segmented image.

    labels: uint8 [H, W]; 0 is background, k is names[k - 1]; all 255 where the vocabulary was empty.
    confidence_u8: uint8 [H, W], the winning label's probability, linear in 0..255. timings: ms per stage, and "total".
    operator: the form of S that was chosen, see `fusion.choose_operator`; "" where the vocabulary was empty.
    maps: uint8 [maps, H, W], the probability of each requested label at every pixel, linear in 0..255.
    """

    labels: np.ndarray
    confidence_u8: np.ndarray
    names: tuple[str, ...]
    class_confidence: tuple[ClassConfidence, ...]
    timings: dict[str, float] = field(default_factory=dict)
    operator: str = ""
    maps: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0), np.uint8))

    @cached_property
    def confidence(self) -> np.ndarray:
        """The winning label's probability, float32 [H, W] in 0..1 in steps of 1/255."""
        return self.confidence_u8.astype(np.float32) / 255


@dataclass(frozen=True)
class EncodedImage:
    """The networks' output for one image, for any vocabulary.

    size: rows and columns of the image.
    """

    features: FrameFeatures
    size: tuple[int, int]
    watch: Stopwatch


def _raises_out_of_memory(
    method: Callable[Concatenate[Segmenter, _Parameters], _Result],
) -> Callable[Concatenate[Segmenter, _Parameters], _Result]:
    """Turn allocation errors in a method of Segmenter into OutOfMemory."""

    @wraps(method)
    def guarded(self: Segmenter, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return method(self, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            reason = _reason(error)
            if reason is None:
                raise
        # Not inside the except block: while the error lives, its traceback holds the tensors that took the memory.
        self._no_memory(reason)

    return guarded


class Segmenter:
    """A model pair, ready to segment. Not safe for use by several threads at once."""

    def __init__(
        self,
        pair_name: str,
        frame: FramePart,
        text: TextEncoder,
        settings: Settings,
        device: torch.device,
        dtype: torch.dtype,
        *,
        pair: ModelPair | None = None,
    ) -> None:
        """From loaded parts; usually called through `from_pretrained`. pair: whose names it knows; None takes any."""
        self.pair_name, self.settings, self.device, self.dtype = pair_name, settings, device, dtype
        self.frame_part, self.text, self._pair, self._limit = frame, text, pair, text.limit
        self._workspace = Workspace()
        self._vocabularies: OrderedDict[Vocabulary, QueryEmbeddings] = OrderedDict()
        self._previous: tuple[QueryEmbeddings, tuple[int, ...], Tensor] | None = None

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
        overlap: bool = True,
        compile: bool = False,
        remember: bool = True,
    ) -> Segmenter:
        """Load a model pair by name ("embedded", "sd21-clipl14"), from a folder with a pair.json, or by two hub ids or
        folders ("CLIP+DIFFUSION").

        device: "auto" is CUDA where there is one, else the CPU. dtype: float16, bfloat16 or float32 (or its name); None
        is float16 on CUDA, and on the CPU float32, or bfloat16 where the pair asks for it, the processor has it and it
        was measured faster. preset: "pair" (the pair's own settings) or "paper". revision: of the diffusion model.
        cache_dir: for downloaded weights and text embeddings; None takes the default ones. offline: never ask the hub;
        None follows HF_HUB_OFFLINE. settings: overrides by name, see `Settings.names`. overlap: on CUDA,
        run both networks at once and from a CUDA graph; False runs and times them one by one. compile: run the networks
        through torch.compile (the first frames then take minutes). remember: read text embeddings from disk and store
        them there; False computes all of them again, so that not even their last bits depend on what was embedded
        before. Raises ModelError, which names what was looked for and the remedy, and ValueError for a wrong setting.
        """
        where = find_device(device)
        found = find_pair(pair)
        chosen = Settings.of_pair(found, preset, settings)
        if revision:
            found = dataclasses.replace(found, diffusion=dataclasses.replace(found.diffusion, revision=revision))
        if offline is None:
            offline = hub_is_off()
        cache = None if cache_dir is None or cache_dir == "" else Path(cache_dir).expanduser()
        if where.type == "cuda":  # sums of half-precision products stay in float32
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        embeddings = _embedding_cache(cache) if remember else None
        places: dict[str, Any] = {"cache_dir": None if cache is None else str(cache), "offline": offline}

        precision = _precision(dtype, where)
        if dtype is None and where.type == "cpu" and found.cpu_precision == "bf16":
            if bfloat16_is_faster(found.clip, found.diffusion, chosen, **places):
                precision = torch.bfloat16
            else:
                _log.info("networks in float32: bfloat16, as the pair would have them on a CPU, is no faster here")
        clip = load_clip(found.clip, where, precision, **places)
        text = TextEncoder(
            clip.model,
            clip.tokenizer,
            template_set(chosen.clip.templates),
            identity=clip.identity,
            cache=embeddings,
        )
        try:
            branch = load_diffusion(
                found.diffusion,
                where,
                precision,
                chosen.diffusion.taps,
                embeddings=embeddings,
                taesd=_tiny_encoder(found, chosen.diffusion),
                **places,
            )
            taps = DiffusionTaps(branch.vae, branch.unet, branch.scheduler, branch.prompt, chosen.diffusion)
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"the diffusion model of pair {found.name!r} does not fit its settings: {error}"
            ) from error
        frame = FramePart(
            DenseClip(clip.model, chosen.clip), taps, where, edges=chosen.edges, overlap=overlap, compiled=compile
        )
        return cls(found.name, frame, text, chosen, where, precision, pair=found)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the walk's tokens."""
        return self.frame_part.taps.grid

    @property
    def description(self) -> str:
        """One line for a log: pair, device, precision, grid and the walk."""
        s = self.settings
        rows, columns = self.grid
        return (
            f"{self.pair_name} on {self.device} in {str(self.dtype).removeprefix('torch.')}, "
            f"{rows} x {columns} tokens, head {s.clip.head}, kernel {s.affinity.kernel}, alpha {s.walk.alpha:g}, "
            f"beta {s.fusion.beta:g}, {s.walk.method} with {s.walk.steps} steps"
        )

    def doubts(self, vocabulary: Vocabulary) -> tuple[Doubt, ...]:
        """What this pair cannot make of a vocabulary, the gravest first: names that it reads alike, that are longer
        than its tokenizer takes, or that it does not know. May be called from any thread; runs no model."""
        found = self._limit.doubts(vocabulary)
        if self._pair is not None and self._pair.unknown(vocabulary.words):
            found = (*found, Doubt(self._pair.limits(vocabulary.words)))
        return found

    def embed(self, vocabulary: Vocabulary | Sequence[str] | str) -> QueryEmbeddings:
        """The vocabulary's queries; computed once and kept for the last 32 vocabularies, its `doubts` logged then.

        vocabulary: also a sequence of names, or one text as `Vocabulary.parse` reads it. Raises TypeError for anything
        else.
        """
        wanted = Vocabulary.of(vocabulary)
        if wanted not in self._vocabularies:
            for doubt in self.doubts(wanted):
                _log.log(logging.ERROR if doubt.grave else logging.WARNING, "%s", doubt.text)
        return exhaust(self.embed_steps(wanted))

    def embed_steps(self, vocabulary: Vocabulary) -> Generator[None, None, QueryEmbeddings]:
        """`embed` in short steps, between which images can be segmented, and nothing logged; returns the queries.
        Raises OutOfMemory."""
        try:
            return (yield from self._embed_steps(vocabulary))
        except (RuntimeError, MemoryError) as error:
            reason = _reason(error)
            if reason is None:
                raise
        self._no_memory(reason)

    def _embed_steps(self, vocabulary: Vocabulary) -> Generator[None, None, QueryEmbeddings]:
        if vocabulary not in self._vocabularies:
            clip = self.settings.clip
            queries = yield from vocabulary_steps(
                vocabulary, self.text, clip.negatives, mean_negative=clip.mean_negative
            )
            self._vocabularies[vocabulary] = queries
            if len(self._vocabularies) > _VOCABULARIES_KEPT:
                self._vocabularies.popitem(last=False)
        self._vocabularies.move_to_end(vocabulary)
        return self._vocabularies[vocabulary]

    def __call__(
        self, image: np.ndarray, vocabulary: Vocabulary | QueryEmbeddings | Sequence[str] | str
    ) -> Segmentation:
        """Segment one image: uint8 [H, W, 3], RGB, any size. `embed`, `encode` and `segment` in one; raises what they
        raise.

        vocabulary: what `embed` takes, or what it returned.
        """
        check_image(image)
        queries = vocabulary if isinstance(vocabulary, QueryEmbeddings) else self.embed(vocabulary)
        return self.segment(self.encode(image), queries) if queries.names else unlabelled(image.shape[:2])

    @_raises_out_of_memory
    @torch.inference_mode()
    def encode(self, image: np.ndarray) -> EncodedImage:
        """Run the networks on one image, uint8 [H, W, 3], RGB, any size: most of a frame's work, and the same for every
        vocabulary.

        Raises ValueError for anything else, and OutOfMemory.
        """
        check_image(image)
        with on_device(self.device):
            watch = Stopwatch(self.device)
            return EncodedImage(self.frame_part(image, watch.lap), image.shape[:2], watch)

    @_raises_out_of_memory
    @torch.inference_mode()
    def segment(
        self, encoded: EncodedImage, vocabulary: QueryEmbeddings, *, maps: Sequence[int] = (), follow: bool = True
    ) -> Segmentation:
        """Label every pixel of an encoded image by queries from `embed`; may be called repeatedly.

        maps: labels (1 to the number of names) whose probability is wanted at every pixel. follow: whether the walk of
        the next image may start from this one's P (setting previous_frame_start).
        Raises OutOfMemory, TypeError for names that were not embedded, and RuntimeError where the networks overflow in
        the chosen precision.
        """
        if not isinstance(vocabulary, QueryEmbeddings):
            raise TypeError(
                f"segment takes what embed returns, not a {type(vocabulary).__name__}; embed the names first"
            )
        if not vocabulary.names:
            return unlabelled(encoded.size)
        with on_device(self.device):
            return self._segment(encoded, vocabulary, maps, follow)

    def _segment(
        self, encoded: EncodedImage, queries: QueryEmbeddings, maps: Sequence[int], follow: bool
    ) -> Segmentation:
        watch, features = Stopwatch(self.device), encoded.features
        G = self._probabilities(features, queries)
        watch.lap("probabilities")
        refined = self.refine(features.Q, features.K, G, previous=self._start(queries, encoded.size))
        if follow:
            keep = self.settings.walk.previous_frame_start
            self._previous = (queries, encoded.size, refined.P) if keep else None
        watch.lap("refine")
        config, names = self.settings.readout, len(queries.names)
        drawn = None
        if features.edges is not None:
            drawn = carry_labels(G, refined.P, queries.classes, names, self.grid, config, features.edges, maps)
        watch.lap("edges")
        asked = [_queries_of(queries.vocabulary, label) for label in maps]
        read = read_out(G, refined.P, queries.classes, names, self.grid, encoded.size, config, asked, drawn).to_host()
        if not bool(read.presence.isfinite().all()):
            raise not_finite("the networks'", str(self.dtype).removeprefix("torch."))
        labels, confidence = read.labels.numpy(), read.confidence.numpy()
        found = describe_classes(queries.names, read)
        watch.lap("readout")
        before, times = encoded.watch.milliseconds(), watch.milliseconds()
        times["edges"] += before.pop("edges", 0.0)
        timings = before | times
        timings["total"] = sum(time for stage, time in timings.items() if stage != "total")
        return Segmentation(labels, confidence, queries.names, found, timings, refined.operator, read.maps.numpy())

    @torch.inference_mode()
    def frame(self, image: np.ndarray, queries: QueryEmbeddings) -> tuple[Tensor, Tensor, Tensor]:
        """The walk's inputs for one image as in `__call__`: G [N, queries], and Q, K [heads, N, D]."""
        check_image(image)
        with on_device(self.device):
            features = self.frame_part(image)
            return self._probabilities(features, queries), features.Q, features.K

    def refine(self, Q: Tensor, K: Tensor, G: Tensor, previous: Tensor | None = None) -> Refinement:
        """Refine G [N, queries] along the transition of Q, K [heads, N, D] by this pair's settings.

        previous: P of the previous frame, where the walk is to start from it.
        """
        s = self.settings
        return refine(
            Q,
            K,
            G,
            self.grid,
            s.affinity,
            s.fusion,
            s.walk,
            previous=previous,
            workspace=self._workspace,
            validate=False,
        )

    def warm_up(self, image_size: tuple[int, int] = (480, 640)) -> None:
        """Segment a grey image of (rows, columns) until a real one is as fast as later ones: kernels are chosen, memory
        is allocated, and on CUDA the size has its graph."""
        grey, queries = np.full((*image_size, 3), 127, np.uint8), exhaust(self.embed_steps(Vocabulary(["object"])))
        for _ in range(GRAPH_AFTER + 1 if self.device.type == "cuda" else 1):
            self(grey, queries)
        self._previous = None

    @property
    def device_memory(self) -> int | None:
        """Bytes that PyTorch holds on a CUDA device; None on the CPU."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else None

    def close(self) -> None:
        """Free the models' memory; the segmenter cannot be used afterwards."""
        self.text.close()
        del self.frame_part, self.text
        self._workspace, self._previous = Workspace(), None
        self._vocabularies.clear()
        if self.device.type == "cuda":
            free_cached_memory()

    def _no_memory(self, reason: str) -> NoReturn:
        self._workspace, self._previous = Workspace(), None
        self.frame_part.forget()
        if self.device.type == "cuda":
            free_cached_memory()
        raise OutOfMemory(f"out of memory on {self.device}: {reason}")

    def _probabilities(self, features: FrameFeatures, queries: QueryEmbeddings) -> Tensor:
        return self.frame_part.clip.probabilities(features.patches, queries.embeddings, self.grid)

    def _start(self, queries: QueryEmbeddings, shape: tuple[int, ...]) -> Tensor | None:
        """The previous frame's P, where the walk is set to start from it and vocabulary and size are the same."""
        if self._previous is None or self._previous[0] is not queries or self._previous[1] != shape:
            return None
        return self._previous[2]


def unlabelled(size: tuple[int, int]) -> Segmentation:
    """The result for an empty vocabulary and an image of `size` (rows, columns): labels 255, confidence 0."""
    labels = np.full(size, UNLABELLED, np.uint8)
    return Segmentation(labels, np.zeros_like(labels), (), (), dict.fromkeys((*STAGES, "total"), 0.0))


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


def _reason(error: Exception) -> str | None:
    """An allocator's message; None for any other error."""
    lacking = lack_of_memory(error)
    return None if lacking is None else (str(lacking).strip() or "no more memory").splitlines()[0]


def _queries_of(vocabulary: Vocabulary, label: int) -> range:
    """The queries of a class, in the order of `vocabulary_steps`: the words of each name, then the negatives."""
    first = sum(len(words) for words in vocabulary.synonyms[: label - 1])
    return range(first, first + len(vocabulary.synonyms[label - 1]))


def find_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:1" as a device that exists, CUDA's with its index; raises ModelError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
    if device.type == "cuda" and device.index is None:  # another device may be the current one later
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _embedding_cache(folder: Path | None) -> EmbeddingCache | None:
    """The cache of text embeddings in `folder`, or where None in the user's; None, and a warning, where there is none:
    it is never a reason to fail."""
    try:
        return EmbeddingCache(folder or cache_folder())
    except OSError as error:
        _log.warning("text embeddings are not kept: %s", error)
        return None


def _precision(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype networks run in; raises ValueError."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    names |= {str(value).removeprefix("torch."): value for value in names.values()}
    chosen = names.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in names.values():
        raise ValueError(f"precision {dtype!r} is unknown; choose one of {', '.join(names)}")
    return chosen


def _tiny_encoder(pair: ModelPair, diffusion: DiffusionConfig) -> Source | None:
    """Where the tiny encoder is, if the settings ask for it; raises ValueError where the pair has none."""
    if diffusion.encoder != "taesd":
        return None
    if pair.taesd is None:
        raise ValueError("encoder is 'taesd', and its pair.json names no taesd; use encoder 'vae', or name one")
    return pair.taesd
