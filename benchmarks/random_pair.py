"""A full-size pair with random weights: the true architectures as a folder to load, for timing where no weights are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel

from nerve_core.models.pairs import find_pair


@dataclass(frozen=True)
class Architecture:
    """What the configurations of a pair's networks say: of CLIP's text and vision tower and the width they share, of
    the diffusion model's text encoder, U-Net and VAE."""

    clip_text: dict[str, Any]
    clip_vision: dict[str, Any]
    projection: int
    text: dict[str, Any]
    unet: dict[str, Any]
    vae: dict[str, Any]


def _tower(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_TEXT_L14 = _tower(768, 12, 12)
_SD21 = {
    "text": _tower(1024, 23, 16, hidden_act="gelu"),
    "unet": {
        **_UNET,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "vae": _VAE,
}
_SD15 = {
    "text": _TEXT_L14,
    "unet": {**_UNET, "attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False},
    "vae": _VAE,
}
ARCHITECTURES = {
    "sd21-clipl14": Architecture(_TEXT_L14, _tower(1024, 24, 16, patch_size=14, image_size=224), 768, **_SD21),
    "sd21-clipl14-336": Architecture(_TEXT_L14, _tower(1024, 24, 16, patch_size=14, image_size=336), 768, **_SD21),
    "sd15-clipb16": Architecture(_tower(512, 12, 8), _tower(768, 12, 12, patch_size=16, image_size=224), 512, **_SD15),
}
"""The full-size pairs' networks, as their published configurations have them."""
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_POSITIONS = 77


def write_random_pair(
    name: str, folder: Path, *, architecture: Architecture | None = None, seed: int = 0, dtype: torch.dtype = torch.half
) -> Path:
    """Write the pair `name` as a folder with a pair.json: its own settings and architectures (or another), random
    weights.

    Full-size pairs take about 3.5 GB and half a minute. The tokenizer is the embedded pair's, since the true one cannot
    be made up: a template has about as many tokens as with the true one. Raises ValueError for a pair whose
    architecture is not known here, and FileExistsError for a folder that is not empty.
    """
    made = architecture or ARCHITECTURES.get(name)
    if made is None:
        raise ValueError(f"no architecture is known for {name!r}; choose one of {', '.join(ARCHITECTURES)}")
    words = Path(find_pair("embedded").clip.location)
    tokenizer = CLIPTokenizer.from_pretrained(words, model_max_length=_POSITIONS, local_files_only=True)
    special = {
        "vocab_size": 49408,
        "max_position_embeddings": _POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    parts: dict[str, Callable[[], PreTrainedModel | ModelMixin]] = {
        "clip": lambda: CLIPModel(
            CLIPConfig(
                text_config={**made.clip_text, **special},
                vision_config=made.clip_vision,
                projection_dim=made.projection,
            )
        ),
        "diffusion/text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**made.text, **special)),
        "diffusion/unet": lambda: UNet2DConditionModel(**made.unet),
        "diffusion/vae": lambda: AutoencoderKL(**made.vae),
    }
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is neither empty nor a pair; give a new folder")
    for number, (part, make) in enumerate(parts.items()):
        with torch.device("meta"):
            model = make()
        _fill(model.to_empty(device="cpu"), seed + number)
        nn.Module.to(model, dtype)  # diffusers' own warns of layers that it does not have
        model.save_pretrained(folder / part)
    for part in ("clip", "diffusion/tokenizer"):
        tokenizer.save_pretrained(folder / part)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler.save_pretrained(folder / "diffusion/scheduler")
    (folder / "diffusion/model_index.json").write_text(json.dumps(_INDEX))
    pair = find_pair(name)
    description = {
        "name": f"{name} with random weights",
        "clip": {"location": "clip"},
        "diffusion": {"location": "diffusion"},
        "cpu_precision": pair.cpu_precision,
        "settings": pair.settings,
    }
    (folder / "pair.json").write_text(json.dumps(description))
    return folder


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    """Weights as wide as keeps activations near 1, biases 0, norms 1; buffers that count positions."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
        elif name.endswith("weight"):
            parameter.fill_(1)
        else:
            parameter.zero_()
    for name, buffer in model.named_buffers():
        if not name.endswith("position_ids"):
            raise ValueError(f"buffer {name} is not known; give it a value here")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
