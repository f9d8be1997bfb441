"""docs/results.schema.json: the JSON of each command fits it, and no key can go or come unnoticed."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import cv2
import pytest
from jsonschema import Draft202012Validator

import reports
from generated_sets import write_folder, write_voc
from nerve_benchmarks import walk
from nerve_core.embedded.scenes import draw_scene, draw_scenes
from nerve_core.models.pairs import find_pair
from nerve_core.models.verify import Finding
from nerve_core.readout import ClassConfidence
from nerve_core.report import data
from nerve_core.report.files import write_results
from nerve_core.segmenter import STAGES
from nerve_core.settings import Settings
from results_schema import SCHEMA, assert_fits, errors, parse, printed, unnoticed

DEFINITIONS = SCHEMA["$defs"]
SIZE = (60, 80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A labelled folder of four small scenes."""
    return write_folder(tmp_path_factory.mktemp("set"), draw_scenes(7, 4, size=SIZE))


def written(folder: Path) -> dict:
    return parse((folder / "results.json").read_text())


# The file itself


def test_the_file_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)


def test_the_whole_file_is_any_definition_that_has_a_title():
    titled = [name for name, definition in DEFINITIONS.items() if "title" in definition]
    assert SCHEMA["anyOf"] == [{"$ref": f"#/$defs/{name}"} for name in titled]


def test_every_object_says_which_keys_it_has_and_every_field_what_it_is():
    described = set()

    def look(schema: dict, place: str) -> None:
        if "$ref" in schema:
            assert schema["$ref"].removeprefix("#/$defs/") in DEFINITIONS, place
        if schema.get("type") == "object" and "properties" in schema and place != "setting_values":
            assert schema["additionalProperties"] is False, place
            assert set(schema["required"]) <= set(schema["properties"]), place
        for name, field in schema.get("properties", {}).items():
            assert "description" in field or "description" in DEFINITIONS[field["$ref"].removeprefix("#/$defs/")], (
                f"{place}.{name} says nothing of what it is"
            )
            described.add(f"{place}.{name}")
            look(field, f"{place}.{name}")
        for name in ("items", "additionalProperties"):
            if isinstance(schema.get(name), dict):
                look(schema[name], place)

    for name, definition in DEFINITIONS.items():
        look(definition, name)
    assert len(described) > 200


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("report", data.Report),
        ("set_scores", data.SetScores),
        ("score", data.Score),
        ("published", data.Published),
        ("picture", data.Picture),
        ("curve", data.Curve),
        ("presence", data.Presence),
        ("camera", data.Camera),
        ("live", data.Live),
        ("class_confidence", ClassConfidence),
    ],
)
def test_a_definition_has_the_fields_of_the_class_that_is_written(name, kind):
    fields = {field.name for field in dataclasses.fields(kind)}
    assert set(DEFINITIONS[name]["properties"]) == set(DEFINITIONS[name]["required"]) == fields


def test_a_finding_has_the_fields_of_its_class():
    finding = DEFINITIONS["models_verify"]["properties"]["findings"]["items"]
    assert set(finding["properties"]) == {field.name for field in dataclasses.fields(Finding)}


def test_settings_and_stages_are_those_of_the_segmenter():
    names = set(Settings.names())
    assert set(DEFINITIONS["setting_values"]["properties"]) == set(DEFINITIONS["settings"]["required"]) == names
    assert set(DEFINITIONS["timings"]["properties"]) == {*STAGES, "networks", "total"}
    assert set(DEFINITIONS["bench_frame"]["properties"]["stages"]["properties"]) == {*STAGES, "networks"}


# The commands


def test_segment(nerve, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), draw_scene(5, size=SIZE).image[:, :, ::-1])
    (tmp_path / "b.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    code, text, _ = nerve("segment", tmp_path, "--names", "ball, star", "--device", "cpu", "--out", out, "--json")
    found = printed(text)
    assert_fits("segment", found)
    assert (code, len(found["images"]), len(found["unread"])) == (2, 1, 1)
    assert unnoticed("segment", found) == []
    file = parse((out / "a_confidence.json").read_text())
    assert_fits("segment_confidence", file)
    assert unnoticed("segment_confidence", file) == []


def test_eval_of_drawn_scenes(nerve, tmp_path):
    options = ("--count", 1, "--refine", "none", "--device", "cpu", "--out", tmp_path / "out")
    code, text, err = nerve("eval", "scenes", *options, "--json")
    assert code == 0, err
    assert_fits("eval", printed(text))
    assert unnoticed("eval", printed(text)) == []
    assert_fits("results", written(tmp_path / "out"))
    assert unnoticed("results", written(tmp_path / "out")) == []


def test_eval_of_a_folder_and_of_a_set_with_published_figures_in_a_table(nerve, folder, tmp_path):
    code, text, err = nerve("eval", "folder", "--root", folder, "--refine", "nerve,none", "--device", "cpu", "--json")
    assert code == 0, err
    assert_fits("eval", printed(text))
    roots = tmp_path / "roots.yaml"
    roots.write_text(f"folder: {folder}\nvoc21: {write_voc(tmp_path / 'voc', draw_scenes(7, 2, size=SIZE))}\n")
    options = ("--roots", roots, "--sets", "voc21,folder", "--limit", 2, "--device", "cpu", "--json")
    code, text, err = nerve("eval", "table1", *options, "--out", tmp_path / "out")
    assert code == 0, err
    found = printed(text)
    assert [len(item["published"]) for item in found["sets"]] == [2, 0]
    assert_fits("eval", found)
    assert unnoticed("eval", found) == []
    assert_fits("results", written(tmp_path / "out"))
    assert unnoticed("results", written(tmp_path / "out")) == []


def test_eval_of_an_ablation_has_curves(nerve, folder, tmp_path):
    options = ("--limit", 2, "--device", "cpu", "--out", tmp_path / "out")
    (tmp_path / "roots.yaml").write_text(f"folder: {folder}\n")
    code, _, err = nerve("eval", "fig2", "--roots", tmp_path / "roots.yaml", "--sets", "folder", *options)
    assert code == 0, err
    found = written(tmp_path / "out")
    assert len(found["report"]["curves"]) == 1
    assert_fits("results", found)
    curve = {**found, "report": {**found["report"], "sets": []}}
    assert unnoticed("results", curve) == []


def test_tune(nerve, folder, tmp_path):
    out = tmp_path / "out"
    options = ("--trials", 3, "--axes", "alpha", "--device", "cpu", "--out", out, "--json")
    code, text, err = nerve("tune", folder, *options)
    assert code == 0, err
    assert_fits("tune", printed(text))
    assert unnoticed("tune", printed(text)) == []
    assert_fits("results", written(out))
    settings = parse((out / "settings.json").read_text())
    assert_fits("tune_settings", settings)
    assert errors("tune_settings", {**settings, "speed": 1})


def test_models_list(nerve):
    found = printed(nerve("models", "list", "--json")[1])
    assert "embedded" in found["pairs"]
    assert_fits("models_list", found)
    assert unnoticed("models_list", found) == []


def test_models_verify(nerve, whole_pair, tmp_path):
    found = printed(nerve("models", "verify", whole_pair, "--json")[1])
    assert_fits("models_verify", found)
    broken = Path(shutil.copytree(whole_pair, tmp_path / "broken", copy_function=os.link))
    (broken / "clip/model.safetensors").unlink()
    code, text, _ = nerve("models", "verify", broken, "--json")
    assert code == 1
    assert_fits("models_verify", printed(text))
    assert unnoticed("models_verify", printed(text)) == []


def test_models_path(nerve):
    found = printed(nerve("models", "path", "--json")[1])
    assert_fits("models_path", found)
    assert unnoticed("models_path", found) == []
    found = printed(nerve("models", "path", "embedded", "--json")[1])
    assert_fits("models_path", found)
    assert unnoticed("models_path", found) == []
    found = printed(nerve("models", "path", "sd21-clipl14", "--json")[1])
    assert_fits("models_path", found)


def test_bench_walk(nerve, monkeypatch):
    monkeypatch.setattr(walk, "peak_memory_apart", lambda problem, side, steps: 8.0)
    monkeypatch.setattr(walk, "LARGE_GRID", 8)
    monkeypatch.setattr(walk, "SCALING_GRIDS", (4, 6))
    options = ("--grid", 6, "--names", 2, "--repeats", 1, "--device", "cpu", "--json")
    for more in ((), ("--large",)):
        code, text, err = nerve("bench", "walk", *options, *more)
        assert code == 0, err
        found = printed(text)
        assert_fits("bench_walk", found)
        assert unnoticed("bench_walk", found) == ["large missing"] * len(more)


def test_bench_frame(nerve, whole_pair):
    """Ours alone; the plain side too in test_benchmarks_frame.py."""
    options = ("--device", "cpu", "--no-plain", "--frames", 1, "--names", 2, "--size", "64x48", "--json")
    code, text, err = nerve("bench", "frame", "--model", whole_pair, *options)
    assert code == 0, err
    found = printed(text)
    assert_fits("bench_frame", found)
    assert unnoticed("bench_frame", found) == []
    assert errors("bench_frame", {**found, "speedup": 2.0}), "of a plain side that was not measured"


# Reports of what no command here makes: a running node, a recording with labels


@pytest.mark.parametrize("frames", [12, 0])
def test_the_report_of_a_replay(tmp_path, frames):
    settings = Settings.of_pair(find_pair("embedded")).flat()
    made = dataclasses.replace(reports.replay(tmp_path, frames), settings=settings, defaults={})
    write_results(made, tmp_path)
    found = written(tmp_path)
    assert len(found["report"]["live"]) == 2
    assert_fits("results", found)
    assert unnoticed("results", found) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("report", "kind"), "walk"),
        (("report", "live", 0, "rate"), 0),
        (("report", "cameras", 0, "static_share"), 1.5),
        (("report", "cameras", 0, "size"), [64]),
        (("report", "cameras", 0, "names", 0, "histogram"), [0] * 31),
        (("report", "settings", "alpha"), 1.0),
        (("report", "settings", "steps"), "12"),
        (("report", "defaults"), {"alpha": 0.5}),
    ],
)
def test_what_is_out_of_range_is_found(tmp_path, path, value):
    settings = Settings.of_pair(find_pair("embedded")).flat()
    write_results(dataclasses.replace(reports.replay(tmp_path, 4), settings=settings, defaults={}), tmp_path)
    found = written(tmp_path)
    assert_fits("results", found)
    *way, last = path
    inner = found
    for key in way:
        inner = inner[key]
    inner[last] = value
    assert errors("results", found)
