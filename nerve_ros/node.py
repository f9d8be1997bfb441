"""The process that `ros2 run nerve_ros nerve_node` starts: signals, spinning and exit code of the node."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rclpy.executors import Executor
    from rclpy.impl.rcutils_logger import RcutilsLogger

    from nerve_ros.lifecycle import NerveNode

THROTTLE = 5.0
"""Seconds between two log lines about errors in callbacks."""


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT, SIGTERM or, of a terminal that is closed, SIGHUP, then end the process.

    Its exit code is 0, 2 where the node cannot be started as asked, or 70 where it was stuck (exit_when_stuck).
    """
    # Before torch is imported, which reads them then. Threads that spin while they wait take the processor from the
    # rest of the robot: on two busy cores an image took 0.3 s with these and 8 s without. One core is left to ROS.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))
    # Before the imports that take seconds: an interrupt during them is remembered, not thrown at whatever runs. Later
    # on rclpy's own handler ends the spinning, and Python's would raise KeyboardInterrupt wherever it happens to be.
    interrupted: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    _take_hangup_for_termination()
    # Python's warnings are for whoever writes the libraries, and a robot's log is not theirs.
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)

    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    from nerve_ros.lifecycle import Interrupted, NerveNode

    if interrupted:
        return 0
    try:
        rclpy.init(args=args)
    except (ValueError, RuntimeError) as error:
        return _refuse(error)
    node, code = None, 0
    try:
        node = NerveNode()
        core = logging.getLogger("nerve_core")
        core.setLevel(logging.INFO)
        core.addHandler(_RosLog(node.get_logger()))
        core.propagate = False
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        node.start()
        _spin(node, executor)
    except ValueError as error:
        code = _refuse(error)
    except Interrupted:
        pass
    except RuntimeError:
        # Once the process is asked to end, every call to rclpy fails, and that is no error.
        if rclpy.ok():
            raise
    finally:
        # A terminal and ros2 launch both send one at Ctrl-C: the second is not to cut off the end, which gives Fast
        # DDS's shared memory back.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if node is not None:
            node.close()
            code = code or node.exit_code
            node.destroy_node()
        rclpy.try_shutdown()
    # Not by the interpreter's own end: a model that is still loading would hold it, and to take torch apart took 10 s
    # on a busy machine, of which ros2 launch waits for 5.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _take_hangup_for_termination() -> None:
    """Have SIGHUP end the process as SIGTERM does, in order: killed by it, it would leave Fast DDS's shared memory
    behind. Nothing where SIGHUP is ignored, as nohup has it."""
    if signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:
        return
    # rclpy waits in C++, where no handler of Python's runs: a thread waits for the signal instead.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

    def wait() -> None:
        signal.sigwait({signal.SIGHUP})
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="hangup", daemon=True).start()


class _RosLog(logging.Handler):
    """Passes what nerve_core logs, such as that it fetches weights, to the node's log."""

    def __init__(self, logger: RcutilsLogger) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        # rclpy holds a line of code to one severity.
        if record.levelno >= logging.ERROR:
            self._logger.error(record.getMessage())
        elif record.levelno >= logging.WARNING:
            self._logger.warning(record.getMessage())
        else:
            self._logger.info(record.getMessage())


def _refuse(error: Exception) -> int:
    """Say why the node cannot be started with these arguments or parameters; the exit code."""
    from nerve_core.console import printable

    print(printable(f"nerve_node: {error}"), file=sys.stderr)
    return 2


def _spin(node: NerveNode, executor: Executor) -> None:
    """Spin until shutdown: an error in a callback is logged and costs that callback's message, not the node."""
    from rclpy.executors import ExternalShutdownException

    while node.context.ok():
        try:
            executor.spin()
        except ExternalShutdownException:
            return
        except Exception as error:
            if node.context.ok():
                node.get_logger().error(
                    f"error in a callback: {''.join(traceback.format_exception(error))}",
                    throttle_duration_sec=THROTTLE,
                )
