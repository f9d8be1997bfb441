"""The launch file: what it asks for, and that it reaches the node's parameters.

The packages launch and launch_ros come with an installed ROS 2 only. What the file asks for is tested
everywhere, with stand-ins for them that record it; under `ros2 launch` itself, where there is one.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from ament_index_python.packages import get_package_prefix, get_package_share_directory

import harness

SHARE = Path(get_package_share_directory("nerve_ros"))
LAUNCH_FILE = SHARE / "launch" / "nerve.launch.py"
PARAMS_FILE = SHARE / "config" / "nerve.yaml"
PROFILE = str(SHARE / "config" / "fastdds.xml")
INTERFACE = [
    *("namespace", "image_topic", "params_file", "model", "vocabulary", "device", "offline"),
    *("image_transport", "use_sim_time", "log_level", "autostart", "rviz"),
]


@dataclass
class Asked:
    """What the launch file asks launch for."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def node(self) -> dict[str, Any]:
        return self.nodes[0]

    @property
    def overrides(self) -> dict[str, Any]:
        return {name: value for given in self.node["parameters"][1:] for name, value in given.items()}


class Context:
    """Stands for launch.LaunchContext."""

    def __init__(self, environment: Mapping[str, str], group: str | None) -> None:
        self.environment = dict(environment)
        self.values: dict[str, str] = {}
        self.launch_configurations = {} if group is None else {"ros_namespace": group}


class Substitution:
    """Stands for the substitutions: a text, or the value of an argument."""

    def __init__(self, text: str = "", argument: str | None = None) -> None:
        self.text, self.argument = text, argument

    def perform(self, context: Context) -> str:
        return self.text if self.argument is None else context.values[self.argument]


def recording_modules(asked: Asked) -> dict[str, types.ModuleType]:
    """Stand-ins for as much of launch and launch_ros as the launch file imports."""

    def declare(name: str, **details: Any) -> types.SimpleNamespace:
        asked.arguments[name] = details
        return types.SimpleNamespace(name=name)

    def join(parts: list) -> Substitution:
        return Substitution("/".join(part.text if isinstance(part, Substitution) else part for part in parts))

    def prefix(base: str | None, namespace: str) -> str:
        return namespace if base is None or namespace.startswith("/") else f"{base}/{namespace}".rstrip("/")

    def module(name: str, **contents: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(contents)
        return made

    made = [
        module("launch", LaunchContext=Context, LaunchDescription=list),
        module(
            "launch.actions",
            DeclareLaunchArgument=declare,
            OpaqueFunction=lambda function: function,
            SetEnvironmentVariable=lambda name, value: asked.environment.update({name: value}),
        ),
        module(
            "launch.substitutions",
            LaunchConfiguration=lambda name: Substitution(argument=name),
            PathJoinSubstitution=join,
        ),
        module("launch_ros"),
        module("launch_ros.actions", Node=lambda **details: asked.nodes.append(details)),
        module(
            "launch_ros.substitutions",
            FindPackageShare=lambda package: Substitution(get_package_share_directory(package)),
        ),
        module("launch_ros.utilities", prefix_namespace=prefix),
    ]
    return {one.__name__: one for one in made}


@pytest.fixture
def launch(monkeypatch):
    """What the launch file asks for, given arguments as texts and an environment."""

    def run(environment: Mapping[str, str] | None = None, *, group: str | None = None, **texts: str) -> Asked:
        asked = Asked()
        for name, module in recording_modules(asked).items():
            monkeypatch.setitem(sys.modules, name, module)
        specification = importlib.util.spec_from_file_location("nerve_launch", LAUNCH_FILE)
        loaded = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(loaded)
        functions = [action for action in loaded.generate_launch_description() if callable(action)]
        context = Context(environment or {}, group)
        for name, details in asked.arguments.items():
            default = details["default_value"]
            context.values[name] = default.text if isinstance(default, Substitution) else default
        assert not set(texts) - set(context.values)
        context.values.update(texts)
        for function in functions:
            function(context)
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
        ("['ball', 'chair']", ["['ball'", "'chair']"]),
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


@pytest.mark.parametrize("name", ["offline", "use_sim_time", "autostart", "rviz"])
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


REACHING = {
    "vocabulary": ["ball", "mug|cup", "1", "größe 椅子"],
    "model": "/some/folder",
    "device": "cuda:1",
    "offline": True,
    "image_transport": "compressed",
    "use_sim_time": True,
    "autostart": False,
}
AS_TEXT = REACHING | {
    "vocabulary": "ball, mug|cup, 1, größe 椅子",
    "offline": "true",
    "use_sim_time": "True",
    "autostart": "false",
}


def parameters_of_the_node(process: harness.Process, peer: harness.Peer) -> dict[str, Any]:
    process.until(lambda: any("vocabulary of 4" in line for line in process.lines), "vocabulary", harness.LOADING)
    return {name: peer.do("get_parameter", name=name)["value"] for name in REACHING}


def test_what_the_file_asks_for_is_what_the_nodes_parameters_are(launch, environment, new_peer, tmp_path):
    # As launch_ros does it: parameter files by their path, a dictionary as one more parameter file.
    node = launch(**AS_TEXT).node
    overrides = tmp_path / "overrides.yaml"
    overrides.write_text(yaml.dump({"/nerve": {"ros__parameters": node["parameters"][1]}}))
    files = ["--params-file", node["parameters"][0], "--params-file", str(overrides)]
    process = harness.Node(environment, arguments=[*files, *node["ros_arguments"]])
    try:
        assert parameters_of_the_node(process, new_peer("asking")) == REACHING
    finally:
        process.kill()


@pytest.mark.skipif(shutil.which("ros2") is None, reason="ros2 launch comes with an installed ROS 2")
def test_under_ros2_launch_every_argument_is_what_the_nodes_parameter_is(environment, new_peer):
    arguments = [f"{name}:={text}" for name, text in AS_TEXT.items()]
    process = harness.Process(["ros2", "launch", "nerve_ros", "nerve.launch.py", *arguments], environment)
    try:
        assert parameters_of_the_node(process, new_peer("asking")) == REACHING
    finally:
        process.kill()
