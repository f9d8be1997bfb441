"""Labels -> pictures: colours, overlays and legends. Nothing here changes a mask."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Sequence

import cv2
import numpy as np

from ..text.vocabulary import BACKGROUND, UNLABELLED

_FONT = cv2.FONT_HERSHEY_DUPLEX


@functools.cache
def palette() -> np.ndarray:
    """A colour for every label: uint8 [256, 3], RGB. 0 is black, 255 grey; neighbours in number are far apart in
    hue."""
    colours = np.zeros((256, 3), np.uint8)
    for label in range(BACKGROUND + 1, UNLABELLED):
        hue = label * 0.61803398875 % 1
        saturation, value = ((0.85, 1.0), (0.5, 1.0), (0.95, 0.65))[label % 3]
        colours[label] = np.round(np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255)
    colours[UNLABELLED] = 96
    return colours


def overlay(
    image: np.ndarray, labels: np.ndarray, names: Sequence[str], *, alpha: float = 0.5, legend: bool = True
) -> np.ndarray:
    """The image with its labels in colour, outlined, and a legend of the names that are there.

    image: uint8 [H, W, 3], RGB. labels: uint8 [H, W]; label k is names[k - 1]. alpha: 0 (image alone) to 1 (colours
    alone).
    Returns uint8 [H, W, 3], RGB. Raises ValueError where sizes differ.
    """
    if image.shape[:2] != labels.shape:
        raise ValueError(
            f"image is {image.shape[1]} x {image.shape[0]}, labels are {labels.shape[1]} x {labels.shape[0]}; "
            "they must be equal"
        )
    colours = cv2.LUT(cv2.merge([labels] * 3), palette()[None])
    mixed = cv2.addWeighted(image, 1 - alpha, colours, alpha, 0)
    edge = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    seen = labels != BACKGROUND
    drawn = np.where(seen[:, :, None], mixed, image)
    drawn[edge & seen] = 255
    if legend:
        _draw_legend(
            drawn,
            [label for label in np.unique(labels) if BACKGROUND < label < UNLABELLED and label <= len(names)],
            names,
        )
    return drawn


def hatch_ignored(picture: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The picture with what is ignored in grey with slanted lines, so that it is not taken for a class.

    picture: uint8 [H, W, 3]. labels: uint8 [H, W]; 255 is ignored. Returns uint8 [H, W, 3].
    """
    slant = np.add.outer(np.arange(labels.shape[0]), np.arange(labels.shape[1])) % 8 < 2
    hatched = np.where(slant[:, :, None], np.uint8(190), np.uint8(110))
    return np.where((labels == UNLABELLED)[:, :, None], hatched, picture)


def _draw_legend(picture: np.ndarray, labels: Sequence[int], names: Sequence[str]) -> None:
    """List names with their colours at the top left, as many as there is room for."""
    if not labels:
        return
    scale = max(0.35, picture.shape[0] / 480 * 0.5)
    line = int(34 * scale) + 4
    shown = labels[: max(1, (picture.shape[0] - 8) // line)]
    texts = [_printable(names[label - 1]) for label in shown]
    width = max(cv2.getTextSize(text, _FONT, scale, 1)[0][0] for text in texts) + line + 12
    box = picture[4 : 8 + line * len(shown), 4 : 4 + width]
    box[:] = box // 3
    for row, (label, text) in enumerate(zip(shown, texts, strict=True)):
        top = 6 + row * line
        colour = tuple(int(part) for part in palette()[label])
        cv2.rectangle(picture, (8, top + 4), (8 + line - 8, top + line - 4), colour, cv2.FILLED)
        cv2.putText(picture, text, (8 + line, top + line - 8), _FONT, scale, (255, 255, 255), 1, cv2.LINE_AA)


def _printable(name: str) -> str:
    """A name in what OpenCV's fonts have: ASCII, shortened."""
    text = name.encode("ascii", "replace").decode()
    return text if len(text) <= 24 else text[:23] + "~"


def contact_sheet(pictures: Sequence[np.ndarray], columns: int = 4, width: int = 480) -> np.ndarray:
    """Pictures uint8 [h, w, 3] in rows of `columns`, each `width` pixels wide; equal aspect is taken from the first."""
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    height = max(1, round(pictures[0].shape[0] * width / pictures[0].shape[1]))
    small = [cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA) for picture in pictures]
    small += [np.zeros_like(small[0])] * (-len(small) % columns)
    return np.vstack([np.hstack(small[row : row + columns]) for row in range(0, len(small), columns)])
