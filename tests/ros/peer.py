"""A process at the other end of DDS, steered by lines of JSON: publishes, subscribes, calls services for the tests.

Reads one command a line from standard input, {"id": 1, "do": "...", ...}, and answers each with {"reply": 1, ...}. What
its subscriptions receive it prints as {"event": "...", ...} as it comes. It ends in order when its standard input ends.
harness.Peer is the other side of the pipe.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Point, Vector3
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters, SetParameters
from rclpy.event_handler import PublisherEventCallbacks
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import NodeNameNonExistentError
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, RegionOfInterest
from std_msgs.msg import Header, String
from std_srvs.srv import SetBool
from vision_msgs.msg import LabelInfo

import pictures
from nerve_ros.msg import ClassConfidenceArray, DenseConfidence, Vocabulary
from nerve_ros.srv import Locate, SetVocabulary

KINDS = {
    "mask": ("segmentation/mask", Image),
    "confidence": ("segmentation/confidence", Image),
    "overlay": ("segmentation/overlay", Image),
    "label_info": ("segmentation/label_info", LabelInfo),
    "class_confidence": ("segmentation/class_confidence", ClassConfidenceArray),
    "dense": ("nerve/dense", DenseConfidence),
    "diagnostics": ("/diagnostics", DiagnosticArray),
}
TYPES = {
    made.__name__: made
    for made in (
        Image,
        CompressedImage,
        CameraInfo,
        String,
        Vocabulary,
        LabelInfo,
        ClassConfidenceArray,
        DenseConfidence,
    )
}
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
RELIABLE = QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE)
CAMERA = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT, durability=DurabilityPolicy.VOLATILE)
PUBLISHED = {
    "image": (Image, CAMERA),
    "image/compressed": (CompressedImage, CAMERA),
    "depth": (Image, CAMERA),
    "camera_info": (CameraInfo, CAMERA),
    "vocabulary": (Vocabulary, LATCHED),
    "vocabulary_text": (String, RELIABLE),
}


def quality(qos: QoSProfile, reliability: str | None, durability: str | None) -> QoSProfile:
    """`qos` with the policies that are named ("best_effort", "transient_local", ...) instead of its own."""
    return QoSProfile(
        depth=qos.depth,
        reliability=ReliabilityPolicy[reliability.upper()] if reliability else qos.reliability,
        durability=DurabilityPolicy[durability.upper()] if durability else qos.durability,
    )


def stamp_of(header: Header) -> dict:
    return {"stamp": [header.stamp.sec, header.stamp.nanosec], "frame_id": header.frame_id}


def box_of(box: RegionOfInterest) -> list[int]:
    return [box.x_offset, box.y_offset, box.width, box.height]


def place_of(place: Point | Vector3) -> list[float]:
    return [place.x, place.y, place.z]


def picture_of(image: Image) -> dict:
    return {"height": image.height, "width": image.width, "step": image.step, "encoding": image.encoding} | data_of(
        np.frombuffer(image.data, np.uint8)
    )


def data_of(data: np.ndarray) -> dict:
    counts = np.bincount(data, minlength=256)
    return {
        "length": int(data.size),
        "digest": hashlib.sha256(data).hexdigest(),
        "counts": {str(value): int(counts[value]) for value in np.flatnonzero(counts)},
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
        self.target = "nerve"
        self.stream: threading.Event | None = None
        self.streaming: threading.Thread | None = None
        self.streamed = 0

    def tell(self, **line: object) -> None:
        text = json.dumps(line)
        with self.output_lock:
            print(text, flush=True)

    # Receiving.

    def do_subscribe(
        self,
        *,
        kind: str,
        topic: str | None = None,
        type: str = "Image",
        reliability: str | None = None,
        durability: str | None = None,
    ) -> dict:
        """Print an event called `kind` for each message: of that topic, or of the topic and message type given."""
        name, message_type = KINDS[kind] if topic is None else (topic, TYPES[type])
        qos = quality(LATCHED if message_type is LabelInfo else RELIABLE, reliability, durability)
        self.subscriptions[kind] = self.node.create_subscription(
            message_type, name, lambda message, info, kind=kind: self.received(kind, message, info), qos
        )
        return {}

    def do_unsubscribe(self, *, kind: str) -> dict:
        self.in_turn(self.node.destroy_subscription, self.subscriptions.pop(kind))
        return {}

    def received(self, kind: str, message: object, info: dict) -> None:
        line = {"event": kind, "received": time.time(), "sent": info["source_timestamp"] * 1e-9}
        if isinstance(message, DiagnosticArray):
            for status in message.status:
                values = {pair.key: pair.value for pair in status.values}
                self.tell(**line, name=status.name, level=status.level[0], message=status.message, values=values)
            return
        if isinstance(message, String):
            self.tell(**line, data=message.data)
            return
        line |= stamp_of(message.header)
        if isinstance(message, LabelInfo):
            classes = {str(entry.class_id): entry.class_name for entry in message.class_map}
            line |= {"classes": classes, "threshold": message.threshold}
        elif isinstance(message, ClassConfidenceArray):
            line["classes"] = [
                {
                    "name": seen.name,
                    "id": seen.id,
                    "presence": seen.presence,
                    "mean_probability": seen.mean_probability,
                    "peak_probability": seen.peak_probability,
                    "area": seen.area,
                    "box": box_of(seen.box),
                    "centroid": [repr(seen.centroid_x), repr(seen.centroid_y)],
                }
                for seen in message.classes
            ]
        elif isinstance(message, DenseConfidence):
            maps = np.frombuffer(message.data, np.uint8)
            line |= {"height": message.height, "width": message.width, "names": message.names, "ids": list(message.ids)}
            line |= {"length": int(maps.size)}
            if maps.size == len(message.names) * message.height * message.width:
                line["maps"] = [data_of(one) for one in maps.reshape(len(message.names), -1)]
        elif isinstance(message, Image):
            line |= picture_of(message)
        self.tell(**line)

    # Publishing.

    def publisher(self, topic: str, message_type: type | None = None, qos: QoSProfile = CAMERA):
        """The publisher of a topic; made with that type and quality, or those of PUBLISHED, where there is none yet."""
        if topic not in self.publishers:
            if message_type is None:
                message_type, qos = PUBLISHED[topic]
            # Without events the executor does not hold it, and it is gone as soon as it is destroyed.
            no_events = PublisherEventCallbacks(use_default_callbacks=False)
            self.publishers[topic] = self.node.create_publisher(message_type, topic, qos, event_callbacks=no_events)
        return self.publishers[topic]

    def do_advertise(
        self,
        *,
        topic: str,
        type: str | None = None,
        reliability: str | None = None,
        durability: str | None = None,
        wait: bool = True,
    ) -> dict:
        """Create the publisher, of the topic's own type and quality or of those given; wait until somebody listens."""
        message_type, qos = PUBLISHED.get(topic, (Image, CAMERA))
        publisher = self.publisher(topic, TYPES[type] if type else message_type, quality(qos, reliability, durability))
        deadline = time.monotonic() + 30.0
        while wait and publisher.get_subscription_count() == 0:
            if time.monotonic() > deadline:
                return {"error": f"nobody subscribes to {topic}"}
            time.sleep(0.02)
        return {}

    def do_image(self, *, picture: dict, stamp: list[int] | None = None, frame_id: str = "camera") -> dict:
        message = pictures.message(picture, self.header(stamp, frame_id))
        topic = "image/compressed" if isinstance(message, CompressedImage) else "image"
        self.publisher(topic).publish(message)
        return {"stamp": [message.header.stamp.sec, message.header.stamp.nanosec]}

    def do_withdraw(self, *, topic: str) -> dict:
        """Destroy the publisher."""
        self.in_turn(self.node.destroy_publisher, self.publishers.pop(topic))
        return {}

    def do_message(
        self,
        *,
        topic: str,
        type: str,
        fields: dict | None = None,
        data: str | None = None,
        stamp: list[int] | None = None,
        frame_id: str = "camera",
    ) -> dict:
        """Publish any message: `fields` as they stand, `data` in base64, both unchecked; a header where it has one."""
        message = TYPES[type](**(fields or {}))
        if hasattr(message, "header"):
            message.header = self.header(stamp, frame_id)
        if data is not None:
            message.data.frombytes(base64.b64decode(data))
        self.publisher(topic, TYPES[type], PUBLISHED.get(topic, (None, CAMERA))[1]).publish(message)
        return {}

    def do_depth(
        self,
        *,
        width: int,
        height: int,
        metres: float,
        slope: tuple[float, float] = (0.0, 0.0),
        boxes: list[list[float]] = (),
        encoding: str = "16UC1",
        stamp: list[int] | None = None,
        frame_id: str = "camera",
        topic: str = "depth",
    ) -> dict:
        """Publish a depth image (16UC1 in millimetres or 32FC1 in metres).

        A plane: `metres` in the first pixel, and `slope` metres more a pixel to the right and down. Each of `boxes` is
        [left, top, width, height, metres]: an upright thing before it; 0 metres: not measured.
        """
        rows, columns = np.mgrid[0:height, 0:width]
        depth = metres + slope[0] * columns + slope[1] * rows
        for left, top, box_width, box_height, distance in boxes:
            depth[int(top) : int(top + box_height), int(left) : int(left + box_width)] = distance
        if encoding == "16UC1":
            data = np.rint(depth * 1000).astype("<u2")
        else:
            data = np.where(depth > 0, depth, np.nan).astype("<f4")
        message = Image(header=self.header(stamp, frame_id), height=height, width=width, encoding=encoding)
        message.step = width * data.itemsize
        message.data.frombytes(data.tobytes())
        self.publisher(topic).publish(message)
        return stamp_of(message.header)

    def do_camera_info(
        self,
        *,
        width: int,
        height: int,
        focal: float,
        centre: tuple[float, float] | None = None,
        distortion: list[float] = (),
        stamp: list[int] | None = None,
        frame_id: str = "camera",
        topic: str = "camera_info",
    ) -> dict:
        """Publish the intrinsics of a pinhole camera: `focal` length and `centre` (default the middle) in pixels."""
        x, y = centre if centre is not None else ((width - 1) / 2, (height - 1) / 2)
        message = CameraInfo(header=self.header(stamp, frame_id), height=height, width=width)
        message.distortion_model = "plumb_bob"
        message.d = [float(value) for value in distortion]
        message.k = [float(focal), 0.0, float(x), 0.0, float(focal), float(y), 0.0, 0.0, 1.0]
        message.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
        message.p = [*message.k[:3], 0.0, *message.k[3:6], 0.0, *message.k[6:], 0.0]
        self.publisher(topic).publish(message)
        return stamp_of(message.header)

    def do_stream(self, *, picture: dict, rate: float, topic: str = "image") -> dict:
        """Publish the picture `rate` times a second, stamped with the time of publishing, until asked to stop."""
        message = pictures.message(picture, self.header(None, "camera"))
        publisher = self.publisher(topic)
        self.stream, self.streamed = threading.Event(), 0

        def run(stop: threading.Event) -> None:
            due = time.monotonic()
            while not stop.wait(max(0.0, due - time.monotonic())):
                message.header = self.header(None, "camera")
                publisher.publish(message)
                self.streamed += 1
                due += 1.0 / rate

        self.streaming = threading.Thread(target=run, args=(self.stream,), daemon=True)
        self.streaming.start()
        return {}

    def do_stop_stream(self) -> dict:
        if self.stream is not None:
            self.stream.set()
            self.streaming.join()
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

    def client(self, service_type: type, name: str, timeout: float):
        if name not in self.clients:
            self.clients[name] = self.node.create_client(service_type, name)
        if not self.clients[name].wait_for_service(timeout):
            raise TimeoutError(f"no service {name}")
        return self.clients[name]

    def call(self, service_type: type, name: str, request: object, timeout: float) -> object:
        client = self.client(service_type, name, timeout)
        done = threading.Event()
        future = client.call_async(request)
        future.add_done_callback(lambda _: done.set())
        if not done.wait(timeout):
            raise TimeoutError(f"no answer from {name}")
        return future.result()

    def do_target(self, *, node: str) -> dict:
        """Which node the services are asked of from now on, for example "/front/nerve"."""
        self.target = node
        return {}

    def do_locate(self, *, name: str, want_mask: bool = True, timeout: float = 60.0) -> dict:
        began = time.monotonic()
        request = Locate.Request(name=name, want_mask=want_mask)
        answer = self.call(Locate, f"{self.target}/locate", request, timeout)
        return {"seconds": time.monotonic() - began, **self.located(answer)}

    def do_locate_all(self, *, names: list[str], timeout: float = 60.0) -> dict:
        """Ask for all names at once; the answers in their order, None for one that does not come."""
        client = self.client(Locate, f"{self.target}/locate", timeout)
        futures = [client.call_async(Locate.Request(name=name)) for name in names]
        deadline = time.monotonic() + timeout
        while not all(future.done() for future in futures) and time.monotonic() < deadline:
            time.sleep(0.02)
        return {"answers": [self.located(future.result()) if future.done() else None for future in futures]}

    def located(self, answer: Locate.Response) -> dict:
        return {
            **stamp_of(answer.header),
            "success": answer.success,
            "message": answer.message,
            "found": answer.found,
            "confidence": answer.confidence,
            "mask": picture_of(answer.mask),
            "box": box_of(answer.box),
            "centroid": [answer.centroid_x, answer.centroid_y],
            "has_point": answer.has_point,
            "point": place_of(answer.point),
            "spread": place_of(answer.spread),
        }

    def do_set_vocabulary(self, *, names: list[str], timeout: float = 60.0) -> dict:
        request = SetVocabulary.Request(names=names)
        answer = self.call(SetVocabulary, f"{self.target}/set_vocabulary", request, timeout)
        return {"accepted": answer.accepted, "message": answer.message, "ids": list(answer.ids)}

    def do_enable(self, *, on: bool, timeout: float = 30.0) -> dict:
        answer = self.call(SetBool, f"{self.target}/enable", SetBool.Request(data=on), timeout)
        return {"success": answer.success, "message": answer.message}

    def do_set_parameter(self, *, name: str, value: object, kind: str | None = None, timeout: float = 30.0) -> dict:
        """Set one parameter; `kind` names its type where the value does not (an empty list)."""
        made = Parameter(name, Parameter.Type[kind], value) if kind else Parameter(name, value=value)
        request = SetParameters.Request(parameters=[made.to_parameter_msg()])
        result = self.call(SetParameters, f"{self.target}/set_parameters", request, timeout).results[0]
        return {"successful": result.successful, "reason": result.reason}

    def do_set_broken_parameter(self, *, name: str, type_number: int, timeout: float = 5.0) -> dict:
        """Ask for a parameter of a type that does not exist: rclpy gives no answer to that."""
        message = ParameterMessage(name=name)
        message.value.type = type_number
        try:
            self.call(
                SetParameters, f"{self.target}/set_parameters", SetParameters.Request(parameters=[message]), timeout
            )
        except TimeoutError:
            return {"answered": False}
        return {"answered": True}

    def do_get_parameter(self, *, name: str, timeout: float = 30.0) -> dict:
        response = self.call(
            GetParameters, f"{self.target}/get_parameters", GetParameters.Request(names=[name]), timeout
        )
        value = parameter_value_to_python(response.values[0])
        return {"value": list(value) if isinstance(value, list | tuple) else value}

    def do_describe_parameters(self, *, timeout: float = 30.0) -> dict:
        listed = self.call(ListParameters, f"{self.target}/list_parameters", ListParameters.Request(), timeout)
        names = list(listed.result.names)
        request = DescribeParameters.Request(names=names)
        found = self.call(DescribeParameters, f"{self.target}/describe_parameters", request, timeout).descriptors
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
        return {"success": self.call(ChangeState, f"{self.target}/change_state", request, timeout).success}

    def do_transition_by_id(self, *, number: int, timeout: float = 30.0) -> dict:
        request = ChangeState.Request()
        request.transition.id = number
        return {"success": self.call(ChangeState, f"{self.target}/change_state", request, timeout).success}

    def do_state(self, *, timeout: float = 30.0) -> dict:
        state = self.call(GetState, f"{self.target}/get_state", GetState.Request(), timeout).current_state
        return {"state": state.label}

    def do_graph(self, *, node: str, namespace: str = "/") -> dict:
        """What a node has on the network: name -> types, by kind; nothing of one that is not discovered yet."""
        kinds = {
            "publishers": self.node.get_publisher_names_and_types_by_node,
            "subscriptions": self.node.get_subscriber_names_and_types_by_node,
            "services": self.node.get_service_names_and_types_by_node,
            "clients": self.node.get_client_names_and_types_by_node,
        }
        try:
            return {kind: dict(names(node, namespace)) for kind, names in kinds.items()}
        except NodeNameNonExistentError:
            return {kind: {} for kind in kinds}

    # The pipe.

    def run(self) -> None:
        spinning = threading.Thread(target=self.spin, daemon=True)
        spinning.start()
        self.tell(event="ready")
        for line in sys.stdin:
            command = json.loads(line)
            number, do = command.pop("id"), command.pop("do")
            try:
                reply = getattr(self, f"do_{do}")(**command)
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            self.tell(reply=number, **reply)
        self.do_stop_stream()
        self.executor.shutdown()
        spinning.join()
        self.node.destroy_node()
        rclpy.try_shutdown()

    def in_turn(self, do: Callable[[object], object], argument: object) -> None:
        """Have the executor do it between two callbacks: what is destroyed while it waits for it ends the spinning."""
        done = threading.Event()
        self.executor.create_task(lambda: (do(argument), done.set()))
        if not done.wait(30.0):
            raise TimeoutError("the executor does not spin")

    def spin(self) -> None:
        with suppress(ExternalShutdownException):
            self.executor.spin()


if __name__ == "__main__":
    Peer(sys.argv[1]).run()
    os._exit(0)  # not by way of the interpreter's end, where rclpy's objects may go in an order that aborts
