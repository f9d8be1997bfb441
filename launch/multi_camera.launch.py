"""Starts a node `nerve` for each of several cameras, each in a namespace of its own.

    ros2 launch nerve_ros multi_camera.launch.py cameras:="front, rear" image_topic:="/{camera}/image_raw"

The arguments are those of nerve.launch.py, and go to each node; `{camera}` in one of them stands for the camera's name.
With `params_file:=/path/to/{camera}.yaml` each has a file of its own. The nodes are processes and share nothing but the
device: each holds the models once more. Measured with the embedded pair on the CPU, 1, 2 and 3 nodes: 0.66 GB of memory
each (0.80 GB resident, of which 0.17 GB are libraries that all of them share). On a GPU `sd21-clipl14` has 2.5 GB of
16-bit weights a node; the CUDA context and a frame's work memory come on top and were not measured.
"""

import re

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription  # type: ignore[attr-defined] # to mypy `launch` is this folder
from launch.actions import DeclareLaunchArgument, GroupAction, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

ONE_CAMERA = f"{get_package_share_directory('nerve_ros')}/launch/nerve.launch.py"

ARGUMENTS = [
    DeclareLaunchArgument("cameras", description="Names of the cameras, with commas: 'front, rear'."),
    DeclareLaunchArgument(
        "namespace", default_value="{camera}", description="Namespace of each node and its topics: 'robot1/{camera}'."
    ),
]


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, one camera's included; what depends on their values is done when they are known."""
    one = PythonLaunchDescriptionSource(ONE_CAMERA).get_launch_description(LaunchContext())
    own = [argument.name for argument in ARGUMENTS]
    shared = [entity for entity in one.entities if isinstance(entity, DeclareLaunchArgument) and entity.name not in own]
    names = [argument.name for argument in shared]
    return LaunchDescription([*ARGUMENTS, *shared, OpaqueFunction(function=start, args=[["namespace", *names]])])


def start(context: LaunchContext, names: list[str]) -> list:
    """Include one camera's launch file for each, with the values of the arguments `names`."""
    cameras = [name.strip() for name in LaunchConfiguration("cameras").perform(context).split(",") if name.strip()]
    if not cameras or len(set(cameras)) < len(cameras):
        raise RuntimeError(f"cameras names {', '.join(cameras) or 'none'}; accepted: one or more different names")
    for camera in cameras:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", camera):
            raise RuntimeError(f"'{camera}' is no name for a camera; accepted: a letter, then letters, digits and _")
    value = {name: LaunchConfiguration(name).perform(context) for name in names}
    if len(cameras) > 1 and "{camera}" not in value["namespace"]:
        raise RuntimeError(f"namespace is '{value['namespace']}' for every camera; put {{camera}} into it")
    return [
        GroupAction(
            [
                IncludeLaunchDescription(
                    PythonLaunchDescriptionSource(ONE_CAMERA),
                    launch_arguments=[(name, text.replace("{camera}", camera)) for name, text in value.items()],
                )
            ]
        )
        for camera in cameras
    ]
