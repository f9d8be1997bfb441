"""One image in, its confusion counts out: in this process, or in several, of which any may die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .metric import ConfusionMatrix

if TYPE_CHECKING:
    from pathlib import Path

    from ..text.vocabulary import Vocabulary
    from .datasets import Sample
    from .variants import Variant, Variants

TRIES = 3
"""Times that an image may end its worker before the run is given up."""
_START = "from nerve_core.evaluation.workers import serve; serve()"


class ImageSet(Protocol):
    """What a run needs to know of a set: `datasets.Dataset`, or anything like it that can be pickled."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def root(self) -> Path: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def values(self) -> tuple[int, ...]: ...

    @property
    def samples(self) -> tuple[Sample, ...]: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def load(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Task:
    """All that a worker needs: what to segment, and how.

    device: cpu, cuda or cuda:N. precision: fp16, bf16 or fp32. settings: overrides for all variants. threads: of
    PyTorch on the CPU, on which the last bits of a result depend.
    """

    dataset: ImageSet
    variants: tuple[Variant, ...]
    model: str = "embedded"
    device: str = "cpu"
    precision: str = "fp32"
    preset: str = "pair"
    settings: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1


@dataclass(frozen=True)
class Job:
    """One image. masks: variants whose masks are wanted; without any, all variants are counted."""

    sample: Sample
    masks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """One image's result. counts: `ConfusionMatrix.sparse` of every variant. seconds: that it took by itself.
    image, truth, masks: where masks were asked for."""

    image_id: str
    counts: dict[str, list[list[int]]]
    seconds: dict[str, float]
    image: np.ndarray | None = None
    truth: np.ndarray | None = None
    masks: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """An image that could not be done, and why; image_id None where it is no image's fault, so that none can be."""

    image_id: str | None
    reason: str


class Worker:
    """A model that counts one image after the other; it is loaded when the first comes."""

    def __init__(self, task: Task) -> None:
        """Nothing is loaded yet, so that what is wrong with the model is an answer too (`Failed`)."""
        self._task = task
        self._variants: Variants | None = None

    def __call__(self, job: Job) -> Done | Failed:
        """An image's counts, or why there are none."""
        try:
            variants = self._variants = self._variants or self._loaded()
        except (ValueError, RuntimeError, OSError) as error:
            return Failed(None, str(error))
        try:
            return self._count(variants, job)
        except (ValueError, RuntimeError, OSError) as error:
            return Failed(job.sample.id, str(error))

    def _loaded(self) -> Variants:
        import torch

        from ..models.loading import quiet_libraries
        from .variants import Variants

        quiet_libraries()
        task = self._task
        torch.set_num_threads(task.threads)
        return Variants(
            task.model,
            task.variants,
            device=task.device,
            precision=task.precision,
            preset=task.preset,
            settings=task.settings,
        )

    def _count(self, variants: Variants, job: Job) -> Done:
        dataset = self._task.dataset
        image, truth = dataset.load(job.sample)
        found = variants(image, dataset.vocabulary, truth.shape, only=job.masks or None)
        counts = {}
        for name, mask in found.items():
            matrix = ConfusionMatrix.of(len(dataset.labels))
            matrix.add(truth, mask.labels)
            counts[name] = matrix.sparse()
        seconds = {name: round(mask.seconds, 6) for name, mask in found.items()}
        if not job.masks:
            return Done(job.sample.id, counts, seconds)
        masks = {name: mask.labels for name, mask in found.items()}
        return Done(job.sample.id, counts, seconds, image, truth, masks)


class Workers(Protocol):
    """Whatever does the jobs, in any order. `run` raises RuntimeError where it cannot go on."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Done | Failed]: ...

    def close(self) -> None: ...


class InProcess:
    """This process does them, one after the other."""

    def __init__(self, task: Task) -> None:
        self._worker = Worker(task)

    def run(self, jobs: Iterable[Job]) -> Iterator[Done | Failed]:
        """Results in the order of the jobs."""
        return map(self._worker, jobs)

    def close(self) -> None:
        """Nothing has to be."""


class Processes:
    """Processes of their own, each with a model of its own. One that dies is replaced, and its image done again.

    A fresh interpreter each: a fork would inherit locks and a CUDA context that do not survive it, and what
    multiprocessing spawns would run the calling program's file again.
    """

    def __init__(self, task: Task, count: int) -> None:
        """count: of processes. On CUDA they take the devices in turn. They start when there is work."""
        self._task, self._count = task, count
        self._children: dict[int, _Child] = {}

    def run(self, jobs: Iterable[Job]) -> Iterator[Done | Failed]:
        """Results as they come. Raises RuntimeError for an image that ended its process three times."""
        waiting = deque(jobs)
        ended: Counter[str] = Counter()
        busy: dict[Connection, tuple[int, Job]] = {}
        while waiting or busy:
            working = {number for number, _ in busy.values()}
            for number in range(self._count):
                if waiting and number not in working:
                    job = waiting.popleft()
                    busy[self._give(number, job)] = number, job
            for connection in _ready(busy):
                number, job = busy.pop(connection)
                try:
                    result = connection.recv()
                except (EOFError, OSError):
                    code = self._children.pop(number).end()
                    ended[job.sample.id] += 1
                    if ended[job.sample.id] == TRIES:
                        raise RuntimeError(ended_its_worker(job, f"exit code {code}")) from None
                    waiting.appendleft(job)
                else:
                    yield result

    def _give(self, number: int, job: Job) -> Connection:
        """Send a job to a process, to a new one where there is none or it has died since."""
        for _ in range(TRIES):
            if number not in self._children:
                self._children[number] = _Child(self._task, number)
            try:
                self._children[number].connection.send(job)
            except OSError:
                self._children.pop(number).end()
            else:
                break
        else:
            raise RuntimeError("workers end as soon as they start; what they said stands above")
        return self._children[number].connection

    def close(self) -> None:
        """End them all."""
        while self._children:
            self._children.popitem()[1].end()


def _ready(connections: Collection[Connection]) -> list[Connection]:
    """Those with an answer or whose process has ended; waits until there is one."""
    return [found for found in wait(list(connections)) if isinstance(found, Connection)]


class _Child:
    """One process and the connection to it."""

    def __init__(self, task: Task, number: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(entry for entry in sys.path if entry)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), str(number)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )
        self.connection = Connection(ours.detach())
        self.connection.send(task)

    def end(self) -> int:
        """End it, and return its exit code, -9 for one that was killed."""
        self.connection.close()
        self._process.terminate()
        return self._process.wait()


def serve() -> None:
    """Be a worker process: file descriptor and number are the program's arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started this
    descriptor, number = map(int, sys.argv[1:3])
    connection = Connection(descriptor)
    try:
        worker = Worker(_placed(connection.recv(), number))
        while True:
            connection.send(worker(connection.recv()))
    except (EOFError, OSError):
        return  # whoever started this has closed the connection, or is gone


def _placed(task: Task, number: int) -> Task:
    """The task of the process of that number: on CUDA, on a device of its own as long as there are any."""
    if task.device != "cuda":
        return task
    import dataclasses

    import torch

    return dataclasses.replace(task, device=f"cuda:{number % torch.cuda.device_count()}")


def ended_its_worker(job: Job, how: str) -> str:
    """What to say of an image that must not be tried again."""
    return (
        f"image {job.sample.id} ({job.sample.image}) ended its worker {TRIES} times ({how}): its file may crash a "
        "library, or memory be short. What was found is kept; mend the file, or give the command with fewer --workers"
    )
