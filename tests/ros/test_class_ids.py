"""Which class id a name has: stable while the node lives, never another's too early."""

import numpy as np
import pytest
from builtin_interfaces.msg import Time

from nerve_ros.labels import LabelRegistry, LabelsExhausted, label_info_message


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Registry(LabelRegistry):
    """With the usual delay."""

    def assign(self, names, reuse_delay=60.0):
        return super().assign(names, reuse_delay)

    def check(self, names, reuse_delay=60.0):
        super().check(names, reuse_delay)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def registry(clock):
    return Registry(clock)


def many(prefix, count):
    return [f"{prefix} {number}" for number in range(count)]


def test_ids_start_at_one_in_the_order_of_the_names(registry):
    assert registry.assign(["ball", "ladder", "mug"]).ids == (1, 2, 3)


def test_a_name_keeps_its_id_across_changes_of_the_vocabulary(registry):
    first = registry.assign(["ball", "ladder"])
    second = registry.assign(["ladder", "mug"])
    registry.release(first, shown=True)
    third = registry.assign(["mug", "ball"])
    assert second.ids == (first.ids[1], 3)
    assert third.ids == (3, first.ids[0])


def test_a_name_keeps_its_id_whatever_its_case(registry):
    first = registry.assign(["Straße", "ball"])
    assert registry.assign(["BALL", "STRASSE"]).ids == first.ids[::-1]


def test_a_name_that_comes_back_long_after_keeps_its_id(registry, clock):
    first = registry.assign(["ball", "ladder"])
    registry.release(first, shown=True)
    clock.now += 1e6
    assert registry.assign(["mug", "ladder"]).ids == (3, first.ids[1])


def test_254_names_have_an_id_each_and_255_do_not(registry):
    assert registry.assign(many("a", 254)).ids == tuple(range(1, 255))
    with pytest.raises(LabelsExhausted, match="id_reuse_delay"):
        registry.assign(["one more"])


def test_a_freed_id_is_not_reused_before_the_delay_and_is_after_it(registry, clock):
    old = registry.assign(many("old", 254))
    registry.assign(many("old", 253))
    registry.release(old, shown=True)
    clock.now += 59.9
    with pytest.raises(LabelsExhausted, match="1 new names need a class id and 0 are free"):
        registry.check(["new"])
    with pytest.raises(LabelsExhausted):
        registry.assign(["new"])
    clock.now += 0.2
    registry.check(["new"])
    assert registry.assign(["new"]).ids == (254,)


def test_unused_ids_are_given_before_freed_ones(registry, clock):
    old = registry.assign(["ball"])
    registry.release(old, shown=True)
    clock.now += 1000.0
    assert registry.assign(["mug"]).ids == (2,)


def test_the_id_that_was_out_of_use_longest_is_reused_first(registry, clock):
    uses = {}
    for name in many("n", 254):
        uses[name] = registry.assign([name])
    for name in ("n 7", "n 3", "n 200"):
        registry.release(uses[name], shown=True)
        clock.now += 1.0
    clock.now += 100.0
    assert [registry.assign([f"new {number}"]).ids[0] for number in range(3)] == [8, 4, 201]


def test_the_id_of_a_name_in_use_is_never_reused(registry, clock):
    registry.assign(many("live", 254))
    clock.now += 1e9
    with pytest.raises(LabelsExhausted, match="belong to the names in use"):
        registry.assign(["new"])


def test_a_name_in_two_vocabularies_at_once_is_in_use_until_both_are_gone(registry, clock):
    serving = registry.assign(many("n", 254))
    coming = registry.assign(many("n", 254))
    registry.release(serving, shown=True)
    clock.now += 1000.0
    with pytest.raises(LabelsExhausted):
        registry.assign(["new"])
    registry.release(coming, shown=True)
    clock.now += 1000.0
    assert registry.assign(["new"]).ids[0] in range(1, 255)


def test_an_id_that_nobody_was_told_of_is_free_at_once(registry):
    registry.release(registry.assign(many("never shown", 254)), shown=False)
    assert len(registry.assign(many("next", 254)).ids) == 254


def test_an_id_that_was_shown_once_rests_even_if_its_last_use_was_not_shown(registry, clock):
    registry.release(registry.assign(many("n", 254)), shown=True)
    clock.now += 30.0
    registry.release(registry.assign(many("n", 254)), shown=False)
    with pytest.raises(LabelsExhausted):
        registry.assign(["new"])
    clock.now += 31.0
    registry.assign(["new"])


def test_a_refused_vocabulary_changes_nothing(registry):
    registry.release(registry.assign(many("n", 254)), shown=True)
    with pytest.raises(LabelsExhausted):
        registry.assign(["n 0", "new"])
    assert registry.assign(many("n", 254)).ids == tuple(range(1, 255))


def test_a_reused_id_is_lost_to_the_name_that_had_it(registry, clock):
    registry.release(registry.assign(many("n", 254)), shown=True)
    clock.now += 61.0
    assert registry.assign(["new"]).ids == (1,)
    assert registry.assign(["n 0"]).ids == (2,)


def test_the_id_table_maps_labels_to_ids_and_everything_else_to_unlabelled(registry):
    registry.assign(["other"])
    table = registry.assign(["ball", "ladder"]).id_table()
    assert table.dtype == np.uint8
    assert table[:3].tolist() == [0, 2, 3]
    assert set(table[3:].tolist()) == {255}


def test_label_info_names_the_background_and_every_id_and_never_255(registry):
    registry.assign(["ladder"])
    labels = registry.assign(["ball", "ladder"])
    message = label_info_message(labels, "rest", 0.25, Time(sec=3))
    classes = [(entry.class_id, entry.class_name) for entry in message.class_map]
    assert classes == [(0, "rest"), (1, "ladder"), (2, "ball")]
    assert message.threshold == 0.25
    assert message.header.stamp.sec == 3
