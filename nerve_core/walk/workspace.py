"""Buffers that are reused from frame to frame: the large tensors between Q, K and S, allocated once."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Named buffers for one stream of frames; each frame overwrites the content of the previous one.

    Fresh pages can cost the CPU more than the arithmetic that fills them. Not safe for use by several threads at once.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor of any content, in the memory last taken under this name if it is enough."""
        size, key = math.prod(shape), (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())
