"""Run the node for a long time with everything happening at once: what grows, gets lost, or is published wrongly.

`python -m nerve_benchmarks.soak`, or `python -m benchmarks.soak` in a clone's top folder. Everything is judged by what
came over DDS and by what the system reports of the node's process, not by the node's own word.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from nerve_core.console import PlainConsole
from nerve_core.embedded.scenes import NAMES, STUFF, SYNONYMS
from nerve_core.output import claim, write, writing

from .node import PATIENCE, Bench, Child, ros_environment, running_bench

if TYPE_CHECKING:
    from rclpy.client import Client
    from rclpy.subscription import MessageInfo

MOST_GROWTH = 0.02
"""Share by which resident memory may grow from the warm-up's end to the end."""
MOST_INFERENCES = 3.0
"""Inference times that the 99th percentile of the masks' ages may be."""
EARLY = 0.02
"""Seconds by which two clocks that should say the same may disagree."""
IDS = 254
ENDED = ("images_segmented", "images_dropped", "images_rejected")
"""What can become of an image that was received."""


@dataclass(frozen=True)
class Plan:
    """What happens for `seconds`, of which memory is not judged in the first `warm_up`; "every" is in seconds too.

    rate: images a second. fresh: names in each vocabulary that were never asked for before.
    """

    seconds: float = 720.0
    warm_up: float = 120.0
    size: tuple[int, int] = (640, 480)
    rate: float = 30.0
    id_reuse_delay: float = 60.0
    fresh: int = 2
    vocabulary_every: float = 1.0
    locate_every: float = 0.7
    overlay_every: float = 3.0
    visitor_every: float = 20.0
    parameter_every: float = 2.0
    disable_every: float = 17.0
    deactivate_every: float = 41.0
    seed: int = 1


@dataclass
class Heard:
    """What came in: times are in seconds of the system's clock unless said otherwise."""

    masks: list[tuple[float, int, dict[int, int]]] = field(default_factory=list)
    """When it was published, the image's stamp in nanoseconds, pixels by class id."""
    infos: list[tuple[float, dict[int, str]]] = field(default_factory=list)
    """When it was published, names by class id, background included."""
    classes: dict[int, dict[int, tuple[str, int]]] = field(default_factory=dict)
    """By the image's stamp: name and area by class id."""
    confidences: int = 0
    overlays: int = 0
    figures: list[tuple[float, int, str, dict[str, str]]] = field(default_factory=list)
    """Diagnostics: when, level, message, values."""
    located: list[dict[str, Any]] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What was answered otherwise than it should have been."""
    samples: list[dict[str, float]] = field(default_factory=list)
    """Once a second, of the node's process: memory in MB, file descriptors, threads, shared memory files."""
    timings: list[np.ndarray] = field(default_factory=list)
    silent: list[tuple[float, float]] = field(default_factory=list)
    """From when until when no image was to be segmented that came meanwhile."""


class Soak:
    """The plan, carried out before a running node; `heard` fills meanwhile."""

    def __init__(self, bench: Bench, env: Mapping[str, str], plan: Plan, logs: Path) -> None:
        from lifecycle_msgs.srv import ChangeState, GetState
        from rcl_interfaces.srv import SetParameters
        from rclpy.qos import DurabilityPolicy, QoSProfile
        from std_msgs.msg import String
        from std_srvs.srv import SetBool
        from vision_msgs.msg import LabelInfo

        from nerve_ros.msg import Vocabulary
        from nerve_ros.srv import Locate, SetVocabulary

        self.bench, self.plan, self.heard = bench, plan, Heard()
        self._env, self._logs = env, logs
        self._stop = threading.Event()
        self._cycle = threading.Lock()  # held while the node is meant to be inactive or disabled
        self._cycles = 0
        self._numbers = itertools.count(1)
        node = bench.listener.node
        listener = bench.listener
        listener.on_mask, listener.on_confidence = self._on_mask, self._on_confidence
        listener.on_classes, listener.on_diagnostics = self._on_classes, self._on_diagnostics
        latched = QoSProfile(depth=200, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        node.create_subscription(LabelInfo, "segmentation/label_info", self._on_label_info, latched)
        self._vocabulary = node.create_publisher(
            Vocabulary, "vocabulary", QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        )
        self._text = node.create_publisher(String, "vocabulary_text", QoSProfile(depth=10))
        self._clients: dict[str, Client] = {
            name: node.create_client(kind, f"nerve/{name}")
            for name, kind in {
                "locate": Locate,
                "set_vocabulary": SetVocabulary,
                "enable": SetBool,
                "set_parameters": SetParameters,
                "change_state": ChangeState,
                "get_state": GetState,
            }.items()
        }

    def run(self, progress: Callable[[float], None] = lambda seconds: None) -> Heard:
        """Carry it out. Raises RuntimeError where the node ends, or where a service gives no answer at all."""
        for name, client in self._clients.items():
            if not client.wait_for_service(PATIENCE):
                raise RuntimeError(f"there is no service {name}")
        plan = self.plan
        begun = time.monotonic()
        self.bench.timings()
        self.bench.camera.ask(do="start", size=plan.size, encoding="rgb8", rate=plan.rate)
        doings = (
            (self._change_vocabulary, plan.vocabulary_every),
            (self._locate, plan.locate_every),
            (self._watch_overlay, plan.overlay_every),
            (self._visit, plan.visitor_every),
            (self._change_parameter, plan.parameter_every),
            (self._disable, plan.disable_every),
            (self._deactivate, plan.deactivate_every),
        )
        errors: list[Exception] = []
        threads = [
            threading.Thread(target=self._repeat, args=(do, every, errors), daemon=True)
            for do, every in doings
            if every
        ]
        for thread in threads:
            thread.start()
        try:
            # On a busy machine what is to happen may be late: it is waited for beyond the plan's end.
            while not errors and (
                (passed := time.monotonic() - begun) < plan.seconds
                or (passed < plan.seconds + PATIENCE and not self._everything_happened())
            ):
                self._stop.wait(1.0)
                if self.bench.node.process.poll() is not None:
                    raise RuntimeError(f"the node ended:\n{self.bench.node.last_lines()}")
                self.heard.samples.append({"time": time.time(), **process_sample(self.bench.node.process.pid)})
                self.heard.timings.append(self.bench.timings())
                progress(passed)
        finally:
            self._stop.set()
        for thread in threads:
            thread.join(2 * PATIENCE)
        if errors:
            raise errors[0]
        self._stop.clear()
        state = self._call("get_state").current_state.label
        self._expect(state == "active", f"the node is {state} at the end")
        self.heard.done["images sent"] = self.bench.camera.ask(do="stop")["sent"]
        return self.heard

    def _everything_happened(self) -> bool:
        """Whether everything that the plan has happened at least once, and was answered."""
        plan, heard = self.plan, self.heard
        due = (
            (plan.vocabulary_every, len(heard.infos) >= 2),
            (plan.locate_every, any(answer["success"] for answer in heard.located)),
            (plan.overlay_every, heard.overlays),
            (plan.parameter_every, heard.done["parameters set"] and heard.done["parameters refused"]),
            (plan.disable_every, heard.done["came back after enable"]),
            (plan.deactivate_every, heard.done["came back after activate"]),
        )
        return len(heard.masks) >= 2 and all(happened for every, happened in due if every)

    # What happens. Each is called over and over on a thread of its own.

    def _change_vocabulary(self, number: int) -> None:
        from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
        from std_msgs.msg import String

        from nerve_ros.msg import Vocabulary

        draw = random.Random(f"{self.plan.seed} vocabulary {number}")
        if number % 60 == 59:
            names = [f"too many {number} {index}" for index in range(IDS + 1)]
        elif number % 60 == 29:
            names = []
        else:
            names = draw.sample(KNOWN, draw.randint(2, 9)) + [self._fresh(draw) for _ in range(self.plan.fresh)]
            if draw.random() < 0.2:
                names.append(names[0].upper())  # the same name: dropped, and reported
        way = number % 4
        if way == 0 or not names or len(names) > IDS:
            answer = self._call("set_vocabulary", names=names)
            self._expect(
                answer.accepted == (len(names) <= IDS) or "id_reuse_delay" in answer.message,
                f"set_vocabulary of {len(names)}: {answer.message}",
            )
            kind = "accepted" if answer.accepted else "rejected"
        elif way == 1:
            value = ParameterValue(type=ParameterType.PARAMETER_STRING_ARRAY, string_array_value=names)
            result = self._call("set_parameters", parameters=[Parameter(name="vocabulary", value=value)]).results[0]
            self._expect(result.successful or "id_reuse_delay" in result.reason, result.reason)
            kind = "accepted" if result.successful else "rejected"
        elif way == 2:
            self._vocabulary.publish(Vocabulary(names=names))
            kind = "published"
        else:
            self._text.publish(String(data=", ".join(names)))
            kind = "published"
        self.heard.done[f"vocabularies {kind}"] += 1

    def _fresh(self, draw: random.Random) -> str:
        return f"{draw.choice(COLOURS)} {draw.choice(KNOWN)} {next(self._numbers)}"

    def _locate(self, number: int) -> None:
        draw = random.Random(f"{self.plan.seed} locate {number}")
        kind = draw.choice(("served", "served", "known", "fresh", "bad"))
        name = {
            "served": draw.choice(self._published_names() or KNOWN),
            "known": draw.choice(KNOWN),
            "fresh": self._fresh(draw),
            "bad": draw.choice(("", "a\nb", "x" * 129)),
        }[kind]
        cycles, free = self._cycles, not self._cycle.locked()
        asked = time.time()
        answer = self._call("locate", name=name)
        now = time.time()
        stamp = answer.header.stamp.sec * 10**9 + answer.header.stamp.nanosec
        self._expect(
            not answer.success if kind == "bad" else answer.success or not free or self._cycles != cycles,
            f"locate {name[:40]!r} ({kind}): success {answer.success}, {answer.message}",
        )
        self.heard.located.append(
            {
                "name": name,
                "kind": kind,
                "asked": asked,
                "seconds": now - asked,
                "success": answer.success,
                "message": answer.message,
                "stamp": stamp,
                "area": int(np.count_nonzero(np.frombuffer(answer.mask.data, np.uint8))) if answer.success else 0,
                "found": answer.found,
            }
        )

    def _published_names(self) -> list[str]:
        """The names of the last LabelInfo."""
        return [name for number, name in sorted(self.heard.infos[-1][1].items()) if number] if self.heard.infos else []

    def _watch_overlay(self, number: int) -> None:
        from rclpy.qos import QoSProfile
        from sensor_msgs.msg import Image

        node = self.bench.listener.node
        watching = node.create_subscription(Image, "segmentation/overlay", self._on_overlay, QoSProfile(depth=1))
        self._stop.wait(self.plan.overlay_every / 2)
        self.bench.listener.give_up(watching)
        self.heard.done["overlay subscriptions"] += 1

    def _visit(self, number: int) -> None:
        child = Child(self._env, f"{__package__}.soak:visitor", log=self._logs / "visitor.log")
        try:
            self._stop.wait(self.plan.visitor_every / 2)
            self.heard.done["processes that came, watched and left"] += 1
        finally:
            child.close()

    def _change_parameter(self, number: int) -> None:
        from rclpy.parameter import Parameter

        # Each value once before any comes by chance: what it needs is then had by the end of the warm-up.
        choices = [(name, value, good) for name, values, good in PARAMETERS for value in values]
        chance = random.Random(f"{self.plan.seed} parameter {number}")
        name, value, good = choices[number] if number < len(choices) else chance.choice(choices)
        message = Parameter(name, value=value).to_parameter_msg()
        result = self._call("set_parameters", parameters=[message]).results[0]
        self._expect(
            result.successful == good or "id_reuse_delay" in result.reason,
            f"{name} = {message.value}: successful {result.successful}, {result.reason}",
        )
        self.heard.done["parameters set" if result.successful else "parameters refused"] += 1

    def _disable(self, number: int) -> None:
        with self._cycle:
            self._cycles += 1
            answer = self._call("enable", data=False)
            self._expect(answer.success, f"enable false: {answer.message}")
            since = time.time()
            self._stop.wait(1.0)
            found = self._call("locate", name="ball")
            self._expect(found.success, f"locate while disabled: {found.message}")
            self.heard.silent.append((since, time.time()))
            answer = self._call("enable", data=True)
            self._expect(answer.success, f"enable true: {answer.message}")
            self._await_mask("enable")

    def _deactivate(self, number: int) -> None:
        from lifecycle_msgs.msg import Transition

        with self._cycle:
            self._cycles += 1
            for label, state in (("deactivate", "inactive"), ("activate", "active")):
                answer = self._call("change_state", transition=Transition(label=label))
                self._expect(answer.success, f"{label} failed")
                since = time.time()
                now = self._call("get_state").current_state.label
                self._expect(now == state, f"{now} after {label}")
                if label == "deactivate":
                    found = self._call("locate", name="ball")
                    self._expect(not found.success, "locate found something while inactive")
                    self._stop.wait(1.0)
                    self.heard.silent.append((since, time.time()))
            self._await_mask("activate")

    def _await_mask(self, after: str) -> None:
        count, begun = len(self.heard.masks), time.monotonic()
        while len(self.heard.masks) == count:
            if time.monotonic() > begun + PATIENCE:
                self._expect(False, f"no mask after {after}")
                return
            time.sleep(0.02)
        self.heard.done[f"came back after {after}"] += 1

    def _repeat(self, do: Callable[[int], None], every: float, errors: list[Exception]) -> None:
        due = time.monotonic() + every * 0.5
        for number in itertools.count():
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            due = max(due + every, time.monotonic())
            try:
                do(number)
            except Exception as error:
                errors.append(error)
                self._stop.set()

    def _call(self, service: str, /, **fields: Any) -> Any:
        """The answer of a service. Raises RuntimeError where there is none for a very long time."""
        client, done = self._clients[service], threading.Event()
        request = client.srv_type.Request(**fields)
        future = client.call_async(request)
        future.add_done_callback(lambda _: done.set())
        if not done.wait(PATIENCE):
            raise RuntimeError(f"{service} gave no answer within {PATIENCE:.0f} s\n{self.bench.node.last_lines(60)}")
        self.heard.done[f"{service} answered"] += 1
        return future.result()

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.heard.wrong.append(f"{time.time():.1f} {otherwise}")

    # What comes in, on the listener's thread.

    def _on_mask(self, message: Any, info: MessageInfo) -> None:
        counts = np.bincount(np.frombuffer(message.data, np.uint8), minlength=256)
        ids = np.flatnonzero(counts)
        self._expect(
            len(message.data) == message.width * message.height == message.step * message.height,
            f"a mask of {message.width} x {message.height} has {len(message.data)} bytes, step {message.step}",
        )
        self.heard.masks.append(
            (
                1e-9 * info["source_timestamp"],
                _nanoseconds(message.header.stamp),
                dict(zip(ids.tolist(), counts[ids].tolist(), strict=True)),
            )
        )

    def _on_confidence(self, message: Any) -> None:
        self.heard.confidences += 1

    def _on_overlay(self, message: Any) -> None:
        self.heard.overlays += 1

    def _on_label_info(self, message: Any, info: MessageInfo) -> None:
        names = {entry.class_id: entry.class_name for entry in message.class_map}
        self.heard.infos.append((1e-9 * info["source_timestamp"], names))

    def _on_classes(self, message: Any) -> None:
        self.heard.classes[_nanoseconds(message.header.stamp)] = {
            seen.id: (seen.name, seen.area) for seen in message.classes
        }

    def _on_diagnostics(self, message: Any) -> None:
        status = message.status[0]
        values = {pair.key: pair.value for pair in status.values}
        self.heard.figures.append((time.time(), status.level[0], status.message, values))


COLOURS = ("red", "blue", "green", "striped", "dented", "tall", "broken", "wet")
KNOWN = (*NAMES, *(words[0] for words in SYNONYMS.values()), *STUFF)
"""What the embedded pair knows, synonyms and stuff among it."""
PARAMETERS: tuple[tuple[str, tuple[Any, ...], bool], ...] = (
    ("threshold", (-1.0, 0.0, 0.3, 0.6), True),
    ("presence_threshold", (-1.0, 0.0, 0.5), True),
    ("overlay_alpha", (0.0, 0.5, 1.0), True),
    ("confidence_classes", (["ball", "mug"], ["ball"], ["cone", "chair", "ladder", "plant"], [""]), True),
    ("negatives", (["default"], ["wall", "floor"], [""]), True),
    ("background_name", ("background", "nothing"), True),
    ("max_image_age", (0.0, 60.0), True),
    ("max_rate", (0.0, 100.0), True),
    ("threshold", (7.0, -3.0), False),
    ("device", ("cuda:77",), False),
    ("vocabulary", (["a\x07b"],), False),
)
"""Parameter, values, and whether they are to be taken."""


def visitor() -> int:
    """A process that subscribes to the pictures until its standard input ends."""
    import rclpy
    from rclpy.qos import QoSProfile
    from sensor_msgs.msg import Image

    rclpy.init()
    node = rclpy.create_node("visitor")
    for topic in ("mask", "overlay"):
        node.create_subscription(Image, f"segmentation/{topic}", lambda message: None, QoSProfile(depth=1))

    def wait() -> None:
        sys.stdin.read()
        rclpy.try_shutdown()

    threading.Thread(target=wait, daemon=True).start()
    with suppress(Exception):
        rclpy.spin(node)
    rclpy.try_shutdown()
    return 0


def process_sample(process: int) -> dict[str, float]:
    """Of a process: MB in RAM, of them its own and those shared with others; descriptors, threads, /dev/shm files."""
    folder = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
    sizes = {
        key: int(status[name].split()[0]) * 1024 / 1e6
        for key, name in (("resident", "VmRSS"), ("own", "RssAnon"), ("shared", "RssShmem"))
    }
    shared = {line.split()[-1] for line in (folder / "maps").read_text().splitlines() if "/dev/shm/" in line}
    return {
        **sizes,
        "descriptors": len(list((folder / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "shared_files": len(shared),
    }


def _nanoseconds(stamp: Any) -> int:
    return stamp.sec * 10**9 + stamp.nanosec


# What is wrong with what was heard. Each gives sentences, none where all is well.


def reused_early(infos: Sequence[tuple[float, Mapping[int, str]]], delay: float) -> list[str]:
    """Ids that got another name less than `delay` seconds after their name was last in force."""
    last: dict[int, tuple[str, float]] = {}
    before: Mapping[int, str] = {}
    wrong = []
    for sent, names in sorted(infos, key=lambda info: info[0]):
        for number, name in before.items():
            last[number] = (name.casefold(), sent)  # in force until now
        for number, name in names.items():
            held, until = last.get(number, (name.casefold(), sent))
            if number != 0 and held != name.casefold() and sent - until < delay - EARLY:
                wrong.append(
                    f"id {number} went from {held!r} to {name!r} {sent - until:.2f} s after it was last in use"
                )
        before = names
    return wrong


def changed_ids(infos: Sequence[tuple[float, Mapping[int, str]]], delay: float) -> list[str]:
    """Names that came back with another id before anybody else can have been given theirs."""
    known: dict[str, tuple[int, float]] = {}
    wrong = []
    for sent, names in sorted(infos, key=lambda info: info[0]):
        for number, name in names.items():
            before, seen = known.get(name.casefold(), (number, sent))
            if number and before != number and sent - seen < delay:
                wrong.append(f"{name!r} had id {before} and has {number} {sent - seen:.2f} s later")
            known[name.casefold()] = (number, sent)
    return wrong


def unexplained_ids(
    masks: Sequence[tuple[float, int, Mapping[int, int]]], infos: Sequence[tuple[float, Mapping[int, str]]]
) -> list[str]:
    """Masks with an id that the LabelInfo in force as they were published does not name."""
    ordered = sorted(infos, key=lambda info: info[0])
    times = [sent for sent, _ in ordered]
    wrong = []
    for sent, stamp, counts in masks:
        place = int(np.searchsorted(times, sent)) - 1
        names = ordered[place][1] if place >= 0 else {}
        strangers = set(counts) - set(names) - {255}
        if strangers:
            wrong.append(f"mask of image {stamp} published at {sent:.3f} has ids {sorted(strangers)} that nobody told")
    return wrong


def contradictions(heard: Heard) -> list[str]:
    """Where two of the node's messages about one image disagree: mask, class_confidence, and answers of locate."""
    masks = {stamp: counts for _, stamp, counts in heard.masks}
    wrong = []
    for stamp, classes in heard.classes.items():
        counts = masks.get(stamp)
        if counts is None:
            continue
        for number, (name, area) in classes.items():
            if counts.get(number, 0) != area:
                wrong.append(f"image {stamp}: {name!r} has area {area} and {counts.get(number, 0)} pixels")
    for answer in heard.located:
        seen, counts = heard.classes.get(answer["stamp"]), masks.get(answer["stamp"])
        if not answer["success"] or seen is None or counts is None:
            continue
        numbers = [n for n, (name, _) in seen.items() if name.casefold() == answer["name"].casefold()]
        if numbers and counts.get(numbers[0], 0) != answer["area"]:
            wrong.append(
                f"image {answer['stamp']}: locate {answer['name']!r} says {answer['area']} pixels, the mask has "
                f"{counts.get(numbers[0], 0)}"
            )
    return wrong


def unaccounted(heard: Heard) -> list[int]:
    """Images received but neither segmented, dropped, rejected nor failed, by each of the diagnostics."""
    return [
        int(values["images_received"]) - sum(int(values[name]) for name in ENDED)
        for _, _, _, values in heard.figures
        if "images_received" in values
    ]


def growth(times: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Share by which something grew: by a straight line through all of it, and from the first tenth to the last."""
    x, y = np.asarray(times) - times[0], np.asarray(values)
    slope, start = np.polyfit(x, y, 1)
    part = max(1, len(y) // 10)
    begin, end = float(np.median(y[:part])), float(np.median(y[-part:]))
    return {"begin": begin, "end": end, "line": float(slope * x[-1] / start), "ends": end / begin - 1.0}


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was found."""

    name: str
    holds: bool
    found: str


def judge(heard: Heard, plan: Plan) -> list[Check]:
    """Everything that must hold of a run, whatever the machine does: no limit here is one of time or memory."""

    def none(name: str, wrong: Sequence[str]) -> Check:
        return Check(name, not wrong, "; ".join([f"{len(wrong)} times", *wrong[:3]]) if wrong else "never otherwise")

    left = unaccounted(heard)
    levels = Counter(message for _, level, message, _ in heard.figures if level == 2)
    last = heard.figures[-1][3]
    late = [
        f"a mask of {1e-9 * stamp:.1f} came at {sent:.1f}"
        for sent, stamp, _ in heard.masks
        if any(begin < 1e-9 * stamp and sent < end for begin, end in heard.silent)
    ]
    return [
        none("every answer is the right one", heard.wrong),
        none("an id changes hands only after id_reuse_delay", reused_early(heard.infos, plan.id_reuse_delay)),
        none("a name keeps its id", changed_ids(heard.infos, plan.id_reuse_delay)),
        none("every id of a mask is told before", unexplained_ids(heard.masks, heard.infos)),
        none("mask, class_confidence and locate agree", contradictions(heard)),
        none("nothing is published while disabled or inactive", late),
        Check(
            "received = segmented + dropped, but for two at most",
            bool(left) and min(left) >= 0 and max(left) <= 2,
            f"{min(left)} to {max(left)}" if left else "no diagnostics",
        ),
        Check("no errors", int(last["errors"]) == 0 and not levels, f"{last['errors']} errors; {dict(levels)}"),
        Check("stamps never go back", _sorted(heard.masks), f"{len(heard.masks)} masks"),
    ]


def _sorted(masks: Sequence[tuple[float, int, Mapping[int, int]]]) -> bool:
    stamps = [stamp for _, stamp, _ in sorted(masks, key=lambda mask: mask[0])]
    return stamps == sorted(stamps)


def judge_figures(heard: Heard, plan: Plan) -> list[Check]:
    """What only a long run on a quiet machine can show: growth and ages."""
    ages, inference = ages_and_inference(heard)
    kept = [sample for sample in heard.samples if sample["time"] - heard.samples[0]["time"] >= plan.warm_up]
    memory = growth([sample["time"] for sample in kept], [sample["resident"] for sample in kept])
    checks = [
        Check(
            f"resident memory grows less than {MOST_GROWTH:.0%}",
            max(memory["line"], memory["ends"]) < MOST_GROWTH,
            f"{memory['begin']:.0f} to {memory['end']:.0f} MB, {memory['ends']:+.2%}; by a line {memory['line']:+.2%}",
        )
    ]
    for key in ("descriptors", "threads", "shared_files"):
        # Visitors bring some with them: what is there while there are none counts.
        quarter = max(1, len(kept) // 4)
        first, last = (min(sample[key] for sample in part) for part in (kept[:quarter], kept[-quarter:]))
        checks.append(Check(f"{key.replace('_', ' ')} do not grow", last <= first, f"{first:.0f} to {last:.0f}"))
    p50, p99 = np.quantile(ages, (0.5, 0.99))
    checks.append(
        Check(
            f"age p99 is at most {MOST_INFERENCES:g} inferences",
            bool(p99 <= MOST_INFERENCES * inference),
            f"p50 {1e3 * p50:.0f} ms, p99 {1e3 * p99:.0f} ms, {p99 / inference:.2f} of {1e3 * inference:.0f} ms",
        )
    )
    return checks


def ages_and_inference(heard: Heard) -> tuple[np.ndarray, float]:
    """Every mask's age as it was published, and the median inference, in seconds."""
    ages = np.array([sent - 1e-9 * stamp for sent, stamp, _ in heard.masks])
    return ages, float(np.median(np.concatenate(heard.timings)[:, 2])) / 1e3


def figures(heard: Heard, plan: Plan) -> dict[str, Any]:
    """What happened, in numbers."""
    ages, inference = ages_and_inference(heard)
    answered = [answer for answer in heard.located if answer["success"]]
    seconds = [answer["seconds"] for answer in answered]
    return {
        "plan": asdict(plan),
        "masks": len(heard.masks),
        "label_infos": len(heard.infos),
        "ids_used": len({number for _, names in heard.infos for number in names}),
        "names_told": len({name for _, names in heard.infos for name in names.values()}),
        "ids_that_changed_hands": hands_changed(heard.infos),
        "overlays": heard.overlays,
        "done": dict(sorted(heard.done.items())),
        "located": dict(Counter(f"{answer['kind']}, success {answer['success']}" for answer in heard.located)),
        "not_located": dict(Counter(a["message"] for a in heard.located if not a["success"]).most_common(12)),
        "locate_p50_ms": 1e3 * float(np.quantile(seconds, 0.5)) if seconds else None,
        "locate_p99_ms": 1e3 * float(np.quantile(seconds, 0.99)) if seconds else None,
        "infer_p50_ms": 1e3 * inference,
        "age_p50_ms": 1e3 * float(np.quantile(ages, 0.5)),
        "age_p99_ms": 1e3 * float(np.quantile(ages, 0.99)),
        "age_most_ms": 1e3 * float(ages.max()),
        "diagnostics": dict(
            Counter(f"{level} {message[:60]}" for _, level, message, _ in heard.figures).most_common(12)
        ),
        "last_figures": heard.figures[-1][3],
    }


def hands_changed(infos: Sequence[tuple[float, Mapping[int, str]]]) -> int:
    """How often an id went to another name."""
    owners: dict[int, str] = {}
    count = 0
    for _, names in sorted(infos, key=lambda info: info[0]):
        for number, name in names.items():
            count += number != 0 and owners.get(number, name.casefold()) != name.casefold()
            owners[number] = name.casefold()
    return count


def draw(heard: Heard, plan: Plan, path: Path) -> None:
    """A picture of the run: memory, ages, descriptors and threads over time. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    start = heard.samples[0]["time"]
    times = [sample["time"] - start for sample in heard.samples]
    figure, (memory, ages, counts) = pyplot.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    for key, text in (("resident", "all in RAM"), ("own", "its own"), ("shared", "shared with others")):
        memory.plot(times, [sample[key] for sample in heard.samples], label=text)
    memory.axvline(plan.warm_up, color="grey", linestyle=":")
    memory.set(ylabel="MB", ylim=(0, None))
    memory.legend(loc="center right")
    ages.plot([sent - start for sent, _, _ in heard.masks], 1e3 * ages_and_inference(heard)[0], ".", markersize=2)
    ages.axhline(MOST_INFERENCES * 1e3 * ages_and_inference(heard)[1], color="grey", linestyle=":")
    ages.set(ylabel="age of masks, ms", ylim=(0, None))
    for key in ("descriptors", "threads", "shared_files"):
        counts.plot(times, [sample[key] for sample in heard.samples], label=key.replace("_", " "))
    counts.set(xlabel="s", ylim=(0, None))
    counts.legend(loc="center right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def soak(domain: int, plan: Plan, logs: Path, progress: Callable[[float], None] = lambda seconds: None) -> Heard:
    """Start a node, a camera and a listener in a ROS domain, carry the plan out, end them."""
    with running_bench(domain, id_reuse_delay=plan.id_reuse_delay, cache_dir=str(logs / "cache")) as bench:
        return Soak(bench, ros_environment(domain), plan, logs).run(progress)


def main(
    seconds: Annotated[float, typer.Option(min=10.0)] = 720.0,
    warm_up: Annotated[
        float, typer.Option(min=1.0, help="Seconds at the beginning that memory is not judged by.")
    ] = 120.0,
    rate: Annotated[float, typer.Option(min=0.1, help="Of the camera, images a second.")] = 30.0,
    id_reuse_delay: Annotated[float, typer.Option(min=0.0, help="The node's parameter.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of what happens.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path("build/soak"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on the last line.")] = False,
) -> None:
    """Run the embedded pair at full rate while everything changes, and say what grew or went wrong."""
    from nerve_ros.demo.processes import own_domain

    console, load = PlainConsole(stderr=as_json), os.getloadavg()[0]
    # As many new names as ids come free: one more and vocabularies are rightly refused.
    fresh = max(1, min(10, int(180 / (id_reuse_delay + 10.0))))
    plan = Plan(seconds, warm_up, rate=rate, id_reuse_delay=id_reuse_delay, fresh=fresh, seed=seed)
    claim([out / "soak.json", out / "soak.png"])
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        domain = stack.enter_context(own_domain())
        status = stack.enter_context(console.status("starting"))
        heard = soak(domain, plan, out, lambda passed: status.update(f"{passed:.0f} of {seconds:.0f} s"))
    checks = judge(heard, plan) + judge_figures(heard, plan)
    found = {"load": load, **figures(heard, plan), "checks": [asdict(check) for check in checks]}
    write(out / "soak.json", json.dumps({**found, "samples": heard.samples, "wrong": heard.wrong}))
    try:
        with writing(out / "soak.png") as picture:
            draw(heard, plan, picture)
    except ImportError:
        console.print("no picture: it needs matplotlib")
    table = Table(title=f"{seconds:.0f} s; load average at the start {load:.1f}", title_justify="left")
    for column in ("", "holds", "found"):
        table.add_column(column)
    for check in checks:
        table.add_row(check.name, "yes" if check.holds else "NO", check.found)
    console.print(table)
    console.print_json(
        json.dumps({key: value for key, value in found.items() if key not in ("checks", "last_figures")})
    )
    if as_json:
        print(json.dumps(found))
    if not all(check.holds for check in checks):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
