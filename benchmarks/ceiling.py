"""What a device can do at best: products and copies of large tensors, to compare measured stages with.

`python -m nerve_benchmarks.ceiling [DEVICE]`, or `python -m benchmarks.ceiling` in a clone's top folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = 2**29


@torch.inference_mode()
def ceiling(device: str) -> dict[str, float]:
    """GFLOP/s of a square product in each precision that the networks can be run in, and GB/s of a copy (read and
    written bytes together)."""
    kind = torch.device(device).type
    side = SIDE[kind]
    found = {}
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] if kind == "cuda" else [])):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = least_seconds(partial(torch.matmul, a, b), kind)
        found[f"{str(dtype).removeprefix('torch.')} GFLOP/s"] = 2 * side**3 / seconds / 1e9
    source, target = (torch.ones(COPY_BYTES // 4, device=device) for _ in range(2))
    found["copy GB/s"] = 2 * COPY_BYTES / least_seconds(lambda: target.copy_(source), kind) / 1e9
    return found


def least_seconds(work: Callable[[], object], kind: str, repeats: int = 7) -> float:
    """The least seconds of some runs, after one."""
    times = []
    for _ in range(repeats + 1):
        if kind == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


if __name__ == "__main__":
    print(json.dumps(ceiling(sys.argv[1] if len(sys.argv) > 1 else "cpu"), indent=1))
