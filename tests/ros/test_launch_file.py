"""The launch files: what they ask for, and that it reaches the nodes' parameters.

The packages launch and launch_ros come with an installed ROS 2 only. What the files ask for is tested everywhere, with
stand-ins for them that carry it out on paper; under `ros2 launch` itself, where there is one.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from ament_index_python.packages import get_package_prefix, get_package_share_directory

import harness

SHARE = Path(get_package_share_directory("nerve_ros"))
PARAMS_FILE = SHARE / "config" / "nerve.yaml"
PROFILE = str(SHARE / "config" / "fastdds.xml")
INTERFACE = [
    *("namespace", "image_topic", "depth_topic", "camera_info_topic", "params_file", "model", "vocabulary", "device"),
    *("offline", "image_transport", "use_sim_time", "log_level", "autostart", "enabled", "respawn", "respawn_delay"),
    *("enclave", "rviz"),
]


@dataclass
class Asked:
    """What a launch file asks launch for."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def node(self) -> dict[str, Any]:
        return self.nodes[0]

    @property
    def overrides(self) -> dict[str, Any]:
        return overrides(self.node)


def overrides(node: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a node is given beside its file."""
    return {name: value for given in node["parameters"][1:] for name, value in given.items()}


@dataclass
class Context:
    """Stands for launch.LaunchContext."""

    environment: dict[str, str] = field(default_factory=dict)
    launch_configurations: dict[str, str] = field(default_factory=dict)


@dataclass
class Text:
    """Stands for the substitutions: a text, or the value of an argument."""

    text: str = ""
    argument: str | None = None

    def perform(self, context: Context) -> str:
        return self.text if self.argument is None else context.launch_configurations[self.argument]


@dataclass
class Description:
    """Stands for launch.LaunchDescription."""

    entities: list


class Declared:
    """Stands for launch.actions.DeclareLaunchArgument."""

    def __init__(self, name: str, **details: Any) -> None:
        self.name, self.details = name, details


@dataclass
class Source:
    """Stands for PythonLaunchDescriptionSource: another launch file."""

    path: str

    def get_launch_description(self, context: Context) -> Description:
        specification = importlib.util.spec_from_file_location("loaded_launch_file", self.path)
        loaded = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(loaded)
        return loaded.generate_launch_description()


def visit(entities: Iterable[object], context: Context, asked: Asked) -> None:
    """Carry out what a launch file asks for, as launch does: one after the other, groups in a scope of their own."""
    for entity in entities:
        if isinstance(entity, Declared):
            default = entity.details.get("default_value")
            if entity.name not in context.launch_configurations:
                assert default is not None, f"{entity.name} must be given"
                context.launch_configurations[entity.name] = default.text if isinstance(default, Text) else default
            continue
        kind, *what = entity
        if kind == "function":
            visit(what[0](context, *what[1]), context, asked)
        elif kind == "group":
            inner = Context(dict(context.environment), dict(context.launch_configurations))
            visit(what[0], inner, asked)
        elif kind == "include":
            context.launch_configurations.update(what[1])
            visit(what[0].get_launch_description(context).entities, context, asked)
        elif kind == "environment":
            context.environment[what[0]] = asked.environment[what[0]] = what[1]
        else:
            asked.nodes.append(what[0])


def stand_ins() -> dict[str, types.ModuleType]:
    """Modules with as much of launch and launch_ros as the launch files import."""

    def join(parts: list) -> Text:
        return Text("/".join(part.text if isinstance(part, Text) else part for part in parts))

    def prefix(base: str | None, namespace: str) -> str:
        return namespace if base is None or namespace.startswith("/") else f"{base}/{namespace}".rstrip("/")

    def module(name: str, **contents: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(contents)
        return made

    made = [
        module("launch", LaunchContext=Context, LaunchDescription=Description),
        module(
            "launch.actions",
            DeclareLaunchArgument=Declared,
            EmitEvent=lambda event: ("emit", event),
            GroupAction=lambda actions: ("group", actions),
            IncludeLaunchDescription=lambda source, launch_arguments: ("include", source, launch_arguments),
            OpaqueFunction=lambda function, args=(): ("function", function, args),
            SetEnvironmentVariable=lambda name, value: ("environment", name, value),
        ),
        module("launch.events", matches_action=lambda action: ("matches", action)),
        module(
            "launch.events.process",
            ProcessExited=object,
            ShutdownProcess=lambda process_matcher: ("shut down", process_matcher),
        ),
        module("launch.launch_description_sources", PythonLaunchDescriptionSource=Source),
        module("launch.substitutions", LaunchConfiguration=lambda name: Text(argument=name), PathJoinSubstitution=join),
        module("launch_ros"),
        module("launch_ros.actions", Node=lambda **details: ("node", details)),
        module(
            "launch_ros.substitutions",
            FindPackageShare=lambda package: Text(get_package_share_directory(package)),
        ),
        module("launch_ros.utilities", prefix_namespace=prefix),
    ]
    return {one.__name__: one for one in made}


@pytest.fixture
def launch(monkeypatch):
    """What a launch file asks for, given arguments as texts and an environment."""

    def run(
        environment: Mapping[str, str] | None = None,
        *,
        file: str = "nerve.launch.py",
        group: str | None = None,
        **texts: str,
    ) -> Asked:
        for name, module in stand_ins().items():
            monkeypatch.setitem(sys.modules, name, module)
        context = Context(dict(environment or {}), {} if group is None else {"ros_namespace": group})
        description = Source(str(SHARE / "launch" / file)).get_launch_description(context)
        asked = Asked()
        asked.arguments = {one.name: one.details for one in description.entities if isinstance(one, Declared)}
        assert not set(texts) - set(asked.arguments)
        context.launch_configurations |= texts
        visit(description.entities, context, asked)
        return asked

    return run


def test_the_arguments_are_those_of_the_interface_and_each_says_what_it_is(launch):
    arguments = launch().arguments
    assert list(arguments) == INTERFACE
    assert all(len(details["description"]) > 10 for details in arguments.values())


def test_without_arguments_the_parameter_file_of_the_package_is_all_that_the_node_gets(launch):
    node = launch().node
    assert (node["package"], node["executable"], node["name"]) == ("nerve_ros", "nerve_node", "nerve")
    assert node["parameters"] == [str(PARAMS_FILE)]
    assert node["remappings"] == []
    assert node["namespace"] == ""


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("ball", ["ball"]),
        ("ball, ladder ,chair", ["ball", "ladder", "chair"]),
        ("mug|cup|coffee mug,\nchair,", ["mug|cup|coffee mug", "chair"]),
        ("1, true, null, 2.5", ["1", "true", "null", "2.5"]),
        ("größe, 椅子", ["größe", "椅子"]),
        ("['ball', 'chair']", ["ball", "chair"]),
        ('["ball", "chair"]', ["ball", "chair"]),
        ("ball; chair", ["ball", "chair"]),
        ("__import__('os').abort()", ["__import__('os').abort()"]),
    ],
)
def test_a_vocabulary_is_taken_apart_at_its_commas_and_nothing_in_it_is_evaluated(launch, text, names):
    assert launch(vocabulary=text).overrides == {"vocabulary": names}


@pytest.mark.parametrize("text", ["", " ", ",", " ,\n"])
def test_a_vocabulary_without_a_name_leaves_that_of_the_parameter_file(launch, text):
    assert launch(vocabulary=text).overrides == {}


@pytest.mark.parametrize("name", ["offline", "use_sim_time", "autostart"])
@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("FALSE", False), ("0", False)])
def test_a_truth_value_reaches_the_node_as_one(launch, name, text, value):
    assert launch(**{name: text}).overrides == {name: value}


@pytest.mark.parametrize("name", ["offline", "use_sim_time", "autostart", "enabled", "respawn", "rviz"])
def test_a_text_that_is_no_truth_value_is_refused_by_name(launch, name):
    with pytest.raises(RuntimeError, match=rf"{name} is 'maybe'; accepted: true, false"):
        launch(**{name: "maybe"})


def test_texts_reach_the_node_as_texts(launch):
    overrides = launch(model="/a folder/pair", device="cuda:1", image_transport="compressed").overrides
    assert overrides == {"model": "/a folder/pair", "device": "cuda:1", "image_transport": "compressed"}


def test_the_image_topic_is_remapped_with_the_compressed_one_under_it(launch):
    assert launch(image_topic="/camera/image_raw").node["remappings"] == [
        ("image", "/camera/image_raw"),
        ("image/compressed", "/camera/image_raw/compressed"),
    ]


def test_depth_topics_are_remapped_and_have_the_node_use_depth(launch):
    node = launch(depth_topic="/depth/image", camera_info_topic="/depth/camera_info").node
    assert node["remappings"] == [("depth", "/depth/image"), ("camera_info", "/depth/camera_info")]
    assert overrides(node) == {"use_depth": True}
    node = launch(depth_topic="/depth/image").node
    assert node["remappings"] == [("depth", "/depth/image")]
    assert overrides(node) == {"use_depth": True}


def test_an_enclave_is_the_nodes_ros_argument(launch):
    assert launch(enclave="/nerve").node["ros_arguments"][-2:] == ["--enclave", "/nerve"]
    nodes = several(launch, cameras="front, rear", enclave="/{camera}/nerve").nodes
    assert [node["ros_arguments"][-1] for node in nodes] == ["/front/nerve", "/rear/nerve"]


def test_a_node_that_dies_is_started_again_after_a_while(launch):
    node = launch().node
    assert (node["respawn"], node["respawn_delay"]) == (True, 2.0)
    node = launch(respawn="false", respawn_delay="0.5").node
    assert (node["respawn"], node["respawn_delay"]) == (False, 0.5)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "1e9"])
def test_a_respawn_delay_that_is_no_time_is_refused(launch, text):
    with pytest.raises(RuntimeError, match=f"respawn_delay is '{text}'; accepted: seconds, 0.1 to 3600"):
        launch(respawn_delay=text)


def test_what_was_asked_to_end_or_refuses_its_settings_is_not_started_again(launch):
    leave = launch().node["on_exit"]
    for code in (0, 2):
        ended = types.SimpleNamespace(returncode=code, action="the node")
        assert leave(ended, Context()) == [("emit", ("shut down", ("matches", "the node")))]
    for code in (1, 70, -signal.SIGKILL, -signal.SIGSEGV):
        assert leave(types.SimpleNamespace(returncode=code, action="the node"), Context()) == []


def test_a_parameter_file_of_ones_own_comes_before_the_arguments(launch, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("{}")
    assert launch(params_file=str(mine), device="cpu").node["parameters"] == [str(mine), {"device": "cpu"}]


def test_a_parameter_file_that_is_not_there_is_refused(launch):
    with pytest.raises(RuntimeError, match=r"'/no/such\.yaml', and there is no such file"):
        launch(params_file="/no/such.yaml")


@pytest.mark.parametrize(
    ("namespace", "group", "logger"),
    [
        ("", None, "nerve"),
        ("robot1", None, "robot1.nerve"),
        ("/robot1/front", None, "robot1.front.nerve"),
        ("", "robot1", "robot1.nerve"),
        ("front", "/robot1", "robot1.front.nerve"),
        ("/front", "robot1", "front.nerve"),
    ],
)
def test_the_log_level_is_that_of_the_nodes_own_logger(launch, namespace, group, logger):
    node = launch(namespace=namespace, group=group, log_level="debug").node
    assert node["namespace"] == namespace
    assert node["ros_arguments"] == ["--log-level", f"{logger}:=debug"]


def test_fast_dds_gets_the_profile_for_large_images(launch):
    assert launch({"ROS_DISTRO": "kilted"}).environment == {"FASTDDS_DEFAULT_PROFILES_FILE": PROFILE}
    assert launch({"ROS_DISTRO": "jazzy"}).environment == {
        "FASTDDS_DEFAULT_PROFILES_FILE": PROFILE,
        "FASTRTPS_DEFAULT_PROFILES_FILE": PROFILE,
    }


@pytest.mark.parametrize("name", ["FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"])
def test_a_profile_that_is_chosen_already_stays(launch, name):
    assert launch({name: "/my/profile.xml", "ROS_DISTRO": "jazzy"}).environment == {}


def test_rviz_where_there_is_none_is_refused_with_the_command_that_installs_it(launch, monkeypatch):
    monkeypatch.setenv("AMENT_PREFIX_PATH", get_package_prefix("nerve_ros"))
    with pytest.raises(RuntimeError, match="sudo apt install ros-kilted-rviz2"):
        launch({"ROS_DISTRO": "kilted"}, rviz="true")


def test_rviz_gets_its_file_and_the_nodes_namespace_remappings_and_time(launch, monkeypatch, tmp_path):
    marker = tmp_path / "share" / "ament_index" / "resource_index" / "packages" / "rviz2"
    marker.parent.mkdir(parents=True)
    marker.touch()
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"{get_package_prefix('nerve_ros')}:{tmp_path}")
    node, rviz = launch(rviz="true", namespace="robot1", image_topic="/camera", use_sim_time="true").nodes
    assert (rviz["package"], rviz["executable"]) == ("rviz2", "rviz2")
    assert [part if isinstance(part, str) else part.text for part in rviz["arguments"]] == [
        "-d",
        str(SHARE / "config" / "nerve.rviz"),
    ]
    assert rviz["namespace"] == node["namespace"]
    assert rviz["remappings"] == node["remappings"]
    assert rviz["parameters"] == [{"use_sim_time": True}]


def several(launch: Callable[..., Asked], **texts: str) -> Asked:
    return launch(file="multi_camera.launch.py", **texts)


def test_several_cameras_have_the_arguments_of_one_and_their_names(launch):
    arguments = several(launch, cameras="front").arguments
    assert set(arguments) == {"cameras", *INTERFACE}
    assert all(len(details["description"]) > 10 for details in arguments.values())


def test_each_camera_gets_a_node_in_its_namespace_with_its_topics(launch):
    front, rear = several(
        launch,
        cameras="front, rear",
        image_topic="/{camera}/image_raw",
        depth_topic="/{camera}/depth",
        vocabulary="ball",
        enabled="false",
    ).nodes
    assert (front["namespace"], rear["namespace"]) == ("front", "rear")
    assert front["name"] == rear["name"] == "nerve"
    assert front["remappings"] == [
        ("image", "/front/image_raw"),
        ("image/compressed", "/front/image_raw/compressed"),
        ("depth", "/front/depth"),
    ]
    assert rear["remappings"][0] == ("image", "/rear/image_raw")
    assert overrides(front) == overrides(rear) == {"vocabulary": ["ball"], "enabled": False, "use_depth": True}
    assert front["parameters"][0] == rear["parameters"][0] == str(PARAMS_FILE)
    assert front["ros_arguments"] == ["--log-level", "front.nerve:=info"]


def test_a_namespace_and_a_parameter_file_may_be_named_after_the_camera(launch, tmp_path):
    for camera in ("front", "rear"):
        (tmp_path / f"{camera}.yaml").write_text("{}")
    nodes = several(
        launch, cameras="front,rear", namespace="robot1/{camera}", params_file=f"{tmp_path}/{{camera}}.yaml"
    ).nodes
    assert [node["namespace"] for node in nodes] == ["robot1/front", "robot1/rear"]
    assert [node["parameters"] for node in nodes] == [[f"{tmp_path}/front.yaml"], [f"{tmp_path}/rear.yaml"]]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"cameras": " , "}, "cameras names none; accepted: one or more different names"),
        ({"cameras": "front, front"}, "cameras names front, front; accepted"),
        ({"cameras": "front, 2nd"}, "'2nd' is no name for a camera; accepted: a letter"),
        ({"cameras": "front, rear", "namespace": "robot1"}, r"namespace is 'robot1' for every camera; put \{camera\}"),
    ],
)
def test_cameras_that_cannot_be_told_apart_or_named_are_refused(launch, texts, reason):
    with pytest.raises(RuntimeError, match=reason):
        several(launch, **texts)


REACHING = {
    "vocabulary": ["ball", "mug|cup", "1", "größe 椅子"],
    "model": "/some/folder",
    "device": "cuda:1",
    "offline": True,
    "image_transport": "compressed",
    "use_sim_time": True,
    "autostart": False,
    "enabled": False,
    "use_depth": True,
}
AS_TEXT = {name: value for name, value in REACHING.items() if name != "use_depth"} | {
    "vocabulary": "ball, mug|cup, 1, größe 椅子",
    "offline": "true",
    "use_sim_time": "True",
    "autostart": "false",
    "enabled": "false",
    "depth_topic": "/depth",
}


def parameters_of_the_node(process: harness.Process, peer: harness.Peer) -> dict[str, Any]:
    process.until(lambda: any("vocabulary of 4" in line for line in process.lines), "vocabulary", harness.LOADING)
    return {name: peer.do("get_parameter", name=name)["value"] for name in REACHING}


def test_what_the_file_asks_for_is_what_the_nodes_parameters_are(launch, environment, new_peer, tmp_path):
    # As launch_ros does it: parameter files by their path, a dictionary as one more parameter file.
    node = launch(**AS_TEXT).node
    given = tmp_path / "overrides.yaml"
    given.write_text(yaml.dump({"/nerve": {"ros__parameters": node["parameters"][1]}}))
    files = ["--params-file", node["parameters"][0], "--params-file", str(given)]
    process = harness.Node(environment, arguments=[*files, *node["ros_arguments"]], forked=False)
    try:
        assert parameters_of_the_node(process, new_peer("asking")) == REACHING
    finally:
        process.end()


# Under ros2 launch itself.

LAUNCHED = pytest.mark.skipif(shutil.which("ros2") is None, reason="ros2 launch comes with an installed ROS 2")
PICTURE = {"width": 160, "height": 120}


@pytest.fixture
def ros2_launch(environment) -> Iterator[Callable[..., harness.Process]]:
    """Start a launch file by `ros2 launch` with arguments as texts."""
    with ExitStack() as stack:

        def start(file: str = "nerve.launch.py", **texts: str) -> harness.Process:
            # launch's own patience with a process that it has asked to end is 5 s, and then it kills.
            texts |= {"sigterm_timeout": "60", "sigkill_timeout": "60"}
            arguments = [f"{name}:={text}" for name, text in texts.items()]
            process = harness.Process(["ros2", "launch", "nerve_ros", file, *arguments], environment)
            stack.callback(process.end)
            return process

        yield start


def wait_line(process: harness.Process, pattern: str, count: int = 1) -> list[re.Match]:
    """The first `count` lines that `pattern` is found in. launch colours what it takes from a terminal."""

    def found() -> list[re.Match]:
        lines = (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in process.lines)
        return [match for line in lines if (match := re.search(pattern, line))]

    process.until(lambda: len(found()) >= count, f"{count} lines like {pattern!r}", harness.LOADING)
    return found()[:count]


@LAUNCHED
def test_under_ros2_launch_every_argument_is_what_the_nodes_parameter_is(ros2_launch, new_peer):
    assert parameters_of_the_node(ros2_launch(**AS_TEXT), new_peer("asking")) == REACHING


@LAUNCHED
def test_under_ros2_launch_a_node_that_is_killed_in_mid_stream_comes_back(ros2_launch, new_peer):
    process, peer = ros2_launch(vocabulary="ball, cone"), new_peer("camera")
    peer.do("subscribe", kind="mask")
    peer.do("advertise", topic="image", wait=False)
    peer.do("stream", picture=PICTURE, rate=30.0)
    peer.wait("mask", timeout=harness.LOADING)
    (first,) = wait_line(process, r"process started with pid \[(\d+)\]")
    process.send(signal.SIGKILL, int(first.group(1)))
    killed = time.time()
    wait_line(process, r"process started with pid", 2)
    since = peer.mark()
    again = peer.wait("mask", since=since, timeout=harness.LOADING)
    print(f"masks again {again['received'] - killed:.1f} s after the node was killed")


@LAUNCHED
@pytest.mark.parametrize(
    ("texts", "ending"),
    [({"autostart": "false"}, "process has finished cleanly"), ({"device": "gpu"}, "process has died .*exit code 2")],
)
def test_under_ros2_launch_a_node_that_ends_for_good_is_not_started_again(ros2_launch, texts, ending):
    process = ros2_launch(**texts, respawn_delay="0.5")
    if "autostart" in texts:
        (started,) = wait_line(process, r"process started with pid \[(\d+)\]")
        wait_line(process, "vocabulary is empty")
        process.send(signal.SIGINT, int(started.group(1)))
    wait_line(process, ending)
    assert process.ended(harness.LOADING) == 0
    assert sum("process started with pid" in line for line in process.lines) == 1


@LAUNCHED
def test_under_ros2_launch_two_cameras_are_segmented_each_in_its_namespace(ros2_launch, new_peer):
    ros2_launch("multi_camera.launch.py", cameras="front, rear", image_topic="/{camera}/image_raw", vocabulary="ball")
    for camera, width in (("front", 160), ("rear", 120)):
        peer = new_peer(camera)
        peer.do("subscribe", kind="mask", topic=f"/{camera}/segmentation/mask")
        peer.do("advertise", topic=f"/{camera}/image_raw", type="Image", wait=False)
        peer.do("stream", picture={"width": width, "height": 100}, rate=10.0, topic=f"/{camera}/image_raw")
        assert peer.wait("mask", timeout=harness.LOADING)["width"] == width
        peer.do("target", node=f"/{camera}/nerve")
        assert peer.do("get_parameter", name="vocabulary")["value"] == ["ball"]
        peer.end()
