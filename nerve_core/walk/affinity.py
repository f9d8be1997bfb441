"""Affinities of tokens from Q and K: the kernels by name (Eq. 8), rows of global affinities, local stencils (Eq. 9).

Every kernel is an inner product of two prepared operands followed by a pointwise rule:
A[i, j] = rule(left[i] . right[j]). Where the rule is the identity the kernel is low rank, and its rows never
need to be written out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from . import _grid
from ._products import linear

ZERO_LENGTH = 1e-30
"""A row of Q or K whose largest magnitude is below this counts as zero: its cosine with anything is 0."""
CENTRED_ZERO = 1e-5
"""A centred row shorter than this, over its head's longest row before centring, is rounding: zero."""
FLOOR = 1e-6
"""Added to the kernels that can be 0 all along a row (`relu`, `relu_centred`, `shifted`)."""
RAW_MASS = 0.05
"""The least mean affinity of a row that `raw` accepts: a row sum of 0.05 N."""
FEATURES_SEED = 0
"""Seed of the random features of `favor`: the same frame always gives the same mask."""


@dataclass(frozen=True)
class AffinityConfig:
    """How the affinity of two tokens is computed.

    kernel: one of `KERNELS`. tau: temperature of `exp`, at least 0.001. eps_self: affinity of a token with
    itself in the local stencil, above 0. favor_of: the kernel that `favor` estimates, "exp" or "softmax".
    features: random features a head of `favor`, at least 1. Raises ValueError.
    """

    kernel: str = "exp"
    tau: float = 0.05
    eps_self: float = 0.1
    favor_of: str = "exp"
    features: int = 256

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel {self.kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
        if not (math.isfinite(self.tau) and self.tau >= 1e-3):
            raise ValueError(f"tau is {self.tau}; it must be finite and at least 0.001 (0.05 is usual)")
        if not (math.isfinite(self.eps_self) and self.eps_self > 0):
            raise ValueError(f"eps_self is {self.eps_self}; it must be finite and above 0 (0.1 is usual)")
        if self.favor_of not in ("exp", "softmax"):
            raise ValueError(f"favor_of is {self.favor_of!r}; favor estimates exp or softmax")
        if not isinstance(self.features, int) or isinstance(self.features, bool) or self.features < 1:
            raise ValueError(f"features is {self.features!r}; it must be a whole number >= 1 (256 is usual)")

    @property
    def pairwise(self) -> str:
        """The kernel by which two given tokens are compared: what `favor` estimates, else the kernel itself."""
        return self.favor_of if self.kernel == "favor" else self.kernel


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x [..., D] at length 1, whatever finite length they had; those below `ZERO_LENGTH` go to 0."""
    scaled = x / x.abs().amax(-1, keepdim=True).clamp_min(ZERO_LENGTH)
    return scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(1.0)


def centred_rows(x: Tensor) -> Tensor:
    """x [H, N, D], scaled by head, less each head's token mean; rows that are only rounding are 0."""
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(ZERO_LENGTH)
    centred = x - x.mean(-2, keepdim=True)
    longest = x.norm(dim=-1, keepdim=True).amax(-2, keepdim=True)
    return centred * (centred.norm(dim=-1, keepdim=True) > CENTRED_ZERO * longest)


Operands: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Kernel:
    """One line of the kernel table.

    operands: Q, K [H, N, D] -> left, right [H, N, R] and, where rows were scaled to fit, the logarithm of
    what they were divided by [H, N]. rule_: inner products -> affinities, in place.
    low_rank: the inner product is the affinity already (rule_ takes away rounding at most). exponential:
    rule_ is exp, so that a row's transition is its softmax. positive: entries are >= 0, so that transitions
    are distributions.
    """

    operands: Callable[[Tensor, Tensor, AffinityConfig], Operands]
    rule_: Callable[[Tensor], Tensor]
    low_rank: bool = False
    exponential: bool = False
    positive: bool = True


def _cosine(Q: Tensor, K: Tensor, config: AffinityConfig) -> Operands:
    return unit_rows(Q), unit_rows(K), None


def _cosine_over_tau(Q: Tensor, K: Tensor, config: AffinityConfig) -> Operands:
    return unit_rows(Q) / config.tau, unit_rows(K), None


def _scaled_product(Q: Tensor, K: Tensor, config: AffinityConfig) -> Operands:
    return Q / math.sqrt(Q.shape[-1]), K, None


def _centred_cosine(Q: Tensor, K: Tensor, config: AffinityConfig) -> Operands:
    return unit_rows(centred_rows(Q)), unit_rows(centred_rows(K)), None


def _shifted_features(Q: Tensor, K: Tensor, config: AffinityConfig) -> Operands:
    left, right = unit_rows(Q) / 2, unit_rows(K)
    one = torch.ones_like(left[..., :1])
    return torch.cat((left, one * (0.5 + FLOOR)), -1), torch.cat((right, one), -1), None


@functools.lru_cache(maxsize=8)
def random_directions(size: int, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The fixed directions W [features, size] of `favor`: blocks of `size` orthogonal rows, as long as Gaussian ones.

    Each row alone is a standard normal vector, so that estimates are unbiased; rows of a block are orthogonal, which
    lowers their variance (Performer, Sec. 2.4). Drawn on the CPU in float64 whatever the device.
    """
    draw = torch.Generator().manual_seed(FEATURES_SEED)
    blocks = []
    for _ in range(-(-features // size)):
        Q, R = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
        lengths = torch.randn(size, size, generator=draw, dtype=torch.float64).norm(dim=1)
        blocks.append(lengths[:, None] * (Q * R.diagonal().sign()).t())  # the signs make Q uniform over rotations
    return torch.cat(blocks)[:features].to(device, dtype)


def _positive_features(Q: Tensor, K: Tensor, config: AffinityConfig) -> Operands:
    """FAVOR+ (Performer, arXiv 2009.14794): exp(x . y) = E_w exp(w . x - |x|^2 / 2) exp(w . y - |y|^2 / 2).

    The mean over w is taken over `random_directions`: positive, unbiased, and rows normalise to distributions. Every
    feature is divided by its largest key, and every row then by its largest feature, which changes no transition:
    nothing overflows, and a row's sum is at least 1.

    How good it is depends on how long x is: the relative variance of an estimate is about exp(|x + y|^2) / features,
    small where |x|^2 is a few units, hopeless where it is 1 / tau = 20 and cosines are near 1. With 256 features the
    rows of S, fused of ten heads on made-up regions, are off by 0.05 in L1 for `exp` at tau 0.5 and by 0.27 at 0.2, but
    by 0.7 at 0.05 and by 1.3 for `softmax` as sharp as a network's (2 is the most): there the estimate is a kernel of
    its own, which groups tokens by the directions that they lie nearest to. On the embedded pair (tau 0.05, 40 scenes)
    it does harm: mean IoU 0.66, where `exp` has 0.76 and CLIP alone 0.73; four times the features do not help.
    """
    if config.favor_of == "exp":
        scale = 1 / math.sqrt(config.tau)
        x, y = unit_rows(Q) * scale, unit_rows(K) * scale
    else:
        scale = Q.shape[-1] ** -0.25
        x, y = Q * scale, K * scale
    W = random_directions(Q.shape[-1], config.features, Q.dtype, Q.device)
    shape = (*Q.shape[:-1], len(W))
    right = linear(y.flatten(0, 1).contiguous(), W).view(shape)  # logarithms of the features, [H, N, features]
    right -= y.square().sum(-1, keepdim=True) / 2
    largest = right.amax(-2, keepdim=True)
    right = right.sub_(largest).exp_()
    left = linear(x.flatten(0, 1).contiguous(), W).view(shape).add_(largest)
    peak = left.amax(-1, keepdim=True)
    left = left.sub_(peak).exp_()
    return left, right, (peak - x.square().sum(-1, keepdim=True) / 2).squeeze(-1)


def _rectify_(products: Tensor) -> Tensor:
    return products.clamp_min_(0).add_(FLOOR)


def _never_negative_(products: Tensor) -> Tensor:
    return products.clamp_min_(0)


def _unchanged_(products: Tensor) -> Tensor:
    return products


KERNELS: dict[str, Kernel] = {
    "exp": Kernel(_cosine_over_tau, torch.Tensor.exp_, exponential=True),
    "softmax": Kernel(_scaled_product, torch.Tensor.exp_, exponential=True),
    "relu": Kernel(_cosine, _rectify_),
    "relu_centred": Kernel(_centred_cosine, _rectify_),
    "shifted": Kernel(_shifted_features, _never_negative_, low_rank=True),
    "favor": Kernel(_positive_features, _unchanged_, low_rank=True),
    "raw": Kernel(_cosine, _unchanged_, low_rank=True, positive=False),
}
"""Eq. 8's kernels by name."""


class Affinity:
    """The heads' affinities of one frame, held as operands; rows are computed on request.

    left, right: [H, N, R] in the computing dtype. grid: (rows, columns).
    """

    def __init__(
        self,
        Q: Tensor,
        K: Tensor,
        grid: tuple[int, int],
        config: AffinityConfig,
        *,
        dtype: torch.dtype = torch.float32,
        keep: Tensor | None = None,
    ) -> None:
        """Prepare Q, K: [H, N, D] of any float dtype, magnitudes below 1e18, on the grid (rows, columns).

        dtype: computing dtype, float32 or float64. keep: [H, N, N] of that dtype, where rows are kept between
        the passes that need them; None computes them again. Raises ValueError for shapes that do not fit,
        and where `raw` has a row sum below 0.05 N.
        """
        if Q.ndim != 3 or Q.shape != K.shape or min(Q.shape) < 1:
            shapes = f"{list(Q.shape)} and {list(K.shape)}"
            raise ValueError(f"Q and K must both be [heads, tokens, size], none of them 0; got {shapes}")
        rows, columns = grid
        if rows < 1 or columns < 1 or rows * columns != Q.shape[1]:
            raise ValueError(f"a grid of {rows} x {columns} does not hold the {Q.shape[1]} tokens of Q and K")
        self.config = config
        self.grid = (rows, columns)
        self.kernel = KERNELS[config.kernel]
        Q, K = Q.to(dtype), K.to(dtype)
        left, right, self._log_scale = self.kernel.operands(Q, K, config)
        self.left, self.right = left.contiguous(), right.contiguous()
        self._neighbour_operands = (self.left, self.right)
        if config.pairwise != config.kernel:  # eight neighbours cost little: they are compared without an estimate
            self._neighbour_operands = KERNELS[config.pairwise].operands(Q, K, config)[:2]
        self._keep = keep
        self._kept: dict[tuple[int, int, int], tuple[Tensor, Tensor | None]] = {}
        if not self.kernel.positive:
            _refuse_small(self.mass(), torch.full_like(self.left[..., 0], self.tokens), "global")

    @property
    def heads(self) -> int:
        """H."""
        return self.left.shape[0]

    @property
    def tokens(self) -> int:
        """N."""
        return self.left.shape[1]

    @property
    def low_rank(self) -> bool:
        """Whether each head's affinity is left right^T, up to a factor a row."""
        return self.kernel.low_rank

    def mass(self) -> Tensor:
        """Row sums [H, N] of a low-rank kernel's left right^T, from the operands alone."""
        return (self.left @ self.right.sum(1).unsqueeze(-1)).squeeze(-1)

    def rows(self, head: int, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Some rows of one head's affinity, [B, N], to be read only, and their sums [B], up to a factor a row.

        Rows of an exponential kernel come normalised (a softmax cannot overflow), with None for the sums.
        """
        key = (head, rows.start, rows.stop)
        if key in self._kept:
            return self._kept[key]
        affinities = linear(self.left[head, rows], self.right[head])
        kept = None if self._keep is None else self._keep[head, rows]
        if self.kernel.exponential:
            affinities, sums = torch.softmax(affinities, -1, out=affinities if kept is None else kept), None
        else:
            affinities = self.kernel.rule_(affinities)
            sums = affinities.sum(-1)
            if kept is not None:
                affinities = kept.copy_(affinities)
        if kept is not None:
            self._kept[key] = kept, sums
        return affinities, sums

    def log_mass(self, head: int, rows: slice) -> Tensor:
        """Logarithm of some row sums [B] of one head's affinity, up to one constant for all heads and rows.

        `softmax` is row-stochastic by its own definition: 0 everywhere.
        """
        if self.config.pairwise == "softmax":
            return torch.zeros_like(self.left[head, rows, 0])
        if self.low_rank:
            log_mass = self.mass()[head, rows].log()
            return log_mass if self._log_scale is None else log_mass + self._log_scale[head, rows]
        if self.kernel.exponential:
            return torch.logsumexp(linear(self.left[head, rows], self.right[head]), -1)
        affinities, sums = self.rows(head, rows)
        return (affinities.sum(-1) if sums is None else sums).log()

    def stencils(self) -> Tensor:
        """Every head's local affinities [H, N, 9] (Eq. 9), not normalised; eps_self is in the middle.

        Places outside the grid are 0. `softmax` is taken over the neighbours that exist. `favor` compares neighbours by
        the kernel that it estimates, exactly.
        """
        heads = range(self.heads)
        left, right = self._neighbour_operands
        products = torch.stack([_grid.neighbour_products(left[h], right[h], self.grid) for h in heads])
        neighbour = _grid.inside(self.grid, products.device)
        neighbour[:, _grid.CENTRE] = False
        if self.config.pairwise == "softmax":
            # A token without neighbours has -inf in all nine places; the NaN of its softmax is masked below.
            affinities = products.masked_fill(~neighbour, -math.inf).softmax(-1)
        elif self.config.pairwise == "exp":
            affinities = (products - 1 / self.config.tau).exp_()
        else:
            affinities = self.kernel.rule_(products)
        affinities = affinities.masked_fill_(~neighbour, 0.0)
        affinities[..., _grid.CENTRE] = self.config.eps_self
        if not self.kernel.positive:
            _refuse_small(affinities.sum(-1), neighbour.sum(-1), "local")
        return affinities


def _refuse_small(sums: Tensor, places: Tensor, which: str) -> None:
    """Raise where `raw` gives a row that is no transition; waits for the device."""
    if not bool((sums >= RAW_MASS * places).all()):
        least = float((sums / places.clamp_min(1)).min())
        raise ValueError(
            f"kernel 'raw' gives no transition here: a row's mean {which} affinity is {least:.3g}, below "
            f"{RAW_MASS}; use 'relu', which equals it wherever it is one, or 'exp'"
        )
