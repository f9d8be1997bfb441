"""Two runs side by side: what differs comes first, what has no partner is said, and how sure a difference is."""

import dataclasses
import json

import numpy as np
import pytest
import typer.testing
from test_report_page import text_of

import reports
from nerve_core.cli.report import report as command
from nerve_core.report import ReportError, compare, save_picture, write_comparison, write_report


def written(report, folder):
    write_report(report, folder)
    return folder


def two_evaluations(tmp_path, **changes):
    a, b = tmp_path / "a", tmp_path / "b"
    write_report(reports.evaluation(a, 6, 2), a)
    write_report(reports.evaluation(b, 8, 3, **changes), b)
    return a, b


def test_what_differs_comes_before_any_figure(tmp_path):
    settings = {**reports.SETTINGS, "alpha": 0.7, "kernel": "relu"}
    a, b = two_evaluations(tmp_path, settings=settings, device="cuda:0")
    text = text_of(write_comparison(a, b, tmp_path / "out"))
    first, rest = text.split("Pascal VOC 2012", 1)
    for words in (
        "device cpu, 2 threads cuda:0",
        "kernel exp relu",
        "alpha 0.9 0.7",
        "only here: name6, class 7 of a set",
    ):
        assert words in first
    assert "tau" not in first
    assert "mIoU, %" in rest


def test_two_equal_runs_differ_in_nothing(tmp_path):
    folder = written(reports.replay(tmp_path / "a", 60), tmp_path / "a")
    text = text_of(write_comparison(folder, folder, tmp_path / "out"))
    assert "Command, model, device, source, settings, versions and names are the same." in text
    assert "only in" not in text
    assert "only here" not in text


def test_differences_are_b_less_a(tmp_path):
    a, b = two_evaluations(tmp_path)
    text = text_of(write_comparison(a, b, tmp_path / "out"))
    one, other = (
        json.loads((folder / "results.json").read_text())["report"]["sets"][0]["scores"][0] for folder in (a, b)
    )
    change = 100 * (other["miou"] - one["miou"])
    wanted = f"mIoU, % {100 * one['miou']:.1f} {100 * other['miou']:.1f} {change:+.1f}".replace("-", "−")
    assert wanted in text


def test_what_has_no_partner_is_listed(tmp_path):
    a, b = two_evaluations(tmp_path)
    extra = dataclasses.replace(reports.tune().sets[0], name="other")
    report = reports.evaluation(b, 8, 3)
    write_report(dataclasses.replace(report, sets=(*report.sets, extra)), b)
    text = text_of(write_comparison(a, b, tmp_path / "out"))
    assert "set other: only in B" in text
    assert "variant head naclip, refine nerve: only in B" in text
    assert "Scored only in B: name6 , class 7 of a set" in text


def test_a_recordings_topics_names_and_frames_without_a_partner_are_listed(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    one, other = reports.replay(a, 40), reports.replay(b, 30, ("mug", "cup", "ball"))
    second = dataclasses.replace(other.cameras[0], topic="/second")
    left = dataclasses.replace(other.cameras[0], pictures=other.cameras[0].pictures[:1], score=None)
    write_report(one, a)
    write_report(dataclasses.replace(other, cameras=(left, second), live=()), b)
    text = text_of(write_comparison(a, b, tmp_path / "out"))
    for words in (
        "camera /second: only in B",
        "name ladder: only in A",
        "name cup: only in B",
        "frame frame 600: only in A",
        "score against labels: only in A",
        "live run /camera/image_raw at rate 1: only in A",
        "frames segmented 40 30 −10",
    ):
        assert words in text


def test_frames_of_two_recordings_are_not_taken_for_the_same(tmp_path):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    one = reports.replay(a, 40)
    other = dataclasses.replace(reports.replay(b, 40, seed=1), source="other.mcap")
    image, truth = reports.scene(9, 4)
    strange = save_picture(b, image, truth, "abc", image_id="frame 12", variant="nerve", rank="sample")
    pictures = (strange, *other.cameras[0].pictures[1:])
    other = dataclasses.replace(other, cameras=(dataclasses.replace(other.cameras[0], pictures=pictures),))
    for folder, report in ((a, one), (b, other), (c, reports.replay(c, 40, seed=1))):
        write_report(report, folder)
    text = text_of(write_comparison(a, b, tmp_path / "out"))
    assert "A and B are of two recordings" in text
    assert "frame frame 12: another image in B" in text
    assert "that both scored" not in text
    text = text_of(write_comparison(a, c, tmp_path / "out"))
    assert "two recordings" not in text
    assert "Over the 40 images of the same name that both scored" in text


def test_two_single_variants_are_compared_whatever_they_are_called(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    tuned = reports.tune().sets[0]
    for folder, score in ((a, tuned.scores[0]), (b, tuned.scores[1])):
        write_report(dataclasses.replace(reports.tune(), sets=(dataclasses.replace(tuned, scores=(score,)),)), folder)
    assert "A: pair's own B: tuned" in text_of(write_comparison(a, b, tmp_path / "out"))


def test_two_kinds_are_refused(tmp_path):
    a = written(reports.tune(), tmp_path / "a")
    b = written(reports.replay(tmp_path / "b", 5), tmp_path / "b")
    with pytest.raises(ReportError, match=r"of kind tune, .* of kind replay; give two of one kind"):
        write_comparison(a, b, tmp_path / "out")


def score_of(per_image):
    return dataclasses.replace(reports.score("", ("a", "b"), 3), per_image=per_image)


def test_the_interval_of_a_difference_is_paired_and_over_the_images_of_both():
    generator = np.random.default_rng(3)
    hard = generator.random(200)  # images differ far more than the runs do
    a = score_of({f"{i}": float(value) for i, value in enumerate(hard)} | {"only a": 0.5, "none": None})
    b = score_of({f"{i}": float(value + 0.01) for i, value in enumerate(hard)} | {"only b": 0.1, "none": 0.3})
    found = compare.paired(a, b)
    assert found.images == 200
    assert found.difference == pytest.approx(0.01)
    assert found.interval == pytest.approx((0.01, 0.01))
    noisy = score_of(
        {
            f"{i}": float(value + gain)
            for i, (value, gain) in enumerate(zip(hard, generator.normal(0, 0.1, 200), strict=True))
        }
    )
    low, high = compare.paired(a, noisy).interval
    spread = 1.96 * 0.1 / np.sqrt(200)
    assert high - low == pytest.approx(2 * spread, rel=0.3)
    assert compare.paired(a, noisy) == compare.paired(a, noisy)
    assert compare.paired(a, score_of({"0": 0.5})) is None
    assert compare.paired(score_of({}), score_of({})) is None


def test_pictures_that_are_not_in_the_page_are_copied_beside_it(tmp_path, monkeypatch):
    a, b = two_evaluations(tmp_path)
    assert not (written(reports.tune(), tmp_path / "t") / "pictures").exists()
    path = write_comparison(a, b, tmp_path / "out")
    assert not (tmp_path / "out" / "pictures").exists()
    assert path.read_text().count("data:image/jpeg") == 2 * 4 * 4  # variants, images, and image, truth, A, B
    monkeypatch.setattr("nerve_core.report.page.EMBEDDED_BYTES", 0)
    source = write_comparison(a, b, tmp_path / "out").read_text()
    assert "data:image/jpeg" not in source
    for name in {part.split('"')[0] for part in source.split('href="pictures/')[1:]}:
        assert (tmp_path / "out" / "pictures" / name).is_file()


def test_the_command_says_where_the_page_is_and_shows_a_run_anew(tmp_path):
    a, b = two_evaluations(tmp_path)
    run = typer.testing.CliRunner().invoke
    found = run(command, ["compare", str(a), str(b), "--out", str(tmp_path / "out")])
    assert found.exit_code == 0
    assert found.output.strip() == str(tmp_path / "out" / "comparison.html")
    (a / "report.html").unlink()
    assert run(command, ["show", str(a)]).output.strip() == str(a / "report.html")
    assert (a / "report.html").is_file()
    failed = run(command, ["show", str(tmp_path)])
    assert isinstance(failed.exception, ReportError)
