"""An image and its labels -> small pictures to look at, as files beside the report."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ..images.visualize import hatch_ignored, overlay
from ..output import marked, write
from ..text.vocabulary import BACKGROUND, UNLABELLED
from .data import Picture

WIDTH = 480
"""Pixels, what a column of the page has; wider images are made smaller, narrower ones are left as they are."""


def save_picture(
    folder: Path,
    image: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    image_id: str,
    variant: str,
    rank: str,
    miou: float | None = None,
    truth: np.ndarray | None = None,
) -> Picture:
    """Write the image, the image under its labels and, where it is given, under the true ones, below folder/pictures.

    folder: the report's. image: uint8 [H, W, 3], RGB. labels, truth: uint8 [H, W]; label k is names[k - 1], 0 is
    background, 255 is ignored and drawn hatched. A file's name is made of image_id and of what is in it, so that any
    id will do, two never overwrite each other, and the same image is stored once.
    Raises ValueError where sizes differ, OSError where the folder cannot be written.
    """
    scale = min(1.0, WIDTH / image.shape[1])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    stem = re.sub(r"[^A-Za-z0-9]+", "_", image_id).strip("_")[-40:] or "image"
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    seen: set[int] = set()

    def drawn(of: np.ndarray) -> str:
        if of.shape != image.shape[:2]:
            raise ValueError(
                f"image {image_id} is {image.shape[1]} x {image.shape[0]}, its labels are {of.shape[1]} x "
                f"{of.shape[0]}; they must be equal"
            )
        nearest = cv2.resize(of, size, interpolation=cv2.INTER_NEAREST)
        seen.update(int(label) for label in np.unique(nearest) if BACKGROUND < label <= UNLABELLED)
        # The page has the legend: it can write every alphabet, and OpenCV's fonts cannot.
        return _save(folder, stem, hatch_ignored(overlay(small, nearest, names, legend=False), nearest))

    return Picture(
        image_id=image_id,
        variant=variant,
        rank=rank,
        miou=miou,
        image=_save(folder, stem, small),
        overlay=drawn(labels),
        truth="" if truth is None else drawn(truth),
        labels=tuple(sorted(seen)),
    )


def _save(folder: Path, stem: str, picture: np.ndarray) -> str:
    """Write a picture, uint8 [h, w, 3] RGB, as JPEG; its path from the report's folder."""
    data = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()
    path = Path("pictures", f"{stem}-{hashlib.sha256(data).hexdigest()[:12]}.jpg")
    write(folder / path, marked(data))
    return path.as_posix()
