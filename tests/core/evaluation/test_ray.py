"""Two workers on a real Ray on this machine, of which one is killed; and what is said where there is no Ray."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec

import pytest

from nerve_core.evaluation.runner import make_task, open_workers, run_set
from nerve_core.evaluation.variants import Variant
from nerve_core.evaluation.workers import InProcess, Job
from small_sets import SmallScenes, died

# Not imported here: what is said to Ray by its environment has to be said before.
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture
def task():
    return make_task(SmallScenes(5, 4), [Variant("none", refine="none")], device="cpu")


@needs_ray
def test_two_ray_workers_find_what_one_process_finds_though_one_is_killed(task, tmp_path):
    expected = run_set(task, InProcess(task)).tally
    mortal = replace(task, dataset=SmallScenes(5, 4, deadly=1, deaths=1, notes_in=tmp_path / "deaths"))
    with closing(open_workers(mortal, 2, "local")) as workers:
        assert not workers.started, "Ray starts when there is work"
        found = run_set(mortal, workers, folder=tmp_path / "run").tally
        assert found.matrices["none"].counts.tobytes() == expected.matrices["none"].counts.tobytes()
        assert found.sums["none"].tobytes() == expected.sums["none"].tobytes()
        assert died(tmp_path / "deaths") == 1
        assert workers._ray.util.get_node_ip_address() == "127.0.0.1"
        # masks for pictures come back too
        (picture,) = workers.run([Job(mortal.dataset.samples[0], ("none",))])
        assert picture.masks["none"].shape == picture.truth.shape == picture.image.shape[:2]
    with closing(open_workers(task, 2, "local")) as workers:
        assert run_set(mortal, workers, folder=tmp_path / "run").done_before == 4
        assert not workers.started, "a finished run needs no cluster"


@needs_ray
def test_an_image_that_kills_every_ray_worker_ends_the_run(task, tmp_path):
    mortal = replace(task, dataset=SmallScenes(5, 2, deadly=1, deaths=99, notes_in=tmp_path / "deaths"))
    with (
        closing(open_workers(mortal, 1, "local")) as workers,
        pytest.raises(RuntimeError, match=r"image 000001 .* ended its worker 3 times"),
    ):
        run_set(mortal, workers, folder=tmp_path / "run")
    assert died(tmp_path / "deaths") == 3


def test_without_ray_it_is_said_how_to_get_it(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=r'--ray needs Ray .*pip install "nerve_ros\[ray\]"'):
        open_workers(task, 2, "local")


@needs_ray
def test_a_cluster_that_is_out_of_reach_is_said(task):
    with (
        closing(open_workers(task, 2, "127.0.0.1:1")) as workers,
        pytest.raises(RuntimeError, match=r"Ray at '127\.0\.0\.1:1' cannot be used: .*auto, local or HOST:PORT"),
    ):
        next(iter(workers.run([Job(task.dataset.samples[0])])))


@needs_ray
def test_nobody_is_told_that_ray_is_used(task, monkeypatch):
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    open_workers(task, 1, "local").close()
    from ray._common.usage.usage_lib import usage_stats_enabled

    assert not usage_stats_enabled()
