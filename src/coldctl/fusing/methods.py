"""The arithmetic of fusing: short pure functions on named arrays, float64 in between, one rounding at the end.

Three kinds of methods, by what they must know before the first element can be written:

- one weight per contribution (`mean`, `multi-krum`, `geometric-median`), found from the updates' inner products;
- weights per tensor (`model-stock`, `slerp`), found from the inner products within that tensor;
- element by element (`median`, `trimmed-mean`, `ties`, `dare`, `fisher`).

Notation: N contributions xᵢ of the base θ, updates dᵢ = xᵢ − θ, weights wᵢ that sum to one.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from coldctl.common.errors import ConfigError

Array = NDArray[np.float64]
Parts = Sequence[NDArray[Any]]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PIECE = 1 << 16  # elements converted and added at a time: what stays in the core's own cache
_NEARLY_COLINEAR = 0.9995  # slerp falls back to a straight line above this cosine
_WEISZFELD_STEPS = 100
_WEISZFELD_TOLERANCE = 1e-10

# One weight per contribution ------------------------------------------------------------------------------------


def mean(parts: Parts, weights: Array | None = None) -> Array:
    """The mean Σᵢ wᵢ xᵢ / Σᵢ wᵢ of equally long arrays of any floating dtype: ColD Fusion's fuse step for equal weights.

    Without `weights`, and where all that are not zero are equal, the sum runs in the order given and is divided
    once by N, so that copies of one array of float32 or narrower give it back exactly. Float64 inputs are summed
    in the machine's extended precision for the same reason. Weights that are whole numbers cost no rounding but that
    of the one division, so means of groups, weighted by their sizes, give the mean of all. Paper: arXiv 2212.01378,
    section 2.
    """
    if weights is not None:
        used = np.flatnonzero(weights)
        parts, weights = [parts[index] for index in used.tolist()], weights[used]
        if np.all(weights == weights[0]):
            weights = None
    if any(part.dtype == np.float64 for part in parts):
        return _mean_of_doubles(parts, weights)
    divisor = len(parts) if weights is None else weights.sum()
    total = np.empty(parts[0].size, np.float64)
    scratch = np.empty(_PIECE, np.float64)
    for start in range(0, total.size, _PIECE):
        piece = total[start : start + _PIECE]
        wide = scratch[: piece.size]
        for index, part in enumerate(parts):
            target = wide if index else piece
            target[:] = part[start : start + _PIECE]
            if weights is not None:
                np.multiply(target, weights[index], out=target)
            if index:
                np.add(piece, wide, out=piece)
        if divisor != 1:
            np.divide(piece, divisor, out=piece)
    return total


def _mean_of_doubles(parts: Parts, weights: Array | None) -> Array:
    """The same in extended precision.

    A mean that was rounded to float64, times the number it was divided by, gives the sum back exactly if the product
    is rounded to float64, too, for numbers of the form 2^i + 2^j (Goldberg 1991, theorem 7): those up to 6, 8 to 10, 12 …
    """
    total: NDArray[Any] = np.zeros(parts[0].size, np.longdouble)
    whole = weights is not None and bool(np.all(weights == np.rint(weights)))
    for index, part in enumerate(parts):
        if weights is None:
            total += part
        elif whole:
            total += part.astype(np.float64) * weights[index]
        else:
            total += part.astype(np.longdouble) * weights[index]
    return np.asarray(total / (len(parts) if weights is None else weights.sum()), np.float64)


def scaled(base: NDArray[Any], merged: Array, scale: float) -> Array:
    """θ + λ (merged − θ): task arithmetic (arXiv 2212.04089) for the mean, and the same step for any other method.

    λ = 1 is the merged value itself, not a rounded way there and back; λ = 0 is the base itself.
    """
    if scale == 1.0:
        return merged
    start = base.astype(np.float64)
    return start if scale == 0.0 else start + scale * (merged - start)


def krum_weights(gram: Array, byzantine: int) -> Array:
    """Multi-Krum (arXiv 1703.02757): the mean of the m = N − f − 2 updates that lie closest to their neighbours.

    Each update is scored by the sum of its squared distances to its N − f − 2 nearest others; `gram` [N, N] holds
    the updates' inner products. Raises ConfigError unless N ≥ 2f + 3.
    """
    count = len(gram)
    if count < 2 * byzantine + 3:
        raise ConfigError(
            f"multi-krum with --byzantine {byzantine} needs {2 * byzantine + 3} contributions, there are {count}"
        )
    squares = np.diag(gram)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)
    np.fill_diagonal(distances, np.inf)
    kept = count - byzantine - 2
    scores = np.sort(distances, axis=1)[:, :kept].sum(axis=1)
    weights = np.zeros(count)
    weights[np.argsort(scores, kind="stable")[:kept]] = 1 / kept
    return weights


def geometric_median_weights(gram: Array, shares: Array) -> Array:
    """The geometric median argmin_z Σᵢ αᵢ ‖dᵢ − z‖ as weights of the updates, by smoothed Weiszfeld iterations.

    Every iterate is Σ wᵢ dᵢ, so distances follow from `gram` [N, N] alone: ‖dᵢ − z‖² = Gᵢᵢ − 2 (Gw)ᵢ + wᵀGw, and
    wᵢ ∝ αᵢ / max(ν, ‖dᵢ − z‖). Paper: arXiv 1912.13445 (RFA), algorithm 2; ν is 10⁻⁶ of the largest norm.
    """
    squares = np.diag(gram)
    smallest = 1e-6 * float(np.sqrt(squares.max(initial=0.0))) or 1.0
    weights: Array = shares / shares.sum()
    for _ in range(_WEISZFELD_STEPS):
        products = gram @ weights
        distances = np.sqrt(np.maximum(squares - 2 * products + weights @ products, 0.0))
        updated = shares / np.maximum(smallest, distances)
        updated /= updated.sum()
        moved = float(np.abs(updated - weights).max())
        weights = updated
        if moved < _WEISZFELD_TOLERANCE:
            break
    return weights


# Weights per tensor ---------------------------------------------------------------------------------------------


def model_stock_share(gram: Array) -> float:
    """Model Stock (arXiv 2403.19522), equation 5, per tensor: t = N cos φ / (1 + (N − 1) cos φ).

    The fused tensor is t · mean + (1 − t) · base; cos φ is the mean cosine over all pairs of updates (0 where one
    is zero); `gram` [N, N] holds the updates' inner products within the tensor. t is held to [0, 1].
    """
    count = len(gram)
    if count < 2:
        return 1.0
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    cosines = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    cosine = float(cosines[np.triu_indices(count, 1)].mean())
    share = count * cosine / (1 + (count - 1) * cosine) if cosine > -1 / (count - 1) else 0.0
    return float(np.clip(share, 0.0, 1.0))


def slerp_weights(gram: Array, position: float) -> Array:
    """Spherical interpolation of two tensors: sin((1 − t) Ω)/sin Ω · x₀ + sin(t Ω)/sin Ω · x₁.

    Ω is the angle between the two tensors as vectors, from their inner products `gram` [2, 2]; nearly colinear
    ones are interpolated on a straight line. After Shoemake 1985, as the merging tools apply it per tensor.
    """
    norms = np.sqrt(np.diag(gram))
    cosine = gram[0, 1] / (norms[0] * norms[1]) if norms.all() else 1.0
    if abs(cosine) > _NEARLY_COLINEAR:
        return np.asarray([1 - position, position])
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    sines: Array = np.sin(np.asarray([(1 - position) * angle, position * angle]))
    return sines / float(np.sin(angle))


# Element by element ---------------------------------------------------------------------------------------------


def stacked(parts: Parts) -> Array:
    """The parts as rows of one float64 array [N, L]."""
    values = np.empty((len(parts), parts[0].size))
    for row, part in zip(values, parts, strict=True):
        row[:] = part
    return values


def median(parts: Parts) -> Array:
    """The coordinate-wise median; the mean of the middle two for an even N. Paper: arXiv 1803.01498, algorithm 1."""
    ordered = np.sort(stacked(parts), axis=0)
    middle = len(parts) // 2
    return ordered[middle] if len(parts) % 2 else mean([ordered[middle - 1], ordered[middle]])


def trimmed_mean(parts: Parts, trim: float) -> Array:
    """The coordinate-wise mean without the ⌊trim · N⌋ smallest and as many largest values.

    Paper: arXiv 1803.01498, algorithm 1 (option II). Raises ConfigError if nothing would be left.
    """
    cut = int(trim * len(parts))
    if 2 * cut >= len(parts):
        raise ConfigError(f"--trim {trim} leaves nothing of {len(parts)} contributions: give less than 0.5")
    ordered = np.sort(stacked(parts), axis=0)[cut : len(parts) - cut]
    return mean(list(ordered))


def ties(parts: Parts, base: NDArray[Any], thresholds: Array, weights: Array) -> Array:
    """TIES (arXiv 2306.01708): trim each update, elect a sign per element, average those that agree with it.

    Elements of dᵢ below `thresholds[i]` (the smallest magnitude that is kept of this tensor) count as zero; the
    sign is that of Σ wᵢ dᵢ over what is left; the result is θ + Σ wᵢ dᵢ / Σ wᵢ over the elements of that sign.
    """
    start = base.astype(np.float64)
    updates = stacked(parts) - start
    updates[np.abs(updates) < thresholds[:, None]] = 0.0
    sign = np.sign(weights @ updates)
    sign[sign == 0] = 1.0  # as the authors' code: where votes cancel, positive ones are kept
    agree = np.sign(updates) == sign
    share = weights @ agree
    total = weights @ np.where(agree, updates, 0.0)
    step: Array = np.divide(total, share, out=np.zeros_like(total), where=share > 0)
    return start + step


def dare(
    parts: Parts,
    base: NDArray[Any],
    weights: Array,
    density: float,
    keys: Sequence[str],
    name: str,
    start: int,
    seed: int,
) -> Array:
    """DARE (arXiv 2311.03099): keep each element of an update with probability `density`, rescaled by 1/density.

    Which ones is drawn by a counter-based generator keyed by (seed, contribution, tensor) and positioned at
    `start`, so that neither block sizes nor the other contributions change a draw. The results are averaged.
    """
    total = base.astype(np.float64)
    for part, weight, key in zip(parts, weights, keys, strict=True):
        kept = _uniform(seed, key, name, start, part.size) < density
        total += np.where(kept, (part - base.astype(np.float64)) * (weight / density), 0.0)
    return total


def _uniform(seed: int, key: str, name: str, start: int, count: int) -> Array:
    """Elements `start:start + count` of a stream of uniform numbers in [0, 1) that belongs to (seed, key, name)."""
    digest = hashlib.sha256(f"{seed}\x1f{key}\x1f{name}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "big"))
    generator.advance(start // 4)  # each step of the counter gives four numbers
    skipped = start % 4
    return np.random.Generator(generator).random(skipped + count)[skipped:]


def fisher(parts: Parts, information: Parts, weights: Array) -> Array:
    """Fisher merging (arXiv 2111.09832), equation 3: Σ wᵢ Fᵢ xᵢ / Σ wᵢ Fᵢ, element by element.

    `information` holds the diagonals of the empirical Fisher information; where all are zero it is the mean.
    """
    importance = stacked(information) * weights[:, None]
    total = importance.sum(axis=0)
    weighted = np.einsum("nl,nl->l", importance, stacked(parts))
    return np.where(
        total > 0, np.divide(weighted, total, out=np.zeros_like(total), where=total > 0), mean(parts, weights)
    )


# The outer step -------------------------------------------------------------------------------------------------


def outer_step(
    optimizer: str, base: NDArray[Any], merged: Array, learning_rate: float, momentum: float, state: Sequence[Array]
) -> tuple[Array, list[Array]]:
    """One step of the server's optimiser on the pseudo-gradient g = θ − merged; returns the new θ and the new state.

    `sgd`: v ← μ v + g, θ ← θ − η v. `nesterov`: v ← μ v + g, θ ← θ − η (g + μ v) (DiLoCo, arXiv 2311.08105).
    `adam`: m ← μ m + (1 − μ) g, s ← β₂ s + (1 − β₂) g², θ ← θ − η m / (√s + τ) (FedAdam, arXiv 2003.00295,
    algorithm 2, with β₂ = 0.99 and τ = 10⁻³).
    """
    start = base.astype(np.float64)
    gradient = start - merged
    if optimizer == "adam":
        first = momentum * state[0] + (1 - momentum) * gradient
        second = 0.99 * state[1] + 0.01 * gradient**2
        return start - learning_rate * first / (np.sqrt(second) + 1e-3), [first, second]
    velocity = momentum * state[0] + gradient
    step = gradient + momentum * velocity if optimizer == "nesterov" else velocity
    return start - learning_rate * step, [velocity]


# Weights and rounding -------------------------------------------------------------------------------------------
