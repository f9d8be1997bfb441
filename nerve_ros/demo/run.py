"""Runs the demonstration from start to end.

Starts the node by its installed executable and a player of the bag, each in a process of its own and in a ROS domain
that nobody else uses; listens, measures, draws, and ends them whatever happens.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import cv2
import typer
from ament_index_python.packages import PackageNotFoundError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nerve_core.cli.options import Overwrite
from nerve_core.console import PlainConsole
from nerve_core.output import claim
from nerve_ros.demo.collector import Collector, Heard
from nerve_ros.demo.processes import Child, environment, node_command, own_domain
from nerve_ros.demo.recording import Recording, RecordingError, read_recording
from nerve_ros.demo.report import STAGES, Asked, Published, Report, Segmented, make_report, match
from nerve_ros.demo.schedule import Asking, dump_schedule, schedule_of, usual_schedule

STARTING = 300.0
"""Seconds that the node may take until it is active, on a slow and busy machine."""
STALLED = 60.0
"""Seconds without any sign of life after which a process counts as stuck."""
LATE = 30.0
"""Seconds to wait for the masks that are due when the last image has gone out."""
TICK = 0.1
SHEET, VIDEO = "contact_sheet.png", "demo.mp4"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class DemoError(RuntimeError):
    """The demonstration cannot go on; the text says why."""


@dataclass(frozen=True)
class Options:
    """What a run is to do."""

    bag: Path
    out: Path
    seconds: float
    names: tuple[str, ...]
    rate: float
    model: str
    device: str
    overwrite: bool = False


@dataclass
class Played:
    """What the player has reported so far."""

    ready: bool = False
    ended: bool = False
    published: list[Published] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def hear(self, line: str) -> None:
        """Take one line of the player's output."""
        said = json.loads(line)
        event = said.pop("event")
        if event == "frame":
            self.published.append(Published(**said))
        elif event == "asked":
            self.asked.append(Asked(tuple(said["names"]), said["time"]))
        else:
            self.ready |= event == "ready"
            self.ended |= event == "end"


class Steps:
    """Progress on the terminal's standard error; where it is none, a line when a step is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    @contextmanager
    def step(self, description: str, total: float | None = None) -> Iterator[Callable[..., None]]:
        """One step of the work; gives a function that takes `completed` and `note`."""
        started = time.monotonic()
        task = self._progress.add_task(f"{description:24}", total=total, note="")
        with self._progress:
            yield functools.partial(self._progress.update, task)
        self._progress.remove_task(task)
        self._console.print(f"  {description:44} {time.monotonic() - started:5.1f} s")


class Run:
    """One demonstration. `go` gives its figures; the children are ended when the stack given is closed."""

    def __init__(self, options: Options, stack: ExitStack, steps: Steps) -> None:
        claim((options.out / name for name in (SHEET, VIDEO, "node.log", "player.log")), options.overwrite)
        self._options, self._stack, self._steps = options, stack, steps
        recording = read_recording(options.bag)
        self.recording: Recording = recording.beginning(min(options.seconds, recording.seconds))
        self.schedule: tuple[Asking, ...] = (
            schedule_of(options.names, self.recording.seconds)
            if options.names
            else usual_schedule(self.recording.seconds, self.recording.names)
        )
        self.played = Played()

    def go(self) -> tuple[Report, dict]:
        """Start everything, wait for it, measure and draw; the figures, and what else JSON holds."""
        options = self._options
        options.out.mkdir(parents=True, exist_ok=True)
        env = environment(self._stack.enter_context(own_domain()))
        # Children first: this process has one thread still.
        self.node = self._start("node", node_command(model=options.model, device=options.device), env)
        self.player = self._start("player", self._player_command(), env, talks=True)
        self._stack.callback(self.node.finish)  # so that both end at the same time
        os.environ.update(env)
        self.collector = Collector()
        self._stack.callback(self.collector.close)
        self._wait_until_ready()
        self._play()
        self._wait_for_late_masks()
        heard = self.collector.heard()
        self.node.finish()
        segmented = match(self.played.published, self.played.asked, heard.answers)
        if not segmented:
            raise DemoError(f"{len(self.played.published)} images went out and no mask came back{self._node_log()}")
        return self._results(heard, segmented)

    def _player_command(self) -> list[str]:
        seconds = self.recording.seconds - self.recording.interval / 2
        return [
            *(sys.executable, "-P", "-m", "nerve_ros.demo.player", str(self._options.bag), "--wait-for-line"),
            *("--seconds", str(seconds), "--rate", str(self._options.rate)),
            *("--schedule", dump_schedule(self.schedule), "--patience", str(STARTING + STALLED)),
        ]

    def _start(self, name: str, command: list[str], env: Mapping[str, str], *, talks: bool = False) -> Child:
        child = Child(name, command, env, self._options.out / f"{name}.log", talks=talks)
        self._stack.callback(child.end)
        return child

    def _wait_until_ready(self) -> None:
        with self._steps.step("starting the node") as update:
            # It takes its seconds, and the node is loading anyway.
            import nerve_ros.demo.pictures  # noqa: F401

            deadline = time.monotonic() + STARTING
            while True:
                heard = self.collector.heard()
                if heard.state == "active" and self.played.ready:
                    return
                if heard.state not in ("", "active"):
                    raise DemoError(f"the node is '{heard.state}', not 'active': {heard.message}{self._node_log()}")
                if time.monotonic() > deadline:
                    state = heard.state or heard.values.get("state", "silent")
                    why = "" if state != "active" else f"; it serves {sorted(heard.classes.values())}"
                    raise DemoError(f"the node is {state} after {STARTING:.0f} s{why}{self._node_log()}")
                note = heard.values.get("stage") or ("waiting for its labels" if heard.state else "")
                update(note=note)
                self._tick()

    def _play(self) -> None:
        total = len(self.recording.frames)
        with self._steps.step(f"playing {self.recording.seconds:.0f} s of camera", total) as update:
            self.player.say("go")
            last, since = -1, time.monotonic()
            while not self.played.ended:
                self._tick()
                count = len(self.played.published)
                if count != last:
                    last, since = count, time.monotonic()
                if time.monotonic() - since > STALLED:
                    raise DemoError(f"the player sent {count} of {total} images and then none for {STALLED:.0f} s")
                masks = len(self.collector.heard().answers)
                update(completed=count, note=f"{masks} masks")

    def _wait_for_late_masks(self) -> None:
        """Until the last image is answered (a newer one never replaces it) and the node's own count holds its mask."""
        deadline = time.monotonic() + LATE
        last = self.played.published[-1].stamp
        while time.monotonic() < deadline:
            heard = self.collector.heard()
            complete = sum(answer.complete for answer in heard.answers.values())
            counted = int(heard.values.get("images_segmented") or 0)
            if last in heard.answers and heard.answers[last].complete and counted >= complete:
                return
            self._tick()

    def _tick(self) -> None:
        """Let a moment pass. Raises DemoError where a child has ended that should not have."""
        time.sleep(TICK)
        ended = self.player.returncode
        for line in self.player.read():
            self.played.hear(line)
        if self.node.returncode is not None:
            raise DemoError(f"the node ended with {self.node.returncode}{self._node_log()}")
        if ended is not None and not self.played.ended:
            raise DemoError(f"the player ended with {ended}:\n{self.player.last_lines()}")

    def _node_log(self) -> str:
        lines = self.node.last_lines()
        return f"; the end of {self.node.log}:\n{lines}" if lines else f"; {self.node.log} is empty"

    def _results(self, heard: Heard, segmented: Sequence[Segmented]) -> tuple[Report, dict]:
        from nerve_ros.demo.pictures import write_contact_sheet, write_video

        options, played = self._options, self.played
        sheet, video = options.out / SHEET, options.out / VIDEO
        with self._steps.step("measuring and drawing", 2 * len(segmented)) as update:
            done = 0

            def progress(items: Iterable) -> Iterator:
                nonlocal done
                for item in items:
                    yield item
                    done += 1
                    update(completed=done)

            report = make_report(self.recording, played.published, played.asked, heard.answers, heard.values, progress)
            write_video(video, self.recording, played.asked, segmented, progress=progress)
            write_contact_sheet(sheet, self.recording, played.asked, segmented)
        figures = report.as_dict() | {
            "model": heard.values.get("model", options.model),
            "device": heard.values.get("device", ""),
            "precision": heard.values.get("precision", "").removeprefix("torch."),
            "cores": len(os.sched_getaffinity(0)),
            "seconds": round(self.recording.seconds, 2),
            "rate": options.rate,
            "video": str(video),
            "contact_sheet": str(sheet),
            "node_log": str(self.node.log),
        }
        return report, figures


def show(console: Console, report: Report, figures: Mapping[str, object], recording: Recording) -> None:
    """Print the figures for a person."""
    height, width = recording.image(0).shape[:2]
    console.print()
    table = Table(
        title=f"{figures['seconds']:g} s of camera, {width} x {height}, model pair '{figures['model']}' "
        f"on {figures['device']} ({figures['cores']} cores)",
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("frames in", str(report.frames_in), "")
    table.add_row("segmented", str(report.frames_segmented), f"{report.frames_per_second:.1f} a second")
    table.add_row("dropped", str(report.frames_dropped), "made way for newer ones" if report.frames_dropped else "")
    table.add_row("age p50", _milliseconds(report.age_p50_ms), "from the image's publishing to its mask's arrival")
    table.add_row("age p95", _milliseconds(report.age_p95_ms), "")
    table.add_row("mIoU", _share(report.miou), "of what was asked for, against the bag's labels")
    console.print(table)
    console.print()

    stages = Table(title="ms per stage", title_justify="left", box=None, padding=(0, 2, 0, 0))
    stages.add_column("", style="bold")
    for name in ("p50", "p95"):
        stages.add_column(name, justify="right")
    for stage in STAGES:
        if stage in report.stage_ms:
            stages.add_row(stage, f"{report.stage_ms[stage]:.1f}", f"{report.stage_p95_ms[stage]:.1f}")
    console.print(stages)
    console.print()

    asked = Table(title="asked for", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("at", "names", "first mask", "masks", "mIoU"):
        asked.add_column(name, justify="left" if name == "names" else "right", no_wrap=name != "names")
    for vocabulary in report.vocabularies:
        after = vocabulary.answered_after_ms
        asked.add_row(
            f"{vocabulary.asked_at_s:.1f} s",
            ", ".join(vocabulary.names),
            _milliseconds(after),
            str(vocabulary.frames),
            _share(vocabulary.miou),
        )
    console.print(asked)
    console.print()
    for name in ("contact_sheet", "video"):
        # As it is, so that a terminal can follow it.
        console.print(Text(f"{name.replace('_', ' '):13}", "bold"), str(figures[name]), soft_wrap=True)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interrupted(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(
    bag: Annotated[Path, typer.Option(help="The bag to play, with labels: see tools/sample_bag.py.")] = Path(
        "build/sample_bag"
    ),
    out: Annotated[Path, typer.Option(help="Folder for the pictures and logs.")] = Path("build/demo"),
    seconds: Annotated[float, typer.Option(min=0.1, help="Play this much of the bag, from its beginning.")] = 24.0,
    names: Annotated[
        list[str] | None,
        typer.Option(help="Ask for these instead, as 'ball, mug|cup'; given several times: one after the other."),
    ] = None,
    rate: Annotated[float, typer.Option(min=0.01, max=100.0, help="Play this much faster than filmed.")] = 1.0,
    model: Annotated[str, typer.Option(help="Model pair: name or folder.")] = "embedded",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, on the last line.")] = False,
) -> None:
    """Play a bag to the node over DDS, ask for objects by name, and measure and draw the answers."""
    cv2.setNumThreads(1)
    console = PlainConsole(stderr=True)
    for number in SIGNALS:
        signal.signal(number, _interrupted)
    options = Options(bag, out, seconds, tuple(names or ()), rate, model, device, overwrite)
    try:
        with _uninterrupted_end() as stack:
            run = Run(options, stack, Steps(console))
            report, figures = run.go()
    except (DemoError, RecordingError, PackageNotFoundError, RuntimeError, ValueError) as error:
        console.print(Text("demo:", "red"), str(error), soft_wrap=True)
        raise typer.Exit(1) from None
    except SystemExit:
        console.print("demo: interrupted; everything it started has ended")
        raise
    show(console if as_json else PlainConsole(), report, figures, run.recording)
    if as_json:
        print(json.dumps(figures))


@contextmanager
def _uninterrupted_end() -> Iterator[ExitStack]:
    """A stack that is unwound whatever happens, during which further signals are ignored."""
    with ExitStack() as stack:
        try:
            yield stack
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
