"""`nerve report`: two runs side by side, and a run's page written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

report = typer.Typer(no_args_is_help=True, help="Compare two runs; write a run's page anew.")

Folder = Annotated[Path, typer.Argument(help="A folder that nerve eval, tune or replay wrote.")]


@report.command()
def compare(
    a: Folder,
    b: Folder,
    out: Annotated[Path, typer.Option(help="Folder for comparison.html.")] = Path("nerve_comparison"),
) -> None:
    """Set two runs of one kind side by side: what differs between them, figures, names and overlays."""
    from ..report import write_comparison  # takes its time to import: not for --help

    print(write_comparison(a, b, out))


@report.command()
def show(folder: Folder) -> None:
    """Write report.html anew from a run's results.json."""
    from ..report import read_report, write_page

    print(write_page(read_report(folder), folder))
