"""The vocabulary over real DDS: three ways in, one set of rules, and masks that never mix two of them."""

import unicodedata

import pytest

PICTURE = {"width": 120, "height": 90}
OUTPUTS = ("mask", "confidence", "class_confidence")
START = ["ball", "ladder"]


@pytest.fixture(scope="module")
def rig(new_rig):
    rig = new_rig(vocabulary=START, id_reuse_delay=1.0)
    rig.node.wait_active()
    rig.listen("label_info", *OUTPUTS)
    return rig


def by_topic(rig, names):
    rig.talker.do("advertise", topic="vocabulary")
    rig.talker.do("vocabulary", names=names)


def by_text(rig, names):
    rig.talker.do("advertise", topic="vocabulary_text")
    rig.talker.do("vocabulary_text", text=", ".join(names))


def by_parameter(rig, names):
    return rig.talker.do("set_parameter", name="vocabulary", value=names, kind="STRING_ARRAY")


WAYS = {"topic": by_topic, "text": by_text, "parameter": by_parameter}


def told(rig, names, since=0):
    """The LabelInfo with exactly these names, as {name: id}."""
    event = rig.listener.wait(
        "label_info",
        lambda event: sorted(event["classes"].values()) == sorted([*names, "background"]),
        since=since,
        what=f"label_info of {names}\n{rig.node.report()}",
    )
    return {name: int(number) for number, name in event["classes"].items()}


def serving(rig):
    return sorted(rig.listener.seen("label_info")[-1]["classes"].values())


@pytest.fixture(autouse=True)
def start_vocabulary(rig):
    """Every test begins with the same names."""
    rig.listener.wait("label_info")
    assert by_parameter(rig, START)["successful"]
    rig.listener.until(lambda: serving(rig) == ["background", "ball", "ladder"], "the first vocabulary")


@pytest.mark.parametrize("way", WAYS)
def test_a_vocabulary_arrives_by_any_way_and_the_parameter_follows(rig, way):
    since = rig.listener.mark()
    WAYS[way](rig, ["mug|cup", f"thing by {way}"])
    ids = told(rig, ["mug", f"thing by {way}"], since)
    assert rig.talker.do("get_parameter", name="vocabulary")["value"] == ["mug|cup", f"thing by {way}"]
    classes = rig.segment(PICTURE, kinds=OUTPUTS)["class_confidence"]["classes"]
    assert [(seen["name"], seen["id"]) for seen in classes] == [
        (name, ids[name]) for name in ("mug", f"thing by {way}")
    ]


def test_text_may_have_line_breaks_and_blanks(rig):
    since = rig.listener.mark()
    rig.talker.do("advertise", topic="vocabulary_text")
    rig.talker.do("vocabulary_text", text="  red chair \nmug|cup,, ball,\n")
    told(rig, ["red chair", "mug", "ball"], since)


@pytest.mark.parametrize("text", ['["ball", "mug|cup"]', "ball; mug|cup", "- 'ball'\n- 'mug|cup'"])
def test_a_list_in_the_text_is_read_and_half_a_list_is_refused(rig, text):
    rig.talker.do("advertise", topic="vocabulary_text")
    since = rig.listener.mark()
    rig.talker.do("vocabulary_text", text=text)
    told(rig, ["ball", "mug"], since)
    place, since = len(rig.node.lines), rig.listener.mark()
    for wrong in ('["ball", "cone"', "{data: 'cone'}", "cones.txt"):
        rig.talker.do("vocabulary_text", text=wrong)
    rig.node.wait_log("no file is opened here", since=place)
    assert len([line for line in rig.node.lines[place:] if "vocabulary_text is rejected" in line]) == 3
    assert not rig.listener.seen("label_info", since)


@pytest.mark.parametrize("way", WAYS)
def test_the_backgrounds_name_is_label_0_alone(rig, way):
    since, place = rig.listener.mark(), len(rig.node.lines)
    WAYS[way](rig, ["cone", "Background |wall", f"thing by {way}"])
    ids = told(rig, ["cone", f"thing by {way}"], since)
    assert ids["background"] == 0
    assert "'wall' win are 0" in rig.node.wait_log("'Background' is the name of label 0", since=place)
    classes = rig.segment(PICTURE, kinds=OUTPUTS)["class_confidence"]["classes"]
    assert [seen["name"] for seen in classes] == ["cone", f"thing by {way}"]
    answer = rig.talker.do("locate", name=" BACKGROUND")
    assert not answer["success"]
    assert "it is where segmentation/mask is 0" in answer["message"]
    assert rig.talker.do("locate", name="wall")["success"]


def test_set_vocabulary_says_what_became_of_the_backgrounds_name(rig):
    answer = rig.talker.do("set_vocabulary", names=["ball", "background"])
    assert answer["accepted"]
    assert len(answer["ids"]) == 1
    assert "'background' is the name of label 0 and no class of its own" in answer["message"]
    answer = rig.talker.do("set_vocabulary", names=["ball", "wall|background"])
    assert not answer["accepted"]
    assert "cannot be a synonym of 'wall'" in answer["message"]


def test_the_background_is_not_renamed_to_a_name_of_the_vocabulary(rig):
    answer = rig.talker.do("set_parameter", name="background_name", value="Ladder ")
    assert not answer["successful"]
    assert "is a name of the vocabulary, and no two labels may have one name" in answer["reason"]
    assert serving(rig) == ["background", "ball", "ladder"]
    since = rig.listener.mark()
    by_parameter(rig, ["ball", "background"])
    told(rig, ["ball"], since)
    since = rig.listener.mark()
    assert rig.talker.do("set_parameter", name="background_name", value="rest")["successful"]
    event = rig.listener.wait("label_info", lambda event: event["classes"]["0"] == "rest", since=since)
    assert sorted(event["classes"].values()) == ["background", "ball", "rest"]
    answer = rig.talker.do("set_parameter", name="background_name", value="background")
    assert not answer["successful"]
    by_parameter(rig, START)
    assert rig.talker.do("set_parameter", name="background_name", value="background")["successful"]


def test_what_the_model_cannot_make_of_a_name_is_told_by_service_log_and_diagnostics(rig):
    long = "the thing that stands on the left of the long brown table beside the window in the hall, which is "
    rig.listen("diagnostics")
    place, since = len(rig.node.lines), rig.listener.mark()
    # Vocabularies of which there is nothing to say leave the log's room to those that follow.
    for number in range(30):
        assert rig.talker.do("set_vocabulary", names=["ball", "mug"][: 1 + number % 2])["message"] == ""
    message = rig.talker.do("set_vocabulary", names=["ball", f"{long}red", f"{long}blue"])["message"]
    for words in ("are one and the same to the model", "which is blue' is not read", "nerve models pull sd21-clipl14"):
        assert words in message
        assert words in rig.node.wait_log(words, since=place)
    rig.talker.do("advertise", topic="image")
    rig.talker.do("stream", picture=PICTURE, rate=5.0)
    try:
        event = rig.listener.wait("diagnostics", lambda event: "one and the same" in event["message"], since=since)
        assert event["level"] == 1
        assert event["values"]["vocabulary_doubts"] == message
        answer = rig.talker.do("locate", name="cat")
        assert "'embedded' does not know 'cat'" in answer["message"]
        since = rig.listener.mark()
        assert rig.talker.do("set_vocabulary", names=["ball"])["message"] == ""
        event = rig.listener.wait("diagnostics", lambda event: event["message"] == "active", since=since)
        assert event["values"]["vocabulary_doubts"] == ""
    finally:
        rig.talker.do("stop_stream")


def test_a_name_keeps_its_id_through_changes(rig):
    ids = told(rig, START)
    for names in (["mug", "ladder"], ["cone", "BALL", "mug"], ["ladder", "ball", "mug"]):
        since = rig.listener.mark()
        by_topic(rig, names)
        now = told(rig, names, since)
        for name, number in now.items():
            assert ids.setdefault(name.casefold(), number) == number
    assert len(set(ids.values())) == len(ids)


def test_in_mid_stream_every_mask_uses_the_label_info_that_came_before_it(rig):
    since = rig.listener.mark()
    rig.talker.do("advertise", topic="image")
    rig.talker.do("advertise", topic="vocabulary")
    rig.talker.do("stream", picture=PICTURE, rate=30.0)
    sets = [["mug", "ladder"], ["cone"], ["ladder", "cone", "door", "ball"], ["star", "mug"], START]
    try:
        for names in sets:
            place = rig.listener.mark()
            rig.talker.do("vocabulary", names=names)
            told(rig, names, place)
            rig.listener.until(
                lambda place=place, names=names: [
                    event
                    for event in rig.listener.seen("class_confidence", place)
                    if [seen["name"] for seen in event["classes"]] == names
                ],
                f"an image segmented by {names}",
            )
    finally:
        rig.talker.do("stop_stream")
    infos = rig.listener.seen("label_info", since)
    masks = {tuple(event["stamp"]): event for event in rig.listener.seen("mask", since)}
    assert len(infos) == len(sets)
    seen_sets = set()
    for confidence in rig.listener.seen("class_confidence", since):
        before = [info for info in rig.listener.seen("label_info") if info["sent"] <= confidence["sent"]]
        classes = {int(number): name for number, name in before[-1]["classes"].items()}
        entries = {seen["id"]: seen["name"] for seen in confidence["classes"]}
        assert entries.items() <= classes.items(), "an image's classes are not those of the label_info before it"
        assert {0: "background"} | entries == classes, "an image mixes two vocabularies"
        seen_sets.add(tuple(entries.values()))
        mask = masks.get(tuple(confidence["stamp"]))
        if mask is not None:
            assert before[-1]["sent"] <= mask["sent"]
            assert {int(value) for value in mask["counts"]} <= set(classes)
    assert seen_sets >= {tuple(names) for names in sets[:-1]}


def test_label_info_comes_only_on_change(rig):
    by_topic(rig, START)
    by_parameter(rig, list(reversed(START)))
    rig.segment(PICTURE)
    since = rig.listener.mark()
    by_topic(rig, START)
    by_topic(rig, ["ball|sphere", "ladder"])
    by_text(rig, START)
    for _ in range(3):
        rig.segment(PICTURE)
    assert not rig.listener.seen("label_info", since)


def test_a_late_joiner_gets_the_label_info(rig, new_peer):
    late = new_peer("late")
    late.do("subscribe", kind="label_info")
    event = late.wait("label_info")
    assert sorted(event["classes"].values()) == ["background", "ball", "ladder"]


def test_an_empty_vocabulary_leaves_every_pixel_unlabelled(rig):
    for way in WAYS.values():
        since, line = rig.listener.mark(), len(rig.node.lines)
        way(rig, [])
        assert told(rig, [], since) == {"background": 0}
        events = rig.segment(PICTURE, kinds=OUTPUTS)
        pixels = PICTURE["width"] * PICTURE["height"]
        assert events["mask"]["counts"] == {"255": pixels}
        assert events["confidence"]["counts"] == {"0": pixels}
        assert events["class_confidence"]["classes"] == []
        rig.segment(PICTURE)
        assert len([text for text in rig.node.lines[line:] if "vocabulary is empty" in text]) == 1
        since = rig.listener.mark()
        by_parameter(rig, START)
        told(rig, START, since)


def test_254_names_are_served_and_255_are_refused_with_the_limit(rig):
    # The names that serve keep their ids; those of names out of use are free at once.
    assert rig.talker.do("set_parameter", name="id_reuse_delay", value=0.0)["successful"]
    names = [*START, *(f"thing {number}" for number in range(252))]
    since = rig.listener.mark()
    by_topic(rig, names)
    ids = told(rig, names, since)
    assert sorted(ids.values()) == list(range(255))
    events = rig.segment(PICTURE, kinds=OUTPUTS)
    assert len(events["class_confidence"]["classes"]) == 254
    assert_refused(rig, [*names, "one more"], "254")


def assert_refused(rig, names, reason):
    before = serving(rig)
    since = rig.listener.mark()
    parameter = rig.talker.do("get_parameter", name="vocabulary")["value"]
    answer = by_parameter(rig, names)
    assert not answer["successful"]
    assert reason in answer["reason"]
    place = len(rig.node.lines)
    by_topic(rig, names)
    line = rig.node.wait_log("vocabulary by topic vocabulary is rejected", since=place)
    assert reason in line
    rig.segment(PICTURE)
    assert not rig.listener.seen("label_info", since)
    assert serving(rig) == before
    assert rig.talker.do("get_parameter", name="vocabulary")["value"] == parameter


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 129, "128"),
        ("line\nbreak", "control"),
        ("bell\x07", "control"),
        ("", "empty"),
        ("   ", "empty"),
        ("mug||cup", "empty"),
    ],
)
def test_a_name_that_cannot_be_used_refuses_the_whole_set(rig, name, reason):
    assert_refused(rig, ["mug", name], reason)


def test_an_empty_name_is_no_way_to_say_that_there_are_none(rig):
    """Only a parameter needs [""] for that."""
    since, place = rig.listener.mark(), len(rig.node.lines)
    by_topic(rig, [""])
    assert "empty" in rig.node.wait_log("vocabulary by topic vocabulary is rejected", since=place)
    rig.segment(PICTURE)
    assert not rig.listener.seen("label_info", since)


def test_a_set_without_free_ids_is_refused_until_the_ids_have_rested(rig):
    old = [f"old {number}" for number in range(250)]
    since = rig.listener.mark()
    assert by_parameter(rig, old)["successful"]
    told(rig, old, since)
    assert rig.talker.do("set_parameter", name="id_reuse_delay", value=3600.0)["successful"]
    new = [f"new {number}" for number in range(250)]
    assert_refused(rig, new, "id_reuse_delay")
    assert rig.talker.do("set_parameter", name="id_reuse_delay", value=0.0)["successful"]
    # Only ids of names out of use can be had, and 250 are in use.
    assert_refused(rig, new, "names in use")
    since = rig.listener.mark()
    assert by_parameter(rig, START)["successful"]
    told(rig, START, since)
    assert by_parameter(rig, new)["successful"]
    told(rig, new, since)


def test_duplicates_are_left_out_with_a_warning(rig):
    since, place = rig.listener.mark(), len(rig.node.lines)
    by_topic(rig, ["Mug", "mug ", "MUG", "caf\u00e9", "cafe\u0301", "cone"])
    told(rig, ["Mug", "caf\u00e9", "cone"], since)
    assert "more than once" in rig.node.wait_log("more than once", since=place)


def test_any_unicode_arrives_verbatim(rig):
    names = ["стул", "椅子", "كرسي", "🪑 chair", "naïve café", "%s%n{0}", "a/b\\c", "<b>"]
    for way in WAYS.values():
        since = rig.listener.mark()
        way(rig, names)
        told(rig, [unicodedata.normalize("NFC", name) for name in names], since)
        assert by_parameter(rig, START)["successful"]
        told(rig, START, since)


def test_the_background_has_the_name_that_was_asked_for(rig):
    since = rig.listener.mark()
    assert rig.talker.do("set_parameter", name="background_name", value="rest")["successful"]
    event = rig.listener.wait("label_info", lambda event: event["classes"]["0"] == "rest", since=since)
    assert sorted(event["classes"].values()) == ["ball", "ladder", "rest"]
    assert rig.talker.do("set_parameter", name="background_name", value="background")["successful"]
    rig.listener.wait("label_info", lambda event: event["classes"]["0"] == "background", since=since)


def test_negatives_can_be_changed_and_are_never_classes(rig):
    since = rig.listener.mark()
    for negatives in (["wall", "floor"], [""], ["default"]):
        answer = rig.talker.do("set_parameter", name="negatives", value=negatives)
        assert answer["successful"], answer["reason"]
        rig.segment(PICTURE)
    assert not rig.listener.seen("label_info", since)
