"""Spins a node of the demonstration on a thread of its own."""

from __future__ import annotations

import contextlib
import threading

from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node


class Spinning:
    """Spins a node until it is closed or ROS shuts down."""

    def __init__(self, node: Node) -> None:
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; waits two seconds at most for what is under way."""
        self._executor.shutdown(timeout_sec=2.0)
        self._thread.join(2.0)

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self._executor.spin()
