"""Plays a bag's images as a camera would publish them, and asks for names.

Images go out raw (bgr8, best effort, as camera drivers send them) when their time in the bag has come, by the steady
clock. Their stamps are the bag's, moved by one offset so that the first one is now: the ages that the node reports
hold. What happens is reported on standard output, one JSON object a line:

    {"event": "ready"}                                  the node listens and has taken the first names; after the start
    {"event": "asked", "names": [...], "time": T}       a vocabulary went out
    {"event": "frame", "index": I, "stamp": NS, "time": T}  image I of the bag went out with this stamp
    {"event": "end", "published": N}

T is the steady clock (seconds), which all processes of a machine share.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, TextIO

import cv2
import numpy as np
import rclpy
import typer
from builtin_interfaces.msg import Time
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.utilities import remove_ros_args
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header
from vision_msgs.msg import LabelInfo

from nerve_core.console import printable
from nerve_ros.demo.collector import NODE
from nerve_ros.demo.recording import Recording, RecordingError, read_recording
from nerve_ros.demo.schedule import Asking, load_schedule, usual_schedule
from nerve_ros.demo.spinning import Spinning
from nerve_ros.msg import Vocabulary

SETTLE = 0.5
"""Seconds between the first sign of a subscription and the first image: discovery has two sides."""

_LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
CAMERA = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT, durability=DurabilityPolicy.VOLATILE)


class PlayerError(RuntimeError):
    """The bag could not be played; the text says why."""


class Player:
    """A ROS node `nerve_player`: publishes image, camera_info and vocabulary, hears segmentation/label_info."""

    def __init__(self, output: TextIO, namespace: str = "/") -> None:
        self._output = output
        self._node = rclpy.create_node("nerve_player", namespace=namespace)
        self._image = self._node.create_publisher(Image, "image", CAMERA)
        self._camera_info = self._node.create_publisher(CameraInfo, "camera_info", CAMERA)
        self._vocabulary = self._node.create_publisher(Vocabulary, "vocabulary", _LATCHED)
        self._classes: set[str] = set()
        self._node.create_subscription(LabelInfo, "segmentation/label_info", self._on_label_info, _LATCHED)
        self._spinning = Spinning(self._node)

    def close(self) -> None:
        """Stop and give everything back."""
        self._spinning.close()

    def ask(self, asking: Asking) -> None:
        """Publish a vocabulary."""
        header = Header(stamp=self._node.get_clock().now().to_msg())
        self._report("asked", names=asking.names, time=time.monotonic())
        self._vocabulary.publish(Vocabulary(header=header, names=list(asking.entries)))

    def wait_for_listener(self, asking: Asking, patience: float) -> None:
        """Return when a node takes images and serves `asking`. Raises PlayerError after `patience` seconds."""
        wanted = {name.casefold() for name in asking.names}
        deadline = time.monotonic() + patience
        while not (self._serves(wanted) and self._is_heard()):
            if time.monotonic() > deadline:
                found = f"its classes are {sorted(self._classes)}" if self._classes else "no LabelInfo came"
                missing = (
                    "it serves the names, but takes no best-effort images there" if self._serves(wanted) else found
                )
                raise PlayerError(
                    f"no node took '{', '.join(asking.names)}' and images on {self._image.topic_name} within "
                    f"{patience:.0f} s; {missing}"
                )
            self._sleep(0.05)
        self._sleep(SETTLE)
        self._report("ready")

    def _serves(self, wanted: set[str]) -> bool:
        # One class more is the background, whatever it is called.
        return wanted <= self._classes and len(self._classes) <= len(wanted) + 1

    def _is_heard(self) -> bool:
        """Whether images reach the node, and every other that is known to take them as they are sent."""
        listeners = [
            (one.node_name, one.node_namespace)
            for one in self._node.get_subscriptions_info_by_topic(self._image.topic_name)
            if (one.qos_profile.reliability, one.qos_profile.durability) == (CAMERA.reliability, CAMERA.durability)
        ]
        node = (NODE, self._node.get_namespace())
        return node in listeners and self._image.get_subscription_count() >= len(listeners)

    def play(self, recording: Recording, schedule: tuple[Asking, ...], rate: float) -> int:
        """Publish every image at its time, `rate` times as fast as it was filmed; how many images went out.

        The first names of the schedule have been asked for already.
        """
        first = recording.frames[0].stamp
        waiting = list(schedule[1:])
        started, stamped = time.monotonic(), time.time_ns()
        for index, frame in enumerate(recording.frames):
            passed = frame.stamp - first
            while waiting and waiting[0].at * 1e9 <= passed:
                self.ask(waiting.pop(0))
            image = recording.image(index)
            stamp = stamped + round(passed / rate)
            header = Header(stamp=Time(sec=stamp // 10**9, nanosec=stamp % 10**9), frame_id=frame.frame_id)
            message = _image_message(header, image)
            camera_info = deserialize_message(frame.camera_info, CameraInfo)
            camera_info.header = header
            self._sleep(started + passed * 1e-9 / rate - time.monotonic())
            self._report("frame", index=index, stamp=stamp, time=time.monotonic())
            self._image.publish(message)
            self._camera_info.publish(camera_info)
        self._sleep(SETTLE)  # whatever is still on its way
        self._report("end", published=len(recording.frames))
        return len(recording.frames)

    def _sleep(self, seconds: float) -> None:
        if seconds > 0.0:
            time.sleep(seconds)
        if not rclpy.ok():
            raise PlayerError("asked to end")

    def _report(self, event: str, **values: object) -> None:
        print(json.dumps({"event": event, **values}), file=self._output, flush=True)

    def _on_label_info(self, message: LabelInfo) -> None:
        self._classes = {entry.class_name.casefold() for entry in message.class_map}


def _image_message(header: Header, image: np.ndarray) -> Image:
    height, width = image.shape[:2]
    message = Image(header=header, height=height, width=width, encoding="bgr8", step=3 * width)
    message.data.frombytes(image.data)
    return message


def main(
    bag: Annotated[Path, typer.Argument(help="The bag's folder.")],
    schedule: Annotated[
        str, typer.Option(help='What to ask for, and at which second: [{"at": 0.0, "entries": ["ball", "mug|cup"]}].')
    ] = "",
    seconds: Annotated[float, typer.Option(help="Play the beginning only.")] = float("inf"),
    rate: Annotated[float, typer.Option(min=0.01, max=100.0, help="How much faster than it was filmed.")] = 1.0,
    patience: Annotated[float, typer.Option(help="Seconds to wait for the node.")] = 300.0,
    wait_for_line: Annotated[
        bool, typer.Option("--wait-for-line", help="When ready, wait for a line on standard input.")
    ] = False,
) -> None:
    """Play a bag's images to the node `nerve`, and ask for names."""
    cv2.setNumThreads(1)
    player = None
    try:
        recording = read_recording(bag)
        recording = recording.beginning(min(seconds, recording.seconds))
        asked = load_schedule(schedule) if schedule else usual_schedule(recording.seconds, recording.names)
        rclpy.init(args=sys.argv)
        player = Player(sys.stdout)
        player.ask(asked[0])
        player.wait_for_listener(asked[0], patience)
        if wait_for_line and not sys.stdin.readline():
            raise PlayerError("asked to end")
        player.play(recording, asked, rate)
    except (RecordingError, PlayerError, ValueError) as error:
        print(printable(f"nerve_player: {error}"), file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        if player is not None:
            player.close()
        rclpy.try_shutdown()


def run() -> None:
    """The command: ROS arguments (--ros-args ...) are ROS's."""
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app(args=remove_ros_args(sys.argv)[1:])


if __name__ == "__main__":
    run()
