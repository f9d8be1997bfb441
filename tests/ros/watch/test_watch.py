"""`nerve watch`: the page as a browser gets it, beside the real node and beside a hostile one."""

import base64
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from shutil import disk_usage
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import rclpy
import yaml
from ament_index_python.packages import get_package_share_directory
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rich.console import Console
from sensor_msgs.msg import Image
from std_msgs.msg import Header, String
from vision_msgs.msg import LabelInfo, VisionClass

import harness
from nerve_core.images.visualize import palette
from nerve_ros.msg import ClassConfidence, ClassConfidenceArray
from nerve_ros.srv import Locate
from nerve_ros.watch import board as board_module
from nerve_ros.watch import keeper as keeper_module
from nerve_ros.watch import page as page_module
from nerve_ros.watch import watcher as watcher_module
from nerve_ros.watch.board import Board, class_entry, printable
from nerve_ros.watch.keeper import Keeper
from nerve_ros.watch.page import Page
from nerve_ros.watch.terminal import line, table

PICTURE = {"width": 160, "height": 120}
NAMES = ["ball", "mug|cup", "chair"]
EVIL = "<script>alert(1)</script>\x1b[2J\u202e{0}%s"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def board(clock):
    return Board(clock)


def entries(*areas):
    return [class_entry(number, f"name {number}", presence=0.5, area=area) for number, area in enumerate(areas, 1)]


def status_of(url, after=None, timeout=harness.PATIENCE):
    query = "" if after is None else f"?after={after}"
    with urllib.request.urlopen(f"{url}/status{query}", timeout=timeout) as answer:
        return json.loads(answer.read(), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def until(condition, what):
    """The first true value of `condition`."""
    deadline = time.monotonic() + harness.PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {harness.PATIENCE:.0f} s"
        time.sleep(0.05)
    return value


# What is on the board.


def test_classes_are_those_of_the_picture_that_is_shown(board, clock):
    board.result(entries(1, 2), (1, 0))
    board.picture(b"one", (1, 0), 100)
    board.result(entries(3, 4), (2, 0))
    assert [entry["area"] for entry in board.status()["classes"]] == [1, 2]
    board.picture(b"two", (2, 0), 100)
    assert [entry["area"] for entry in board.status()["classes"]] == [3, 4]
    clock.now += board_module.PATIENCE + 0.1
    board.result(entries(5, 6), (3, 0))
    assert [entry["area"] for entry in board.status()["classes"]] == [5, 6]


def test_a_picture_that_does_not_change_is_stale_after_a_while(board, clock):
    board.picture(b"one", (1, 0), 100)
    assert not board.status()["picture"]["stale"]
    clock.now += board_module.PATIENCE + 0.1
    assert board.status()["picture"] == {"number": 1, "pixels": 100, "age": 2.1, "stale": True}
    assert board.quiet() == (pytest.approx(2.1), pytest.approx(2.1))


def test_what_always_comes_slowly_is_not_stale_between_two(board, clock):
    for number in range(3):
        clock.now += 10.0
        board.picture(b"jpeg", (number, 0), 100)
        board.result(entries(1), (number, 0))
    clock.now += 9.0
    status = board.status()
    assert not status["picture"]["stale"]
    assert not status["result"]["stale"]
    assert status["fps"] == pytest.approx(0.1)
    assert board.quiet() == (0.0, 0.0)
    clock.now += 22.0
    status = board.status()
    assert status["picture"]["stale"]
    assert status["result"]["stale"]
    assert status["fps"] == 0.0


def test_the_rate_is_of_the_last_seconds(board, clock):
    for number in range(200):
        clock.now += 0.1
        board.result(entries(1), (number, 0))
    assert board.status()["fps"] == pytest.approx(10.0, rel=0.03)


def test_a_picture_from_before_nobody_looked_is_not_shown(board, clock):
    board.picture(b"old", (1, 0), 100)
    clock.now += 60.0
    board.forget_picture()
    assert board.status()["picture"] is None
    assert board.quiet()[1] == 0.0
    clock.now += 1.0
    board.picture(b"new", (2, 0), 100)
    clock.now += 1.0
    assert board.status()["picture"]["number"] == 2
    assert not board.status()["picture"]["stale"]


def test_results_of_pictures_that_never_come_are_not_kept(board):
    for number in range(1000):
        board.result(entries(1), (number, 0))
    assert len(board._classes_of) == board_module.RESULTS


def test_new_names_are_shown_before_they_are_looked_for(board):
    board.result(entries(7), (1, 0))
    board.labels([(1, "name 1"), (2, "plant")])
    assert [(entry["name"], entry["area"]) for entry in board.status()["classes"]] == [("name 1", 7), ("plant", None)]


def test_a_label_info_without_end_is_cut_off(board):
    message = LabelInfo(class_map=[VisionClass(class_id=n % 256, class_name=f"name {n}") for n in range(3000)])
    watcher_module.Watcher._on_labels(SimpleNamespace(_board=board), message)
    classes = board.status()["classes"]
    assert [entry["id"] for entry in classes] == list(range(1, 255))
    assert classes[-1]["name"] == "name 254"


def test_a_question_waits_for_the_next_picture_and_counts_as_looking(monkeypatch):
    board = Board()
    assert not board.watched
    assert board.newer(0)["jpeg"] == ""
    assert board.watched
    board.picture(b"one", (1, 0), 100)
    assert base64.b64decode(board.newer(0)["jpeg"]) == b"one"
    monkeypatch.setattr(board_module, "WAIT", 1000.0)
    answers = []
    threading.Thread(target=lambda: answers.append(board.newer(1)), daemon=True).start()
    board.picture(b"two", (2, 0), 100)
    (status,) = until(lambda: answers, "answer")
    assert (status["picture"]["number"], base64.b64decode(status["jpeg"])) == (2, b"two")


def test_nobody_looks_once_no_question_comes_any_more(clock):
    board = Board(clock)
    board.picture(b"one", (1, 0), 100)
    board.newer(0)
    clock.now += board_module.LINGER - 0.1
    assert board.watched
    clock.now += 0.2
    assert not board.watched


# Text from the network.


def test_text_is_made_printable_and_short():
    assert printable("mug") == "mug"
    assert printable("a\x1b[31m\u202eb\nc\x9b") == "a\ufffd[31m\ufffdb\ufffdc\ufffd"
    assert printable("Straße 漢字 👩\u200d🚀 می\u200cخواهم") == "Straße 漢字 👩\u200d🚀 می\u200cخواهم"
    assert len(printable("x" * 10_000)) == 128


@pytest.mark.parametrize("terminal", [True, False])
def test_the_terminal_gets_no_escape_sequence_from_a_name(board, terminal):
    board.about = {"node": "/nerve", "topic": "/t", "domain": 0}
    board.reason = printable(EVIL)
    board.result([class_entry(1, EVIL + "[bold]", presence=0.5, confidence=None, area=3)] * 300, (1, 0))
    board.diagnostics({"level": "ok", "message": "", "values": {"state": printable(EVIL)}})
    console = Console(force_terminal=terminal, width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(board.status(), rows=20))
    console.print(line(board.status()))
    shown = console.export_text(styles=terminal)
    assert "\x1b[2J" not in shown
    assert "\u202e" not in shown
    assert "<script>" in shown
    assert "[bold]" in shown
    assert "and 283 more" in shown
    assert "and 280 more" in shown


# Pictures that are kept.


def test_pictures_are_kept_as_often_as_asked(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(keeper_module.time, "monotonic", clock)
    keeper = Keeper(tmp_path / "new" / "folder", every=1.0)
    for number in range(10):
        keeper.keep(b"jpeg", f"{number}")
        clock.now += 0.4
    kept = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert kept == ["0.jpg", "3.jpg", "6.jpg", "9.jpg"]


def test_a_full_disk_ends_the_keeping_and_is_told(tmp_path, monkeypatch):
    keeper = Keeper(tmp_path, every=0.0)
    monkeypatch.setattr(
        keeper_module.shutil, "disk_usage", lambda folder: disk_usage(folder)._replace(free=keeper_module.SPARE)
    )
    keeper.keep(b"jpeg", "one")
    monkeypatch.undo()
    keeper.keep(b"jpeg", "two")
    assert keeper.error == f"no more pictures are kept in {tmp_path}: less than 1 GB is free"
    assert not list(tmp_path.iterdir())


# The page.


@pytest.fixture
def page():
    page = Page("127.0.0.1", 0, Board())
    page.start()
    yield page
    page.close()


def answer_of(page, path="/", host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", page.server_address[1], timeout=harness.PATIENCE)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def test_the_page_asks_nobody_else_for_anything(page):
    answer, body = answer_of(page)
    assert answer.status == 200
    assert set(re.findall(r"https?://[^\s'\"<>)]+", body)) <= {"http://www.w3.org/2000/svg"}
    policy = answer.headers["Content-Security-Policy"]
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert f'<script nonce="{nonce}">' in body
    assert "NONCE" not in body
    assert nonce not in answer_of(page)[1]
    # Nothing that comes from the network is ever read as HTML.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", body)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "localhost:8090", "[::1]:8090", "127.9.9.9"])
def test_the_page_answers_by_the_names_of_this_machine(page, host):
    assert answer_of(page, "/status", host)[0].status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8090", "192.168.1.7", "localhost.evil.example", "[", "@"]
)
def test_another_name_that_leads_here_is_turned_away(page, host):
    assert answer_of(page, "/status", host)[0].status == 421


@pytest.mark.parametrize("path", ["/etc/passwd", "/../page.py", "/status/", "/overlay", "/favicon.ico"])
def test_there_is_nothing_else(page, path):
    assert answer_of(page, path)[0].status == 404


@pytest.mark.parametrize("query", ["?after=-1", "?after=x", "?after=", "?after=1&after=2", "?after=" + "9" * 99])
def test_a_question_that_makes_no_sense_gets_no_picture(page, query):
    page.board.picture(b"jpeg", (1, 0), 1)
    answer, body = answer_of(page, f"/status{query}")
    assert answer.status == 200
    assert "jpeg" not in json.loads(body)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_nothing_can_be_changed(page, method):
    assert answer_of(page, "/status", method=method)[0].status == 501


def test_a_browser_that_goes_away_or_talks_nonsense_disturbs_nobody(page, capfd):
    for words in (
        b"",
        b"GET",
        b"GET /status?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x00\xff" * 50_000 + b"\r\n\r\n",
    ):
        with socket.create_connection(page.server_address, timeout=harness.PATIENCE) as connection:
            connection.sendall(words)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    assert answer_of(page, "/status")[0].status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_connections_beyond_the_limit_are_closed_until_there_is_room_again(page, monkeypatch):
    monkeypatch.setattr(page_module._Handler, "timeout", 1000.0)
    with ExitStack() as stack:
        held = [
            stack.enter_context(socket.create_connection(page.server_address, timeout=harness.PATIENCE))
            for _ in range(page_module.CONNECTIONS)
        ]
        until(lambda: not page._free._value, "full server")
        with socket.create_connection(page.server_address, timeout=harness.PATIENCE) as late:
            assert late.recv(1) == b""
        assert held
    until(lambda: page._free._value == page_module.CONNECTIONS, "free server")
    assert answer_of(page, "/status")[0].status == 200


def test_closing_the_page_ends_a_question_at_once(page, monkeypatch):
    monkeypatch.setattr(board_module, "WAIT", 1000.0)
    answers = []
    threading.Thread(target=lambda: answers.append(answer_of(page, "/status?after=0")), daemon=True).start()
    until(lambda: page.board.watched, "question")
    page.close()
    until(lambda: answers, "answer")


# The command.


def command(*arguments):
    return [sys.executable, "-m", "nerve_ros.cli", "watch", *arguments]


def refused(environment, *arguments):
    """What the command says, on one line, where it will not start."""
    done = subprocess.run(
        command(*arguments), env=environment, capture_output=True, text=True, timeout=harness.LOADING, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr.strip()


def test_a_port_in_use_is_told_in_a_sentence(environment, page):
    port = page.server_address[1]
    said = refused(environment, "--port", str(port))
    assert said == f"nerve: port {port} of 127.0.0.1 is in use; give another with --port, or --port 0"


def test_an_address_of_another_machine_is_told_in_a_sentence():
    with pytest.raises(ValueError, match=r"the page cannot be served on 192\.0\.2\.1, port 0: Cannot assign"):
        Page("192.0.2.1", 0, Board())


def test_a_bad_namespace_is_told_in_a_sentence(environment):
    said = refused(environment, "--namespace", "front left", "--port", "0")
    assert said.startswith("nerve: --namespace '/front left' cannot be used, it is written like /front/left: ")


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--save .*file cannot be used: File exists"):
        Keeper(tmp_path / "file", 1.0)


def test_without_ros_the_other_commands_work_and_this_one_says_what_it_needs():
    """On a machine where `pip install .` brought nerve_ros without ROS."""
    code = (
        "import sys\n"
        "class NoRos:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('rclpy', 'sensor_msgs', 'cv_bridge'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, NoRos())\n"
        "from nerve_ros.cli import main\n"
        "main()\n"
    )

    def nerve(*arguments):
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=harness.LOADING,
            check=False,
        )

    assert "embedded" in nerve("models", "list").stdout
    done = nerve("watch")
    assert done.returncode == 2
    assert "nerve watch needs ROS 2 (No module named 'rclpy')" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


# Over DDS.


class Watch(harness.Process):
    """`nerve watch` in a process of its own; `url` is its page."""

    def __init__(self, env, *arguments):
        super().__init__(command("--port", "0", *arguments), env)
        said = self.until(
            lambda: next((told for told in self.lines if "the page is " in told), None), "address", harness.LOADING
        )
        self.url = said.rpartition(" ")[2]

    def status(self):
        return status_of(self.url)

    def wait(self, condition, what):
        """The first status that fits."""
        last = {}

        def fits():
            last.update(self.status())
            return condition(last)

        try:
            until(fits, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{json.dumps(last)[:3000]}\n{self.report()}") from None
        return last


class Viewer:
    """Somebody with the page open: asks for picture after picture."""

    def __init__(self, url):
        self.seen = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(url,), daemon=True)
        self._thread.start()

    def _look(self, url):
        number = 0
        while not self._stop.is_set():
            try:
                status = status_of(url, after=number)
            except OSError:
                return
            number = status["picture"]["number"] if status["picture"] else 0
            if status["jpeg"]:
                self.seen.append(status)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join(harness.PATIENCE)


@pytest.fixture(scope="module")
def station(environment):
    """A node of this process in the module's domain."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=int(environment["ROS_DOMAIN_ID"]))
        node = Node("station", context=context)
        yield node
        node.destroy_node()
        context.try_shutdown()


@pytest.fixture(scope="module")
def rig(new_rig):
    rig = new_rig(vocabulary=NAMES)
    rig.node.wait_active()
    return rig


@pytest.fixture(scope="module")
def watching(rig):
    """The watch of the module's node."""
    process = Watch(rig.env)
    yield process
    process.end()


@pytest.fixture
def new_watch(environment):
    with ExitStack() as stack:

        def start(*arguments):
            process = Watch(environment, *arguments)
            stack.callback(process.end)
            return process

        yield start


@pytest.fixture
def camera(rig):
    rig.talker.do("advertise", topic="image")
    rig.talker.do("stream", picture=PICTURE, rate=10.0)
    yield rig
    rig.talker.do("stop_stream")


def test_the_page_shows_what_the_node_publishes_and_only_while_somebody_looks(camera, station, watching):
    watching.wait(lambda seen: seen["result"] and seen["diagnostics"], "result")
    until(lambda: station.count_subscribers("/segmentation/overlay") == 0, "quiet")
    with Viewer(watching.url) as viewer:
        until(lambda: len(viewer.seen) >= 3, "three pictures")
        until(lambda: station.count_subscribers("/segmentation/overlay") == 1, "subscription")
        with Viewer(watching.url) as other:
            until(lambda: len(other.seen) >= 2, "two pictures for another viewer")
            assert station.count_subscribers("/segmentation/overlay") == 1
        count = len(viewer.seen)
        until(lambda: len(viewer.seen) >= count + 2, "pictures after the other viewer went")
    until(lambda: station.count_subscribers("/segmentation/overlay") == 0, "end of the subscription")
    shown = viewer.seen[-1]
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(shown["jpeg"]), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (PICTURE["height"], PICTURE["width"], 3)
    assert shown["picture"]["pixels"] == PICTURE["height"] * PICTURE["width"]
    assert shown["node"] == "/nerve"
    watching.wait(lambda seen: seen["reason"] == "" and seen["fps"] > 0.0, "good word")
    assert [entry["name"] for entry in shown["classes"]] == ["ball", "mug", "chair"]
    assert all(0.0 <= entry["presence"] <= 1.0 for entry in shown["classes"])
    for entry in shown["classes"]:
        red, green, blue = palette()[entry["id"]]
        assert entry["colour"] == f"#{red:02x}{green:02x}{blue:02x}"
    watching.wait(
        lambda seen: (
            (told := seen["diagnostics"])
            and (told["level"], told["values"]["state"], told["stale"]) == ("ok", "active", False)
            and told["values"]["latency_p50_ms"]
        ),
        "diagnostics",
    )
    # Who comes again gets pictures of now.
    with Viewer(watching.url) as viewer:
        until(lambda: viewer.seen, "picture")
    assert viewer.seen[0]["picture"]["number"] > shown["picture"]["number"]


def test_a_silent_camera_leaves_a_stale_picture_and_the_reason(rig, watching):
    rig.talker.do("advertise", topic="image")
    with Viewer(watching.url) as viewer:
        rig.talker.do("stream", picture=PICTURE, rate=10.0)
        until(lambda: viewer.seen, "picture")
        rig.talker.do("stop_stream")
        watching.wait(
            lambda seen: (
                seen["picture"]
                and seen["picture"]["stale"]
                and seen["result"]["stale"]
                and seen["fps"] == 0.0
                and seen["reason"].startswith("no image on /image for ")
            ),
            "stale picture and reason",
        )


def test_an_inactive_node_and_a_changed_vocabulary_are_told(rig, watching):
    assert rig.talker.do("transition", label="deactivate")["success"]
    try:
        watching.wait(lambda seen: seen["reason"] == "/nerve is inactive; ros2 lifecycle set /nerve activate", "reason")
    finally:
        assert rig.talker.do("transition", label="activate")["success"]
    try:
        assert rig.talker.do("set_parameter", name="vocabulary", value=["plant"])["successful"]
        watching.wait(lambda seen: [entry["name"] for entry in seen["classes"]] == ["plant"], "new names")
    finally:
        assert rig.talker.do("set_parameter", name="vocabulary", value=NAMES)["successful"]


def test_what_rviz_and_foxglove_are_told_to_show_is_there(rig, station):
    config = Path(get_package_share_directory("nerve_ros")) / "config"
    displays = yaml.safe_load((config / "nerve.rviz").read_text())["Visualization Manager"]["Displays"]
    topics = {f"/{display['Topic']['Value']}": "sensor_msgs/msg/Image" for display in displays}
    layout = json.loads((config / "foxglove.json").read_text())
    services = {}
    for panel, settings in layout["configById"].items():
        kind = panel.partition("!")[0]
        if kind == "Image":
            topics[settings["imageMode"]["imageTopic"]] = "sensor_msgs/msg/Image"
        elif kind == "Table":
            topics[settings["topicPath"].partition(".")[0]] = "nerve_ros/msg/ClassConfidenceArray"
        elif kind == "Plot":
            for path in settings["paths"]:
                topics[path["value"].partition(".")[0]] = "nerve_ros/msg/ClassConfidenceArray"
        elif kind == "DiagnosticSummary":
            topics[settings["topicToRender"]] = "diagnostic_msgs/msg/DiagnosticArray"
        elif kind == "CallService":
            services[settings["serviceName"]] = Locate.Request(**json.loads(settings["requestPayload"]))
        elif kind == "Publish":
            topics[settings["topicName"]] = settings["datatype"]
            assert String(**json.loads(settings["value"])).data
        else:
            pytest.fail(f"nobody has looked at {panel}")
    assert len(topics) == 6
    until(
        lambda: topics.items() <= {name: kinds[0] for name, kinds in station.get_topic_names_and_types()}.items(),
        topics,
    )
    until(lambda: set(services) <= dict(station.get_service_names_and_types()).keys(), services)

    def panels(part):
        return [part] if isinstance(part, str) else panels(part["first"]) + panels(part["second"])

    assert sorted(panels(layout["layout"])) == sorted(layout["configById"])


def test_pictures_are_kept_while_nobody_looks(camera, new_watch, tmp_path):
    new_watch("--save", str(tmp_path / "kept"), "--every", "0")
    files = until(lambda: len(kept := sorted((tmp_path / "kept").glob("*.jpg"))) >= 3 and kept, "three pictures")
    assert all(re.fullmatch(r"\d+_\d{9}\.jpg", path.name) for path in files)
    assert cv2.imread(str(files[0])).shape == (PICTURE["height"], PICTURE["width"], 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_in_order_with_a_viewer_before_it(camera, environment, number):
    watching = Watch(environment)
    try:
        with Viewer(watching.url) as viewer:
            until(lambda: viewer.seen, "picture")
            watching.send(number)
            assert watching.ended() == 0
    finally:
        watching.kill()
    assert "Traceback" not in "\n".join(watching.lines)


def test_lines_come_where_there_is_no_terminal(camera, watching):
    expression = re.compile(r"/nerve  active  \d+\.\d fps  latency \d.* ms .*\| ")
    watching.until(lambda: any(expression.match(said) for said in watching.lines), "line")
    assert "\x1b" not in "\n".join(watching.lines)


def test_where_there_is_one_is_told_where_there_is_none(rig, new_watch):
    watching = new_watch("--namespace", "nowhere/at/all")
    said = (
        "nobody publishes on /nowhere/at/all/segmentation/class_confidence: there is one in another namespace, use "
        "--namespace /"
    )
    status = watching.wait(lambda seen: seen["reason"] == said, "reason")
    assert status["node"] == "/nowhere/at/all/nerve"


def test_an_empty_domain_is_told():
    with harness.domain() as environment:
        watching = Watch(environment)
        try:
            said = watching.wait(lambda seen: seen["reason"], "reason")["reason"]
        finally:
            watching.end()
    domain = environment["ROS_DOMAIN_ID"]
    assert f"there is no node /nerve in ROS domain {domain} (discovery range LOCALHOST, " in said


def test_a_publisher_of_another_quality_of_service_is_named(station, new_watch):
    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    publisher = station.create_publisher(ClassConfidenceArray, "/lossy/segmentation/class_confidence", best_effort)
    try:
        topic = "/lossy/segmentation/class_confidence"
        reason = f"/station publishes on {topic} with reliability best_effort, where reliable is expected"
        new_watch("--namespace", "/lossy").wait(lambda seen: seen["reason"] == reason, "reason")
    finally:
        station.destroy_publisher(publisher)


def evil_result(header):
    values = (math.nan, math.inf, -math.inf, 7.0, -1.0, 0.5)
    return ClassConfidenceArray(
        header=header,
        classes=[
            ClassConfidence(
                name=EVIL * (number % 9),
                id=number % 256,
                presence=values[number % 6],
                mean_probability=values[number % 5],
                area=2**32 - 1,
            )
            for number in range(300)
        ],
    )


def test_a_hostile_node_is_shown_as_text_and_bounded(station, new_watch, environment):
    qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
    results = station.create_publisher(ClassConfidenceArray, "/evil/segmentation/class_confidence", qos)
    labels = station.create_publisher(LabelInfo, "/evil/segmentation/label_info", watcher_module._LATCHED_QOS)
    overlays = station.create_publisher(Image, "/evil/segmentation/overlay", qos)
    diagnostics = station.create_publisher(DiagnosticArray, "/diagnostics", 1)
    told = DiagnosticStatus(level=b"\x07", name="evil/nerve: segmentation", message=EVIL * 1000, hardware_id=EVIL)
    told.values = [KeyValue(key=EVIL + str(number), value=EVIL * 100) for number in range(300)]
    good = Image(height=20, width=4000, encoding="rgb8", step=12000)
    good.data.frombytes(bytes(20 * 12000))
    images = [
        Image(height=2**31, width=2**31, encoding=EVIL, step=2**32 - 1),
        Image(height=480, width=640, encoding="rgb8", step=1920),
        good,
    ]
    watching = new_watch("--namespace", "/evil")
    stop = threading.Event()

    def publish():
        number = 0
        while not stop.wait(0.1):
            number += 1
            header = Header(frame_id=EVIL)
            header.stamp.sec = -number
            labels.publish(LabelInfo(class_map=[VisionClass(class_id=n % 256, class_name=EVIL) for n in range(300)]))
            results.publish(evil_result(header))
            diagnostics.publish(DiagnosticArray(status=[DiagnosticStatus(name=EVIL)] * 100 + [told]))
            # Each for a while, so that what is said of it can be seen.
            image = images[number // 10 % 3]
            image.header = header
            overlays.publish(image)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        with Viewer(watching.url) as viewer:
            watching.wait(
                lambda seen: "picture on /evil/segmentation/overlay cannot be shown" in seen["reason"], "word"
            )
            until(lambda: viewer.seen, "picture")
            status = watching.wait(lambda seen: seen["diagnostics"] and seen["classes"], "status")
    finally:
        stop.set()
        thread.join()
        for publisher in (results, labels, overlays, diagnostics):
            station.destroy_publisher(publisher)
    text = json.dumps(status, ensure_ascii=False)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<script>" in text
    assert len(text) < 1_000_000
    assert len(status["classes"]) <= watcher_module.ENTRIES
    assert all(entry["presence"] is None or 0.0 <= entry["presence"] <= 1.0 for entry in status["classes"])
    assert status["diagnostics"]["level"] == "error"
    assert all(len(value) <= 500 for value in status["diagnostics"]["values"].values())
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(viewer.seen[0]["jpeg"]), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (10, watcher_module.SIDE, 3)
    assert "\x1b" not in "\n".join(watching.lines)
    assert watching.running
