"""Draw the training scenes of the embedded pair into two numpy files that the training scripts map into memory.

    python tools/embedded/generate.py --out build/embedded --count 16000

images.npy: uint8 [count, rows, 4/3 rows, 3] RGB. labels.npy: uint8 [count, rows, 4/3 rows], k = ALL_NAMES[k]: objects,
then stuff. Every scene is drawn at twice the size and averaged down.
"""

from __future__ import annotations

import functools
import multiprocessing
from pathlib import Path

import cv2
import numpy as np
import typer
from rich.progress import track

from nerve_core.embedded.scenes import NAMES, STUFF, draw_scene

ALL_NAMES: tuple[str, ...] = NAMES + STUFF
OBJECTS = len(NAMES)  # labels below this are objects
SIZE = (144, 192)
TRAINING_SEED = 1


def shrunk_scene(index: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of the training seed, drawn at twice the size and averaged down, with objects over stuff."""
    size = (rows, rows * 4 // 3)
    scene = draw_scene((TRAINING_SEED, index), size=(2 * size[0], 2 * size[1]))
    everything = np.where(scene.labels > 0, scene.labels - 1, scene.stuff + (len(NAMES) - 1)).astype(np.uint8)
    return cv2.resize(scene.image, size[::-1], interpolation=cv2.INTER_AREA), everything[::2, ::2]


def main(out: Path = Path("build/embedded"), count: int = 16000, rows: int = 144, workers: int = 2) -> None:
    """Draw `count` scenes in `workers` processes."""
    out.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(out / "images.npy", "w+", np.uint8, (count, rows, rows * 4 // 3, 3))
    labels = np.lib.format.open_memmap(out / "labels.npy", "w+", np.uint8, (count, rows, rows * 4 // 3))
    with multiprocessing.Pool(workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        drawn = pool.imap(functools.partial(shrunk_scene, rows=rows), range(count), chunksize=32)
        for index, (image, label) in enumerate(track(drawn, "drawing", count)):
            images[index], labels[index] = image, label


if __name__ == "__main__":
    typer.run(main)
