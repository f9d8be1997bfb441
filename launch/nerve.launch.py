"""Starts the node `nerve` with the settings of a robot.

    ros2 launch nerve_ros nerve.launch.py image_topic:=/camera/image_raw vocabulary:="ball, ladder"

An argument that is left empty leaves the parameter to `params_file`. The lifecycle is the node's: with its
parameter `autostart` it configures and activates itself, without it a lifecycle manager does. A node that dies is
started again.
"""

import os
from pathlib import Path

from ament_index_python.packages import PackageNotFoundError, get_package_prefix, get_package_share_directory
from launch import LaunchContext, LaunchDescription  # type: ignore[attr-defined] # to mypy `launch` is this folder
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction, SetEnvironmentVariable
from launch.events import matches_action
from launch.events.process import ProcessExited, ShutdownProcess
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare
from launch_ros.utilities import prefix_namespace

from nerve_core.text.parsing import split_names

SHARE = FindPackageShare("nerve_ros")

ARGUMENTS = [
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of the node and its topics."),
    DeclareLaunchArgument(
        "image_topic",
        default_value="image",
        description="The camera's image topic; compressed images are taken from <image_topic>/compressed.",
    ),
    DeclareLaunchArgument(
        "depth_topic",
        default_value="",
        description="Depth images that belong to the camera's: with them `locate` answers in metres too.",
    ),
    DeclareLaunchArgument(
        "camera_info_topic",
        default_value="",
        description="The camera's intrinsics, needed with depth_topic; left out: `camera_info`.",
    ),
    DeclareLaunchArgument(
        "params_file",
        default_value=PathJoinSubstitution([SHARE, "config", "nerve.yaml"]),
        description="Parameter file (YAML). The one that comes with the package lists every parameter.",
    ),
    DeclareLaunchArgument("model", default_value="", description="Model pair: its name or its folder."),
    DeclareLaunchArgument(
        "vocabulary",
        default_value="",
        description="Names to segment by, with commas or as a list; synonyms behind bars: 'ball, mug|cup, ladder'.",
    ),
    DeclareLaunchArgument("device", default_value="", description="auto, cpu, cuda or cuda:N."),
    DeclareLaunchArgument(
        "offline", default_value="", description="true: never ask the network for a model. Or false."
    ),
    DeclareLaunchArgument(
        "image_transport",
        default_value="",
        choices=["", "raw", "compressed"],
        description="Which of the camera's topics to read.",
    ),
    DeclareLaunchArgument("use_sim_time", default_value="", description="true: take the time from /clock. Or false."),
    DeclareLaunchArgument(
        "log_level",
        default_value="info",
        choices=["debug", "info", "warn", "error", "fatal"],
        description="Least severity that the node's log shows.",
    ),
    DeclareLaunchArgument(
        "autostart",
        default_value="",
        description="true: configure and activate at start. false: leave that to a lifecycle manager.",
    ),
    DeclareLaunchArgument(
        "enabled", default_value="", description="false: segment nothing until the service `enable` says so. Or true."
    ),
    DeclareLaunchArgument(
        "respawn",
        default_value="true",
        description="true: start the node again when it dies; not where it was asked to end, or refuses its settings.",
    ),
    DeclareLaunchArgument(
        "respawn_delay", default_value="2.0", description="Seconds from its death to its new start, 0.1 to 3600."
    ),
    DeclareLaunchArgument(
        "enclave", default_value="", description="SROS 2 enclave whose keys and permissions the node uses: '/nerve'."
    ),
    DeclareLaunchArgument(
        "rviz", default_value="false", description="true: show image, mask and overlay in RViz. Or false."
    ),
]


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments; what depends on their values is put together when they are known."""
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=set_dds_profile), OpaqueFunction(function=start)])


def set_dds_profile(context: LaunchContext) -> list:
    """Give Fast DDS shared memory for whole images, unless a profile is chosen already (see config/fastdds.xml)."""
    names = ["FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"]
    if any(context.environment.get(name) for name in names):
        return []
    if context.environment.get("ROS_DISTRO") != "jazzy":
        names.remove("FASTRTPS_DEFAULT_PROFILES_FILE")  # Jazzy's name; later distributions warn about it
    profile = os.path.join(get_package_share_directory("nerve_ros"), "config", "fastdds.xml")
    return [SetEnvironmentVariable(name, profile) for name in names]


def start(context: LaunchContext) -> list:
    """Start the node with the values of the arguments, and RViz where it is asked for."""
    value = {argument.name: LaunchConfiguration(argument.name).perform(context).strip() for argument in ARGUMENTS}
    params_file = Path(value["params_file"]).expanduser()
    if not params_file.is_file():
        raise RuntimeError(f"params_file is '{params_file}', and there is no such file")

    overrides = {name: value[name] for name in ("model", "device", "image_transport") if value[name]}
    for name in ("offline", "use_sim_time", "autostart", "enabled"):
        if value[name]:
            overrides[name] = boolean(name, value[name])
    names = split_names(value["vocabulary"])
    if names:
        overrides["vocabulary"] = names

    image_topic = value["image_topic"]
    remappings = [("image", image_topic), ("image/compressed", f"{image_topic}/compressed")]
    depth = [(name, value[f"{name}_topic"]) for name in ("depth", "camera_info") if value[f"{name}_topic"]]
    if depth:
        overrides["use_depth"] = True
    # The node's logger is named after its namespace, which a group around this file may have put a prefix to.
    namespace = prefix_namespace(context.launch_configurations.get("ros_namespace"), value["namespace"])
    logger = f"{namespace or ''}/nerve".strip("/").replace("/", ".")
    enclave = ["--enclave", value["enclave"]] if value["enclave"] else []
    actions = [
        Node(
            package="nerve_ros",
            executable="nerve_node",
            name="nerve",
            namespace=value["namespace"],
            parameters=[str(params_file), *([overrides] if overrides else [])],
            remappings=[*(remappings if image_topic != "image" else []), *depth],
            ros_arguments=["--log-level", f"{logger}:={value['log_level']}", *enclave],
            output="screen",
            emulate_tty=True,
            respawn=boolean("respawn", value["respawn"]),
            respawn_delay=seconds("respawn_delay", value["respawn_delay"]),
            on_exit=leave_ended,
        )
    ]
    if boolean("rviz", value["rviz"] or "false"):
        actions.append(rviz(value["namespace"], remappings, overrides.get("use_sim_time", False), context))
    return actions


def leave_ended(event: ProcessExited, context: LaunchContext) -> list:
    """Hold launch, which starts again whatever ends, from starting what was asked to end or refuses its settings."""
    if event.returncode not in (0, 2):
        return []
    return [EmitEvent(event=ShutdownProcess(process_matcher=matches_action(event.action)))]


def rviz(namespace: str, remappings: list, use_sim_time: bool, context: LaunchContext) -> Node:
    """RViz in the node's namespace and with its remappings: the topics in its file are relative ones."""
    try:
        get_package_prefix("rviz2")
    except PackageNotFoundError:
        distribution = context.environment.get("ROS_DISTRO", "<distribution>")
        raise RuntimeError(
            f"rviz:=true needs rviz2, which is not installed: sudo apt install ros-{distribution}-rviz2"
        ) from None
    return Node(
        package="rviz2",
        executable="rviz2",
        namespace=namespace,
        arguments=["-d", PathJoinSubstitution([SHARE, "config", "nerve.rviz"])],
        parameters=[{"use_sim_time": use_sim_time}],
        remappings=remappings,
    )


def boolean(name: str, text: str) -> bool:
    """The truth value that an argument's text stands for. Raises RuntimeError for any other text."""
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise RuntimeError(f"{name} is '{text}'; accepted: true, false")
    return values[text.lower()]


def seconds(name: str, text: str) -> float:
    """The time that an argument's text stands for. Raises RuntimeError for any other text."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    # Not 0: launch can be held from starting a node again only while it waits to do so.
    if not 0.1 <= number <= 3600.0:
        raise RuntimeError(f"{name} is '{text}'; accepted: seconds, 0.1 to 3600")
    return number
