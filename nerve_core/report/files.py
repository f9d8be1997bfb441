"""A report -> its files, and back: results.json holds all of it, the CSV files hold its tables."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..output import write, writing
from .data import Camera, Report

RESULTS = "results.json"
SCORE_TABLES = ("scores.csv", "per_class.csv", "confusion.csv")
FRAMES = "frames.csv"
VERSION = 1


class ReportError(ValueError):
    """A report cannot be written or read: what is wrong, and what to do."""


def write_results(report: Report, folder: Path) -> Path:
    """Write results.json, such that `read_report` gives an equal report, and return its path.

    Raises ReportError where a value cannot be said in JSON (NaN, an infinity, an object), with its place.
    """
    plain = {"format": "nerve report", "version": VERSION, "report": _plain(report, "report")}
    # ASCII alone: a name may hold half a surrogate pair, which UTF-8 cannot say and an escape can.
    text = json.dumps(plain, allow_nan=False)
    return write(folder / RESULTS, text + "\n")


def read_report(folder: Path) -> Report:
    """The report of a folder, from its results.json.

    Raises ReportError where there is none, or it is damaged, of another format, or of a newer version.
    """
    path = folder / RESULTS
    try:
        whole = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ReportError(f"{folder} holds no {RESULTS}; give a folder that nerve eval, tune or replay wrote") from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is damaged ({error}); run the command that wrote it again") from None
    if not isinstance(whole, dict) or whole.get("format") != "nerve report":
        raise ReportError(f"{path} is not a report of nerve; give a folder that nerve eval, tune or replay wrote")
    if whole.get("version") != VERSION:
        raise ReportError(
            f"{path} is of version {whole.get('version')!r}, this nerve reads version {VERSION}; "
            "update nerve, or run the command again"
        )
    try:
        return _typed(whole.get("report"), Report, "report")
    except (ReportError, ValueError) as error:
        raise ReportError(f"{path} is damaged: {error}") from None


def _plain(value: Any, place: str) -> Any:
    """A value as JSON has it. place: what to call it in an error."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: _plain(getattr(value, item.name), f"{place}.{item.name}") for item in dataclasses.fields(value)
        }
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ReportError(f"{place} is {value}; a report holds finite numbers, and None for what is not known")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ReportError(f"{place} has the key {key!r}; keys must be text")
        return {key: _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    raise ReportError(f"{place} is a {type(value).__name__}; a report holds text, numbers, tuples and mappings")


def _typed(value: Any, kind: Any, place: str) -> Any:
    """What JSON gave, as the type that a field declares. Raises ReportError where it is another."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value  # the report's own classes make its lists tuples
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _typed(value, next(item for item in inner if item is not type(None)), place)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        _expect(isinstance(value, dict), value, "an object", place)
        declared = {item.name: item for item in dataclasses.fields(kind)}
        if unknown := sorted(value.keys() - declared.keys()):
            raise ReportError(f"{place} has the unknown field {unknown[0]!r}")
        for name, item in declared.items():
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if required and name not in value:
                raise ReportError(f"{place} lacks the field {name!r}")
        types_ = typing.get_type_hints(kind)
        return kind(**{name: _typed(item, types_[name], f"{place}.{name}") for name, item in value.items()})
    if origin is tuple:
        _expect(isinstance(value, list), value, "a list", place)
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        _expect(len(kinds) == len(value), value, f"a list of {len(kinds)}", place)
        return tuple(
            _typed(item, of, f"{place}[{index}]") for index, (item, of) in enumerate(zip(value, kinds, strict=True))
        )
    if origin is dict:
        _expect(isinstance(value, dict), value, "an object", place)
        return {key: _typed(item, inner[1], f"{place}[{key!r}]") for key, item in value.items()}
    accepted = (int, float) if kind is float else kind
    _expect(isinstance(value, accepted) and not isinstance(value, bool), value, f"of type {kind.__name__}", place)
    if isinstance(value, float) and not math.isfinite(value):
        raise ReportError(f"{place} is {value}; it must be finite")
    return value


def _expect(right: bool, value: Any, wanted: str, place: str) -> None:
    if not right:
        raise ReportError(f"{place} is {json.dumps(value)[:60]}; it must be {wanted}")


def write_tables(report: Report, folder: Path) -> None:
    """Write the report's tables as CSV: UTF-8, one row an observation, shares 0..1, an empty cell for what is None.

    scores.csv, per_class.csv and confusion.csv where something was scored, of all sets; frames.csv of a replay, of all
    cameras.
    """
    scored = [(item.name, item.images, item.labels, score) for item in report.sets for score in item.scores]
    for camera in report.cameras:
        if camera.score is not None:
            scored.append((camera.topic, camera.frames, camera_labels(camera), camera.score))
    if scored:
        interval, rest = ("miou", "miou_low", "miou_high"), ("pixel_accuracy", "seconds", "settings")
        rows: list[tuple[Any, ...]] = [("set", "variant", "images", "images_of_set", *interval, *rest)]
        for name, images, _, score in scored:
            low_high = score.interval or (None, None)
            settings = json.dumps(_plain(score.settings, "settings"))
            first = (name, score.variant, score.images, images, score.miou, *low_high)
            rows.append((*first, score.pixel_accuracy, score.seconds, settings))
        _write_csv(folder / SCORE_TABLES[0], rows)
        rows = [("set", "variant", "name", "iou")]
        rows += [(name, score.variant, *item) for name, _, _, score in scored for item in score.per_class.items()]
        _write_csv(folder / SCORE_TABLES[1], rows)
        rows = [("set", "variant", "truth", "prediction", "pixels")]
        rows += [
            (name, score.variant, label_name(labels, truth), label_name(labels, predicted), pixels)
            for name, _, labels, score in scored
            for truth, predicted, pixels in score.confusion
        ]
        _write_csv(folder / SCORE_TABLES[2], rows)
    if report.cameras:
        header = ("topic", "time", "name", "presence", "confidence", "area")
        _write_csv(folder / FRAMES, itertools.chain([header], _frames(report)))


def _frames(report: Report) -> Iterator[tuple[Any, ...]]:
    for camera in report.cameras:
        for name in camera.names:
            values = zip(camera.times, name.presence, name.confidence, name.area, strict=True)
            for time, presence, confidence, area in values:
                yield camera.topic, time, name.name, presence, confidence, area


def camera_labels(camera: Camera) -> tuple[str, ...]:
    """The names of a camera's label numbers, "background" first."""
    names = {item.label: item.name for item in camera.names}
    return ("background", *(names.get(label, f"label {label}") for label in range(1, max(names, default=0) + 1)))


def label_name(labels: Sequence[str], number: int) -> str:
    """A label number's name; one that has no name keeps its number."""
    return labels[number] if 0 <= number < len(labels) else f"label {number}"


def _write_csv(path: Path, rows: Iterable[tuple[Any, ...]]) -> None:
    with writing(path) as part, part.open("w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows(rows)
