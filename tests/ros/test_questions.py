"""Services over real DDS: where something is, what to look for, whether to look at all; and the dense maps."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

PICTURE = {"width": 160, "height": 120}
NAMES = ["ball", "mug|cup", "chair"]
OUTPUTS = ("mask", "confidence", "class_confidence")
SIZE = PICTURE["width"] * PICTURE["height"]


@pytest.fixture(scope="module")
def rig(new_rig):
    rig = new_rig(vocabulary=NAMES, use_depth=True, id_reuse_delay=0.0)
    rig.listen(*OUTPUTS, "label_info", "diagnostics")
    rig.node.wait_active()
    rig.listener.wait("label_info", timeout=180.0)
    return rig


def locate(rig, name, **named):
    return rig.talker.do("locate", name=name, **named)


def labels(rig):
    """What the last LabelInfo says: id by name."""
    return {name: int(number) for number, name in rig.listener.seen("label_info")[-1]["classes"].items()}


# locate


def test_a_name_of_the_vocabulary_is_where_the_published_mask_has_it(rig):
    events = rig.segment(PICTURE, kinds=OUTPUTS, frame_id="front camera")
    for entry in events["class_confidence"]["classes"]:
        answer = locate(rig, entry["name"].upper())
        assert answer["success"]
        assert answer["found"] == (entry["area"] > 0)
        assert (answer["stamp"], answer["frame_id"]) == (events["mask"]["stamp"], "front camera")
        assert (
            answer["mask"]["counts"].get("255", 0) == events["mask"]["counts"].get(str(entry["id"]), 0) == entry["area"]
        )
        assert answer["mask"]["counts"].keys() <= {"0", "255"}
        assert (answer["mask"]["width"], answer["mask"]["height"]) == (PICTURE["width"], PICTURE["height"])
        assert (answer["mask"]["step"], answer["mask"]["encoding"]) == (PICTURE["width"], "mono8")
        assert answer["confidence"] == pytest.approx(entry["presence"], abs=1e-6)
        assert answer["box"] == entry["box"]
        assert [repr(value) for value in answer["centroid"]] == entry["centroid"]
    assert any(entry["area"] for entry in events["class_confidence"]["classes"])


def test_a_synonym_stands_for_its_class(rig):
    rig.segment(PICTURE)
    one, other = locate(rig, "cup"), locate(rig, "mug")
    assert one["mask"] == other["mask"]
    assert one["confidence"] == other["confidence"]


def test_any_other_name_is_searched_on_the_same_image_and_nothing_published_changes(rig):
    before = rig.segment(PICTURE, kinds=OUTPUTS)
    since = rig.listener.mark()
    answer = locate(rig, "umbrella|parasol")
    assert answer["success"]
    assert answer["stamp"] == before["mask"]["stamp"]
    assert sum(answer["mask"]["counts"].values()) == SIZE
    assert 0.0 <= answer["confidence"] <= 1.0
    if answer["found"]:
        left, top, width, height = answer["box"]
        assert left <= answer["centroid"][0] <= left + width - 1
        assert top <= answer["centroid"][1] <= top + height - 1
    else:
        assert "not found" in answer["message"]
    after = rig.segment(PICTURE, kinds=OUTPUTS)
    assert not rig.listener.seen("label_info", since)
    for kind in ("mask", "confidence"):
        assert after[kind]["digest"] == before[kind]["digest"]
    assert after["class_confidence"]["classes"] == before["class_confidence"]["classes"]


def test_without_depth_or_camera_info_the_answer_says_that_it_has_no_point(rig):
    events = rig.segment(PICTURE, kinds=OUTPUTS)
    name = max(events["class_confidence"]["classes"], key=lambda entry: entry["area"])["name"]
    answer = locate(rig, name)
    assert answer["found"]
    assert not answer["has_point"]
    assert "no point: " in answer["message"]
    assert all(math.isnan(value) for value in answer["point"] + answer["spread"])


def test_with_depth_and_camera_info_it_is_a_point_in_metres(rig):
    events = rig.segment(PICTURE, kinds=OUTPUTS)
    entry = max(events["class_confidence"]["classes"], key=lambda entry: entry["area"])
    for topic in ("depth", "camera_info"):
        rig.talker.do("advertise", topic=topic)
    size = {"width": PICTURE["width"], "height": PICTURE["height"], "stamp": events["mask"]["stamp"]}
    answer = {"has_point": False}
    for _ in range(20):  # best effort: one may be lost, or come after the question
        rig.talker.do("camera_info", focal=100.0, **size)
        rig.talker.do("depth", metres=2.0, **size)
        answer = locate(rig, entry["name"])
        if answer["has_point"]:
            break
    x, y, z = answer["point"]
    left, top, width, height = entry["box"]
    centre = ((PICTURE["width"] - 1) / 2, (PICTURE["height"] - 1) / 2)
    assert answer["message"] == ""
    assert z == pytest.approx(2.0)
    assert 2.0 * (left - centre[0]) / 100 <= x <= 2.0 * (left + width - centre[0]) / 100
    assert 2.0 * (top - centre[1]) / 100 <= y <= 2.0 * (top + height - centre[1]) / 100
    assert answer["spread"][2] == pytest.approx(0.0, abs=1e-6)
    assert answer["spread"][0] > 0.0


@pytest.mark.parametrize(
    ("name", "reason"), [("", "empty name"), ("a\tb\x1b[31m", "control characters"), ("x" * 129, "129 characters")]
)
def test_a_name_that_cannot_be_used_is_answered_with_the_reason(rig, name, reason):
    answer = locate(rig, name)
    assert not answer["success"]
    assert reason in answer["message"]


def test_more_questions_than_may_wait_are_all_answered(rig):
    rig.segment(PICTURE)
    answers = rig.talker.do("locate_all", names=["ball"] * 10)["answers"]  # what a client's queue holds
    assert all(answer is not None for answer in answers)
    refused = [answer for answer in answers if not answer["success"]]
    assert all("questions wait already" in answer["message"] for answer in refused)
    assert len(answers) - len(refused) >= 8


def test_while_disabled_nothing_is_published_and_questions_are_answered(rig):
    rig.segment(PICTURE)
    assert rig.talker.do("enable", on=False) == {"success": True, "message": ""}
    try:
        assert rig.talker.do("get_parameter", name="enabled")["value"] is False
        # A silent camera would be told of first.
        rig.talker.do("stream", picture=PICTURE, rate=5.0)
        try:
            rig.listener.wait("diagnostics", lambda event: event["message"].startswith("disabled: "))
        finally:
            rig.talker.do("stop_stream")
        since = rig.listener.mark()
        answer = {"stamp": None}
        for attempt in range(20):  # best effort: one may be lost, or come after the question
            stamp = [1_800_000_000 + attempt, 5]
            rig.talker.do("image", picture=PICTURE, stamp=stamp)
            answer = locate(rig, "ball")
            if answer["stamp"] == stamp:
                break
        assert answer["success"]
        assert answer["stamp"] == stamp
        assert locate(rig, "umbrella")["success"]
    finally:
        assert rig.talker.do("set_parameter", name="enabled", value=True)["successful"]
    stamp_after = rig.segment(PICTURE)["mask"]["stamp"]
    # The one that waited is published now; none of those before it was.
    stamps = {tuple(event["stamp"]) for event in rig.listener.seen("mask", since)}
    assert stamps <= {tuple(stamp), tuple(stamp_after)}


def test_an_empty_vocabulary_hinders_no_question(rig):
    try:
        assert rig.talker.do("set_vocabulary", names=[])["accepted"]
        rig.listener.until(lambda: labels(rig) == {"background": 0}, "the empty vocabulary")
        mask = rig.segment(PICTURE)["mask"]
        assert mask["counts"] == {"255": SIZE}
        answer = locate(rig, "ball")
        assert answer["success"]
        assert answer["stamp"] == mask["stamp"]
        assert sum(answer["mask"]["counts"].values()) == SIZE
    finally:
        rig.talker.do("set_vocabulary", names=NAMES)
        rig.listener.until(lambda: "chair" in labels(rig), "the vocabulary of before")


def test_a_question_that_no_image_comes_for_is_answered_in_time(rig):
    assert rig.talker.do("transition", label="deactivate")["success"]
    answer = locate(rig, "ball")
    assert not answer["success"]
    assert "inactive" in answer["message"]
    assert rig.talker.do("set_parameter", name="inference_timeout", value=1.0)["successful"]
    assert rig.talker.do("transition", label="activate")["success"]
    try:
        answer = locate(rig, "ball")
        assert not answer["success"]
        assert "not searched within 1 s: no image came on /image" in answer["message"]
    finally:
        assert rig.talker.do("set_parameter", name="inference_timeout", value=30.0)["successful"]
    assert rig.segment(PICTURE)
    assert locate(rig, "ball")["success"]


def test_a_question_is_answered_when_the_node_is_deactivated_meanwhile(rig, new_peer):
    for label in ("deactivate", "activate"):
        assert rig.talker.do("transition", label=label)["success"]
    other = new_peer("other")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(other.do, "locate", name="ball")
        rig.listener.wait("diagnostics", lambda event: event["values"]["questions"] == "1", since=rig.listener.mark())
        assert rig.talker.do("transition", label="deactivate")["success"]
        answer = asked.result()
    assert not answer["success"]
    assert "deactivated" in answer["message"]
    assert rig.talker.do("transition", label="activate")["success"]


def test_questions_are_counted_and_timed(rig):
    rig.segment(PICTURE)
    locate(rig, "ball")
    values = rig.listener.wait(
        "diagnostics", lambda event: event["values"].get("locate_p50_ms"), since=rig.listener.mark()
    )["values"]
    assert int(values["locates"]) >= 1
    assert float(values["locate_p95_ms"]) > 0.0
    assert float(values["memory_mb"]) > 100.0
    assert values["device_memory_mb"] == ""
    assert values["enabled"] == "true"
    assert values["depth"] == "/depth"


# set_vocabulary


def test_set_vocabulary_answers_with_the_ids_that_label_info_has(rig):
    answer = rig.talker.do("set_vocabulary", names=["chair", "lamp|light", "Lamp", "ball"])
    assert answer["accepted"]
    assert "'Lamp'" in answer["message"]
    rig.listener.until(lambda: "lamp" in labels(rig), "the new vocabulary")
    told = labels(rig)
    assert answer["ids"] == [told["chair"], told["lamp"], told["ball"]]
    rig.talker.do("set_vocabulary", names=NAMES)
    rig.listener.until(lambda: "lamp" not in labels(rig), "the vocabulary of before")


def test_set_vocabulary_says_what_is_wrong_and_the_set_before_stays(rig):
    since = rig.listener.mark()
    answer = rig.talker.do("set_vocabulary", names=[f"name {number}" for number in range(255)])
    assert (answer["accepted"], answer["ids"]) == (False, [])
    assert "255 names are too many: at most 254" in answer["message"]
    rig.segment(PICTURE)
    assert not rig.listener.seen("label_info", since)


# Dense maps


def test_the_map_of_a_class_is_published_where_it_is_asked_for_and_only_while_somebody_listens(rig):
    assert rig.talker.do("set_parameter", name="confidence_classes", value=["MUG", "ball", "not there"])["successful"]
    told = labels(rig)
    slugs = {name: f"{name}_{told[name]}" for name in ("mug", "ball")}
    rig.segment(PICTURE)
    for name, slug in slugs.items():
        rig.listener.do("subscribe", kind=name, topic=f"segmentation/confidence/{slug}")
    rig.listener.do("subscribe", kind="dense")
    events = rig.segment(PICTURE, kinds=("mask", "dense", "mug", "ball"))
    dense = events["dense"]
    assert dense["names"] == ["ball", "mug", "chair"]
    assert dense["ids"] == [told[name] for name in dense["names"]]
    assert (dense["height"], dense["width"]) == (PICTURE["height"], PICTURE["width"])
    assert dense["length"] == 3 * SIZE
    for name in slugs:
        one = events[name]
        assert one["digest"] == dense["maps"][dense["names"].index(name)]["digest"]
        assert (one["encoding"], one["step"], one["width"]) == ("mono8", PICTURE["width"], PICTURE["width"])
    assert len({one["digest"] for one in dense["maps"]}) == 3
    for kind in ("dense", *slugs):
        rig.listener.do("unsubscribe", kind=kind)
    assert rig.talker.do("set_parameter", name="confidence_classes", value=["chair"])["successful"]
    rig.segment(PICTURE)
    topics = rig.listener.do("graph", node="nerve")["publishers"]
    assert {topic for topic in topics if topic.startswith("/segmentation/confidence/")} == {
        f"/segmentation/confidence/chair_{told['chair']}"
    }
    assert rig.talker.do("set_parameter", name="confidence_classes", value=[""])["successful"]


def test_more_than_sixteen_confidence_classes_are_refused(rig):
    answer = rig.talker.do("set_parameter", name="confidence_classes", value=[f"n{number}" for number in range(17)])
    assert not answer["successful"]
    assert "at most 16" in answer["reason"]
    assert "~/dense" in answer["reason"]
