"""`nerve tune`: settings that suit one's own images, with what they gain on images they were not chosen by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import say
from ..output import write
from .eval import SETS, Limit, Run, check_out, counted, measures, open_set, show
from .options import words

if TYPE_CHECKING:
    from ..evaluation.datasets import Dataset
    from ..evaluation.runner import Tally
    from ..evaluation.variants import Variant

_HELD_OUT = "held-out"
SETTINGS = "settings.json"


@measures
def tune(
    *,
    source: Annotated[str, typer.Argument(help="A labelled folder, or a set's name with --root.")],
    root: Annotated[Path | None, typer.Option(help="Folder that holds the set that is named.")] = None,
    trials: Annotated[int, typer.Option(min=2, help="Settings that are tried at most.")] = 60,
    axes: Annotated[str, typer.Option(help="What is tried, in this order, with commas between.")] = (
        "head,kernel,beta,alpha,c,steps,threshold"
    ),
    held_out: Annotated[float, typer.Option(help="Share of the images that only the result is judged by.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of those images.")] = 0,
    limit: Limit = None,
    run: Run,
) -> None:
    """Search settings on one part of a labelled set, and judge them on the other.

    One setting after the other is changed and the best kept, in rounds, until a round changes nothing or --trials are
    spent. Images that are held out are looked at once, at the end, and say what is gained and how sure that is. Writes
    settings.json, to be given as --set @settings.json or to be put into a pair.json.
    """
    from ..evaluation import summary
    from ..evaluation import tune as tuning
    from ..evaluation.variants import Variant
    from ..report.page import write_report

    out = run.out
    if out is None:
        raise ValueError("nerve tune needs --out DIR, for the settings it finds and what it found them by")
    check_out(run, [_HELD_OUT], [SETTINGS])
    dataset = _opened(source, root, limit)
    learnt, judged = tuning.split(dataset, held_out, seed)
    base = run.base(dataset)
    say(f"at most {trials} settings on {len(learnt.samples)} images, then 2 on the {len(judged.samples)} held out")

    def measured(number: int, axis: str, variants: Sequence[Variant]) -> Tally:
        folder = out / "tuning" / f"{number:02d}-{axis}"
        with counted(run, learnt, variants, folder, f"{axis}, {len(variants)} settings") as (result, _):
            return result.tally

    found, tried = tuning.search(measured, base, words(axes), trials)
    write(out / SETTINGS, json.dumps(found, indent=1) + "\n")
    both = (Variant(tuning.OWN), Variant(tuning.TUNED, found))
    with counted(run, judged, both, out / _HELD_OUT, "held-out images") as (result, _):
        gain = tuning.gain(result)
    scores = summary.scores(result)
    report = summary.make_report(
        "tune",
        f"Tuning on {dataset.title}",
        result,
        [summary.set_scores(result, scores)],
        base,
        curves=tuning.curves(dataset.name, base, tried),
        notes=(
            f"chosen on {len(learnt.samples)} images; the scores are of {len(judged.samples)} others (seed {seed})",
            str(gain),
        ),
        extra={
            "What tuning changed": {name: json.dumps(value) for name, value in found.items()} or "nothing",
            "Gain on held-out images": {
                "mIoU, points": round(100 * gain.gain, 3),
                "95 % interval": None if gain.interval is None else [round(100 * end, 3) for end in gain.interval],
                "distinguishable": gain.distinguishable,
            },
            "Tried on the images tuned on": tuple(
                {
                    "round": trial.round,
                    "axis": trial.axis,
                    "changed": ", ".join(f"{name} {json.dumps(value)}" for name, value in trial.settings.items()),
                    "mIoU %, tuned on": None if trial.miou != trial.miou else round(100 * trial.miou, 2),
                }
                for trial in tried
            ),
        },
    )
    path = write_report(report, out)
    show(run, report)
    say(f"settings: {out / SETTINGS} ({json.dumps(found)})")
    say(f"report: {path}")


def _opened(source: str, root: Path | None, limit: int | None) -> Dataset:
    """The set that is meant. Raises ValueError, DatasetError."""
    if source in SETS:
        if root is None:
            raise ValueError(f"nerve tune {source} needs --root, the folder that holds the set")
        return open_set(source, root, limit)[0]
    if root is not None:
        raise ValueError(f"{source!r} is no set's name, so --root has no meaning; sets are {', '.join(SETS)}")
    return open_set("folder", Path(source), limit)[0]
