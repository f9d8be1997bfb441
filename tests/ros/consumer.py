"""A costmap layer's stand-in that lives on the node's topics, in a process of its own, and says where it is wronged.

It reads the topics as `semantic_segmentation_layer` does, in the one way that costs it dearly: a mask by
`data[v * width + u]` whatever encoding and step say, a confidence at the same place without a look at its length, ids
narrowed to a byte, the newest LabelInfo for everything it remembers, a null pointer where none came. What would crash
such a layer, or give a place a wrong cost, is printed as {"event": "breach", "rule": ..., "text": ...}; a frame that is
whole and in order as {"event": "frame", "stamp": ...}. The rules are those of the interface that the node promises.

DDS keeps the order within a topic and not between two, so that what came first is judged by the times of sending.
Frames are numbered (pictures.numbered), so that the size and the header that belong to a stamp are known: they stand
for the point cloud that a layer reads together with the mask.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import Header
from vision_msgs.msg import LabelInfo

import pictures
from nerve_ros.msg import ClassConfidenceArray

BACKGROUND, UNLABELLED = 0, 255
LABEL_INFO_PATIENCE = 15.0
"""Seconds that a LabelInfo may take that was sent before a mask and comes after it."""
REMEMBERED = 50
"""Frames that wait for the rest of themselves, at most."""
TOPICS = {
    "label_info": LabelInfo,
    "mask": Image,
    "confidence": Image,
    "class_confidence": ClassConfidenceArray,
}
DURABILITY = {"label_info": DurabilityPolicy.TRANSIENT_LOCAL}


class Layer:
    """What a costmap layer does with the messages. Knows no ROS but the messages' fields.

    breach(rule, text): something is wrong. frame(stamp): a frame was used. keep: seconds that a tile is remembered.
    background: the name of id 0.
    """

    def __init__(
        self,
        breach: Callable[[str, str], None],
        frame: Callable[[tuple[int, int]], None],
        *,
        keep: float,
        background: str = "background",
    ) -> None:
        self._breach, self._frame = breach, frame
        self._keep, self._background = keep, background
        self._subscribed = time.time()
        self._maps: list[tuple[float, dict[int, str], float]] = []
        self._ids: dict[str, int] = {}
        self._tiles: dict[int, tuple[str, float]] = {}
        self._parts: dict[tuple[int, int], dict[str, tuple[object, float]]] = {}
        self._used: set[tuple[int, int]] = set()
        self._waiting: list[tuple[float, dict[str, tuple[object, float]]]] = []

    def label_info(self, message: LabelInfo, sent: float) -> None:
        """Make a new table of costs, and cost by it whatever is remembered."""
        table: dict[int, str] = {}
        for entry in message.class_map:
            number = int(entry.class_id) & 0xFF
            if number != entry.class_id or number in table:
                self._breach("id range", f"{entry.class_name!r} has id {entry.class_id}: as a byte it is another's")
            table[number] = entry.class_name
        if UNLABELLED in table:
            self._breach("255 in map", f"{table[UNLABELLED]!r} would be costed where nothing is known")
        if table.get(BACKGROUND) != self._background:
            self._breach("background", f"id 0 is {table.get(BACKGROUND)!r}, not {self._background!r}")
        if sent < self._subscribed and self._maps:
            self._breach("label_info depth", "a late joiner gets LabelInfos that are no longer true")
        elif self._maps and self._maps[-1][1:] == (table, message.threshold):
            self._breach("label_info on change", "costs set at run time are thrown away for nothing")
        # Where an id has gone to another name, the name that had it has none any more, and may get another.
        self._ids = {name: number for name, number in self._ids.items() if table.get(number, name).casefold() == name}
        for number, name in table.items():
            if self._ids.setdefault(name.casefold(), number) != number:
                self._breach("name keeps id", f"{name!r} had id {self._ids[name.casefold()]} and has {number}")
        self._maps.append((sent, table, message.threshold))
        for number, (name, seen) in self._tiles.items():
            self._cost(number, name, seen, sent, table)
        self.look_again()

    def image(self, kind: str, message: Image, sent: float) -> None:
        """Take a mask or a confidence."""
        cloud = self._cloud(kind, message.header)
        if cloud is None:
            return
        size = (message.width, message.height)
        if size != cloud:
            self._breach(f"{kind} size", f"{size} for an image of {cloud}: every pixel is read as another")
            return
        if message.encoding != "mono8":
            self._breach(f"{kind} encoding", f"{message.encoding!r} is read as mono8")
        if message.step != message.width:
            self._breach(f"{kind} step", f"step {message.step} for a width of {message.width}: rows are read askew")
        if len(message.data) != message.width * message.height:
            self._breach(f"{kind} length", f"{len(message.data)} bytes for {size}: read beyond the end")
            return
        self._part(kind, message.header, message, sent)

    def class_confidence(self, message: ClassConfidenceArray, sent: float) -> None:
        """Take what is said of the classes of one image."""
        if self._cloud("class_confidence", message.header) is not None:
            self._part("class_confidence", message.header, message, sent)

    def restarted(self) -> None:
        """The node has started anew, and what it promised while it lived no longer holds: ids, and what was sent."""
        self._ids.clear()
        self._tiles.clear()
        self._maps = [(sent, table, math.nan) for sent, table, _ in self._maps]

    def look_again(self) -> None:
        """Judge the frames whose LabelInfo was still missing."""
        waiting, self._waiting = self._waiting, []
        for since, parts in waiting:
            self._judge(parts, since)

    def _cloud(self, kind: str, header: Header) -> tuple[int, int] | None:
        """The size of the point cloud that goes with a header; a breach where there is none."""
        frame = pictures.numbered(header.stamp.sec - pictures.FIRST_SECOND)
        if [header.stamp.sec, header.stamp.nanosec] != frame["stamp"]:
            self._breach(f"{kind} stamp", f"no cloud has the stamp {header.stamp}: the frame is lost")
            return None
        if header.frame_id != frame["frame_id"]:
            self._breach(f"{kind} frame_id", f"{header.frame_id!r} instead of {frame['frame_id']!r}: put elsewhere")
            return None
        return frame["picture"]["width"], frame["picture"]["height"]

    def _part(self, kind: str, header: Header, message: object, sent: float) -> None:
        stamp = header.stamp.sec, header.stamp.nanosec
        parts = self._parts.setdefault(stamp, {})
        if kind in parts or stamp in self._used:
            self._breach(f"{kind} stamp", f"a second one of stamp {stamp}: one image gets another's")
            return
        parts[kind] = message, sent
        if len(parts) == len(TOPICS) - 1:
            self._used.add(stamp)
            self._judge(self._parts.pop(stamp), time.monotonic())
        while len(self._parts) > REMEMBERED:
            del self._parts[next(iter(self._parts))]

    def _judge(self, parts: dict[str, tuple[object, float]], since: float) -> None:
        """Use a frame, or have it wait where a LabelInfo that explains it may still be on its way."""
        (mask, sent), (confidence, _), (classes, classes_sent) = (parts[kind] for kind in list(TOPICS)[1:])
        plane = np.frombuffer(mask.data, np.uint8).reshape(mask.height, mask.width)
        table, wrong = self._in_force(sent), []
        ids = [int(number) for number in np.unique(plane) if number != UNLABELLED]
        told = {BACKGROUND: self._background} | {seen.id: seen.name for seen in classes.classes}
        if table is None:
            wrong.append(("label_info first", "a mask without a LabelInfo before it: a null pointer is read"))
        else:
            unknown = [number for number in ids if number not in table]
            if unknown:
                wrong.append(("label_info first", f"ids {unknown} of the mask are not in the LabelInfo before it"))
            if told != table or self._in_force(classes_sent) != table:
                wrong.append(("one vocabulary", f"class_confidence has {told}, the LabelInfo {table}"))
        explained = told == table or any(moment > sent for moment, _, _ in self._maps)
        if wrong and not explained and time.monotonic() - since < LABEL_INFO_PATIENCE:
            self._waiting.append((since, parts))
            return
        for rule, text in wrong:
            self._breach(rule, text)
        self._look_at_pixels(plane, np.frombuffer(confidence.data, np.uint8).reshape(plane.shape), classes)
        for number in ids:
            if table is None or number not in table:
                continue
            self._tiles[number] = table[number], sent
            for moment, newer, _ in self._maps:
                if moment > sent:
                    self._cost(number, table[number], sent, moment, newer)
        self._frame((mask.header.stamp.sec, mask.header.stamp.nanosec))

    def _in_force(self, moment: float) -> dict[int, str] | None:
        """The last table that was sent before `moment`."""
        tables = [table for sent, table, _ in self._maps if sent <= moment]
        return tables[-1] if tables else None

    def _cost(self, number: int, name: str, seen: float, sent: float, table: dict[int, str]) -> None:
        """Give a tile that was seen as `name` its cost by a newer table."""
        if sent - seen < self._keep and table.get(number, name).casefold() != name.casefold():
            self._breach(
                "freed id", f"a place seen as {name!r} {sent - seen:.2f} s ago gets the cost of {table[number]!r}"
            )

    def _look_at_pixels(self, mask: np.ndarray, confidence: np.ndarray, classes: ClassConfidenceArray) -> None:
        if (confidence[mask == UNLABELLED] != 0).any():
            self._breach("unlabelled confidence", "a pixel of which nothing is known counts")
        for seen in classes.classes:
            rows, columns = np.nonzero(mask == seen.id)
            box = (seen.box.x_offset, seen.box.y_offset, seen.box.width, seen.box.height)
            centroid = (seen.centroid_x, seen.centroid_y)
            if seen.area != rows.size:
                self._breach("area", f"{seen.name!r} has {rows.size} pixels and an area of {seen.area}")
            if not rows.size:
                if any(box) or not np.isnan(centroid).all():
                    self._breach("nothing seen", f"{seen.name!r} has no pixel and is at {box}, {centroid}")
                continue
            x, y = int(columns.min()), int(rows.min())
            if box != (x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1):
                self._breach("box", f"{seen.name!r} is not in its box {box}")
            if not np.allclose(centroid, (columns.mean(), rows.mean()), atol=0.01):
                self._breach("centroid", f"{seen.name!r} is not around {centroid}")


class Consumer:
    """The layer's ROS side: subscriptions as a costmap makes them, and a look at what the publishers offer."""

    def __init__(self, keep: float) -> None:
        rclpy.init()
        self._keep = keep
        self._output = threading.Lock()
        self._told: set[str] = set()
        self.node = rclpy.create_node("consumer")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self._subscriptions: list[object] = []
        self.node.create_timer(0.5, self._look)
        # Commands come by the pipe and are carried out between callbacks.
        self._commands: list[dict] = []
        self._command = self.node.create_guard_condition(self._obey)
        self._join()

    def _join(self) -> None:
        """Begin as a layer that has seen nothing yet."""
        for subscription in self._subscriptions:
            self.node.destroy_subscription(subscription)
        self._told.clear()
        layer = self._layer = Layer(self._breach, lambda stamp: self.tell(event="frame", stamp=stamp), keep=self._keep)
        take = {
            "label_info": layer.label_info,
            "mask": lambda message, sent: layer.image("mask", message, sent),
            "confidence": lambda message, sent: layer.image("confidence", message, sent),
            "class_confidence": layer.class_confidence,
        }
        self._subscriptions = [
            self.node.create_subscription(
                message_type,
                f"segmentation/{kind}",
                lambda message, info, take=take[kind]: take(message, info["source_timestamp"] * 1e-9),
                QoSProfile(
                    depth=50,
                    reliability=ReliabilityPolicy.RELIABLE,
                    durability=DURABILITY.get(kind, DurabilityPolicy.VOLATILE),
                ),
            )
            for kind, message_type in TOPICS.items()
        ]

    def _look(self) -> None:
        self._layer.look_again()
        for kind in TOPICS:
            for publisher in self.node.get_publishers_info_by_topic(f"/segmentation/{kind}"):
                offered = publisher.qos_profile
                if offered.reliability != ReliabilityPolicy.RELIABLE:
                    self._breach(f"{kind} reliability", f"{offered.reliability.name}: frames are lost")
                if offered.durability != DURABILITY.get(kind, DurabilityPolicy.VOLATILE):
                    self._breach(
                        f"{kind} durability", f"{offered.durability.name}: what a late joiner gets is not as told"
                    )

    def _breach(self, rule: str, text: str) -> None:
        if rule not in self._told:
            self._told.add(rule)
            self.tell(event="breach", rule=rule, text=text)

    def tell(self, **line: object) -> None:
        with self._output:
            print(json.dumps(line), flush=True)

    def _obey(self) -> None:
        while self._commands:
            command = self._commands.pop(0)
            {"rejoin": self._join, "restarted": self._layer.restarted}[command["do"]]()
            self.tell(reply=command["id"])

    def run(self) -> None:
        thread = threading.Thread(target=self._spin)
        thread.start()
        self.tell(event="ready")
        for line in sys.stdin:
            self._commands.append(json.loads(line))
            self._command.trigger()
        self.executor.shutdown()
        thread.join()
        self.node.destroy_node()
        rclpy.try_shutdown()

    def _spin(self) -> None:
        with suppress(ExternalShutdownException):
            self.executor.spin()


if __name__ == "__main__":
    Consumer(float(sys.argv[1])).run()
    sys.stdout.flush()
    os._exit(0)
