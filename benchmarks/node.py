"""The node's own cost of an image over real DDS: from its arrival to the last message about it, less inference.

`python -m nerve_benchmarks.node`, or `python -m benchmarks.node` in a clone's top folder. The camera, the node and
the listener are processes of their own in a ROS domain of their own. The pieces serve the other benchmarks of the
node too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import patch

import numpy as np
import typer
from rich.table import Table

from nerve_core.console import PlainConsole

if TYPE_CHECKING:
    from rclpy.subscription import MessageInfo

SIZES = ((640, 480), (1920, 1080), (3840, 2160))
TARGETS_MS = {(640, 480): 2.0, (1920, 1080): 6.0}
"""What the p50 of an rgb8 image may cost on two cores, by (width, height)."""
NAMES = ("ball", "ladder", "chair", "mug", "cone")
SCENES = 4
"""Different images that the camera publishes in turn."""
PATIENCE = 180.0
"""Seconds that anything may take on a slow and busy machine, loading the model pair included."""


def ros_environment(domain: int) -> dict[str, str]:
    """This process's environment for ROS domain `domain`, on this machine alone, with room for large images."""
    from ament_index_python.packages import get_package_share_directory

    profile = str(Path(get_package_share_directory("nerve_ros")) / "config" / "fastdds.xml")
    made = os.environ | {
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "FASTDDS_DEFAULT_PROFILES_FILE": profile,
        "PYTHONUNBUFFERED": "1",
    }
    if made.get("ROS_DISTRO") == "jazzy":
        made["FASTRTPS_DEFAULT_PROFILES_FILE"] = profile
    return made


class Child:
    """A process that runs a function of these benchmarks; asked to end when closed."""

    def __init__(self, env: Mapping[str, str], run: str, *arguments: str, log: Path) -> None:
        module, _, function = run.partition(":")
        code = f"import sys; from {module} import {function}; sys.exit({function}())"
        with log.open("wb") as written:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                env=dict(env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=written,
                text=True,
            )
        assert self.process.stdin is not None  # it is a pipe, as the next one is
        assert self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self.log = log
        self._answers: list[dict[str, Any]] = []
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._stdout:
            with suppress(ValueError), self._news:
                self._answers.append(json.loads(line))
                self._news.notify_all()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Its answer to one line of JSON. Raises RuntimeError where none comes."""
        with self._news:
            self._answers.clear()
            self._stdin.write(json.dumps(command) + "\n")
            self._stdin.flush()
            if not self._news.wait_for(lambda: self._answers, PATIENCE):
                raise RuntimeError(f"no answer to {command}; the end of its log:\n{self.last_lines()}")
            return self._answers.pop()

    def last_lines(self, count: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def close(self) -> None:
        """Ask it to end and wait until it has; killed only where it does not."""
        with suppress(OSError):
            self._stdin.close()
        self.process.terminate()
        try:
            self.process.wait(30.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def recorded_node() -> int:
    """The node itself, which reports on request what every image since the last request took, and its threads.

    A row is (latency, convert, infer, publish) in ms: latency from the arrival in the callback to the last message.
    """
    from nerve_ros import health, node, worker

    rows: list[tuple[float, ...]] = []
    workers: list[int] = []
    segmented, run = health.Health.segmented, worker.Worker._run

    def record(self: health.Health, *, latency: float, stages_ms: Mapping[str, float], **more: Any) -> None:
        rows.append((1e3 * latency, *(stages_ms[stage] for stage in ("convert", "infer", "publish"))))
        segmented(self, latency=latency, stages_ms=stages_ms, **more)

    def named(self: worker.Worker) -> None:
        workers.append(threading.get_native_id())
        run(self)

    output = os.dup(1)
    os.dup2(2, 1)  # the log goes with the errors, what is written here is read by a program

    def respond() -> None:
        for line in sys.stdin:
            if json.loads(line)["do"] == "threads":
                answer: dict[str, Any] = {"receiving": os.getpid(), "worker": workers[0]}
            else:
                answer = {"rows": rows[:]}
                rows.clear()
            os.write(output, (json.dumps(answer) + "\n").encode())

    threading.Thread(target=respond, daemon=True).start()
    with patch.object(health.Health, "segmented", record), patch.object(worker.Worker, "_run", named):
        return node.main()


def camera() -> int:
    """Publishes drawn scenes in turn, stamped with the time of their publishing, by commands that are lines of JSON.

    {"do": "start", "size": [width, height], "encoding": "rgb8", "rate": 4.0}, {"do": "stop"} -> images and rate.
    """
    import rclpy
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import CompressedImage, Image

    rclpy.init()
    ros = rclpy.create_node("camera")
    qos = QoSProfile(depth=2, reliability=ReliabilityPolicy.BEST_EFFORT, durability=DurabilityPolicy.VOLATILE)
    plain = ros.create_publisher(Image, "image", qos)
    compressed = ros.create_publisher(CompressedImage, "image/compressed", qos)
    sent, started, stop = 0, 0.0, threading.Event()
    thread: threading.Thread | None = None

    def stream(publisher: Any, messages: Sequence[bytearray], rate: float) -> None:
        nonlocal sent
        due = time.monotonic()
        while not stop.wait(max(0.0, due - time.monotonic())):
            publish_stamped(publisher, messages[sent % len(messages)])
            sent += 1
            due = max(due + 1.0 / rate, time.monotonic() - 0.1)

    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "start":
            stop.clear()
            messages = [serialized_scene(seed, tuple(asked["size"]), asked["encoding"]) for seed in range(SCENES)]
            publisher = compressed if asked["encoding"] in ("jpeg", "png") else plain
            sent, started = 0, time.monotonic()
            thread = threading.Thread(target=stream, args=(publisher, messages, asked["rate"]), daemon=True)
            thread.start()
            answer = {}
        else:
            seconds = time.monotonic() - started
            stop.set()
            if thread is not None:
                thread.join()
            answer = {"sent": sent, "rate": sent / seconds}
        print(json.dumps(answer), flush=True)
    rclpy.try_shutdown()
    return 0


def serialized_scene(seed: int, size: tuple[int, int], encoding: str) -> bytearray:
    """A drawn scene as it goes over the wire; made once, so that the camera is not slower than the node."""
    import cv2
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import CompressedImage, Image

    from nerve_core.embedded.scenes import draw_scene

    image = cv2.resize(draw_scene(seed).image, size, interpolation=cv2.INTER_CUBIC)
    if encoding in ("jpeg", "png"):
        made = CompressedImage(format=encoding)
        made.data.frombytes(cv2.imencode(f".{encoding}", image[..., ::-1])[1].tobytes())
    else:
        made = Image(height=size[1], width=size[0], encoding=encoding, step=3 * size[0])
        made.data.frombytes(np.ascontiguousarray(image if encoding == "rgb8" else image[..., ::-1]).data)
    made.header.frame_id = "camera"
    return bytearray(serialize_message(made))


def publish_stamped(publisher: Any, message: bytearray) -> None:
    """Publish a message that begins with a header, as of now."""
    now = time.time_ns()
    message[4:12] = (now // 10**9).to_bytes(4, "little") + (now % 10**9).to_bytes(4, "little")  # after CDR's four bytes
    publisher.publish(bytes(message))


class Listener:
    """A ROS node `listener` on a thread of its own, in a context of its own: takes what the node publishes.

    ages: of masks, in seconds, from the image's stamp to the mask's publishing. figures: of the last diagnostics.
    received: how many diagnostics came.
    on_...: called with each message (and for masks with what DDS says of it), on that thread.
    """

    def __init__(self, domain: int) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
        from rclpy.qos import QoSProfile
        from rclpy.signals import SignalHandlerOptions
        from sensor_msgs.msg import Image

        from nerve_ros.msg import ClassConfidenceArray

        self.ages: list[float] = []
        self.figures: dict[str, str] = {}
        self.received = 0
        self.on_mask: Callable[[Any, MessageInfo], None] = lambda message, info: None
        self.on_confidence: Callable[[Any], None] = lambda message: None
        self.on_classes: Callable[[Any], None] = lambda message: None
        self.on_diagnostics: Callable[[Any], None] = lambda message: None
        self.context = rclpy.Context()
        rclpy.init(args=[], context=self.context, domain_id=domain, signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node("listener", context=self.context)
        deep = QoSProfile(depth=200)
        subscribe = self.node.create_subscription
        subscribe(Image, "segmentation/mask", self._on_mask, deep)
        subscribe(Image, "segmentation/confidence", lambda message: self.on_confidence(message), deep)
        subscribe(ClassConfidenceArray, "segmentation/class_confidence", lambda message: self.on_classes(message), deep)
        subscribe(DiagnosticArray, "/diagnostics", self._on_diagnostics, deep)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)

        def spin() -> None:
            with suppress(ExternalShutdownException):
                self._executor.spin()

        self._thread = threading.Thread(target=spin, daemon=True)
        self._thread.start()

    def give_up(self, subscription: Any) -> None:
        """Destroy one between two callbacks: while the executor waits for it, it would end the spinning."""
        self._executor.create_task(self.node.destroy_subscription, subscription)

    def close(self) -> None:
        """Stop listening."""
        self._executor.shutdown(timeout_sec=5.0)
        self._thread.join(5.0)
        self.node.destroy_node()
        self.context.try_shutdown()

    def fresh_figures(self, fits: Callable[[dict[str, str]], bool] = lambda figures: True) -> dict[str, str]:
        """The next diagnostics from now on that fit. Raises RuntimeError where none do for a long time."""
        before = self.received
        wait_for(lambda: self.received > before + 1 and fits(self.figures), "diagnostics that fit")
        return dict(self.figures)

    def _on_mask(self, message: Any, info: MessageInfo) -> None:
        stamp = message.header.stamp
        self.ages.append(1e-9 * (info["source_timestamp"] - stamp.sec * 10**9 - stamp.nanosec))
        self.on_mask(message, info)

    def _on_diagnostics(self, message: Any) -> None:
        for status in message.status:
            self.figures = {pair.key: pair.value for pair in status.values}
            self.received += 1
        self.on_diagnostics(message)


def wait_for(condition: Callable[[], object], what: str, children: Sequence[Child] = ()) -> None:
    """Return once `condition` holds. Raises RuntimeError where it does not, or where a child has ended meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        for child in children:
            if child.process.poll() is not None:
                raise RuntimeError(f"ended with {child.process.returncode}:\n{child.last_lines()}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {what} within {PATIENCE:.0f} s")
        time.sleep(0.05)


@dataclass(frozen=True)
class Bench:
    """The node with its recorder, a camera, and a listener in this process, all in one ROS domain."""

    node: Child
    camera: Child
    listener: Listener

    def timings(self) -> np.ndarray:
        """[images, 4]: latency, convert, infer and publish in ms of every image since this was asked last."""
        return np.array(self.node.ask(do="rows")["rows"], float).reshape(-1, 4)

    def inference_ms(self, size: tuple[int, int], encoding: str = "rgb8", images: int = 6) -> float:
        """Median inference time of an image of this size, one at a time."""
        self.timings()
        self.camera.ask(do="start", size=size, encoding=encoding, rate=1.0)
        gathered = np.empty((0, 4))
        deadline = time.monotonic() + PATIENCE
        while len(gathered) < images:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(gathered)} of {images} images of {size} came through")
            time.sleep(0.2)
            gathered = np.concatenate([gathered, self.timings()])
        self.camera.ask(do="stop")
        return float(np.median(gathered[1:, 2]))


@contextmanager
def running_bench(domain: int, **parameters: Any) -> Iterator[Bench]:
    """The node with these parameters, active; everything is ended at the end."""
    env = ros_environment(domain)
    os.environ.update({name: env[name] for name in ("ROS_AUTOMATIC_DISCOVERY_RANGE", "FASTDDS_DEFAULT_PROFILES_FILE")})
    given = {"vocabulary": list(NAMES), **parameters}
    overrides = [text for name, value in given.items() for text in ("-p", f"{name}:={json.dumps(value)}")]
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(name: str, *arguments: str) -> Child:
            child = Child(env, f"{__package__}.node:{name}", *arguments, log=logs / f"{name}.log")
            stack.callback(child.close)
            return child

        node = start("recorded_node", "--ros-args", *overrides)
        camera_process = start("camera")
        listener = Listener(domain)
        stack.callback(listener.close)
        wait_for(lambda: listener.figures.get("state") == "active", "active node", (node, camera_process))
        yield Bench(node, camera_process, listener)


@contextmanager
def watched(listener: Listener, watched: bool) -> Iterator[None]:
    """While this lasts, the overlay has a subscriber, if `watched`."""
    from rclpy.qos import QoSProfile
    from sensor_msgs.msg import Image

    if not watched:
        yield
        return
    topic = listener.node.create_subscription(Image, "segmentation/overlay", lambda message: None, QoSProfile(depth=1))
    try:
        yield
    finally:
        listener.give_up(topic)


def cost(bench: Bench, size: tuple[int, int], encoding: str, overlay: bool, images: int) -> dict[str, Any]:
    """What the node itself adds to inference, in ms, of so many images that come slower than they are segmented."""
    inference = bench.inference_ms(size, encoding)
    with watched(bench.listener, overlay):
        bench.camera.ask(do="start", size=size, encoding=encoding, rate=min(4.0, 0.6e3 / inference))
        rows: np.ndarray = np.empty((0, 4))
        while len(rows) < images + 2:
            time.sleep(0.5)
            rows = np.concatenate([rows, bench.timings()])
        bench.camera.ask(do="stop")
    rows = rows[2:]  # the first may have waited for buffers that are made once
    own = rows[:, 0] - rows[:, 2]
    return {
        "size": list(size),
        "encoding": encoding,
        "overlay": overlay,
        "images": len(rows),
        "p50_ms": float(np.quantile(own, 0.5)),
        "p95_ms": float(np.quantile(own, 0.95)),
        "convert_ms": float(np.median(rows[:, 1])),
        "publish_ms": float(np.median(rows[:, 3])),
        "rest_ms": float(np.median(own - rows[:, 1] - rows[:, 3])),
        "infer_ms": float(np.median(rows[:, 2])),
        "target_ms": TARGETS_MS.get(size) if encoding == "rgb8" and not overlay else None,
    }


def main(
    images: Annotated[int, typer.Option(min=5, help="Images timed for each row.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on the last line.")] = False,
) -> None:
    """Time what the node adds to inference: receiving's end, conversion, ids, messages, publishing."""
    from nerve_ros.demo.processes import own_domain

    console, load, found = PlainConsole(stderr=as_json), os.getloadavg()[0], []
    with own_domain() as domain:
        for transport, kinds in (
            ("raw", (("rgb8", False), ("bgr8", False), ("rgb8", True))),
            ("compressed", (("jpeg", False),)),
        ):
            with running_bench(domain, image_transport=transport) as bench:
                for encoding, overlay in kinds:
                    for size in SIZES:
                        with console.status(f"{size[0]} x {size[1]} {encoding}"):
                            found.append(cost(bench, size, encoding, overlay, images))
    table = Table(title=f"The node's own ms of an image; load average at the start {load:.1f}", title_justify="left")
    for column in ("image", "p50", "p95", "convert", "publish", "rest", "inference", "target p50"):
        table.add_column(column, justify="left" if column == "image" else "right")
    for row in found:
        name = f"{row['size'][0]} x {row['size'][1]} {row['encoding']}{', overlay' if row['overlay'] else ''}"
        times = [f"{row[key]:.1f}" for key in ("p50_ms", "p95_ms", "convert_ms", "publish_ms", "rest_ms", "infer_ms")]
        table.add_row(name, *times, "" if row["target_ms"] is None else f"{row['target_ms']:.0f}")
    console.print(table)
    if as_json:
        print(json.dumps({"load": load, "rows": found}))


if __name__ == "__main__":
    typer.run(main)
