"""Runs `nerve watch`: the watcher, the page and the terminal until SIGINT or SIGTERM."""

from __future__ import annotations

import signal
from pathlib import Path

import rclpy
from rclpy.exceptions import NameValidationException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.validate_namespace import validate_namespace

from nerve_core.console import PlainConsole
from nerve_ros.watch.board import Board
from nerve_ros.watch.keeper import Keeper
from nerve_ros.watch.page import Page, is_loopback
from nerve_ros.watch.terminal import Terminal
from nerve_ros.watch.watcher import Watcher


def run(*, namespace: str, host: str, port: int, save: Path | None, every: float) -> None:
    """Show what the node `nerve` of `namespace` publishes until SIGINT or SIGTERM.

    Raises ValueError where namespace, host, port or the folder `save` cannot be used as asked.
    """
    namespace = "/" + namespace.strip("/")
    try:
        validate_namespace(namespace)
    except NameValidationException as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--namespace {namespace!r} cannot be used, it is written like /front/left: {reason}"
        ) from None
    keeper = Keeper(save, every) if save else None
    # rclpy's handler, which ends the loop, calls the one before; Python's would raise wherever it happens to be.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    board = Board()
    page = Page(host, port, board)
    try:
        rclpy.init(args=[])
        _watch(namespace, board, page, keeper)
    finally:
        page.close()
        rclpy.try_shutdown()


def _watch(namespace: str, board: Board, page: Page, keeper: Keeper | None) -> None:
    watcher = Watcher(namespace, board, keeper)
    executor = SingleThreadedExecutor()
    executor.add_node(watcher)
    page.start()
    console = PlainConsole()
    console.print(f"watching {watcher.target}; the page is {page.url}", soft_wrap=True)
    if not is_loopback(page.host):
        console.print("whoever reaches this address sees what the camera sees", style="yellow")
    with Terminal(console, board) as terminal:
        try:
            while rclpy.ok():
                executor.spin_once(timeout_sec=0.1)
                watcher.look_after()
                terminal.refresh()
        except (ExternalShutdownException, RuntimeError):
            # Once the process is asked to end, every call to rclpy fails, and that is no error.
            if rclpy.ok():
                raise
