"""Image -> latent -> Q, K: which pixels belong together, from the last self-attention layers of a diffusion U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DiffusionConfig:
    """How the diffusion branch looks at an image.

    input_size: (rows, columns) of pixels, to which the whole image is resized. timestep: of the training schedule's
    1000, at which noise is added. taps: (up block, attention) of each self-attention layer that is read. noise_seed:
    of the one noise
    tensor that every frame gets. Raises ValueError.
    """

    input_size: tuple[int, int] = (512, 512)
    timestep: int = 100
    taps: tuple[tuple[int, int], ...] = ((3, 1), (3, 2))
    noise_seed: int = 0

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


def _whole(values: object, count: int) -> bool:
    """Whether `values` is a tuple of so many whole numbers."""
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    )


def noise_levels(scheduler: dict, timestep: int) -> tuple[float, float]:
    """(sqrt(a), sqrt(1 - a)), a = prod_{s <= t} (1 - beta_s): the share of latent and of noise at a timestep.

    scheduler: the JSON beside a diffusers scheduler. Raises ValueError for a schedule that is not known or has no such
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
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: dict,
        prompt: Tensor,
        config: DiffusionConfig,
    ) -> None:
        """scheduler: its JSON. prompt: embedding of the empty prompt, [1, T, width], on the device.

        Raises ValueError for taps that the U-Net does not have and for an input size that its down-sampling does not
        divide.
        """
        self.vae, self.unet, self.prompt, self.config = vae, unet, prompt, config
        _check_plain(unet)
        for block, attention in config.taps:
            found = getattr(unet.up_blocks[block], "attentions", ()) if block < len(unet.up_blocks) else ()
            if attention >= len(found):
                raise ValueError(
                    f"tap ({block}, {attention}) does not exist: this U-Net's up blocks have "
                    f"{_attentions(unet)} attentions"
                )
        if len({block for block, _ in config.taps}) > 1:
            raise ValueError(f"taps are {config.taps}; all must lie in one up block, so that they share a grid")
        self.cell = 2 ** (len(vae.config.block_out_channels) - 1)
        step = self.cell * 2 ** (len(unet.config.block_out_channels) - 1)
        if any(side % step for side in config.input_size):
            raise ValueError(
                f"input_size is {config.input_size}; both sides must be multiples of {step} for this model"
            )
        self.signal, self.noise = noise_levels(scheduler, config.timestep)
        rows, columns = (side // self.cell for side in config.input_size)
        coarser = 2 ** (len(unet.up_blocks) - 1 - config.taps[0][0])
        self.grid = (rows // coarser, columns // coarser)
        generator = torch.Generator().manual_seed(config.noise_seed)
        noise = torch.randn((1, vae.config.latent_channels, rows, columns), generator=generator)
        self._noise = (self.noise * noise).to(prompt.device)
        self._timestep = torch.tensor([config.timestep], device=prompt.device)

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Q, K: [heads, N, D] in the network's dtype, of all taps; N tokens of `grid`.

        image: float32 [1, 3, H, W] in 0..1, RGB, on the model's device. The same image always gives the same result.
        """
        Q, K = tapped_projections(self.unet, self.noisy_latent(image), self._timestep, self.prompt, self.config.taps)
        return Q[0], K[0]

    @torch.inference_mode()
    def noisy_latent(self, image: Tensor) -> Tensor:
        """The image's latent at the timestep: [1, channels, h, w] in the network's dtype, `cell` pixels a side each."""
        pixels = F.interpolate(image, self.config.input_size, mode="bilinear", antialias=True, align_corners=False)
        pixels = (2 * pixels - 1).to(self.prompt.dtype)
        moments = self.vae.encoder(pixels)
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        latent = moments.chunk(2, dim=1)[0].float() * self.vae.config.scaling_factor  # the mean: nothing is sampled
        return (self.signal * latent + self._noise).to(self.prompt.dtype)


_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D", None}
_MORE = (
    "addition_embed_type",
    "center_input_sample",
    "class_embed_type",
    "dual_cross_attention",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "only_cross_attention",
    "time_embedding_act_fn",
)


def _check_plain(unet: UNet2DConditionModel) -> None:
    """Raise ValueError for a U-Net whose own forward does more than `tapped_projections`: its taps would be wrong."""
    config = unet.config
    more = [f"{name} = {config[name]}" for name in _MORE if config.get(name) not in (None, False)]
    blocks = {*config["down_block_types"], config["mid_block_type"], *config["up_block_types"]} - _BLOCKS
    if more or blocks:
        raise ValueError(
            f"this U-Net has {', '.join([*more, *sorted(blocks)])}, which is not supported; use one conditioned on "
            "the timestep and the prompt alone, as Stable Diffusion 1 and 2 are"
        )


def _attentions(unet: UNet2DConditionModel) -> str:
    return ", ".join(str(len(getattr(block, "attentions", ()))) for block in unet.up_blocks)


def tapped_projections(
    unet: UNet2DConditionModel,
    latent: Tensor,
    timestep: Tensor,
    prompt: Tensor,
    taps: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Run the U-Net's own modules until the last tap and return its self-attention queries and keys.

    latent: [B, channels, h, w]. timestep: int64 [1]. prompt: [B or 1, T, width]. taps: ascending (up block, attention).
    Returns Q, K: [B, heads of all taps, h * w, D]. All taps must have the same tokens and head size.
    """
    embedding = unet.time_embedding(unet.time_proj(timestep).to(latent.dtype)).expand(len(latent), -1)
    prompt = prompt.expand(len(latent), -1, -1)
    hidden = unet.conv_in(latent)
    skips = [hidden]
    for block in unet.down_blocks:
        arguments = {"encoder_hidden_states": prompt} if hasattr(block, "attentions") else {}
        hidden, added = block(hidden, embedding, **arguments)
        skips.extend(added)
    if unet.mid_block is not None:
        arguments = {"encoder_hidden_states": prompt} if hasattr(unet.mid_block, "attentions") else {}
        hidden = unet.mid_block(hidden, embedding, **arguments)
    read: list[tuple[Tensor, Tensor]] = []
    for index, block in enumerate(unet.up_blocks):
        attentions = getattr(block, "attentions", (None,) * len(block.resnets))
        for place, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
            hidden = resnet(torch.cat([hidden, skips.pop()], dim=1), embedding)
            if (index, place) in taps:
                read.append(_self_attention_projections(attention, hidden))
            if (index, place) == tuple(taps[-1]):
                return torch.cat([q for q, _ in read], 1), torch.cat([k for _, k in read], 1)
            if attention is not None:
                hidden = attention(hidden, encoder_hidden_states=prompt, return_dict=False)[0]
        for upsampler in block.upsamplers or ():
            hidden = upsampler(hidden, tuple(skips[-1].shape[2:]))
    raise ValueError(f"taps {tuple(taps)} are not all in this U-Net: its up blocks have {_attentions(unet)} attentions")


def _self_attention_projections(transformer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Q, K [B, heads, h * w, D] of a spatial transformer's first self-attention, for its input [B, channels, h, w]."""
    hidden = transformer.norm(hidden)
    if transformer.use_linear_projection:
        tokens = transformer.proj_in(hidden.flatten(2).transpose(1, 2))
    else:
        tokens = transformer.proj_in(hidden).flatten(2).transpose(1, 2)
    block = transformer.transformer_blocks[0]
    normed, attention = block.norm1(tokens), block.attn1
    return tuple(
        project(normed).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for project in (attention.to_q, attention.to_k)
    )
