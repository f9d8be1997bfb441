"""A peer that means harm: raw bytes, floods and huge messages, made here since a pipe of JSON would take too long."""

from __future__ import annotations

import os
import sys
import time

from rcl_interfaces.srv import SetParametersAtomically
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image

from nerve_ros.msg import Vocabulary
from peer import TYPES, Peer


class Stranger(Peer):
    """peer.Peer with more commands."""

    def do_bytes(self, *, topic: str, type: str, data: str, count: int = 1) -> dict:
        """Publish bytes, in hexadecimal, where a message of that type is expected."""
        if topic not in self.publishers:
            self.publishers[topic] = self.node.create_publisher(TYPES[type], topic, 10)
        for _ in range(count):
            self.publishers[topic].publish(bytes.fromhex(data))
        return {}

    def do_large_vocabulary(self, *, entries: int, characters: int) -> dict:
        """Publish a vocabulary of so many entries of so many characters each, all different."""
        names = [f"{number:08d}".ljust(characters, "x") for number in range(entries)]
        self.publisher("vocabulary").publish(Vocabulary(names=names))
        return {}

    def do_large_strings(self, *, encoding: int = 0, frame_id: int = 0) -> dict:
        """Publish an image whose encoding or frame_id has so many characters."""
        image = Image(width=1, height=1, step=3, encoding="e" * encoding or "rgb8", data=bytes(3))
        image.header.frame_id = "f" * frame_id
        self.publisher("image").publish(image)
        return {}

    def do_flood_of_images(self, *, count: int, encoding: str) -> dict:
        """Publish so many small images of an encoding that there is not, as fast as they go."""
        publisher = self.publisher("image")
        image = Image(width=2, height=2, step=6, encoding=encoding, data=bytes(12))
        for number in range(count):
            publisher.publish(image)
            if number % 20 == 0:
                time.sleep(0.002)  # what comes faster is lost on its way
        return {}

    def do_flood_of_vocabularies(self, *, count: int) -> dict:
        """Publish so many vocabularies, good and bad in turn."""
        publisher = self.publisher("vocabulary")
        for number in range(count):
            publisher.publish(Vocabulary(names=["bad\x1b[2J"] if number % 2 else [f"good {number % 7}"]))
            time.sleep(0.001)
        return {}

    def do_many_parameters(self, *, count: int, timeout: float = 60.0) -> dict:
        """Set so many parameters in one request, most of which there are not."""
        given = [Parameter(f"strange_{number}", value="\x1b[31m%s" * 10) for number in range(count - 1)]
        request = SetParametersAtomically.Request(
            parameters=[made.to_parameter_msg() for made in (*given, Parameter("threshold", value=0.5))]
        )
        result = self.call(SetParametersAtomically, f"{self.target}/set_parameters_atomically", request, timeout).result
        return {"successful": result.successful, "reason": result.reason}


if __name__ == "__main__":
    Stranger(sys.argv[1]).run()
    os._exit(0)
