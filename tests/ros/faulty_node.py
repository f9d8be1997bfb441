"""The real node with faults put in from outside: whatever can fail in it fails on command.

Reads a line of JSON at a time from standard input and answers "faults: ..." once it holds:
{"clip": ["out of memory", 3]}: what happens at that place, and to how many of those who come by; {} ends all of it,
hanging included. Says "fault at clip" each time. {"constants": {"nerve_ros.graph.NAMESAKE_WARNING": 1.0}} sets
constants, {"pretend": "cuda:0"} has models loaded from now on say that they are there. Ends when standard input does.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable

# As the node does, before torch reads them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from nerve_core import readout, segmenter
from nerve_core.networks import dense_clip, diffusion, frame
from nerve_core.text import cache as text_cache
from nerve_core.text import encoder
from nerve_ros.node import main
from nerve_ros.outputs import Outputs

PLACES = {
    "preprocess": (frame, "_pixels"),
    "clip": (dense_clip.DenseClip, "embed"),
    "diffusion": (diffusion.DiffusionTaps, "project"),
    "probabilities": (dense_clip.DenseClip, "probabilities"),
    "refine": (segmenter, "refine"),
    "edges": (segmenter, "carry_labels"),
    "readout": (segmenter, "read_out"),
    "to_host": (readout.Readout, "to_host"),
    "text": (encoder.TextEncoder, "_embed"),
    "warm_up": (segmenter.Segmenter, "warm_up"),
    "load_clip": (segmenter, "load_clip"),
    "load_diffusion": (segmenter, "load_diffusion"),
    "publish": (Outputs, "image"),
    "label_info": (Outputs, "label_info"),
}
"""Where something can be made to happen: before the function that stands there."""
ERRORS = {
    "out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. (simulated)"),
    "out of host memory": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory (simulated)"),
    "error": lambda: RuntimeError("simulated fault"),
}
faults: dict[str, list] = {}
changed = threading.Condition()
pretended = ""


def happen(place: str) -> None:
    """Do at `place` what was asked for."""
    with changed:
        what, left = faults.get(place, (None, 0))
        if not left:
            return
        faults[place][1] -= 1
        print(f"fault at {place}", flush=True)
        if what == "hang":
            changed.wait_for(lambda: place not in faults)
            return
    raise ERRORS[what]()


def faulty(place: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*arguments, **named):
        happen(place)
        return function(*arguments, **named)

    return wrapped


class Pretending:
    """A segmenter on the CPU that says it is elsewhere."""

    def __init__(self, real: segmenter.Segmenter, device: str) -> None:
        vars(self).update(real=real, device=torch.device(device))

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.real, name, value)


def loading(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(pair: str, *, device: str, **named):
        made = function(pair, device=device if not pretended else "cpu", **named)
        return Pretending(made, pretended) if pretended and device != "cpu" else made

    return wrapped


def full_disk(connect: Callable) -> Callable:
    """Databases that cannot grow: SQLite then says itself that the disk is full."""

    @functools.wraps(connect)
    def wrapped(*arguments, **named):
        made = connect(*arguments, **named)
        if "disk" in faults:
            made.execute("PRAGMA max_page_count = 1")
        return made

    return wrapped


class Sqlite:
    """The module sqlite3 as text_cache sees it."""

    connect = staticmethod(full_disk(sqlite3.connect))

    def __getattr__(self, name: str) -> object:
        return getattr(sqlite3, name)


def obey() -> None:
    global pretended
    for line in sys.stdin:
        asked = json.loads(line)
        for name, value in asked.pop("constants", {}).items():
            module, _, constant = name.rpartition(".")
            setattr(importlib.import_module(module), constant, value)
        pretended = asked.pop("pretend", pretended)
        with changed:
            faults.clear()
            faults.update({place: list(what) for place, what in asked.items()})
            changed.notify_all()
        print(f"faults: {line.strip()}", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20.0)
    os._exit(1)


if __name__ == "__main__":
    for place, (owner, name) in PLACES.items():
        setattr(owner, name, faulty(place, getattr(owner, name)))
    segmenter.Segmenter.from_pretrained = staticmethod(loading(segmenter.Segmenter.from_pretrained))
    text_cache.sqlite3 = Sqlite()
    threading.Thread(target=obey, daemon=True).start()
    sys.exit(main())
