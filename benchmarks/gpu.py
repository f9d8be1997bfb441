"""Every GPU figure in one run of a few minutes: `python -m benchmarks.gpu --out gpu.json` in a clone's top folder.

Needs PyTorch for CUDA, diffusers, transformers, numpy, OpenCV, typer, rich and 4 GB of disk; no network, no weights, no
ROS. Prints the table that docs/benchmarks.md holds and writes the figures as JSON.
"""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from nerve_core.console import PlainConsole
from nerve_core.models.loading import quiet_libraries
from nerve_core.output import claim, write

from .ceiling import ceiling
from .frame import compare, measure_apart
from .random_pair import write_random_pair
from .task import Task
from .walk import compare_walks

console = PlainConsole(stderr=True)
HD, VGA = (1080, 1920), (480, 640)


def main(
    out: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path("gpu.json"),
    pair: Annotated[str, typer.Option(help="Which pair's architectures.")] = "sd21-clipl14",
    folder: Annotated[Path | None, typer.Option(help="Keep the random pair here, and take it from here.")] = None,
    device: str = "cuda",
    frames: Annotated[int, typer.Option(min=3, help="Frames timed a case.")] = 100,
    grid: Annotated[int, typer.Option(min=4, help="Tokens a side of the walk's grid.")] = 64,
    compile: Annotated[bool, typer.Option(help="Time torch.compile too, which takes minutes more.")] = False,
) -> None:
    """Measure frames, the vocabulary and the walk on one GPU."""
    claim([out])
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        if not (place / "pair.json").is_file():
            with console.status(f"writing {pair} with random weights to {place}"):
                write_random_pair(pair, place)
        figures: dict[str, Any] = {"machine": machine(device), "ceiling": ceiling(device), "pair": pair, "frames": {}}
        cases: dict[str, dict[str, Any]] = {
            "21 names, 640 x 480": {"plain": True},
            "60 names": {"count": 60},
            "150 names": {"count": 150},
            "21 names, 1920 x 1080": {"size": HD},
            "21 names, networks in turn": {"options": {"overlap": False}},
            "21 names, bf16": {"precision": "bf16"},
            "21 names, fp32": {"precision": "fp32"},
        }
        if compile:
            cases["21 names, torch.compile"] = {"options": {"compile": True}}
        for case, changes in cases.items():
            settings = {"plain": False, "size": VGA, "frames": frames, "warm_up": 10, **changes}
            with console.status(case):
                figures["frames"][case] = compare(str(place), device=device, **settings)
            console.print(f"{case}: {figures['frames'][case]['p50_ms']:.1f} ms")
            write(out, json.dumps(figures, indent=2))
        with console.status("checks and the vocabulary"):
            task = Task("checks", str(place), device, "fp16", 21, VGA, 0, 0, {})
            figures["checks"] = measure_apart(task)
        with console.status("the walk"):
            figures["walk"] = compare_walks(grid, 21, device)
    write(out, json.dumps(figures, indent=2))
    print(table(figures))


def machine(device: str) -> dict[str, str]:
    """What the figures were taken with."""
    import diffusers
    import transformers

    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    made_with = ", ".join(f"{name} {value}" for name, value in figures["machine"].items())
    lines = [
        f"{figures['pair']}, random weights; {made_with}",
        "",
        "| case | p50 ms | p95 ms | frames/s | peak MB | load s |",
        "|---|---|---|---|---|---|",
    ]
    for case, row in figures["frames"].items():
        lines.append(_row(case, row))
        if "baseline_p50_ms" in row:
            baseline = {
                key.removeprefix("baseline_"): value for key, value in row.items() if key.startswith("baseline_")
            }
            lines.append(_row("plain diffusers + transformers, fp16", baseline))
    lines += ["", "| stage (networks in turn) | p50 ms | p95 ms |", "|---|---|---|"]
    for stage, row in figures["frames"]["21 names, networks in turn"]["stages"].items():
        lines.append(f"| {stage} | {row['p50_ms']:.2f} | {row['p95_ms']:.2f} |")
    scalars = {**figures["ceiling"], **figures["checks"], **figures["walk"]}
    lines += ["", *(f"- {name}: {value:.4g}" for name, value in scalars.items() if isinstance(value, (int, float)))]
    return "\n".join(lines)


def _row(case: str, row: dict[str, Any]) -> str:
    return (
        f"| {case} | {row['p50_ms']:.1f} | {row['p95_ms']:.1f} | {row['fps']:.1f} | {row['peak_memory_mb']:.0f} | "
        f"{row['load_s']:.1f} |"
    )


if __name__ == "__main__":
    typer.run(main)
