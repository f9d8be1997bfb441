"""NERVE's maths written from the equations: float64, dense N x N, explicit loops; shares no code, slow.

Q, K: [H, N, D]. G: [N, C]. grid: (rows, columns). A transition is a list of rows that sum to 1.
"""

from __future__ import annotations

import math

import numpy as np

NEIGHBOURS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


def cosine(q: np.ndarray, k: np.ndarray) -> float:
    """Cosine of two vectors; 0 where one of them is zero (no entry as large as 1e-30)."""
    peaks = float(np.abs(q).max()), float(np.abs(k).max())
    if min(peaks) < 1e-30:
        return 0.0
    q, k = q / peaks[0], k / peaks[1]
    return float(q @ k) / math.sqrt(float(q @ q) * float(k @ k))


def centred(x: np.ndarray) -> np.ndarray:
    """x [N, D] less its mean; a row that is nothing but rounding becomes zero."""
    peak = float(np.abs(x).max())
    if peak < 1e-30:
        return np.zeros_like(x)
    x = x / peak
    rest = x - x.mean(0)
    longest = max(math.sqrt(float(row @ row)) for row in x)
    for row in rest:
        if math.sqrt(float(row @ row)) <= 1e-5 * longest:
            row[:] = 0
    return rest


def prepared(Q: np.ndarray, K: np.ndarray, kernel: str) -> tuple[np.ndarray, np.ndarray]:
    """One head's Q and K [N, D] as the kernel's pairwise rule takes them."""
    return (centred(Q), centred(K)) if kernel == "relu_centred" else (Q, K)


def pair(q: np.ndarray, k: np.ndarray, kernel: str, tau: float) -> float:
    """Affinity of two tokens (Eq. 8's kernels); for `softmax` its logarithm, since the rest needs the row."""
    if kernel == "exp":
        return math.exp((cosine(q, k) - 1) / tau)
    if kernel == "softmax":
        return float(q @ k) / math.sqrt(len(q))
    if kernel in ("relu", "relu_centred"):
        return max(cosine(q, k), 0.0) + 1e-6
    if kernel == "shifted":
        return (1 + cosine(q, k)) / 2 + 1e-6
    if kernel == "raw":
        return cosine(q, k)
    raise KeyError(kernel)


def favor(Q: np.ndarray, K: np.ndarray, W: np.ndarray, favor_of: str, tau: float) -> np.ndarray:
    """One head's estimate [N, N] of exp(cosine / tau) or exp(q . k / sqrt(D)) by random directions W [features, D]."""

    def prepared(x: np.ndarray) -> np.ndarray:
        if favor_of == "softmax":
            return x / len(x) ** 0.25
        peak = float(np.abs(x).max())
        return x * 0 if peak < 1e-30 else x / peak / math.sqrt(float(x / peak @ (x / peak))) / math.sqrt(tau)

    A = np.zeros((len(Q), len(K)))
    for i, q in enumerate(map(prepared, Q)):
        for j, k in enumerate(map(prepared, K)):
            products = [math.exp(w @ q - q @ q / 2) * math.exp(w @ k - k @ k / 2) for w in W]
            A[i, j] = sum(products) / len(W)
    return A


def soft_row(logits: list[float]) -> list[float]:
    """Softmax of a row."""
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return [weight / sum(weights) for weight in weights]


def global_affinity(Q: np.ndarray, K: np.ndarray, kernel: str, tau: float) -> np.ndarray:
    """One head's affinity of all pairs [N, N] (Eq. 8)."""
    Q, K = prepared(Q, K, kernel)
    rows = [[pair(q, k, kernel, tau) for k in K] for q in Q]
    return np.array([soft_row(row) for row in rows] if kernel == "softmax" else rows)


def local_affinity(
    Q: np.ndarray, K: np.ndarray, grid: tuple[int, int], kernel: str, tau: float, eps_self: float
) -> np.ndarray:
    """One head's affinity of the neighbours inside the grid, eps_self with itself: [N, N] (Eq. 9)."""
    Q, K = prepared(Q, K, kernel)
    A = np.zeros((len(Q), len(Q)))
    for row in range(grid[0]):
        for column in range(grid[1]):
            i = row * grid[1] + column
            places = [
                (row + down) * grid[1] + column + right
                for down, right in NEIGHBOURS
                if 0 <= row + down < grid[0] and 0 <= column + right < grid[1]
            ]
            values = [pair(Q[i], K[j], kernel, tau) for j in places]
            if kernel == "softmax" and values:
                values = soft_row(values)
            for j, value in zip(places, values, strict=True):
                A[i, j] = value
            A[i, i] = eps_self
    return A


def normalised(A: np.ndarray) -> np.ndarray:
    """Rows divided by their sums."""
    return A / A.sum(1, keepdims=True)


def entropies(transitions: list[np.ndarray], G: np.ndarray) -> np.ndarray:
    """Mean over tokens of the entropy in nats of each head's P_1 = S_global G (Eq. 12, 13)."""
    found = []
    for S in transitions:
        total = 0.0
        for row in S @ G:
            total += sum(-p * math.log(p) for p in row if p > 0)
        found.append(total / len(G))
    return np.array(found)


def weights(H: np.ndarray, c: float) -> np.ndarray:
    """softmax(-c H) (Eq. 14)."""
    return np.array(soft_row([-c * value for value in H]))


def transition(
    Q: np.ndarray,
    K: np.ndarray,
    G: np.ndarray,
    grid: tuple[int, int],
    *,
    kernel: str = "exp",
    tau: float = 0.05,
    eps_self: float = 0.1,
    beta: float = 0.5,
    c: float = 10.0,
    head_weights: str | int = "entropy",
    combine: str = "transitions",
    directions: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S [N, N] and the heads' weights [H] (Eq. 2 with Eq. 22, or with Eq. 15). directions: of `favor`, of `exp`."""
    if kernel == "favor":
        A_global, kernel = [favor(q, k, directions, "exp", tau) for q, k in zip(Q, K, strict=True)], "exp"
    else:
        A_global = [global_affinity(q, k, kernel, tau) for q, k in zip(Q, K, strict=True)]
    A_local = [local_affinity(q, k, grid, kernel, tau, eps_self) for q, k in zip(Q, K, strict=True)]
    if head_weights == "entropy":
        w = weights(entropies([normalised(A) for A in A_global], G), c)
    elif head_weights == "mean":
        w = np.full(len(Q), 1 / len(Q))
    else:
        w = np.eye(len(Q))[0 if head_weights == "single" else head_weights]
    S = np.zeros_like(A_global[0])
    if combine == "transitions":
        for h in range(len(Q)):
            S += w[h] * (beta * normalised(A_global[h]) + (1 - beta) * normalised(A_local[h]))
    else:
        fused_global = sum(w[h] * A_global[h] for h in range(len(Q)))
        fused_local = sum(w[h] * A_local[h] for h in range(len(Q)))
        S = beta * normalised(fused_global) + (1 - beta) * normalised(fused_local)
    return S, w


def truncated(S: np.ndarray, G: np.ndarray, alpha: float, steps: int) -> np.ndarray:
    """(1 - alpha) sum_{l=0}^{L} alpha^l S^l G by powers of S, rows normalised (Eq. 16)."""
    total = np.zeros_like(G)
    power = np.eye(len(S))
    for step in range(steps + 1):
        total += (1 - alpha) * alpha**step * (power @ G)
        power = power @ S
    return normalised(total)


def fixed_point(S: np.ndarray, G: np.ndarray, alpha: float, steps: int) -> np.ndarray:
    """What L steps from G amount to: (1 - alpha) sum_{l<L} alpha^l S^l G + alpha^L S^L G (Eq. 19)."""
    total = np.zeros_like(G)
    power = np.eye(len(S))
    for step in range(steps):
        total += (1 - alpha) * alpha**step * (power @ G)
        power = power @ S
    return total + alpha**steps * (power @ G)


def exact(S: np.ndarray, G: np.ndarray, alpha: float) -> np.ndarray:
    """(1 - alpha) (I - alpha S)^-1 G (Eq. 3)."""
    return (1 - alpha) * np.linalg.inv(np.eye(len(S)) - alpha * S) @ G


# --- what other systems do, from their papers' equations ---


def self_attention(Q: np.ndarray, K: np.ndarray) -> np.ndarray:
    """One head's map softmax(Q K^T / sqrt(D)), [N, N]."""
    return np.array([soft_row([float(q @ k) / math.sqrt(len(q)) for k in K]) for q in Q])


def sd_mean(Q: np.ndarray, K: np.ndarray, G: np.ndarray) -> np.ndarray:
    """The mean over heads of each head's own product."""
    return sum(self_attention(q, k) @ G for q, k in zip(Q, K, strict=True)) / len(Q)


def sfsa(Q: np.ndarray, K: np.ndarray, G: np.ndarray, threshold: float, order: list[int]) -> np.ndarray:
    """CLIPer: thresholded maps multiplied from left to right into one [N, N], then G."""
    product = np.eye(len(G))
    for head in order:
        A = self_attention(Q[head], K[head])
        M = np.zeros_like(A)
        for j in range(len(A)):
            top = max(A[:, j]) + 1e-5
            for i in range(len(A)):
                M[i, j] = A[i, j] / top if A[i, j] / top >= threshold else 0.0
        product = product @ np.array([row / (sum(row) + 1e-5) for row in M])
    return product @ G


def iseg(Q: np.ndarray, K: np.ndarray, G: np.ndarray, products: int, strength: float) -> np.ndarray:
    """iSeg: an entropy-reduced mean map, `products` times, columns spread anew each time; then to G's own peaks."""
    A = sum(self_attention(q, k) for q, k in zip(Q, K, strict=True)) / len(Q)
    for j in range(len(A)):
        A[:, j] /= max(A[:, j])
    for i, j in np.ndindex(*A.shape):
        A[i, j] = max(0.0, A[i, j] + strength * math.log10(math.e * A[i, j])) if A[i, j] > 0 else 0.0
    A = normalised(A)
    P = np.zeros_like(G)
    for c in range(G.shape[1]):
        column = G[:, c] - min(G[:, c])
        column /= sum(column)
        for _ in range(products):
            column = A @ column
            column = column - min(column)
            column /= sum(column)
        P[:, c] = column / max(column) * max(G[:, c])
    return P


def pamr(image: np.ndarray, scores: np.ndarray, steps: int, dilations: list[int]) -> np.ndarray:
    """Pixel-adaptive refinement of scores [C, H, W] on an image [3, H, W] of the same size, pixel by pixel."""
    height, width = image.shape[1:]
    for _ in range(steps):
        refined = np.zeros_like(scores)
        for row, column in np.ndindex(height, width):
            places = [
                (min(max(row + d * down, 0), height - 1), min(max(column + d * right, 0), width - 1))
                for d in dilations
                for down, right in NEIGHBOURS
            ]
            own = image[:, row, column]
            around = np.array([image[:, y, x] for y, x in places])
            deviation = np.array([*around, *[own] * len(dilations)]).std(0, ddof=1)
            logits = [-float((np.abs(colour - own) / (1e-8 + 0.1 * deviation)).mean()) for colour in around]
            for weight, (y, x) in zip(soft_row(logits), places, strict=True):
                refined[:, row, column] += weight * scores[:, y, x]
        scores = refined
    return scores


# --- pixels ---


def lab(rgb: np.ndarray) -> np.ndarray:
    """One sRGB colour in 0..1 as CIELAB under D65."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
    rows = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
    f = []
    for row in rows:
        t = sum(a * b for a, b in zip(row, linear, strict=True)) / sum(row)
        f.append(t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array((116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])))


def pixel_transition(image: np.ndarray, distances: list[int], sigma: float, eps_self: float) -> np.ndarray:
    """S [H W, H W] between the pixels of an image [3, H, W]: Eq. 9 at several distances, by CIELAB colours."""
    height, width = image.shape[1:]
    colours = {place: lab(image[(slice(None), *place)]) for place in np.ndindex(height, width)}
    S = np.zeros((height * width, height * width))
    for row, column in np.ndindex(height, width):
        here = row * width + column
        for distance in distances:
            for down, right in NEIGHBOURS:
                other = (row + distance * down, column + distance * right)
                if other in colours:
                    unlike = colours[row, column] - colours[other]
                    S[here, other[0] * width + other[1]] += math.exp(-float(unlike @ unlike) / (2 * sigma**2))
        S[here, here] += eps_self
    return normalised(S)


def shrunk(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[3, H, W] at another size, each pixel the mean of those that it covers, wholly or in part."""
    out = np.zeros((len(image), *size))
    for row, column in np.ndindex(*size):
        rows, columns = (
            slice(k * old // new, -(-(k + 1) * old // new))
            for k, old, new in zip((row, column), image.shape[1:], size, strict=True)
        )
        out[:, row, column] = image[:, rows, columns].mean((1, 2))
    return out
