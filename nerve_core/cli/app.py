"""The `nerve` command without ROS: its subcommands put together, and its entry point."""

from __future__ import annotations

import logging
import os

import typer
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from ..console import console, say
from .bench import bench
from .eval import evaluate
from .models import models
from .report import report
from .segment import segment
from .tune import tune

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Find things in images by name.", rich_markup_mode=None
)
app.command()(segment)
app.command()(tune)
app.add_typer(evaluate, name="eval")
app.add_typer(models, name="models")
app.add_typer(bench, name="bench")
app.add_typer(report, name="report")


def main() -> None:
    """Run the command; an error in the input is printed in one line, without a traceback."""
    # OpenMP's threads spin while they wait, which costs several times the work where other processes are busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    handler = RichHandler(
        console=console, show_time=False, show_path=False, show_level=False, highlighter=NullHighlighter()
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("nerve_core").setLevel(logging.INFO)
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:  # ModelError is a RuntimeError
        say(f"nerve: {error}", style="bold red")
        raise SystemExit(2) from None
