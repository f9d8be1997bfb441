"""The random walk along the transition S, which refines class probabilities G to P (Eq. 3, 16, 19).

`refine` computes P from Q, K and G: affinity, head weights, S, walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .affinity import AffinityConfig
from .fusion import FusionConfig, Transition, fuse
from .workspace import Workspace

DENSE_SOLVE_TOKENS = 1024
"""`exact` solves up to this many tokens directly, more by GMRES."""


@dataclass(frozen=True)
class WalkConfig:
    """How far the walk goes.

    method: "fixed_point", "truncated" (Eq. 16) or "exact" (Eq. 3). alpha: probability of going on, 0 <=
    alpha < 1. steps: L, the number of products with S, >= 0; `exact` needs none. How near the limit they come depends
    on Q and K: on the embedded pair's own the worst row is 1e-2 from it in L1 after 12 (alpha 0.8), 4e-3 after 16 and
    5e-4 after 24. previous_frame_start: let
    `fixed_point` start from the previous frame's P instead of G, where there is one; the limit is the same, what is
    reached in `steps` is not. Raises ValueError.
    """

    method: str = "fixed_point"
    alpha: float = 0.85
    steps: int = 16
    previous_frame_start: bool = False

    def __post_init__(self) -> None:
        if self.method not in ("fixed_point", "truncated", "exact"):
            choices = "fixed_point, truncated or exact"
            raise ValueError(f"walk method {self.method!r} is unknown; choose {choices}")
        _check_alpha(self.alpha)
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 0:
            raise ValueError(f"steps is {self.steps!r}; it must be a whole number >= 0")
        if self.previous_frame_start and self.method != "fixed_point":
            raise ValueError(f"previous_frame_start is for the fixed_point walk, not for {self.method}")


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}; it must be at least 0 and below 1")


def choose_steps(alpha: float, tolerance: float) -> int:
    """The least L whose bound on a row's L1 error, 2 alpha^(L+1), is at most `tolerance` (above 0)."""
    _check_alpha(alpha)
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; it must be above 0")
    if 2 * alpha <= tolerance:
        return 0
    return math.ceil(math.log(tolerance / 2) / math.log(alpha) - 1 - 1e-9)


def residual_bound(alpha: float, x: Tensor, previous: Tensor) -> Tensor:
    """Bound on the L1 error of every row of an iterate x [N, C], from it and the one before: 0-dim tensor.

    alpha / (1 - alpha) max_i ||x_i - previous_i||_1
    """
    return alpha / (1 - alpha) * (x - previous).abs().sum(-1).amax()


def _column_wise(G: Tensor) -> Tensor:
    """G with each column contiguous: what products with S take and return without copying."""
    return G.t().contiguous().t()


def truncated(S: Transition, G: Tensor, alpha: float, steps: int) -> Tensor:
    """P_L = (1 - alpha) sum_{l=0}^{L} alpha^l S^l G, rows normalised (Eq. 16), by Horner's rule (Eq. 19).

    The sum's rows have mass 1 - alpha^(L+1). A normalised row is within 2 alpha^(L+1) of the infinite walk
    in L1. G: [N, C].
    """
    G = _column_wise(G)
    restart = (1 - alpha) * G
    P = restart
    for _ in range(steps):
        P = torch.add(restart, S.apply(P), alpha=alpha)
    return P / (1 - alpha ** (steps + 1))


def fixed_point(S: Transition, G: Tensor, alpha: float, steps: int, start: Tensor | None = None) -> Tensor:
    """x <- (1 - alpha) G + alpha S x from x = G, `steps` times (Eq. 19): each iterate is stochastic.

    The limit is Eq. 3's, whatever the start; from G a row is within 2 alpha^(L+1) of it in L1. G: [N, C]. start:
    [N, C], rows are distributions: x begins there instead of at G, and a row ends within 2 alpha^L of the limit.
    """
    return _fixed_point_pair(S, G, alpha, steps, start)[0]


def _fixed_point_pair(
    S: Transition, G: Tensor, alpha: float, steps: int, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The last iterate and the one before."""
    G = _column_wise(G)
    restart = (1 - alpha) * G
    x = previous = G if start is None else _column_wise(start)
    for _ in range(steps):
        previous, x = x, torch.add(restart, S.apply(x), alpha=alpha)
    return x, previous


def exact(S: Transition, G: Tensor, alpha: float) -> Tensor:
    """P = (1 - alpha) (I - alpha S)^-1 G (Eq. 3): solved densely up to 1024 tokens, by GMRES above.

    G: float64 [N, C], and S to match. Waits for the device.
    """
    tokens = G.shape[0]
    if tokens <= DENSE_SOLVE_TOKENS:
        identity = torch.eye(tokens, dtype=G.dtype, device=G.device)
        return torch.linalg.solve(identity - alpha * S.apply(identity), (1 - alpha) * G)
    return gmres(lambda x: x - alpha * S.apply(x), (1 - alpha) * G, G)


def gmres(
    operator: Callable[[Tensor], Tensor],
    b: Tensor,
    start: Tensor,
    *,
    tolerance: float = 1e-13,
    restart: int = 24,
    cycles: int = 40,
) -> Tensor:
    """Solve operator(x) = b for every column of b [N, C] at once: restarted GMRES, one Krylov space a column.

    tolerance: on a column's residual over the column of b, in the 2-norm. Raises RuntimeError where `cycles`
    restarts do not reach it.
    """
    tiny = torch.finfo(b.dtype).tiny
    goal = tolerance * b.norm(dim=0)
    x = start
    for _ in range(cycles):
        residual = b - operator(x)
        length = residual.norm(dim=0)  # [C]
        if bool((length <= goal).all()):
            return x
        basis = (residual / length.clamp_min(tiny)).unsqueeze(0)  # [j + 1, N, C]
        hessenberg = b.new_zeros(b.shape[1], restart + 1, restart)
        for j in range(restart):
            vector = operator(basis[j])
            for _ in range(2):  # one pass of classical Gram-Schmidt loses orthogonality, two do not
                overlap = torch.einsum("jnc,nc->jc", basis, vector)
                vector = vector - torch.einsum("jnc,jc->nc", basis, overlap)
                hessenberg[:, : j + 1, j] += overlap.T
            norm = vector.norm(dim=0)
            hessenberg[:, j + 1, j] = norm
            basis = torch.cat((basis, (vector / norm.clamp_min(tiny)).unsqueeze(0)))
        target = b.new_zeros(b.shape[1], restart + 1, 1)
        target[:, 0, 0] = length
        y = (torch.linalg.pinv(hessenberg) @ target).squeeze(-1)  # [C, restart]
        x = x + torch.einsum("jnc,cj->nc", basis[:-1], y)
    raise RuntimeError(f"GMRES missed {tolerance} after {cycles} restarts; lower alpha or use fixed_point")


def walk_from(S: Transition, G: Tensor, config: WalkConfig, start: Tensor | None = None) -> Tensor:
    """P [N, C]: the walk of `config` from G [N, C]; start: see `fixed_point`, which alone takes one."""
    if config.method == "exact":
        return exact(S, G, config.alpha)
    if config.method == "truncated":
        return truncated(S, G, config.alpha, config.steps)
    return fixed_point(S, G, config.alpha, config.steps, start)


@dataclass(frozen=True)
class Refinement:
    """The result of `refine`.

    P: [N, C], rows are distributions; float32, or float64 where G was. head_weights: [H], sum 1.
    head_entropies: [H] in nats, None where the weights did not need them. operator: what S was, one of
    `fusion.OPERATORS`. residual: bound on a row's L1 distance to the infinite walk, 0-dim tensor, where
    asked for.
    """

    P: Tensor
    head_weights: Tensor
    head_entropies: Tensor | None
    operator: str
    residual: Tensor | None = None

    @property
    def effective_heads(self) -> float:
        """1 / sum w^2, from 1 (one head has all weight) to H (equal weights); reading it waits for the device."""
        return float(1 / self.head_weights.double().square().sum())


@torch.inference_mode()
def refine(
    Q: Tensor,
    K: Tensor,
    G: Tensor,
    grid: tuple[int, int],
    affinity: AffinityConfig | None = None,
    fusion: FusionConfig | None = None,
    walk: WalkConfig | None = None,
    *,
    previous: Tensor | None = None,
    rows_per_chunk: int | None = None,
    operator: str = "auto",
    storage: torch.dtype | None = None,
    workspace: Workspace | None = None,
    validate: bool | None = None,
    residual: bool = False,
) -> Refinement:
    """Refine G along the transition that Q and K define: affinity, head weights, S, walk.

    Q, K: [H, N, D] of any float dtype. G: [N, C], rows are distributions. grid: (rows, columns), rows *
    columns = N. All on one device. Computes in float32; in float64 where one of them is float64 or the walk
    is `exact`. previous: the previous frame's P [N, C], where `walk.previous_frame_start` is set; None for the first
    frame. rows_per_chunk, operator, storage, workspace: see `fuse`. validate: check that Q and K are
    finite and that G's rows are distributions; None does so on the CPU only, since it waits for the device.
    residual: bound the distance to the infinite walk too (`fixed_point` only). Raises ValueError.
    """
    affinity, fusion, walk = affinity or AffinityConfig(), fusion or FusionConfig(), walk or WalkConfig()
    _check_shapes(Q, K, G)
    if validate if validate is not None else not G.is_cuda:
        _check_values(Q, K, G)
    if residual and walk.method != "fixed_point":
        raise ValueError(f"residual is a bound for the fixed_point walk, not for {walk.method}")
    if previous is not None:
        _check_previous(previous, G, walk)
    wide = walk.method == "exact" or torch.float64 in (Q.dtype, K.dtype, G.dtype)
    source = G.to(torch.float64 if wide else torch.float32)
    start = None if previous is None else previous.to(source.dtype)
    fused = fuse(
        Q,
        K,
        source,
        grid,
        affinity,
        fusion,
        operator=operator,
        columns=G.shape[0] if walk.method == "exact" else G.shape[1] * walk.steps,
        storage=storage,
        rows_per_chunk=rows_per_chunk,
        workspace=workspace,
    )
    bound = None
    if residual:
        P, previous = _fixed_point_pair(fused.transition, source, walk.alpha, walk.steps, start)
        bound = residual_bound(walk.alpha, P, previous)
    else:
        P = walk_from(fused.transition, source, walk, start)
    P = P.to(torch.float64 if G.dtype == torch.float64 else torch.float32).contiguous()
    return Refinement(P, fused.weights, fused.entropies, fused.transition.name, bound)


def _check_shapes(Q: Tensor, K: Tensor, G: Tensor) -> None:
    """Raise unless Q, K and G have the same tokens, in floating point, on one device."""
    if Q.ndim != 3 or Q.shape != K.shape:
        shapes = f"{list(Q.shape)} and {list(K.shape)}"
        raise ValueError(f"Q and K must both be [heads, tokens, size]; got {shapes}")
    if G.ndim != 2 or G.shape[0] != Q.shape[1] or G.shape[1] < 1:
        raise ValueError(f"G must be [tokens, queries] with {Q.shape[1]} tokens; got {list(G.shape)}")
    if not (Q.is_floating_point() and K.is_floating_point() and G.is_floating_point()):
        raise ValueError(f"Q, K and G must be floating point; got {Q.dtype}, {K.dtype} and {G.dtype}")
    if not Q.device == K.device == G.device:
        raise ValueError(f"Q, K and G must be on one device; got {Q.device}, {K.device} and {G.device}")


def _check_previous(previous: Tensor, G: Tensor, walk: WalkConfig) -> None:
    """Raise unless the walk asks for the previous frame's P, and it has the same tokens and queries."""
    if not walk.previous_frame_start:
        raise ValueError("a previous P was given, but previous_frame_start is off; set it, or leave previous out")
    if previous.shape != G.shape or previous.device != G.device or not previous.is_floating_point():
        what = f"{previous.dtype} {list(previous.shape)} on {previous.device}"
        raise ValueError(f"previous must be floating point {list(G.shape)} on {G.device}, as G is; got {what}")


def _check_values(Q: Tensor, K: Tensor, G: Tensor) -> None:
    """Raise unless Q and K are finite and every row of G is a distribution."""
    if not bool(Q.isfinite().all() & K.isfinite().all()):
        raise ValueError("Q or K is not finite everywhere; run the diffusion network in float32 or bfloat16")
    if not bool(((G.float().sum(-1) - 1).abs() < 1e-2).all() & (G >= 0).all()):
        raise ValueError("every row of G must be a distribution: finite, >= 0, sum 1 (a softmax over queries)")
