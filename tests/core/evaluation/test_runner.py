"""A run over a set: every image once and exactly, whatever is killed, damaged or unreadable meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from nerve_core import Segmenter
from nerve_core.embedded.scenes import draw_scene
from nerve_core.evaluation import runner
from nerve_core.evaluation.metric import ConfusionMatrix
from nerve_core.evaluation.runlog import RunError, RunLog
from nerve_core.evaluation.runner import Tally, describe, make_task, open_workers, run_set
from nerve_core.evaluation.scenes import DrawnScenes
from nerve_core.evaluation.summary import scores
from nerve_core.evaluation.variants import Variant
from nerve_core.evaluation.workers import Failed, InProcess, Job, Processes
from small_sets import SIZE, KnownAnswers, SmallScenes, died

ROWS = (Variant("nerve"), Variant("none", refine="none"))


def task_of(count=4, **options):
    return make_task(SmallScenes(5, count, **options), ROWS, device="cpu")


def bytes_of(result):
    """All that was counted, to be compared byte by byte."""
    tally = result.tally
    return {name: (tally.matrices[name].counts.tobytes(), tally.sums[name].tobytes()) for name in tally.matrices}


@pytest.fixture
def known():
    """A task and its answers without a model, and what they amount to."""
    task = task_of(6)
    return task, run_set(task, KnownAnswers(task))


@pytest.fixture(scope="module")
def in_process():
    task = task_of()
    return run_set(task, InProcess(task))


# --- what is counted ---


def test_the_matrices_are_those_of_segmenting_one_scene_after_the_other(in_process):
    segmenter = Segmenter.from_pretrained("embedded", device="cpu")
    expected = ConfusionMatrix.of(len(in_process.task.dataset.labels))
    for number in range(4):
        scene = draw_scene((5, number), size=SIZE)
        expected.add(scene.labels, segmenter(scene.image, in_process.task.dataset.vocabulary).labels)
    assert (in_process.tally.matrices["nerve"].counts == expected.counts).all()
    assert (in_process.tally.matrices["none"].counts != expected.counts).any()
    score = scores(in_process)[0]
    assert score.miou == expected.mean_iou()
    assert score.pixel_accuracy == expected.pixel_accuracy()
    assert score.interval[0] <= score.miou <= score.interval[1]
    assert score.images == 4
    assert score.seconds > 0


def test_two_processes_find_the_same_to_the_byte_and_one_that_is_killed_loses_no_image(in_process, tmp_path):
    task = replace(in_process.task, dataset=SmallScenes(5, 4, deadly=2, deaths=1, notes_in=tmp_path / "deaths"))
    with closing(open_workers(task, 2)) as workers:
        assert isinstance(workers, Processes)
        found = run_set(task, workers, folder=tmp_path / "two")
    assert bytes_of(found) == bytes_of(in_process)
    assert died(tmp_path / "deaths") == 1
    # and one process goes on where two were left
    lines = (tmp_path / "two" / "images.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two" / "images.jsonl").write_text("".join(lines[:2]))
    assert bytes_of(run_set(task, InProcess(task), folder=tmp_path / "two")) == bytes_of(in_process)


@pytest.mark.parametrize("order", [lambda jobs: jobs[::-1], lambda jobs: jobs[3:] + jobs[:3]], ids=["back", "turned"])
def test_the_order_of_images_changes_nothing(known, order, tmp_path):
    task, expected = known
    found = run_set(task, KnownAnswers(task, order), folder=tmp_path / "run")
    assert bytes_of(found) == bytes_of(expected)
    assert found.tally.image_scores("nerve") == expected.tally.image_scores("nerve")


def test_the_time_of_a_finished_run_is_reported_again(known, tmp_path):
    task, _ = known
    run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    seen = []
    again = KnownAnswers(task)
    found = run_set(task, again, folder=tmp_path / "run", watch=lambda done, images: seen.append((done, images)))
    assert again.done == [], "a finished run does nothing"
    assert seen == [(6, 6)]
    assert found.done_before == 6
    assert scores(found)[0].seconds == pytest.approx(6 * 0.25)


# --- kept, and gone on with ---


def test_a_run_that_was_cut_anywhere_goes_on_and_does_the_missing_images_alone(known, tmp_path):
    task, expected = known
    run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    path = tmp_path / "run" / "images.jsonl"
    whole = path.read_bytes()
    ends = [k + 1 for k, byte in enumerate(whole) if byte == 10]
    cuts = {0, 1, *ends, *(end - 1 for end in ends), *(end + 7 for end in ends[:-1]), *range(3, len(whole), 997)}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        workers = KnownAnswers(task)
        found = run_set(task, workers, folder=tmp_path / "run")
        kept = sum(end <= cut for end in ends)
        assert workers.done == [f"{k:06d}" for k in range(kept, 6)], f"cut at byte {cut}"
        assert bytes_of(found) == bytes_of(expected)
        assert path.read_bytes() == whole, "the file is whole again"


def test_a_last_line_of_rubbish_is_cut_off(known, tmp_path):
    task, expected = known
    run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    path = tmp_path / "run" / "images.jsonl"
    whole = path.read_bytes()
    for rubbish in (b"\0" * 4096, b"\xff\xfe\n", b"{}\n", whole[:40] + b"\n"):
        path.write_bytes(whole + rubbish)
        assert bytes_of(run_set(task, KnownAnswers(task), folder=tmp_path / "run")) == bytes_of(expected)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [(b"[0, 0, ", b"[0, 0, 1"), (b'"image": "0', b'"image": "1'), (b"\n", b"")])
def test_a_damaged_line_is_refused_with_its_number(known, tmp_path, damage):
    task, _ = known
    run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    path = tmp_path / "run" / "images.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(*damage, 1)
    path.write_bytes(b"".join(lines))
    with pytest.raises(RunError, match=r"images.jsonl, line 3: damaged"):
        run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    assert path.read_bytes() == b"".join(lines), "nothing of it is lost"


def test_an_image_may_be_there_twice_if_both_times_say_the_same(known, tmp_path):
    task, expected = known
    run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    path = tmp_path / "run" / "images.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[1]]))
    assert bytes_of(run_set(task, KnownAnswers(task), folder=tmp_path / "run")) == bytes_of(expected)
    log = RunLog(tmp_path / "run", describe(task))
    content = [line for _, line in log.read()][1]
    content.pop("sha256", None)
    content["counts"]["nerve"][0][2] += 1
    log.append(content)
    log.close()
    with pytest.raises(RunError, match="line 8: image '000001' was counted before, and differently"):
        run_set(task, KnownAnswers(task), folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"image": "77"}, "KeyError|counts"),
        ({"image": "77", "counts": {"nerve": [], "none": []}, "seconds": {"nerve": 0, "none": 0}}, "'77' is not in"),
        ({"image": "000000", "counts": {"nerve": []}, "seconds": {"nerve": 0}}, "counts of nerve, not of nerve, none"),
        (
            {"image": "000000", "counts": {"nerve": [[99, 0, 1]], "none": []}, "seconds": {"nerve": 0, "none": 0}},
            "99|label",
        ),
        ({"image": "000000", "counts": 3, "seconds": 3}, "line 1"),
    ],
)
def test_a_line_that_is_not_of_this_run_is_refused(known, tmp_path, content, said):
    task, _ = known
    log = RunLog(tmp_path / "run", describe(task))
    log.append(content)
    log.close()
    with pytest.raises(RunError, match=said):
        run_set(task, KnownAnswers(task), folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 2}, "threads is 1 there and 2 now"),
        ({"settings": {"alpha": 0.5}}, r"variants.nerve.alpha is 0.8 there and 0.5 now"),
        ({"variants": ROWS[:1]}, "variants.none is "),
        ({"dataset": SmallScenes(5, 5)}, "set.images is 6 there and 5 now"),
        ({"dataset": SmallScenes(5, 6, values=(0, 2, 1))}, "set.samples"),
        ({"precision": "bf16"}, 'precision is "fp32" there and "bf16" now'),
    ],
)
def test_another_run_in_the_folder_is_refused_and_what_differs_is_named(known, tmp_path, change, said):
    task, _ = known
    run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    other = replace(task, **change)
    with pytest.raises(RunError, match=f"holds another run: .*{said}"):
        run_set(other, KnownAnswers(other), folder=tmp_path / "run")


def test_other_code_or_weights_are_another_run(known, tmp_path, monkeypatch):
    task, _ = known
    run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    monkeypatch.setattr(runner, "_code", lambda: "other")
    with pytest.raises(RunError, match="code is "):
        run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(runner, "digest", lambda path: "0" * 64)
    with pytest.raises(RunError, match=r"model.weights.clip/model.safetensors is "):
        run_set(task, KnownAnswers(task), folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        *((f"cli/{name}.py", False) for name in ("app", "eval", "segment")),
        *((name, False) for name in ("report/page.py", "replay/run.py", "images/visualize.py", "models/verify.py")),
        *((name, False) for name in ("carry/carrier.py", "embedded/filming.py", "embedded/world.py", "output.py")),
        *((f"evaluation/{name}.py", False) for name in ("protocols", "summary", "tune", "runlog", "ray_workers")),
        *((name, True) for name in ("segmenter.py", "walk/fusion.py", "images/encodings.py", "evaluation/variants.py")),
    ],
)
def test_code_that_can_change_no_result_is_no_part_of_the_description(monkeypatch, tmp_path, name, counts):
    core = tmp_path / "nerve_core"
    shutil.copytree(runner._CORE, core, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    monkeypatch.setattr(runner, "_CORE", core)
    before = runner._code()
    with (core / name).open("a") as file:
        file.write("# changed\n")
    assert (runner._code() != before) == counts


def test_a_folder_has_one_writer_and_its_description(known, tmp_path):
    task, _ = known
    log = RunLog(tmp_path / "run", describe(task))
    with pytest.raises(RunError, match="another process is writing"):
        run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    log.close()
    run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json is no JSON"):
        run_set(task, KnownAnswers(task), folder=tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(RunError, match=r"has results and run\.json is missing"):
        run_set(task, KnownAnswers(task), folder=tmp_path / "run")


def test_a_line_is_in_the_file_as_soon_as_it_is_added(known, tmp_path):
    log = RunLog(tmp_path / "run", describe(known[0]))
    log.append({"image": "000000"})
    assert b"000000" in log.path.read_bytes()
    log.close()


def test_what_was_found_before_an_interruption_is_kept(known, tmp_path):
    task, expected = known
    with pytest.raises(KeyboardInterrupt):
        run_set(task, KnownAnswers(task, stop_after=2), folder=tmp_path / "run")
    workers = KnownAnswers(task)
    assert bytes_of(run_set(task, workers, folder=tmp_path / "run")) == bytes_of(expected)
    assert len(workers.done) == 4


def test_a_command_that_is_killed_goes_on(tmp_path):
    command = [sys.executable, "-c", "from nerve_core.cli.app import main; main()", "eval", "scenes", "--seed", "5"]
    command += ["--count", "6", "--refine", "none", "--device", "cpu", "--out", str(tmp_path / "out"), "--json"]
    lines = tmp_path / "out" / "scenes" / "images.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (lines.exists() and lines.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    first = lines.read_bytes().splitlines(keepends=True)[0]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert lines.read_bytes().startswith(first)
    assert (tmp_path / "out" / "report.html").is_file()
    resumed = json.loads(done.stdout.splitlines()[-1])["sets"][0]["scores"][0]
    task = make_task(DrawnScenes(5, 6), [Variant("none", refine="none")], device="cpu")
    (straight,) = scores(run_set(task, InProcess(task)))
    assert (resumed["miou"], tuple(resumed["interval"]), resumed["per_class"]) == (
        straight.miou,
        straight.interval,
        straight.per_class,
    )


# --- what goes wrong ---


def test_an_image_that_kills_its_worker_three_times_ends_the_run_and_is_named(in_process, tmp_path):
    dataset = SmallScenes(5, 4, deadly=3, deaths=99, notes_in=tmp_path / "deaths")
    task = replace(in_process.task, dataset=dataset)
    with (
        closing(Processes(task, 1)) as workers,
        pytest.raises(RuntimeError, match=r"image 000003 .* ended its worker 3 times \(exit code -9\)"),
    ):
        run_set(task, workers, folder=tmp_path / "run")
    assert died(tmp_path / "deaths") == 3
    healed = replace(task, dataset=replace(dataset, deaths=0))
    assert len((tmp_path / "run" / "images.jsonl").read_text().splitlines()) == 3
    assert bytes_of(run_set(healed, InProcess(healed), folder=tmp_path / "run")) == bytes_of(in_process)


def test_an_image_that_cannot_be_read_ends_the_run_or_is_left_out_and_reported(tmp_path):
    task = task_of(unreadable=1)
    with closing(Processes(task, 1)) as workers:
        with pytest.raises(ValueError, match=r"image 000001: image 1 is no image.*--keep-going"):
            run_set(task, workers, folder=tmp_path / "run")
        os.kill(workers._children[0]._process.pid, signal.SIGKILL)  # while it waits for work: it is replaced
        workers._children[0]._process.wait()
        found = run_set(task, workers, folder=tmp_path / "run", keep_going=True)
    assert found.failed == (Failed("000001", "image 1 is no image"),)
    assert scores(found)[0].images == len(found.tally) == 3
    assert found.tally.done.tolist() == [True, False, True, True]
    again = run_set(task_of(), InProcess(task_of()), folder=tmp_path / "run")
    assert (again.done_before, len(again.tally)) == (3, 4), "a file that was mended is done"


def test_an_unreadable_image_is_told_by_this_process_too():
    task = task_of(unreadable=1)
    assert run_set(task, InProcess(task), keep_going=True).failed == (Failed("000001", "image 1 is no image"),)


@pytest.mark.parametrize("kind", [lambda task: InProcess(task), lambda task: Processes(task, 1)], ids=["here", "there"])
def test_a_model_that_cannot_be_loaded_ends_the_run_with_one_sentence(kind):
    task = replace(task_of(), model="nowhere")
    with closing(kind(task)) as workers:
        (failed,) = workers.run([Job(task.dataset.samples[0])])
    assert failed.image_id is None
    assert "model 'nowhere' is neither a known pair" in failed.reason
    assert "\n" not in failed.reason


def test_two_images_of_one_id_are_refused(known):
    task, _ = known

    class Double(SmallScenes):
        @property
        def samples(self):
            return super().samples * 2

    with pytest.raises(ValueError, match="two images of one id"):
        run_set(replace(task, dataset=Double(5, 2)), KnownAnswers(task))


def test_precision_and_device_are_decided_once_and_never_by_a_timing():
    assert (task_of().device, task_of().precision) == ("cpu", "fp32")
    with pytest.raises(ValueError, match="threads is 0"):
        make_task(SmallScenes(5, 1), ROWS, threads=0)
    with pytest.raises(ValueError, match="--workers is 0"):
        open_workers(task_of(), 0)


def test_what_a_set_asks_for_stands_below_what_the_user_sets():
    class Asking(SmallScenes):
        @property
        def settings(self):
            return {"threshold": 0.1, "templates": "photo"}

    task = make_task(Asking(5, 1), ROWS, device="cpu", settings={"threshold": 0.2})
    described = describe(task)["variants"]["nerve"]
    assert (described["threshold"], described["templates"]) == (0.2, "photo")


def test_a_tally_holds_a_large_set():
    tally = Tally([str(k) for k in range(5000)], ["a"], 172)
    assert tally.sums["a"].nbytes < 11e6
    assert not tally.done.any()
    assert np.isnan(tally.matrices["a"].mean_iou())
