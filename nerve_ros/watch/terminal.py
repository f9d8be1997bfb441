"""The board of `nerve watch` in the terminal: a table, or lines where the output is no terminal."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nerve_ros.watch.board import Board

PLAIN_EVERY = 5.0
"""Seconds between two lines where the output is no terminal."""

_STYLES = {"ok": "green", "warn": "yellow", "error": "bold red", "stale": "yellow"}
_TIMES = (("latency", "latency_p50_ms"), ("age", "age_p50_ms"))


class Terminal:
    """The board in the terminal: a table that stays in its place, or a line now and then where it is no terminal."""

    def __init__(self, console: Console, board: Board) -> None:
        self._console = console
        self._board = board
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._shown = -math.inf
        self._reason = ""

    def __enter__(self) -> Terminal:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def refresh(self) -> None:
        """Show what is new, if it is time to."""
        waited = time.monotonic() - self._shown
        if self._live is not None:
            if waited >= 0.25:
                self._shown = time.monotonic()
                self._live.update(table(self._board.status(), self._console.height - 4), refresh=True)
        elif waited >= PLAIN_EVERY or (self._board.reason != self._reason and waited >= 1.0):
            self._shown, self._reason = time.monotonic(), self._board.reason
            self._console.print(line(self._board.status()), soft_wrap=True)


def line(status: dict[str, Any]) -> Text:
    """The board in one line."""
    seen = [entry for entry in status["classes"] if entry["area"]]
    names = ", ".join(f"{entry['name']} {_figure(entry['presence'])}" for entry in seen[:20]) or "nothing found"
    if len(seen) > 20:
        names += f" and {len(seen) - 20} more"
    if status["result"] is None or status["result"]["stale"]:
        names = "nothing comes"
    return Text(f"{_head(status)} | {names}" + (f" | {status['reason']}" if status["reason"] else ""))


def table(status: dict[str, Any], rows: int) -> Group:
    """The board as a table of at most `rows` rows."""
    level = status["diagnostics"].get("level", "ok")
    shown = status["classes"][: max(1, rows - 3)]
    stale = status["result"] is None or status["result"]["stale"]
    grid = Table(box=None, pad_edge=False, style="dim" if stale else "")
    grid.add_column("")
    grid.add_column("name", no_wrap=True, max_width=40)
    grid.add_column("presence", width=16)
    for title in ("", "confidence", "pixels"):
        grid.add_column(title, justify="right")
    for entry in shown:
        bar = round(16 * (entry["presence"] or 0.0))
        found = "" if entry["area"] else "dim"
        grid.add_row(
            Text("■", style=entry["colour"]),
            Text(entry["name"], style=found),
            Text("━" * bar, style=entry["colour"]) + Text("━" * (16 - bar), style="bright_black"),
            Text(_figure(entry["presence"]), style=found),
            Text(_figure(entry["confidence"]), style=found),
            Text("-" if entry["area"] is None else str(entry["area"]), style=found),
        )
    parts: list[Any] = [Text(_head(status), style=_STYLES.get(level, ""))]
    if status["reason"]:
        parts.append(Text(status["reason"], style="yellow"))
    parts.append(grid)
    if len(shown) < len(status["classes"]):
        parts.append(Text(f"and {len(status['classes']) - len(shown)} more", style="dim"))
    return Group(*parts)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _head(status: dict[str, Any]) -> str:
    diagnostics = status["diagnostics"]
    values = diagnostics.get("values", {}) if diagnostics and not diagnostics["stale"] else {}
    parts = [status["node"], values.get("state", "state unknown"), f"{status['fps']:.1f} fps"]
    parts += [f"{name} {values[key]} ms" for name, key in _TIMES if values.get(key)]
    return "  ".join(parts)
