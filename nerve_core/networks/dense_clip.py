"""Dense CLIP: patch embeddings of an image, by one of several heads, and their class probabilities G."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPVisionConfig

from ..text.templates import template_set
from .layers import attend, attention_weights, pack_weights
from .parts import ClipAttention, ClipLayer, ClipVision, drop, of_class

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_GREATEST_ASPECT = 8  # a longer image is squeezed: attention costs the square of the patches
_GRIDS_KEPT = 16
_BIAS_DEVIATION = 5  # in patches, whatever the grid: NACLIP's own


@dataclass(frozen=True)
class ClipConfig:
    """How an image is put through CLIP and compared with the queries.

    head: one of `HEADS`. short_side: pixels of the input's short side. stretch: a square input that ignores the aspect.
    logit_scale: factor on the cosine before the softmax. templates: name of a set in `templates.py`, or templates
    themselves. negatives: what a pixel may be instead of a name. mean_negative: see `vocabulary_steps`.
    Raises ValueError.
    """

    head: str = "cliper"
    short_side: int = 336
    stretch: bool = False
    logit_scale: float = 50.0
    templates: str | tuple[str, ...] = "imagenet80"
    negatives: tuple[str, ...] = ()
    mean_negative: bool = True

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head {self.head!r} is unknown; choose one of {', '.join(HEADS)}")
        if self.short_side < 1:
            raise ValueError(f"short_side is {self.short_side}; it must be at least one patch of pixels")
        if not 0 < self.logit_scale < math.inf:
            raise ValueError(f"logit_scale is {self.logit_scale}; it must be finite and above 0 (50 is usual)")
        if isinstance(self.negatives, str) or not all(isinstance(word, str) for word in self.negatives):
            raise ValueError(f"negatives is {self.negatives!r}; it must be a list of words")
        templates = template_set(self.templates)
        if not templates or not all(isinstance(text, str) and text.count("{}") == 1 for text in templates):
            raise ValueError(f"templates is {templates!r}; it must be texts with exactly one {{}} each")


@dataclass(frozen=True)
class PatchFeatures:
    """A head's output for one image, for any vocabulary.

    embeddings: float32 [maps, patches, D], unit rows. affinity: float32 [patches, patches], rows sum to 1, along
    which the last map is averaged, or None. grid: (rows, columns) of patches.
    """

    embeddings: Tensor
    affinity: Tensor | None
    grid: tuple[int, int]


class DenseClip:
    """A CLIP vision tower whose output is read for every patch."""

    def __init__(self, clip: CLIPModel, config: ClipConfig) -> None:
        """Take the vision tower out of `clip`, which keeps its text tower; what the head does not run is dropped.

        Raises ValueError for a model whose vision tower was taken before.
        """
        if clip.vision_model is None:
            raise ValueError("this CLIP has no vision tower left, it was taken over before; load it again")
        self.config = config
        self.vision: nn.Module = clip.vision_model
        self._tower: ClipVision = clip.vision_model
        size = of_class(clip.config.vision_config, CLIPVisionConfig, "vision_config").patch_size
        self.patch = of_class(size, int, "patch_size")
        weight = clip.visual_projection.weight
        self.dtype, device = weight.dtype, weight.device
        self._mean = torch.tensor(_MEAN, device=device).view(3, 1, 1)
        self._deviation = torch.tensor(_DEVIATION, device=device).view(3, 1, 1)
        self._positions: dict[tuple[int, int], Tensor] = {}
        last = len(self._tower.encoder.layers) - 1
        drop(self.vision, *(f"encoder.layers.{last}.{unused}" for unused in _UNUSED_IN_LAST[config.head]))
        pack_weights(self.vision)
        self.projection = pack_weights(nn.Sequential(clip.visual_projection))
        drop(clip, "vision_model", "visual_projection")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches for an image of that size.

        The short side is set and the aspect kept to within a patch, up to 8 to 1; a longer image is squeezed to that.
        """
        if self.config.stretch:
            height = width = 1
        short = min(height, width)
        height, width = min(height, _GREATEST_ASPECT * short), min(width, _GREATEST_ASPECT * short)
        scale = self.config.short_side / short
        return max(1, round(height * scale / self.patch)), max(1, round(width * scale / self.patch))

    @torch.no_grad()
    def features(self, image: Tensor) -> PatchFeatures:
        """image: float32 [1, 3, H, W] in 0..1, RGB, on the model's device."""
        return self.embed(self.prepared(image), self.positions(self.grid(*image.shape[-2:])))

    @torch.no_grad()
    def prepared(self, image: Tensor) -> Tensor:
        """An image as for `features`, resized to whole patches and normalised: [1, 3, rows, columns] in the network's
        dtype."""
        grid = self.grid(*image.shape[-2:])
        size = (grid[0] * self.patch, grid[1] * self.patch)
        pixels = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return ((pixels - self._mean) / self._deviation).to(self.dtype)

    @torch.no_grad()
    def embed(self, pixels: Tensor, positions: Tensor) -> PatchFeatures:
        """The network alone, for pixels of `prepared` and `positions` of their grid. It depends on nothing that changes
        from image to image, so that torch.compile compiles it once a grid."""
        grid = (pixels.shape[2] // self.patch, pixels.shape[3] // self.patch)
        embeddings = self._tower.embeddings
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [1, patches, width]
        tokens = torch.cat([embeddings.class_embedding.expand(1, 1, -1), patches], dim=1)
        hidden = self._tower.pre_layrnorm(tokens + positions)
        maps, affinity = HEADS[self.config.head](self._tower.encoder.layers, hidden, grid)
        projected = self.projection(self._tower.post_layernorm(maps[:, 1:]))
        return PatchFeatures(F.normalize(projected.float(), dim=-1), affinity, grid)

    @torch.no_grad()
    def probabilities(self, features: PatchFeatures, queries: Tensor, size: tuple[int, int]) -> Tensor:
        """G: float32 [N, queries] on a grid of `size` (rows, columns), rows sum to 1.

        queries: unit rows [queries, D]. Softmax over all queries of logit_scale times the cosine, averaged over the
        head's maps, resized bilinearly: every step keeps rows stochastic. Where the head has an affinity, the last map
        is multiplied by it and counts as much as the mean of the others.
        """
        cosine = features.embeddings @ queries.to(features.embeddings.dtype).T
        maps = (self.config.logit_scale * cosine).softmax(-1)  # [maps, patches, queries]
        scores = (maps if features.affinity is None else maps[:-1]).mean(0)
        if features.affinity is not None:
            scores = (scores + features.affinity @ maps[-1]) / 2
        scores = scores.T.unflatten(-1, features.grid)[None]
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)[0].flatten(1).T

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embeddings resized to a grid (bicubic), [1, 1 + patches, width]; the last 16 grids are kept."""
        if grid not in self._positions:
            if len(self._positions) == _GRIDS_KEPT:
                self._positions.pop(next(iter(self._positions)))
            learnt = self._tower.embeddings.position_embedding.weight
            side = round((len(learnt) - 1) ** 0.5)
            plane = learnt[1:].T.reshape(1, -1, side, side)
            if grid != (side, side):
                plane = F.interpolate(plane.float(), grid, mode="bicubic", align_corners=False).to(learnt.dtype)
            self._positions[grid] = torch.cat([learnt[:1], plane[0].flatten(1).T])[None]
        return self._positions[grid]


# --- heads: layers, hidden [1, 1 + patches, width], grid -> maps [maps, 1 + patches, width], affinity or None ---


def _split(attention: ClipAttention, projected: Tensor) -> Tensor:
    """[B, T, width] -> [B, heads, T, size]."""
    return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _merge(attention: ClipAttention, attended: Tensor) -> Tensor:
    """[B, heads, T, size] -> [B, T, width] through the output projection."""
    return attention.out_proj(attended.transpose(1, 2).flatten(2))


def run_layer(layer: ClipLayer, hidden: Tensor) -> Tensor:
    """One transformer layer, as trained."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    q, k, v = (_split(attention, project(normed)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    hidden = hidden + _merge(attention, attend(q, k, v))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


_Grid: TypeAlias = tuple[int, int]


def _vanilla(layers: Sequence[ClipLayer], hidden: Tensor, grid: _Grid) -> tuple[Tensor, None]:
    """The last layer's tokens as they are."""
    for layer in layers:
        hidden = run_layer(layer, hidden)
    return hidden, None


def _maskclip(layers: Sequence[ClipLayer], hidden: Tensor, grid: _Grid) -> tuple[Tensor, None]:
    """Without attention in the last layer: every token keeps its own value (MaskCLIP, arXiv 2112.01071, Sec. 3.3)."""
    for layer in layers[:-1]:
        hidden = run_layer(layer, hidden)
    last = layers[-1]
    hidden = hidden + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(hidden)))
    return hidden + last.mlp(last.layer_norm2(hidden)), None


def _before_last(layers: Sequence[ClipLayer], hidden: Tensor, *projections: str) -> list[Tensor]:
    """The last layer's input, and what its projections of these names make of it, [1, heads, T, size] each."""
    for layer in layers[:-1]:
        hidden = run_layer(layer, hidden)
    attention, normed = layers[-1].self_attn, layers[-1].layer_norm1(hidden)
    return [hidden, *(_split(attention, getattr(attention, name)(normed)) for name in projections)]


def _sclip(layers: Sequence[ClipLayer], hidden: Tensor, grid: _Grid) -> tuple[Tensor, None]:
    """The last layer's attention is that of its queries to its queries plus that of its keys to its keys:
    softmax(q q^T / sqrt(D)) + softmax(k k^T / sqrt(D)) (SCLIP, arXiv 2312.01597)."""
    hidden, q, k, v = _before_last(layers, hidden, "q_proj", "k_proj", "v_proj")
    last = layers[-1]
    hidden = hidden + _merge(last.self_attn, attend(q, q, v) + attend(k, k, v))
    return hidden + last.mlp(last.layer_norm2(hidden)), None


def _clearclip(layers: Sequence[ClipLayer], hidden: Tensor, grid: _Grid) -> tuple[Tensor, None]:
    """The last layer's attention alone, without residual and feed-forward, of its queries to its queries:
    softmax(q q^T / sqrt(D)) (ClearCLIP, arXiv 2407.12442)."""
    _, q, v = _before_last(layers, hidden, "q_proj", "v_proj")
    return _merge(layers[-1].self_attn, attend(q, q, v)), None


def _naclip(layers: Sequence[ClipLayer], hidden: Tensor, grid: _Grid) -> tuple[Tensor, None]:
    """The last layer's attention alone, without residual and feed-forward, of its keys to its keys, with a bias by
    distance: softmax(k k^T / sqrt(D) + omega), omega a Gaussian of height 1 and deviation 5 patches around each patch,
    and 0 to and from the class token (NACLIP, arXiv 2404.08181)."""
    _, k, v = _before_last(layers, hidden, "k_proj", "v_proj")
    omega = F.pad(_distance_bias(grid, k.device), (1, 0, 1, 0)).to(k.dtype)
    return _merge(layers[-1].self_attn, F.scaled_dot_product_attention(k, k, v, attn_mask=omega)), None


def _distance_bias(grid: _Grid, device: torch.device) -> Tensor:
    """exp(-d^2 / (2 * 5^2)) of the distance d between any two patches, [patches, patches]: a product of both axes."""
    along = []
    for side in grid:
        place = torch.arange(side, device=device, dtype=torch.float32)
        along.append(torch.exp(-((place - place[:, None]) ** 2) / (2 * _BIAS_DEVIATION**2)))
    return torch.kron(*along)


def _attend_and_add(q: Tensor, k: Tensor, v: Tensor, fused: Tensor) -> Tensor:
    """Attention of q, k, v [heads, T, size], whose weights are added to `fused` [heads, T, T]."""
    heads = len(q)
    step = 1 if q.device.type == "cpu" else heads  # the weights of one head stay in a core's cache
    weights, attended = torch.empty_like(fused[:step]), torch.empty_like(q)
    for head in range(0, heads, step):
        part = slice(head, head + step)
        attention_weights(q[part], k[part], out=weights)
        fused[part] += weights
        attended[part] = weights.to(v.dtype) @ v[part]
    return attended


def _cliper(layers: Sequence[ClipLayer], hidden: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """The last layer with the earlier layers' fused attention, over every layer's input (CLIPer, arXiv 2411.13836).

    Per head: the earlier layers' attention summed, made doubly near-stochastic, symmetric, less its column means,
    rectified, rows normalised. Every layer's input goes through the last layer's values with it, without residual and
    feed-forward. The affinity is the heads' mean over patches alone, its rows normalised: CLIPer's product of its
    thresholded map with the mean attention becomes a stochastic one, so that G stays a distribution.
    """
    if len(layers) < 2:
        raise ValueError("head 'cliper' needs a CLIP of at least two layers; choose vanilla or maskclip")
    tokens, heads = hidden.shape[1], layers[0].self_attn.num_heads
    fused = torch.zeros((heads, tokens, tokens), device=hidden.device)
    inputs = []
    for layer in layers[:-1]:
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        inputs.append(normed)
        q, k, v = (
            _split(attention, project(normed))[0] for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        hidden = hidden + _merge(attention, _attend_and_add(q, k, v, fused)[None])
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    inputs.append(hidden)
    fused /= fused.sum(-2, keepdim=True).clamp_min_(torch.finfo(fused.dtype).tiny)  # a token that none attends to
    fused /= fused.sum(-1, keepdim=True)
    fused = (fused + fused.mT) / 2
    fused = (fused - fused.mean(-2, keepdim=True)).clamp_min_(0)
    fused /= fused.sum(-1, keepdim=True).clamp_min_(1e-12)
    last = layers[-1].self_attn
    stacked = layers[-1].layer_norm1(torch.cat(inputs))  # [layers, T, width]
    values = _split(last, last.v_proj(stacked)).permute(1, 2, 0, 3).flatten(2)  # [heads, T, layers * size]
    attended = (fused.to(values.dtype) @ values).unflatten(-1, (len(layers), -1))
    maps = _merge(last, attended.permute(2, 0, 1, 3))
    affinity = fused.mean(0)[1:, 1:]
    affinity.diagonal().add_(1e-12)  # a patch that attends to no other keeps its own map
    return maps, affinity / affinity.sum(-1, keepdim=True)


HEADS: dict[str, Callable[[Sequence[ClipLayer], Tensor, _Grid], tuple[Tensor, Tensor | None]]] = {
    "vanilla": _vanilla,
    "maskclip": _maskclip,
    "sclip": _sclip,
    "clearclip": _clearclip,
    "naclip": _naclip,
    "cliper": _cliper,
}
"""Ways to read the last layer, by name."""
_UNUSED_IN_LAST: dict[str, tuple[str, ...]] = {
    "vanilla": (),
    "maskclip": ("self_attn.q_proj", "self_attn.k_proj"),
    "sclip": (),
    "clearclip": ("self_attn.k_proj", "layer_norm2", "mlp"),
    "naclip": ("self_attn.q_proj", "layer_norm2", "mlp"),
    "cliper": ("self_attn.q_proj", "self_attn.k_proj", "layer_norm2", "mlp"),
}
"""Modules of the last layer that a head does not run, and that are dropped."""
