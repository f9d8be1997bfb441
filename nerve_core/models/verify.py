"""Checks that a pair's files are what its networks need, from configurations and safetensors headers alone."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from ..errors import ModelError
from ..networks.diffusion import noise_levels
from ..networks.parts import of_class, submodule
from ..output import digest
from ..settings import Settings
from ..text.vocabulary import SYNONYM_SEPARATOR, listed
from .loading import PHRASE, check_tokens
from .pairs import ModelPair, Source, find_pair
from .weights import FILES, PICKLES, cached_folder, in_words, weight_file

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_HEADER_LIMIT = 100 << 20  # bytes; the format's own
_OLD_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
_FETCH = "fetch it again, or take it from where the model is published"


@dataclass(frozen=True)
class Finding:
    """One result of the check.

    kind: "fact", "note" or "fault"; a fault keeps the pair from working. place: the part and file it is about. text:
    one sentence, for a fault with what to do.
    """

    kind: str
    place: str
    text: str


class _Fault(Exception):
    """Why a part cannot be checked further; the message is the finding."""


def verify(name: str, *, cache_dir: str | None = None, deep: bool = False) -> list[Finding]:
    """Check a pair by name or folder, or a folder that is one model alone. Nothing is fetched and no pickle opened.

    deep: also read every weight and look for values that are not finite. Returns facts, notes and faults in the order
    in which they were found. Raises ModelError for a name that is no pair.
    """
    folder = Path(name).expanduser()
    report = _Report(deep)
    if folder.is_dir() and not (folder / "pair.json").is_file():
        if (folder / "unet").is_dir():
            _diffusion(report, folder, Source(str(folder)))
        elif (folder / "config.json").is_file():
            _clip(report, folder, Source(str(folder)))
        else:
            raise ModelError(
                f"{folder} is no model: it has neither a pair.json nor a config.json (a CLIP) nor a folder unet (a "
                "diffusion model); name the folder that holds one of them"
            )
        return report.findings
    pair = find_pair(name)
    spare = () if pair.settings.get("encoder") == "taesd" else ("taesd",)
    folders = {part: _folder(report, part, source, cache_dir, part in spare) for part, source in pair.sources.items()}
    if folders["clip"]:
        _clip(report, folders["clip"], pair.clip)
    unet = _diffusion(report, folders["diffusion"], pair.diffusion) if folders["diffusion"] else None
    if pair.taesd and folders["taesd"]:
        _taesd(report, folders["taesd"], pair.taesd)
    _settings(report, pair, unet, folders["diffusion"])
    return report.findings


class _Report:
    """What was found so far."""

    def __init__(self, deep: bool) -> None:
        self.deep = deep
        self.findings: list[Finding] = []

    def add(self, kind: str, place: str, text: str) -> None:
        self.findings.append(Finding(kind, place, text))

    @contextlib.contextmanager
    def part(self, place: str) -> Iterator[None]:
        """Turn what the libraries raise for a part's files into a fault; the other parts are still checked."""
        try:
            yield
        except _Fault as fault:
            self.add("fault", place, str(fault))
        except Exception as error:  # broken files make the model libraries raise many kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            self.add("fault", place, f"it cannot be used: {reason}; {_FETCH}")


def _folder(report: _Report, part: str, source: Source, cache_dir: str | None, spare: bool) -> Path | None:
    """The folder of a source's files, without fetching any; a fault and None where they are missing."""
    if not source.on_hub:
        if Path(source.location).is_dir():
            return Path(source.location)
        report.add("fault", part, f"{source.location} is no folder; put the model there, or correct pair.json")
        return None
    found = cached_folder(source, FILES[part], cache_dir)
    if found is None and spare:
        report.add("note", part, f"{source} is not in the cache; it is needed only with the setting encoder: taesd")
    elif found is None:
        report.add("fault", part, f"{source} is not whole in the cache; run nerve models pull")
    return found


# --- parts ----------------------------------------------------------------------------------------------------


def _clip(report: _Report, folder: Path, source: Source) -> None:
    _mention_pickles(report, "clip", folder)
    with report.part("clip"):
        content = _config(folder, "config.json", "model_type", "clip")
        config = CLIPConfig.from_dict(content)
        text = of_class(config.text_config, CLIPTextConfig, "text_config")
        vision = of_class(config.vision_config, CLIPVisionConfig, "vision_config")
        report.add(
            "fact",
            "clip",
            f"{vision.num_hidden_layers} layers of {vision.num_attention_heads} heads on {vision.image_size} pixels in "
            f"patches of {vision.patch_size}; text {text.num_hidden_layers} layers of {text.num_attention_heads} "
            f"heads, {text.max_position_embeddings} tokens; both projected to {config.projection_dim}",
        )
        _weights(report, "clip", folder, "model", lambda: CLIPModel(config), source)
    with report.part("clip tokenizer"):
        config = CLIPConfig.from_dict(_json(folder / "config.json"))
        text = of_class(config.text_config, CLIPTextConfig, "text_config")
        _tokenizer(report, "clip tokenizer", folder, text, pooled=True)


def _diffusion(report: _Report, folder: Path, source: Source) -> UNet2DConditionModel | None:
    """Check a diffusion model; returns its U-Net without weights, on the meta device, where its config can be read."""
    _mention_pickles(report, "diffusion", folder)
    text: CLIPTextConfig | None = None
    unet: UNet2DConditionModel | None = None
    vae: dict[str, Any] = {}
    with report.part("text encoder"):
        text = CLIPTextConfig.from_dict(_config(folder, "text_encoder/config.json", "model_type", "clip_text_model"))
        report.add(
            "fact",
            "text encoder",
            f"{text.num_hidden_layers} layers of {text.num_attention_heads} heads, width {text.hidden_size}",
        )
        _weights(report, "text encoder", folder, "text_encoder/model", lambda: CLIPTextModel(text), source)
    if text is not None:
        with report.part("tokenizer"):
            _tokenizer(report, "tokenizer", folder / "tokenizer", text, pooled=False)
    with report.part("vae"):
        vae = _config(folder, "vae/config.json", "_class_name", "AutoencoderKL")
        stem = "vae/diffusion_pytorch_model"
        _weights(report, "vae", folder, stem, lambda: AutoencoderKL.from_config(vae), source, unused="decoder.")
    with report.part("unet"):
        content = _config(folder, "unet/config.json", "_class_name", "UNet2DConditionModel")
        with torch.device("meta"):
            network = of_class(UNet2DConditionModel.from_config(content), UNet2DConditionModel, "unet")
        unet = network
        _weights(report, "unet", folder, "unet/diffusion_pytorch_model", lambda: network, source)
    if unet is not None and text is not None and unet.config["cross_attention_dim"] != text.hidden_size:
        report.add(
            "fault",
            "unet",
            f"it takes prompts {unet.config['cross_attention_dim']} wide and the text encoder makes them "
            f"{text.hidden_size} wide; take both from one model",
        )
    if unet is not None and vae and unet.config["in_channels"] != vae.get("latent_channels", 4):
        report.add(
            "fault",
            "unet",
            f"it takes latents of {unet.config['in_channels']} channels and the VAE makes "
            f"{vae.get('latent_channels', 4)}; take a model for text to image (not inpainting or depth), whole",
        )
    return unet


def _taesd(report: _Report, folder: Path, source: Source) -> None:
    _mention_pickles(report, "taesd", folder)
    with report.part("taesd"):
        content = _config(folder, "config.json", "_class_name", "AutoencoderTiny")
        stem = "diffusion_pytorch_model"
        _weights(report, "taesd", folder, stem, lambda: AutoencoderTiny.from_config(content), source, unused="decoder.")


def _settings(report: _Report, pair: ModelPair, unet: UNet2DConditionModel | None, folder: Path | None) -> None:
    """Whether the pair's settings are known and fit its U-Net and noise schedule; and the names that it is for."""
    if pair.knows:
        count = sum(len(entry.split(SYNONYM_SEPARATOR)) for entry in pair.knows)
        names = listed([entry.split(SYNONYM_SEPARATOR)[0] for entry in pair.knows])
        report.add("fact", "knows", f"{len(pair.knows)} names alone, {count} words with their synonyms: {names}")
    if pair.limits():
        report.add("note", "knows", pair.limits())
    with report.part("settings"):
        try:
            diffusion = Settings().replaced(pair.settings).diffusion
        except ValueError as error:
            raise _Fault(f"{error}; correct the pair's settings") from error
        if folder is not None:
            noise_levels(_json(folder / "scheduler/scheduler_config.json"), diffusion.timestep)
        if unet is None:
            return
        counts = [len(getattr(block, "attentions", None) or ()) for block in unet.up_blocks]
        lost = [tap for tap in diffusion.taps if tap[0] >= len(counts) or tap[1] >= counts[tap[0]]]
        if lost:
            raise _Fault(
                f"taps {lost} do not exist: this U-Net's up blocks have {counts} attentions; correct taps in the "
                "pair's settings"
            )
        for block, place in diffusion.taps:
            path = f"up_blocks.{block}.attentions.{place}.transformer_blocks.0.attn1"
            attention = submodule(unet, path, Attention)
            size = attention.to_q.out_features // attention.heads
            report.add("fact", "settings", f"tap ({block}, {place}) has {attention.heads} heads of {size}")


# --- files ----------------------------------------------------------------------------------------------------


def _mention_pickles(report: _Report, part: str, folder: Path) -> None:
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in PICKLES)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        report.add("note", part, f"{', '.join(found[:3])}{more} lie there and are never opened; they may be deleted")


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises _Fault."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise _Fault(f"{path} is missing; {_FETCH}") from None
    except (OSError, ValueError) as error:
        raise _Fault(f"{path} cannot be read as JSON ({error}); {_FETCH}") from error
    if not isinstance(content, dict):
        raise _Fault(f"{path} is no JSON object; {_FETCH}")
    return content


def _config(folder: Path, file: str, key: str, wanted: str) -> dict[str, Any]:
    """A model's configuration. Raises _Fault where it describes a model of another class."""
    content = _json(folder / file)
    if content.get(key) != wanted:
        raise _Fault(
            f"{folder / file} describes a model of {key} {content.get(key)!r} where {wanted!r} is needed; it belongs "
            "to another model: put the right one there"
        )
    return content


def _weights(
    report: _Report,
    part: str,
    folder: Path,
    stem: str,
    build: Callable[[], nn.Module],
    source: Source,
    *,
    unused: str | None = None,
) -> None:
    """Compare a safetensors header with the network that the configuration describes, built on the meta device.

    unused: prefix of the names of tensors that are never used, which may be missing.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    try:
        path = weight_file(folder, stem, half=False)
        files = [path]
        other = weight_file(folder, stem, half=True)
    except FileNotFoundError as error:
        raise _Fault(str(error)) from error
    if other != path:
        files.append(other)
    for path in files:
        place = f"{part}: {path.name}"
        with report.part(place):
            header = _header(path)
            _compare(report, place, path, expected, header, unused)
            name = path.relative_to(folder).as_posix()
            if name in source.sha256 and digest(path) != source.sha256[name]:
                raise _Fault(f"its SHA-256 is not the recorded {source.sha256[name][:12]}...; {_FETCH}")
            if report.deep:
                _finite(path)


def _compare(
    report: _Report,
    place: str,
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    header: Mapping[str, tuple[str, tuple[int, ...]]],
    unused: str | None,
) -> None:
    """Presence, shape and dtype of every tensor. Raises _Fault."""
    expected = {_plain(name): shape for name, shape in expected.items()}
    found = {_plain(name): kind for name, kind in header.items()}
    shared = expected.keys() & found.keys()
    if not shared:
        raise _Fault(
            f"{path} holds another model: none of the {len(expected)} tensors needed, but {len(found)} such as "
            f"{min(header)}; put the right file there"
        )
    lost = sorted(expected.keys() - found.keys())
    needed = [name for name in lost if unused is None or not name.startswith((unused, "post_quant_conv."))]
    if needed:
        raise _Fault(f"{path} lacks {len(needed)} of {len(expected)} tensors, such as {needed[0]}; {_FETCH}")
    wrong = [name for name in sorted(shared) if not _same(expected[name], found[name][1])]
    if wrong:
        raise _Fault(
            f"{len(wrong)} tensors of {path} have another shape than its configuration says, such as {wrong[0]}: "
            f"{list(found[wrong[0]][1])} where {list(expected[wrong[0]])} is needed; the weights and config.json "
            "belong to different models: take both from one"
        )
    strange = sorted({found[name][0] for name in shared} - _FLOATS.keys())
    if strange:
        raise _Fault(f"{path} has weights of type {', '.join(strange)}; {', '.join(_FLOATS)} are accepted: convert it")
    kinds = " and ".join(sorted({_FLOATS[found[name][0]] for name in shared}))
    report.add("fact", place, f"{len(found)} tensors in {kinds}, {in_words(path.stat().st_size)}")
    extra = sorted(name for name in found.keys() - expected.keys() if not name.endswith("position_ids"))
    if extra:
        report.add("note", place, f"{len(extra)} tensors are not used, such as {extra[0]}")


def _plain(name: str) -> str:
    """A tensor's name in today's libraries: without the text tower's prefix, with to_q for an old VAE's query."""
    name = name.removeprefix("text_model.")
    head, middle, tail = name.rpartition(".attentions.0.")
    for old, new in _OLD_ATTENTION if middle else ():
        if tail.startswith(f"{old}."):
            return f"{head}{middle}{new}{tail.removeprefix(old)}"
    return name


def _same(expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether shapes are equal; old VAEs store a linear layer as a 1 x 1 convolution."""
    return found == expected or (len(expected) == 2 and found == (*expected, 1, 1))


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a safetensors file, by name; nothing else of it is read.

    Raises _Fault, a sentence, for a file that is cut off or is something else.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        _refuse_other_kinds(path, start)
        length = int.from_bytes(start[:8], "little")
        if length > min(size - 8, _HEADER_LIMIT):
            kind = "cut off in its header" if length <= _HEADER_LIMIT else "no safetensors file"
            raise _Fault(f"{path} ({in_words(size)}) is {kind}; delete it and fetch it again")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: (str(e["dtype"]), tuple(map(int, e["shape"]))) for name, e in header.items()}
            ends = [int(e["data_offsets"][1]) for e in header.values()]
            spans = [int(e["data_offsets"][1]) - int(e["data_offsets"][0]) for e in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _Fault(f"{path} has no safetensors header ({error!r}); delete it and fetch it again") from error
    announced = 8 + length + max(ends, default=0)
    if size < announced:
        raise _Fault(
            f"{path} is cut off: {in_words(size)} of {in_words(announced)} are there; delete it and fetch it again"
        )
    odd = [
        name
        for (name, (kind, shape)), span in zip(entries.items(), spans, strict=True)
        if kind in _BYTES and math.prod(shape) * _BYTES[kind] != span
    ]
    if size > announced or sum(spans) != max(ends, default=0) or odd:
        raise _Fault(f"{path} does not have the length that its header announces; delete it and fetch it again")
    return entries


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    """Raise _Fault for what else is commonly found under a safetensors file's name."""
    again = "delete it and fetch it again"
    kinds = {
        b"<": f"is a web page, as servers answer with instead of a file; {again}",
        b"{": f"is a JSON text, perhaps a server's message; {again}",
        b"version https://git-lfs": "is a pointer of git-lfs, not the weights; run git lfs pull",
        b"PK\x03\x04": "is a pickle in an archive (a renamed .bin or .ckpt), which is never opened; convert it",
        b"\x80": "is a pickle (a renamed .bin or .ckpt), which is never opened; convert it",
    }
    if start[5:8] == b"\0\0\0":  # the upper bytes of a header's length, which no other of these kinds has
        return
    for mark, said in kinds.items():
        if start.lstrip().startswith(mark):
            raise _Fault(f"{path} {said}")
    if len(start) < 8:
        raise _Fault(f"{path} is {'no safetensors file' if start else 'empty'}; {again}")


def _finite(path: Path) -> None:
    """Raise _Fault where a weight is not a finite number; one tensor at a time is in memory."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
            if bad:
                raise _Fault(f"{bad} values of {name} in {path} are not finite; {_FETCH}")


def _tokenizer(report: _Report, place: str, folder: Path, text: CLIPTextConfig, *, pooled: bool) -> None:
    """Encode a phrase and decode it again. pooled: as of `check_tokens`. Raises _Fault."""
    files = {name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).is_file()}
    if "tokenizer.json" not in files and len(files) < 2:
        raise _Fault(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; {_FETCH}")
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(PHRASE).input_ids
    try:
        check_tokens(tokenizer, text, pooled=pooled)
    except ValueError as error:
        raise _Fault(str(error)) from error
    back = tokenizer.decode(ids, skip_special_tokens=True)
    if back.replace(" ", "") != PHRASE.replace(" ", ""):
        raise _Fault(f"{PHRASE!r} comes back as {back!r}; take the tokenizer that belongs to the model")
    report.add("fact", place, f"{len(tokenizer)} words, {PHRASE!r} is {len(ids)} tokens")
