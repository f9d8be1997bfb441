"""The contract with whoever consumes the masks, from where they stand: a costmap layer's stand-in lives on the topics.

The node as it is gives it no reason to complain, whatever happens; each promise broken on purpose is noticed.
"""

import itertools
import json

import pytest

import broken_node
import harness
import pictures

KEEP = 2.0
"""Seconds that the consumer remembers a place, a little less than id_reuse_delay."""
START = ["ball", "ladder", "chair"]
SETS = (["ladder", "mug"], ["cone", "ball", "chair"], [], START)
"""Names that come, go and come back; ids freed by the first are there for the second; and nothing at all."""


class Consumer(harness.Peer):
    """A process of consumer.py."""

    def __init__(self, env):
        self.events, self._replies, self._commands = [], {}, 0
        command = [str(harness.HERE / "consumer.py"), str(KEEP)]
        harness.Process.__init__(self, command, env, steered=True, forked=True)
        self.wait("ready")

    def breaches(self, since=0):
        """{rule: what the consumer says}"""
        return {event["rule"]: event["text"] for event in self.seen("breach", since)}


class BrokenNode(harness.Node):
    """A process of broken_node.py: the node, whose promises can be broken."""

    def __init__(self, env, **parameters):
        given = [text for name, value in parameters.items() for text in ("-p", f"{name}:={json.dumps(value)}")]
        command = [str(harness.HERE / "broken_node.py"), "--ros-args", *given]
        harness.Process.__init__(self, command, env, steered=True, forked=True)

    def choose(self, mutation):
        line = len(self.lines)
        self._child.stdin.write(f"{mutation}\n")
        self._child.stdin.flush()
        self.wait_log(f"^mutation: {mutation}$", since=line)


NUMBERS = itertools.count()


def show(rig, consumer, done, what, frames_at_once=1, attempts=60):
    """Publish frames, each a new one, until `done`; whether it came to that within so many attempts of 2 s at most."""
    rig.talker.do("advertise", topic="image")
    for _ in range(attempts):
        if done():
            return True
        since = consumer.mark()
        for _ in range(frames_at_once):
            rig.talker.do("image", **pictures.numbered(next(NUMBERS)))
        try:
            consumer.until(lambda since=since: consumer.seen("frame", since) or done(), what, timeout=2.0)
        except AssertionError:
            if not consumer.running or not rig.node.running:
                raise
    return done()


def show_frames(rig, consumer, count, frames_at_once=1):
    """Publish frames until the consumer has used `count` of them."""
    since = consumer.mark()
    shown = show(rig, consumer, lambda: len(consumer.seen("frame", since)) >= count, "frames", frames_at_once)
    assert shown, f"no {count} frames\n{consumer.report()}\n{rig.node.report()}"


def set_names(rig, names):
    answer = rig.talker.do("set_parameter", name="vocabulary", value=names, kind="STRING_ARRAY")
    assert answer["successful"], answer["reason"]


def settled(rig, names):
    """Wait until the node says that these names serve."""
    rig.listener.until(
        lambda: sorted(rig.listener.seen("label_info")[-1]["classes"].values()) == sorted([*names, "background"]),
        f"label_info of {names}\n{rig.node.report()}",
    )


@pytest.fixture(scope="module")
def rig(new_rig):
    rig = new_rig(vocabulary=START, id_reuse_delay=2.5)
    rig.node.wait_active()
    rig.listen("label_info")
    rig.listener.wait("label_info")
    return rig


@pytest.fixture(scope="module")
def consumer(rig):
    return rig.keep(Consumer(rig.env))


# The node as it is. These come first: the tests of mutations go on with another process of it.


def test_nothing_is_wrong_while_vocabularies_change(rig, consumer):
    for names in SETS * 2:
        set_names(rig, names)
        settled(rig, names)
        show_frames(rig, consumer, 2)
    assert not consumer.breaches()


def test_nothing_is_wrong_while_vocabularies_change_in_mid_stream(rig, consumer):
    for names in SETS:
        set_names(rig, names)
        show_frames(rig, consumer, 2, frames_at_once=4)
    settled(rig, START)
    assert not consumer.breaches()


def test_nothing_is_wrong_when_ids_are_used_again(rig, consumer):
    """254 ids for 360 names in turn: those of the first must rest before the third can have them."""
    sets = [[f"{letter} {number}" for number in range(120)] for letter in "abc"]
    for names in (*sets, sets[0], START):
        rig.talker.do("advertise", topic="vocabulary")

        def asked(names=names):
            return rig.talker.do("set_parameter", name="vocabulary", value=names, kind="STRING_ARRAY")["successful"]

        assert show(rig, consumer, asked, "frame"), f"{names[0]} ... is never accepted\n{rig.node.report()}"
        settled(rig, names)
        show_frames(rig, consumer, 1)
    assert not consumer.breaches()


def test_nothing_is_wrong_for_a_consumer_that_comes_late(rig, consumer):
    consumer.do("rejoin")
    show_frames(rig, consumer, 2)
    late = rig.keep(Consumer(rig.env))
    show_frames(rig, late, 2)
    assert not consumer.breaches()
    assert not late.breaches()
    late.end()


def test_nothing_is_wrong_when_frames_are_dropped(rig, consumer):
    since, before = consumer.mark(), next(NUMBERS)
    for _ in range(5):
        show_frames(rig, consumer, 2, frames_at_once=10)
    assert len(consumer.seen("frame", since)) < next(NUMBERS) - before - 1
    assert not consumer.breaches()


def test_nothing_is_wrong_when_the_node_is_deactivated_and_cleaned_up_meanwhile(rig, consumer):
    for label in ("deactivate", "activate", "deactivate", "cleanup", "configure", "activate"):
        if label == "configure":
            # The publishers are new ones, and so is what they promised to whom.
            consumer.do("restarted")
        assert rig.talker.do("transition", label=label)["success"]
        if label == "activate":
            show_frames(rig, consumer, 2)
    assert not consumer.breaches()


def test_nothing_is_wrong_when_the_node_is_started_again(rig, consumer):
    rig.node.end()
    consumer.do("restarted")
    rig.node = rig.keep(BrokenNode(rig.env, vocabulary=START, id_reuse_delay=2.5))
    rig.node.wait_active()
    show_frames(rig, consumer, 2)
    for names in SETS:
        set_names(rig, names)
        settled(rig, names)
        show_frames(rig, consumer, 1)
    assert not consumer.breaches()


# Each promise broken.

NOTICED = {
    "stamp_moved": "mask stamp",
    "stamp_of_confidence_moved": "confidence stamp",
    "frame_renamed": "mask frame_id",
    "size_halved": "mask size",
    "confidence_halved": "confidence size",
    "rows_padded": "mask step",
    "encoding_renamed": "mask encoding",
    "confidence_cut_short": "confidence length",
    "unlabelled_confident": "unlabelled confidence",
    "unlabelled_in_map": "255 in map",
    "background_left_out": "background",
    "ids_of_two_bytes": "id range",
    "stray_id": "label_info first",
    "area_wrong": "area",
    "box_wrong": "box",
    "centroid_wrong": "centroid",
    "mask_before_label_info": "label_info first",
    "label_info_repeated": "label_info on change",
    "old_classes": "one vocabulary",
    "ids_by_place": "name keeps id",
    "freed_ids_at_once": "freed id",
    "unreliable_masks_and_volatile_labels": "label_info durability",
    "old_labels_kept": "label_info depth",
}


def test_every_mutation_has_its_test():
    assert set(NOTICED) == set(broken_node.MUTATIONS) - {"none"}


@pytest.fixture
def broken(rig, consumer):
    """Break the node in one way, for one test; afterwards node and consumer begin anew."""
    yield rig.node.choose
    rig.node.choose("none")
    set_names(rig, START)
    settled(rig, START)
    consumer.do("rejoin")
    show_frames(rig, consumer, 1)


@pytest.mark.parametrize("mutation", [name for name in NOTICED if name not in broken_node.QOS])
def test_a_broken_promise_is_noticed(rig, consumer, broken, mutation):
    since, sets = consumer.mark(), itertools.cycle(SETS)
    broken(mutation)

    def noticed():
        return NOTICED[mutation] in consumer.breaches(since)

    for _ in range(6 * len(SETS)):
        set_names(rig, next(sets))
        if show(rig, consumer, noticed, "frame", attempts=2):
            return
    raise AssertionError(f"{NOTICED[mutation]!r} not among {consumer.breaches(since)}\n{consumer.report()}")


def reconfigure(rig):
    for label in ("deactivate", "cleanup", "configure", "activate"):
        assert rig.talker.do("transition", label=label)["success"]


def test_publishers_that_do_not_offer_what_they_should_are_noticed(rig, consumer):
    since = consumer.mark()
    rig.node.choose("unreliable_masks_and_volatile_labels")
    reconfigure(rig)
    for rule in (
        "mask reliability",
        "confidence durability",
        "class_confidence reliability",
        "label_info durability",
    ):
        consumer.wait("breach", lambda event, rule=rule: event["rule"] == rule, since=since)


def test_labels_that_are_kept_for_too_long_are_noticed(rig, consumer):
    rig.node.choose("old_labels_kept")
    reconfigure(rig)
    for names in SETS:
        since = rig.listener.mark()
        set_names(rig, names)
        rig.listener.wait(
            "label_info",
            lambda event, names=names: sorted(event["classes"].values()) == sorted([*names, "background"]),
            since=since,
        )
    since = consumer.mark()
    consumer.do("rejoin")
    consumer.wait("breach", lambda event: event["rule"] == "label_info depth", since=since)
