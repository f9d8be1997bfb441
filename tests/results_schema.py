"""docs/results.schema.json in tests: whether a value fits a definition, and what may be changed in it unnoticed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from jsonschema import Draft202012Validator

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parents[1] / "docs" / "results.schema.json").read_text())
OPEN = {
    ("per_class",),
    ("per_image",),
    ("lost",),
    ("stage_ms",),
    ("extra",),
    ("pairs",),
    ("report", "versions"),
    ("scaling_ms", "low rank"),
    ("scaling_ms", "favor"),
}
"""The ends of the paths to objects whose keys are data: names, images, pairs, reasons, versions, grids."""


def parse(text: str) -> Any:
    """The value of one JSON text. Raises AssertionError for NaN and infinities, which are no JSON."""

    def refused(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refused)


def printed(out: str) -> Any:
    """What a command printed on the last line of its standard output."""
    return parse(out.splitlines()[-1])


def errors(name: str, value: Any) -> list[str]:
    """Why a value does not fit the definition `name`."""
    validator = Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]})
    return [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(value)]


def assert_fits(name: str, value: Any) -> None:
    """Raise AssertionError, with the reasons, unless a value fits the definition `name`."""
    found = errors(name, value)
    assert not found, found


def unnoticed(name: str, value: Any) -> list[str]:
    """The keys that could be taken from a value, or added to it, and it would still fit the definition `name`."""
    return [what for what, changed in _changes(value) if not errors(name, changed)]


def _changes(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Each key taken away and one added, in each object; of a list, in its first item."""
    if isinstance(value, list) and value:
        for what, changed in _changes(value[0], path):
            yield what, [changed, *value[1:]]
    if not isinstance(value, dict):
        return
    is_open = any(path[-len(end) :] == end for end in OPEN)
    if not is_open:
        yield f"{'.'.join(path)} with another key", {**value, "unknown": 0}
        for key in value:
            yield f"{'.'.join((*path, key))} missing", {other: item for other, item in value.items() if other != key}
    for key, item in value.items():
        for what, changed in _changes(item, (*path, key)) if path[-1:] != ("extra",) else ():
            yield what, {**value, key: changed}
