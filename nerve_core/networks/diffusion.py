"""Queries Q and keys K of an image from a diffusion U-Net's self-attention layers: VAE encoder, noise, cut U-Net."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import attend, pack_weights
from .parts import (
    Block,
    Layer,
    Resnet,
    SelfAttention,
    SpatialTransformer,
    Unet,
    Vae,
    as_unet,
    as_vae,
    drop,
    submodule,
)

ENCODERS = ("vae", "taesd")


@dataclass(frozen=True)
class DiffusionConfig:
    """How an image is put through the diffusion model, and which self-attention layers are read.

    input_size: (rows, columns) of pixels, to which the whole image is resized. timestep: of the training schedule's
    1000, at which noise is added. taps: (up block, attention) of each self-attention layer that is read. noise_seed:
    of the one noise tensor that every frame gets. encoder: of the latent: "vae", the model's own, or "taesd", a tiny
    one instead, which changes the result. Raises ValueError.
    """

    input_size: tuple[int, int] = (512, 512)
    timestep: int = 100
    taps: tuple[tuple[int, int], ...] = ((3, 1), (3, 2))
    noise_seed: int = 0
    encoder: str = "vae"

    def __post_init__(self) -> None:
        if not _whole(self.input_size, 2) or min(self.input_size) < 1:
            raise ValueError(f"input_size is {self.input_size}; it must be (rows, columns) of pixels")
        if not _whole((self.timestep,), 1) or not 0 <= self.timestep < 1000:
            raise ValueError(f"timestep is {self.timestep}; it must be whole and lie in 0..999 (100 is usual)")
        if not _whole((self.noise_seed,), 1):
            raise ValueError(f"noise_seed is {self.noise_seed!r}; it must be a whole number")
        pairs = isinstance(self.taps, tuple) and all(_whole(tap, 2) and min(tap) >= 0 for tap in self.taps)
        if not self.taps or not pairs or list(self.taps) != sorted(set(self.taps)):
            raise ValueError(
                f"taps are {self.taps}; they must be different (up block, attention) pairs in ascending order"
            )
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder {self.encoder!r} is unknown; choose one of {', '.join(ENCODERS)}")


def _whole(values: object, count: int) -> bool:
    """Whether `values` is a tuple of so many whole numbers."""
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    )


def noise_levels(scheduler: dict, timestep: int) -> tuple[float, float]:
    """(sqrt(a), sqrt(1 - a)), a = prod_{s <= t} (1 - beta_s): the share of latent and of noise at a timestep.

    scheduler: the JSON of a diffusers scheduler. Raises ValueError for a schedule that is not known or has no such
    timestep.
    """
    altered = [name for name in ("trained_betas", "rescale_betas_zero_snr") if scheduler.get(name)]
    if altered:
        raise ValueError(f"the scheduler sets {', '.join(altered)}, which is not supported; use one of plain betas")
    start, end, steps = scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"]
    kind = scheduler["beta_schedule"]
    if kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        raise ValueError(f"beta_schedule {kind!r} is unknown; linear and scaled_linear are accepted")
    if timestep >= steps:
        raise ValueError(f"timestep is {timestep}; this scheduler's num_train_timesteps is {steps}")
    kept = (1 - betas).cumprod(0)[timestep].item()
    return kept**0.5, (1 - kept) ** 0.5


class DiffusionTaps:
    """A VAE encoder and a U-Net read up to the keys of its last tapped self-attention layer."""

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        unet: UNet2DConditionModel,
        scheduler: dict,
        prompt: Tensor,
        config: DiffusionConfig,
    ) -> None:
        """Take the two networks over: both are cut down to what is run, in place, and cannot be used otherwise again.

        vae: of the class that `config.encoder` names. scheduler: its JSON. prompt: embedding of the empty prompt,
        [1, T, width], on the device and in the dtype of the networks.

        Raises ValueError for taps that the U-Net does not have, for an input size that its down-sampling does not
        divide, and for networks whose own forward does more than is run here.
        """
        self.vae, self.unet, self.config = vae, unet, config
        self.dtype = prompt.dtype
        self.cell = 2 ** (len(vae.config["block_out_channels"]) - 1)
        step = self.cell * 2 ** (len(unet.config["block_out_channels"]) - 1)
        if any(side % step for side in config.input_size):
            raise ValueError(
                f"input_size is {config.input_size}; both sides must be multiples of {step} for this model"
            )
        if isinstance(vae, AutoencoderTiny) != (config.encoder == "taesd"):
            raise ValueError(f"encoder is {config.encoder!r} and the network is a {type(vae).__name__}; load the other")
        made, taken = vae.config["latent_channels"], unet.config["in_channels"]
        if made != taken:
            raise ValueError(
                f"the encoder makes latents of {made} channels and the U-Net takes "
                f"{taken}; take both from one model for text to image"
            )
        cut_encoder(vae)
        cut_unet(unet, config.taps)
        fix_unet(unet, config.timestep, prompt)
        self._encode: Layer = vae.encoder if isinstance(vae, AutoencoderTiny) else partial(encode, as_vae(vae))
        self._unet = as_unet(unet)
        pack_weights(vae)
        pack_weights(unet)
        self.scaling = vae.config["scaling_factor"]
        self.signal, self.noise = noise_levels(scheduler, config.timestep)
        rows, columns = (side // self.cell for side in config.input_size)
        coarser = 2 ** (len(unet.config["block_out_channels"]) - 1 - config.taps[0][0])
        self.grid = (rows // coarser, columns // coarser)
        generator = torch.Generator().manual_seed(config.noise_seed)
        noise = torch.randn((1, made, rows, columns), generator=generator)
        self._noise = (self.noise * noise).to(prompt.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Q, K: [heads, N, D] in the network's dtype, of all taps; N tokens of `grid`.

        image: float32 [1, 3, H, W] in 0..1, RGB, on the model's device. The same image always gives the same result.
        """
        return self.project(self.prepared(image))

    @torch.no_grad()
    def prepared(self, image: Tensor) -> Tensor:
        """An image in 0..1 resized to the input size: [1, 3, *input_size] in -1..1, in the network's dtype."""
        pixels = F.interpolate(image, self.config.input_size, mode="bilinear", antialias=True, align_corners=False)
        return (2 * pixels - 1).to(self.dtype, memory_format=torch.channels_last)

    @torch.no_grad()
    def project(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The networks alone, for pixels of `prepared`: torch.compile compiles it once, whatever the images' sizes."""
        Q, K = tapped_projections(self._unet, self._noisy_latent(pixels), self.config.taps)
        return Q[0], K[0]

    def noisy_latent(self, image: Tensor) -> Tensor:
        """The image's latent at the timestep: [1, channels, h, w] in the network's dtype, `cell` pixels a side each."""
        return self._noisy_latent(self.prepared(image))

    @torch.no_grad()
    def _noisy_latent(self, pixels: Tensor) -> Tensor:
        latent = self._encode(pixels).float() * self.scaling
        return (self.signal * latent + self._noise).to(self.dtype, memory_format=torch.channels_last)


# --- cutting the networks down ------------------------------------------------------------------------------

_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D", None}
_PLAIN = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
}
_MORE = (
    "addition_embed_type",
    "center_input_sample",
    "class_embed_type",
    "cross_attention_norm",
    "dual_cross_attention",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "mid_block_only_cross_attention",
    "num_class_embeds",
    "only_cross_attention",
    "resnet_skip_time_act",
    "time_embedding_act_fn",
)
_UNUSED_IN_TAPPED = ("attn2", "norm2", "norm3", "ff", "attn1.to_v", "attn1.to_out")


def cut_encoder(vae: AutoencoderKL | AutoencoderTiny) -> None:
    """Drop the decoder and the latent's variance, in place. Raises ValueError for an encoder that `encode` would run
    wrongly."""
    drop(vae, "decoder")
    if isinstance(vae, AutoencoderTiny):
        return
    drop(vae, "post_quant_conv")
    last = submodule(vae, "encoder.conv_out" if vae.quant_conv is None else "quant_conv", nn.Conv2d)
    mean = slice(vae.config["latent_channels"])
    last.weight = nn.Parameter(last.weight.detach()[mean].clone(), requires_grad=False)
    if last.bias is not None:
        last.bias = nn.Parameter(last.bias.detach()[mean].clone(), requires_grad=False)
    more = [kind for kind in vae.config["down_block_types"] if kind != "DownEncoderBlock2D"]
    more += [] if vae.config["act_fn"] in _PLAIN["act_fn"] else [f"act_fn = {vae.config['act_fn']}"]
    if more:
        raise ValueError(f"this VAE has {', '.join(more)}, which is not supported; use Stable Diffusion's")


def cut_unet(unet: UNet2DConditionModel, taps: Sequence[tuple[int, int]]) -> None:
    """Drop everything after the keys of the last tap, in place; also of a network on the meta device.

    Raises ValueError for taps that the U-Net does not have and for a U-Net whose own forward does more than
    `tapped_projections`, whose taps would be wrong.
    """
    config = unet.config
    more = [f"{name} = {config[name]}" for name in _MORE if config.get(name) not in (None, False)]
    more += [f"{name} = {config[name]}" for name, known in _PLAIN.items() if config.get(name, known[0]) not in known]
    blocks = {*config["down_block_types"], config["mid_block_type"], *config["up_block_types"]} - _BLOCKS
    if more or blocks:
        raise ValueError(
            f"this U-Net has {', '.join([*more, *sorted(blocks)])}, which is not supported; use one conditioned on "
            "the timestep and the prompt alone, as Stable Diffusion 1 and 2 are"
        )
    counts = [len(getattr(block, "attentions", ())) for block in unet.up_blocks]
    for block, place in taps:
        if block >= len(counts) or place >= counts[block]:
            raise ValueError(
                f"tap ({block}, {place}) does not exist: this U-Net's up blocks have "
                f"{', '.join(map(str, counts))} attentions"
            )
    if len({block for block, _ in taps}) > 1:
        raise ValueError(f"taps are {tuple(taps)}; all must lie in one up block, so that they share a grid")
    last, place = taps[-1]
    path = f"up_blocks.{last}"
    tapped = f"{path}.attentions.{place}"
    del unet.up_blocks[last + 1 :]
    for part in ("resnets", "attentions"):
        del submodule(unet, f"{path}.{part}", nn.ModuleList)[place + 1 :]
    del submodule(unet, f"{tapped}.transformer_blocks", nn.ModuleList)[1:]
    drop(unet, "conv_norm_out", "conv_act", "conv_out", f"{path}.upsamplers", f"{tapped}.proj_out")
    drop(unet, *(f"{tapped}.transformer_blocks.0.{unused}" for unused in _UNUSED_IN_TAPPED))


class _PromptAttention(nn.Module):
    """Cross-attention to a prompt that does not change: its keys and values [1, heads, T, D] are computed once."""

    K: Tensor
    V: Tensor

    def __init__(self, attention: Attention, prompt: Tensor) -> None:
        super().__init__()
        self.heads, self.to_q, self.to_out = attention.heads, attention.to_q, attention.to_out
        self.register_buffer("K", _split(attention.to_k(prompt), self.heads).contiguous())
        self.register_buffer("V", _split(attention.to_v(prompt), self.heads).contiguous())

    def forward(self, tokens: Tensor) -> Tensor:
        K, V = (x.expand(len(tokens), -1, -1, -1) for x in (self.K, self.V))
        return _merge(self.to_out[0], attend(_split(self.to_q(tokens), self.heads), K, V))


@torch.no_grad()
def fix_unet(unet: UNet2DConditionModel, timestep: int, prompt: Tensor) -> None:
    """Compute, once and in place, what depends on the timestep and the prompt alone, and drop the modules it came from.

    A residual block's projection of the timestep is added to the bias of its first convolution. prompt: [1, T, width].
    Raises ValueError for a U-Net that was fixed before.
    """
    if unet.time_embedding is None:
        raise ValueError("this U-Net was taken over before, for one timestep and one prompt; load it again")
    steps = torch.tensor([timestep], device=prompt.device)
    embedding = F.silu(unet.time_embedding(unet.time_proj(steps).to(prompt.dtype)))
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
            bias = module.conv1.bias + module.time_emb_proj(embedding)[0]
            module.conv1.bias = nn.Parameter(bias, requires_grad=False)
            drop(module, "time_emb_proj")
        if isinstance(module, BasicTransformerBlock) and module.attn2 is not None:
            module.register_module("attn2", _PromptAttention(module.attn2, prompt))
    drop(unet, "time_embedding", "time_proj")


# --- running the networks' own modules ----------------------------------------------------------------------


def encode(vae: Vae, pixels: Tensor) -> Tensor:
    """The mean of the latent's distribution, before its scaling: [B, channels, h, w]; nothing is sampled.

    vae: after `cut_encoder`. pixels: [B, 3, H, W] in -1..1.
    """
    encoder = vae.encoder
    hidden = encoder.conv_in(pixels)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            hidden = run_resnet(resnet, hidden)
        for downsampler in block.downsamplers or ():
            hidden = downsampler(hidden)
    middle = encoder.mid_block
    hidden = run_resnet(middle.resnets[0], hidden)
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        if attention is not None:
            tokens = _tokens(attention.group_norm(hidden))
            hidden = _image(_self_attention(attention, tokens), hidden).add_(hidden)
        hidden = run_resnet(resnet, hidden)
    latent = encoder.conv_out(F.silu(encoder.conv_norm_out(hidden), inplace=True))
    return latent if vae.quant_conv is None else vae.quant_conv(latent)


def tapped_projections(unet: Unet, latent: Tensor, taps: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Run the U-Net's own modules until the last tap and return its self-attention queries and keys.

    unet: after `fix_unet`. latent: [B, channels, h, w]. taps: ascending (up block, attention) of one up block.
    Returns Q, K: [B, heads of all taps, h * w, D].
    """
    hidden = unet.conv_in(latent)
    skips = [hidden]
    for down in unet.down_blocks:
        for resnet, attention in _layers(down):
            hidden = run_resnet(resnet, hidden)
            if attention is not None:
                hidden = _transformer(attention, hidden)
            skips.append(hidden)
        for downsampler in down.downsamplers or ():
            hidden = downsampler(hidden)
            skips.append(hidden)
    if unet.mid_block is not None:
        hidden = run_resnet(unet.mid_block.resnets[0], hidden)
        for attention, resnet in zip(unet.mid_block.attentions, unet.mid_block.resnets[1:], strict=True):
            hidden = run_resnet(resnet, _transformer(attention, hidden))
    read: list[tuple[Tensor, Tensor]] = []
    for index, up in enumerate(unet.up_blocks):
        for place, (resnet, attention) in enumerate(_layers(up)):
            hidden = run_resnet(resnet, torch.cat([hidden, skips.pop()], dim=1))
            if attention is None:
                continue
            if (index, place) in taps:
                read.append(_self_attention_projections(attention, hidden))
            if (index, place) == tuple(taps[-1]):
                return torch.cat([q for q, _ in read], 1), torch.cat([k for _, k in read], 1)
            hidden = _transformer(attention, hidden)
        for upsampler in up.upsamplers or ():
            hidden = upsampler(hidden, tuple(skips[-1].shape[2:]))
    raise ValueError(f"taps {tuple(taps)} are not all in this U-Net, or it was cut down for others")


def _layers(block: Block) -> Iterator[tuple[Resnet, SpatialTransformer | None]]:
    """A block's residual blocks, each with the transformer that follows it."""
    attentions = getattr(block, "attentions", (None,) * len(block.resnets))
    return zip(block.resnets, attentions, strict=True)


def run_resnet(resnet: Resnet, hidden: Tensor) -> Tensor:
    """A residual block after `fix_unet`, or of a VAE. In place where memory traffic is the cost."""
    inner = resnet.conv1(F.silu(resnet.norm1(hidden), inplace=True))
    inner = resnet.conv2(F.silu(resnet.norm2(inner), inplace=True))
    return inner.add_(hidden if resnet.conv_shortcut is None else resnet.conv_shortcut(hidden))


def _transformer(transformer: SpatialTransformer, hidden: Tensor) -> Tensor:
    """A spatial transformer of [B, channels, h, w]."""
    tokens = _enter(transformer, hidden)
    for block in transformer.transformer_blocks:
        tokens = _self_attention(block.attn1, block.norm1(tokens)).add_(tokens)
        tokens = block.attn2(block.norm2(tokens)).add_(tokens)
        tokens = block.ff(block.norm3(tokens)).add_(tokens)
    if transformer.use_linear_projection:
        return _image(transformer.proj_out(tokens), hidden).add_(hidden)
    return transformer.proj_out(_image(tokens, hidden)).add_(hidden)


def _self_attention_projections(transformer: SpatialTransformer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Q, K [B, heads, h * w, D] of a spatial transformer's first self-attention, for its input [B, channels, h, w]."""
    block = transformer.transformer_blocks[0]
    normed, attention = block.norm1(_enter(transformer, hidden)), block.attn1
    return _split(attention.to_q(normed), attention.heads), _split(attention.to_k(normed), attention.heads)


def _enter(transformer: SpatialTransformer, hidden: Tensor) -> Tensor:
    """[B, channels, h, w] -> the tokens [B, h * w, width] of a spatial transformer."""
    hidden = transformer.norm(hidden)
    if transformer.use_linear_projection:
        return transformer.proj_in(_tokens(hidden))
    return _tokens(transformer.proj_in(hidden))


def _self_attention(attention: SelfAttention, tokens: Tensor) -> Tensor:
    q, k, v = (_split(project(tokens), attention.heads) for project in (attention.to_q, attention.to_k, attention.to_v))
    return _merge(attention.to_out[0], attend(q, k, v))


def _tokens(image: Tensor) -> Tensor:
    """[B, channels, h, w] -> [B, h * w, channels]: no copy where channels come last."""
    return image.flatten(2).transpose(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, h * w, channels] -> [B, channels, h, w], the inverse of `_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def _split(projected: Tensor, heads: int) -> Tensor:
    """[B, T, heads * D] -> [B, heads, T, D]."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(projection: Layer, attended: Tensor) -> Tensor:
    """[B, heads, T, D] -> [B, T, width] through the output projection of an attention."""
    return projection(attended.transpose(1, 2).flatten(2))
