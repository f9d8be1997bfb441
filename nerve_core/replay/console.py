"""What `nerve replay` prints: a progress bar, then the figures of the replay and where its files are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .run import Replayed


@contextmanager
def progress(console: Console, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar with the time that is left; gives a function to be called with every image. total: None is not known."""
    bar = Progress(
        TextColumn("segmenting", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=total, rate="")

        def advance(*_: object) -> None:
            bar.advance(task)
            speed = bar.tasks[task].speed
            bar.update(task, rate=f"{speed:.1f}/s" if speed else "")

        yield advance


def show(console: Console, replayed: Replayed, out: Path) -> None:
    """Print the figures of a replay and where its files are."""
    report = replayed.report
    for camera in report.cameras:
        table = Table(
            title=f"{camera.topic}: {camera.frames} images, {camera.frames_per_second:.1f} a second",
            title_justify="left",
        )
        for column in ("name", "presence", "confidence", "area", "seen in"):
            table.add_column(column, justify="left" if column == "name" else "right")
        for name in sorted(camera.names, key=lambda one: -sum(one.area)):
            sure = [value for value in name.confidence if value is not None]
            count = max(1, camera.frames)
            table.add_row(
                name.name,
                f"{sum(name.presence) / count:.2f}",
                f"{sum(sure) / len(sure):.2f}" if sure else "-",
                f"{sum(name.area) / count:.1%}",
                str(len(sure)),
            )
        console.print(table)
        console.print(
            f"label changes per pixel and second: {_rate(camera.flicker_static)} where the image stands still "
            f"({_share(camera.static_share)} of it), {_rate(camera.flicker_warped)} along the optical flow",
        )
        if camera.score is not None:
            console.print(f"mIoU {_rate(camera.score.miou)} over {camera.score.images} images with labels")
        for reason, count in camera.lost.items():
            console.print(f"{count} lost: {reason}", style="yellow", soft_wrap=True)
    for live in report.live:
        console.print(
            f"live: {live.published} images out, {live.masks} masks, {live.dropped} dropped; age p50 "
            f"{_ms(live.age_p50_ms)}, p95 {_ms(live.age_p95_ms)}, p99 {_ms(live.age_p99_ms)}, jitter "
            f"{_ms(live.jitter_ms)}; {live.equal} of {live.compared} masks equal to those worked out offline",
        )
    for note in report.notes:
        console.print(note, style="dim", soft_wrap=True)
    _print_file(console, "report", out / "report.html")
    for kind, path in [("bag", report.bag), *(("video", camera.video) for camera in report.cameras)]:
        if path:
            _print_file(console, kind, out / path)


def _print_file(console: Console, kind: str, path: Path) -> None:
    console.print(Text(f"{kind:6}", "bold"), f" {path}", soft_wrap=True)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"
