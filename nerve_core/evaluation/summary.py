"""Counts -> a report: scores with their intervals, the published figures beside them, images to look at."""

from __future__ import annotations

import datetime
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..models.pairs import find_pair
from ..report.data import Picture, Published, Report, Score, SetScores
from ..report.files import ReportError, read_report
from ..report.pictures import save_picture
from ..settings import Settings
from ..text.vocabulary import UNLABELLED
from .metric import interval, resampled_mean_iou
from .protocols import PUBLISHED
from .runner import SetResult
from .workers import Done, Failed, Job, Task, Workers

PICTURED = 4
"""Images of each end, best and worst, of each variant on each set."""


def scores(result: SetResult) -> tuple[Score, ...]:
    """Of every variant, in the order that was asked for."""
    tally, labels = result.tally, result.task.dataset.labels
    found = []
    for variant in result.task.variants:
        matrix, sums = tally.matrices[variant.name], tally.sums[variant.name][tally.done]
        found.append(
            Score(
                variant=variant.name,
                settings=result.description["variants"][variant.name],
                images=len(tally),
                seconds=float(tally.seconds[variant.name].sum()),
                miou=_known(matrix.mean_iou()),
                interval=interval(resampled_mean_iou(sums)) if len(tally) else None,
                pixel_accuracy=_known(matrix.pixel_accuracy()),
                per_class={name: _known(value) for name, value in zip(labels, matrix.iou().tolist(), strict=True)},
                confusion=tuple((truth, predicted, pixels) for truth, predicted, pixels in matrix.sparse()),
                per_image={name: _known(value) for name, value in tally.image_scores(variant.name).items()},
            )
        )
    return tuple(found)


def set_scores(
    result: SetResult,
    found: Sequence[Score],
    *,
    images: int | None = None,
    published: Sequence[Published] = (),
    pictures: Sequence[Picture] = (),
) -> SetScores:
    """All that is reported of one set. found: its `scores`. images: that it has in all, where the run took fewer."""
    dataset = result.task.dataset
    taken = len(dataset.samples)
    images = taken if images is None else images
    few = [f"the first {taken} of {images} images alone"] if taken < images else []
    lost = [f"image {item.image_id} is left out: {item.reason}" for item in result.failed]
    return SetScores(
        name=dataset.name,
        title=dataset.title,
        root=str(dataset.root),
        images=images,
        labels=dataset.labels,
        scores=tuple(found),
        published=tuple(published),
        pictures=tuple(pictures),
        notes=(*dataset.notes, *_unknown_names(result), *few, *_only_background(result), *lost),
    )


def _unknown_names(result: SetResult) -> tuple[str, ...]:
    """What has to be known of names that the pair was not trained on."""
    pair, words = find_pair(result.task.model), result.task.dataset.vocabulary.words
    return (pair.limits(words),) if pair.unknown(words) else ()


def _only_background(result: SetResult) -> tuple[str, ...]:
    """What has to be known of images, a part of a set, in whose truth no class occurs."""
    truth = next(iter(result.tally.matrices.values())).counts.sum(1)
    if not truth[0] or truth[1:].any():
        return ()
    return ("no class occurs in the truth of these images: the score is that of the background alone",)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def draw_extremes(
    result: SetResult, found: Sequence[Score], workers: Workers, folder: Path, *, each: int = PICTURED
) -> tuple[Picture, ...]:
    """Segment the images on which each variant did worst and best once more, and draw them below folder/pictures.

    found: the `scores` of the result. What the report in the folder shows already is not drawn again. Raises
    RuntimeError where an image can no longer be done, OSError.
    """
    wanted: list[tuple[str, str, str]] = []  # variant, rank, image
    for score in found:
        order = sorted((value, name) for name, value in score.per_image.items() if value is not None)
        worst = [name for _, name in order[:each]]
        best = [name for _, name in order[: -each - 1 : -1] if name not in worst]
        wanted += [(score.variant, "worst", name) for name in worst]
        wanted += [(score.variant, "best", name) for name in best]
    drawn = _drawn_before(result, found, folder)
    if not drawn.keys() >= set(wanted):
        drawn = {}
        uses: dict[str, list[tuple[str, str]]] = {}
        for variant, rank, name in wanted:
            uses.setdefault(name, []).append((variant, rank))
        samples = {sample.id: sample for sample in result.task.dataset.samples}
        values = {score.variant: score.per_image for score in found}
        for done in workers.run([Job(samples[name], tuple(dict(of))) for name, of in uses.items()]):
            if isinstance(done, Failed):
                raise RuntimeError(f"image {done.image_id} was segmented before, and now: {done.reason}")
            for variant, rank in uses[done.image_id]:
                miou = values[variant][done.image_id]
                drawn[variant, rank, done.image_id] = _draw(result, done, folder, variant, rank, miou)
    return tuple(drawn[key] for key in wanted)


def _draw(result: SetResult, done: Done, folder: Path, variant: str, rank: str, miou: float | None) -> Picture:
    if done.image is None or done.truth is None:
        raise RuntimeError(f"image {done.image_id} came back without the masks that were asked for")
    hidden = done.truth == UNLABELLED  # what is not counted is not shown either
    return save_picture(
        folder,
        done.image,
        np.where(hidden, UNLABELLED, done.masks[variant]).astype(np.uint8),
        result.task.dataset.labels[1:],
        image_id=done.image_id,
        variant=variant,
        rank=rank,
        miou=miou,
        truth=done.truth,
    )


def _drawn_before(result: SetResult, found: Sequence[Score], folder: Path) -> dict[tuple[str, str, str], Picture]:
    """The pictures of a report that this very run wrote when it was done."""
    if result.done_before < len(result.tally):
        return {}
    try:
        before = next(item for item in read_report(folder).sets if item.name == result.task.dataset.name)
    except (ReportError, StopIteration):
        return {}
    if before.scores != tuple(found):
        return {}
    whole = [p for p in before.pictures if all((folder / file).is_file() for file in (p.image, p.overlay, p.truth))]
    return {(picture.variant, picture.rank, picture.image_id): picture for picture in whole}


def make_report(
    kind: str, title: str, result: SetResult, sets: Sequence[SetScores], settings: Settings, **more: Any
) -> Report:
    """A run as a report. result: of any of its sets. settings: what its variants and sets start from. more: other
    fields of `Report`."""
    task = result.task
    return Report(
        kind=kind,
        title=title,
        command=shlex.join(["nerve", *sys.argv[1:]]),
        created=datetime.datetime.now(datetime.timezone.utc).astimezone().isoformat(timespec="seconds"),
        device=f"{result.description['device']}, {task.precision}, threads a worker: {task.threads}",
        model=result.description["model"]["pair"],
        versions=result.description["versions"],
        settings=settings.flat(),
        defaults=Settings.of_pair(find_pair(task.model)).flat(),
        sets=tuple(sets),
        **more,
    )


def cautions(task: Task) -> tuple[str, ...]:
    """What a reader of the scores has to know first."""
    found = ["alpha, beta, c, the kernel and its temperature are this project's choices, not the paper's"]
    name = find_pair(task.model).name
    if name == "embedded" and task.dataset.name in PUBLISHED:
        found.append(
            "the embedded pair knows drawn scenes alone: its scores on photographs say that the harness runs, no more"
        )
    elif name != "embedded":
        found.append("those choices are untuned on real data; nerve tune chooses them on labelled images")
    return tuple(found)
