"""`nerve report`: two runs side by side, and a run's page written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import tell
from ..output import claim
from .options import Overwrite

report = typer.Typer(no_args_is_help=True, help="Compare two runs; write a run's page anew.")

Folder = Annotated[Path, typer.Argument(help="A folder that nerve eval, tune or replay wrote.")]


@report.command()
def compare(
    a: Folder,
    b: Folder,
    out: Annotated[Path, typer.Option(help="Folder for comparison.html.")] = Path("nerve_comparison"),
    overwrite: Overwrite = False,
) -> None:
    """Set two runs of one kind side by side: what differs between them, figures, names and overlays."""
    from ..report.compare import COMPARISON, write_comparison  # takes its time to import: not for --help

    claim([out / COMPARISON], overwrite)
    tell(write_comparison(a, b, out))


@report.command()
def show(folder: Folder, overwrite: Overwrite = False) -> None:
    """Write report.html anew from a run's results.json."""
    from ..report.files import read_report
    from ..report.page import PAGE, write_page

    read = read_report(folder)
    claim([folder / PAGE], overwrite, "folder")
    tell(write_page(read, folder))
