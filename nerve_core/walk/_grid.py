"""Stencils of a token and its eight neighbours on a grid of any aspect: making them and multiplying by them.

A stencil holds nine weights a token, [N, 9], one per place of `OFFSETS`, the token itself in the middle
(`CENTRE`). Tokens are numbered row by row. Places outside the grid are dropped, never wrapped: their weight
is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSETS: tuple[tuple[int, int], ...] = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))
"""(rows down, columns right) of each place."""
CENTRE = OFFSETS.index((0, 0))


def _windows(x: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """Nine shifted views of x [..., N], as images: view o holds at token i what x has at i + OFFSETS[o].

    Outside the grid they hold 0.
    """
    rows, columns = grid
    padded = F.pad(x.reshape(*x.shape[:-1], rows, columns), (1, 1, 1, 1))
    return [padded[..., 1 + down : 1 + down + rows, 1 + right : 1 + right + columns] for down, right in OFFSETS]


def inside(grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Bool [N, 9]: whether each place of the stencil lies on the grid."""
    ones = torch.ones(grid[0] * grid[1], device=device)
    return torch.stack(_windows(ones, grid), dim=-1).reshape(-1, len(OFFSETS)) > 0


def neighbour_products(left: Tensor, right: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inner product of left [N, R] at each token with right [N, R] at its nine places: [N, 9], 0 outside."""
    image = left.t().contiguous().reshape(-1, *grid)  # [R, rows, columns]
    products = [(image * window).sum(0) for window in _windows(right.t(), grid)]
    return torch.stack(products, dim=-1).reshape(-1, len(OFFSETS))


def apply_stencil(stencil: Tensor, X: Tensor, grid: tuple[int, int]) -> Tensor:
    """A stencil [N, 9] times X [N, C]: out[i] = sum_o stencil[i, o] X[i + o], each column contiguous."""
    weights = stencil.t().reshape(-1, *grid)  # [9, rows, columns]
    windows = _windows(X.t(), grid)
    out = windows[0] * weights[0]  # [C, rows, columns]
    for weight, window in zip(weights[1:], windows[1:], strict=True):
        out.addcmul_(window, weight)
    return out.flatten(1).t()


def add_stencil_(block: Tensor, stencil: Tensor, grid: tuple[int, int], first_row: int = 0) -> Tensor:
    """Add a stencil [N, 9] to block [B, N], the rows of an [N, N] matrix from `first_row` on, in place."""
    height, tokens = block.shape
    for place, (down, right) in enumerate(OFFSETS):
        offset = down * grid[1] + right
        first = max(first_row, -offset)
        last = min(first_row + height, tokens - max(offset, 0))
        if first < last:
            block.diagonal(first_row + offset).add_(stencil[first:last, place])
    return block
