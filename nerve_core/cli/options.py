"""Options that several commands share, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import console

if TYPE_CHECKING:
    from ..segmenter import Segmenter

Model = Annotated[str, typer.Option(help="A model pair's name, or a folder with a pair.json.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str | None, typer.Option(help="fp16, bf16 or fp32; by default fp16 on CUDA, fp32 on the CPU.")]
Preset = Annotated[str, typer.Option(help="pair (the pair's own settings) or paper.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override a setting, as NAME=VALUE in JSON, or @FILE with many in JSON; may be repeated."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files that are there and that nerve did not write.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]


NAMES_HELP = (
    'What to look for: "ball, ladder"; synonyms as "mug|cup". Also a list as in JSON or YAML, or a file of names: '
    "names.txt, @PATH."
)


def load(model: str, device: str, precision: str | None, preset: str, overrides: Iterable[str] | None) -> Segmenter:
    """A segmenter by the command line's options."""
    from ..models.loading import quiet_libraries
    from ..segmenter import Segmenter

    quiet_libraries()
    with console.status(f"loading {model}"):
        return Segmenter.from_pretrained(
            model, device=device, dtype=precision, preset=preset, settings=read_settings(overrides)
        )


def read_settings(pairs: Iterable[str] | None) -> dict[str, Any]:
    """NAME=VALUE with a JSON value, where a value that is no JSON is text; or @FILE with a JSON object. Raises
    ValueError, OSError."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        if pair.startswith("@"):
            path = Path(pair[1:])
            try:
                content = json.loads(path.read_text("utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"--set {pair}: {path} is no JSON ({error})") from None
            if not isinstance(content, dict):
                raise ValueError(f'--set {pair}: {path} must hold one JSON object, as {{"alpha": 0.9}}')
            found |= content
            continue
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair} has no value; write --set NAME=VALUE, as in --set alpha=0.9")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def words(text: str) -> tuple[str, ...]:
    """The parts of a list with commas, without blanks."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
