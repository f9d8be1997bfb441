"""How the networks of a pair are loaded, and what of them is dropped."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from .pairs import ModelError, Source
from .weights import CLIP_FILES, CLIP_NEEDED, DIFFUSION_FILES, DIFFUSION_NEEDED, identity, local_folder


@dataclass(frozen=True)
class LoadedClip:
    """CLIP in evaluation mode, its tokenizer, and what tells its weights and their precision from any others."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    identity: str


@dataclass(frozen=True)
class LoadedDiffusion:
    """The VAE (without its decoder), the U-Net, the scheduler's JSON and the empty prompt's embedding [1, T, width]."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: dict[str, Any]
    prompt: Tensor


def load_clip(
    source: Source, device: torch.device, dtype: torch.dtype, *, cache_dir: str | None, offline: bool
) -> LoadedClip:
    """Load a CLIP from safetensors. Raises ModelError."""
    folder = local_folder(source, CLIP_FILES, cache_dir=cache_dir, offline=offline)
    with _as_model_error("CLIP", folder, CLIP_NEEDED):
        options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        model = _complete(CLIPModel.from_pretrained(folder, **options))
        tokenizer = _tokenizer(folder)
        known_by = f"{identity(folder, 'model.safetensors')}:{dtype}"
    model.set_attn_implementation("sdpa")
    return LoadedClip(model.to(device).eval().requires_grad_(False), tokenizer, known_by)


def load_diffusion(
    source: Source, device: torch.device, dtype: torch.dtype, *, cache_dir: str | None, offline: bool
) -> LoadedDiffusion:
    """Load the VAE's encoder, the U-Net and the empty prompt's embedding from safetensors. Raises ModelError."""
    folder = local_folder(source, DIFFUSION_FILES, cache_dir=cache_dir, offline=offline)
    with _as_model_error("the diffusion model", folder, DIFFUSION_NEEDED):
        options = {
            "torch_dtype": dtype,
            "use_safetensors": True,
            "local_files_only": True,
            "output_loading_info": True,
        }
        vae = _complete(AutoencoderKL.from_pretrained(folder, subfolder="vae", **options))
        unet = _complete(UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **options))
        scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
        prompt = _empty_prompt(folder, device, dtype)
    vae.decoder = None  # nothing is decoded
    layout = torch.channels_last
    vae = vae.to(device, memory_format=layout).eval().requires_grad_(False)
    unet = unet.to(device, memory_format=layout).eval().requires_grad_(False)
    return LoadedDiffusion(vae, unet, scheduler, prompt)


@torch.inference_mode()
def _empty_prompt(folder: Path, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The text encoder's last hidden state for "", padded as in training; the encoder is not kept."""
    options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    encoder = _complete(CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", **options))
    tokenizer = _tokenizer(folder / "tokenizer")
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    tokens = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoder.to(device).eval()(input_ids=tokens.input_ids.to(device)).last_hidden_state


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """A folder's tokenizer; FileNotFoundError without its files, where transformers makes one that knows no word."""
    files = [name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).is_file()]
    if "tokenizer.json" not in files and len(files) < 2:
        raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _complete(loaded: tuple[Any, Mapping[str, Any]]) -> Any:
    """A model as loaded with `output_loading_info`; ValueError where its file lacks weights, which are then random."""
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"its weights lack {len(missing)} tensors, such as {missing[0]}")
    return model


@contextlib.contextmanager
def _as_model_error(what: str, folder: Path, needed: Sequence[str]) -> Iterator[None]:
    """Turn a missing file or a loading library's exception into a ModelError with the folder and the remedy."""
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        note = "only safetensors weights are loaded (a .bin or .ckpt must be converted first)"
        remedy = note if missing[0].endswith(".safetensors") else "fetch it again or name another folder"
        raise ModelError(f"{what} in {folder} cannot be loaded: it has no {', '.join(missing)}; {remedy}")
    try:
        yield
    except Exception as error:  # the libraries raise many kinds; all mean that the folder does not hold the model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"{what} in {folder} cannot be loaded: {reason}; fetch it again or name another folder"
        ) from error


def quiet_libraries() -> None:
    """Keep progress bars and advice of the model libraries out of logs."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
