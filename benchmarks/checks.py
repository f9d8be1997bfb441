"""Checks of a device's figures: do precisions agree, does a frame wait for the device, what does a vocabulary cost."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nerve_core import Segmenter, Vocabulary

from .task import Task, names, picture


def run_checks(task: Task) -> dict[str, Any]:
    """Shares of labels that agree with float32's and with an unoverlapped run's, hidden synchronisations of a frame (on
    CUDA), and ms for new and for known vocabularies."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NERVE_CACHE"] = cache
        result: dict[str, Any] = {}
        image, vocabulary = picture(task.size), Vocabulary(names(task.names))
        labels = {}
        for case, precision, options in (
            ("fp32", "fp32", {}),
            ("networks in turn", task.precision, {"overlap": False}),
            ("as used", task.precision, task.options),
        ):
            segmenter = Segmenter.from_pretrained(
                task.pair, device=task.device, dtype=precision, offline=True, **options
            )
            if case == "as used":
                result |= _vocabulary(segmenter, vocabulary)
            segmenter.warm_up(task.size)
            labels[case] = segmenter(image, vocabulary).labels
            if case == "as used" and segmenter.device.type == "cuda":
                result["hidden synchronisations a frame"] = _synchronisations(partial(segmenter, image, vocabulary))
            segmenter.close()
        used = labels.pop("as used")
        return result | {f"labels as in {case}": float((used == other).mean()) for case, other in labels.items()}


def _vocabulary(segmenter: Segmenter, vocabulary: Vocabulary) -> dict[str, float]:
    """Ms for 20 new names and the longest step of it, which a frame may have to wait for; for names in memory."""
    lasted = _steps(segmenter, Vocabulary([f"thing {number}" for number in range(20)], negatives=()))
    segmenter.embed(vocabulary)
    other_order = Vocabulary(vocabulary.names[::-1])
    return {
        "20 new names, ms": sum(lasted),
        "20 new names, longest step, ms": max(lasted),
        "other vocabulary of known names, ms": _ms(partial(segmenter.embed, other_order)),
        "vocabulary seen before, ms": _ms(partial(segmenter.embed, vocabulary)),
    }


def _steps(segmenter: Segmenter, vocabulary: Vocabulary) -> list[float]:
    """Ms of each step of embedding a vocabulary."""
    steps, lasted, begun = segmenter.embed_steps(vocabulary), [], time.perf_counter()
    for _ in steps:
        lasted.append(1e3 * (time.perf_counter() - begun))
        begun = time.perf_counter()
    return [*lasted, 1e3 * (time.perf_counter() - begun)]


def _ms(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begun)


def _synchronisations(work: Callable[[], object]) -> int:
    """Times that PyTorch makes the host wait for the device, the one that a frame ends with not counted.

    PyTorch's debug mode warns of that one too where it warns of `Stream.synchronize`, which depends on its version.
    """
    return _flagged(work) - _flagged(lambda: torch.cuda.current_stream().synchronize())


def _flagged(work: Callable[[], object]) -> int:
    """How many waits PyTorch's debug mode warns of."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
