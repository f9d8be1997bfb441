"""Messages of a bag -> frames: images as arrays, each with its stamp and, where the bag has them, its labels."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.metric import IGNORED
from ..images.encodings import ImageError, ValueRange, check_image, is_compressed, to_labels, to_rgb
from ..text.vocabulary import BACKGROUND, Vocabulary
from .clock import CameraClock
from .messages import IMAGE_TYPES, LABEL_INFO, STRING, VOCABULARY
from .reading import Bag, BagError, MessageError, Topic
from .salvage import Stored

BACKGROUND_NAME = "background"
LABELS_WAIT = 10**9
"""Nanoseconds by which an image's labels may follow it in the bag."""
REASONS = 20
"""Reasons for lost images that are counted apart, at most; the others are counted together."""

VIDEO_TYPES = ("CompressedVideo", "FFMPEGPacket", "Packet")
"""Types of messages that hold parts of a video: foxglove_msgs, ffmpeg_image_transport_msgs, theora_image_transport."""

TOPICS = 40
"""Topics of a bag that an error lists, at most."""


@dataclass(frozen=True)
class Frame:
    """One image of a bag.

    camera: which topic, by its place among those asked for. time: the log time in nanoseconds. stamp: of its header, in
    nanoseconds; frame_id: too. moment: when it was taken, in nanoseconds of its camera's one clock (CameraClock).
    image: uint8 [height, width, 3], RGB. encoding: how it came. truth: labels of the vocabulary, uint8 [height, width],
    255 where they are ignored; None without.
    """

    camera: int
    time: int
    stamp: int
    moment: int
    frame_id: str
    image: np.ndarray
    encoding: str
    truth: np.ndarray | None = None


@dataclass
class Losses:
    """What of one topic could not be read: how many messages, by reason."""

    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str) -> None:
        """Count one message."""
        self.reasons[reason if reason in self.reasons or len(self.reasons) < REASONS else "other reasons"] += 1


@dataclass(frozen=True)
class Selection:
    """Which images of a bag are wanted.

    topics: of images. start: seconds from the bag's beginning; duration: seconds from there, None to its end. every:
    the n-th of each topic alone. limit: images of each topic at most. Raises ValueError for values that select nothing.
    """

    topics: tuple[str, ...]
    start: float = 0.0
    duration: float | None = None
    every: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("start", self.start, 0), ("every", self.every, 1), ("limit", self.limit, 1)):
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}; accepted: {least} and above")
        if self.duration is not None and not self.duration > 0:
            raise ValueError(f"duration is {self.duration}; accepted: above 0")

    def window(self, bag: Bag) -> tuple[int | None, int | None]:
        """First and last log time in nanoseconds, the last not included; None where the bag's own is meant."""
        first = bag.start + round(self.start * 1e9)
        return (
            first if self.start else None,
            None if self.duration is None else first + round(self.duration * 1e9),
        )

    def count(self, bag: Bag) -> int | None:
        """How many images it will be, by the bag's own counts; None for a part of its time, which has no count."""
        if self.start or self.duration is not None:
            return None
        counts = [sum(topic.count for topic in bag.images() if topic.name == name) for name in self.topics]
        taken = [-(-count // self.every) for count in counts]
        return sum(count if self.limit is None else min(count, self.limit) for count in taken)


def choose_topics(bag: Bag, asked: Sequence[str], labels_topic: str | None = None) -> tuple[str, ...]:
    """The image topics to replay: those asked for, or the only one that there is. Raises BagError, which lists them."""
    there = bag.images()
    names = list(dict.fromkeys(f"/{name.lstrip('/')}" for name in asked))
    if not names:
        names = list(dict.fromkeys(topic.name for topic in there if topic.name != labels_topic))
        if not there:
            raise BagError(f"{bag.path} has {_listed(bag)}; accepted: {', '.join(IMAGE_TYPES)}")
        if len(names) != 1:
            raise BagError(f"{bag.path} has {_listed(bag)}; say which by --image-topic")
    for name in names:
        kinds = {topic.kind for topic in bag.topics if topic.name == name}
        if not kinds:
            raise BagError(f"{bag.path} has no topic {name}; it has {_listed(bag)}")
        if not kinds & set(IMAGE_TYPES):
            raise BagError(
                f"the messages of {name} are of type {', '.join(sorted(kinds))}; accepted: {', '.join(IMAGE_TYPES)}; "
                f"the bag has {_listed(bag)}"
            )
    return tuple(names)


def _listed(bag: Bag) -> str:
    """The image topics of `bag`; where it has none, what it has."""
    if images := bag.images():
        return f"the image topics {_named(images)}"
    if not bag.topics:
        return "no image topic and no other"
    videos = any(topic.kind.rpartition("/")[2] in VIDEO_TYPES for topic in bag.topics)
    decode = "; videos are not decoded here: record a topic of images that they are decoded to" if videos else ""
    return f"no image topic; its topics are {_named(bag.topics)}{decode}"


def _named(topics: Sequence[Topic]) -> str:
    named = ", ".join(f"{topic.name} ({topic.kind}, {topic.count})" for topic in topics[:TOPICS])
    return named if len(topics) <= TOPICS else f"{named} and {len(topics) - TOPICS} more"


class Truth:
    """The labels of a bag's images, by their stamps, in a vocabulary's labels.

    Names are compared without case, synonyms included. What the vocabulary does not name is ignored, and said in
    `notes`. Raises BagError where the bag does not say what its labels mean.
    """

    def __init__(self, path: Path, topic: str, vocabulary: Vocabulary, info_topic: str | None = None) -> None:
        self._bag = Bag(path)
        self._waiting: dict[int, Any] = {}
        self.losses = Losses()
        self.notes: tuple[str, ...] = ()
        try:
            choose_topics(self._bag, [topic])
            self.topic = f"/{topic.lstrip('/')}"
            self._table = self._label_table(vocabulary, info_topic)
            self._messages = self._bag.messages([self.topic])
            self._reached = -1
        except BaseException:
            self._bag.close()
            raise

    def close(self) -> None:
        """Give the bag back."""
        self._bag.close()

    def _label_table(self, vocabulary: Vocabulary, info_topic: str | None) -> np.ndarray:
        names = label_names(self._bag, info_topic, beside=self.topic)
        words = {key(word): label for label, all_of in enumerate(vocabulary.synonyms, 1) for word in all_of}
        words.setdefault(key(BACKGROUND_NAME), BACKGROUND)
        table = np.full(2**16, IGNORED, np.uint8)
        unnamed = []
        for number, name in names.items():
            if key(name) in words:
                table[number] = words[key(name)]
            else:
                unnamed.append(name)
        missing = [name for label, name in enumerate(vocabulary.names, 1) if label not in table[list(names)]]
        if unnamed:
            self.notes += (f"labels of the bag that the vocabulary does not name, ignored: {', '.join(unnamed)}",)
        if missing:
            self.notes += (f"names that the bag has no label for, wrong wherever they win: {', '.join(missing)}",)
        return table

    def at(self, frame_stamp: int, time: int, size: tuple[int, int]) -> np.ndarray | None:
        """The labels of the image with this stamp and log time, rows and columns; None where the bag has none."""
        if not frame_stamp:
            self.losses.add("labels: the image has no stamp, by which they are found")
            return None
        while frame_stamp not in self._waiting and self._reached <= time + LABELS_WAIT:
            stored = next(self._messages, None)
            if stored is None:
                break
            self._reached = stored.time
            try:
                message = self._bag.deserialize(stored)
                self._waiting[stamp_of(message)] = message
            except (MessageError, AttributeError) as error:
                self.losses.add(f"labels: {error}")
        for old in [stamp for stamp in self._waiting if stamp < frame_stamp - 2 * LABELS_WAIT]:
            del self._waiting[old]
        message = self._waiting.get(frame_stamp)
        if message is None:
            return None
        try:
            labels = to_labels(message)
        except ImageError as error:
            self.losses.add(f"labels: {error}")
            return None
        if labels.shape != size:
            self.losses.add(f"labels are {labels.shape[1]} x {labels.shape[0]}, the image is {size[1]} x {size[0]}")
            return None
        return self._table[labels]


def label_names(bag: Bag, topic: str | None, beside: str) -> dict[int, str]:
    """The names of labels by number, as a LabelInfo of the bag has them: of `topic`, or of the topic label_info
    beside the topic `beside`, or of the only one that there is. Raises BagError."""
    there = [one.name for one in bag.topics if one.kind == LABEL_INFO and one.count]
    near = f"{base_topic(beside).rpartition('/')[0]}/label_info"
    nearer = f"{base_topic(beside)}/label_info"
    chosen = f"/{topic.lstrip('/')}" if topic else next((name for name in (nearer, near) if name in there), None)
    if chosen is None and len(there) == 1:
        chosen = there[0]
    if chosen not in there:
        found = f"it has {', '.join(there)}" if there else "it has no vision_msgs/LabelInfo at all"
        raise BagError(f"{bag.path} does not say which label is which name; {found}; give its topic")
    for stored in bag.messages([chosen]):
        try:
            message = bag.deserialize(stored)
            return {int(entry.class_id): entry.class_name for entry in message.class_map}
        except (MessageError, AttributeError):
            continue
    raise BagError(f"no message of {chosen} in {bag.path} can be read")


def read_vocabulary(bag: Bag, topic: str) -> Vocabulary:
    """What a topic of the bag names, a nerve_ros/Vocabulary, a std_msgs/String of names or a vision_msgs/LabelInfo: its
    first message that names anything. Raises BagError where there is none, and VocabularyError."""
    name = f"/{topic.lstrip('/')}"
    kinds = {one.kind for one in bag.topics if one.name == name}
    if not kinds & {VOCABULARY, STRING, LABEL_INFO}:
        fault = f"is of type {', '.join(sorted(kinds))}" if kinds else f"is not in {bag.path}"
        raise BagError(f"the topic {name} {fault}; accepted: {VOCABULARY}, {STRING}, {LABEL_INFO}; or give --names")
    for stored in bag.messages([name]):
        try:
            message = bag.deserialize(stored)
        except MessageError:
            continue
        if stored.kind == VOCABULARY:
            found = Vocabulary(message.names)
        elif stored.kind == STRING:
            found = Vocabulary.parse(message.data)
        else:
            found = Vocabulary([one.class_name for one in message.class_map if key(one.class_name) != BACKGROUND_NAME])
        if found.names:
            return found
    raise BagError(f"no message of {name} in {bag.path} names anything; give --names")


def read_messages(bag: Bag, selection: Selection, losses: Sequence[Losses]) -> Iterator[tuple[int, Stored, Any]]:
    """The image messages of `bag` that `selection` takes, in the order of time: camera, as stored, and deserialised.

    What cannot be an image is counted in `losses`, by camera, and does not count for the selection's limit.
    """
    cameras = {name: number for number, name in enumerate(selection.topics)}
    seen, taken = [0] * len(cameras), [0] * len(cameras)
    for stored in bag.messages(selection.topics, *selection.window(bag)):
        camera = cameras[stored.topic]
        if stored.kind not in IMAGE_TYPES:
            losses[camera].add(f"messages are of type {stored.kind}; accepted: {', '.join(IMAGE_TYPES)}")
            continue
        seen[camera] += 1
        if (seen[camera] - 1) % selection.every or taken[camera] == selection.limit:
            continue
        try:
            message = bag.deserialize(stored)
            check_image(message)
        except (ImageError, MessageError) as error:
            losses[camera].add(str(error))
            continue
        taken[camera] += 1
        yield camera, stored, message
        if selection.limit is not None and min(taken) == selection.limit:
            return


def read_frames(
    bag: Bag, selection: Selection, losses: Sequence[Losses], truth: Truth | None
) -> Generator[Frame, None, None]:
    """The images of `bag` that `selection` takes, in the order of time, decoded. What cannot be read is counted in
    `losses`, by camera; what is odd about a camera's times stands in the bag's notes at the end."""
    clocks = [CameraClock() for _ in selection.topics]
    ranges = [ValueRange() for _ in selection.topics]
    try:
        for camera, stored, message in read_messages(bag, selection, losses):
            try:
                image, stamp = to_rgb(message, ranges[camera]), stamp_of(message)
            except ImageError as error:
                losses[camera].add(str(error))
                continue
            if news := ranges[camera].news():
                bag.notes[f"{selection.topics[camera]}: {news}"] = None
            moment = clocks[camera].moment(stamp, stored.time)
            encoding = "compressed" if is_compressed(message) else message.encoding
            labels = None if truth is None else truth.at(stamp, stored.time, image.shape[:2])
            yield Frame(camera, stored.time, stamp, moment, message.header.frame_id, image, encoding, labels)
    finally:
        for topic, clock in zip(selection.topics, clocks, strict=True):
            bag.notes.update(dict.fromkeys(clock.notes(topic)))


def stamp_of(message: Any) -> int:
    """The stamp of a message's header, in nanoseconds."""
    stamp = message.header.stamp
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)


def base_topic(topic: str) -> str:
    """An image topic without its transport: /camera/image for /camera/image/compressed."""
    return topic.removesuffix("/compressed")


def camera_names(topics: Sequence[str]) -> tuple[str, ...]:
    """What the results of each image topic are called after: its namespace, as of a node that runs there; the topic
    itself where two have one namespace. /front for /front/image_raw; "" for /image."""
    for shorten in (lambda topic: base_topic(topic).rpartition("/")[0], base_topic):
        names = tuple(shorten(topic) for topic in topics)
        if len(set(names)) == len(names):
            return names
    return tuple(topics)


def key(name: str) -> str:
    """A name as it is compared with others."""
    return unicodedata.normalize("NFC", name.strip()).casefold()
