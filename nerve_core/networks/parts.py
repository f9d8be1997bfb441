"""Types for the modules of transformers' and diffusers' networks, which those libraries type as `nn.Module` alone.

A protocol lists what is run of a module, no more: layers may have been replaced by faster ones (`layers.py`), and those
that are never run may have been dropped. Classes are checked once, when a network is taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias, TypeVar, cast

from diffusers.models import AutoencoderKL, Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

Layer: TypeAlias = Callable[[Tensor], Tensor]
T = TypeVar("T")


# --- CLIP of transformers -----------------------------------------------------------------------------------


class ClipAttention(Protocol):
    """`CLIPAttention`."""

    num_heads: int
    q_proj: Layer
    k_proj: Layer
    v_proj: Layer
    out_proj: Layer


class ClipLayer(Protocol):
    """`CLIPEncoderLayer`; the last one lacks what the head does not run."""

    layer_norm1: Layer
    self_attn: ClipAttention
    layer_norm2: Layer
    mlp: Layer


class ClipEmbeddings(Protocol):
    """`CLIPVisionEmbeddings`. class_embedding: [width]."""

    patch_embedding: Layer
    class_embedding: Tensor
    position_embedding: nn.Embedding


class ClipEncoder(Protocol):
    """`CLIPEncoder`."""

    layers: Sequence[ClipLayer]


class ClipVision(Protocol):
    """`CLIPVisionModel`."""

    embeddings: ClipEmbeddings
    pre_layrnorm: Layer
    encoder: ClipEncoder
    post_layernorm: Layer


# --- VAE and U-Net of diffusers -----------------------------------------------------------------------------


class Resnet(Protocol):
    """`ResnetBlock2D` of a VAE, or of a U-Net after `fix_unet`."""

    norm1: Layer
    conv1: Layer
    norm2: Layer
    conv2: Layer
    conv_shortcut: Layer | None


class SelfAttention(Protocol):
    """`Attention` of tokens to themselves; to_out starts with the output projection."""

    heads: int
    to_q: Layer
    to_k: Layer
    to_v: Layer
    to_out: Sequence[Layer]


class ImageAttention(SelfAttention, Protocol):
    """`Attention` over an image's pixels, as in the VAE's middle block."""

    group_norm: Layer


class TransformerBlock(Protocol):
    """`BasicTransformerBlock`; attn2 attends to the prompt, which is fixed."""

    norm1: Layer
    attn1: SelfAttention
    norm2: Layer
    attn2: Layer
    norm3: Layer
    ff: Layer


class SpatialTransformer(Protocol):
    """`Transformer2DModel`: projections are linear layers on tokens, or convolutions on the image."""

    use_linear_projection: bool
    norm: Layer
    proj_in: Layer
    transformer_blocks: Sequence[TransformerBlock]
    proj_out: Layer


class Block(Protocol):
    """Residual blocks at one resolution; some blocks have `attentions` too, one for each."""

    resnets: Sequence[Resnet]


class DownBlock(Block, Protocol):
    """`DownBlock2D`, `CrossAttnDownBlock2D` or `DownEncoderBlock2D`."""

    downsamplers: Iterable[Layer] | None


class MiddleBlock(Block, Protocol):
    """`UNetMidBlock2DCrossAttn`: one residual block, then an attention before each of the others."""

    attentions: Sequence[SpatialTransformer]


class ImageMiddleBlock(Block, Protocol):
    """`UNetMidBlock2D`: as `MiddleBlock`, with None where attention is left out."""

    attentions: Sequence[ImageAttention | None]


class UpBlock(Block, Protocol):
    """`UpBlock2D` or `CrossAttnUpBlock2D`. upsamplers take the image and the size (rows, columns) to give it."""

    upsamplers: Iterable[Callable[[Tensor, tuple[int, ...]], Tensor]] | None


class Unet(Protocol):
    """`UNet2DConditionModel`."""

    conv_in: Layer
    down_blocks: Iterable[DownBlock]
    mid_block: MiddleBlock | None
    up_blocks: Iterable[UpBlock]


class VaeEncoder(Protocol):
    """`Encoder`."""

    conv_in: Layer
    down_blocks: Iterable[DownBlock]
    mid_block: ImageMiddleBlock
    conv_norm_out: Layer
    conv_out: Layer


class Vae(Protocol):
    """`AutoencoderKL`."""

    encoder: VaeEncoder
    quant_conv: Layer | None


# --- typed access -------------------------------------------------------------------------------------------


def as_unet(unet: UNet2DConditionModel) -> Unet:
    """The same network, typed by its parts. Raises ValueError for blocks made of other layers than those known here."""
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        _check_block(block, Transformer2DModel)
    return cast(Unet, unet)


def as_vae(vae: nn.Module) -> Vae:
    """The same network, typed by its parts. Raises ValueError for blocks made of other layers than those known here."""
    of_class(vae, AutoencoderKL, "the VAE")
    for block in (*submodule(vae, "encoder.down_blocks", nn.ModuleList), vae.get_submodule("encoder.mid_block")):
        _check_block(block, Attention)
    return cast(Vae, vae)


def _check_block(block: nn.Module | None, attention: type[nn.Module]) -> None:
    for name, kind in (("resnets", ResnetBlock2D), ("attentions", attention)):
        for place, part in enumerate(getattr(block, name, ())):
            if part is not None:
                of_class(part, kind, f"{name}.{place} of {type(block).__name__}")


def submodule(network: nn.Module, path: str, kind: type[T]) -> T:
    """A network's module by its dotted path. Raises AttributeError without one, ValueError for one of another class."""
    return of_class(network.get_submodule(path), kind, path)


def of_class(value: object, kind: type[T], name: str) -> T:
    """`value`, which must be an instance of `kind`. Raises ValueError, which calls it by `name`."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is of type {type(value).__name__}; only {kind.__name__} is supported")
    return value


def drop(network: nn.Module, *paths: str) -> None:
    """Set the modules of these dotted paths to None, in place, which frees their weights."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, None)
