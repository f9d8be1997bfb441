"""Small labelled sets on disk, in every layout of the protocol, from drawn scenes or from arrays of one's own.

    write_folder(root, scenes)                     any names, PNG images: what `nerve eval folder` reads
    write_voc(root, scenes)                        VOC2012: palette, ignored contours
    write_context(root, scenes, order="voc-first") Pascal Context in either encoding
    write_coco(root, scenes, files="own")          train ids, COCO-Stuff's own ids, or things alone
    write_ade(root, scenes)                        ADE20K

`scenes` are `nerve_core.embedded.scenes.Scene` or anything with `image` uint8 [H, W, 3], `labels` and `stuff` uint8
[H, W]; a kind that a set does not know becomes what the set has for everything else. Each returns `root`. What stands
behind them is `write_files`, for raw label values of one's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from nerve_core.embedded.scenes import NAMES, STUFF, Scene

Pair = tuple[np.ndarray, np.ndarray]
"""uint8 [H, W, 3] RGB and the raw values of its label file, uint8 [H, W]."""

VOC = {"bottle": 5, "chair": 9, "person": 15, "plant": 16}
CONTEXT = {
    "alphabetical": {
        "bottle": 10, "chair": 17, "door": 24, "mug": 21, "person": 37, "plant": 40,
        "wall": 56, "brick wall": 56, "tiles": 26, "floor": 26, "carpet": 26, "sky": 47, "fence": 25, "grass": 29,
        "gravel": 30, "road": 41,
    },
    "voc-first": {
        "bottle": 5, "chair": 9, "door": 31, "mug": 30, "person": 15, "plant": 16,
        "wall": 56, "brick wall": 56, "tiles": 33, "floor": 33, "carpet": 33, "sky": 50, "fence": 32, "grass": 36,
        "gravel": 37, "road": 46,
    },
}  # fmt: skip
COCO = {  # COCO-Stuff's own ids
    "ball": 36, "bottle": 43, "chair": 61, "door": 111, "mug": 46, "person": 0, "plant": 63,
    "wall": 172, "brick wall": 170, "tiles": 116, "floor": 117, "carpet": 100, "sky": 156, "fence": 112, "grass": 123,
    "gravel": 124, "road": 148,
}  # fmt: skip
ADE = {
    "bottle": 99, "chair": 20, "door": 15, "person": 13, "plant": 18, "ball": 120,
    "wall": 1, "brick wall": 1, "tiles": 4, "floor": 4, "carpet": 29, "sky": 3, "fence": 33, "grass": 10, "gravel": 14,
    "road": 7,
}  # fmt: skip


def raw_of(scene: Scene, ids: Mapping[str, int], other: int) -> np.ndarray:
    """A scene's objects over its stuff as raw values, uint8 [H, W]; `other` for what `ids` does not have."""
    stuff = np.array([other, *(ids.get(name, other) for name in STUFF)], np.uint8)[scene.stuff]
    objects = np.array([other, *(ids.get(name, other) for name in NAMES)], np.uint8)[scene.labels]
    return np.where(scene.labels > 0, objects, stuff)


def with_contours(raw: np.ndarray) -> np.ndarray:
    """255 on every pixel whose neighbourhood shows more than one value, as VOC draws a border around its objects."""
    kernel = np.ones((3, 3), np.uint8)
    return np.where(cv2.dilate(raw, kernel) == cv2.erode(raw, kernel), raw, np.uint8(255))


def write_files(
    root: Path,
    pairs: Iterable[Pair],
    *,
    images: str,
    labels: str,
    split: str = "",
    ids: Sequence[str] = (),
    palette: bool = False,
) -> Path:
    """Write pairs under the patterns `images` and `labels` ("JPEGImages/{}.jpg"), and the ids to `split`, if any.

    ids: by default 2008_000000, 2008_000001, ... palette: label files are indices into VOC's colours, else grey.
    """
    written = []
    for k, (image, raw) in enumerate(pairs):
        written.append(ids[k] if ids else f"2008_{k:06d}")
        for pattern, picture in ((images, Image.fromarray(image)), (labels, Image.fromarray(raw))):
            path = root / pattern.format(written[-1])
            path.parent.mkdir(parents=True, exist_ok=True)
            if palette and pattern == labels:
                picture.putpalette(voc_colours())
            picture.save(path)
    if split:
        (root / split).parent.mkdir(parents=True, exist_ok=True)
        (root / split).write_text("".join(f"{name}\n" for name in written))
    return root


def voc_colours() -> bytes:
    """VOC's palette, 256 RGB colours: bit k of an index sets bit 7 - k // 3 of one of the three channels, by turns."""
    index = np.arange(256)
    channels = [sum(((index >> (3 * bit + c)) & 1) << (7 - bit) for bit in range(8)) for c in range(3)]
    return np.stack(channels, 1).astype(np.uint8).tobytes()


def write_folder(
    root: Path, scenes: Iterable[Scene], *, classes: Sequence[str] = NAMES, background: str | None = None
) -> Path:
    """A labelled folder of one's own names: the scenes' labels as they are. background: "word, word", "" for none."""
    root.mkdir(parents=True, exist_ok=True)
    first = [] if background is None else [f"background: {background}"]
    (root / "classes.txt").write_text("".join(f"{line}\n" for line in (*first, *classes)))
    return write_files(
        root,
        [(scene.image, scene.labels) for scene in scenes],
        images="JPEGImages/{}.png",
        labels="SegmentationClass/{}.png",
        split="ImageSets/Segmentation/val.txt",
        palette=True,
    )


def write_voc(root: Path, scenes: Iterable[Scene]) -> Path:
    """VOC2012 val: `VOC`'s kinds, background 0, contours ignored."""
    return write_files(
        root,
        [(scene.image, with_contours(raw_of(scene, VOC, 0))) for scene in scenes],
        images="JPEGImages/{}.jpg",
        labels="SegmentationClass/{}.png",
        split="ImageSets/Segmentation/val.txt",
        palette=True,
    )


def write_context(root: Path, scenes: Iterable[Scene], *, order: str = "alphabetical") -> Path:
    """Pascal Context val in either order ("alphabetical", "voc-first"), 0 for everything else."""
    return write_files(
        root,
        [(scene.image, raw_of(scene, CONTEXT[order], 0)) for scene in scenes],
        images="JPEGImages/{}.jpg",
        labels="SegmentationClassContext/{}.png",
        split="ImageSets/SegmentationContext/val.txt",
    )


def write_coco(root: Path, scenes: Iterable[Scene], *, files: str = "train") -> Path:
    """COCO val2017 with train ids ("train": *_labelTrainIds.png), COCO-Stuff's own ids ("own": they are known by a wall
    in one of the scenes) or things alone ("things": *_instanceTrainIds.png); 255, or 0 in the last, for everything
    else."""
    used = [raw for raw in range(182) if raw not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
    train = {name: used.index(raw) for name, raw in COCO.items()}
    things = {name: index + 1 for name, index in train.items() if index < 80}
    ids, other, suffix = {
        "own": (COCO, 255, ""),
        "train": (train, 255, "_labelTrainIds"),
        "things": (things, 0, "_instanceTrainIds"),
    }[files]
    pairs = [(scene.image, raw_of(scene, ids, other)) for scene in scenes]
    return write_files(
        root,
        pairs,
        images="images/val2017/{}.jpg",
        labels=f"annotations/val2017/{{}}{suffix}.png",
        ids=[f"{k:012d}" for k in range(1, len(pairs) + 1)],
    )


def write_ade(root: Path, scenes: Iterable[Scene]) -> Path:
    """ADE20K validation, 0 for everything else."""
    pairs = [(scene.image, raw_of(scene, ADE, 0)) for scene in scenes]
    return write_files(
        root,
        pairs,
        images="images/validation/{}.jpg",
        labels="annotations/validation/{}.png",
        ids=[f"ADE_val_{k:08d}" for k in range(1, len(pairs) + 1)],
    )
