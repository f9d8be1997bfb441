"""What the node counts and times."""

import pytest
from diagnostic_msgs.msg import DiagnosticStatus

from nerve_ros.health import Health


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def health(clock):
    return Health(clock)


def segment(health, clock, *, age=0.1, stamp=None, latency=0.05, **stages):
    clock.now += 0.5
    health.segmented(
        stamp=1000.0 + clock.now - age if stamp is None else stamp,
        now=1000.0 + clock.now,
        latency=latency,
        stages_ms=stages,
    )


def test_figures_count_images_and_vocabularies(health, clock):
    for _ in range(4):
        health.arrived()
    health.dropped()
    health.rejected("step", "step is 3")
    segment(health, clock)
    health.vocabulary(accepted=True)
    health.vocabulary(accepted=False)
    figures = health.figures()
    assert [figures[f"images_{what}"] for what in ("received", "segmented", "dropped", "rejected")] == list("4111")
    assert figures["rejected_for_step"] == "1"
    assert (figures["vocabularies_accepted"], figures["vocabularies_rejected"]) == ("1", "1")
    assert figures["last_error"] == "step is 3"


def test_percentiles_are_of_the_last_images(health, clock):
    for number in range(1, 201):
        segment(health, clock, latency=number / 1e3, walk=float(number))
    figures = health.figures()
    assert float(figures["latency_p50_ms"]) == pytest.approx(150.5, abs=0.1)
    assert float(figures["latency_p95_ms"]) == pytest.approx(195.05, abs=0.1)
    assert figures["stage_walk_p50_ms"] == figures["latency_p50_ms"]
    assert float(figures["fps"]) == pytest.approx(2.0)


def test_figures_nothing_is_known_of_are_empty(health):
    figures = health.figures()
    assert figures["age_p50_ms"] == figures["latency_p95_ms"] == ""
    assert figures["fps"] == "0.00"


@pytest.mark.parametrize("age", [1e9, -5.0])
def test_ages_by_another_clock_are_left_out(health, clock, age):
    segment(health, clock, age=age)
    assert health.figures()["age_p50_ms"] == ""
    segment(health, clock, stamp=1000.0 + clock.now + 0.5 - 0.2)
    assert float(health.figures()["age_p50_ms"]) == pytest.approx(200.0)


def test_a_stamp_that_jumps_back_starts_age_and_rate_anew(health, clock):
    for _ in range(5):
        segment(health, clock, age=0.1)
    segment(health, clock, age=50.0)
    figures = health.figures()
    assert float(figures["age_p95_ms"]) == pytest.approx(50_000.0)
    assert float(figures["age_p50_ms"]) == pytest.approx(50_000.0)
    assert figures["fps"] == "0.20"
    assert figures["images_segmented"] == "6"


def test_trouble_is_told_for_a_while(health, clock):
    assert health.trouble() is None
    health.rejected("size", "0 x 0")
    assert health.trouble() == (DiagnosticStatus.WARN, "0 x 0")
    health.failed("boom")
    assert health.trouble() == (DiagnosticStatus.ERROR, "boom")
    clock.now += 6.0
    assert health.trouble() is None


def test_silence_counts_from_the_last_image(health, clock):
    assert health.seconds_without_image() is None
    health.arrived()
    clock.now += 3.0
    assert health.seconds_without_image() == 3.0


def test_reset_forgets_everything(health, clock):
    health.arrived()
    segment(health, clock, walk=3.0)
    health.failed("boom")
    health.reset()
    assert health.trouble() is None
    assert health.seconds_without_image() is None
    assert health.figures()["images_segmented"] == "0"
    assert "stage_walk_p50_ms" not in health.figures()
