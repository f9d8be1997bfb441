"""The paper's tables: their rows, the folders of their sets, and the figures that a plain loop gives."""

from __future__ import annotations

import json

import numpy as np
import pytest

from generated_sets import write_folder
from nerve_core import Segmenter
from nerve_core.embedded.scenes import NAMES, draw_scene, draw_scenes
from nerve_core.evaluation.datasets import DATASETS
from nerve_core.evaluation.metric import ConfusionMatrix
from nerve_core.evaluation.protocols import (
    BENCHMARKS,
    PUBLISHED,
    TABLES,
    count_heads,
    curves,
    means,
    read_roots,
    table_variants,
)
from nerve_core.evaluation.runner import SetResult, Tally, make_task, run_set
from nerve_core.evaluation.summary import scores, set_scores
from nerve_core.evaluation.workers import InProcess
from nerve_core.models.pairs import find_pair
from nerve_core.report.data import Score, SetScores
from nerve_core.settings import Settings
from nerve_core.text.vocabulary import Vocabulary
from small_sets import SIZE, SmallScenes


@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("set"), draw_scenes(7, 3, size=SIZE))


EMBEDDED = Settings().replaced(find_pair("embedded").settings)


@pytest.mark.parametrize("table", ["table3", "table4", "fig2"])
def test_a_table_has_the_figures_of_a_plain_loop_over_its_images(table):
    rows = table_variants(table, "embedded", EMBEDDED, {})
    task = make_task(SmallScenes(8, 3), rows, device="cpu")
    found = {score.variant: score for score in scores(run_set(task, InProcess(task)))}
    for row in rows[:: 3 if table == "table3" else 1]:
        if row.refine == "none":
            continue
        segmenter = Segmenter.from_pretrained("embedded", device="cpu", settings=row.settings)
        matrix = ConfusionMatrix.of(len(NAMES) + 1)
        for number in range(3):
            scene = draw_scene((8, number), size=SIZE)
            matrix.add(scene.labels, segmenter(scene.image, Vocabulary(NAMES)).labels)
        assert found[row.name].miou == matrix.mean_iou(), row.name
        assert found[row.name].confusion == tuple(map(tuple, matrix.sparse()))
    if table == "fig2":
        # no step of the truncated walk leaves G as it is
        alone = make_task(SmallScenes(8, 3), [table_variants("table4", "embedded", EMBEDDED, {})[0]], device="cpu")
        (clip,) = scores(run_set(alone, InProcess(alone)))
        assert found["L = 0"].miou == pytest.approx(clip.miou, abs=2e-3)


def test_rows_are_what_the_tables_compare():
    def of(table):
        return table_variants(table, "embedded", EMBEDDED, {})

    heads = table_variants("table3", "embedded", EMBEDDED, {})
    assert [row.settings["head_weights"] for row in heads] == [*range(10), "mean", "entropy"]
    parts = table_variants("table4", "embedded", EMBEDDED, {})
    assert [(row.refine, dict(row.settings)) for row in parts] == [
        ("none", {"edges": "none"}),
        ("nerve", {"beta": 0.0, "edges": "none"}),
        ("nerve", {"beta": 1.0, "edges": "none"}),
        ("nerve", {"steps": 1, "edges": "none"}),
        ("nerve", {"edges": "none"}),
        ("nerve", {"edges": "pixels"}),
    ]
    assert {row.settings["edges"] for table in ("table3", "fig2") for row in of(table)} == {"none"}
    walk = table_variants("fig2", "embedded", EMBEDDED, {})
    assert [row.settings["steps"] for row in walk] == [0, 5, 10, 20, 40]
    assert {row.settings["method"] for row in walk} == {"truncated"}
    assert [row.name for row in table_variants("table1", "embedded", EMBEDDED, {})] == ["nerve"]
    axes = {"refine": ("nerve", "none"), "head": ("vanilla", "maskclip")}
    assert [row.name for row in table_variants("table1", "embedded", EMBEDDED, axes)] == [
        "nerve",
        *(f"{refine}, {head}" for refine in axes["refine"] for head in axes["head"]),
    ]
    with pytest.raises(ValueError, match="table 'table2' is unknown; choose one of table1"):
        table_variants("table2", "embedded", EMBEDDED, {})


def test_heads_are_counted_from_the_description_of_the_unet(pair):
    settings = Settings().replaced(find_pair(str(pair)).settings)
    segmenter = Segmenter.from_pretrained(str(pair), device="cpu")
    _, Q, _ = segmenter.frame(np.zeros((64, 64, 3), np.uint8), segmenter.embed(Vocabulary(["ball"])))
    assert count_heads(str(pair), settings) == len(Q)
    assert count_heads("embedded", EMBEDDED) == 10
    assert count_heads("embedded", EMBEDDED.replaced({"taps": [[2, 1]]})) == 5


def test_published_figures_are_the_authors_and_carry_their_source():
    assert set(PUBLISHED) == set(BENCHMARKS) == set(DATASETS) - {"folder"}
    nerve = [PUBLISHED[name][0].miou for name in BENCHMARKS]
    assert nerve == [69.7, 37.7, 43.3, 90.1, 24.0, 43.4, 28.8]
    assert round(sum(nerve) / 7, 1) == 48.1
    assert all("arXiv" in entry.source for entries in PUBLISHED.values() for entry in entries)


def set_of(name, **mious):
    made = [Score(variant, {}, 1, 1.0, miou, (0.0, 1.0), 0.5, {}) for variant, miou in mious.items()]
    return SetScores(name, name, "", 1, ("background",), tuple(made))


def test_the_mean_over_sets_is_given_where_all_were_run_and_only_of_variants_that_have_a_score():
    sets = [set_of(name, nerve=0.1 * k, other=0.5 if k else None) for k, name in enumerate(BENCHMARKS)]
    (rows,) = means(sets).values()
    assert [(row["variant"], row["mean mIoU, %"], row["by"].split(",")[0]) for row in rows] == [
        ("nerve", 30.0, "this run"),
        ("NERVE", 48.1, "published"),
    ]
    assert means(sets[1:]) == {}


def test_ablations_over_numbers_are_curves():
    rows = table_variants("fig2", "embedded", EMBEDDED, {})
    task = make_task(SmallScenes(8, 2), rows, device="cpu")
    result = run_set(task, InProcess(task))
    item = set_scores(result, scores(result), images=9)
    (curve,) = curves("fig2", [item])
    assert curve.x == (0.0, 5.0, 10.0, 20.0, 40.0)
    assert curve.y == tuple(score.miou for score in item.scores)
    assert curve.interval == tuple(score.interval for score in item.scores)
    assert curves("table4", [item]) == ()
    assert item.images == 9
    assert "the first 2 of 9 images alone" in item.notes


@pytest.mark.parametrize("truth", [0, 1, 255])
def test_a_score_of_the_background_alone_is_said_to_be_one(truth):
    rows = table_variants("fig2", "embedded", EMBEDDED, {})[:1]
    task = make_task(SmallScenes(8, 1), rows, device="cpu")
    tally = Tally(["0"], [rows[0].name], len(task.dataset.labels))
    tally.matrices[rows[0].name].add(np.full((2, 2), truth, np.uint8), np.zeros((2, 2), np.uint8))
    item = set_scores(SetResult(task, {}, tally), [])
    said = [note for note in item.notes if "no class occurs in the truth of these images" in note]
    assert len(said) == (truth == 0)


def test_only_single_heads_are_points_of_the_curve_over_heads():
    def score(weights, miou):
        return Score(str(weights), {"head_weights": weights}, 1, 1.0, miou, (0.0, 1.0), 0.5, {})

    item = SetScores("a", "a", "", 1, (), tuple(score(w, 0.1) for w in (0, 1, "mean", "entropy")))
    (curve,) = curves("table3", [item])
    assert curve.x == (0.0, 1.0)


# --- the command ---


def test_roots_are_read_from_yaml_and_relative_ones_are_beside_it(tmp_path):
    path = tmp_path / "roots.yaml"
    path.write_text("voc21: sets/voc\nfolder: /data/own\n")
    assert read_roots(path) == {"voc21": tmp_path / "sets" / "voc", "folder": read_roots(path)["folder"]}
    assert str(read_roots(path)["folder"]) == "/data/own"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("voc21: [", "is no YAML"),
        ("- voc21", "must map sets to folders"),
        ("voc21: 3", "must map sets to folders"),
        ("", "must map sets to folders"),
        ("voc12: /data", "names voc12; known sets are voc21"),
    ],
)
def test_roots_that_are_none_are_refused(nerve, tmp_path, text, said):
    (tmp_path / "roots.yaml").write_text(text)
    code, out, err = nerve("eval", "table1", "--roots", tmp_path / "roots.yaml")
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_a_missing_set_is_refused_or_left_out_and_said(nerve, tmp_path, scene_folder):
    roots = tmp_path / "roots.yaml"
    roots.write_text(f"folder: {scene_folder}\nvoc21: {tmp_path / 'nowhere'}\n")
    arguments = ("eval", "table4", "--roots", roots, "--sets", "voc21,pc60,folder", "--limit", 2, "--device", "cpu")
    code, _, err = nerve(*arguments)
    assert code == 2
    assert "nowhere is no folder" in err
    assert "--skip-missing" in err
    code, out, err = nerve(*arguments, "--skip-missing", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert "voc21 is left out" in err
    assert "names no folder of pc60" in err
    (item,) = json.loads(out.splitlines()[-1])["sets"]
    assert (item["set"], len(item["scores"])) == ("folder", 6)
    report = json.loads((tmp_path / "out" / "results.json").read_text())["report"]
    assert any("pc60 is left out" in note for note in report["notes"])
    assert "the first 2 of 3 images alone" in report["sets"][0]["notes"]
    code, _, err = nerve("eval", "table4", "--roots", roots, "--sets", "pc60", "--skip-missing")
    assert code == 2
    assert "no set is left" in err


def test_every_table_has_a_command(nerve):
    _, out, err = nerve("eval", "--help")
    assert all(name in out + err for name in (*TABLES, *DATASETS, "scenes"))
