"""Two runs' folders -> one page that shows them side by side, what differs between them first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .data import Camera, Live, Picture, Presence, Report, Score, SetScores
from .files import ReportError, camera_labels, read_report
from .page import Media, environment, files_of, interleaved, said, save_page

COMPARISON = "comparison.html"
RESAMPLES = 2000
Item = TypeVar("Item")


@dataclass(frozen=True)
class Paired:
    """The mean difference (b - a) of the images' own mIoU over the images that both runs scored, 0..1, and its 95 %
    bootstrap interval over those images."""

    images: int
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class ScorePair:
    """One variant of two runs. classes: (label number or -1, name, IoU of a, of b), the greatest gain first, of the
    names that both scored. only_a, only_b: names that one of them has."""

    a: Score
    b: Score
    labels: tuple[str, ...]
    classes: tuple[tuple[int, str, float, float], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    paired: Paired | None
    pictures: tuple[tuple[Picture, Picture], ...] = ()


@dataclass(frozen=True)
class SetPair:
    """One set that two runs scored; alone: in words, what has no partner."""

    a: SetScores
    b: SetScores
    scores: tuple[ScorePair, ...]
    alone: tuple[str, ...]


@dataclass(frozen=True)
class CameraPair:
    """One topic that two runs replayed; figures: (name, unit, of a, of b)."""

    a: Camera
    b: Camera
    figures: tuple[tuple[str, str, float | None, float | None], ...]
    names: tuple[tuple[Presence, Presence], ...]
    score: ScorePair | None
    pictures: tuple[tuple[Picture, Picture], ...]
    alone: tuple[str, ...]


def write_comparison(a: Path, b: Path, out: Path) -> Path:
    """Write comparison.html into `out` from the reports of the folders a and b, and return its path.

    Sets are matched by name, cameras by topic, variants, names and images by name; what has no partner is listed.
    Raises ReportError where a folder holds no report or the kinds differ, RuntimeError where jinja2 or matplotlib is
    missing.
    """
    of_a, of_b = read_report(a), read_report(b)
    if of_a.kind != of_b.kind:
        raise ReportError(f"{a} is a report of kind {of_a.kind}, {b} of kind {of_b.kind}; give two of one kind")
    sets, sets_alone = _matched(of_a.sets, of_b.sets, lambda item: item.name, "set")
    cameras, cameras_alone = _matched(of_a.cameras, of_b.cameras, lambda item: item.topic, "camera")
    set_pairs = [_set_pair(*pair) for pair in sets]
    camera_pairs = [_camera_pair(*pair, same=of_a.source == of_b.source) for pair in cameras]
    live, live_alone = _matched(of_a.live, of_b.live, lambda item: f"{item.topic} at rate {item.rate:g}", "live run")
    pictures = interleaved(
        [*(score.pictures for item in set_pairs for score in item.scores), *(item.pictures for item in camera_pairs)]
    )
    # Image and truth are shown as a has them: b's overlays are a quarter of what is shown.
    media_a = Media(a, [files_of([one]) for one, _ in pictures], share=0.75, copy_to=out)
    media_b = Media(b, [[other.overlay] for _, other in pictures], share=0.25, copy_to=out)
    text = (
        environment()
        .get_template("compare.html")
        .render(
            a=of_a,
            b=of_b,
            folders=(a, b),
            media_a=media_a,
            media_b=media_b,
            differences=differences(of_a, of_b),
            sets=set_pairs,
            cameras=camera_pairs,
            live=[(one, _live_figures(one, other)) for one, other in live],
            alone_items=(*sets_alone, *cameras_alone, *live_alone),
        )
    )
    return save_page(out / COMPARISON, text)


def differences(a: Report, b: Report) -> list[tuple[str, str, str]]:
    """(what, in a, in b) of everything that two runs were given or ran on and that is not the same."""
    rows: list[tuple[str, Any, Any]] = [
        (name, getattr(a, name), getattr(b, name)) for name in ("command", "model", "device", "source")
    ]
    for kind in ("settings", "versions"):
        one, other = getattr(a, kind), getattr(b, kind)
        rows += [(name, one.get(name, "not said"), other.get(name, "not said")) for name in {**one, **other}]
    rows += [(f"folder of {x.name}", x.root, y.root) for x in a.sets for y in b.sets if x.name == y.name]
    found = [(name, said(one), said(other)) for name, one, other in rows if one != other]
    for what, one, other in (
        *((f"labels of {x.name}", x.labels, y.labels) for x in a.sets for y in b.sets if x.name == y.name),
        *(
            (f"names on {x.topic}", camera_labels(x)[1:], camera_labels(y)[1:])
            for x in a.cameras
            for y in b.cameras
            if x.topic == y.topic
        ),
    ):
        if one != other:
            only_a, only_b = ([name for name in of if name not in rest] for of, rest in ((one, other), (other, one)))
            if only_a or only_b:
                found.append((what, _only_here(only_a), _only_here(only_b)))
            else:
                found.append((what, ", ".join(one), ", ".join(other)))
    return found


def _only_here(names: Sequence[str]) -> str:
    return f"only here: {', '.join(names)}" if names else "none that the other lacks"


def paired(a: Score, b: Score) -> Paired | None:
    """How sure the difference of two scores is; None where fewer than two images were scored by both."""
    gains = [
        other - one
        for name, one in a.per_image.items()
        if one is not None and (other := b.per_image.get(name)) is not None
    ]
    if len(gains) < 2:
        return None
    gain = np.array(gains, np.float64)
    generator = np.random.default_rng(0)
    means = np.array([gain[generator.integers(0, len(gain), len(gain))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Paired(len(gain), float(gain.mean()), (float(low), float(high)))


def _matched(
    a: Sequence[Item], b: Sequence[Item], key: Any, what: str
) -> tuple[list[tuple[Item, Item]], tuple[str, ...]]:
    """Pairs of one key, and in words those that have no partner."""
    of_a, of_b = {key(item): item for item in a}, {key(item): item for item in b}
    alone = [f"{what} {name}: only in A" for name in of_a if name not in of_b]
    alone += [f"{what} {name}: only in B" for name in of_b if name not in of_a]
    return [(of_a[name], of_b[name]) for name in of_a if name in of_b], tuple(alone)


def _same_pictures(
    a: Sequence[Picture], b: Sequence[Picture], what: str
) -> tuple[list[tuple[Picture, Picture]], tuple[str, ...]]:
    """Pairs of one id and one image, whose files are named by what is in them; in words those without a partner."""
    pairs, alone = _matched(a, b, lambda picture: picture.image_id, what)
    others = tuple(f"{what} {one.image_id}: another image in B" for one, other in pairs if one.image != other.image)
    return [(one, other) for one, other in pairs if one.image == other.image], (*alone, *others)


def _set_pair(a: SetScores, b: SetScores) -> SetPair:
    alone: tuple[str, ...] = ()
    if len(a.scores) == len(b.scores) == 1:  # whatever they are called, these two are meant
        scores = [(a.scores[0], b.scores[0])]
    else:
        scores, alone = _matched(a.scores, b.scores, lambda score: score.variant, "variant")
    pairs = []
    for one, other in scores:
        of_a, of_b = (
            [picture for picture in of.pictures if picture.variant == score.variant]
            for of, score in ((a, one), (b, other))
        )
        pictures, left = _same_pictures(of_a, of_b, f"image of {one.variant}")
        alone += left
        pairs.append(_score_pair(one, other, a.labels, pictures))
    return SetPair(a, b, tuple(pairs), alone)


def _score_pair(
    a: Score, b: Score, labels: tuple[str, ...], pictures: Iterable[tuple[Picture, Picture]] = ()
) -> ScorePair:
    numbers = {name: number for number, name in enumerate(labels)}
    classes = [
        (numbers.get(name, -1), name, one, other)
        for name, one in a.per_class.items()
        if one is not None and (other := b.per_class.get(name)) is not None
    ]
    both = {name for _, name, _, _ in classes}
    only_a, only_b = (
        tuple(name for name, value in of.per_class.items() if value is not None and name not in both) for of in (a, b)
    )
    classes.sort(key=lambda row: row[2] - row[3])
    return ScorePair(a, b, labels, tuple(classes), only_a, only_b, paired(a, b), tuple(pictures))


def _camera_pair(a: Camera, b: Camera, *, same: bool) -> CameraPair:
    """same: whether both are of one recording; of two, frames of the same second are not the same frames."""
    names, alone = _matched(a.names, b.names, lambda name: name.name, "name")
    pictures, left = _same_pictures(a.pictures, b.pictures, "frame")
    figures: tuple[tuple[str, str, float | None, float | None], ...] = (
        ("frames segmented", "", a.frames, b.frames),
        ("images lost", "", sum(a.lost.values()), sum(b.lost.values())),
        ("frames a second", "", a.frames_per_second, b.frames_per_second),
        ("flicker where the image stands still", "a second", a.flicker_static, b.flicker_static),
        ("flicker along the optical flow", "a second", a.flicker_warped, b.flicker_warped),
        ("stood still, share of pixels", "", a.static_share, b.static_share),
        *(
            (stage, "ms a frame", a.stage_ms.get(stage), b.stage_ms.get(stage))
            for stage in {**a.stage_ms, **b.stage_ms}
        ),
    )
    score = _score_pair(a.score, b.score, camera_labels(a)) if a.score and b.score else None
    if score and not same:
        score = replace(score, paired=None)
    if (a.score is None) != (b.score is None):
        alone += (f"score against labels: only in {'A' if a.score else 'B'}",)
    return CameraPair(a, b, figures, tuple(names), score, tuple(pictures), alone + left)


def _live_figures(a: Live, b: Live) -> list[tuple[str, str, float | None, float | None]]:
    words = {
        "published": ("images published", ""),
        "masks": ("masks", ""),
        "dropped": ("dropped", ""),
        "age_p50_ms": ("age p50", "ms"),
        "age_p95_ms": ("age p95", "ms"),
        "age_p99_ms": ("age p99", "ms"),
        "jitter_ms": ("jitter", "ms"),
        "cpu": ("CPU", "cores"),
        "memory_mb": ("memory", "MB"),
        "compared": ("masks compared with offline", ""),
        "equal": ("masks equal to offline", ""),
    }
    return [
        (*words[item.name], getattr(a, item.name), getattr(b, item.name)) for item in fields(a) if item.name in words
    ]
