"""Model pairs, known by name or described in a folder: which CLIP and which diffusion model are used together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..text.vocabulary import SYNONYM_SEPARATOR, Vocabulary, listed

_PAIRS = Path(__file__).with_name("pairs")
_EMBEDDED = Path(__file__).parents[1] / "embedded" / "pair.json"
FULL_SIZE = "sd21-clipl14"
"""The pair for photographs and any name, whose settings a pair named as CLIP+DIFFUSION gets."""
CPU_PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Source:
    """Where one model comes from: a local folder, or a hub id with a revision.

    licence: the word its publisher uses, if known. sha256: hexadecimal digests by file, as far as they are recorded.
    """

    location: str
    revision: str | None = None
    licence: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def on_hub(self) -> bool:
        """Whether the location is no folder but reads as a hub id, owner/name."""
        return not Path(self.location).is_dir() and _is_hub_id(self.location)

    def __str__(self) -> str:
        return self.location if self.revision is None else f"{self.location}@{self.revision}"


@dataclass(frozen=True)
class ModelPair:
    """A CLIP and a diffusion model that are used together, and the settings that suit them.

    settings: overrides by flat name, see `Settings.replaced`. cpu_precision: fp32 or bf16, what to take on a CPU that
    has it. taesd: a tiny VAE encoder that may stand in for the diffusion model's own, or None. knows: the words that it
    was trained on, as entries of a vocabulary ("mug|cup"); () where it takes any. trained_on: its images in words, ""
    where they are photographs.
    """

    name: str
    clip: Source
    diffusion: Source
    settings: dict[str, Any] = field(default_factory=dict)
    cpu_precision: str = "fp32"
    taesd: Source | None = None
    knows: tuple[str, ...] = ()
    trained_on: str = ""

    @property
    def sources(self) -> dict[str, Source]:
        """The pair's models by part: clip, diffusion and, where there is one, taesd."""
        parts = {"clip": self.clip, "diffusion": self.diffusion, "taesd": self.taesd}
        return {part: source for part, source in parts.items() if source is not None}

    def unknown(self, words: Iterable[str]) -> tuple[str, ...]:
        """Those of `words` that are beyond what the pair knows, compared without case."""
        known = {word.casefold() for entry in self.knows for word in entry.split(SYNONYM_SEPARATOR)}
        return tuple(word for word in words if word.casefold() not in known) if known else ()

    def limits(self, words: Iterable[str] = ()) -> str:
        """A sentence on what the pair cannot do: `words` that it does not know, or else its kind of images; and which
        pair can. Empty for a pair that takes any name and photographs."""
        unknown = self.unknown(words)
        if not unknown and not self.trained_on:
            return ""
        images = self.trained_on or "its own images"
        said = f"the model pair {self.name!r} was trained on {images}"
        if unknown:
            names = ", ".join(entry.split(SYNONYM_SEPARATOR)[0] for entry in self.knows)
            said = f"the model pair {self.name!r} does not know {listed(unknown, 5)}: it was trained on {images}"
            said += f", with these names and their synonyms alone: {names}"
        return (
            f"{said}. For photographs and any name: nerve models pull {FULL_SIZE}, then --model {FULL_SIZE} (a node's "
            f"parameter model)"
        )


def pair_names() -> tuple[str, ...]:
    """The pairs that are known by name."""
    return ("embedded", *sorted(path.stem for path in _PAIRS.glob("*.json")))


def find_pair(name: str) -> ModelPair:
    """A pair by name, from a folder that holds a pair.json, or as CLIP+DIFFUSION.

    In a pair.json `clip` and `diffusion` are folders relative to it or hub ids. Either side of CLIP+DIFFUSION is a
    folder or a hub id, which may carry a revision (owner/name@revision); such a pair has the full-size pairs' settings.
    Raises ModelError.
    """
    if name == "embedded":
        path = _EMBEDDED
    elif name in pair_names():
        path = _PAIRS / f"{name}.json"
    else:
        path = Path(name).expanduser() / "pair.json"
    if path.is_file():
        return _read(path)
    sides = name.split("+")
    if len(sides) == 2 and all(sides):
        clip, diffusion = (_side(side, name) for side in sides)
        return replace(_read(_PAIRS / f"{FULL_SIZE}.json"), name=name, clip=clip, diffusion=diffusion)
    raise ModelError(
        f"model {name!r} is neither a known pair ({', '.join(pair_names())}) nor a folder with a pair.json "
        f"(looked for {path}) nor CLIP+DIFFUSION, each a folder or a hub id (owner/name)"
    )


def _side(text: str, name: str) -> Source:
    """One side of CLIP+DIFFUSION."""
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Source(str(folder))
    location, _, revision = text.partition("@")
    if not _is_hub_id(location):
        raise ModelError(
            f"{text!r} in model {name!r} is neither a folder nor a hub id; write CLIP+DIFFUSION, each a folder that "
            "is there or owner/name, or owner/name@revision"
        )
    return Source(location, revision or None)


def _is_hub_id(text: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text, re.ASCII) is not None


def _read(path: Path) -> ModelPair:
    """The pair that a JSON file describes. Raises ModelError."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
        known = {"name", "clip", "diffusion", "settings", "cpu_precision", "taesd", "knows", "trained_on"}
        _only(content, known)
        pair = ModelPair(
            _text(content, "name", path.parent.name),
            _source(content["clip"], path.parent),
            _source(content["diffusion"], path.parent),
            dict(content.get("settings", {})),
            _text(content, "cpu_precision", "fp32"),
            None if content.get("taesd") is None else _source(content["taesd"], path.parent),
            _known_words(content.get("knows", [])),
            _text(content, "trained_on", ""),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is not a pair description: it must be JSON with clip.location and diffusion.location ({error!r})"
        ) from error
    if pair.cpu_precision not in CPU_PRECISIONS:
        raise ModelError(
            f"{path}: cpu_precision is {pair.cpu_precision!r}; it must be one of {', '.join(CPU_PRECISIONS)}"
        )
    return pair


def _source(content: Any, base: Path) -> Source:
    """One model of a pair description: a folder, absolute or relative to `base`, or else a hub id (owner/name)."""
    _only(content, {"location", "revision", "licence", "sha256"})
    digests = content.get("sha256", {})
    if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests.values()):
        raise ValueError("sha256 must map files to 64 hexadecimal digits in lower case")
    location = content["location"]
    folder = base / location
    local = folder.is_dir() or location.count("/") != 1
    return Source(
        str(folder) if local else location, _text(content, "revision", None), _text(content, "licence", None), digests
    )


def _known_words(content: Any) -> tuple[str, ...]:
    """What a pair knows, as entries of a vocabulary. Raises ValueError."""
    if not isinstance(content, list):
        raise ValueError(f"knows is {content!r}; it must be a list of names")
    vocabulary = Vocabulary(content)
    if vocabulary.dropped or vocabulary.background:
        wrong = (*vocabulary.dropped, *vocabulary.background)[0]
        raise ValueError(f"knows has {wrong!r}, which stands there twice or is the name of the background")
    return vocabulary.entries


def _only(content: Any, known: set[str]) -> None:
    unknown = sorted(content.keys() - known)
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _text(content: dict[str, Any], key: str, default: Any) -> Any:
    value = content.get(key, default)
    if value is not default and not isinstance(value, str):
        raise TypeError(f"{key} is {value!r}; it must be text")
    return value
