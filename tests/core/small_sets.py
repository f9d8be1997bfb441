"""Sets for tests of the harness: small scenes, and images that end their worker or cannot be read."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nerve_core.embedded.scenes import NAMES, draw_scene
from nerve_core.evaluation.datasets import DatasetError, Sample
from nerve_core.evaluation.metric import ConfusionMatrix
from nerve_core.evaluation.scenes import DrawnScenes
from nerve_core.evaluation.workers import Done

SIZE = (60, 80)


@dataclass(frozen=True)
class SmallScenes(DrawnScenes):
    """Drawn scenes of 80 x 60 pixels. deadly: number of the image that kills its process with SIGKILL, `deaths` times,
    which are noted in the file `notes_in`. unreadable: number of an image that raises."""

    deadly: int | None = None
    deaths: int = 0
    notes_in: Path | None = None
    unreadable: int | None = None

    def load(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        number = int(sample.id)
        if number == self.deadly and died(self.notes_in) < self.deaths:
            with self.notes_in.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.unreadable:
            raise DatasetError(f"image {number} is no image")
        scene = draw_scene((self.seed, number), size=SIZE)
        return scene.image, scene.labels


def died(notes: Path) -> int:
    """How often a deadly image has killed its process."""
    return len(notes.read_text()) if notes.exists() else 0


class KnownAnswers:
    """Workers that know every answer: the truth shifted by one label for each tenth pixel, in a given order."""

    def __init__(self, task, order=lambda jobs: jobs, stop_after=None):
        self.task, self.order, self.stop_after, self.done = task, order, stop_after, []

    def run(self, jobs):
        for job in self.order(list(jobs)):
            if self.stop_after is not None and len(self.done) == self.stop_after:
                raise KeyboardInterrupt
            self.done.append(job.sample.id)
            yield answer(self.task, job.sample)

    def close(self):
        pass


def answer(task, sample) -> Done:
    """What `KnownAnswers` says of an image."""
    _, truth = task.dataset.load(sample)
    counts = {}
    for place, variant in enumerate(task.variants):
        predicted = truth.copy()
        predicted.ravel()[:: 10 + place] = (predicted.ravel()[:: 10 + place] + 1) % (len(NAMES) + 1)
        matrix = ConfusionMatrix.of(len(NAMES) + 1)
        matrix.add(truth, predicted)
        counts[variant.name] = matrix.sparse()
    return Done(sample.id, counts, dict.fromkeys(counts, 0.25))
