"""Finds causes of trouble in the ROS graph: why no image comes, and whether another node has the node's name."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.topic_endpoint_info import TopicEndpointInfo

NAMESAKE_WARNING = 25.0
"""Seconds after which another node of the same name is reported: one that was killed is forgotten after 20."""


def published_types(node: Node, topic: str) -> set[str]:
    """The types of messages that are published on a topic's full name, such as "sensor_msgs/msg/Image"."""
    return {publisher.topic_type for publisher in node.get_publishers_info_by_topic(topic)}


def wrong_type(node: Node, topic: str, message_type: str) -> str:
    """What is wrong where a topic is published, and not with the type that is read; else empty."""
    types = published_types(node, topic)
    if not types or message_type in types:
        return ""
    # Whoever takes part chooses these names: shown so that no control character reaches a terminal.
    return f"{topic} is published as {', '.join(repr(kind[:80]) for kind in sorted(types))}; accepted: {message_type}"


def why_no_image(node: Node, topic: str, message_type: str, accepted: Sequence[str], qos: QoSProfile) -> str:
    """Why a subscription of `node` to `topic` with `qos` may get nothing, and what helps.

    message_type: what it takes, such as "sensor_msgs/msg/Image". accepted: what it would take there.
    """
    publishers = node.get_publishers_info_by_topic(topic)
    if not publishers:
        return "nobody publishes there"
    reasons = [
        reason for publisher in publishers for reason in _obstacles(publisher, topic, message_type, accepted, qos)
    ]
    if reasons:
        return "; ".join(dict.fromkeys(reasons))
    return (
        f"{len(publishers)} {'publishes' if len(publishers) == 1 else 'publish'} there: is it running? Images above "
        "512 kB also need FASTDDS_DEFAULT_PROFILES_FILE at the publisher, see config/fastdds.xml"
    )


def _obstacles(
    publisher: TopicEndpointInfo, topic: str, message_type: str, accepted: Sequence[str], qos: QoSProfile
) -> list[str]:
    # Whoever takes part chooses these names: shown so that no control character reaches a terminal.
    who = repr(f"{publisher.node_namespace.rstrip('/')}/{publisher.node_name}"[:80])
    if publisher.topic_type != message_type:
        kind = publisher.topic_type[:80]
        return [f"{who} publishes {kind!r} there; accepted: {', '.join(accepted)}"]
    theirs, found = publisher.qos_profile, []
    override = f"set the parameter qos_overrides.{topic}.subscription"
    if qos.reliability == ReliabilityPolicy.RELIABLE and theirs.reliability == ReliabilityPolicy.BEST_EFFORT:
        found.append(
            f"{who} publishes with reliability best_effort, and reliable is asked for: {override}.reliability to "
            "best_effort"
        )
    if qos.durability == DurabilityPolicy.TRANSIENT_LOCAL and theirs.durability == DurabilityPolicy.VOLATILE:
        found.append(
            f"{who} publishes with durability volatile, and transient_local is asked for: {override}.durability to "
            "volatile"
        )
    return found


def namesakes(node: Node) -> int:
    """How many other nodes have the name and namespace of `node`; one that was killed counts until it is forgotten."""
    own = (node.get_name(), node.get_namespace())
    return node.get_node_names_and_namespaces().count(own) - 1


class Namesakes:
    """Notices that another node has the name of `node`."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._alone_at = time.monotonic()
        self._logged = False

    def warning(self) -> str:
        """What is wrong where another node of this name has been there for NAMESAKE_WARNING seconds, logged once."""
        if not namesakes(self._node):
            self._alone_at = time.monotonic()
            self._logged = False
        if time.monotonic() - self._alone_at < NAMESAKE_WARNING:
            return ""
        text = (
            f"another node is called {self._node.get_fully_qualified_name()}: both publish on the same topics; start "
            "one of them in a namespace of its own"
        )
        if not self._logged:
            self._logged = True
            self._node.get_logger().error(text)
        return text
