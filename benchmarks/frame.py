"""Time a whole frame of a model pair: ours and plain diffusers and transformers, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from .process import status_mb
from .task import Task, names, picture


def compare(
    pair: str,
    *,
    device: str,
    precision: str | None = None,
    count: int = 21,
    size: tuple[int, int] = (480, 640),
    frames: int = 5,
    warm_up: int = 1,
    plain: bool = True,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Our frame and, where `plain`, the plain one after it, each in its own process.

    The plain side runs in float32 on the CPU and in float16 on CUDA: in what its user would. Returns what `measure`
    says of ours, each stage's share of its time in "shares", what it says of the plain one under names that begin with
    "baseline_", and "speedup" and "memory_ratio".
    """
    task = Task("ours", pair, device, precision, count, size, frames, warm_up, options or {})
    result = {"device": device, "names": count, "size": list(size), **measure_apart(task)}
    medians = {stage: times["p50_ms"] for stage, times in result["stages"].items()}
    result["shares"] = {stage: median / sum(medians.values()) for stage, median in medians.items()}
    if plain:
        base = measure_apart(
            replace(
                task,
                side="plain",
                precision="fp16" if device.startswith("cuda") else "fp32",
                frames=max(2, frames // 2),
                options={},
            )
        )
        result |= {f"baseline_{key}": value for key, value in base.items() if key != "stages"}
        result["speedup"] = base["p50_ms"] / result["p50_ms"]
        result["memory_ratio"] = result["peak_memory_mb"] / base["peak_memory_mb"]
    return result


def measure_apart(task: Task) -> dict[str, Any]:
    """`measure` in a process of its own, so that neither side has the other's memory. Raises RuntimeError."""
    environment = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    command = [sys.executable, "-m", f"{__package__}.frame", json.dumps(asdict(task))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"]
        raise RuntimeError(f"the benchmark's {task.side} side failed: {reason[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(task: Task) -> dict[str, Any]:
    """Load and time one side: p50 and p95 in ms, frames per second, ms per stage, peak memory in MB, load time in s.

    Peak memory is CUDA's peak allocation on CUDA, and the process's greatest resident size elsewhere. On CUDA a frame
    goes from host memory to the mask in host memory.
    """
    import torch

    from nerve_core.models.loading import quiet_libraries

    quiet_libraries()
    if task.side == "checks":
        from .checks import run_checks  # only where it is run: the other sides' memory is measured

        return run_checks(task)
    image = picture(task.size)
    started = time.perf_counter()
    run, finish = (_ours if task.side == "ours" else _plain)(task)
    loaded = time.perf_counter() - started
    stages: dict[str, list[float]] = {}
    totals = []
    for number in range(task.warm_up + task.frames):
        begun = time.perf_counter()
        timings = run(image)
        if number >= task.warm_up:
            totals.append(1e3 * (time.perf_counter() - begun))
            for stage, milliseconds in timings.items():
                stages.setdefault(stage, []).append(milliseconds)
    cuda = torch.device(task.device).type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else status_mb("VmHWM")
    return {
        **quantiles(totals),
        "fps": 1e3 * len(totals) / sum(totals),
        "peak_memory_mb": peak,
        "resident_mb": status_mb("VmRSS"),
        "load_s": loaded,
        "stages": {stage: quantiles(values) for stage, values in stages.items() if stage != "total"},
        "threads": torch.get_num_threads(),
        "frames": task.frames,
        **finish(),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """{"p50_ms", "p95_ms"} of some times in ms."""
    return {"p50_ms": float(np.quantile(values, 0.5)), "p95_ms": float(np.quantile(values, 0.95))}


def _ours(task: Task) -> tuple[Callable[[np.ndarray], dict[str, float]], Callable[[], dict[str, Any]]]:
    """A frame through `Segmenter`, and what there is to say of it afterwards."""
    from nerve_core import Segmenter, Vocabulary

    segmenter = Segmenter.from_pretrained(
        task.pair,
        device=task.device,
        dtype=task.precision,
        offline=True,
        settings={"templates": ("a photo of a {}.",)},  # text is no part of a frame
        **task.options,
    )
    queries = segmenter.embed(Vocabulary(names(task.names)))
    operator = ""

    def run(image: np.ndarray) -> dict[str, float]:
        nonlocal operator
        found = segmenter(image, queries)
        operator = found.operator
        return found.timings

    def finish() -> dict[str, Any]:
        return {
            "precision": str(segmenter.dtype).removeprefix("torch."),
            "operator": operator,
            "model": segmenter.description,
        }

    return run, finish


def _plain(task: Task) -> tuple[Callable[[np.ndarray], dict[str, float]], Callable[[], dict[str, Any]]]:
    """A frame through `PlainNerve`, with text embeddings made up: they are not timed on either side."""
    import torch
    from torch.nn.functional import normalize

    from nerve_core.models.pairs import find_pair

    from .plain_frame import PlainNerve

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[task.precision or "fp32"]
    plain = PlainNerve(find_pair(task.pair), torch.device(task.device), dtype)
    width = plain.clip.config.projection_dim
    queries = task.names + len(plain.settings["negatives"]) + 1
    text = normalize(torch.randn(queries, width, generator=torch.Generator().manual_seed(0)), dim=-1)
    text = text.to(plain.device)

    def run(image: np.ndarray) -> dict[str, float]:
        plain(image, text)
        return {}

    return run, lambda: {"precision": str(dtype).removeprefix("torch.")}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(measure(Task(**{**arguments, "size": tuple(arguments["size"])}))))
