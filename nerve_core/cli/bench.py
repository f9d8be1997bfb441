"""`nerve bench`: speed and memory on this machine, beside plain versions of other methods."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.table import Table

from ..console import console

bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")


def load_benchmark(name: str) -> ModuleType:
    """A module of the benchmarks, by name; raises RuntimeError where they are not installed."""
    try:
        return importlib.import_module(f"nerve_benchmarks.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "nerve_benchmarks":
            raise
        raise RuntimeError(
            "the benchmarks are not installed here; install this package from its clone, by scripts/setup or pip"
        ) from error


@bench.command()
def walk(
    grid: Annotated[int, typer.Option(min=4, help="Tokens a side of the square grid.")] = 64,
    names: Annotated[int, typer.Option(min=1, help="How many names are asked for.")] = 21,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="How often each side is timed, in turn with the others.")] = 5,
    large: Annotated[bool, typer.Option("--large", help="Measure ours at 128 x 128 tokens and 60 names too.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON object on the last line.")
    ] = False,
) -> None:
    """Time the walk from Q, K and G beside plain versions of other refinements, on a made-up scene."""
    compare_walks = load_benchmark("walk").compare_walks
    from ..segmenter import find_device

    chosen = str(find_device(device))
    with console.status("drawing the scene") as status:
        found = compare_walks(grid, names, chosen, repeats=repeats, large=large, said=status.update)
    console.print(_walk_table(found))
    _print_ratios(found)
    _warn_if_busy(found["load"])
    if as_json:
        print(json.dumps(found))


def _walk_table(found: dict[str, Any]) -> Table:
    """Every side's time, memory, steps and error."""
    titles = {
        "nerve": "NERVE",
        "low rank": "NERVE",
        "favor": "NERVE",
        "iseg": "iSeg",
        "dense": "dense, per head",
        "dense, heads fused": "dense, heads fused",
        "chain": "CLIPer's chain",
    }
    problem = found["problem"]
    table = Table(
        title=f"{problem['grid']} x {problem['grid']} tokens, {problem['heads']} heads of {problem['size']}, "
        f"{problem['names']} names, {problem['device']}, {found['threads']} threads, float32",
        title_justify="left",
    )
    table.add_column("refinement")
    table.add_column("kernel")
    table.add_column("S")
    for column in ("steps", "ms", "peak MB", "L1 error"):
        table.add_column(column, justify="right")
    for side, milliseconds in found["times_ms"].items():
        steps = found["steps"].get(side, found["steps"]["dense"])
        table.add_row(
            titles[side],
            found["kernels"].get(side, "softmax"),
            found["operators"].get(side, "one product" if side in ("iseg", "chain") else "dense"),
            str(steps),
            f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.2f}",
            f"{found['memory_mb'][side]:.0f}",
            f"{found['errors'][side]:.0e}",
        )
    return table


def _print_ratios(found: dict[str, Any]) -> None:
    """What the table amounts to, in words."""
    console.print(
        f"NERVE is {found['speedup_vs_dense']:.1f} times as fast as dense per head "
        f"({found['speedup_vs_dense_heads_fused']:.1f} with heads fused), "
        f"{found['speedup_vs_chain']:.1f} times as fast as the chain, {found['speedup_vs_iseg']:.2f} times as fast as "
        f"iSeg; it takes {found['memory_vs_dense']:.2f} of dense's memory.",
    )
    for title, suffix, side in (("Low rank", "low_rank", "low rank"), ("With random features, it", "favor", "favor")):
        ms = ", ".join(f"{value:.0f} at {grid}" for grid, value in found["scaling_ms"][side].items())
        console.print(
            f"{title} is {found[f'speedup_{suffix}_vs_chain']:.0f} times as fast as the chain; its time grows as N to "
            f"the {found['exponent_favor' if side == 'favor' else 'exponent']:.2f} (ms by tokens a side: {ms}).",
        )
    large = found.get("large", {})
    for side, row in large.get("sides", {}).items():
        console.print(
            f"At {large['grid']} tokens a side and {large['names']} names, {side}: {row['operator']}, "
            f"{row['ms'] / 1e3:.1f} s, {row['memory_mb']:.0f} MB.",
        )


@bench.command()
def frame(
    model: Annotated[str, typer.Option(help="A model pair's name, or a folder with a pair.json.")] = "sd21-clipl14",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Make weights up (3.5 GB on disk), where there are none to fetch.")
    ] = False,
    folder: Annotated[Path | None, typer.Option(help="Where random weights are kept from run to run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32; by default as a user gets it.")] = None,
    names: Annotated[int, typer.Option(min=1, max=160, help="How many names are asked for.")] = 21,
    size: Annotated[str, typer.Option(help="Of the image, as WIDTHxHEIGHT.")] = "640x480",
    frames: Annotated[int | None, typer.Option(min=1, help="Frames timed; by default 5 on a CPU, else 100.")] = None,
    plain: Annotated[bool, typer.Option(help="Measure plain diffusers and transformers too (12 GB on a CPU).")] = True,
    compile: Annotated[bool, typer.Option("--compile", help="Run ours through torch.compile.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON object on the last line.")
    ] = False,
) -> None:
    """Time a whole frame beside plain diffusers and transformers, each in a process of its own."""
    benchmark = load_benchmark("frame")
    from ..models.loading import quiet_libraries
    from ..segmenter import find_device

    quiet_libraries()
    columns, _, rows = size.partition("x")
    if not (columns.isdigit() and rows.isdigit() and int(columns) and int(rows)):
        raise ValueError(f"--size {size} is no size; write WIDTHxHEIGHT, as in 640x480")
    chosen = str(find_device(device))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        place: str | Path = model
        if random_weights:
            place = folder or Path(scratch)
            if not (place / "pair.json").is_file():
                with console.status(f"writing {model} with random weights to {place}"):
                    load_benchmark("random_pair").write_random_pair(model, place)
        with console.status("timing frames"):
            found = benchmark.compare(
                str(place),
                device=chosen,
                precision=precision,
                count=names,
                size=(int(rows), int(columns)),
                frames=frames or (5 if chosen == "cpu" else 100),
                warm_up=1 if chosen == "cpu" else 10,
                plain=plain,
                options={"compile": True} if compile else {},
            )
    found["load"] = load
    console.print(_frame_table(found))
    _warn_if_busy(load)
    if as_json:
        print(json.dumps(found))


def _frame_table(found: dict[str, Any]) -> Table:
    """Both sides, and our stages."""
    table = Table(
        title=f"{found['model']}; {found['names']} names, {found['size'][1]} x {found['size'][0]} pixels, "
        f"{found['threads']} threads",
        title_justify="left",
    )
    table.add_column("")
    for column in ("p50 ms", "p95 ms", "frames/s", "peak MB", "load s"):
        table.add_column(column, justify="right")
    for title, prefix in (("NERVE", ""), ("plain diffusers + transformers", "baseline_")):
        if f"{prefix}p50_ms" in found:
            row = {key: found[prefix + key] for key in ("p50_ms", "p95_ms", "fps", "peak_memory_mb", "load_s")}
            table.add_row(
                f"{title}, {found[prefix + 'precision']}",
                f"{row['p50_ms']:.1f}",
                f"{row['p95_ms']:.1f}",
                f"{row['fps']:.2f}",
                f"{row['peak_memory_mb']:.0f}",
                f"{row['load_s']:.1f}",
            )
    table.add_section()
    for stage, row in found["stages"].items():
        share = f"  {stage}, {100 * found['shares'][stage]:.1f} %"
        table.add_row(share, f"{row['p50_ms']:.1f}", f"{row['p95_ms']:.1f}")
    if "speedup" in found:
        table.caption = f"{found['speedup']:.1f} times as fast, in {found['memory_ratio']:.2f} of the memory"
    return table


def _warn_if_busy(load: float) -> None:
    """load: processes that wanted to run before a measurement began."""
    if load > 0.5:
        console.print(
            f"the machine was busy when this began (load {load:.1f} on {os.cpu_count()} processors): "
            "the times are too long, and the ratios uncertain; run it again when the machine is idle",
            style="yellow",
        )
