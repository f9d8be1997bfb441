"""Computes the demonstration's figures from the images that were played and the answers that came."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from nerve_core.evaluation.metric import ConfusionMatrix
from nerve_ros.demo.collector import Answer
from nerve_ros.demo.recording import Recording

STAGES = (
    "convert",
    "preprocess",
    "clip",
    "diffusion",
    "networks",
    "probabilities",
    "refine",
    "edges",
    "readout",
    "publish",
)
"""Of one image in the node, in this order; other stages that the diagnostics name come behind."""

UNLABELLED = 255


@dataclass(frozen=True)
class Published:
    """Image `index` of the recording went out with `stamp` (nanoseconds) at `time` (steady clock, seconds)."""

    index: int
    stamp: int
    time: float


@dataclass(frozen=True)
class Asked:
    """These names were asked for at `time` (steady clock, seconds)."""

    names: tuple[str, ...]
    time: float


@dataclass(frozen=True)
class Segmented:
    """An image that was answered: with it the vocabulary that was in force, by its place among those asked for."""

    published: Published
    answer: Answer
    vocabulary: int

    @property
    def classes(self) -> dict[int, str]:
        """Names by class id."""
        return self.answer.classes or {}

    @property
    def age(self) -> float:
        """Seconds from the image's publishing to its mask's arrival."""
        return self.answer.arrived - self.published.time


@dataclass(frozen=True)
class VocabularyReport:
    """One vocabulary: when it was asked for (seconds of the film), how long until the first mask by it, how many masks
    and how good. None where there is no mask."""

    names: tuple[str, ...]
    asked_at_s: float
    answered_after_ms: float | None
    frames: int
    miou: float | None


@dataclass(frozen=True)
class Report:
    """All figures of a run.

    frames_dropped: frames_in less frames_segmented. frames_received: as the node counted them; None where unknown.
    miou: background included, over all masks, names that were not asked for counted as background.
    foreign_pixels: pixels with an id that the vocabulary in force does not have. unannounced_masks: masks that came
    before the LabelInfo of their ids. incomplete: masks without confidence of their size or class_confidence.
    """

    frames_in: int
    frames_segmented: int
    frames_dropped: int
    frames_received: int | None
    frames_per_second: float
    age_p50_ms: float | None
    age_p95_ms: float | None
    miou: float | None
    iou: dict[str, float]
    vocabularies: tuple[VocabularyReport, ...]
    stage_ms: dict[str, float]
    stage_p95_ms: dict[str, float]
    foreign_pixels: int
    unannounced_masks: int
    incomplete: int

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def match(
    published: Sequence[Published], asked: Sequence[Asked], answers: Mapping[int, Answer]
) -> tuple[Segmented, ...]:
    """The images whose mask and class_confidence came, in the order in which they went out.

    The vocabulary in force is the one that the class_confidence names; asked for twice, the last one that was asked for
    before the image went out, or else the first before its mask came.
    """
    found = []
    for image in published:
        answer = answers.get(image.stamp)
        if answer is None or not answer.mask or answer.classes is None:
            continue
        names = {name.casefold() for name in answer.classes.values()}
        fitting = [
            number
            for number, asking in enumerate(asked)
            if {name.casefold() for name in asking.names} == names and asking.time <= answer.arrived
        ]
        if fitting:
            before = [number for number in fitting if asked[number].time <= image.time]
            found.append(Segmented(image, answer, before[-1] if before else fitting[0]))
    return tuple(found)


def make_report(
    recording: Recording,
    published: Sequence[Published],
    asked: Sequence[Asked],
    answers: Mapping[int, Answer],
    diagnostics: Mapping[str, str],
    progress: Callable[[Iterable], Iterable] = iter,
) -> Report:
    """The figures of a run; `diagnostics` are the values of the node's last DiagnosticStatus."""
    segmented = match(published, asked, answers)
    index = _class_index(recording.names, asked)
    matrices = [ConfusionMatrix.of(1 + max(index.values())) for _ in asked]
    foreign = 0
    for seen in progress(segmented):
        mask = seen.answer.labels
        truth = recording.labels(seen.published.index)
        matrices[seen.vocabulary].add(
            wanted_truth(truth, recording.names, asked[seen.vocabulary].names, index),
            _by_index(mask, seen.classes, index),
        )
        allowed = {0, *seen.classes} if seen.classes else {UNLABELLED}
        counts = np.bincount(mask.ravel(), minlength=256)
        foreign += int(counts.sum() - counts[sorted(allowed)].sum())
    everything = ConfusionMatrix(np.sum([matrix.counts for matrix in matrices], axis=0))
    names = {number: name for name, number in reversed(index.items())}
    ages = [1e3 * seen.age for seen in segmented]
    p50, p95 = np.percentile(ages, (50, 95)) if ages else (math.nan, math.nan)
    received = diagnostics.get("images_received", "")
    first = published[0].time if published else 0.0
    return Report(
        frames_in=len(published),
        frames_segmented=len(segmented),
        frames_dropped=len(published) - len(segmented),
        frames_received=int(received) if received else None,
        frames_per_second=round(_rate(segmented), 2),
        age_p50_ms=_rounded(p50, 1),
        age_p95_ms=_rounded(p95, 1),
        miou=_rounded(everything.mean_iou(), 4),
        iou={
            names.get(number, "background"): round(float(value), 4)
            for number, value in enumerate(everything.iou())
            if not math.isnan(value)
        },
        vocabularies=tuple(
            _vocabulary_report(number, asking, first, segmented, matrices[number])
            for number, asking in enumerate(asked)
        ),
        stage_ms=_stages(diagnostics, "p50"),
        stage_p95_ms=_stages(diagnostics, "p95"),
        foreign_pixels=foreign,
        unannounced_masks=sum(not set(seen.classes) <= seen.answer.known for seen in segmented),
        incomplete=sum(not seen.answer.complete for seen in segmented),
    )


def wanted_truth(truth: np.ndarray, names: Sequence[str], asked: Sequence[str], index: Mapping[str, int]) -> np.ndarray:
    """The truth (label k is names[k - 1]) by `index`, with every name that is not asked for as background."""
    table = np.zeros(256, np.uint16)
    wanted = {name.casefold() for name in asked}
    for label, name in enumerate(names, 1):
        if name.casefold() in wanted:
            table[label] = index[name.casefold()]
    return table[truth]


def _class_index(names: Sequence[str], asked: Sequence[Asked]) -> dict[str, int]:
    """A number from 1 for every name of the recording, then for every other name that was asked for."""
    index: dict[str, int] = {}
    for name in (*names, *(name for asking in asked for name in asking.names)):
        index.setdefault(name.casefold(), len(index) + 1)
    return index


def _by_index(mask: np.ndarray, classes: Mapping[int, str], index: Mapping[str, int]) -> np.ndarray:
    table = np.zeros(256, np.uint16)
    for number, name in classes.items():
        table[number] = index[name.casefold()]
    return table[mask]


def _vocabulary_report(
    number: int, asking: Asked, first: float, segmented: Sequence[Segmented], matrix: ConfusionMatrix
) -> VocabularyReport:
    mine = [seen for seen in segmented if seen.vocabulary == number]
    # The first vocabulary is asked for long before there is an image.
    since = max(asking.time, first)
    return VocabularyReport(
        asking.names,
        round(since - first, 2),
        _rounded(1e3 * (min(seen.answer.arrived for seen in mine) - since), 1) if mine else None,
        len(mine),
        _rounded(matrix.mean_iou(), 4),
    )


def _stages(diagnostics: Mapping[str, str], percentile: str) -> dict[str, float]:
    suffix = f"_{percentile}_ms"
    times = {
        key.removeprefix("stage_").removesuffix(suffix): float(value)
        for key, value in diagnostics.items()
        if key.startswith("stage_") and key.endswith(suffix) and value
    }
    order = [stage for stage in STAGES if stage in times]
    return {stage: times[stage] for stage in (*order, *sorted(set(times) - set(order)))}


def _rate(segmented: Sequence[Segmented]) -> float:
    """Masks a second."""
    if len(segmented) < 2:
        return 0.0
    return (len(segmented) - 1) / max(segmented[-1].answer.arrived - segmented[0].answer.arrived, 1e-3)


def _rounded(value: float, digits: int) -> float | None:
    """None for a value that is not a number, which JSON does not know."""
    return None if math.isnan(value) else round(float(value), digits)
