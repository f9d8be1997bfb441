"""Draws the node's answers over their images, as a video and a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

from nerve_core.images.visualize import contact_sheet, overlay
from nerve_core.output import marked, write, writing
from nerve_core.replay.video import opens
from nerve_ros.demo.recording import Recording
from nerve_ros.demo.report import Asked, Segmented

SHEET_PICTURES = 12
SHEET_COLUMNS = 3
SHEET_WIDTH = 640
"""Of one picture, in pixels."""

_BAR = 32  # rows of the bar below a picture
_FONT = cv2.FONT_HERSHEY_DUPLEX

Progress = Callable[[Iterable], Iterable]


def write_video(
    path: Path,
    recording: Recording,
    asked: Sequence[Asked],
    segmented: Sequence[Segmented],
    *,
    progress: Progress = iter,
) -> None:
    """Write an MP4 in the recording's own time: each segmented image stays until the next one that was segmented.

    Raises RuntimeError where OpenCV cannot write it.
    """
    with writing(path) as part:
        _write_video(part, recording, asked, segmented, progress)


def _write_video(
    path: Path, recording: Recording, asked: Sequence[Asked], segmented: Sequence[Segmented], progress: Progress
) -> None:
    first = draw(recording, asked, segmented[0])
    size = first.shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 1 / recording.interval, size)
    if not writer.isOpened():
        raise RuntimeError(f"OpenCV {cv2.__version__} cannot write the video {path}: its mp4v codec is missing")
    try:
        ends = [seen.published.index for seen in segmented[1:]] + [len(recording.frames)]
        for seen, end in progress(list(zip(segmented, ends, strict=True))):
            picture = draw(recording, asked, seen)[..., ::-1]
            for _ in range(end - seen.published.index):
                writer.write(picture)
    finally:
        writer.release()
    if not opens(path):
        raise RuntimeError(f"the video {path} was written, but OpenCV {cv2.__version__} cannot read it back")


def write_contact_sheet(
    path: Path, recording: Recording, asked: Sequence[Asked], segmented: Sequence[Segmented]
) -> None:
    """Write a PNG of up to twelve segmented images, equally far apart in time."""
    times = np.array([seen.published.index for seen in segmented])
    wanted = (np.arange(SHEET_PICTURES) + 0.5) * len(recording.frames) / SHEET_PICTURES
    chosen = sorted({int(np.abs(times - moment).argmin()) for moment in wanted})
    pictures = [draw(recording, asked, segmented[number]) for number in chosen]
    sheet = contact_sheet(pictures, SHEET_COLUMNS, SHEET_WIDTH)
    write(path, marked(cv2.imencode(".png", sheet[..., ::-1])[1].tobytes()))


def draw(recording: Recording, asked: Sequence[Asked], seen: Segmented) -> np.ndarray:
    """An image with its mask and, in a bar below, what was asked for: uint8 [height + 32, width, 3], RGB.

    A class has the colour of its id, which it keeps while the node lives.
    """
    image = np.ascontiguousarray(recording.image(seen.published.index)[..., ::-1])
    names = [""] * max(seen.classes, default=0)
    for number, name in seen.classes.items():
        names[number - 1] = name
    picture = overlay(image, seen.answer.labels, names)
    return np.vstack([picture, _bar(picture.shape[1], recording, asked, seen)])


def _bar(width: int, recording: Recording, asked: Sequence[Asked], seen: Segmented) -> np.ndarray:
    bar = np.full((_BAR, width, 3), 24, np.uint8)
    seconds = (recording.frames[seen.published.index].stamp - recording.frames[0].stamp) * 1e-9
    clock = f"{seconds:.1f} s"
    names = asked[seen.vocabulary].names
    everything = {name.casefold() for name in recording.names} <= {name.casefold() for name in names}
    text = f"asked for: all {len(names)} names" if everything else f"asked for: {', '.join(names)}"
    text = text.encode("ascii", "replace").decode()
    free = width - _text_width(clock) - 36
    while _text_width(text) > free:
        text = text[:-4].rstrip(", ") + "..." if text.endswith("...") else text[:-1].rstrip(", ") + "..."
    for written, left in ((text, 12), (clock, width - _text_width(clock) - 12)):
        cv2.putText(bar, written, (left, 21), _FONT, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    return bar


def _text_width(text: str) -> int:
    return cv2.getTextSize(text, _FONT, 0.5, 1)[0][0]
