"""Asks a running node where something is, for `nerve locate`, and formats the answer as text or JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.validate_namespace import validate_namespace

from nerve_core.output import marked, write
from nerve_ros.signals import Ended
from nerve_ros.srv import Locate


def ask(name: str, *, namespace: str, wait: float, mask: Path | None, ended: Sequence[int] = ()) -> dict[str, Any]:
    """What the node `nerve` of `namespace` answers about `name`, as plain values; its mask goes to the file `mask`.

    wait: seconds for the node to be there, and again for its answer. ended: the signals that came so far
    (signals.remembered). Raises ValueError for a namespace that is none, RuntimeError where nobody answers, no image
    was searched, or the file cannot be written, and signals.Ended.
    """
    namespace = "/" + namespace.strip("/")
    try:
        validate_namespace(namespace)
    except Exception as error:
        raise ValueError(f"--namespace {namespace!r} cannot be used, it is written like /front/left") from error
    service = f"{namespace.rstrip('/')}/nerve/locate"
    rclpy.init(args=[])
    try:
        if ended:  # before rclpy's own handlers were there
            raise Ended(ended[0])
        node = rclpy.create_node(f"nerve_locate_{os.getpid()}")
        return _ask(node, service, name, wait, mask)
    except Exception as error:
        # Once the process is asked to end, whatever rclpy does fails, or seems to have taken too long.
        if ended:
            raise Ended(ended[0]) from error
        raise
    finally:
        rclpy.try_shutdown()


def _ask(node: Node, service: str, name: str, wait: float, mask: Path | None) -> dict[str, Any]:
    client: Client[Locate.Request, Locate.Response] = node.create_client(Locate, service)
    if not client.wait_for_service(wait):
        domain = os.environ.get("ROS_DOMAIN_ID", "0")
        raise RuntimeError(f"nobody answers {service} in domain {domain}: start the node, or name its --namespace")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    started = time.monotonic()
    future = client.call_async(Locate.Request(name=name, want_mask=mask is not None))
    executor.spin_until_future_complete(future, wait)
    answer = future.result() if future.done() else None
    if answer is None:
        raise RuntimeError(f"{service} gave no answer within {wait:g} s; what the node is doing is in its log")
    if not answer.success:
        raise RuntimeError(f"no image was searched: {answer.message}")
    if mask is not None:
        picture = np.frombuffer(answer.mask.data, np.uint8).reshape(answer.mask.height, answer.mask.width)
        try:
            encoded = cv2.imencode(mask.suffix, picture)[1].tobytes()
        except cv2.error as error:
            raise RuntimeError(f"{mask} cannot be written: give a name such as mask.png") from error
        write(mask, marked(encoded))
    stamp = answer.header.stamp.sec + 1e-9 * answer.header.stamp.nanosec
    return {
        "name": name,
        "found": answer.found,
        "confidence": round(answer.confidence, 4),
        "box": [answer.box.x_offset, answer.box.y_offset, answer.box.width, answer.box.height],
        "centroid": [round(answer.centroid_x, 2), round(answer.centroid_y, 2)] if answer.found else None,
        "point": [answer.point.x, answer.point.y, answer.point.z] if answer.has_point else None,
        "spread": [answer.spread.x, answer.spread.y, answer.spread.z] if answer.has_point else None,
        "frame_id": answer.header.frame_id,
        "stamp": stamp,
        "message": answer.message,
        "seconds": round(time.monotonic() - started, 3),
    }


def as_text(answer: dict[str, Any]) -> str:
    """`answer` of :func:`ask` in a few lines."""
    if not answer["found"]:
        why = answer["message"].partition("; ")[2]  # behind "not found in this image"
        text = f"{answer['name']}: not in the newest image (confidence {answer['confidence']:.2f})"
        return f"{text}\n  {why}" if why else text
    left, top, width, height = answer["box"]
    x, y = answer["centroid"]
    lines = [
        f"{answer['name']}: found, confidence {answer['confidence']:.2f}",
        f"  in the image  around ({x:.0f}, {y:.0f}), in the box {width} x {height} at ({left}, {top})",
    ]
    if answer["point"]:
        place = ", ".join(
            f"{axis} {value:+.2f} (±{spread:.2f})"
            for axis, value, spread in zip("xyz", answer["point"], answer["spread"], strict=True)
        )
        lines.append(f"  in metres     {place} in {answer['frame_id'] or 'the camera'}: x right, y down, z forward")
    else:
        lines.append(f"  in metres     {answer['message']}")
    lines.append(f"  answered in {answer['seconds']:.2f} s")
    return "\n".join(lines)


def as_json(answer: dict[str, Any]) -> str:
    """`answer` of :func:`ask` as one JSON object."""
    return json.dumps(answer)
