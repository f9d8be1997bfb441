"""`nerve eval`: how good the masks are, on benchmarks, in the paper's tables, on one's own folder or drawn scenes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..console import console, say
from ..output import claim
from .options import AsJson, Device, Model, Overwrite, Precision, Preset, Set, read_settings, words

if TYPE_CHECKING:
    from ..evaluation.datasets import Dataset
    from ..evaluation.runner import SetResult
    from ..evaluation.variants import Variant
    from ..evaluation.workers import ImageSet, Task, Workers
    from ..report.data import Report, SetScores
    from ..settings import Settings

evaluate = typer.Typer(no_args_is_help=True, help="Measure the quality of masks.")

SETS = {
    "voc21": "Pascal VOC 2012 val: 20 classes and the background.",
    "voc20": "Pascal VOC 2012 val, the background ignored.",
    "pc60": "Pascal Context val: 59 classes and the background.",
    "pc59": "Pascal Context val, the background ignored.",
    "coco-object": "COCO val2017: 80 things and the background.",
    "coco-stuff": "COCO-Stuff val2017: 171 classes.",
    "ade20k": "ADE20K validation: 150 classes.",
    "folder": "A labelled folder of your own, in the layout of Pascal VOC with a classes.txt.",
}
"""What each of `evaluation.datasets.DATASETS` is."""
Axes = Mapping[str, Sequence[str]]
Limit = Annotated[int | None, typer.Option(min=1, help="Take the first N images alone.")]


@dataclass(frozen=True)
class Run:
    """What every measurement takes, by the options of the same names."""

    model: str
    device: str
    precision: str | None
    preset: str
    settings: Mapping[str, Any]
    threads: int
    out: Path | None
    workers: int | None
    ray: str | None
    keep_going: bool
    overwrite: bool
    as_json: bool

    def base(self, dataset: ImageSet | None = None) -> Settings:
        """The pair's settings with the preset, what the set's protocol asks for, and --set: what variants start from.

        Raises ModelError, ValueError.
        """
        from ..models.pairs import find_pair
        from ..settings import Settings

        asked = {} if dataset is None else dataset.settings
        return Settings.of_pair(find_pair(self.model), self.preset, {**asked, **self.settings})

    def task(self, dataset: ImageSet, variants: Sequence[Variant]) -> Task:
        """A run on one set. Raises ModelError, ValueError."""
        from ..evaluation.runner import make_task

        return make_task(
            dataset,
            variants,
            model=self.model,
            device=self.device,
            precision=self.precision,
            preset=self.preset,
            settings=self.settings,
            threads=self.threads,
        )


def _run(
    model: Model = "embedded",
    set_: Set = None,
    preset: Preset = "pair",
    device: Device = "auto",
    precision: Precision = None,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads of each worker. A few pixels depend on it: it is part of the run.")
    ] = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes with a model each, on CUDA a device each; by default one.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Work on a Ray cluster, with --workers actors: auto, local or HOST:PORT.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results and report. The same command goes on with a run that was interrupted."),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave out images that cannot be read, and say which.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> Run:
    """A measurement by its options."""
    settings, where = read_settings(set_), (threads, out, workers, ray)
    return Run(model, device, precision, preset, settings, *where, keep_going, overwrite, as_json)


def taking(name: str, build: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that has the options of `build` in place of its parameter `name`, which gets what `build` makes."""
    hints, shared = get_type_hints(build, include_extras=True), inspect.signature(build).parameters

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            made = build(**{option: given.pop(option) for option in shared})
            function(**given, **{name: made})

        parts: list[inspect.Parameter] = []
        for part in inspect.signature(function).parameters.values():
            parts += shared.values() if part.name == name else [part]
        known = {**get_type_hints(function, include_extras=True), **hints}
        parts = [part.replace(annotation=known[part.name], kind=inspect.Parameter.KEYWORD_ONLY) for part in parts]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__annotations__ = {part.name: part.annotation for part in parts}
        command.__dict__["__signature__"] = inspect.Signature(parts)  # what inspect.signature, and so typer, reads
        return command

    return decorate


def _axes(
    head: Annotated[
        str | None, typer.Option(help="CLIP heads, with commas between; by default the pair's own.")
    ] = None,
    refine: Annotated[
        str | None, typer.Option(help="Refinements, with commas between: nerve, none, iseg, sd_mean, sfsa.")
    ] = None,
    edges: Annotated[
        str | None,
        typer.Option(help="How labels keep to the image's edges, with commas between: none, pixels, pamr."),
    ] = None,
    readout: Annotated[
        str | None, typer.Option(help="Readouts, with commas between: argmax, presence_minmax, presence_max, minmax.")
    ] = None,
) -> dict[str, Sequence[str]]:
    """What is compared: axis -> values."""
    given = {"refine": refine, "head": head, "edges": edges, "readout": readout}
    return {axis: words(text) for axis, text in given.items() if text}


measures, compares = taking("run", _run), taking("axes", _axes)


def _add_set(name: str, title: str) -> None:
    @evaluate.command(name, help=title)
    @measures
    @compares
    def of_set(
        *,
        root: Annotated[Path, typer.Option(help="Folder that holds the set. Nothing is downloaded.")],
        axes: Axes,
        limit: Limit = None,
        run: Run,
    ) -> None:
        from ..evaluation.variants import combinations

        opened = open_set(name, root, limit)
        show(run, measure(run, opened[0].title, [opened], combinations(axes)))


def _table(
    name: str,
    run: Run,
    roots: Path,
    sets: str | None,
    skip_missing: bool,
    limit: int | None,
    axes: Axes,
) -> None:
    """Measure one of the paper's tables and show it."""
    from ..evaluation import protocols
    from ..evaluation.datasets import DatasetError

    places = protocols.read_roots(roots)
    opened, missing = [], []
    for item in words(sets) if sets else protocols.BENCHMARKS:
        try:
            if item not in places:
                raise DatasetError(f"{roots} names no folder of {item}")
            opened.append(open_set(item, places[item], limit))
        except DatasetError as error:
            if not skip_missing:
                raise DatasetError(f"{error} (--skip-missing leaves such sets out)") from None
            missing.append(f"{item} is left out: {error}")
            say(missing[-1], style="yellow")
    if not opened:
        raise DatasetError("no set is left to measure")
    rows = protocols.table_variants(name, run.model, run.base(), axes)
    show(run, measure(run, protocols.TABLES[name], opened, rows, notes=missing, table=name))


Roots = Annotated[Path, typer.Option(help="YAML file with a line for each set: voc21: /data/VOC2012.")]
Sets = Annotated[str | None, typer.Option(help="Sets, with commas between; by default the seven benchmarks.")]
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Leave out sets that are not there, and say which.")]


@evaluate.command()
@measures
@compares
def table1(
    *,
    roots: Roots,
    sets: Sets = None,
    skip_missing: SkipMissing = False,
    limit: Limit = None,
    axes: Axes,
    run: Run,
) -> None:
    """The method on every benchmark, beside the published figures, and besides it every combination of what is named
    by --head, --refine, --edges and --readout."""
    _table("table1", run, roots, sets, skip_missing, limit, axes)


def _add_ablation(name: str, title: str) -> None:
    @evaluate.command(name, help=title)
    @measures
    def ablation(
        *, roots: Roots, sets: Sets = None, skip_missing: SkipMissing = False, limit: Limit = None, run: Run
    ) -> None:
        _table(name, run, roots, sets, skip_missing, limit, {})


_add_ablation("table3", "One head of the diffusion model alone, all heads alike, and weighed by entropy.")
_add_ablation("table4", "The local and the global transition and both, with and without the walk.")
_add_ablation("fig2", "The truncated walk of 0, 5, 10, 20 and 40 steps.")
for _name, _title in SETS.items():
    _add_set(_name, _title)


@evaluate.command()
@measures
@compares
def scenes(
    *,
    seed: Annotated[
        int, typer.Option(help="Seed of the scenes; the embedded pair never saw seeds other than 1.")
    ] = 1000,
    count: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 200,
    axes: Axes,
    run: Run,
) -> None:
    """Drawn scenes with known masks: mean IoU, background included, every name asked for."""
    from ..evaluation.scenes import DrawnScenes
    from ..evaluation.variants import combinations

    dataset = DrawnScenes(seed, count)
    show(run, measure(run, dataset.title, [(dataset, count)], combinations(axes)))


def open_set(name: str, root: Path, limit: int | None) -> tuple[Dataset, int]:
    """A set, with the first images alone where a limit is given, and how many it has in all. Raises DatasetError."""
    from ..evaluation.datasets import open_dataset

    with console.status(f"looking at {name} in {root}"):
        dataset = open_dataset(name, root)
    return dataset.first(limit), len(dataset.samples)


def measure(
    run: Run,
    title: str,
    opened: Sequence[tuple[ImageSet, int]],
    variants: Sequence[Variant],
    *,
    notes: Sequence[str] = (),
    table: str = "",
) -> Report:
    """Measure variants on sets, one after the other, and write the report where --out is given.

    opened: sets, and how many images each has in all. notes: for the report. table: whose curves are drawn too. Raises
    what the runner raises.
    """
    from ..evaluation import protocols, summary
    from ..report.page import write_report

    check_out(run, [dataset.name for dataset, _ in opened])
    sets = []
    for dataset, images in opened:
        folder = run.out and run.out / dataset.name
        with (
            counted(run, dataset, variants, folder, dataset.name) as (result, workers),
            console.status(f"{dataset.name}: intervals and pictures"),
        ):
            found = summary.scores(result)
            pictures = summary.draw_extremes(result, found, workers, run.out) if run.out else ()
        sets.append(
            summary.set_scores(
                result, found, images=images, published=protocols.PUBLISHED.get(dataset.name, ()), pictures=pictures
            )
        )
    report = summary.make_report(
        "evaluation",
        title,
        result,
        sets,
        run.base(),
        curves=protocols.curves(table, sets),
        extra=protocols.means(sets),
        notes=(*notes, *summary.cautions(result.task)),
    )
    if run.out:
        path = write_report(report, run.out)
        say(f"report: {path}")
    return report


@contextmanager
def counted(
    run: Run, dataset: ImageSet, variants: Sequence[Variant], folder: Path | None, name: str
) -> Iterator[tuple[SetResult, Workers]]:
    """One run of variants on a set, behind a bar of that name; gives what it found, and the workers, still there."""
    from ..evaluation.runner import open_workers, run_set

    task = run.task(dataset, variants)
    with closing(open_workers(task, run.workers, run.ray)) as workers:
        with progress(name) as watch:
            result = run_set(task, workers, folder=folder, keep_going=run.keep_going, watch=watch)
        yield result, workers


def check_out(run: Run, names: Sequence[str], others: Sequence[str] = ()) -> None:
    """Raise where the folder of a run holds runs that this command is not about or files that are not ours, or what
    the report needs is not installed. others: files that are written besides the report's."""
    from ..evaluation.runlog import DESCRIPTION, RunError
    from ..report.page import libraries_missing, report_files

    out = run.out
    if out is None:
        return
    if any(find_spec(library) is None for library in ("jinja2", "matplotlib")):
        raise libraries_missing()
    strange = sorted({path.parent.name for path in out.glob(f"*/{DESCRIPTION}")} - set(names))
    if strange:
        raise RunError(
            f"{out} holds runs on {', '.join(strange)}, which this command does not measure: choose another --out"
        )
    claim([*report_files(out, scored=True, frames=False), *(out / name for name in others)], run.overwrite)


@contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar; gives a function to call with the images done and in all. The time left is by this run's own images."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task(name, total=None)

        def watch(done: int, images: int) -> None:
            if bar.tasks[0].total is None:  # what an earlier run did took this one no time
                bar.reset(task, total=images, completed=done)
            else:
                bar.update(task, completed=done)

        yield watch


def show(run: Run, report: Report) -> None:
    """Print the scores: a table for each set, and with --json one object."""
    for item in report.sets:
        console.print(_scores_table(item))
        if len(item.scores) == 1:
            console.print(_names_table(item))
        for note in item.notes:
            say(f"{item.name}: {note}")
    for note in report.notes:
        say(note, style="yellow")
    say(f"{report.model} on {report.device}")
    if run.as_json:
        print(json.dumps({"title": report.title, "sets": [_plain(item) for item in report.sets]}))


def _plain(item: SetScores) -> dict[str, Any]:
    """A set's scores as JSON has them, without what fills files."""
    fields = ("variant", "images", "miou", "interval", "pixel_accuracy", "per_class", "seconds")
    scores = [{name: getattr(score, name) for name in fields} for score in item.scores]
    published = [
        {"method": entry.method, "miou_percent": entry.miou, "source": entry.source} for entry in item.published
    ]
    return {"set": item.name, "images": item.images, "scores": scores, "published": published}


def _scores_table(item: SetScores) -> Table:
    table = Table(title=item.title, title_justify="left")
    table.add_column("variant")
    for column in ("mIoU %", "95 % interval", "pixels %", "images", "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in item.scores:
        low_high = "-" if score.interval is None else f"{100 * score.interval[0]:.2f} to {100 * score.interval[1]:.2f}"
        table.add_row(
            score.variant,
            _percent(score.miou),
            low_high,
            _percent(score.pixel_accuracy),
            str(score.images),
            f"{1e3 * score.seconds / score.images:.0f}" if score.images else "-",
        )
    if item.published:
        table.add_section()
    for entry in item.published:
        table.add_row(f"published: {entry.method}", f"{entry.miou:.1f}", "", "", "", "", style="dim")
    return table


def _names_table(item: SetScores) -> Table:
    table = Table("name")
    table.add_column("IoU %", justify="right")
    for name, value in item.scores[0].per_class.items():
        table.add_row(name, _percent(value))
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
