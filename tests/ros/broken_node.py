"""The real node with one promise broken on purpose, from outside: what it publishes is changed on its way out.

Reads the name of a mutation a line from standard input ("none" for none), answers "mutation: NAME" and goes by it from
the next message on. Those of QOS take effect with the next configure, which makes the publishers. A LabelInfo is true
again as soon as another mutation, or none, is chosen. Ends when standard input does.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable

import numpy as np
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from nerve_ros.node import main

Message = object
Sent = list[tuple[str, Message]]
PLANES = ("mask", "confidence")
ALL = (*PLANES, "class_confidence")
PLAIN_MUTATIONS: dict[str, tuple[tuple[str, ...], Callable[[Message], None]]] = {}
"""By name: the topics whose messages are changed, and how."""


def changes(*kinds: str) -> Callable:
    def register(change: Callable[[Message], None]) -> Callable[[Message], None]:
        PLAIN_MUTATIONS[change.__name__] = kinds, change
        return change

    return register


def rows_of(message: Message) -> np.ndarray:
    return np.frombuffer(message.data, np.uint8).reshape(message.height, message.width)


def fill(message: Message, rows: np.ndarray) -> None:
    message.data = type(message.data)("B", np.ascontiguousarray(rows).tobytes())


@changes(*ALL)
def stamp_moved(message):
    message.header.stamp.nanosec ^= 1


@changes("confidence")
def stamp_of_confidence_moved(message):
    message.header.stamp.nanosec ^= 1


@changes(*ALL)
def frame_renamed(message):
    message.header.frame_id = "camera_optical"


@changes(*PLANES)
def size_halved(message):
    rows = rows_of(message)[::2, ::2]
    message.height, message.width, message.step = *rows.shape, rows.shape[1]
    fill(message, rows)


@changes("confidence")
def confidence_halved(message):
    size_halved(message)


@changes("mask")
def rows_padded(message):
    rows = np.pad(rows_of(message), ((0, 0), (0, 8)))
    message.step = rows.shape[1]
    fill(message, rows)


@changes("mask")
def encoding_renamed(message):
    message.encoding = "8UC1"


@changes("confidence")
def confidence_cut_short(message):
    fill(message, rows_of(message).ravel()[: message.width])


@changes("confidence")
def unlabelled_confident(message):
    fill(message, np.maximum(rows_of(message), 1))


@changes("label_info")
def unlabelled_in_map(message):
    message.class_map.append(copy.deepcopy(message.class_map[-1]))
    message.class_map[-1].class_id = 255


@changes("label_info")
def background_left_out(message):
    del message.class_map[0]


@changes("label_info")
def ids_of_two_bytes(message):
    message.class_map[-1].class_id += 256


@changes("mask")
def stray_id(message):
    rows = rows_of(message).copy()
    rows[0, 0] = 200
    fill(message, rows)


@changes("class_confidence")
def area_wrong(message):
    for seen in message.classes:
        seen.area += 1


@changes("class_confidence")
def box_wrong(message):
    for seen in message.classes:
        seen.box.width += 1


@changes("class_confidence")
def centroid_wrong(message):
    for seen in message.classes:
        seen.centroid_x, seen.centroid_y = seen.centroid_y + 1.0, seen.centroid_x


class Mutation:
    """Changes what is published as `kind`; remembers what it needs. This one changes nothing."""

    def send(self, kind: str, message: Message) -> Sent:
        """What goes out instead of `message`."""
        return [(kind, message)]


class Plain(Mutation):
    """One of PLAIN_MUTATIONS."""

    def __init__(self, name: str) -> None:
        self._kinds, self._change = PLAIN_MUTATIONS[name]

    def send(self, kind: str, message: Message) -> Sent:
        if kind in self._kinds:
            self._change(message)
        return [(kind, message)]


class MaskFirst(Mutation):
    """A LabelInfo goes out after the first frame that needs it."""

    def __init__(self) -> None:
        self._held: Sent = []

    def send(self, kind: str, message: Message) -> Sent:
        if kind == "label_info":
            self._held = [(kind, message)]
            return []
        if kind != "class_confidence":
            return [(kind, message)]
        held, self._held = self._held, []
        return [(kind, message), *held]


class Repeated(Mutation):
    """The LabelInfo goes out again with each mask."""

    def __init__(self) -> None:
        self._last: Sent = []

    def send(self, kind: str, message: Message) -> Sent:
        if kind == "label_info":
            self._last = [(kind, message)]
        return [(kind, message), *(copy.deepcopy(self._last) if kind == "mask" else [])]


class OldClasses(Mutation):
    """class_confidence is of the vocabulary before this one."""

    def __init__(self) -> None:
        self._now: list = []
        self._before: list = []

    def send(self, kind: str, message: Message) -> Sent:
        if kind == "class_confidence":
            names = [seen.name for seen in message.classes]
            if names != [seen.name for seen in self._now]:
                self._before = self._now
            self._now = message.classes
            message.classes = self._before
        return [(kind, message)]


class Renumbered(Mutation):
    """Ids are given anew with each vocabulary, by `choose`: {name: id} of before, and names -> {name: id}."""

    def __init__(self, choose: Callable[[dict[str, int], list[str]], dict[str, int]]) -> None:
        self._choose = choose
        self._ids: dict[str, int] = {}
        self._table = np.arange(256, dtype=np.uint8)

    def send(self, kind: str, message: Message) -> Sent:
        if kind == "label_info":
            true = {entry.class_name: entry.class_id for entry in message.class_map[1:]}
            self._ids = self._choose(self._ids, list(true))
            self._table = np.arange(256, dtype=np.uint8)
            for entry in message.class_map[1:]:
                entry.class_id = self._ids[entry.class_name]
                self._table[true[entry.class_name]] = entry.class_id
        elif kind == "mask":
            fill(message, self._table[rows_of(message)])
        elif kind == "class_confidence":
            for seen in message.classes:
                seen.id = int(self._table[seen.id])
        return [(kind, message)]


def by_alphabet(before: dict[str, int], names: list[str]) -> dict[str, int]:
    """A name's id is its place in the vocabulary."""
    return {name: place for place, name in enumerate(sorted(names), 1)}


def freed_at_once(before: dict[str, int], names: list[str]) -> dict[str, int]:
    """Names keep their ids, and new names get those that are out of use, at once."""
    kept = {name: before[name] for name in names if name in before}
    free = iter(sorted(set(range(1, 255)) - set(kept.values())))
    return kept | {name: next(free) for name in names if name not in kept}


OTHER_MUTATIONS: dict[str, Callable[[], Mutation]] = {
    "none": Mutation,
    "mask_before_label_info": MaskFirst,
    "label_info_repeated": Repeated,
    "old_classes": OldClasses,
    "ids_by_place": lambda: Renumbered(by_alphabet),
    "freed_ids_at_once": lambda: Renumbered(freed_at_once),
}
LATCHED = {"reliability": ReliabilityPolicy.RELIABLE, "durability": DurabilityPolicy.TRANSIENT_LOCAL}
QOS: dict[str, dict[str, QoSProfile]] = {
    # Each topic is broken in one way; they can be looked at together.
    "unreliable_masks_and_volatile_labels": {
        "mask": QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT),
        "confidence": QoSProfile(depth=1, **LATCHED),
        "class_confidence": QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT),
        "label_info": QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE),
    },
    "old_labels_kept": {"label_info": QoSProfile(depth=5, **LATCHED)},
}
MUTATIONS = (*PLAIN_MUTATIONS, *OTHER_MUTATIONS, *QOS)


class Breaker:
    """Stands between the node and its publishers."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._name = "none"
        self._mutation = Mutation()
        # Weak: what the node gives back is to be gone.
        self._publishers: weakref.WeakValueDictionary[str, Publisher] = weakref.WeakValueDictionary()
        self._true_labels: Message | None = None
        self._told_labels: Message | None = None
        self._publish, self._create = Publisher.publish, Node.create_publisher

    def break_in(self) -> None:
        """Have everything that any publisher publishes come by here first."""
        Publisher.publish = lambda publisher, message: self.publish(publisher, message)
        Node.create_publisher = lambda *given, **named: self.create(*given, **named)

    def choose(self, name: str) -> None:
        """Go by the mutation of this name from now on."""
        with self._lock:
            self._name = name
            self._mutation = Plain(name) if name in PLAIN_MUTATIONS else OTHER_MUTATIONS.get(name, Mutation)()
            if self._told_labels != self._true_labels:
                self._told_labels = self._true_labels
                self._publish(self._publishers["label_info"], self._true_labels)

    def publish(self, publisher: Publisher, message: Message) -> None:
        kind = publisher.topic_name.removeprefix("/segmentation/")
        if kind not in (*ALL, "label_info"):
            self._publish(publisher, message)
            return
        with self._lock:
            self._publishers[kind] = publisher
            message = copy.deepcopy(message)
            if kind == "label_info":
                self._true_labels = copy.deepcopy(message)
            for where, broken in self._mutation.send(kind, message):
                if where == "label_info":
                    self._told_labels = broken
                self._publish(self._publishers[where], broken)

    def create(self, node: Node, message_type: type, topic: str, qos: QoSProfile | int, **named: object) -> Publisher:
        qos = QOS.get(self._name, {}).get(topic.removeprefix("segmentation/"), qos)
        return self._create(node, message_type, topic, qos, **named)


def listen(breaker: Breaker) -> None:
    for line in sys.stdin:
        breaker.choose(line.strip())
        print(f"mutation: {line.strip()}", flush=True)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    breaker = Breaker()
    breaker.break_in()
    threading.Thread(target=listen, args=(breaker,), daemon=True).start()
    sys.exit(main())
