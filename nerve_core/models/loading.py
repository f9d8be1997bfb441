"""Loads the networks of a model pair from safetensors files, without the modules that are never run."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedModel,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from ..errors import ModelError
from ..networks.dense_clip import run_layer
from ..networks.diffusion import cut_unet, run_resnet
from ..networks.layers import Network, pack_weights
from ..networks.parts import drop, of_class
from ..settings import Settings
from ..text.cache import EmbeddingCache, space_of
from .pairs import Source
from .weights import CLIP_FILES, DIFFUSION_FILES, HALF, TAESD_FILES, identity, local_folder, weight_file

Pretrained = TypeVar("Pretrained", bound=PreTrainedModel)
PHRASE = "a photo of a mug."
"""What tokenizers are tried with."""
Described = TypeVar("Described", AutoencoderKL, AutoencoderTiny, UNet2DConditionModel)


@dataclass(frozen=True)
class LoadedClip:
    """CLIP in evaluation mode, its tokenizer, and a string that identifies its weights and their precision."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    identity: str


@dataclass(frozen=True)
class LoadedDiffusion:
    """An encoder, the U-Net as far as its taps need it, the scheduler's JSON and the empty prompt [1, T, width]."""

    vae: AutoencoderKL | AutoencoderTiny
    unet: UNet2DConditionModel
    scheduler: dict[str, Any]
    prompt: Tensor


def load_clip(
    source: Source, device: torch.device, dtype: torch.dtype, *, cache_dir: str | None, offline: bool
) -> LoadedClip:
    """Load a CLIP from safetensors. Raises ModelError."""
    folder = local_folder(source, CLIP_FILES, cache_dir=cache_dir, offline=offline)
    with _as_model_error("CLIP", folder):
        weights = weight_file(folder, "model", half=dtype == torch.float16)
        model = _pretrained(CLIPModel, folder, weights, dtype)
        tokenizer = load_tokenizer(folder)
        check_tokens(tokenizer, of_class(model.config.text_config, CLIPTextConfig, "text_config"))
        known_by = f"{identity(folder, weights.name)}:{dtype}"
    model.set_attn_implementation("sdpa")
    return LoadedClip(_ready(model, device), tokenizer, known_by)


def load_diffusion(
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    taps: Sequence[tuple[int, int]],
    *,
    cache_dir: str | None,
    offline: bool,
    embeddings: EmbeddingCache | None = None,
    taesd: Source | None = None,
) -> LoadedDiffusion:
    """Load an encoder, the U-Net up to its last tap and the empty prompt's embedding from safetensors.

    Nothing else is read, and one tensor at a time, so that little more memory is needed than for what is kept. taps:
    (up block, attention), ascending. embeddings: where the empty prompt's embedding is cached, or None. taesd: a tiny
    encoder to take instead of the model's own.
    Raises ModelError, and ValueError for taps that the U-Net does not have or a network that is not supported.
    """
    folder = local_folder(source, DIFFUSION_FILES, cache_dir=cache_dir, offline=offline)
    half = dtype == torch.float16
    with _as_model_error("the diffusion model", folder):
        prompt = empty_prompt(folder, device=device, dtype=dtype, cache=embeddings)  # first: its encoder is freed again
        scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
        unet = _described(UNet2DConditionModel, folder / "unet")
    cut_unet(unet, taps)
    with _as_model_error("the diffusion model", folder):
        if taesd is None:
            vae: AutoencoderKL | AutoencoderTiny = _described(AutoencoderKL, folder / "vae")
            drop(vae, "decoder", "post_quant_conv")
            _read(vae, weight_file(folder, "vae/diffusion_pytorch_model", half=half), device, dtype)
        _read(unet, weight_file(folder, "unet/diffusion_pytorch_model", half=half), device, dtype)
    if taesd is not None:
        tiny = local_folder(taesd, TAESD_FILES, cache_dir=cache_dir, offline=offline)
        with _as_model_error("the tiny encoder", tiny):
            vae = _described(AutoencoderTiny, tiny)
            drop(vae, "decoder")
            _read(vae, weight_file(tiny, "diffusion_pytorch_model", half=half), device, dtype)
    return LoadedDiffusion(vae, unet, scheduler, prompt)


@torch.no_grad()
def empty_prompt(folder: Path, *, device: torch.device, dtype: torch.dtype, cache: EmbeddingCache | None) -> Tensor:
    """The diffusion model's last hidden state for "", padded as in training: `dtype` [1, T, width] on `device`.

    folder: of the diffusion model, with text_encoder/ and tokenizer/. Where the cache has it, the text encoder is not
    loaded. Raises OSError or ValueError for files that do not hold one.
    """
    weights = weight_file(folder, "text_encoder/model", half=dtype != torch.float32)
    parts = (folder / "text_encoder", folder / "tokenizer")
    configurations = [path.read_text() for part in parts for path in sorted(part.glob("*config.json"))]
    space = space_of("prompt", identity(weights.parent, weights.name), str(dtype), *configurations)
    known = cache.get(space, [""]) if cache is not None else {}
    if known:
        return torch.from_numpy(known[""]).to(device, dtype)
    encoder = _pretrained(CLIPTextModel, folder, weights, dtype, subfolder="text_encoder")
    tokenizer = load_tokenizer(folder / "tokenizer")
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    tokens = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    hidden = _ready(encoder, device)(input_ids=tokens.input_ids.to(device)).last_hidden_state
    if not hidden.isfinite().all():
        raise ValueError(f"{weights} overflows in {str(dtype).removeprefix('torch.')}; use bf16 or fp32")
    if cache is not None:
        cache.put(space, {"": hidden.float().cpu().numpy()})
    return hidden


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """A folder's tokenizer. Raises FileNotFoundError without its files, where transformers would make an empty one."""
    files = [name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).is_file()]
    if "tokenizer.json" not in files and len(files) < 2:
        raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def check_tokens(tokenizer: CLIPTokenizer, text: CLIPTextConfig, *, pooled: bool = True) -> None:
    """Raise ValueError where a text model cannot read what a tokenizer writes: a token that it does not know, or an end
    of text that is not where it reads the meaning, so that all texts would mean the same.

    pooled: whether the text's end is read, as CLIP does it; a diffusion model reads every token.
    """
    tokens = tokenizer(PHRASE).input_ids
    if max(tokens) >= text.vocab_size:
        raise ValueError(
            f"its tokenizer makes token {max(tokens)} and its text model knows {text.vocab_size}; take the tokenizer "
            "that belongs to the model"
        )
    # transformers: where eos_token_id is 2, as in all configurations before 2023, the end is the largest number.
    end = max(tokens) if text.eos_token_id == 2 else text.eos_token_id
    if pooled and end != tokens[-1]:
        raise ValueError(
            f"its tokenizer ends a text with token {tokens[-1]} and its text model looks for {end}, so that all names "
            "would be one; take the tokenizer that belongs to the model, or correct eos_token_id in config.json's "
            "text_config"
        )


@torch.inference_mode()
def bfloat16_is_faster(
    clip: Source, diffusion: Source, settings: Settings, *, cache_dir: str | None, offline: bool
) -> bool:
    """Whether the networks of a pair are faster in bfloat16 than in float32 on this CPU, with the threads set.

    Where there are `bfloat16_kernels`, a residual block of the U-Net, one of the VAE on a strip of an image and a layer
    of CLIP, at the size that a 4:3 image gives them, are timed in both precisions: less than a second in all.
    Raises ModelError.
    """
    if not bfloat16_kernels():
        return False
    folder = local_folder(diffusion, DIFFUSION_FILES, cache_dir=cache_dir, offline=offline)
    with _as_model_error("the diffusion model", folder):
        unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
        (rows, columns), cell = settings.diffusion.input_size, 2 ** (len(vae["block_out_channels"]) - 1)
        tried = [
            _residual_block(vae, (max(1, rows // 16), columns)),
            _residual_block(unet, (rows // cell, columns // cell)),
        ]
    folder = local_folder(clip, CLIP_FILES, cache_dir=cache_dir, offline=offline)
    with _as_model_error("CLIP", folder):
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        vision = of_class(config.vision_config, CLIPVisionConfig, "vision_config")
        side = max(1, settings.clip.short_side // of_class(vision.patch_size, int, "patch_size"))
        tokens = torch.ones(1, 1 + side * (4 * side // 3), vision.hidden_size)
        with torch.device("meta"):
            layer = CLIPEncoderLayer(vision)
        tried.append((run_layer, _with_constant_weights(layer), tokens))
    seconds = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for run, network, x in tried:
        sides = {dtype: (pack_weights(copy.deepcopy(network).to(dtype)), x.to(dtype)) for dtype in seconds}
        times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in seconds}
        for _ in range(3):  # alternately, and the least counts: the first is slower, and other programs may run
            for dtype, arguments in sides.items():
                started = time.perf_counter()
                run(*arguments)
                times[dtype].append(time.perf_counter() - started)
        for dtype in seconds:
            seconds[dtype] += min(times[dtype])
    return seconds[torch.bfloat16] < seconds[torch.float32]


def bfloat16_kernels() -> bool:
    """Whether PyTorch has bfloat16 kernels for this processor; on some they are no faster than float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _residual_block(config: dict[str, Any], grid: tuple[int, int]) -> tuple[Callable[..., Tensor], nn.Module, Tensor]:
    """`run_resnet`, the first residual block of a U-Net or VAE, and an input of (rows, columns) for it."""
    channels = config["block_out_channels"][0]
    with torch.device("meta"):
        block = ResnetBlock2D(in_channels=channels, groups=config["norm_num_groups"])
    drop(block, "time_emb_proj")
    image = torch.ones(1, channels, *grid).contiguous(memory_format=torch.channels_last)
    return run_resnet, _with_constant_weights(block), image


def _with_constant_weights(network: nn.Module) -> nn.Module:
    """A network on the meta device given memory, all weights 0.01: their values do not change how long it takes."""
    network = network.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.fill_(0.01)
    return network


def _pretrained(kind: type[Pretrained], folder: Path, weights: Path, dtype: torch.dtype, **options: Any) -> Pretrained:
    """A model of transformers with the weights of a safetensors file. Raises ValueError where the file lacks some."""
    loaded: Any = kind.from_pretrained(
        folder,
        dtype=dtype,
        variant="fp16" if weights.name.endswith(f"{HALF}.safetensors") else None,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,  # by which it returns a pair, whatever its types say
        **options,
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{weights} lacks {len(missing)} tensors, such as {missing[0]}")
    return model


def _ready(network: Network, device: torch.device) -> Network:
    """A network moved to a device, in place, to be run and not trained."""
    return network.to(device).eval().requires_grad_(False)


def _described(kind: type[Described], folder: Path) -> Described:
    """The network that a folder's config.json describes, on the meta device: without memory for its weights."""
    with torch.device("meta"):
        return of_class(kind.from_config(json.loads((folder / "config.json").read_text())), kind, str(folder)).eval()


def _read(network: nn.Module, file: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Load a safetensors file into a network on the meta device. Raises ValueError for a file that does not fit it."""
    try:
        with safe_open(file, "pt") as stored:
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        for name, parameter in list(network.named_parameters()):
            key = name if name in shapes else _older(name)
            if key not in shapes:
                raise ValueError(f"{file} has no tensor {name}")
            shape = tuple(parameter.shape)
            if shapes[key] not in (shape, (*shape, 1, 1)):  # a linear layer may be stored as a convolution of one pixel
                raise ValueError(
                    f"{file} has {key} of shape {list(shapes[key])} where config.json asks for {list(shape)}"
                )
            with safe_open(file, "pt") as stored:  # opened for each, or all that was read would stay mapped in memory
                tensor = stored.get_tensor(key).view(shape).to(device, dtype, copy=True)
            place, _, last = name.rpartition(".")
            setattr(network.get_submodule(place), last, nn.Parameter(tensor, requires_grad=False))
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off or no safetensors file ({error})") from error


def _older(name: str) -> str:
    """The name that a VAE's attention weights had before diffusers 0.18."""
    head, middle, tail = name.rpartition("mid_block.attentions.0.")
    for new, old in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
        tail = tail.replace(new, old)
    return head + middle + tail


@contextlib.contextmanager
def _as_model_error(what: str, folder: Path) -> Iterator[None]:
    """Turn a missing file or a loading library's exception into a ModelError with the folder and the remedy."""
    try:
        yield
    except Exception as error:  # the libraries raise many kinds; all mean that the folder does not hold the model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"{what} in {folder} cannot be loaded: {reason}; fetch it again or name another folder (nerve models "
            f"verify {shlex.quote(str(folder))} says which of its files is at fault)"
        ) from error


def quiet_libraries() -> None:
    """Keep progress bars and hints of the model libraries out of logs."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
