"""Series of numbers -> small charts, as SVG whose colours are the page's own, and strips of pixels.

No text from a user gets in here: names, titles and legends are the page's, which knows every alphabet and escapes them.
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from .data import Camera, Curve, Presence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP"
SIGNS = "●■◆▲▼✚"
"""A line's marker, so that lines differ for whoever does not see their colours, and the same as text for a legend."""

COLUMNS = 800  # of a strip or a timeline: more are not seen on a screen
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#010101",
    "xtick.color": "#010101",
    "ytick.color": "#010101",
    "xtick.labelcolor": "#010102",
    "ytick.labelcolor": "#010102",
    "axes.grid": True,
    "grid.color": "#010101",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
}
# Colours nothing is drawn in: they stand for the page's, which are others in the dark.
_PAGE_COLOURS = {"#010101": "var(--line)", "#010102": "var(--soft)"} | {
    f"#0102{index:02x}": f"var(--c{index})" for index in range(len(MARKERS))
}


def curves(lines: Sequence[Curve]) -> str:
    """Lines of an ablation with their intervals, as SVG; y in per cent. Line i has colour and marker i."""
    with _styled():
        figure = _figure(5.2, 2.9)
        axes = figure.add_subplot()
        for index, line in enumerate(lines):
            colour = f"#0102{index % len(MARKERS):02x}"
            y = 100 * np.array(line.y, float)
            if line.interval:
                low, high = 100 * np.array(line.interval, float).T
                axes.fill_between(line.x, low, high, color=colour, alpha=0.16, linewidth=0)
                axes.vlines(line.x, low, high, color=colour, linewidth=0.9)
            axes.plot(line.x, y, color=colour, marker=MARKERS[index % len(MARKERS)], markersize=4.5, linewidth=1.5)
        ticks = sorted({x for line in lines for x in line.x})
        if 0 < len(ticks) <= 12:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        return _svg(figure)


def timeline(camera: Camera, name: Presence, colour: str) -> str:
    """Presence and confidence (above) and area (below) of one name over the recording, in per cent, as SVG.

    colour: of the name, "#rrggbb".
    """
    times, first = binned_times(camera.times), _bins(camera.times)
    with _styled():
        figure = _figure(4.2, 2.1)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        presence, confidence, area = (
            100 * _binned(values, first, len(times)) for values in (name.presence, name.confidence, name.area)
        )
        above.plot(times, presence, color="#010102", linewidth=0.9)
        above.plot(times, confidence, color="#010200", linewidth=1.3)
        above.set_ylim(-3, 103)
        above.set_yticks([0, 50, 100])
        below.fill_between(times, np.nan_to_num(area), color=colour, linewidth=0)
        below.set_ylim(0, max(1.0, float(np.nanmax(area, initial=0)) * 1.1))
        span = camera.times[-1] - camera.times[0]
        steps = [1, 2, 3, 6, 10] if span > 60 else [1, 2, 5, 10]  # minutes and seconds do not go by tens
        below.xaxis.get_major_locator().set_params(nbins=6, steps=steps)
        below.xaxis.set_major_formatter(lambda value, _: clock(value, span))
        below.yaxis.get_major_locator().set_params(nbins=3)
        return _svg(figure)


def strip(camera: Camera, name: Presence, colour: str) -> str:
    """Presence over time as a picture one pixel high, as a data URI: the name's colour, the more solid the more there.

    A column is the greatest presence of its frames, so that a short sight is not lost; one without frames is clear.
    """
    columns = len(binned_times(camera.times))
    presence = _binned(name.presence, _bins(camera.times), columns, np.fmax)
    picture = np.zeros((1, columns, 4), np.uint8)
    picture[:, :, :3] = [int(colour[place : place + 2], 16) for place in (5, 3, 1)]  # OpenCV: BGR
    picture[:, :, 3] = np.round(255 * np.clip(np.nan_to_num(presence), 0, 1))
    return data_uri(cv2.imencode(".png", picture)[1].tobytes(), "image/png")


def gaps(camera: Camera) -> tuple[tuple[float, float], ...]:
    """Where there are no frames for over a second and over five times the usual: (from, to) as shares of the time."""
    times = np.array(camera.times, float)
    steps = np.diff(times)
    if not len(steps) or times[-1] <= times[0]:
        return ()
    wide = np.flatnonzero(steps > max(1.0, 5 * float(np.median(steps))))
    span = times[-1] - times[0]
    return tuple((float((times[i] - times[0]) / span), float((times[i + 1] - times[0]) / span)) for i in wide)


def binned_times(times: Sequence[float]) -> np.ndarray:
    """The middles of the columns that a recording is drawn in, s; float64 [columns]."""
    if not times:
        return np.zeros(0)
    count = min(COLUMNS, len(times))
    low, high = min(times), max(times)
    return low + (np.arange(count) + 0.5) / count * (high - low)


def _bins(times: Sequence[float]) -> np.ndarray:
    """The column of each frame, int64 [frames]."""
    if not times:
        return np.zeros(0, np.int64)
    values = np.array(times, float)
    span = max(float(values.max() - values.min()), 1e-9)
    count = min(COLUMNS, len(times))
    return np.clip(((values - values.min()) / span * count).astype(np.int64), 0, count - 1)


def _binned(
    values: Sequence[float | None], column: np.ndarray, columns: int, join: np.ufunc | None = None
) -> np.ndarray:
    """Values by column, float64 [columns]: their mean, or joined by `join`; NaN where a column has no value.

    A column that gets no frame because frames come unevenly has the value of the one before it, where that is at most
    two columns away.
    """
    numbers = np.array([np.nan if value is None else value for value in values], float)
    there = ~np.isnan(numbers)
    frames = np.bincount(column, minlength=columns)
    if join is None:
        total = np.bincount(column[there], numbers[there], minlength=columns)
        count = np.bincount(column[there], minlength=columns)
        result = np.divide(total, count, out=np.full(columns, np.nan), where=count > 0)
    else:
        result = np.full(columns, np.nan)
        join.at(result, column, numbers)
    for _ in range(2):
        empty = np.flatnonzero((frames == 0)[1:]) + 1
        result[empty] = np.where(np.isnan(result[empty]), result[empty - 1], result[empty])
    return result


def clock(seconds: float, span: float = 0.0) -> str:
    """Seconds as a reader says them: 7.5 s, 1:05, 1:02:03; on an axis over a minute long all with minutes."""
    if max(abs(seconds), span) < 60:
        return f"{seconds:.1f} s" if seconds % 1 >= 0.05 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as what an image's address may be."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@contextlib.contextmanager
def _styled() -> Iterator[None]:
    """matplotlib as it comes, with our style, whatever a user has set; as it was afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(matplotlib.RcParams(_STYLE))
        yield


def _figure(width: float, height: float) -> Figure:
    """Inches, of 72 to the SVG's units. A figure of its own: pyplot would keep it, and is not for threads."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> str:
    """The figure as an SVG element for a page."""
    import matplotlib

    # One salt: equal definitions get equal ids, in every run, so that two of the same id are the same.
    matplotlib.rcParams["svg.hashsalt"] = "nerve"
    file = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(?:figure|axes|patch|text|line2d|matplotlib|xtick|ytick|FillBetween|Line)[^"]*"', "", text)
    text = re.sub(r" font-family: [^;\"]*;?", "", text)  # the page's
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    text = re.sub(r"#01010[12]|#01020[0-5]", lambda found: _PAGE_COLOURS[found[0]], text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)  # as wide as the page lets it be
    return re.sub(r"\n\s*", "\n", text)
