"""The figures of a run as plain values: the schema of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("evaluation", "tune", "replay")


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down: JSON has one kind of sequence, and what is read has to equal what was
    written."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Score:
    """How well one variant did on one set.

    variant: its name. settings: what makes it that variant. miou, pixel_accuracy: 0..1, None without pixels. interval:
    the 95 % bootstrap interval of miou over images. per_class: IoU by label name, None for a label that the truth does
    not show. confusion: (truth, prediction, pixels) of every pair of label numbers that occurs. seconds: spent
    segmenting. images: how many were counted. per_image: the mIoU of each image alone by its id, None without pixels;
    only needed to compare two runs image by image.
    """

    variant: str
    settings: dict[str, Any]
    images: int
    seconds: float
    miou: float | None
    interval: tuple[float, float] | None
    pixel_accuracy: float | None
    per_class: dict[str, float | None]
    confusion: tuple[tuple[int, int, int], ...] = ()
    per_image: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", _frozen(self.settings))


@dataclass(frozen=True)
class Published:
    """A figure that others have published, in per cent as they print it; never one of ours. source: where it stands."""

    method: str
    miou: float
    source: str


@dataclass(frozen=True)
class Picture:
    """One image to look at; the files are PNG or JPEG, by their paths from the report's folder.

    rank: "worst", "best" or "sample". miou: of this image alone, None without pixels. truth: "" where there is none.
    """

    image_id: str
    variant: str
    rank: str
    miou: float | None
    image: str
    overlay: str
    truth: str = ""
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class SetScores:
    """All variants on one set. labels: the names of the label numbers, "background" first. images: in the whole set,
    of which a run may take fewer. notes: what was found in its folder, for a reader to know."""

    name: str
    title: str
    root: str
    images: int
    labels: tuple[str, ...]
    scores: tuple[Score, ...]
    published: tuple[Published, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """One line of an ablation: y (mIoU, 0..1) over x, with its interval at every point, on one set."""

    title: str
    set_name: str
    x_label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    interval: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Presence:
    """One name over a recording: presence 0..1, mean confidence 0..1 (None where the name has no pixel) and share of
    the image 0..1, one value a frame; histogram: pixels of the name by confidence, 32 equal bins over 0..1."""

    name: str
    label: int
    presence: tuple[float, ...]
    confidence: tuple[float | None, ...]
    area: tuple[float, ...]
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Camera:
    """What was seen of one image topic.

    frames: segmented. lost: reason -> images that could not be read. times: seconds since the recording's first image,
    one a frame. flicker_static: label changes per pixel and second where the image itself stands still, None where it
    never does. flicker_warped: the same of all pixels after following the optical flow. static_share: share of pixels
    that stood still. score: against the labels of the recording, None without. video, bag: paths from the report's
    folder, "" without.
    """

    topic: str
    size: tuple[int, int]
    frames: int
    lost: dict[str, int]
    times: tuple[float, ...]
    names: tuple[Presence, ...]
    flicker_static: float | None
    flicker_warped: float | None
    static_share: float | None
    frames_per_second: float
    stage_ms: dict[str, float]
    score: Score | None = None
    pictures: tuple[Picture, ...] = ()
    video: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Live:
    """What a robot would have seen of a running node.

    Ages and jitter in ms, from an image's publishing to its mask's arrival; jitter is the standard deviation of the
    time between masks. cpu: cores used by the node, in the mean. memory_mb: resident, at its greatest. equal: masks
    equal to those computed offline; different: (frame, share of pixels) of those that are not.
    """

    topic: str
    rate: float
    published: int
    masks: int
    dropped: int
    age_p50_ms: float | None
    age_p95_ms: float | None
    age_p99_ms: float | None
    jitter_ms: float | None
    cpu: float | None
    memory_mb: float | None
    compared: int
    equal: int
    different: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Report:
    """A run: kind is "evaluation", "tune" or "replay".

    command: as it was typed. versions: of what it ran on. device, model: in words. settings: every parameter of the
    model pair by its name; defaults: the same as the pair has them, {} where unknown. created: ISO 8601 with its zone.
    source: what was replayed; bag: what was written, by its path from the report's folder, "" without. notes: what a
    reader has to know first (what was lost, what is untuned, what was cut short). extra: tables (tuples of mappings
    with the same keys), mappings and values by their headings, shown as they are.
    Raises ValueError for another kind.
    """

    kind: str
    title: str
    command: str
    created: str
    device: str
    model: str
    versions: dict[str, str]
    settings: dict[str, Any]
    sets: tuple[SetScores, ...] = ()
    curves: tuple[Curve, ...] = ()
    source: str = ""
    bag: str = ""
    cameras: tuple[Camera, ...] = ()
    live: tuple[Live, ...] = ()
    notes: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a report of kind {self.kind!r} is unknown; kinds are {', '.join(KINDS)}")
        for name in ("settings", "extra", "defaults"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
