"""Publishes the node's diagnostics: state, level, the reason for it, and all counts and times."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node
from std_msgs.msg import Header

from nerve_core.text.vocabulary import listed
from nerve_ros.graph import Namesakes
from nerve_ros.health import Health
from nerve_ros.image_input import ImageInput
from nerve_ros.parameters import NodeConfig
from nerve_ros.pipeline import Pipeline
from nerve_ros.questions import Questions
from nerve_ros.watchdog import Watchdog


@dataclass
class Phase:
    """Where the node is in its life cycle.

    state: its label. error: why the last transition failed, or why the node deactivated itself. fallen_back: why it
    runs on the CPU although another device was asked for.
    """

    state: str = "unconfigured"
    error: str = ""
    fallen_back: str = ""


class Diagnostics:
    """Publishes on /diagnostics whenever `publish` is called, on the executor's thread."""

    def __init__(
        self,
        node: Node,
        *,
        phase: Phase,
        config: Callable[[], NodeConfig],
        health: Health,
        pipeline: Pipeline,
        watchdog: Watchdog,
        images: ImageInput,
        questions: Questions,
    ) -> None:
        self._node, self._phase, self._config, self._health, self._pipeline = node, phase, config, health, pipeline
        self._watchdog, self._images, self._questions = watchdog, images, questions
        self._namesakes = Namesakes(node)
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 1)

    def publish(self) -> None:
        """Publish how the node is now."""
        level, message = self._status()
        config, segmenter = self._config(), self._pipeline.segmenter
        memory = segmenter.device_memory if segmenter else None
        values = {"state": self._phase.state, "stage": self._pipeline.stage}
        values |= {
            "model": segmenter.pair_name if segmenter else config.model,
            "device": str(segmenter.device) if segmenter else "",
            "precision": str(segmenter.dtype) if segmenter else "",
            "operator": self._pipeline.operator,
            "enabled": str(config.enabled).lower(),
            "questions": str(self._questions.waiting),
            "image_topic": self._images.topic,
            "depth": self._node.resolve_topic_name("depth") if config.use_depth else "",
            "memory_mb": f"{resident_bytes() / 1e6:.0f}",
            "device_memory_mb": "" if memory is None else f"{memory / 1e6:.0f}",
            "vocabulary": listed([name for name in config.vocabulary if name]),
            "vocabulary_doubts": self._pipeline.doubts,
        }
        self._publisher.publish(
            diagnostics(
                name=f"{self._node.get_fully_qualified_name().lstrip('/')}: segmentation",
                hardware=values["device"],
                level=level,
                message=message,
                values=values | self._health.figures(),
                stamp=self._node.get_clock().now().to_msg(),
            )
        )

    def _status(self) -> tuple[bytes, str]:
        if self._phase.error:
            return DiagnosticStatus.ERROR, self._phase.error
        stuck = self._watchdog.stuck
        if stuck:
            return DiagnosticStatus.ERROR, stuck
        if self._phase.state != "active":
            return DiagnosticStatus.OK, self._phase.state
        trouble = self._health.trouble()
        if trouble is not None:
            return trouble
        warning = (
            self._namesakes.warning()
            or self._images.silence()
            or self._images.wrong_side()
            or self._phase.fallen_back
            or self._pipeline.doubts
        )
        if warning:
            return DiagnosticStatus.WARN, warning
        if not self._config().enabled:
            return DiagnosticStatus.OK, "disabled: ~/locate answers, nothing is published until ~/enable"
        return DiagnosticStatus.OK, "active"


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def diagnostics(
    *, name: str, hardware: str, level: bytes, message: str, values: Mapping[str, str], stamp: Time
) -> DiagnosticArray:
    """The one message about a node: `level` is one of DiagnosticStatus.OK, WARN, ERROR, STALE."""
    status = DiagnosticStatus(
        level=level,
        name=name,
        message=message,
        hardware_id=hardware,
        values=[KeyValue(key=key, value=value) for key, value in values.items()],
    )
    return DiagnosticArray(header=Header(stamp=stamp), status=[status])
