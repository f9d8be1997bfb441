"""Workers of an evaluation on a Ray cluster: each is an actor, which Ray starts again where it dies."""

from __future__ import annotations

import os
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from .workers import TRIES, Done, Failed, Job, Task, Worker, ended_its_worker

_ANSWER_SECONDS = 10.0
_STORE_BYTES = 80 << 20  # of a Ray on this machine alone: jobs and counts are small, and so are a few masks


class RayWorkers:
    """Actors on a cluster, one GPU each on CUDA and one processor each else."""

    def __init__(self, task: Task, address: str, count: int | None) -> None:
        """address: "auto" (the cluster that this machine belongs to), "local" (a new one on this machine, for
        this run) or host:port. count: of actors; None takes all GPUs, or all processors, that the cluster has.

        Every machine of the cluster needs this package, and the set and the weights at the same paths. Raises
        RuntimeError without Ray.
        """
        # Read when Ray is imported: no usage is reported, and what is local keeps to the loopback address
        # (which is what that switch does, whatever its name).
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address == "local":
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        try:
            import ray
        except ImportError as error:
            raise RuntimeError(
                f'--ray needs Ray ({error}); install it: pip install "nerve_ros[ray]", or leave --ray out for --workers'
            ) from error
        self._ray, self._task, self._address, self._count = ray, task, address, count
        self._actors: list[Any] = []

    @property
    def started(self) -> bool:
        """Whether there are actors."""
        return bool(self._actors)

    def _start(self) -> None:
        ray, count, options = self._ray, self._count, {}
        if self._address == "local":
            options = {
                "num_cpus": count,
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
                "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
            }
        try:
            _reach(self._address)
            ray.init(address=self._address, logging_level="error", log_to_driver=False, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise RuntimeError(
                f"Ray at {self._address!r} cannot be used: {reason}; give auto, local or HOST:PORT"
            ) from error
        kind = "GPU" if self._task.device.startswith("cuda") else "CPU"
        most = int(ray.cluster_resources().get(kind, 0))
        count = most if count is None else count
        if not 0 < count <= most:
            raise ValueError(f"{count} workers need a {kind} each, and the Ray cluster at {self._address!r} has {most}")
        needs = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
        actor = ray.remote(max_restarts=-1, max_task_retries=TRIES - 1, **needs)(Worker)
        self._actors = [actor.remote(self._task) for _ in range(count)]

    def run(self, jobs: Iterable[Job]) -> Iterator[Done | Failed]:
        """Results as they come. Raises RuntimeError for an image that ended its actor three times or a cluster that
        is out of reach, and ValueError for more workers than it has GPUs or processors."""
        if not self.started:
            self._start()
        waiting, idle = deque(jobs), deque(self._actors)
        busy: dict[Any, tuple[Any, Job]] = {}  # by Ray's reference to the answer
        while waiting or busy:
            while waiting and idle:
                actor, job = idle.popleft(), waiting.popleft()
                busy[actor.__call__.remote(job)] = actor, job
            for ready in self._ray.wait(list(busy))[0]:
                actor, job = busy.pop(ready)
                idle.append(actor)
                try:
                    yield self._ray.get(ready)
                except self._ray.exceptions.RayActorError as error:
                    said = str(error).strip().splitlines()
                    if "creation task" in said[0]:
                        raise RuntimeError(
                            f"Ray workers cannot start ({said[-1].strip()}); every machine of the cluster needs this "
                            "package, at this version"
                        ) from None
                    raise RuntimeError(ended_its_worker(job, type(error).__name__)) from None

    def close(self) -> None:
        """Leave the cluster; the actors end with it."""
        self._ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError where nobody answers at HOST:PORT, on which Ray itself would wait for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
