"""A set and variants of the method -> a confusion matrix for each: every image once, over interruptions too."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models.pairs import find_pair
from ..models.weights import FILES, hub_is_off, local_folder, weight_file
from ..output import digest
from ..segmenter import find_device
from ..settings import Settings
from .metric import ConfusionMatrix, mean_iou
from .runlog import RunError, RunLog
from .variants import Variant, settings_of
from .workers import Failed, ImageSet, InProcess, Job, Processes, Task, Workers

FORMAT = 1
_CORE = Path(__file__).resolve().parents[1]
_OF_NO_EFFECT = (
    *("carry/*", "cli/*", "report/*", "replay/*", "embedded/filming.py", "embedded/world.py"),
    *("images/visualize.py", "models/verify.py", "console.py", "output.py"),
    *(f"evaluation/{name}.py" for name in ("protocols", "summary", "tune", "runlog", "ray_workers")),
)
_LIBRARIES = ("torch", "transformers", "diffusers", "numpy", "pillow")


def make_task(
    dataset: ImageSet,
    variants: Sequence[Variant],
    *,
    model: str = "embedded",
    device: str = "auto",
    precision: str | None = None,
    preset: str = "pair",
    settings: Mapping[str, Any] | None = None,
    threads: int = 1,
) -> Task:
    """A run on a set, with everything decided that would else be decided where it runs.

    device: auto is CUDA where there is one, else the CPU. precision: None is fp16 on CUDA and fp32 on the CPU, never
    what a timing would choose. settings: overrides for all variants, above what the set's protocol asks for and below
    what a variant is. Raises ModelError, and ValueError for what cannot be run.
    """
    found = find_device(device)
    device = device if ":" in device else found.type  # without an index, processes take the devices in turn
    if precision is None:
        precision = "fp16" if device.startswith("cuda") else "fp32"
    if threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    task = Task(
        dataset, tuple(variants), model, device, precision, preset, {**dataset.settings, **(settings or {})}, threads
    )
    settings_of(model, task.variants, preset=preset, shared=task.settings)
    return task


def describe(task: Task) -> dict[str, Any]:
    """All that a run's result depends on, as JSON has it: two runs of one description find the same.

    Reads the weights and, where they are missing, fetches them. Raises ModelError, OSError.
    """
    dataset = task.dataset
    settings = settings_of(task.model, task.variants, preset=task.preset, shared=task.settings)
    plain = {
        "format": FORMAT,
        "set": {
            "name": dataset.name,
            "images": len(dataset.samples),
            "samples": _samples_digest(dataset),
            "words": [list(words) for words in dataset.vocabulary.synonyms],
            "background": dataset.vocabulary.negatives,
        },
        "model": {"pair": find_pair(task.model).name, "weights": _weights(task, settings.values())},
        "device": _device(task.device),
        "precision": task.precision,
        "threads": task.threads,
        "versions": versions(),
        "code": _code(),
        "variants": {
            variant.name: {"refine": str(variant.refine), **settings[variant.name].flat()} for variant in task.variants
        },
    }
    return json.loads(json.dumps(plain))


def versions() -> dict[str, str]:
    """Of Python and of the libraries that have a part in the result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _samples_digest(dataset: ImageSet) -> str:
    """Of the images' ids and order, of the files' names and sizes, and of how labels are read."""
    sha = hashlib.sha256()
    for sample in dataset.samples:
        sizes = [path.stat().st_size if path.is_file() else None for path in (sample.image, sample.labels)]
        sha.update(json.dumps([sample.id, sample.image.name, sample.labels.name, sizes]).encode())
    sha.update(json.dumps(dataset.values).encode())
    return sha.hexdigest()


def _weights(task: Task, settings: Collection[Settings]) -> dict[str, str]:
    """SHA-256 of every weights file that variants of these settings need."""
    found = {}
    for part, source in find_pair(task.model).sources.items():
        if part == "taesd" and all(chosen.diffusion.encoder != "taesd" for chosen in settings):
            continue
        folder = local_folder(source, FILES[part], cache_dir=None, offline=hub_is_off())
        for stem in FILES[part].weights:
            path = weight_file(folder, stem, half=task.precision == "fp16")
            found[f"{part}/{path.relative_to(folder).as_posix()}"] = digest(path)
    return found


def _device(name: str) -> str:
    """What computes: the same words where the same kernels run."""
    import torch

    if name.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(name))
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _code() -> str:
    """SHA-256 of this package's own code, as far as it has a part in the result."""
    sha = hashlib.sha256()
    for path in sorted(_CORE.rglob("*.py")):
        name = path.relative_to(_CORE)
        if not any(name.match(pattern) for pattern in _OF_NO_EFFECT):
            sha.update(f"{name}\n".encode() + path.read_bytes())
    return sha.hexdigest()


class Tally:
    """What was counted of a set so far: exact, and the same whatever the order.

    matrices: of each variant, over all images. sums: int32 [images, 3, classes] of each variant,
    `ConfusionMatrix.sums` of every image in the set's order, 0 for one that is not done. seconds: float64 [images].
    """

    def __init__(self, samples: Sequence[str], variants: Sequence[str], classes: int) -> None:
        self.classes = classes
        self.matrices = {name: ConfusionMatrix.of(classes) for name in variants}
        self.sums = {name: np.zeros((len(samples), 3, classes), np.int32) for name in variants}
        self.seconds = {name: np.zeros(len(samples)) for name in variants}
        self._places = {image_id: place for place, image_id in enumerate(samples)}
        self._counted: dict[str, bytes] = {}

    def __len__(self) -> int:
        """Images counted."""
        return len(self._counted)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._counted

    @property
    def done(self) -> np.ndarray:
        """bool [images]: which are counted."""
        found = np.zeros(len(self._places), bool)
        found[[self._places[image_id] for image_id in self._counted]] = True
        return found

    def add(self, image_id: str, counts: dict[str, list[list[int]]], seconds: dict[str, float]) -> None:
        """Count an image; one that is counted already must have been found the same.

        Raises ValueError for an image or a variant that is not of this run, counts that are none, and counts that
        differ from before.
        """
        if image_id not in self._places:
            raise ValueError(f"image {image_id!r} is not in the set")
        if counts.keys() != self.matrices.keys() or seconds.keys() != counts.keys():
            raise ValueError(f"image {image_id!r} has counts of {', '.join(counts)}, not of {', '.join(self.matrices)}")
        said = hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).digest()
        if image_id in self._counted:
            if self._counted[image_id] != said:
                raise ValueError(f"image {image_id!r} was counted before, and differently")
            return
        found = {name: ConfusionMatrix.of(self.classes) for name in counts}
        for name, entries in counts.items():
            found[name].add_sparse(entries)
        place, self._counted[image_id] = self._places[image_id], said
        for name, matrix in found.items():
            self.matrices[name].counts += matrix.counts
            self.sums[name][place] = matrix.sums()
            self.seconds[name][place] = seconds[name]

    def image_scores(self, variant: str) -> dict[str, float]:
        """Mean IoU of each counted image by itself, in the set's order; NaN for one without labelled pixels."""
        values = mean_iou(self.sums[variant])
        return {image_id: float(values[place]) for image_id, place in self._places.items() if image_id in self._counted}


@dataclass(frozen=True)
class SetResult:
    """What a run on one set has found. failed: images that could not be done, where the run went on all the same.
    done_before: images that an earlier run of the same had done."""

    task: Task
    description: dict[str, Any]
    tally: Tally
    failed: tuple[Failed, ...] = ()
    done_before: int = 0


def open_workers(task: Task, count: int | None = None, ray: str | None = None) -> Workers:
    """Whoever does the work: this process for a count of 1 or None, so many processes, or so many of a Ray cluster's
    machines. Nothing starts before there is work. Raises ValueError."""
    if count is not None and count < 1:
        raise ValueError(f"--workers is {count}; it must be at least 1")
    if ray is not None:
        from .ray_workers import RayWorkers

        return RayWorkers(task, ray, count)
    return InProcess(task) if count in (None, 1) else Processes(task, count)


def _take_up(log: RunLog, tally: Tally) -> None:
    """Count what an earlier run wrote. Raises RunError for a line that is not of this run."""
    for number, line in log.read():
        try:
            tally.add(line["image"], line["counts"], line["seconds"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RunError(f"{log.path}, line {number}: {error}; delete the folder, or choose another --out") from None


def run_set(
    task: Task,
    workers: Workers,
    *,
    folder: Path | None = None,
    keep_going: bool = False,
    watch: Callable[[int, int], None] = lambda done, images: None,
) -> SetResult:
    """Count every image of a set once.

    folder: where results are kept, and taken up where the same run was left; None keeps them in memory alone.
    keep_going: go on without images that cannot be done. watch: called with how many images are done, and of how many.
    Raises RunError for a folder that cannot be gone on with, RuntimeError or ValueError for an image that cannot be
    done (what was found is kept), OSError.
    """
    samples = task.dataset.samples
    tally = Tally(
        [sample.id for sample in samples], [variant.name for variant in task.variants], len(task.dataset.labels)
    )
    if len({sample.id for sample in samples}) < len(samples):
        raise ValueError(f"set {task.dataset.name} has two images of one id; ids must differ")
    description = describe(task)
    log = None if folder is None else RunLog(folder, description)
    failed: list[Failed] = []
    try:
        if log:
            _take_up(log, tally)
        before = len(tally)
        watch(before, len(samples))
        jobs = [Job(sample) for sample in samples if sample.id not in tally]
        for result in workers.run(jobs) if jobs else ():
            if isinstance(result, Failed):
                if result.image_id is None:
                    raise RuntimeError(result.reason)
                failed.append(result)
                if not keep_going:
                    raise ValueError(
                        f"image {result.image_id}: {result.reason}. What was found is kept; mend the file and give the "
                        "same command again, or go on without it by --keep-going"
                    )
                continue
            tally.add(result.image_id, result.counts, result.seconds)
            if log:
                log.append({"image": result.image_id, "counts": result.counts, "seconds": result.seconds})
            watch(len(tally) + len(failed), len(samples))
    finally:
        if log:
            log.close()
    return SetResult(task, description, tally, tuple(failed), before)
