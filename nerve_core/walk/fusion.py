"""The transition S: the heads' entropy weights (Eq. 12-14), and one operator for all heads, global and local.

S = sum_h w_h (beta S_global^(h) + (1 - beta) S_local^(h)) (Eq. 2, 22) has four forms behind one protocol:
one dense matrix, stacked low-rank factors, rows computed again in each step, or the local stencil alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import _grid
from ._products import linear
from .affinity import KERNELS, Affinity, AffinityConfig
from .workspace import Workspace

DENSE_BYTES = 2**29
"""A dense S is smaller than this: N < 11586 in float32, N < 16384 in float16."""
KEEP_BYTES = 2**27
"""All heads' rows are kept between the passes where they fit in this and a workspace is given."""
CPU_CHUNK_BYTES = 2**23
"""One head's rows processed at a time: within the cache, and few enough chunks that threads rarely synchronise."""
CUDA_CHUNK_BYTES = 2**26
HALF_SCALE = 4096.0
"""Factor on a float16 S: an even share over 64 x 64 tokens is then a normal number."""


@dataclass(frozen=True)
class FusionConfig:
    """How heads, and the global and the local transition, become one S.

    beta: share of the global transition, 0..1 (Eq. 2). c: sharpness of the entropy weights, >= 0 (Eq. 14).
    head_weights: "entropy", "mean", "single" (head 0) or one head's index. combine: "transitions" (Eq. 22) or
    "affinities" (Eq. 15). Raises ValueError.
    """

    beta: float = 0.5
    c: float = 10.0
    head_weights: str | int = "entropy"
    combine: str = "transitions"

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; it must lie in 0..1")
        if not (math.isfinite(self.c) and self.c >= 0):
            raise ValueError(f"c is {self.c}; it must be finite and >= 0 (10 is usual)")
        if isinstance(self.head_weights, int) and not isinstance(self.head_weights, bool):
            known = self.head_weights >= 0
        else:
            known = self.head_weights in ("entropy", "mean", "single")
        if not known:
            choices = "entropy, mean, single or the index of a head (>= 0)"
            raise ValueError(f"head_weights is {self.head_weights!r}; choose {choices}")
        if self.combine not in ("transitions", "affinities"):
            choices = "transitions (Eq. 22) or affinities (Eq. 15)"
            raise ValueError(f"combine is {self.combine!r}; choose {choices}")

    @property
    def single_head(self) -> int | None:
        """The one head that is used; None where all are."""
        if self.head_weights == "single":
            return 0
        return self.head_weights if isinstance(self.head_weights, int) else None


def row_chunks(affinity: Affinity, rows_per_chunk: int | None = None) -> list[slice]:
    """Row ranges that cover the N tokens; None lets one head's rows take the device's chunk of bytes."""
    tokens = affinity.tokens
    if rows_per_chunk is None:
        budget = CUDA_CHUNK_BYTES if affinity.left.is_cuda else CPU_CHUNK_BYTES
        rows_per_chunk = max(16, budget // (tokens * affinity.left.element_size()) // 16 * 16)
    elif rows_per_chunk < 1:
        raise ValueError(f"rows_per_chunk is {rows_per_chunk}; it must be at least 1, or None")
    return [slice(row, min(row + rows_per_chunk, tokens)) for row in range(0, tokens, rows_per_chunk)]


def head_entropies(affinity: Affinity, G: Tensor, rows_per_chunk: int | None = None) -> Tensor:
    """Entropy [H] in nats of one step of each head's global transition, P_1 = S_global G, mean over tokens.

    Eq. 12 and 13. G: [N, C] in the affinity's dtype, rows are distributions.
    """
    columns = G.t().contiguous()  # [C, N]
    totals = [G.new_zeros(()) for _ in range(affinity.heads)]
    if affinity.low_rank:
        for head in range(affinity.heads):
            summary = linear(columns, affinity.right[head].t())  # [C, N] [R, N]^T -> [C, R]
            P1 = linear(summary, affinity.left[head])  # [C, R] [N, R]^T -> [C, N]
            totals[head] = _entropy_sum(P1 / P1.sum(0))  # G's rows sum to 1, so these to the mass
    else:
        for rows in row_chunks(affinity, rows_per_chunk):
            for head in range(affinity.heads):
                A, mass = affinity.rows(head, rows)
                P1 = linear(columns, A)  # [C, N] [B, N]^T -> [C, B]
                totals[head] = totals[head] + _entropy_sum(P1 if mass is None else P1 / mass)
    return torch.stack(totals) / affinity.tokens


def _entropy_sum(P: Tensor) -> Tensor:
    """Sum over tokens of -sum_c p ln p, for P [C, B]; what `raw` leaves below 0 counts as 0."""
    return torch.special.entr(P.clamp_min(0)).sum()


def entropy_weights(entropies: Tensor, c: float) -> Tensor:
    """w = softmax(-c H) over the heads (Eq. 14)."""
    return torch.softmax(-c * entropies, -1)


def head_shares(affinity: Affinity, weights: Tensor, combine: str, rows_per_chunk: int | None = None) -> Tensor:
    """The share [H, N] of each head's transition in each row of the fused one; sums to 1 over the heads.

    `transitions` (Eq. 22): w_h. `affinities` (Eq. 15): summing affinities before normalising weights a
    head's row by its mass too, w_h r_h / sum_k w_k r_k.
    """
    if combine == "transitions":
        return weights[:, None].expand(-1, affinity.tokens)
    heads = range(affinity.heads)
    chunks = row_chunks(affinity, rows_per_chunk)
    log_mass = torch.cat([torch.stack([affinity.log_mass(head, rows) for head in heads]) for rows in chunks], 1)
    return torch.softmax(weights.log()[:, None] + log_mass, 0)


def local_stencil(affinity: Affinity, weights: Tensor, combine: str) -> Tensor:
    """The heads' weighted local transition as ONE stencil [N, 9] whose rows sum to 1 (Eq. 9 with 22 or
    15)."""
    stencils = affinity.stencils()
    if combine == "transitions":
        return torch.einsum("h,hno->no", weights, stencils / stencils.sum(-1, keepdim=True))
    fused = torch.einsum("h,hno->no", weights, stencils)
    return fused / fused.sum(-1, keepdim=True)


class Transition(Protocol):
    """S in any of its forms, rows sum to 1. name: as it is reported."""

    name: str

    def apply(self, X: Tensor) -> Tensor:
        """X [N, C] -> S X [N, C]; fastest, and returned, with each column contiguous."""
        ...


def _fused_rows(affinity: Affinity, shares: Tensor, rows: slice, out: Tensor | None = None) -> Tensor:
    """sum_h shares[h] S_global^(h) for some rows: [B, N]."""
    fused = torch.mul(*_rows_and_share(affinity, shares, 0, rows), out=out)
    for head in range(1, affinity.heads):
        fused.addcmul_(*_rows_and_share(affinity, shares, head, rows))
    return fused


def _rows_and_share(affinity: Affinity, shares: Tensor, head: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Some rows of one head's affinity, [B, N], and what to multiply them by, [B, 1]: the share over the row's sum."""
    A, mass = affinity.rows(head, rows)
    return A, (shares[head, rows] if mass is None else shares[head, rows] / mass)[:, None]


class DenseFused:
    """S as one [N, N] matrix for all heads, global and local, built in row chunks: one product a step.

    A matrix narrower than the computing dtype has its rounded rows normalised again as it is applied.
    """

    name = "dense fused"

    def __init__(
        self,
        affinity: Affinity,
        shares: Tensor,
        beta: float,
        stencil: Tensor | None,
        matrix: Tensor,
        rows_per_chunk: int | None = None,
    ) -> None:
        """shares: [H, N] from `head_shares`. stencil: [N, 9] from `local_stencil`, None where beta is 1.

        matrix: [N, N], to be overwritten; its dtype is S's.
        """
        narrow = matrix.dtype != affinity.left.dtype
        scale = HALF_SCALE if matrix.dtype == torch.float16 else 1.0
        shares = shares * (beta * scale)
        stencil = None if stencil is None else stencil * ((1 - beta) * scale)
        for rows in row_chunks(affinity, rows_per_chunk):
            block = _fused_rows(affinity, shares, rows, None if narrow else matrix[rows])
            if stencil is not None:
                _grid.add_stencil_(block, stencil, affinity.grid, rows.start)
            if narrow:
                matrix[rows] = block
        self.matrix = matrix
        self.row_scale = matrix.sum(-1, dtype=affinity.left.dtype).reciprocal() if narrow else None

    def apply(self, X: Tensor) -> Tensor:
        columns = linear(X.t().to(self.matrix.dtype).contiguous(), self.matrix).to(X.dtype)  # [C, N]
        return (columns if self.row_scale is None else columns * self.row_scale).t()


class LowRank:
    """S as the heads' factors, sum_h diag(scale_h) left_h right_h^T, and the stencil: linear in N."""

    name = "low rank"

    def __init__(self, affinity: Affinity, shares: Tensor, beta: float, stencil: Tensor | None) -> None:
        """affinity: of a low-rank kernel. shares, stencil: as for `DenseFused`."""
        self.left, self.right = affinity.left, affinity.right  # [H, N, R]: copies would cost more than the walk
        self.scale = beta * shares / affinity.mass()  # [H, N]
        self.stencil = None if stencil is None else (1 - beta) * stencil
        self.grid = affinity.grid

    def apply(self, X: Tensor) -> Tensor:
        columns = X.t().contiguous()  # [C, N]
        if X.is_cuda:  # few launches
            summaries = columns @ self.right  # [H, C, R]
            product = ((summaries @ self.left.mT) * self.scale.unsqueeze(1)).sum(0).t()
        else:
            out = torch.zeros_like(columns)
            for left, right, scale in zip(self.left, self.right, self.scale, strict=True):
                out.addcmul_(linear(linear(columns, right.t()), left), scale)  # [C, N] -> [C, R] -> [C, N]
            product = out.t()
        return product if self.stencil is None else product + _grid.apply_stencil(self.stencil, X, self.grid)


class Chunked:
    """S that is never stored: its rows are computed again in each step, in memory O(N (H D + C))."""

    name = "chunked"

    def __init__(
        self,
        affinity: Affinity,
        shares: Tensor,
        beta: float,
        stencil: Tensor | None,
        rows_per_chunk: int | None = None,
    ) -> None:
        """shares, stencil: as for `DenseFused`."""
        self.affinity, self.shares = affinity, beta * shares
        self.stencil = None if stencil is None else (1 - beta) * stencil
        self.rows_per_chunk = rows_per_chunk

    def apply(self, X: Tensor) -> Tensor:
        columns = X.t().contiguous()
        out = torch.empty_like(columns)
        for rows in row_chunks(self.affinity, self.rows_per_chunk):
            out[:, rows] = linear(columns, _fused_rows(self.affinity, self.shares, rows))
        if self.stencil is not None:
            out += _grid.apply_stencil(self.stencil, X, self.affinity.grid).t()
        return out.t()


class LocalOnly:
    """S where beta is 0: the stencil alone."""

    name = "local"

    def __init__(self, stencil: Tensor, grid: tuple[int, int]) -> None:
        """stencil: [N, 9] from `local_stencil`."""
        self.stencil, self.grid = stencil, grid

    def apply(self, X: Tensor) -> Tensor:
        return _grid.apply_stencil(self.stencil, X, self.grid)


COLUMNS = 21 * 16
"""Default for the columns that S is applied to in all: 21 queries, 16 steps."""
OPERATORS = ("auto", "dense fused", "low rank", "chunked", "local")


def choose_operator(affinity: Affinity, beta: float, storage: torch.dtype, columns: int) -> str:
    """The form of S, by kernel, N, memory and work.

    columns: how many columns S will be applied to in all, C a step. "local" where beta is 0; "low rank" where the
    kernel is and its 4 N H R a column cost no more than a dense S, 2 N^2 H R to build and 2 N^2 a column; "dense
    fused" where S stays below `DENSE_BYTES`; else "low rank" where the kernel is; else "chunked".
    """
    if beta == 0:
        return "local"
    heads, tokens, rank = affinity.left.shape
    factors = heads * rank
    if affinity.low_rank and 2 * factors * columns <= tokens * (factors + columns):
        return "low rank"
    if tokens * tokens * storage.itemsize < DENSE_BYTES:
        return "dense fused"
    return "low rank" if affinity.low_rank else "chunked"


def build_transition(
    affinity: Affinity,
    weights: Tensor,
    config: FusionConfig,
    *,
    operator: str = "auto",
    columns: int = COLUMNS,
    storage: torch.dtype | None = None,
    rows_per_chunk: int | None = None,
    workspace: Workspace | None = None,
) -> Transition:
    """S from the heads' affinities and their weights [H], sum 1 (Eq. 2, and 22 or 15 by `config.combine`).

    operator: one of `OPERATORS`; "auto" is `choose_operator`, by `columns`. storage: dtype of a dense S; None is
    float16 on CUDA, which moves a row of P by up to 3e-3 in L1, and the computing dtype elsewhere. workspace: where a
    dense S is held. Raises ValueError for an operator that does not fit.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator {operator!r} is unknown; choose one of {', '.join(OPERATORS)}")
    computing = affinity.left.dtype
    if storage is None:
        storage = torch.float16 if affinity.left.is_cuda and computing == torch.float32 else computing
    if operator == "auto":
        operator = choose_operator(affinity, config.beta, storage, columns)
    if operator == "low rank" and not affinity.low_rank:
        raise ValueError(f"kernel {affinity.config.kernel!r} is not low rank; choose dense fused or chunked")
    if operator == "local" and config.beta != 0:
        raise ValueError(f"operator 'local' has no global part; it needs beta 0, not {config.beta}")
    if operator == "local":
        return LocalOnly(local_stencil(affinity, weights, config.combine), affinity.grid)
    stencil = None if config.beta == 1 else local_stencil(affinity, weights, config.combine)
    shares = head_shares(affinity, weights, config.combine, rows_per_chunk)
    if operator == "low rank":
        return LowRank(affinity, shares, config.beta, stencil)
    if operator == "chunked":
        return Chunked(affinity, shares, config.beta, stencil, rows_per_chunk)
    shape = (affinity.tokens, affinity.tokens)
    matrix = (workspace or Workspace()).take("S", shape, storage, affinity.left.device)
    return DenseFused(affinity, shares, config.beta, stencil, matrix, rows_per_chunk)


@dataclass(frozen=True)
class Fused:
    """S and the weights of its heads.

    transition: S. weights: [H] over all heads of Q, sum 1. entropies: [H] in nats, None where they were not
    needed.
    """

    transition: Transition
    weights: Tensor
    entropies: Tensor | None


@torch.inference_mode()
def fuse(
    Q: Tensor,
    K: Tensor,
    G: Tensor,
    grid: tuple[int, int],
    affinity: AffinityConfig,
    fusion: FusionConfig,
    *,
    operator: str = "auto",
    columns: int = COLUMNS,
    storage: torch.dtype | None = None,
    rows_per_chunk: int | None = None,
    workspace: Workspace | None = None,
) -> Fused:
    """Q, K [H, N, D] of any float dtype -> S, its heads weighted by the entropy of one step of each from G [N, C].

    G: float32 or float64, which is the computing dtype. workspace: keeps large tensors from frame to frame,
    and within a frame all heads' rows for the second pass where they take at most `KEEP_BYTES`. operator,
    columns, storage, rows_per_chunk: see `build_transition`. Raises ValueError.
    """
    heads, tokens, single = Q.shape[0], Q.shape[1], fusion.single_head
    if single is not None:
        if single >= heads:
            raise ValueError(f"head_weights asks for head {single}; there are heads 0 to {heads - 1}")
        Q, K = Q[single : single + 1], K[single : single + 1]
    by_entropy = fusion.head_weights == "entropy"
    keep = None
    two_passes = by_entropy and fusion.beta > 0 and not KERNELS[affinity.kernel].low_rank
    if workspace is not None and two_passes and heads * tokens * tokens * G.dtype.itemsize <= KEEP_BYTES:
        keep = workspace.take("rows", (heads, tokens, tokens), G.dtype, G.device)
    A = Affinity(Q, K, grid, affinity, dtype=G.dtype, keep=keep)
    entropies = head_entropies(A, G, rows_per_chunk) if by_entropy else None
    weights = G.new_full((A.heads,), 1 / A.heads) if entropies is None else entropy_weights(entropies, fusion.c)
    transition = build_transition(
        A,
        weights,
        fusion,
        operator=operator,
        columns=columns,
        storage=storage,
        rows_per_chunk=rows_per_chunk,
        workspace=workspace,
    )
    if single is not None:
        weights = (torch.arange(heads, device=G.device) == single).to(G.dtype)
    return Fused(transition, weights, entropies)
