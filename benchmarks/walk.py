"""Time and memory of the walk from Q, K and G: ours and the plain versions, in one run."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nerve_core.walk.affinity import AffinityConfig
from nerve_core.walk.fusion import FusionConfig, fuse
from nerve_core.walk.random_walk import Refinement, WalkConfig, fixed_point, refine, truncated
from nerve_core.walk.workspace import Workspace

from . import plain_walks
from .process import status_mb

ERROR = 1e-3
"""In L1, of the worst row, against the side's own limit."""
KERNEL = "softmax"
"""The full-size pairs' own kernel."""
LOW_RANK_KERNELS = {"low rank": "shifted", "favor": "favor"}
SCALING_GRIDS = (32, 48, 64, 96, 128)
LARGE_GRID, LARGE_NAMES = 128, 60
MAX_STEPS = 200
LENGTH = 9.0
"""Of the made-up Q and K: their maps are neither uniform nor the identity, see `effective_tokens`."""


@dataclass(frozen=True)
class Problem:
    """What the walk starts from: a made-up scene on a square grid, the full-size pairs' heads and their settings."""

    grid: int = 64
    names: int = 21
    heads: int = 10
    size: int = 64
    device: str = "cpu"
    alpha: float = 0.85
    beta: float = 0.5
    c: float = 10.0

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the grid."""
        return self.grid, self.grid

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K: float32 [H, N, D] and G: float32 [N, C], the same at each call.

        Regions of a dozen kinds, each with a feature of its own in every head, on top of a smooth feature of the place
        and noise, which grows from head to head: a token attends to its region and to what is near, in the first heads
        sharply and in the last broadly. G names the regions, with errors.
        """
        draw = torch.Generator().manual_seed(0)
        ticks = (torch.arange(self.grid) + 0.5) / self.grid
        places = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), -1).reshape(-1, 2)  # [N, 2]
        centres = torch.rand(24, 2, generator=draw)
        kind = torch.randint(12, (24,), generator=draw)[torch.cdist(places, centres).argmin(-1)]  # [N]
        waves = 6 * torch.randn(self.heads, 2, self.size, generator=draw)
        smooth = torch.cos(places @ waves + 6.3 * torch.rand(self.heads, 1, self.size, generator=draw))  # [H, N, D]
        features = torch.randn(self.heads, 12, self.size, generator=draw)[:, kind] + 0.7 * smooth
        noise = torch.linspace(0.2, 1.2, self.heads)[:, None, None]
        Q, K = (features + noise * torch.randn(features.shape, generator=draw) for _ in range(2))
        Q, K = (LENGTH * x / x.norm(dim=-1, keepdim=True) for x in (Q, K))
        logits = 2 * torch.randn(len(kind), self.names, generator=draw)
        logits[torch.arange(len(kind)), torch.randint(self.names, (12,), generator=draw)[kind]] += 3
        return Q.to(self.device), K.to(self.device), logits.softmax(-1).to(self.device)

    def refine(self, Q: Tensor, K: Tensor, G: Tensor, kernel: str, steps: int, **options: Any) -> Refinement:
        """Our walk of `steps` from G by a kernel."""
        fusion = FusionConfig(self.beta, c=self.c)
        walk = WalkConfig("fixed_point", self.alpha, steps)
        affinity = AffinityConfig(kernel, favor_of=KERNEL)
        return refine(Q, K, G, self.shape, affinity, fusion, walk, validate=False, **options)

    def dense(self, Q: Tensor, K: Tensor, G: Tensor, steps: int, *, fuse_heads: bool = False) -> Tensor:
        """The plain walk of `steps`."""
        return plain_walks.dense(Q, K, G, self.shape, self.alpha, self.beta, self.c, steps, fuse_heads=fuse_heads)


def effective_tokens(Q: Tensor, K: Tensor) -> list[float]:
    """Over how many tokens each head's map is spread, exp of its rows' mean entropy: 1 is the identity, N uniform."""
    found = []
    for q, k in zip(Q, K, strict=True):
        found.append(math.exp(torch.special.entr(plain_walks.softmax_maps(q, k)).sum(-1).mean()))
    return found


def row_error(P: Tensor, limit: Tensor) -> float:
    """The worst row's distance in L1."""
    return float((P.double() - limit.double()).abs().sum(-1).max())


@torch.inference_mode()
def steps_to(problem: Problem, kernel: str, method: Callable[..., Tensor], limit: Tensor) -> int:
    """How many steps of a walk, `fixed_point` or `truncated`, bring every row within `ERROR` of the limit."""
    Q, K, G = problem.draw()
    affinity = AffinityConfig(kernel, favor_of=KERNEL)
    S = fuse(Q, K, G, problem.shape, affinity, FusionConfig(problem.beta, c=problem.c)).transition
    for steps in range(1, MAX_STEPS):
        if row_error(method(S, G, problem.alpha, steps), limit) <= ERROR:
            return steps
    raise RuntimeError(f"{method.__name__} with kernel {kernel} misses {ERROR} after {MAX_STEPS} steps")


def limits(problem: Problem) -> dict[str, Tensor]:
    """What each side tends to, computed in float64: the infinite walk for NERVE's sides. The chain and iSeg have no
    limit but the result of the products that define them; it is the chain's from right to left."""
    Q, K, G = (x.double() for x in problem.draw())
    G = G / G.sum(-1, keepdim=True)
    far = math.ceil(math.log(1e-9) / math.log(problem.alpha))
    found = {"nerve": problem.refine(Q, K, G, KERNEL, far).P}
    for side, kernel in LOW_RANK_KERNELS.items():
        found[side] = problem.refine(Q, K, G, kernel, far, operator="low rank").P
    found["iseg"] = plain_walks.iseg(Q, K, G)
    P = G
    for q, k in zip(Q.flip(0), K.flip(0), strict=True):
        P = plain_walks.thresholded_maps(q[None], k[None])[0] @ P
    found["chain"] = P
    return found


def walk_sides(problem: Problem, steps: dict[str, int]) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Every side as a function of Q, K and G. Ours keep their memory from call to call, as from frame to frame."""

    def ours(kernel: str, count: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        workspace = Workspace()
        return lambda Q, K, G: problem.refine(Q, K, G, kernel, count, workspace=workspace).P

    return {
        "nerve": ours(KERNEL, steps["nerve"]),
        **{side: ours(kernel, steps[side]) for side, kernel in LOW_RANK_KERNELS.items()},
        "iseg": plain_walks.iseg,
        "dense": lambda Q, K, G: problem.dense(Q, K, G, steps["dense"]),
        "dense, heads fused": lambda Q, K, G: problem.dense(Q, K, G, steps["dense"], fuse_heads=True),
        "chain": plain_walks.chain,
    }


def timed(run: Callable[[], Any], device: str) -> float:
    """ms of one call, the device's work included."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    begun = time.perf_counter()
    run()
    wait()
    return 1e3 * (time.perf_counter() - begun)


def interleaved(runs: dict[Any, Callable[[], Any]], device: str, repeats: int) -> dict[Any, float]:
    """Median ms of each of some calls, taken in turn, so that what else the machine does hits all of them. Each was
    made once before."""
    taken = [{name: timed(run, device) for name, run in runs.items()} for _ in range(repeats)]
    return {name: float(np.median([turn[name] for turn in taken])) for name in runs}


def peak_memory_apart(problem: Problem, side: str, steps: dict[str, int]) -> float:
    """By how many MB one call of a side raises the memory of a fresh process: resident on the CPU, allocated on CUDA.

    Raises RuntimeError where that process fails.
    """
    task = json.dumps({"problem": asdict(problem), "side": side, "steps": steps})
    # Large blocks go back to the system when they are freed: what earlier ones left behind is not built upon.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, **allocator, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", f"{__package__}.walk", task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the memory of {side} could not be measured: {done.stderr.strip()[-2000:]}")
    return float(done.stdout.split()[-1])


@torch.inference_mode()
def peak_memory(problem: Problem, side: str, steps: dict[str, int]) -> float:
    """`peak_memory_apart`, in this process, whose peak must not have been reached before."""
    small = Problem(**{**asdict(problem), "grid": 8})
    walk_sides(small, steps)[side](*small.draw())  # what libraries allocate once is no memory of the walk
    inputs = problem.draw()
    run = walk_sides(problem, steps)[side]
    if problem.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        run(*inputs)
        return (torch.cuda.max_memory_allocated() - allocated) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    before = status_mb("VmRSS")
    run(*inputs)
    return status_mb("VmHWM") - before


def fitted_exponent(milliseconds: dict[str, float]) -> float:
    """The slope of log time over log N, by least squares, for times by the side of a square grid."""
    tokens = [int(grid) ** 2 for grid in milliseconds]
    return float(np.polyfit(np.log(tokens), np.log(list(milliseconds.values())), 1)[0])


@torch.inference_mode()
def compare_walks(
    grid: int = 64,
    names: int = 21,
    device: str = "cpu",
    *,
    repeats: int = 5,
    large: bool = False,
    said: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time and memory of every side on one made-up scene of grid x grid tokens and `names` classes.

    Every NERVE side takes as many steps as bring its worst row within 1e-3 in L1 of its own infinite walk; the chain
    and iSeg take the products that define them. Times start at Q, K and G. large: measure ours at 128 x 128 tokens and
    60 names too, which takes minutes on a CPU. said: called with each thing that is done. Returns plain values,
    ready for JSON.
    """
    load = os.getloadavg()[0]
    problem = Problem(grid, names, device=device)
    Q, K, G = problem.draw()
    said("finding each side's limit")
    limit = limits(problem)
    steps = {
        "nerve": steps_to(problem, KERNEL, fixed_point, limit["nerve"]),
        "dense": steps_to(problem, KERNEL, truncated, limit["nerve"]),
        **{side: steps_to(problem, kernel, fixed_point, limit[side]) for side, kernel in LOW_RANK_KERNELS.items()},
    }
    walks = walk_sides(problem, steps)
    of = {"dense": "nerve", "dense, heads fused": "nerve"}
    errors = {side: row_error(run(Q, K, G), limit[of.get(side, side)]) for side, run in walks.items()}
    said("timing every side in turn")
    times = interleaved({side: partial(run, Q, K, G) for side, run in walks.items()}, device, repeats)
    said("measuring memory, each side in a process of its own")
    memory = {side: peak_memory_apart(problem, side, steps) for side in walks}
    said("timing the low-rank walk on grids of other sizes")
    scaling = _scaling(problem, steps, repeats)
    kernels = {"nerve": KERNEL, **LOW_RANK_KERNELS}
    result = {
        "speedup_vs_dense": times["dense"] / times["nerve"],
        "speedup_vs_dense_heads_fused": times["dense, heads fused"] / times["nerve"],
        "speedup_vs_chain": times["chain"] / times["nerve"],
        "speedup_vs_iseg": times["iseg"] / times["nerve"],
        "speedup_low_rank_vs_chain": times["chain"] / times["low rank"],
        "speedup_favor_vs_chain": times["chain"] / times["favor"],
        "memory_vs_dense": memory["nerve"] / memory["dense"],
        "exponent": fitted_exponent(scaling["low rank"]),
        "exponent_favor": fitted_exponent(scaling["favor"]),
        "times_ms": times,
        "memory_mb": memory,
        "steps": steps | {"iseg": plain_walks.ISEG_PRODUCTS, "chain": problem.heads},
        "errors": errors,
        "kernels": kernels,
        "operators": {side: problem.refine(Q, K, G, kernel, steps[side]).operator for side, kernel in kernels.items()},
        "scaling_ms": scaling,
        "effective_tokens": effective_tokens(Q, K),
        "problem": asdict(problem),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "load": load,
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }
    if large:
        said(f"measuring ours at {LARGE_GRID} x {LARGE_GRID} tokens")
        result["large"] = _large(problem, steps)
    return result


def _scaling(problem: Problem, steps: dict[str, int], repeats: int) -> dict[str, dict[str, float]]:
    """Median ms of each low-rank walk, forced, by the grid's side."""

    def walk(side: str, grid: int) -> Callable[[], Any]:
        sized = Problem(**{**asdict(problem), "grid": grid})
        inputs = sized.draw()
        return lambda: sized.refine(*inputs, LOW_RANK_KERNELS[side], steps[side], operator="low rank")

    walks = {(side, grid): walk(side, grid) for side in LOW_RANK_KERNELS for grid in SCALING_GRIDS}
    for run in walks.values():
        run()
    times = interleaved(walks, problem.device, repeats)
    return {side: {str(grid): times[side, grid] for grid in SCALING_GRIDS} for side in LOW_RANK_KERNELS}


def _large(problem: Problem, steps: dict[str, int]) -> dict[str, Any]:
    """Memory, ms and operator of ours on the large grid."""
    sized = Problem(**{**asdict(problem), "grid": LARGE_GRID, "names": LARGE_NAMES})
    found: dict[str, Any] = {}
    for side, kernel in {"nerve": KERNEL, **LOW_RANK_KERNELS}.items():
        Q, K, G = sized.draw()
        refined: list[Refinement] = []

        def walk(run: Callable[[], Refinement], results: list[Refinement]) -> None:
            results.append(run())

        run = partial(sized.refine, Q, K, G, kernel, steps[side])
        found[side] = {
            "ms": timed(partial(walk, run, refined), sized.device),
            "memory_mb": peak_memory_apart(sized, side, steps),
            "operator": refined[0].operator,
        }
    return {"grid": LARGE_GRID, "names": LARGE_NAMES, "sides": found}


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(peak_memory(Problem(**task["problem"]), task["side"], task["steps"]))
