"""Model pairs, known by name or described in a folder: which CLIP and which diffusion model go together."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


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
