"""Measure the node under a camera that is much too fast: how old masks get, its memory and its processor time.

`python -m nerve_benchmarks.overload`, or `python -m benchmarks.overload` in a clone's top folder.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from nerve_core.console import PlainConsole

from .node import SIZES, Bench, running_bench

MULTIPLES = (10, 100)
"""How many times as fast as inference the camera is asked to be."""
COUNTS = ("images_received", "images_segmented", "images_dropped", "images_rejected", "errors")


def resident_mb(process: int) -> float:
    """Memory of a process that is in RAM, shared memory that it touched included, in MB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def thread_seconds(process: int) -> dict[int, tuple[str, float]]:
    """Name and processor seconds of every thread of a process, by its number."""
    ticks, found = os.sysconf("SC_CLK_TCK"), {}
    for folder in Path(f"/proc/{process}/task").iterdir():
        try:
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        user, system = rest.split()[11:13]
        found[int(folder.name)] = (name, (int(user) + int(system)) / ticks)
    return found


class Memory:
    """The greatest resident memory of a process, looked at ten times a second until closed."""

    def __init__(self, process: int) -> None:
        self.first_mb = self.most_mb = resident_mb(process)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(process,), daemon=True)
        self._thread.start()

    def _look(self, process: int) -> None:
        while not self._stop.wait(0.1):
            self.most_mb = max(self.most_mb, resident_mb(process))

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()


def overload(bench: Bench, size: tuple[int, int], rate: float, seconds: float) -> dict[str, Any]:
    """What `seconds` of a camera of `rate` images a second do to the node; ages in ms, processor time in cores."""
    process = bench.node.process.pid
    threads = bench.node.ask(do="threads")
    before = bench.listener.fresh_figures()
    bench.timings()
    bench.listener.ages.clear()
    memory, spent, started = Memory(process), thread_seconds(process), time.monotonic()
    bench.camera.ask(do="start", size=size, encoding="rgb8", rate=rate)
    time.sleep(seconds)
    cores = time.monotonic() - started
    spent_after = thread_seconds(process)
    camera = bench.camera.ask(do="stop")
    rows, ages = bench.timings(), 1e3 * np.array(bench.listener.ages)
    after = idle_figures(bench)
    memory.close()
    gained = {name: int(after[name]) - int(before[name]) for name in COUNTS}
    shares: defaultdict[str, float] = defaultdict(float)
    for number, (name, total) in spent_after.items():
        role = next((role for role, known in threads.items() if known == number), None)
        kind = role or ("dds" if name.startswith("dds") else "other")
        shares[kind] += (total - spent.get(number, (name, 0.0))[1]) / cores
    inference = float(np.median(rows[:, 2]))
    return {
        "size": list(size),
        "asked_rate": rate,
        "rate": camera["rate"],
        "sent": camera["sent"],
        **gained,
        "unaccounted": gained["images_received"]
        - gained["images_segmented"]
        - gained["images_dropped"]
        - gained["images_rejected"],
        "infer_ms": inference,
        "age_p50_ms": float(np.quantile(ages, 0.5)),
        "age_p99_ms": float(np.quantile(ages, 0.99)),
        "age_p50_inferences": float(np.quantile(ages, 0.5)) / inference,
        "age_p99_inferences": float(np.quantile(ages, 0.99)) / inference,
        "memory_before_mb": memory.first_mb,
        "memory_most_mb": memory.most_mb,
        "memory_after_mb": resident_mb(process),
        "cores": {kind: round(share, 3) for kind, share in sorted(shares.items())},
    }


def idle_figures(bench: Bench) -> dict[str, str]:
    """The node's figures once it has nothing left to do: they say the same three times in a row."""
    figures, same = bench.listener.fresh_figures(), 0
    while same < 2:
        newer = bench.listener.fresh_figures()
        same = same + 1 if all(newer[name] == figures[name] for name in COUNTS) else 0
        figures = newer
    return figures


def main(
    seconds: Annotated[float, typer.Option(min=2.0, help="How long each camera runs.")] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on the last line.")] = False,
) -> None:
    """Run cameras 10 and 100 times as fast as inference, from 640 x 480 to 4K, and measure the node."""
    from nerve_ros.demo.processes import own_domain

    console, load, found = PlainConsole(stderr=as_json), os.getloadavg()[0], []
    with own_domain() as domain, running_bench(domain) as bench:
        for size in SIZES:
            alone = bench.inference_ms(size)
            for multiple in MULTIPLES:
                with console.status(f"{size[0]} x {size[1]}, {multiple} times too fast"):
                    row = overload(bench, size, multiple * 1e3 / alone, seconds)
                found.append({"multiple": multiple, "infer_alone_ms": alone, **row})
    table = Table(title=f"load average at the start {load:.1f}", title_justify="left")
    for column in ("camera", "images/s", "received", "segmented", "inference ms", "age p50 (p99)", "MB", "receiving"):
        table.add_column(column, justify="left" if column == "camera" else "right")
    for row in found:
        table.add_row(
            f"{row['size'][0]} x {row['size'][1]}, x {row['multiple']}",
            f"{row['rate']:.0f} of {row['asked_rate']:.0f}",
            str(row["images_received"]),
            str(row["images_segmented"]),
            f"{row['infer_ms']:.0f} (alone {row['infer_alone_ms']:.0f})",
            f"{row['age_p50_inferences']:.2f} ({row['age_p99_inferences']:.2f})",
            f"{row['memory_before_mb']:.0f}, {row['memory_most_mb']:.0f}, {row['memory_after_mb']:.0f}",
            f"{row['cores']['receiving']:.2f}",
        )
    console.print(table)
    console.print("Age in the same run's median inferences; MB before, most, after; cores of the receiving thread.")
    if as_json:
        print(json.dumps({"load": load, "rows": found}))


if __name__ == "__main__":
    typer.run(main)
