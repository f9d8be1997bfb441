"""What both trainings share: mini-batches of scenes, a time budget that sets the learning rate, averaged weights,
checkpoints."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Generic, TypeVar

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from generate import OBJECTS

Network = TypeVar("Network", bound=nn.Module)


class Scenes:
    """Random cuts of the training scenes: images float32 [B, 3, h, w] in 0..1 and labels int64 [B, h, w]."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy", mmap_mode="r")
        self.rng = np.random.default_rng(seed)

    def batch(
        self,
        count: int,
        size: tuple[int, int],
        least: float,
        *,
        window: tuple[int, int] | None = None,
        cell: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """`count` views of frames, each enlarged so that it shows `least`..1 of its sides at `size` pixels; half are
        mirrored.

        window: rows and columns of a part of the view, placed on multiples of `cell`, of two the one with more objects;
        None takes the whole view. Returns images, labels, and the windows' top left corners int [count, 2] in pixels.
        """
        rows, columns = self.images.shape[1:3]
        height, width = window or size
        images = np.empty((count, height, width, 3), np.float32)
        labels = np.empty((count, height, width), np.uint8)
        corners = np.empty((count, 2), np.int64)
        for k in range(count):
            index, part = int(self.rng.integers(len(self.images))), self.rng.uniform(least, 1)
            room = [(whole - part) // cell + 1 for whole, part in zip(size, (height, width), strict=True)]
            scale = np.array((rows, columns)) / size * part  # pixels of the frame a pixel of the view
            shift = self.rng.uniform(0, 1, 2) * np.array((rows, columns)) * (1 - part)
            step = int(self.rng.choice((-1, 1)))
            best = -1
            for _ in range(1 if window is None else 2):
                corner = self.rng.integers(0, room) * cell
                top, left = np.round(shift + corner * scale).astype(int)
                bottom, right = np.round((top, left) + np.array((height, width)) * scale).astype(int)
                cut = self.labels[index, top:bottom, left:right]
                if (filled := np.count_nonzero(cut < OBJECTS)) > best:
                    best, corners[k], place, label = (
                        filled,
                        corner,
                        (index, slice(top, bottom), slice(left, right)),
                        cut,
                    )
            image = cv2.resize(self.images[place], (width, height), interpolation=cv2.INTER_LINEAR)[:, ::step]
            label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)[:, ::step]
            gain, lift = self.rng.uniform(0.85, 1.15) / 255, self.rng.uniform(-0.06, 0.06)
            images[k], labels[k] = np.clip(image * gain + lift, 0, 1), label
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long(), corners


def fractions(labels: torch.Tensor, classes: int, cell: int) -> torch.Tensor:
    """Share of every class in every square cell: int64 [B, h, w] -> float32 [B, tokens, classes]."""
    shares = F.avg_pool2d(F.one_hot(labels, classes).permute(0, 3, 1, 2).float(), cell)
    return shares.flatten(2).transpose(1, 2)


class Training(Generic[Network]):
    """AdamW on a cosine schedule over a time budget, with averaged weights and checkpoints that a restart goes on
    from."""

    def __init__(self, model: Network, checkpoint: Path, seconds: float, rate: float, decay: float = 0.01) -> None:
        self.model, self.checkpoint, self.seconds, self.rate = model, checkpoint, seconds, rate
        self.optimiser = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=rate,
            weight_decay=decay,
            betas=(0.9, 0.98),
        )
        self.averaged = copy.deepcopy(model).requires_grad_(False)
        self.step, self.spent, self.saved = 0, 0.0, 0.0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            model.load_state_dict(state["model"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.spent = state["step"], state["spent"]
            self.saved = self.spent

    def running(self) -> bool:
        """Start a step; False once the budget is spent."""
        self.began = time.perf_counter()
        return self.spent < self.seconds

    def update(self, loss: torch.Tensor) -> None:
        """End a step: one move down the gradient."""
        part = min(1.0, self.spent / self.seconds)
        rate = self.rate * min(1.0, (self.step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * part)))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        keep = min(0.998, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for mean, value in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
        self.step += 1
        self.spent += time.perf_counter() - self.began
        if self.spent - self.saved > 120:
            self.save()

    def save(self) -> None:
        self.saved = self.spent
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "spent": self.spent,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)
