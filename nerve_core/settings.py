"""All parameters of a frame in one dataclass, which model pairs, presets and callers override by flat name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .errors import ModelError
from .networks.dense_clip import ClipConfig
from .networks.diffusion import DiffusionConfig
from .readout import ReadoutConfig
from .walk.affinity import AffinityConfig
from .walk.edges import EdgesConfig
from .walk.fusion import FusionConfig
from .walk.random_walk import WalkConfig

PRESETS: dict[str, dict[str, Any]] = {
    "pair": {},
    "paper": {
        "kernel": "relu",
        "beta": 0.3,
        "alpha": 0.85,
        "c": 10.0,
        "method": "truncated",
        "steps": 40,
        "combine": "transitions",
        "head_weights": "entropy",
        "timestep": 100,
        "edges": "none",
    },
}
"""Named sets of overrides. `paper` is the published method as far as it is stated: L = 40 and t = 100 are the authors',
alpha, beta and c are ours and untuned on real data. The CLIP head stays the pair's own, since it must be the one that
its text embeddings fit."""


class HasSettings(Protocol):
    """What `Settings.of_pair` needs of a model pair: its name, and its own settings by flat name."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Settings:
    """One section, a configuration, per component; parameter names are unique across them, so that one flat mapping can
    override any."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    affinity: AffinityConfig = field(default_factory=AffinityConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    walk: WalkConfig = field(default_factory=WalkConfig)
    edges: EdgesConfig = field(default_factory=EdgesConfig)
    readout: ReadoutConfig = field(default_factory=ReadoutConfig)

    @classmethod
    def of_pair(
        cls, pair: HasSettings, preset_name: str = "pair", overrides: Mapping[str, Any] | None = None
    ) -> Settings:
        """A model pair's own settings, with a preset's above them and overrides above both.

        Raises ModelError for a pair whose settings cannot be used, and ValueError for a preset that is unknown and
        overrides that cannot be used.
        """
        try:
            own = cls().replaced(pair.settings)
        except ValueError as error:
            raise ModelError(
                f"the settings of pair {pair.name!r} cannot be used: {error}; correct its pair.json"
            ) from error
        return own.replaced(preset(preset_name)).replaced(overrides or {})

    @classmethod
    def names(cls) -> dict[str, str]:
        """Every parameter's name and its section, a field of this class."""
        defaults = cls()
        return {
            parameter.name: section.name
            for section in dataclasses.fields(cls)
            for parameter in dataclasses.fields(getattr(defaults, section.name))
        }

    def replaced(self, overrides: Mapping[str, Any]) -> Settings:
        """These settings with some parameters changed, by flat name ({"kernel": "relu", "alpha": 0.9}).

        Lists become tuples, as JSON has no tuples. Raises ValueError for a name that is unknown or a value of another
        type or out of range.
        """
        sections = self.names()
        unknown = sorted(set(overrides) - set(sections))
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(sections))}")
        changes: dict[str, dict[str, Any]] = {}
        for name, value in overrides.items():
            frozen, kind = _frozen(value), self._kind(name)
            if not _is_of(frozen, kind):
                raise ValueError(f"{name} is {value!r}; it must be of type {kind}")
            changes.setdefault(sections[name], {})[name] = frozen
        return dataclasses.replace(
            self,
            **{section: dataclasses.replace(getattr(self, section), **values) for section, values in changes.items()},
        )

    def _kind(self, name: str) -> str:
        """A parameter's type as its section declares it."""
        declared = dataclasses.fields(getattr(self, self.names()[name]))
        return next(str(parameter.type) for parameter in declared if parameter.name == name)

    def flat(self) -> dict[str, Any]:
        """Every parameter by its name."""
        return {name: getattr(getattr(self, section), name) for name, section in self.names().items()}


def preset(name: str) -> Mapping[str, Any]:
    """The overrides of a preset; raises ValueError for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _is_of(value: Any, kind: str) -> bool:
    """Whether a value is of a declared type such as "float" or "str | tuple[str, ...]"; an int will do for a float."""
    accepted = {part.split("[")[0].strip() for part in kind.split("|")}
    return type(value).__name__ in accepted or (type(value) is int and "float" in accepted)
