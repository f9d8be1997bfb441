"""The responses of the service ~/locate, and a service that may answer later than at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from geometry_msgs.msg import Point as PointMessage
from geometry_msgs.msg import Vector3
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.service import Service
from sensor_msgs.msg import Image, RegionOfInterest
from std_msgs.msg import Header

from nerve_ros.depth import DepthError, Match
from nerve_ros.images import mono8_message
from nerve_ros.srv import Locate

if TYPE_CHECKING:
    from nerve_core import ClassConfidence

Request = TypeVar("Request")
Response = TypeVar("Response")

_ASKED_AT_ONCE = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
"""A service's own depth is 10: of more requests at a time some would be lost, and never answered."""
_NOWHERE = (math.nan, math.nan, math.nan)
NO_DEPTH = "there is no point: use_depth is false"


def create_deferred_service(
    node: Node,
    kind: type,
    name: str,
    ask: Callable[[Request], Future[Response]],
    lost: Callable[[Exception], None],
) -> Service[Request, Response | Future[Response]]:
    """A service whose answers come when they are ready: `ask(request)` returns a Future of the response.

    rclpy can wait for an answer in a coroutine, but then looks at it without pause, on a whole processor core. Here the
    executor sends it when it is there. `lost(error)`: it could not be sent.
    """

    def begin(request: Request, response: Response | Future[Response]) -> Response | Future[Response]:
        return ask(request)

    service: Service[Request, Response | Future[Response]] = node.create_service(
        kind, name, begin, qos_profile=_ASKED_AT_ONCE
    )
    send_now = service.send_response

    def send(answer: Future[Response], header: Any) -> None:
        def on_executor() -> None:
            try:
                send_now(answer.result(), header)
            except Exception as error:
                lost(error)

        def when_done(answer: Future[Response]) -> None:
            if node.context.ok() and node.executor is not None:
                node.executor.create_task(on_executor)

        answer.add_done_callback(when_done)

    # On this one object: the executor calls it with whatever `begin` returned.
    vars(service)["send_response"] = send
    return service


def settle(answer: Future[Response], response: Response) -> bool:
    """Give `answer` its value, unless it has one already; whether it was given."""
    try:
        answer.set_result(response)
    except InvalidStateError:
        return False
    return True


def located(
    header: Header, found: ClassConfidence, mask: np.ndarray, match: Match | None, *, want_mask: bool
) -> Locate.Response:
    """Where `found` is. mask: uint8 [height, width], 255 on its pixels. match: the depth image, where depth is used."""
    x, y, width, height = found.box or (0, 0, 0, 0)
    centroid_x, centroid_y = found.centroid or (math.nan, math.nan)
    response = Locate.Response(
        success=True,
        found=found.area > 0,
        confidence=float(found.presence),
        header=header,
        mask=mono8_message(header, mask) if want_mask else Image(),
        box=RegionOfInterest(x_offset=x, y_offset=y, width=width, height=height),
        centroid_x=centroid_x,
        centroid_y=centroid_y,
        point=PointMessage(**dict(zip("xyz", _NOWHERE, strict=True))),
        spread=Vector3(**dict(zip("xyz", _NOWHERE, strict=True))),
    )
    if not response.found:
        response.message = "not found in this image"
    elif match is None:
        response.message = NO_DEPTH
    else:
        try:
            seen = match.point(mask)
        except DepthError as error:
            response.message = f"there is no point: {error}"
        else:
            response.has_point = True
            response.point = PointMessage(**dict(zip("xyz", seen.position, strict=True)))
            response.spread = Vector3(**dict(zip("xyz", seen.spread, strict=True)))
    return response


def not_located(reason: str) -> Locate.Response:
    """No image was searched; `reason` says why."""
    nan = math.nan
    return Locate.Response(
        success=False,
        message=reason,
        centroid_x=nan,
        centroid_y=nan,
        mask=Image(),
        point=PointMessage(x=nan, y=nan, z=nan),
        spread=Vector3(x=nan, y=nan, z=nan),
    )
