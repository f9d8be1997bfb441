"""Image -> one mask for every variant of the method; what variants share of an image is computed once."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import not_finite
from ..models.pairs import find_pair
from ..networks.dense_clip import ClipConfig
from ..networks.diffusion import DiffusionConfig
from ..networks.frame import FramePart
from ..readout import carry_labels, read_out
from ..segmenter import Segmenter, check_image
from ..settings import Settings
from ..text.encoder import QueryEmbeddings, exhaust
from ..text.vocabulary import Vocabulary
from ..walk.affinity import KERNELS
from ..walk.edges import pixel_transition
from ..walk.fusion import COLUMNS, fuse
from ..walk.random_walk import walk_from
from ..walk.workspace import Workspace
from .refinements import REFINEMENTS, Refine, refinement

_log = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Variant:
    """One way of segmenting.

    settings: overrides of a model pair's settings by flat name, `head` among them. refine: one of `REFINEMENTS`, or a
    function of Q, K and G. Raises ValueError for a name that is unknown.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    refine: str | Refine = "nerve"

    def __post_init__(self) -> None:
        if isinstance(self.refine, str) and self.refine not in REFINEMENTS:
            raise ValueError(f"refinement {self.refine!r} is unknown; choose one of {', '.join(REFINEMENTS)}")


def combinations(axes: Mapping[str, Sequence[Any]]) -> tuple[Variant, ...]:
    """A variant for each combination of values, in their order; named by the values that vary.

    axes: setting or "refine" -> its values. An axis of no values is left out.
    """
    axes = {axis: values for axis, values in axes.items() if values}
    found = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = ", ".join(str(value) for axis, value in chosen.items() if len(axes[axis]) > 1)
        refine = chosen.pop("refine", "nerve")
        found.append(Variant(name or str(refine), chosen, refine))
    return tuple(found)


def settings_of(
    model: str, variants: Sequence[Variant], *, preset: str, shared: Mapping[str, Any]
) -> dict[str, Settings]:
    """What each variant's settings are: the pair's own, then the preset's, those that all share, and the variant's.

    Raises ModelError for a pair that is unknown, and ValueError for two variants of one name, a setting that cannot be,
    or previous_frame_start, with which an image's mask would depend on the image before.
    """
    twice = {variant.name for variant in variants if sum(variant.name == other.name for other in variants) > 1}
    if twice or not variants:
        raise ValueError(f"variants need names of their own; got {', '.join(sorted(twice)) or 'no variant'}")
    pair = find_pair(model)
    found = {variant.name: Settings.of_pair(pair, preset, {**shared, **variant.settings}) for variant in variants}
    if any(settings.walk.previous_frame_start for settings in found.values()):
        raise ValueError("previous_frame_start is for streams; images of a set have no order: leave it off")
    return found


@dataclass(frozen=True)
class Mask:
    """labels: uint8 [H, W], 0 is background. seconds: that it takes by itself, what is shared with others included."""

    labels: np.ndarray
    seconds: float


class Variants:
    """A model pair with several variants of its settings. Not safe for use by several threads at once.

    CLIP is held once for each head, the diffusion branch once for each set of its own settings; nothing else is large.
    Networks run in turn and without CUDA graphs: a mask then depends on its image alone, not on those before.
    """

    def __init__(
        self,
        model: str,
        variants: Sequence[Variant],
        *,
        device: str = "auto",
        precision: str | None = None,
        preset: str = "pair",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """model, device, precision, preset: as for `Segmenter.from_pretrained`. settings: overrides for all variants,
        below their own.

        Raises ModelError, and ValueError as `settings_of` does.
        """
        wanted = settings_of(model, variants, preset=preset, shared=settings or {})
        self._segmenters: dict[str, Segmenter] = {}
        towers: dict[ClipConfig, Segmenter] = {}
        branches: dict[DiffusionConfig, Segmenter] = {}
        for name, chosen in wanted.items():
            if chosen.clip not in towers or chosen.diffusion not in branches:
                # What the cache has was embedded beside other words, by other threads: its last bits differ.
                loaded = Segmenter.from_pretrained(
                    model, device=device, dtype=precision, settings=chosen.flat(), overlap=False, remember=False
                )
                # What of it is here already is let go again, before the next is read.
                towers.setdefault(chosen.clip, loaded)
                branches.setdefault(chosen.diffusion, loaded)
            seeing, taps = towers[chosen.clip], branches[chosen.diffusion].frame_part.taps
            frame = FramePart(seeing.frame_part.clip, taps, seeing.device, edges=chosen.edges, overlap=False)
            self._segmenters[name] = Segmenter(
                seeing.pair_name, frame, seeing.text, chosen, seeing.device, seeing.dtype
            )
        # Variants of one S come one after the other: of those large matrices one is held at a time.
        self._variants = sorted(variants, key=lambda variant: repr(_transition_of(wanted[variant.name])))
        self._workspace = Workspace()
        self._queries: dict[tuple[ClipConfig, Vocabulary], QueryEmbeddings] = {}
        self._seen: set[Vocabulary] = set()

    @property
    def segmenters(self) -> Mapping[str, Segmenter]:
        """Each variant's settings and networks, by its name."""
        return self._segmenters

    @torch.inference_mode()
    def __call__(
        self,
        image: np.ndarray,
        vocabulary: Vocabulary,
        size: tuple[int, int] | None = None,
        *,
        only: Collection[str] | None = None,
    ) -> dict[str, Mask]:
        """The mask of every variant, by its name.

        image: uint8 [H, W, 3], RGB. vocabulary: with negatives of its own it is taken as it stands: each word is a
        query, and nothing else is. size: (rows, columns) of the masks, by default the image's. only: the variants to
        run, by default all. Raises ValueError for an image that is none, and RuntimeError where networks overflow.
        """
        check_image(image)
        once = _Once(next(iter(self._segmenters.values())).device)
        return {
            variant.name: self._mask(variant, image, vocabulary, size or image.shape[:2], once)
            for variant in self._variants
            if only is None or variant.name in only
        }

    def _mask(
        self, variant: Variant, image: np.ndarray, vocabulary: Vocabulary, size: tuple[int, int], once: _Once
    ) -> Mask:
        segmenter = self._segmenters[variant.name]
        s, frame = segmenter.settings, segmenter.frame_part
        queries = self._embed(segmenter, vocabulary)
        once.begin()
        pixels = once("pixels", lambda: _pixels(image, segmenter.device))
        patches = once(s.clip, lambda: frame.clip.features(pixels))
        Q, K = once(s.diffusion, lambda: frame.taps(pixels))
        G = once((s.clip, s.diffusion), lambda: frame.clip.probabilities(patches, queries.embeddings, segmenter.grid))
        key = (variant.refine, _transition_of(s), s.walk)
        P = once(key, lambda: self._refined(variant, segmenter, Q, K, G, once))
        edges = once(s.edges, lambda: pixel_transition(pixels, s.edges))
        what = G, P, queries.classes, len(queries.names), segmenter.grid
        drawn = None if edges is None else carry_labels(*what, s.readout, edges)
        read = read_out(*what, size, s.readout, drawn=drawn)
        if not bool(read.presence.isfinite().all()):
            raise not_finite("the networks'", str(segmenter.dtype).removeprefix("torch."))
        return Mask(read.labels.cpu().numpy(), once.seconds())

    def _refined(self, variant: Variant, segmenter: Segmenter, Q: Tensor, K: Tensor, G: Tensor, once: _Once) -> Tensor:
        """P [N, queries]. The walk takes S from the variant before it where that is the same."""
        s = segmenter.settings
        if callable(variant.refine):
            return variant.refine(Q, K, G)
        if variant.refine != "nerve" or s.walk.method == "exact":  # which needs an S in float64
            return refinement(variant.refine, segmenter)(Q, K, G)
        columns = G.shape[1] * s.walk.steps if KERNELS[s.affinity.kernel].low_rank else COLUMNS
        S = once.last(
            "S",
            (_transition_of(s), columns),
            lambda: (
                fuse(
                    Q, K, G, segmenter.grid, s.affinity, s.fusion, columns=columns, workspace=self._workspace
                ).transition
            ),
        )
        return walk_from(S, G, s.walk).contiguous()

    def _embed(self, segmenter: Segmenter, vocabulary: Vocabulary) -> QueryEmbeddings:
        if vocabulary not in self._seen:
            self._seen.add(vocabulary)
            for doubt in segmenter.doubts(vocabulary):
                _log.warning("%s", doubt.text)
        if vocabulary.negatives is None:
            return exhaust(segmenter.embed_steps(vocabulary))
        key = (segmenter.settings.clip, vocabulary)
        if key not in self._queries:
            self._queries[key] = _as_they_stand(segmenter, vocabulary)
        return self._queries[key]


def _transition_of(settings: Settings) -> tuple[Hashable, ...]:
    """What S depends on."""
    return settings.clip, settings.diffusion, settings.affinity, settings.fusion


def _as_they_stand(segmenter: Segmenter, vocabulary: Vocabulary) -> QueryEmbeddings:
    """Every word a query, as protocols have it: no negative is left out for being near to a name, and no mean is added
    to them, as `text.encoder.vocabulary_steps` does for a robot."""
    named = [(word, label) for label, words in enumerate(vocabulary.synonyms, 1) for word in words]
    words = [*named, *((word, 0) for word in (*(vocabulary.negatives or ()), *vocabulary.background))]
    embeddings = segmenter.text([word for word, _ in words])
    classes = torch.tensor([label for _, label in words], dtype=torch.int64, device=embeddings.device)
    return QueryEmbeddings(vocabulary, embeddings, classes)


def _pixels(image: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, H, W] in 0..1, as the networks take it."""
    return torch.tensor(image, device=device).permute(2, 0, 1)[None].float().div_(255)


class _Once:
    """What is computed of one image, at most once, with the time that it took: a variant's time is what it would take
    by itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[Hashable, tuple[Any, float]] = {}
        self._last: dict[str, tuple[Hashable, Any, float]] = {}
        self._began = self._saved = 0.0

    def begin(self) -> None:
        """A variant's time begins."""
        self._began, self._saved = self._now(), 0.0

    def seconds(self) -> float:
        """Since `begin`, and what was saved by knowing things before."""
        return self._now() - self._began + self._saved

    def __call__(self, key: Hashable, work: Callable[[], Value]) -> Value:
        """What `work` gives, or gave before under that key."""
        if key in self._known:
            value, spent = self._known[key]
            self._saved += spent
            return value
        saved, began = self._saved, self._now()
        value = work()
        self._known[key] = value, self._now() - began + self._saved - saved
        return value

    def last(self, kind: str, key: Hashable, work: Callable[[], Value]) -> Value:
        """The same of what is too large to keep: the last one of its kind alone is."""
        if kind in self._last and self._last[kind][0] == key:
            self._saved += self._last[kind][2]
        else:
            began = self._now()
            self._last[kind] = key, work(), self._now() - began
        return self._last[kind][1]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
