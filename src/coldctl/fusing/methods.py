"""Merge methods: the arithmetic in short pure functions, and the registry `METHODS`.

Three kinds of methods, by what they must know before the first element can be written:

- one weight per contribution (`mean`, `multi-krum`, `geometric-median`), found from the updates' inner products;
- weights per tensor (`model-stock`, `slerp`), found from the inner products within that tensor;
- element by element (`median`, `trimmed-mean`, `ties`, `dare`, `fisher`).

Notation: N contributions xᵢ of the base θ, updates dᵢ = xᵢ − θ, weights wᵢ that sum to one.
"""

import difflib
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.common.errors import ConfigError
from coldctl.config.settings import FuseConfig
from coldctl.fusing.blocks import Array, Block
from coldctl.fusing.recipe import Method, Need, Recipe

Parts = Sequence[NDArray[Any]]

_PIECE = 1 << 16  # elements converted and added at a time: what stays in the core's own cache
_NEARLY_COLINEAR = 0.9995  # slerp falls back to a straight line above this cosine
_WEISZFELD_STEPS = 100
_WEISZFELD_TOLERANCE = 1e-10

# One weight per contribution ------------------------------------------------------------------------------------


def mean(parts: Parts, weights: Array | None = None) -> Array:
    """Return the mean Σᵢ wᵢ xᵢ / Σᵢ wᵢ of equally long arrays of any floating dtype: ColD Fusion's fuse step for equal weights.

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
    """Return the same mean, summed in extended precision.

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
    """Return the geometric median argmin_z Σᵢ αᵢ ‖dᵢ − z‖ as weights of the updates, by smoothed Weiszfeld iterations.

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
    """Return the parts as rows of one float64 array [N, L]."""
    values = np.empty((len(parts), parts[0].size))
    for row, part in zip(values, parts, strict=True):
        row[:] = part
    return values


def median(parts: Parts) -> Array:
    """Return the coordinate-wise median; the mean of the middle two for an even N. Paper: arXiv 1803.01498, algorithm 1."""
    ordered = np.sort(stacked(parts), axis=0)
    middle = len(parts) // 2
    return ordered[middle] if len(parts) % 2 else mean([ordered[middle - 1], ordered[middle]])


def trimmed_mean(parts: Parts, trim: float) -> Array:
    """Return the coordinate-wise mean without the ⌊trim · N⌋ smallest and as many largest values.

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


# The registry ---------------------------------------------------------------------------------------------------


def weighted_mean(block: Block, recipe: Recipe) -> Array:
    """Return the mean by one weight per contribution."""
    return mean(block.contributions, recipe.weights if recipe.shares is None else recipe.shares)


def mean_per_tensor(block: Block, recipe: Recipe) -> Array:
    """Return Σ wᵢ xᵢ + w θ by the weights of the block's tensor."""
    weights = recipe.tensor_weights[block.name]
    total = stacked(block.contributions).T @ weights[:-1]
    return np.asarray(total + weights[-1] * block.base.astype(np.float64) if weights[-1] else total)


def _median(block: Block, recipe: Recipe) -> Array:  # noqa: ARG001
    return median(block.contributions)


def _trimmed_mean(block: Block, recipe: Recipe) -> Array:
    return trimmed_mean(block.contributions, recipe.config.trim)


def _ties(block: Block, recipe: Recipe) -> Array:
    return ties(block.contributions, block.base, recipe.thresholds[block.name], recipe.weights)


def _dare(block: Block, recipe: Recipe) -> Array:
    parts, seed = block.contributions, recipe.config.seed
    return dare(parts, block.base, recipe.weights, recipe.density, recipe.keys, block.name, block.start, seed)


def _fisher(block: Block, recipe: Recipe) -> Array:
    return fisher(block.contributions, block.companions[: len(block.contributions)], recipe.weights)


def _krum(gram: Array, weights: Array, config: FuseConfig) -> Array:  # noqa: ARG001
    return krum_weights(gram, config.byzantine)


def _geometric_median(gram: Array, weights: Array, config: FuseConfig) -> Array:  # noqa: ARG001
    return geometric_median_weights(gram, weights)


def _model_stock(gram: Array, weights: Array, config: FuseConfig) -> Array:  # noqa: ARG001
    share = model_stock_share(gram)
    return np.append(np.full(len(gram), share / len(gram)), 1 - share)


def _slerp(gram: Array, weights: Array, config: FuseConfig) -> Array:  # noqa: ARG001
    return np.append(slerp_weights(gram, config.position), 0.0)


def _check_trim(config: FuseConfig, count: int) -> None:
    trimmed_mean([np.zeros(1)] * count, config.trim)


def _check_two(config: FuseConfig, count: int) -> None:  # noqa: ARG001
    if count != 2:
        raise ConfigError(f"slerp takes two contributions, there are {count}: take --method mean")


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a merge method, so that `--method NAME` takes it. Raises ConfigError if there is one of that name."""
    if method.name in METHODS:
        raise ConfigError(f"{method.name} is already a merge method: choose another name")
    METHODS[method.name] = method
    return method


def find_method(name: str) -> Method:
    """Return the merge method of this name. Raises ConfigError that names the nearest one if there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(name[:40], METHODS, n=1, cutoff=0.0)[0]
        choices = ", ".join(METHODS)
        raise ConfigError(f"--method {name[:40]!r} is not known, did you mean {near!r}: choose one of {choices}")
    return METHODS[name]


def method_table() -> list[tuple[str, str, str]]:
    """Return name, summary and paper of every merge method."""
    return [(method.name, method.summary, method.paper) for method in METHODS.values()]


# To add a method, write its function and one entry here. `summary` is what `coldctl fuse --help` and the docs show.
for _method in (
    Method("mean", "Σ wᵢ xᵢ", "ColD Fusion, arXiv 2212.01378", weighted_mean, linear=True),
    Method(
        "task-arithmetic",
        "θ + λ Σ wᵢ dᵢ; the same as `mean` with `--scale λ`",
        "arXiv 2212.04089",
        weighted_mean,
        linear=True,
    ),
    Method(
        "ties",
        "per tensor: keep the share `--density` of largest magnitude of each dᵢ, elect a sign per element by Σ wᵢ dᵢ, "
        "average those that agree",
        "arXiv 2306.01708",
        _ties,
        needs=Need.RANKS,
        settings=("density",),
        density=0.2,
    ),
    Method(
        "dare",
        "keep each element of dᵢ with probability `--density`, rescale by its inverse, then the mean; drawn by `--seed`",
        "arXiv 2311.03099",
        _dare,
        needs=Need.DIGESTS,
        settings=("density", "seed"),
        density=0.5,
    ),
    Method(
        "model-stock",
        "per tensor: t · mean + (1 − t) · θ, t = N cos φ / (1 + (N − 1) cos φ), held to 0 … 1",
        "arXiv 2403.19522",
        mean_per_tensor,
        needs=Need.TENSOR_GRAM,
        solve=_model_stock,
        takes_weights=False,
    ),
    Method(
        "slerp",
        "per tensor, two contributions: spherical interpolation, `--position` is the share of the second",
        "Shoemake 1985",
        mean_per_tensor,
        needs=Need.TENSOR_PRODUCTS,
        solve=_slerp,
        takes_weights=False,
        settings=("position",),
        check=_check_two,
    ),
    Method("median", "coordinate-wise median", "arXiv 1803.01498", _median, takes_weights=False),
    Method(
        "trimmed-mean",
        "coordinate-wise mean without ⌊trim · N⌋ values at each end (`--trim`)",
        "arXiv 1803.01498",
        _trimmed_mean,
        takes_weights=False,
        settings=("trim",),
        check=_check_trim,
    ),
    Method(
        "multi-krum",
        "mean of the N − f − 2 updates closest to their N − f − 2 nearest others; needs N ≥ 2f + 3 (`--byzantine f`, of "
        "whom those that `--screen reject` drops are no longer expected)",
        "arXiv 1703.02757",
        weighted_mean,
        linear=True,
        needs=Need.GRAM,
        solve=_krum,
        takes_weights=False,
        settings=("byzantine",),
    ),
    Method(
        "geometric-median",
        "argmin of Σ wᵢ ‖dᵢ − z‖ over whole models, by Weiszfeld iterations on inner products",
        "arXiv 1912.13445",
        weighted_mean,
        linear=True,
        needs=Need.GRAM,
        solve=_geometric_median,
    ),
    Method(
        "fisher",
        "Σ wᵢ Fᵢ xᵢ / Σ wᵢ Fᵢ element by element, Fᵢ from `fisher.safetensors` beside the weights",
        "arXiv 2111.09832",
        _fisher,
        needs=Need.FISHER,
    ),
):
    register(_method)
