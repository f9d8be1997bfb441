"""Everything at once for a short while, by the same code that does it for long (benchmarks/soak.py): what must hold on
any machine holds; and each of its judges finds what it is there to find."""

import pytest

from nerve_benchmarks import soak

pytestmark = pytest.mark.alone
DELAY = 2.0
SILENCE = (100.0, 101.0)


@pytest.fixture(scope="module")
def plan():
    return soak.Plan(
        seconds=15.0,
        id_reuse_delay=DELAY,
        fresh=3,
        vocabulary_every=1.0,
        locate_every=0.4,
        overlay_every=2.0,
        visitor_every=6.0,
        parameter_every=0.5,
        disable_every=4.0,
        deactivate_every=5.0,
    )


@pytest.fixture(scope="module")
def heard(environment, plan, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return soak.soak(int(environment["ROS_DOMAIN_ID"]), plan, tmp_path_factory.mktemp("soak"))


def test_nothing_is_wrong_while_everything_happens_at_once(heard, plan):
    wrong = [f"{check.name}: {check.found}" for check in soak.judge(heard, plan) if not check.holds]
    assert not wrong


def test_everything_did_happen(heard):
    assert len(heard.masks) >= 2
    assert len(heard.infos) >= 2
    assert heard.overlays >= 1
    assert any(answer["success"] for answer in heard.located)
    for what in ("came back after enable", "came back after activate", "parameters set", "parameters refused"):
        assert heard.done[what] >= 1


# The judges.

INFOS = [(10.0, {0: "background", 1: "ball"}), (20.0, {0: "background", 2: "mug"})]


def test_an_id_that_changes_hands_too_early_is_noticed():
    assert not soak.reused_early([*INFOS, (20.0 + DELAY, {1: "cone"})], DELAY)
    assert soak.reused_early([*INFOS, (20.0 + DELAY / 2, {1: "cone"})], DELAY)
    assert not soak.reused_early([*INFOS, (20.1, {1: "BALL"})], DELAY)
    assert soak.reused_early([(10.0, {1: "ball"}), (11.0, {1: "cone"})], DELAY)


def test_a_name_that_loses_its_id_is_noticed():
    assert soak.changed_ids([*INFOS, (10.0 + DELAY / 2, {3: "ball"})], DELAY)
    assert not soak.changed_ids([*INFOS, (30.0, {1: "ball"})], DELAY)


def test_a_mask_whose_ids_nobody_told_is_noticed():
    assert not soak.unexplained_ids([(15.0, 1, {0: 5, 1: 5, 255: 5})], INFOS)
    assert soak.unexplained_ids([(15.0, 1, {2: 5})], INFOS)
    assert soak.unexplained_ids([(5.0, 1, {1: 5})], INFOS)
    assert soak.unexplained_ids([(25.0, 1, {1: 5})], INFOS)


def test_messages_that_contradict_one_another_are_noticed():
    answer = {"success": True, "stamp": 7, "name": "ball", "area": 5}
    good = soak.Heard(masks=[(1.0, 7, {1: 5})], classes={7: {1: ("Ball", 5)}}, located=[answer])
    assert not soak.contradictions(good)
    assert soak.contradictions(soak.Heard(masks=[(1.0, 7, {1: 4})], classes={7: {1: ("ball", 5)}}))
    assert soak.contradictions(soak.Heard(masks=good.masks, classes=good.classes, located=[answer | {"area": 4}]))


def test_a_mask_of_an_image_that_was_not_to_be_segmented_is_noticed(plan):
    def late(sent, stamp):
        figures = (
            100.0,
            0,
            "active",
            dict.fromkeys(("images_received", "errors"), "0") | dict.fromkeys(soak.ENDED, "0"),
        )
        heard = soak.Heard(masks=[(sent, int(stamp * 1e9), {})], silent=[SILENCE], figures=[figures])
        return [check.name for check in soak.judge(heard, plan) if not check.holds]

    assert late(100.9, 100.1) == ["nothing is published while disabled or inactive"]
    assert not late(100.2, 99.9)  # under way when the node was told
    assert not late(101.3, 100.9)  # the newest one, kept until it was told otherwise


def test_growth_is_measured():
    times = list(range(100))
    assert abs(soak.growth(times, [500.0] * 100)["line"]) < 1e-9
    grown = soak.growth(times, [500.0 + time for time in times])
    assert grown["line"] == pytest.approx(0.198, abs=1e-6)
    assert grown["ends"] == pytest.approx(0.18, abs=0.01)
