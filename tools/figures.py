"""Make the pictures of the README and the documentation from the embedded pair.

python tools/figures.py --out docs/images
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
import typer

from nerve_core import Segmenter, Vocabulary
from nerve_core.embedded.scenes import NAMES, draw_scene
from nerve_core.images.visualize import overlay
from nerve_core.models.loading import quiet_libraries
from nerve_core.readout import read_out

SCENES = ((77, 9), (77, 23), (77, 41))


def clip_alone(segmenter: Segmenter, image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Labels uint8 [H, W] of G without the walk."""
    queries = segmenter.embed(vocabulary)
    G = segmenter.frame(image, queries)[0]
    settings = segmenter.settings.readout
    read = read_out(G, G, queries.classes, len(vocabulary), segmenter.grid, image.shape[:2], settings)
    return read.labels.numpy()


def main(out: Path = Path("docs/images"), seed: int = 0, indices: str = "") -> None:
    """Draw overview.png: scenes, CLIP alone, and NERVE."""
    quiet_libraries()
    torch.set_num_threads(2)
    segmenter = Segmenter.from_pretrained("embedded", device="cpu")
    vocabulary = Vocabulary(NAMES)
    chosen = [(seed, int(index)) for index in indices.split(",")] if indices else SCENES
    rows = []
    for key in chosen:
        image = draw_scene(key).image
        coarse = overlay(image, clip_alone(segmenter, image, vocabulary), NAMES)
        fine = overlay(image, segmenter(image, vocabulary).labels, NAMES)
        rows.append(np.hstack([image, coarse, fine]))
    sheet = cv2.resize(np.vstack(rows), None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    out.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(out / "overview.png"), sheet[:, :, ::-1])


if __name__ == "__main__":
    typer.run(main)
