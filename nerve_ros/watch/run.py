"""Behind the way message -> ... -> message: what the node publishes, for people without RViz.

:class:`Watcher` subscribes, :class:`Board` holds the newest of everything, :class:`Page` shows it to browsers and
:func:`table` in the terminal. All text on the board comes from the network: it is shortened and made printable on its
way in, the page sets it as text and never as HTML, and the terminal gets no escape sequence.
"""

from __future__ import annotations

import base64
import errno
import ipaddress
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.exceptions import NameValidationException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.validate_namespace import validate_namespace
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sensor_msgs.msg import Image
from vision_msgs.msg import LabelInfo

from nerve_core.images.visualize import palette
from nerve_ros.images import ImageError, to_rgb
from nerve_ros.msg import ClassConfidenceArray

PATIENCE = 2.0
"""Seconds without anything new after which what is shown is called stale, unless it always comes as slowly."""
SIDE = 1920
"""Pixels that the longer side of a picture has on the page at most."""
ENTRIES = 255
"""Classes and diagnostic values that are taken from one message at most."""
WAIT = 1.0
"""Seconds that the page's question for a newer picture waits for one."""
LINGER = 3.0
"""Seconds after such a question in which the next one has to come; then nobody looks any more."""
RESULTS = 8
"""Results that wait for the picture of the same image."""
CONNECTIONS = 64
"""Connections that the page serves at once; further ones are closed."""
SPARE = 1 << 30
"""Bytes that `--save` leaves free on the disk."""
PLAIN_EVERY = 5.0
"""Seconds between two lines where the output is no terminal."""

_LIVE_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE)
_LATCHED_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
_LEVELS = {
    DiagnosticStatus.OK: "ok",
    DiagnosticStatus.WARN: "warn",
    DiagnosticStatus.ERROR: "error",
    DiagnosticStatus.STALE: "stale",
}
_STYLES = {"ok": "green", "warn": "yellow", "error": "bold red", "stale": "yellow"}


def run(*, namespace: str, host: str, port: int, save: Path | None, every: float) -> None:
    """Show what the node `nerve` of `namespace` publishes until SIGINT or SIGTERM.

    Raises ValueError where namespace, host, port or the folder `save` cannot be used as asked.
    """
    namespace = "/" + namespace.strip("/")
    try:
        validate_namespace(namespace)
    except NameValidationException as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--namespace {namespace!r} cannot be used, it is written like /front/left: {reason}"
        ) from None
    keeper = Keeper(save, every) if save else None
    # rclpy's handler, which ends the loop, calls the one before; Python's would raise wherever it happens to be.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    board = Board()
    page = Page(host, port, board)
    try:
        rclpy.init(args=[])
        _watch(namespace, board, page, keeper)
    finally:
        page.close()
        rclpy.try_shutdown()


def _watch(namespace: str, board: Board, page: Page, keeper: Keeper | None) -> None:
    watcher = Watcher(namespace, board, keeper)
    executor = SingleThreadedExecutor()
    executor.add_node(watcher)
    page.start()
    console = Console()
    console.print(f"watching {watcher.target}; the page is {page.url}", markup=False, highlight=False, soft_wrap=True)
    if not _is_loopback(page.host):
        console.print("whoever reaches this address sees what the camera sees", style="yellow")
    with Terminal(console, board) as terminal:
        try:
            while rclpy.ok():
                executor.spin_once(timeout_sec=0.1)
                watcher.look_after()
                terminal.refresh()
        except (ExternalShutdownException, RuntimeError):
            # Once the process is asked to end, whatever rclpy is asked for fails, and that is no news.
            if rclpy.ok():
                raise


class Board:
    """The newest of everything that is shown. Thread safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._news = threading.Condition()
        self._closed = False
        self._asked_at = -math.inf
        self._picture: _Picture | None = None
        self._pictures = _Arrivals(clock)
        self._results = _Arrivals(clock)
        self._classes: list[dict[str, Any]] = []
        self._classes_of: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._diagnostics: dict[str, Any] = {}
        self._told_at = -math.inf
        self.about: dict[str, Any] = {}
        self.reason = ""

    # Coming in.

    def picture(self, jpeg: bytes, stamp: tuple[int, int], pixels: int) -> None:
        """Take the picture of an image: its stamp and the number of its pixels before it was made smaller."""
        with self._news:
            self._pictures.add()
            self._picture = _Picture(self._pictures.count, jpeg, stamp, pixels)
            self._news.notify_all()

    def labels(self, named: list[tuple[int, str]]) -> None:
        """Take the classes that there are from now on; what was seen of new ones is not known yet."""
        with self._news:
            known = {(entry["id"], entry["name"]): entry for entry in self._classes}
            entries = [_entry(number, name) for number, name in named]
            self._classes = [known.get((entry["id"], entry["name"]), entry) for entry in entries]

    def result(self, classes: list[dict[str, Any]], stamp: tuple[int, int]) -> None:
        """Take what was seen of every class in the image of this stamp."""
        with self._news:
            self._classes = classes
            # Anew, so that the oldest is the first.
            self._classes_of.pop(stamp, None)
            self._classes_of[stamp] = classes
            if len(self._classes_of) > RESULTS:
                del self._classes_of[next(iter(self._classes_of))]
            self._results.add()

    def diagnostics(self, told: dict[str, Any]) -> None:
        """Take what the node tells about itself."""
        with self._news:
            self._diagnostics = told
            self._told_at = self._clock()

    def forget_picture(self) -> None:
        """There is no picture until the next one comes, which is waited for from now on."""
        with self._news:
            self._pictures.begin()
            self._picture = None

    def close(self) -> None:
        """Nothing will come any more: nobody is to wait for it."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    # Going out.

    @property
    def watched(self) -> bool:
        """Whether somebody looks at the pictures."""
        with self._news:
            return self._clock() - self._asked_at <= LINGER

    def quiet(self) -> tuple[float, float]:
        """Seconds that a result, and a picture, have been waited for in vain; 0 while they come as they should."""
        with self._news:
            return self._results.silence, self._pictures.silence

    def told(self) -> tuple[dict[str, Any], float]:
        """The last diagnostics (empty: none yet) and the seconds since."""
        with self._news:
            return self._diagnostics, self._clock() - self._told_at

    def newer(self, number: int) -> dict[str, Any]:
        """All of it with the newest picture in base64, once that is not `number`; without one after WAIT seconds."""
        with self._news:
            self._asked_at = self._clock()
            self._news.wait_for(lambda: self._closed or self._number != number, WAIT)
            self._asked_at = self._clock()
            status, jpeg = self._status(), self._picture.jpeg if self._picture and self._number != number else b""
        return {**status, "jpeg": base64.b64encode(jpeg).decode()}

    def status(self) -> dict[str, Any]:
        """All of it but the picture, as JSON has it. Classes are those of the picture while pictures come."""
        with self._news:
            return self._status()

    @property
    def _number(self) -> int:
        return self._picture.number if self._picture else 0

    def _status(self) -> dict[str, Any]:
        told, classes, picture = dict(self._diagnostics), self._classes, None
        if told:
            told["age"] = round(self._clock() - self._told_at, 1)
            told["stale"] = told["age"] > 2 * PATIENCE
        if self._picture:
            picture = {"number": self._number, "pixels": self._picture.pixels, **self._pictures.summary()}
            if not picture["stale"]:
                classes = self._classes_of.get(self._picture.stamp, classes)
        return {
            **self.about,
            "reason": self.reason,
            "fps": round(self._results.rate, 2),
            "picture": picture,
            "result": {"number": self._results.count, **self._results.summary()} if self._results.count else None,
            "classes": classes,
            "diagnostics": told,
        }


@dataclass(frozen=True)
class _Picture:
    number: int
    jpeg: bytes
    stamp: tuple[int, int]
    pixels: int


class _Arrivals:
    """When something came, how often, and whether it has stopped coming."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=200)
        self._begun = clock()
        self.count = 0

    def add(self) -> None:
        self._times.append(self._clock())
        self.count += 1

    def begin(self) -> None:
        """It is waited for from now on; the gap before says nothing of its pace."""
        self._begun = self._clock()

    @property
    def age(self) -> float:
        """Seconds since the last one."""
        return self._clock() - self._times[-1] if self._times else math.inf

    @property
    def silence(self) -> float:
        """Seconds that the next one has been waited for; 0 while that is no longer than usual."""
        waited = min(self.age, self._clock() - self._begun)
        return waited if waited > self._usual else 0.0

    @property
    def stale(self) -> bool:
        """Whether the last one is older than it should be by now."""
        return self.age > self._usual

    @property
    def rate(self) -> float:
        """How many came a second, lately."""
        if len(self._times) < 2 or self.stale:
            return 0.0
        recent = [moment for moment in self._times if self._clock() - moment <= 5.0]
        if len(recent) < 2:
            recent = list(self._times)[-2:]
        return (len(recent) - 1) / max(recent[-1] - recent[0], 1e-3)

    def summary(self) -> dict[str, Any]:
        """How old the last one is, for the page; there must be one."""
        return {"age": round(self.age, 1), "stale": self.stale}

    @property
    def _usual(self) -> float:
        last = [moment for moment in self._times if moment >= self._begun][-2:]
        return max(PATIENCE, 3 * (last[-1] - last[0]) if last else 0.0)


class Watcher(Node):
    """Subscribes to the node `nerve` of a namespace, and to its overlay only while somebody wants pictures."""

    def __init__(self, namespace: str, board: Board, keeper: Keeper | None) -> None:
        super().__init__(f"nerve_watch_{os.getpid()}", namespace=namespace, enable_rosout=False)
        self._board = board
        self._keeper = keeper
        self._overlay = None
        self._complaint = ""
        self._looked = -math.inf
        self.target = f"{namespace.rstrip('/')}/nerve"
        self._overlay_topic = self.resolve_topic_name("segmentation/overlay")
        self._results_topic = self.resolve_topic_name("segmentation/class_confidence")
        board.about = {"node": self.target, "topic": self._overlay_topic, "domain": self.context.get_domain_id()}
        self.create_subscription(ClassConfidenceArray, self._results_topic, self._on_result, _LIVE_QOS)
        self.create_subscription(LabelInfo, "segmentation/label_info", self._on_labels, _LATCHED_QOS)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def look_after(self) -> None:
        """Subscribe to the overlay or leave it, as viewers come and go; now and then look why nothing comes."""
        wanted = self._board.watched or (self._keeper is not None and not self._keeper.error)
        if wanted and self._overlay is None:
            self._board.forget_picture()
            self._overlay = self.create_subscription(Image, self._overlay_topic, self._on_overlay, _LIVE_QOS)
        elif not wanted and self._overlay is not None:
            self.destroy_subscription(self._overlay)
            self._overlay, self._complaint = None, ""
            # Whoever looks next is not to see what was there before.
            self._board.forget_picture()
        if time.monotonic() - self._looked >= 0.5:
            self._looked = time.monotonic()
            self._board.reason = printable(self._trouble(), 600)

    def _on_result(self, message: ClassConfidenceArray) -> None:
        self._board.result(
            [
                _entry(
                    seen.id,
                    seen.name,
                    presence=_share(seen.presence),
                    confidence=_share(seen.mean_probability),
                    area=seen.area,
                )
                for seen in message.classes[:ENTRIES]
            ],
            _stamp(message),
        )

    def _on_labels(self, message: LabelInfo) -> None:
        named = [(entry.class_id, entry.class_name) for entry in message.class_map[:ENTRIES]]
        self._board.labels([(number, name) for number, name in named if 0 < number < 255])

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        name = f"{self.target.lstrip('/')}: segmentation"
        for status in message.status:
            if status.name == name:
                self._board.diagnostics(
                    {
                        "level": _LEVELS.get(status.level, "error"),
                        "message": printable(status.message, 500),
                        "values": {printable(pair.key): printable(pair.value, 500) for pair in status.values[:ENTRIES]},
                    }
                )

    def _on_overlay(self, message: Image) -> None:
        try:
            image = to_rgb(message)
        except ImageError as error:
            self._complaint = f"a picture on {self._overlay_topic} cannot be shown: {error}"
            return
        self._complaint = ""
        height, width = image.shape[:2]
        if max(height, width) > SIDE:
            scale = SIDE / max(height, width)
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, 88))[1].tobytes()
        self._board.picture(jpeg, _stamp(message), height * width)
        if self._keeper is not None:
            self._keeper.keep(jpeg, "{}_{:09d}".format(*_stamp(message)))

    def _trouble(self) -> str:
        """What keeps the page from showing all that it should, in a sentence; empty while all is well."""
        if self._keeper is not None and self._keeper.error:
            return self._keeper.error
        no_results, no_pictures = self._board.quiet()
        if no_results:
            return self._why(self._results_topic, "nerve_ros/msg/ClassConfidenceArray", no_results)
        if self._overlay is not None and (self._complaint or no_pictures):
            return self._complaint or self._why(self._overlay_topic, "sensor_msgs/msg/Image", no_pictures)
        told, age = self._board.told()
        return told["message"] if told and told["level"] != "ok" and age <= 2 * PATIENCE else ""

    def _why(self, topic: str, message_type: str, silence: float) -> str:
        """Why nothing comes on a topic that is subscribed reliable and volatile, as far as this machine can tell."""
        told, age = self._board.told()
        current = told if age <= 2 * PATIENCE else {}
        state = current.get("values", {}).get("state", "")
        publishers = self.get_publishers_info_by_topic(topic)
        if not publishers:
            return f"nobody publishes on {topic}: {self._why_nobody(topic, message_type, current, state)}"
        for publisher in publishers:
            who = f"{publisher.node_namespace.rstrip('/')}/{publisher.node_name}"
            if publisher.topic_type != message_type:
                return f"{who} publishes {publisher.topic_type} on {topic}, where {message_type} is expected"
            if publisher.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT:
                return f"{who} publishes on {topic} with reliability best_effort, where reliable is expected"
        if state == "inactive":
            return f"{self.target} is inactive; ros2 lifecycle set {self.target} activate"
        if current and (current["level"] != "ok" or current["message"] != "active"):
            return current["message"]
        if told and not current:
            return f"{self.target} has told nothing for {age:.0f} s: it was ended, or it hangs"
        return f"nothing has come on {topic} for {silence:.0f} s"

    def _why_nobody(self, topic: str, message_type: str, current: dict[str, Any], state: str) -> str:
        name, namespace = "nerve", self.get_namespace()
        nodes = self.get_node_names_and_namespaces()
        if state == "unconfigured":
            return f"{self.target} is unconfigured; ros2 lifecycle set {self.target} configure"
        if state or (name, namespace) in nodes:
            stage = current.get("values", {}).get("stage", "")
            return f"{self.target} is {state or 'there and has told nothing yet'}{stage and f' ({stage})'}"
        suffix = topic[len(namespace.rstrip("/")) :]
        elsewhere = sorted(
            (other[: -len(suffix)] or "/")
            for other, types in self.get_topic_names_and_types()
            if other.endswith(suffix) and message_type in types and self.count_publishers(other)
        )
        if elsewhere:
            return f"there is one in another namespace, use --namespace {' or '.join(elsewhere[:5])}"
        others = sum(entry != (self.get_name(), namespace) for entry in nodes)
        reach = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "")
        return (
            f"there is no node {self.target} in ROS domain {self.context.get_domain_id()} "
            f"({reach and f'discovery range {reach}, '}{others} other nodes are seen); start it, or give this terminal "
            "its ROS_DOMAIN_ID"
        )


class Keeper:
    """Keeps pictures in a folder, one every `every` seconds; stops, and says why in `error`, where it cannot."""

    def __init__(self, folder: Path, every: float) -> None:
        self._folder = folder
        self._every = every
        self._last = -math.inf
        self.error = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--save {folder} cannot be used: {error.strerror}") from None
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--save {folder} cannot be used: it may not be written to")

    def keep(self, jpeg: bytes, name: str) -> None:
        """Write a picture as NAME.jpg, if it is time for one."""
        if self.error or time.monotonic() - self._last < self._every:
            return
        self._last = time.monotonic()
        try:
            if shutil.disk_usage(self._folder).free < SPARE + len(jpeg):
                raise OSError(errno.ENOSPC, "less than 1 GB is free")
            (self._folder / f"{name}.jpg").write_bytes(jpeg)
        except OSError as error:
            self.error = f"no more pictures are kept in {self._folder}: {error.strerror}"


class Page(ThreadingHTTPServer):
    """The page on `host`:`port`. Bound when made, serves from :meth:`start` to :meth:`close`.

    Raises ValueError where the address cannot be had.
    """

    daemon_threads = True
    request_queue_size = CONNECTIONS
    block_on_close = False

    def __init__(self, host: str, port: int, board: Board) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.board = board
        self.host = host
        self.html = Path(__file__).with_name("watch.html").read_text(encoding="utf-8")
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port {port} of {host} is in use; give another with --port, or --port 0") from None
            raise ValueError(f"the page cannot be served on {host}, port {port}: {error.strerror}") from None

    @property
    def url(self) -> str:
        """What to open."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{shown}:{self.server_address[1]}"

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self) -> None:
        """Stop serving; viewers are sent away."""
        self.board.close()
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for another connection."""
        return self._room.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell what went wrong, unless it is only that the browser went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Page
    protocol_version = "HTTP/1.1"
    server_version = "nerve"
    sys_version = ""
    timeout = 10.0  # seconds that a browser may take to send a request, or to take an answer

    def do_GET(self) -> None:
        if not self._is_for_us():
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "open the page by the address it is served on")
            return
        path, _, query = self.path.partition("?")
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            self._answer(
                self.server.html.replace("NONCE", nonce).encode(),
                "text/html; charset=utf-8",
                f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'nonce-{nonce}'; "
                f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            )
        elif path == "/status":
            after = re.fullmatch(r"after=(\d{1,18})", query)
            board = self.server.board
            status = board.newer(int(after[1])) if after else board.status()
            self._answer(json.dumps(status, allow_nan=False).encode(), "application/json")
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "there are / and /status")

    def _is_for_us(self) -> bool:
        """Whether the browser means this server: a page from elsewhere may have had its own name resolve to it."""
        if not _is_loopback(self.server.host):
            return True
        try:
            host = urlsplit("//" + self.headers.get("Host", "")).hostname or ""
        except ValueError:
            return False
        return _is_loopback(host)

    def _answer(self, body: bytes, kind: str, policy: str = "default-src 'none'") -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the terminal shows the table."""


class Terminal:
    """The board in the terminal: a table that stays in its place, or a line now and then where it is no terminal."""

    def __init__(self, console: Console, board: Board) -> None:
        self._console = console
        self._board = board
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._shown = -math.inf
        self._reason = ""

    def __enter__(self) -> Terminal:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def refresh(self) -> None:
        """Show what is new, if it is time to."""
        waited = time.monotonic() - self._shown
        if self._live is not None:
            if waited >= 0.25:
                self._shown = time.monotonic()
                self._live.update(table(self._board.status(), self._console.height - 4), refresh=True)
        elif waited >= PLAIN_EVERY or (self._board.reason != self._reason and waited >= 1.0):
            self._shown, self._reason = time.monotonic(), self._board.reason
            self._console.print(line(self._board.status()), soft_wrap=True)


def line(status: dict[str, Any]) -> Text:
    """The board in one line."""
    seen = [entry for entry in status["classes"] if entry["area"]]
    names = ", ".join(f"{entry['name']} {_figure(entry['presence'])}" for entry in seen[:20]) or "nothing found"
    if len(seen) > 20:
        names += f" and {len(seen) - 20} more"
    if status["result"] is None or status["result"]["stale"]:
        names = "nothing comes"
    return Text(f"{_head(status)} | {names}" + (f" | {status['reason']}" if status["reason"] else ""))


def table(status: dict[str, Any], rows: int) -> Group:
    """The board as a table of at most `rows` rows."""
    level = status["diagnostics"].get("level", "ok")
    shown = status["classes"][: max(1, rows - 3)]
    stale = status["result"] is None or status["result"]["stale"]
    grid = Table(box=None, pad_edge=False, style="dim" if stale else "")
    grid.add_column("")
    grid.add_column("name", no_wrap=True, max_width=40)
    grid.add_column("presence", width=16)
    for title in ("", "confidence", "pixels"):
        grid.add_column(title, justify="right")
    for entry in shown:
        bar = round(16 * (entry["presence"] or 0.0))
        found = "" if entry["area"] else "dim"
        grid.add_row(
            Text("■", style=entry["colour"]),
            Text(entry["name"], style=found),
            Text("━" * bar, style=entry["colour"]) + Text("━" * (16 - bar), style="bright_black"),
            Text(_figure(entry["presence"]), style=found),
            Text(_figure(entry["confidence"]), style=found),
            Text("-" if entry["area"] is None else str(entry["area"]), style=found),
        )
    parts: list[Any] = [Text(_head(status), style=_STYLES.get(level, ""))]
    if status["reason"]:
        parts.append(Text(status["reason"], style="yellow"))
    parts.append(grid)
    if len(shown) < len(status["classes"]):
        parts.append(Text(f"and {len(status['classes']) - len(shown)} more", style="dim"))
    return Group(*parts)


def printable(text: str, limit: int = 128) -> str:
    """`text` without anything that moves a terminal's cursor or turns the direction of writing, shortened."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    # The joiners belong to words of some languages, and to emoji.
    return "".join(letter if letter.isprintable() or letter in "\u200c\u200d" else "\ufffd" for letter in text)


def _stamp(message: Image | ClassConfidenceArray) -> tuple[int, int]:
    return message.header.stamp.sec, message.header.stamp.nanosec


def _entry(
    number: int, name: str, *, presence: float | None = None, confidence: float | None = None, area: int | None = None
) -> dict[str, Any]:
    colour = "#" + palette()[number].tobytes().hex()
    return {
        "id": number,
        "name": printable(name),
        "colour": colour,
        "presence": presence,
        "confidence": confidence,
        "area": area,
    }


def _share(value: float) -> float | None:
    return round(min(max(value, 0.0), 1.0), 3) if math.isfinite(value) else None


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _head(status: dict[str, Any]) -> str:
    told = status["diagnostics"]
    values = told.get("values", {}) if told and not told["stale"] else {}
    parts = [status["node"], values.get("state", "state unknown"), f"{status['fps']:.1f} fps"]
    parts += [f"{name} {values[key]} ms" for name, key in _TIMES if values.get(key)]
    return "  ".join(parts)


_TIMES = (("latency", "latency_p50_ms"), ("age", "age_p50_ms"))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
