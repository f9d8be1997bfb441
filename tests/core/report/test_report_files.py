"""results.json gives back exactly what was written, or says what is wrong with it; the CSV files hold the tables."""

import csv
import dataclasses
import json
import math
import types
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reports
from nerve_core.report import Report, ReportError, Score, read_report
from nerve_core.report.data import KINDS
from nerve_core.report.files import RESULTS, write_results, write_tables

TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # half surrogate pairs too
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def of_type(kind):
    """Values of a declared type, by the fields' own types: a new field is tested without a word here."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return PLAIN
    if origin in (types.UnionType, typing.Union):
        return st.none() | of_type(next(item for item in inner if item is not type(None)))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {name: of_type(item) for name, item in hints.items()}
        return st.builds(kind, **(fields | {"kind": st.sampled_from(KINDS)} if kind is Report else fields))
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return st.lists(of_type(inner[0]), max_size=2).map(tuple)
        return st.tuples(*map(of_type, inner))
    if origin is dict:
        return st.dictionaries(TEXT, of_type(inner[1]), max_size=2)
    return {str: TEXT, int: st.integers(), float: FLOATS}[kind]


@settings(max_examples=40)
@given(report=of_type(Report))
def test_what_is_read_equals_what_was_written(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_results(report, folder)
    assert read_report(folder) == report


def test_a_whole_evaluation_and_a_whole_replay_come_back(tmp_path):
    for name, report in (("evaluation", reports.evaluation(tmp_path)), ("replay", reports.replay(tmp_path, 50))):
        write_results(report, tmp_path / name)
        assert read_report(tmp_path / name) == report


def test_numpys_numbers_are_plain_numbers_in_the_file(tmp_path):
    score = Score(
        "", {"alpha": np.float32(0.5)}, np.int64(3), np.float64(1.5), 0.5, None, None, {}, ((np.int64(1), 2, 3),)
    )
    report = dataclasses.replace(reports.tune(), sets=(dataclasses.replace(reports.tune().sets[0], scores=(score,)),))
    write_results(report, tmp_path)
    assert read_report(tmp_path) == report


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan")])
def test_what_is_not_finite_is_refused_by_its_place_and_nothing_is_written(tmp_path, value):
    tuned = reports.tune()
    score = dataclasses.replace(tuned.sets[0].scores[0], miou=value)
    report = dataclasses.replace(tuned, sets=(dataclasses.replace(tuned.sets[0], scores=(score,)),))
    with pytest.raises(ReportError, match=r"report\.sets\[0\]\.scores\[0\]\.miou is (nan|inf)"):
        write_results(report, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [object(), {1: 2}, b"bytes", {"set"}])
def test_what_json_cannot_say_is_refused_by_its_place(tmp_path, value):
    with pytest.raises(ReportError, match=r"report\.extra\['x'\]"):
        write_results(dataclasses.replace(reports.tune(), extra={"x": value}), tmp_path)


def test_a_report_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kinds are evaluation, tune, replay"):
        dataclasses.replace(reports.tune(), kind="other")


def _change(folder, change):
    path = folder / RESULTS
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole: whole.update(format="other"), "not a report of nerve"),
        (lambda whole: whole.update(version=99), "version 99, this nerve reads version 1; update nerve"),
        (lambda whole: whole.pop("version"), "version None"),
        (lambda whole: whole.update(report=[]), r"report is \[\]; it must be an object"),
        (lambda whole: whole["report"].update(new=1), "unknown field 'new'"),
        (lambda whole: whole["report"].pop("title"), "lacks the field 'title'"),
        (lambda whole: whole["report"].update(kind="x"), "kind 'x' is unknown"),
        (lambda whole: whole["report"].update(title=3), "title is 3; it must be of type str"),
        (lambda whole: whole["report"].update(notes="word"), "notes is .*; it must be a list"),
        (lambda whole: whole["report"].update(versions=[]), "versions is .*; it must be an object"),
        (lambda whole: whole["report"]["sets"][0].update(images=True), r"sets\[0\]\.images is true"),
        (lambda whole: whole["report"]["sets"][0]["scores"][0].update(interval=[1.0]), "interval is .* a list of 2"),
        (lambda whole: whole["report"]["sets"][0]["scores"][0].update(miou=math.nan), "miou is nan"),
    ],
)
def test_a_changed_file_is_refused_with_what_is_wrong(tmp_path, change, said):
    write_results(reports.tune(), tmp_path)
    _change(tmp_path, change)
    with pytest.raises(ReportError, match=said):
        read_report(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'"text"', b"null", b"9" * 9999])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / RESULTS).write_bytes(content)
    with pytest.raises(ReportError, match=RESULTS):
        read_report(tmp_path)


def test_every_shortened_file_is_refused(tmp_path):
    whole = write_results(reports.tune(), tmp_path).read_bytes()
    for length in range(0, len(whole) - 2, 97):
        (tmp_path / RESULTS).write_bytes(whole[:length])
        with pytest.raises(ReportError, match="damaged"):
            read_report(tmp_path)


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(ReportError, match=r"holds no results\.json"):
        read_report(tmp_path)


def test_an_older_file_without_the_newer_fields_is_read(tmp_path):
    write_results(reports.tune(), tmp_path)
    _change(
        tmp_path,
        lambda whole: (whole["report"].pop("defaults"), whole["report"]["sets"][0]["scores"][0].pop("per_image")),
    )
    assert read_report(tmp_path).defaults == {}


def _rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_tables_hold_every_score_name_and_pair(tmp_path):
    report = reports.evaluation(tmp_path, 14, 2, hostile=True, images=20)
    write_tables(report, tmp_path)
    scores = _rows(tmp_path / "scores.csv")
    assert [row["variant"] for row in scores] == ["nerve", "none"]
    first = report.sets[0].scores[0]
    assert float(scores[0]["miou"]) == first.miou
    assert (float(scores[0]["miou_low"]), float(scores[0]["miou_high"])) == first.interval
    assert (scores[0]["images"], scores[0]["images_of_set"]) == ("20", "1449")
    assert json.loads(scores[0]["settings"]) == {"refine": "nerve"}
    names = _rows(tmp_path / "per_class.csv")
    assert len(names) == 2 * 14
    assert names[1]["name"] == reports.HOSTILE[0]
    assert names[3]["iou"] == ""  # the truth does not show it
    confusion = _rows(tmp_path / "confusion.csv")
    assert sum(int(row["pixels"]) for row in confusion if row["variant"] == "nerve") == sum(
        p for *_, p in first.confusion
    )
    assert not (tmp_path / "frames.csv").exists()


def test_a_replays_table_holds_every_name_of_every_frame(tmp_path):
    report = reports.replay(tmp_path, 30)
    write_tables(report, tmp_path)
    rows = _rows(tmp_path / "frames.csv")
    name = report.cameras[0].names[1]
    assert len(rows) == 3 * 30
    assert [float(row["area"]) for row in rows if row["name"] == name.name] == list(name.area)
    assert [row["confidence"] for row in rows if row["name"] == name.name] == [
        "" if value is None else repr(value) for value in name.confidence
    ]
