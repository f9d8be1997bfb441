"""What carrying masks from image to image is worth at use, and what it costs.

`python -m nerve_benchmarks.carry BAG`, or `python -m benchmarks.carry BAG` in a clone's top folder;
tools/sample_bag.py makes a bag with labels. Every image is segmented; its result is taken to be ready `delay` images
later. At use: the newest mask that there is, against the newest image's own labels; what a mask leaves open (255)
counts as missed. The baseline, in the same run, is the newest result as it is. Times are of one OpenCV thread, beside
what the networks took for an image.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from rich.table import Table

from nerve_core.carry.carrier import Carrier, CarrySettings
from nerve_core.console import PlainConsole
from nerve_core.evaluation.metric import IGNORED, ConfusionMatrix

DELAYS = (1, 2, 4, 8)
SIZES = ((480, 640), (1080, 1920))
"""Rows and columns of the images for which the time is taken."""
LIMITS_MS = (8.0, 16.0)
"""What an image of each size may cost, see and mask together: a quarter and a half of a core at 30 images a second."""


class AtUse:
    """Masks against labels, where a mask may leave pixels open: they count as missed."""

    def __init__(self, names: int) -> None:
        self._open = names + 1
        self._matrix = ConfusionMatrix.of(names + 2)  # the last column is for what is left open
        self._known = ConfusionMatrix.of(names + 2)

    def add(self, truth: np.ndarray, labels: np.ndarray) -> None:
        """Count one image: uint8 [H, W] both; 255 is ignored in the truth, and open in the labels."""
        known = labels != IGNORED
        self._matrix.add(truth, np.where(known, labels, np.uint8(self._open)))
        self._known.add(np.where(known, truth, np.uint8(IGNORED)), np.where(known, labels, np.uint8(0)))

    def figures(self) -> dict[str, float]:
        """miou: over all pixels; miou_known: over those that are not open; coverage: their share."""
        counts = self._matrix.counts
        left_open = counts[:, self._open].sum() / max(1, counts.sum())
        return {
            "miou": self._matrix.mean_iou(),
            "coverage": float(1 - left_open),
            "miou_known": self._known.mean_iou(),
        }


def measure(bag: Path, topic: str, labels_topic: str, model: str, device: str, images: int | None) -> dict[str, Any]:
    """Segment the images of a bag once, and carry the masks at every delay."""
    from nerve_core.models.loading import quiet_libraries
    from nerve_core.replay.frames import Losses, Selection, Truth, label_names, read_frames
    from nerve_core.replay.reading import Bag
    from nerve_core.segmenter import Segmenter
    from nerve_core.text.vocabulary import Vocabulary

    quiet_libraries()
    cv2.setNumThreads(1)
    with Bag(bag) as opened:
        named = label_names(opened, None, labels_topic)
        vocabulary = Vocabulary([name for label, name in sorted(named.items()) if label])
        truth = Truth(bag, labels_topic, vocabulary)
        frames = list(read_frames(opened, Selection((topic,), limit=images), [Losses()], truth))
        truth.close()
    segmenter = Segmenter.from_pretrained(model, device=device)
    queries = segmenter.embed(vocabulary)
    segmenter.warm_up(frames[0].image.shape[:2])
    found, spent = [], []
    for frame in frames:
        begun = time.perf_counter()
        one = segmenter(frame.image, queries)
        spent.append(time.perf_counter() - begun)
        found.append((one.labels, one.confidence_u8))
    truths = [frame.truth for frame in frames if frame.truth is not None]
    if len(truths) < len(frames):
        raise ValueError(
            f"{labels_topic} has labels for {len(truths)} of {len(frames)} images; every image needs its own"
        )
    names = len(vocabulary.names)
    at_once = AtUse(names)
    for labels, mask in zip(truths, found, strict=True):
        at_once.add(labels, mask[0])
    rows = [
        {"delay": delay}
        | {
            f"{kind}_{key}": value
            for kind, row in at_use(frames, found, names, delay).items()
            for key, value in row.items()
        }
        for delay in DELAYS
    ]
    keyframe_ms = float(np.median(spent) * 1e3)
    return {
        "images": len(frames),
        "model": segmenter.description,
        "load": os.getloadavg()[0],
        "miou_at_once": at_once.figures()["miou"],
        "delays": rows,
        "keyframe_ms": keyframe_ms,
        "costs": [
            cost([frame.image for frame in frames[:60]], size, limit, keyframe_ms)
            for size, limit in zip(SIZES, LIMITS_MS, strict=True)
        ],
    }


def at_use(
    frames: Sequence[Any], found: Sequence[tuple[np.ndarray, np.ndarray]], names: int, delay: int
) -> dict[str, dict[str, float]]:
    """The masks that are there when each image comes, carried and as they are: their `AtUse.figures`."""
    carrier, carried, as_is = Carrier(CarrySettings(limit=1e3)), AtUse(names), AtUse(names)
    for number, frame in enumerate(frames):
        carrier.see(frame.image, frame.stamp)
        if number < delay:
            continue
        labels, confidence = found[number - delay]
        carrier.keyframe(frames[number - delay].stamp, labels, confidence)
        carried.add(frame.truth, carrier.mask().labels)
        as_is.add(frame.truth, labels)
    return {"carried": carried.figures(), "as_is": as_is.figures()}


def cost(images: Sequence[np.ndarray], size: tuple[int, int], limit: float, keyframe_ms: float) -> dict[str, Any]:
    """Ms of the processor's time that an image takes, and a result that comes 4 images late; of images scaled to
    `size`."""
    carrier, labels = Carrier(), np.zeros(size, np.uint8)
    each, results = [], []
    for number, image in enumerate(images):
        scaled = cv2.resize(image, size[::-1])
        begun = time.thread_time()
        carrier.see(scaled, number * 33_000_000)
        seen = time.thread_time()
        if number % 4 == 0 and number >= 4:
            carrier.keyframe((number - 4) * 33_000_000, labels, labels)
        taken = time.thread_time()
        carrier.mask()
        if number >= 8:
            each.append(seen - begun + time.thread_time() - taken)
            if number % 4 == 0:
                results.append(taken - seen)
    p50 = float(np.percentile(each, 50) * 1e3)
    return {
        "size": list(size[::-1]),
        "image_ms_p50": p50,
        "image_ms_p95": float(np.percentile(each, 95) * 1e3),
        "result_ms_p50": float(np.percentile(results, 50) * 1e3),
        "limit_ms": limit,
        "share_of_keyframe": p50 / keyframe_ms,
        "memory_mb": carrier.nbytes / 1e6,
    }


def show(found: dict[str, Any], console: PlainConsole) -> None:
    """Print what `measure` found."""
    table = Table(
        title=f"{found['images']} images, {found['model']}; every image at once: {found['miou_at_once']:.3f}",
        title_justify="left",
    )
    for column in ("ready after", "as it is", "carried", "ratio", "coverage", "where known"):
        table.add_column(column, justify="right")
    for row in found["delays"]:
        table.add_row(
            f"{row['delay']} images",
            f"{row['as_is_miou']:.3f}",
            f"{row['carried_miou']:.3f}",
            f"{row['carried_miou'] / row['as_is_miou']:.1f}",
            f"{row['carried_coverage']:.2f}",
            f"{row['carried_miou_known']:.3f}",
        )
    console.print(table)
    for row in found["costs"]:
        console.print(
            f"{row['size'][0]} x {row['size'][1]}: {row['image_ms_p50']:.1f} ms an image (p95 "
            f"{row['image_ms_p95']:.1f}, at most {row['limit_ms']:.0f}), {row['share_of_keyframe']:.1%} of the "
            f"{found['keyframe_ms']:.0f} ms of a keyframe; a result {row['result_ms_p50']:.1f} ms; "
            f"{row['memory_mb']:.0f} MB",
        )


def main(
    bag: Annotated[Path, typer.Argument(help="A recording with labels.")] = Path("build/sample_bag"),
    topic: Annotated[str, typer.Option(help="Its images.")] = "/camera/image/compressed",
    labels_topic: Annotated[str, typer.Option(help="The labels of every image.")] = "/camera/labels/compressed",
    model: Annotated[str, typer.Option(help="A model pair's name, or its folder.")] = "embedded",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    images: Annotated[int | None, typer.Option(min=20, help="How many of them; by default all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Measure it, and end with 1 where an image costs more than it may."""
    found = measure(bag, topic, labels_topic, model, device, images)
    show(found, PlainConsole(stderr=True))
    if as_json:
        print(json.dumps(found))
    raise typer.Exit(0 if all(row["image_ms_p50"] <= row["limit_ms"] for row in found["costs"]) else 1)


if __name__ == "__main__":
    typer.run(main)
