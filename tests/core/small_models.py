"""Small models with random weights: the classes of the full-size pairs, narrowed until a forward takes milliseconds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 32  # of the text encoders and of the cross-attention
POSITIONS = 77


def enliven(model: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Give every parameter a random value large enough that attention is far from uniform; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                values *= gain / math.sqrt(parameter[0].numel())
            elif name.endswith("weight"):
                values = 1 + 0.3 * values
            else:
                values *= 0.2
            parameter.copy_(values)
    return model.eval().requires_grad_(False)


def byte_tokenizer(length: int = POSITIONS) -> CLIPTokenizer:
    """CLIP's tokenizer without a single merge: every byte is a token, so any text has one."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=[], model_max_length=length)


def _text_settings(tokenizer: CLIPTokenizer, layers: int) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def small_clip(*, layers: int = 4, image: int = 24, patch: int = 4, seed: int = 0) -> CLIPModel:
    """A CLIP of four heads whose positions are learnt on (image / patch)^2 patches."""
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": image,
        "patch_size": patch,
    }
    config = CLIPConfig(text_config=_text_settings(byte_tokenizer(), 2), vision_config=vision, projection_dim=16)
    return enliven(CLIPModel(config), seed)


def small_text_encoder(seed: int = 1) -> CLIPTextModel:
    """The diffusion branch's text encoder."""
    return enliven(CLIPTextModel(CLIPTextConfig(**_text_settings(byte_tokenizer(), 2))), seed)


def narrow_sd21_unet(seed: int = 2) -> UNet2DConditionModel:
    """Stable Diffusion 2.1's U-Net with heads of 4 instead of 64: the same blocks, layers and numbers of heads."""
    return _sd_unet(seed, [5, 10, 20, 20], (20, 40, 80, 80), linear=True)


def narrow_sd15_unet(seed: int = 3) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's U-Net, narrowed: 8 heads everywhere, convolutions as projections."""
    return _sd_unet(seed, 8, (16, 32, 32, 32), linear=False)


def _sd_unet(seed: int, heads: int | list[int], channels: tuple[int, ...], *, linear: bool) -> UNet2DConditionModel:
    with torch.device("meta"):  # every value comes from `enliven`
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=4,
            out_channels=4,
            block_out_channels=channels,
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=heads,
            cross_attention_dim=WIDTH,
            use_linear_projection=linear,
            norm_num_groups=4,
        )
    return enliven(unet.to_empty(device="cpu"), seed)


def tiny_unet(seed: int = 5) -> UNet2DConditionModel:
    """The smallest U-Net with a self-attention layer to tap: two levels, one layer a block."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
    )
    return enliven(unet, seed)


def small_vae(seed: int = 4) -> AutoencoderKL:
    """A VAE of four levels: a latent cell is 8 x 8 pixels."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
        sample_size=64,
    )
    return enliven(vae, seed)


def small_taesd(seed: int = 6, **more: int) -> AutoencoderTiny:
    """The tiny encoder that may stand in for a VAE's, narrowed: a latent cell is 8 x 8 pixels."""
    widths = (8, 8, 8, 8)
    return enliven(AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths, **more), seed)


def sd_scheduler() -> DDIMScheduler:
    """The noise schedule that every Stable Diffusion up to 2.1 was trained with."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


PAIR_SETTINGS = {
    "head": "vanilla",
    "short_side": 24,
    "templates": ["a photo of a {}.", "the {}."],
    "negatives": ["wall", "floor"],
    "input_size": [64, 128],
    "taps": [[1, 0], [1, 1]],
    "steps": 3,
}


def save_pair(folder: Path) -> Path:
    """Write a whole pair as a folder with a pair.json, from the parts above."""
    small_clip().save_pretrained(folder / "clip")
    byte_tokenizer().save_pretrained(folder / "clip")
    diffusion = folder / "diffusion"
    small_vae().save_pretrained(diffusion / "vae")
    tiny_unet().save_pretrained(diffusion / "unet")
    small_text_encoder().save_pretrained(diffusion / "text_encoder")
    byte_tokenizer().save_pretrained(diffusion / "tokenizer")
    sd_scheduler().save_pretrained(diffusion / "scheduler")
    description = {
        "name": "small",
        "clip": {"location": "clip"},
        "diffusion": {"location": "diffusion"},
        "settings": PAIR_SETTINGS,
    }
    (folder / "pair.json").write_text(json.dumps(description))
    return folder


def replace(file: Path, content: bytes) -> None:
    """Give a file of a copied pair another content; the one it may be linked to stays as it is."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect what modules return while the block runs, by name."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def picture(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A smooth random image, float32 [1, 3, rows, columns] in 0..1."""
    coarse = torch.rand((1, 3, 5, 7), generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (rows, columns), mode="bicubic").clamp(0, 1)


def slow_bilinear(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One plane [h, w] resized pixel by pixel, half-pixel centres, edges repeated (align_corners=False)."""
    height, width = plane.shape
    resized = np.zeros(size)
    for row in range(size[0]):
        y = min(max((row + 0.5) * height / size[0] - 0.5, 0), height - 1)
        y0, y1 = math.floor(y), min(math.floor(y) + 1, height - 1)
        for column in range(size[1]):
            x = min(max((column + 0.5) * width / size[1] - 0.5, 0), width - 1)
            x0, x1 = math.floor(x), min(math.floor(x) + 1, width - 1)
            upper = plane[y0, x0] * (1 - (x - x0)) + plane[y0, x1] * (x - x0)
            lower = plane[y1, x0] * (1 - (x - x0)) + plane[y1, x1] * (x - x0)
            resized[row, column] = upper * (1 - (y - y0)) + lower * (y - y0)
    return resized
