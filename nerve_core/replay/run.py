"""The offline replay from start to end: a bag -> masks -> a bag of masks, videos and a report."""

from __future__ import annotations

import dataclasses
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np

from ..evaluation.runner import versions
from ..models.pairs import find_pair
from ..output import claim, claim_folder, placing
from ..report.data import Camera, Live, Picture, Report
from ..report.page import report_files
from ..report.pictures import save_picture
from ..segmenter import Segmentation, Segmenter
from ..settings import Settings
from ..text.vocabulary import Vocabulary
from .frames import Frame, Losses, Selection, Truth, camera_names, read_frames
from .measures import MAX_GAP, NEIGHBOURHOOD, SIDE, STATIC_DIFFERENCE, Measures
from .reading import Bag, BagError
from .threads import Ahead, Behind
from .video import OverlayVideo
from .writing import ResultBag

VARIANT = "nerve"
BAG = "bag"
PICTURES = 6
"""Pictures of each camera in the report, equally far apart."""
FLICKER = (
    f"Flicker is measured on images of at most {SIDE} pixels a side, between frames at most {MAX_GAP:g} s apart; a "
    f"pixel stands still where nothing within {NEIGHBOURHOOD // 2} pixels differs by more than {STATIC_DIFFERENCE} of "
    "255 grey levels. These limits are the project's own."
)
NO_INTERVAL = "The mIoU has no interval: one image of a recording says nearly the same as the next."
"""What a camera's section says."""

Seen = Callable[[Frame, Segmentation], None]


@dataclass(frozen=True)
class Replayed:
    """A replay that has ended: its report, not yet written, and whether it was interrupted.

    inference_seconds: spent in the segmenter; wall_seconds: from the first frame wanted to the last file closed.
    """

    report: Report
    interrupted: bool
    frames: int
    inference_seconds: float
    wall_seconds: float


class _Pictures:
    """A few of a camera's frames, equally far apart however many there will be."""

    def __init__(self) -> None:
        self._stride, self._count = 1, 0
        self._kept: list[tuple[Frame, Segmentation]] = []

    def take(self, frame: Frame, found: Segmentation) -> None:
        if self._count % self._stride == 0:
            self._kept.append((frame, found))
            if len(self._kept) == 2 * PICTURES:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._count += 1

    def save(self, folder: Path, prefix: str, first: int) -> tuple[Picture, ...]:
        places = np.linspace(0, len(self._kept) - 1, min(PICTURES, len(self._kept)))
        return tuple(
            save_picture(
                folder,
                frame.image,
                found.labels,
                found.names,
                image_id=f"{prefix} {(frame.moment - first) * 1e-9:.2f} s",
                variant=VARIANT,
                rank="sample",
                miou=None,
                truth=frame.truth,
            )
            for frame, found in (self._kept[round(place)] for place in places)
        )


def replay(
    path: Path,
    selection: Selection,
    segmenter: Segmenter,
    vocabulary: Vocabulary,
    out: Path,
    *,
    labels_topic: str | None = None,
    label_info_topic: str | None = None,
    bag: bool = True,
    video: bool = True,
    pair: str | None = None,
    seen: Seen | None = None,
) -> Replayed:
    """Segment every image of `selection` in the bag at `path`, and write what came of it into the folder `out`.

    bag, video: whether out/bag and out/<camera>.webm are written. labels_topic: of the truth of the only camera;
    label_info_topic: where its names are, where that cannot be guessed. pair: what the segmenter was loaded by, for
    the report to mark which settings are not the pair's own. seen: called with each frame and its segmentation, on
    this thread.
    Decoding, writing and measuring overlap the segmentation. An interrupt (Ctrl-C) ends the replay in order: what is
    done until then is in the bag, the video and the report.
    Raises ValueError (BagError and others) for what cannot be replayed, OSError and RuntimeError where something cannot
    be written.
    """
    if not vocabulary.names:
        raise ValueError("there is no name to look for" + "".join(f": {remark}" for remark in vocabulary.remarks))
    if len(selection.topics) > 1 and segmenter.settings.walk.previous_frame_start:
        raise ValueError("previous_frame_start takes one camera at a time: each image would start from another's")
    if labels_topic is not None and len(selection.topics) > 1:
        raise ValueError("labels are of one camera: give one image topic with them")
    cv2.setNumThreads(1)  # OpenCV's own threads would compete with the segmentation's
    queries = segmenter.embed(vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    cameras = camera_names(selection.topics)
    losses = [Losses() for _ in cameras]
    measures = [Measures(vocabulary.names) for _ in cameras]
    pictures = [_Pictures() for _ in cameras]
    files = [_video_name(name) if video else "" for name in cameras]
    inference = 0.0
    spent = [0.0 for _ in cameras]
    interrupted = False

    with ExitStack() as stack:
        source = stack.enter_context(Bag(path))
        truth = None
        if labels_topic is not None:
            truth = Truth(path, labels_topic, vocabulary, label_info_topic)
            stack.callback(truth.close)
        written = None
        if bag:
            threshold = segmenter.settings.readout.threshold
            written = ResultBag(
                stack.enter_context(placing(out / BAG, always=True)), selection.topics, vocabulary.names, threshold
            )
        videos = [OverlayVideo(stack.enter_context(placing(out / name))) for name in files if name]

        def measure(frame: Frame, found: Segmentation) -> None:
            measures[frame.camera].take(frame, found)
            pictures[frame.camera].take(frame, found)

        behind = [Behind(measure)]
        if videos:
            behind.append(Behind(lambda frame, found: videos[frame.camera].take(frame, found)))
        if written is not None:
            behind.append(Behind(written.take))
        started = time.perf_counter()
        images = read_frames(source, selection, losses, truth)
        frames = Ahead(images)
        try:
            try:
                for frame in frames:
                    begun = time.perf_counter()
                    found = segmenter(frame.image, queries)
                    passed = time.perf_counter() - begun
                    inference += passed
                    spent[frame.camera] += passed
                    for each in behind:
                        each.put(frame, found)
                    if seen is not None:
                        seen(frame, found)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                frames.close()
                images.close()
                _close_all([each.close for each in behind])
        finally:
            if written is not None:
                written.close()
        files = [name if name and videos[number].close() else "" for number, name in enumerate(files)]
        wall = time.perf_counter() - started
        notes = (*source.notes, *(truth.notes if truth else ()))
        if truth is not None:
            losses[0].reasons.update(truth.losses.reasons)

    total = sum(len(one.times) for one in measures)
    if not total and not interrupted:
        why = "; ".join([*notes, *(f"{count} x {reason}" for one in losses for reason, count in one.reasons.items())])
        raise BagError(
            f"no image of {', '.join(selection.topics)} in {path} could be segmented: {why or 'none is there'}"
        )
    reported = []
    for number, topic in enumerate(selection.topics):
        one = measures[number]
        rate = len(one.times) / wall if wall else 0.0
        reported.append(
            Camera(
                topic=topic,
                size=one.size,
                frames=len(one.times),
                lost=dict(losses[number].reasons),
                times=tuple(one.times),
                names=one.names(),
                flicker_static=one.steadiness.static,
                flicker_warped=one.steadiness.warped,
                static_share=one.steadiness.static_share,
                frames_per_second=rate,
                stage_ms=one.mean_stage_ms() if one.times else {},
                score=one.score(VARIANT, spent[number]),
                pictures=pictures[number].save(out, _file_name(cameras[number]), one.first) if one.times else (),
                video=files[number],
                notes=(FLICKER, *((NO_INTERVAL,) if truth is not None else ())),
            )
        )
    report = Report(
        kind="replay",
        title=f"Replay of {path.name}",
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        device=device_name(segmenter),
        model=segmenter.description,
        versions=versions() | {"opencv": cv2.__version__, "rosbags": version("rosbags")},
        settings=segmenter.settings.flat(),
        defaults={} if pair is None else Settings.of_pair(find_pair(pair)).flat(),
        source=str(path),
        bag=BAG if bag else "",
        cameras=tuple(reported),
        notes=(
            *notes,
            *_encodings_note(selection, measures),
            *_notes(interrupted, total, vocabulary),
            *(doubt.text for doubt in segmenter.doubts(vocabulary)),
        ),
        extra={
            "Asked for": list(vocabulary.entries),
            "Where the time went": {
                "seconds in all": round(wall, 2),
                "seconds of segmenting": round(inference, 2),
                "share of segmenting": round(inference / wall, 3) if wall else None,
            },
        },
    )
    return Replayed(report, interrupted, total, inference, wall)


def claim_results(
    out: Path, topics: Sequence[str], *, bag: bool, video: bool, scored: bool, log: str = "", overwrite: bool = False
) -> None:
    """Make sure, before a replay, that what it writes into the folder `out` may be written there.

    bag, video, scored: whether there will be a bag, videos, scores. log: the name of a log. Raises OutputError.
    """
    videos = [out / _video_name(name) for name in camera_names(topics)] if video else []
    logs = [out / log] if log else []
    claim([*report_files(out, scored=scored, frames=True), *videos, *logs], overwrite)
    if bag:
        claim_folder(out / BAG, overwrite)


def with_live(replayed: Replayed, live: tuple[Live, ...]) -> Replayed:
    """`replayed` with what was seen of a running node."""
    return dataclasses.replace(replayed, report=dataclasses.replace(replayed.report, live=live))


def _close_all(closings: list[Callable[[], None]]) -> None:
    """Call every one, whatever the others raise; then raise the first that was raised."""
    errors = []
    for close in closings:
        try:
            close()
        except Exception as error:
            errors.append(error)
    if errors and sys.exc_info()[1] is None:
        raise errors[0]


def _notes(interrupted: bool, total: int, vocabulary: Vocabulary) -> tuple[str, ...]:
    notes = (
        [f"interrupted after {total} images: what follows in the recording was not looked at"] if interrupted else []
    )
    return (*notes, *vocabulary.remarks)


def _encodings_note(selection: Selection, measures: list[Measures]) -> tuple[str, ...]:
    """A sentence for each camera whose images came in several encodings or sizes."""
    return tuple(
        f"{topic} changes on the way: "
        + ", ".join(
            f"{count} images {how}, {columns} x {rows}" for (how, columns, rows), count in one.encodings.items()
        )
        for topic, one in zip(selection.topics, measures, strict=True)
        if len(one.encodings) > 1
    )


def _video_name(camera: str) -> str:
    return f"{_file_name(camera)}.webm"


def _file_name(camera: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", camera).strip("_") or "camera"


def device_name(segmenter: Segmenter) -> str:
    """The device in words."""
    import torch

    if segmenter.device.type == "cuda":
        return torch.cuda.get_device_name(segmenter.device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
