"""`nerve watch` over DDS: beside the real node and beside a hostile one."""

import base64
import json
import math
import re
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
import pytest
import rclpy
import yaml
from ament_index_python.packages import get_package_share_directory
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import Header, String
from vision_msgs.msg import LabelInfo, VisionClass

import harness
from nerve_core.images.visualize import palette
from nerve_ros.msg import ClassConfidence, ClassConfidenceArray
from nerve_ros.srv import Locate
from nerve_ros.watch import watcher as watcher_module
from watching import command, status_of, until

PICTURE = {"width": 160, "height": 120}
NAMES = ["ball", "mug|cup", "chair"]
EVIL = "<script>alert(1)</script>\x1b[2J\u202e{0}%s"


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
