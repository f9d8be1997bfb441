"""A report -> one HTML file that needs nothing beside it: no script, no request, no font file."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..images.visualize import palette
from ..output import write, writing
from ..text.vocabulary import BACKGROUND, UNLABELLED
from . import charts
from .data import Camera, Curve, Picture, Presence, Report, Score
from .files import FRAMES, RESULTS, SCORE_TABLES, ReportError, camera_labels, label_name, write_results, write_tables

if TYPE_CHECKING:
    from jinja2 import Environment

Item = TypeVar("Item")
PAGE = "report.html"
EMBEDDED_BYTES = 1_600_000
"""Pictures are put into the page up to this sum of their files' sizes (a third more as text); the rest are links."""
MATRIX_LABELS = 32
"""The most label names whose confusion is drawn as a matrix; of more, the largest confusions are a table."""
CONFUSIONS = 24
TIMELINES = 24
"""The most names whose confidence and area are drawn over time: those with the greatest area. All have a strip."""


def write_report(report: Report, folder: Path) -> Path:
    """Write a run's results.json, CSV files and report.html, and return the last one's path.

    folder: made where it is not there; pictures, video and bag of the report are looked for in it.
    Raises ReportError where a value is not finite or not plain, or a picture lies outside the folder, and RuntimeError
    where jinja2 or matplotlib is missing; the results are written by then.
    """
    write_results(report, folder)
    write_tables(report, folder)
    return write_page(report, folder)


def report_files(folder: Path, *, scored: bool, frames: bool) -> list[Path]:
    """The files of a report but for its pictures. scored: of something that has labels. frames: of a replay."""
    tables = (*(SCORE_TABLES if scored else ()), *((FRAMES,) if frames else ()))
    return [folder / name for name in (RESULTS, *tables, PAGE)]


def write_page(report: Report, folder: Path) -> Path:
    """Write report.html alone; see `write_report`."""
    shown = [*(item.pictures for item in report.sets), *(item.pictures for item in report.cameras)]
    media = Media(folder, [files_of(group) for group in interleaved(map(in_fair_order, shown))])
    text = (
        environment().get_template("report.html").render(report=report, media=media, changed=changed_settings(report))
    )
    return save_page(folder / PAGE, text)


def save_page(path: Path, text: str) -> Path:
    """Write a page; half a surrogate pair, which UTF-8 has no bytes for, becomes a question mark."""
    return write(path, text.encode("utf-8", "replace"))


class Media:
    """The files beside a page, as far as they are there: which pictures are put into it, which are linked."""

    def __init__(
        self, folder: Path, groups: Sequence[Sequence[str]], *, share: float = 1.0, copy_to: Path | None = None
    ) -> None:
        """groups: files that are shown together, each as often as it is shown. The first groups are put into the page,
        until this share of EMBEDDED_BYTES is reached. copy_to: the page's folder, where that is another: what is linked
        is copied there."""
        self.folder, self.copy_to = folder, copy_to
        self.embedded: set[str] = set()
        times = Counter(name for group in groups for name in group)
        left = share * EMBEDDED_BYTES
        for group in groups:
            new = {name for name in group if self.has(name)} - self.embedded
            size = sum(times[name] * self.file(name).stat().st_size for name in new)
            if size <= left:
                self.embedded |= new
                left -= size

    def file(self, name: str) -> Path:
        """Where a file of the report is. Raises ReportError where that is outside the report's folder."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise ReportError(
                f"{name} lies outside the report's folder {self.folder}; results.json was changed by hand"
            )
        return path

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return self.file(name).is_file()

    def link(self, name: str) -> str:
        """The file's path from the page."""
        if self.copy_to is None:
            return name
        target = Path("pictures", self.file(name).name)
        with writing(self.copy_to / target) as part:
            shutil.copyfile(self.file(name), part)
        return target.as_posix()

    @cache  # noqa: B019 - a page's pictures, as long as the page is written
    def uri(self, name: str) -> str | None:
        """A picture as a data URI; None for one that is only linked."""
        if name not in self.embedded:
            return None
        kind = "image/png" if name.endswith(".png") else "image/jpeg"
        return charts.data_uri(self.file(name).read_bytes(), kind)


def interleaved(lists: Iterable[Sequence[Item]]) -> list[Item]:
    """The first of every list, then the second of every list, and so on."""
    return [item for row in zip_longest(*lists) for item in row if item is not None]


def in_fair_order(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """Pictures of one image together, such that every variant's and rank's first comes before any one's second."""
    ranked: dict[tuple[str, str], list[Picture]] = {}
    for picture in pictures:
        ranked.setdefault((picture.variant, picture.rank), []).append(picture)
    groups: dict[tuple[str, str, str], list[Picture]] = {}
    for picture in interleaved(ranked.values()):
        groups.setdefault((picture.image_id, picture.image, picture.truth), []).append(picture)
    variants = list(dict.fromkeys(picture.variant for picture in pictures))
    return [sorted(group, key=lambda picture: variants.index(picture.variant)) for group in groups.values()]


def worst_first(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """Pictures of one image together, those on which any variant did worst before the others."""
    groups = in_fair_order(pictures)
    return sorted(groups, key=lambda group: all(picture.rank != "worst" for picture in group))


def files_of(group: Sequence[Picture]) -> list[str]:
    """The files that pictures of one image show: the image and its truth once, every overlay."""
    return [name for name in (group[0].image, group[0].truth, *(picture.overlay for picture in group)) if name]


def changed_settings(report: Report) -> list[tuple[str, Any, Any]]:
    """(name, value, the pair's own) of the settings that are not as the pair has them."""
    return [
        (name, value, report.defaults[name])
        for name, value in report.settings.items()
        if name in report.defaults and report.defaults[name] != value
    ]


def distinguishing(score: Score, scores: Sequence[Score], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a variant that variant: those of its settings that are not the run's, or not all the variants'."""
    return {
        name: value
        for name, value in score.settings.items()
        if name not in settings or settings[name] != value or any(other.settings.get(name) != value for other in scores)
    }


def matrix(score: Score) -> tuple[list[int], dict[int, dict[int, float]]] | None:
    """The confusion as shares of each true label's pixels: (label numbers, share by truth and prediction).

    None where there is none, or of more than MATRIX_LABELS names.
    """
    shares: dict[int, dict[int, float]] = {}
    numbers = sorted({number for truth, predicted, _ in score.confusion for number in (truth, predicted)})
    if not numbers or len(numbers) > MATRIX_LABELS:
        return None
    totals = _truth_pixels(score)
    for truth, predicted, pixels in score.confusion:
        shares.setdefault(truth, {})[predicted] = pixels / max(totals[truth], 1)
    return numbers, shares


def confusions(score: Score) -> list[tuple[int, int, int, float]]:
    """The confusions that cost the most pixels: (truth, prediction, pixels, share of the truth's pixels)."""
    totals = _truth_pixels(score)
    wrong = [
        (truth, predicted, pixels, pixels / totals[truth])
        for truth, predicted, pixels in score.confusion
        if truth != predicted and pixels
    ]
    return sorted(wrong, key=lambda item: (-item[2], item[:2]))[:CONFUSIONS]


def _truth_pixels(score: Score) -> dict[int, int]:
    totals: dict[int, int] = {}
    for truth, _, pixels in score.confusion:
        totals[truth] = totals.get(truth, 0) + pixels
    return totals


def class_rows(scores: Sequence[Score], labels: Sequence[str]) -> list[tuple[int, str, list[float | None]]]:
    """(label number or -1, name, IoU by variant) of every class, by the first variant's IoU, the best first.

    What the truth does not show comes last.
    """
    numbers = {name: number for number, name in enumerate(labels)}
    names = dict.fromkeys(name for score in scores for name in score.per_class)
    rows = [(numbers.get(name, -1), name, [score.per_class.get(name) for score in scores]) for name in names]
    return sorted(rows, key=lambda row: -1.0 if row[2][0] is None else row[2][0], reverse=True)


def parts(rows: Sequence[Any], least: int = 16, most: int = 4) -> list[Sequence[Any]]:
    """Rows in at most `most` equal parts of at least `least`, to stand side by side where the page is wide enough."""
    count = max(1, min(most, len(rows) // least))
    size = -(-len(rows) // count) if rows else 1
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def grouped_curves(curves: Sequence[Curve]) -> list[tuple[str, str, list[Curve]]]:
    """(title, x's name, lines) of every chart: curves of one title and x stand in one, six at most."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.title, curve.x_label), []).append(curve)
    size = len(charts.MARKERS)
    return [
        (title, x_label, lines[start : start + size])
        for (title, x_label), lines in groups.items()
        for start in range(0, len(lines), size)
    ]


def seen(name: Presence) -> float | None:
    """The share of frames in which a name has pixels; None without frames."""
    return sum(area > 0 for area in name.area) / len(name.area) if name.area else None


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def charted(camera: Camera) -> list[Presence]:
    """The names that are drawn over time, in their order."""
    largest = sorted(camera.names, key=lambda name: -sum(name.area))[:TIMELINES]
    return [name for name in camera.names if name in largest and any(name.area)]


def bars(histogram: Sequence[int]) -> list[float]:
    """A histogram's bars as shares of the tallest."""
    tallest = max(histogram, default=0)
    return [count / tallest if tallest else 0.0 for count in histogram]


def colour(label: int) -> str:
    """A label number's colour as the overlays have it, "#rrggbb"."""
    red, green, blue = palette()[label if BACKGROUND <= label <= UNLABELLED else UNLABELLED]
    return f"#{red:02x}{green:02x}{blue:02x}"


def percent(share: float | None, digits: int = 1) -> str:
    """0..1 in per cent without the sign; a dash for None."""
    return "–" if share is None else f"{100 * share:.{digits}f}"


def signed(share: float | None, digits: int = 1) -> str:
    """A difference of shares in per cent points, with its sign."""
    return "–" if share is None else f"{100 * share:+.{digits}f}".replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; a dash for None."""
    if value is None:
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", " ")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return np.format_float_positional(value, digits, unique=False, fractional=False, trim="-")  # never 1e-05


def signed_number(value: float) -> str:
    """A difference with its sign, three significant digits."""
    return ("+" if value > 0 else "−" if value < 0 else "±") + number(abs(value))


def said(value: Any) -> str:
    """A setting's value as a reader would type it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)


def plural(count: int, noun: str) -> str:
    """1 image, 2 images, 12 000 images."""
    return f"{number(count)} {noun}" + ("" if count == 1 else "s")


def shape(value: Any) -> str:
    """How a value of Report.extra is shown: "table", "mapping", "list" or "value"."""
    if isinstance(value, Mapping):
        return "mapping"
    if isinstance(value, tuple) and value:
        return "table" if all(isinstance(item, Mapping) for item in value) else "list"
    return "value"


def plain_values(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What of Report.extra is one value."""
    return {heading: value for heading, value in extra.items() if shape(value) == "value"}


def largest_change(classes: Sequence[tuple[int, str, float, float]]) -> float:
    """How far bars of change reach: the largest change of (label, name, before, after), 5 points at least."""
    return max(0.05, *(abs(after - before) for _, _, before, after in classes))


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of a table's rows, in the order in which they come."""
    return list(dict.fromkeys(key for row in rows for key in row))


def libraries_missing() -> RuntimeError:
    """What to raise where a page cannot be written."""
    return RuntimeError(
        'a report\'s page needs jinja2 and matplotlib; install them with pip install "nerve_ros[eval]". Results that '
        "are written already become a page by nerve report show"
    )


@cache
def environment() -> Environment:
    """The templates and what they call. Raises RuntimeError where jinja2 or matplotlib is missing."""
    try:
        import jinja2
        import matplotlib  # noqa: F401 - charts need it
    except ImportError as error:
        raise libraries_missing() from error
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "signed": signed, "number": number, "said": said, "colour": colour}
    made.filters["signed_number"] = signed_number
    made.globals |= {
        "charts": charts,
        "worst_first": worst_first,
        "files_of": files_of,
        "distinguishing": distinguishing,
        "matrix": matrix,
        "confusions": confusions,
        "class_rows": class_rows,
        "parts": parts,
        "grouped_curves": grouped_curves,
        "seen": seen,
        "mean": mean,
        "charted": charted,
        "bars": bars,
        "camera_labels": camera_labels,
        "label_name": label_name,
        "shape": shape,
        "columns": columns,
        "plain_values": plain_values,
        "largest_change": largest_change,
        "plural": plural,
        "zip": zip,
        "len": len,
    }
    return made
