"""Plays a recording to a running node and measures its masks, for `nerve replay --live`.

The images of a bag go out over DDS at the bag's own pace, with their own stamps and
with /clock, as `ros2 bag play --clock` sends them; the masks that come back are timed, and compared with those that
the offline replay makes of the same images by the node's own parameters.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from builtin_interfaces.msg import Time
from rclpy.parameter import parameter_value_to_python
from rclpy.parameter_client import AsyncParameterClient
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from nerve_core.images.encodings import ImageError, ValueRange, to_rgb
from nerve_core.replay.frames import Frame, Losses, Selection, key, read_messages, stamp_of
from nerve_core.replay.messages import COMPRESSED_IMAGE, IMAGE
from nerve_core.replay.reading import Bag
from nerve_core.report.data import Live
from nerve_core.text.vocabulary import BACKGROUND, UNLABELLED, Vocabulary
from nerve_ros.demo.collector import NODE, Collector, Heard
from nerve_ros.demo.player import CAMERA, Player, PlayerError
from nerve_ros.demo.processes import Child, environment, node_command, own_domain
from nerve_ros.demo.schedule import Asking
from nerve_ros.images import rgb8_message
from nerve_ros.parameters import FIELDS, NodeConfig, from_ros

if TYPE_CHECKING:
    from nerve_core.segmenter import Segmentation, Segmenter

STARTING = 600.0
"""Seconds that a node that is started here may take until it is active, on a slow and busy machine."""
THERE = 30.0
"""Seconds that a node that runs already may take to be seen."""
LATE = 120.0
"""Seconds without a new mask, after the last image, until nothing more is waited for."""
CLOCK_RATE = 40.0
"""Messages on /clock a second, as of `ros2 bag play --clock`."""
SAMPLE = 0.2
"""Seconds between two looks at the node's memory."""


class LiveError(RuntimeError):
    """A node cannot be measured; the text says why, and what to do."""


@dataclass(frozen=True)
class Rig:
    """Which node, and how it is played to.

    rate: of playing, 1 is the bag's own. pid: of the node's process, for its CPU and memory; 0 is not known. start: the
    parameters of a node that is to be started here, in a ROS domain of its own; None where one runs already.
    """

    namespace: str = "/"
    rate: float = 1.0
    pid: int = 0
    start: dict[str, object] | None = None

    def __post_init__(self) -> None:
        if not 0.01 <= self.rate <= 100.0:
            raise ValueError(f"rate is {self.rate:g}; accepted: 0.01 to 100")
        if self.start is not None and self.pid:
            raise ValueError("the process of a node that is started here is known: leave out its number")


@dataclass
class Played:
    """What went out and what came back. published: time of publishing (steady clock) by stamp, in order.

    cpu: cores, in the mean over the play; memory_mb: resident, at its greatest; None where the process is not known.
    """

    topic: str
    rate: float
    config: NodeConfig
    published: dict[int, float] = field(default_factory=dict)
    heard: Heard = field(default_factory=Heard)
    cpu: float | None = None
    memory_mb: float | None = None

    def vocabulary(self, asked: Vocabulary) -> Vocabulary:
        """`asked`, with the negatives and the background's name that the node goes by."""
        negatives = self.config.make_vocabulary().negatives
        return Vocabulary(asked.entries, negatives=negatives, background_name=self.config.background_name)

    def load(self) -> Segmenter:
        """A segmenter by the node's own parameters, with as many threads as the node has."""
        import torch

        from nerve_core.models.loading import quiet_libraries
        from nerve_core.segmenter import Segmenter

        quiet_libraries()
        # Sums round differently with another number of threads.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) - 1)))
        config = self.config
        segmenter = Segmenter.from_pretrained(
            config.model,
            device=config.device,
            dtype=None if config.precision == "auto" else config.precision,
            preset=config.preset,
            revision=config.revision or None,
            cache_dir=config.cache_dir or None,
            offline=True if config.offline else None,
            settings=config.load_settings() | config.frame_settings(),
            compile=config.compile,
        )
        if segmenter.settings.walk.previous_frame_start:
            raise LiveError(
                "the node's masks depend on the images before (previous_frame_start), and which of them it dropped "
                "offline cannot tell: masks cannot be compared"
            )
        return segmenter


def play(
    path: Path, selection: Selection, vocabulary: Vocabulary, rig: Rig, log: Path, say: Callable[[str], None]
) -> Played:
    """Play the images of `selection`, of one topic, to a node, and collect its masks.

    log: of a node that is started here. say: called with what is going on. Raises LiveError and ValueError.
    """
    if len(selection.topics) != 1:
        raise ValueError("one camera at a time is played to a node; give one --image-topic")
    with ExitStack() as stack:
        pid = rig.pid
        env = environment(None if rig.start is None else stack.enter_context(own_domain()))
        child = None
        if rig.start is not None:
            child = Child("node", node_command(**rig.start), env, log)
            stack.callback(child.end)
            pid = child.pid
        os.environ.update(env)  # before anything of DDS is made here
        say("waiting for the node")
        try:
            collector = Collector(rig.namespace)
        except Exception as error:
            raise ValueError(f"--namespace {rig.namespace!r} cannot be used ({error}); write it like /front") from error
        stack.callback(collector.close)
        _wait_until_active(collector, child, rig)
        with open(os.devnull, "w") as nowhere:
            player = LivePlayer(nowhere, rig.namespace)
            stack.callback(player.close)
            played = Played(selection.topics[0], rig.rate, player.parameters())
            player.offer(played.config.image_transport)
            asking = Asking(0.0, vocabulary.entries)
            say("asking for the names")
            player.ask(asking)
            try:
                player.wait_for_listener(asking, THERE if child is None else STARTING)
            except PlayerError as error:
                raise LiveError(f"the node does not take what is asked for: {error}{_end_of(child)}") from error
            say("playing")
            with Bag(path) as bag, _watched(pid, played):
                player.play_bag(bag, selection, played, lambda: _check(child))
                say("waiting for the last mask")
                _wait_for_the_last(collector, played, child)
        played.heard = collector.heard()
        if played.memory_mb is None and played.heard.values.get("memory_mb"):
            played.memory_mb = float(played.heard.values["memory_mb"])
    if not played.published:
        raise LiveError(f"no image of {played.topic} could be played")
    return played


class LivePlayer(Player):
    """The demonstration's player, for any bag: its images go out as they were recorded where the node takes them so."""

    def offer(self, transport: str) -> None:
        """Publish what the node's parameter image_transport says it reads."""
        self._compressed = transport == "compressed"
        self._value_range = ValueRange()
        if self._compressed:
            self._node.destroy_publisher(self._image)
            self._image = self._node.create_publisher(CompressedImage, "image/compressed", CAMERA)
        reliable = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        self._clock = self._node.create_publisher(Clock, "/clock", reliable)

    def parameters(self) -> NodeConfig:
        """The node's parameters. Raises LiveError where it does not answer."""
        client = AsyncParameterClient(self._node, NODE)
        if not client.wait_for_services(THERE):
            raise LiveError(f"the node {NODE} does not tell its parameters")
        asked = client.get_parameters(list(FIELDS))
        deadline = time.monotonic() + THERE
        while (answer := asked.result() if asked.done() else None) is None:
            if time.monotonic() > deadline:
                raise LiveError(f"the node {NODE} gave no answer about its parameters within {THERE:.0f} s")
            time.sleep(0.01)
        values = [parameter_value_to_python(value) for value in answer.values]
        return from_ros(dict(zip(FIELDS, values, strict=True)))

    def play_bag(self, bag: Bag, selection: Selection, played: Played, check: Callable[[], None]) -> None:
        """Publish every image at its time, with its own stamp, and /clock. check: called before each; may raise."""
        begun: tuple[float, int] | None = None
        ended, ticking = threading.Event(), None
        try:
            for _, stored, message in read_messages(bag, selection, [Losses()]):
                data = self._message(stored.kind, stored.data, message, ros1=bag.ros1)
                stamp = stamp_of(message)
                if data is None:
                    continue
                if stamp in played.published:
                    raise LiveError(f"two images have the stamp {stamp}: which mask is of which cannot be told")
                if begun is None:
                    begun = time.monotonic(), stored.time
                    ticking = threading.Thread(target=self._tick, args=(*begun, played.rate, ended), daemon=True)
                    ticking.start()
                check()
                self._sleep(begun[0] + (stored.time - begun[1]) * 1e-9 / played.rate - time.monotonic())
                played.published[stamp] = time.monotonic()
                self._image.publish(data)
        finally:
            ended.set()
            if ticking is not None:
                ticking.join()

    def _tick(self, begun: float, first: int, rate: float, ended: threading.Event) -> None:
        while True:
            now = first + round((time.monotonic() - begun) * rate * 1e9)
            self._clock.publish(Clock(clock=Time(sec=now // 10**9, nanosec=now % 10**9)))
            if ended.wait(1 / CLOCK_RATE):
                return

    def _message(self, kind: str, data: bytes, message: Any, *, ros1: bool) -> bytes | Image | CompressedImage | None:
        """What goes out: the bytes as they were recorded, or else the pixels; None for an image that cannot be read."""
        if kind == (COMPRESSED_IMAGE if self._compressed else IMAGE) and not ros1:
            return data
        stamp = Time(sec=message.header.stamp.sec, nanosec=message.header.stamp.nanosec)
        header = Header(stamp=stamp, frame_id=message.header.frame_id)
        if kind == COMPRESSED_IMAGE and self._compressed:
            made = CompressedImage(header=header, format=message.format)
            made.data.frombytes(message.data.tobytes())
            return made
        if self._compressed:
            raise LiveError(
                "the node reads compressed images, and the bag has raw ones; start it with image_transport raw"
            )
        try:
            return rgb8_message(header, to_rgb(message, self._value_range))
        except ImageError:
            return None


class Comparison:
    """Live masks beside the offline ones of the same frames, by stamp; labels are matched by name."""

    def __init__(self, played: Played, vocabulary: Vocabulary) -> None:
        self._answers = played.heard.answers
        labels = {key(name): label for label, name in enumerate(vocabulary.names, 1)}
        # Whatever is not in the vocabulary would differ everywhere: no label of it is below.
        self._table = np.full(256, UNLABELLED - 1, np.uint8)
        for number, name in played.heard.classes.items():
            self._table[number] = BACKGROUND if number == BACKGROUND else labels.get(key(name), UNLABELLED - 1)
        self._table[UNLABELLED] = UNLABELLED
        self.compared = 0
        self.different: list[tuple[int, float]] = []
        self._frames = 0

    def see(self, frame: Frame, found: Segmentation) -> None:
        """Compare one frame's offline mask with the live one, where there is one."""
        number, self._frames = self._frames, self._frames + 1
        answer = self._answers.get(frame.stamp)
        if answer is None or not answer.mask:
            return
        self.compared += 1
        live = self._table[answer.labels]
        share = 1.0 if live.shape != found.labels.shape else float((live != found.labels).mean())
        if share:
            self.different.append((number, share))


def figures(played: Played, comparison: Comparison) -> Live:
    """What a robot would have seen."""
    arrived = {
        stamp: answer.arrived
        for stamp, answer in played.heard.answers.items()
        if answer.mask and stamp in played.published
    }
    ages = [1e3 * (moment - played.published[stamp]) for stamp, moment in arrived.items()]
    p50, p95, p99 = (float(value) for value in np.percentile(ages, (50, 95, 99))) if ages else (None, None, None)
    gaps = np.diff(sorted(arrived.values()))
    return Live(
        topic=played.topic,
        rate=played.rate,
        published=len(played.published),
        masks=len(arrived),
        dropped=len(played.published) - len(arrived),
        age_p50_ms=p50,
        age_p95_ms=p95,
        age_p99_ms=p99,
        jitter_ms=float(1e3 * gaps.std()) if len(gaps) > 1 else None,
        cpu=played.cpu,
        memory_mb=played.memory_mb,
        compared=comparison.compared,
        equal=comparison.compared - len(comparison.different),
        different=tuple(comparison.different),
    )


def _wait_until_active(collector: Collector, child: Child | None, rig: Rig) -> None:
    patience = THERE if child is None else STARTING
    deadline = time.monotonic() + patience
    while (heard := collector.heard()).state != "active":
        _check(child)
        if time.monotonic() > deadline:
            who = f"{rig.namespace.rstrip('/')}/{NODE}"
            state = heard.state or "not there"
            domain = os.environ.get("ROS_DOMAIN_ID", "0")
            raise LiveError(
                f"the node {who} in domain {domain} is {state} after {patience:.0f} s; start it and activate it, or "
                f"have it started by --start-node{_end_of(child)}"
            )
        time.sleep(0.05)


def _wait_for_the_last(collector: Collector, played: Played, child: Child | None) -> None:
    """Until the last image is answered, which no newer one replaces, or nothing comes any more."""
    if not played.published:
        return
    last, count, since = next(reversed(played.published)), -1, time.monotonic()
    while True:
        _check(child)
        answers = collector.heard().answers
        if last in answers and answers[last].mask:
            return
        if len(answers) != count:
            count, since = len(answers), time.monotonic()
        if time.monotonic() - since > LATE:
            return
        time.sleep(0.05)


def _check(child: Child | None) -> None:
    if child is not None and child.returncode is not None:
        raise LiveError(f"the node ended with {child.returncode}{_end_of(child)}")


def _end_of(child: Child | None) -> str:
    return "" if child is None else f"; the end of {child.log}:\n{child.last_lines()}"


@contextmanager
def _watched(pid: int, played: Played) -> Iterator[None]:
    """Measures the process meanwhile: cores used, and resident memory at its greatest."""
    if not pid:
        yield
        return
    if not Path(f"/proc/{pid}").is_dir():
        raise LiveError(f"there is no process {pid} on this machine; --node-pid is the number of the node's")
    ended, greatest = threading.Event(), [0.0]

    def look() -> None:
        while not ended.wait(SAMPLE):
            greatest[0] = max(greatest[0], _resident_mb(pid))

    watching = threading.Thread(target=look, daemon=True)
    began, used = time.monotonic(), _processor_seconds(pid)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
        if Path(f"/proc/{pid}").is_dir():
            played.cpu = (_processor_seconds(pid) - used) / max(time.monotonic() - began, 1e-3)
            played.memory_mb = max(greatest[0], _resident_mb(pid))


def _processor_seconds(pid: int) -> float:
    """User and system time of a process since it began, all its threads together."""
    # The second field, its name, may hold anything but ends with the last parenthesis.
    values: Sequence[str] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:  # it has ended meanwhile
        return 0.0
