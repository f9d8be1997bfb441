"""A process at the other end of DDS, steered by lines of JSON: publishes, subscribes, calls services for the tests.

Reads one command a line from standard input, {"id": 1, "do": "...", ...}, and answers each with {"reply": 1, ...}. What
its subscriptions receive it prints as {"event": "...", ...} as it comes. harness.Peer is the other side of the pipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters, SetParameters
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header, String
from vision_msgs.msg import LabelInfo

import pictures
from nerve_ros.msg import ClassConfidenceArray, Vocabulary

KINDS = {
    "mask": ("segmentation/mask", Image),
    "confidence": ("segmentation/confidence", Image),
    "overlay": ("segmentation/overlay", Image),
    "label_info": ("segmentation/label_info", LabelInfo),
    "class_confidence": ("segmentation/class_confidence", ClassConfidenceArray),
    "diagnostics": ("/diagnostics", DiagnosticArray),
}
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
RELIABLE = QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE)
CAMERA = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT, durability=DurabilityPolicy.VOLATILE)
PUBLISHED = {
    "image": (Image, CAMERA),
    "image/compressed": (CompressedImage, CAMERA),
    "vocabulary": (Vocabulary, LATCHED),
    "vocabulary_text": (String, RELIABLE),
}


class Peer:
    """One ROS node with whatever the commands ask for."""

    def __init__(self, name: str) -> None:
        rclpy.init()
        self.node = rclpy.create_node(name)
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.output_lock = threading.Lock()
        self.subscriptions: dict[str, object] = {}
        self.publishers: dict[str, object] = {}
        self.clients: dict[str, object] = {}
        self.stream: threading.Event | None = None
        self.streamed = 0

    def tell(self, **line: object) -> None:
        text = json.dumps(line)
        with self.output_lock:
            print(text, flush=True)

    # Receiving.

    def do_subscribe(self, *, kind: str) -> dict:
        topic, message_type = KINDS[kind]
        qos = LATCHED if kind == "label_info" else RELIABLE
        self.subscriptions[kind] = self.node.create_subscription(
            message_type, topic, lambda message, info, kind=kind: self.received(kind, message, info), qos
        )
        return {}

    def do_unsubscribe(self, *, kind: str) -> dict:
        self.node.destroy_subscription(self.subscriptions.pop(kind))
        return {}

    def received(self, kind: str, message: object, info: dict) -> None:
        line = {"event": kind, "received": time.time(), "sent": info["source_timestamp"] * 1e-9}
        if kind == "diagnostics":
            for status in message.status:
                values = {pair.key: pair.value for pair in status.values}
                self.tell(**line, name=status.name, level=status.level[0], message=status.message, values=values)
            return
        stamp = [message.header.stamp.sec, message.header.stamp.nanosec]
        line |= {"stamp": stamp, "frame_id": message.header.frame_id}
        if kind == "label_info":
            classes = {str(entry.class_id): entry.class_name for entry in message.class_map}
            line |= {"classes": classes, "threshold": message.threshold}
        elif kind == "class_confidence":
            line["classes"] = [
                {
                    "name": seen.name,
                    "id": seen.id,
                    "presence": seen.presence,
                    "mean_probability": seen.mean_probability,
                    "peak_probability": seen.peak_probability,
                    "area": seen.area,
                    "box": [seen.box.x_offset, seen.box.y_offset, seen.box.width, seen.box.height],
                    "centroid": [repr(seen.centroid_x), repr(seen.centroid_y)],
                }
                for seen in message.classes
            ]
        else:
            data = np.frombuffer(message.data, np.uint8)
            counts = np.bincount(data, minlength=256)
            line |= {
                "height": message.height,
                "width": message.width,
                "step": message.step,
                "encoding": message.encoding,
                "length": int(data.size),
                "digest": hashlib.sha256(data).hexdigest(),
                "counts": {str(value): int(counts[value]) for value in np.flatnonzero(counts)},
            }
        self.tell(**line)

    # Publishing.

    def publisher(self, topic: str):
        if topic not in self.publishers:
            message_type, qos = PUBLISHED[topic]
            self.publishers[topic] = self.node.create_publisher(message_type, topic, qos)
        return self.publishers[topic]

    def do_advertise(self, *, topic: str) -> dict:
        """Create the publisher and wait until somebody listens."""
        publisher = self.publisher(topic)
        deadline = time.monotonic() + 30.0
        while publisher.get_subscription_count() == 0:
            if time.monotonic() > deadline:
                return {"error": f"nobody subscribes to {topic}"}
            time.sleep(0.02)
        return {}

    def do_image(self, *, picture: dict, stamp: list[int] | None = None, frame_id: str = "camera") -> dict:
        message = pictures.message(picture, self.header(stamp, frame_id))
        topic = "image/compressed" if isinstance(message, CompressedImage) else "image"
        self.publisher(topic).publish(message)
        return {"stamp": [message.header.stamp.sec, message.header.stamp.nanosec]}

    def do_stream(self, *, picture: dict, rate: float) -> dict:
        """Publish the picture `rate` times a second, stamped with the time of publishing, until told to stop."""
        message = pictures.message(picture, self.header(None, "camera"))
        publisher = self.publisher("image")
        self.stream, self.streamed = threading.Event(), 0

        def run(stop: threading.Event) -> None:
            due = time.monotonic()
            while not stop.wait(max(0.0, due - time.monotonic())):
                message.header = self.header(None, "camera")
                publisher.publish(message)
                self.streamed += 1
                due += 1.0 / rate

        threading.Thread(target=run, args=(self.stream,), daemon=True).start()
        return {}

    def do_stop_stream(self) -> dict:
        if self.stream is not None:
            self.stream.set()
        return {"streamed": self.streamed}

    def do_vocabulary(self, *, names: list[str]) -> dict:
        self.publisher("vocabulary").publish(Vocabulary(names=names))
        return {}

    def do_vocabulary_text(self, *, text: str) -> dict:
        self.publisher("vocabulary_text").publish(String(data=text))
        return {}

    def header(self, stamp: list[int] | None, frame_id: str) -> Header:
        if stamp is None:
            now = time.time_ns()
            stamp = [now // 10**9, now % 10**9]
        return Header(stamp=Time(sec=stamp[0], nanosec=stamp[1]), frame_id=frame_id)

    # Services.

    def call(self, service_type: type, name: str, request: object, timeout: float) -> object:
        if name not in self.clients:
            self.clients[name] = self.node.create_client(service_type, name)
        client = self.clients[name]
        if not client.wait_for_service(timeout):
            raise TimeoutError(f"no service {name}")
        done = threading.Event()
        future = client.call_async(request)
        future.add_done_callback(lambda _: done.set())
        if not done.wait(timeout):
            raise TimeoutError(f"no answer from {name}")
        return future.result()

    def do_set_parameter(self, *, name: str, value: object, kind: str | None = None, timeout: float = 30.0) -> dict:
        """Set one parameter; `kind` names its type where the value does not (an empty list)."""
        made = Parameter(name, Parameter.Type[kind], value) if kind else Parameter(name, value=value)
        request = SetParameters.Request(parameters=[made.to_parameter_msg()])
        result = self.call(SetParameters, "nerve/set_parameters", request, timeout).results[0]
        return {"successful": result.successful, "reason": result.reason}

    def do_set_broken_parameter(self, *, name: str, type_number: int, timeout: float = 5.0) -> dict:
        """Ask for a parameter of a type that does not exist: rclpy gives no answer to that."""
        message = ParameterMessage(name=name)
        message.value.type = type_number
        try:
            self.call(SetParameters, "nerve/set_parameters", SetParameters.Request(parameters=[message]), timeout)
        except TimeoutError:
            return {"answered": False}
        return {"answered": True}

    def do_get_parameter(self, *, name: str, timeout: float = 30.0) -> dict:
        response = self.call(GetParameters, "nerve/get_parameters", GetParameters.Request(names=[name]), timeout)
        value = parameter_value_to_python(response.values[0])
        return {"value": list(value) if isinstance(value, list | tuple) else value}

    def do_describe_parameters(self, *, timeout: float = 30.0) -> dict:
        listed = self.call(ListParameters, "nerve/list_parameters", ListParameters.Request(), timeout)
        names = list(listed.result.names)
        request = DescribeParameters.Request(names=names)
        found = self.call(DescribeParameters, "nerve/describe_parameters", request, timeout).descriptors
        return {
            "parameters": {
                name: {
                    "type": made.type,
                    "description": made.description,
                    "read_only": made.read_only,
                    "constraints": made.additional_constraints,
                    "ranges": [[r.from_value, r.to_value] for r in made.floating_point_range],
                }
                for name, made in zip(names, found, strict=True)
            }
        }

    def do_transition(self, *, label: str, timeout: float = 120.0) -> dict:
        request = ChangeState.Request()
        request.transition.label = label
        return {"success": self.call(ChangeState, "nerve/change_state", request, timeout).success}

    def do_transition_by_id(self, *, number: int, timeout: float = 30.0) -> dict:
        request = ChangeState.Request()
        request.transition.id = number
        return {"success": self.call(ChangeState, "nerve/change_state", request, timeout).success}

    def do_state(self, *, timeout: float = 30.0) -> dict:
        state = self.call(GetState, "nerve/get_state", GetState.Request(), timeout).current_state
        return {"state": state.label}

    # The pipe.

    def run(self) -> None:
        threading.Thread(target=self.spin, daemon=True).start()
        self.tell(event="ready")
        for line in sys.stdin:
            command = json.loads(line)
            number, do = command.pop("id"), command.pop("do")
            try:
                reply = getattr(self, f"do_{do}")(**command)
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            self.tell(reply=number, **reply)

    def spin(self) -> None:
        with suppress(ExternalShutdownException):
            self.executor.spin()


if __name__ == "__main__":
    Peer(sys.argv[1]).run()
    os._exit(0)
