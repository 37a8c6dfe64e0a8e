"""Statistics of updates: norms, cosines, Gram matrix, and the rules for outliers.

An update is dᵢ = contribution − base over all floating body tensors together. Sums over a block run in the
inputs' own precision (at least float32), sums over blocks in float64.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.fusing.blocks import Block

_PIECE = 1 << 15  # elements looked at together: what stays in the core's own cache
_TOGETHER = 1 << 18  # the same over all contributions, where their inner products are taken
_LEAST_FOR_OUTLIERS = 5
# How many robust deviations (1.4826 × the median absolute deviation) make an outlier among so many: in 99 of 100 samples of
# a normal distribution none lies further from the median. Few values estimate their own spread badly, so the fewer, the more.
_COUNTS = (5, 6, 7, 8, 9, 10, 12, 16, 24, 32, 64, 1024, 4096)
_DEVIATIONS = (18.0, 10.5, 10.5, 8.0, 8.0, 6.9, 6.3, 5.6, 5.0, 4.7, 4.4, 4.4, 4.75)
_NORM_FLOOR = 0.35  # natural-log units: norms within 40 % of the median are never told apart
_COSINE_FLOOR = 0.175
_OPPOSED = -0.1  # unlike tasks are orthogonal, up to a few hundredths: from here on an update undoes what the others do
_COPY = (
    0.9  # the cosine of two updates that were not trained apart: even of the same data, with another seed, it is small
)


@dataclass(frozen=True)
class NotFinite:
    """A not-a-number or infinity in a contribution (or, with index -1, in the base)."""

    index: int
    tensor: str


class UpdateStatistics:
    """Accumulates the updates' norms, their inner products with the mean update and, on request, with each other."""

    def __init__(self, count: int, *, gram: bool = False, pairs: bool = False) -> None:
        """`gram` asks for the inner products of all pairs in float64, `pairs` for as much as tells their directions."""
        self._squares = np.zeros(count)
        self._with_mean = np.zeros(count)
        self._mean_square = 0.0
        self._groups: dict[str, NDArray[np.float64]] = {}
        self._exact = gram
        self._products: NDArray[np.float64] | None = np.zeros((count, count)) if gram or pairs else None

    def add(self, block: Block, mean: NDArray[np.float64]) -> None:
        """Take in one block and the mean of its contributions."""
        count = len(block.contributions)
        group = self._groups.setdefault(layer_group(block.name), np.zeros(count))
        narrow = block.base.dtype == np.float32 and all(part.dtype == np.float32 for part in block.contributions)
        dtype = np.float32 if narrow else np.float64
        with np.errstate(all="ignore"):  # values that are not finite are found and named elsewhere
            for start in range(0, block.base.size, _PIECE):
                piece = slice(start, start + _PIECE)
                base = block.base[piece].astype(dtype, copy=False)
                towards = (mean[piece] - block.base[piece]).astype(dtype, copy=False)
                self._mean_square += float(towards @ towards)
                update = np.empty_like(base)
                for index, part in enumerate(block.contributions):
                    np.subtract(part[piece], base, out=update)
                    square = float(update @ update)
                    self._squares[index] += square
                    group[index] += square
                    self._with_mean[index] += float(update @ towards)
            if self._products is not None:
                self._add_products(block, np.dtype(np.float64 if self._exact else dtype))

    def _add_products(self, block: Block, dtype: np.dtype[Any]) -> None:
        assert self._products is not None
        count = len(block.contributions)
        width = max(1 << 9, min(_PIECE, _TOGETHER // count))
        updates = np.empty((count, width), dtype)
        for start in range(0, block.base.size, width):
            piece = slice(start, start + width)
            base = block.base[piece].astype(dtype, copy=False)
            rows = updates[:, : base.size]
            for row, part in zip(rows, block.contributions, strict=True):
                np.subtract(part[piece], base, out=row)
            self._products += rows @ rows.T

    @property
    def gram(self) -> NDArray[np.float64] | None:
        """The inner products ⟨dᵢ, dⱼ⟩, float64 [N, N], if they were asked for."""
        return self._products if self._exact else None

    @property
    def pairwise_cosines(self) -> NDArray[np.float64]:
        """The cosine of each pair of updates (pairs were asked for), 0 where one is zero or not finite: float64 [N, N]."""
        assert self._products is not None
        with np.errstate(all="ignore"):
            lengths = np.sqrt(np.diag(self._products))
            return np.nan_to_num(_ratio(self._products, np.outer(lengths, lengths)), nan=0.0, posinf=0.0, neginf=0.0)

    def include(self, other: "UpdateStatistics") -> None:
        """Add the sums over other blocks of the same updates."""
        self._squares += other._squares
        self._with_mean += other._with_mean
        self._mean_square += other._mean_square
        for name, squares in other._groups.items():
            self._groups[name] = self._groups.get(name, 0.0) + squares
        if self._products is not None and other._products is not None:
            self._products += other._products

    @property
    def norms(self) -> NDArray[np.float64]:
        """‖dᵢ‖ per contribution: float64 [N]."""
        return np.sqrt(self._squares)

    @property
    def mean_norm(self) -> float:
        """‖Σ wᵢ dᵢ‖."""
        return float(np.sqrt(self._mean_square))

    @property
    def cosines(self) -> NDArray[np.float64]:
        """The cosine of each update to the mean update, 0 where one of them is zero: float64 [N]."""
        return _ratio(self._with_mean, np.sqrt(self._squares * self._mean_square))

    def shares(self, index: int) -> dict[str, float]:
        """Return how one update's squared norm is spread over groups of layers: shares that sum to one."""
        total = self._squares[index]
        return {name: float(squares[index] / total) if total > 0 else 0.0 for name, squares in self._groups.items()}


def layer_group(name: str) -> str:
    """Return the group that a body tensor is reported under: embeddings, one per layer, or what is left.

    >>> layer_group("encoder.layer.11.output.dense.weight"), layer_group("embeddings.word_embeddings.weight")
    ('layer 11', 'embeddings')
    """
    if found := re.search(r"(?:^|\.)(?:layer|layers)\.(\d+)\.", name):
        return f"layer {found[1]}"
    return "embeddings" if "embedding" in name else "other"


def outliers(
    statistics: UpdateStatistics, names: Sequence[str], discounts: NDArray[np.float64] | float = 1.0
) -> Mapping[int, str]:
    """Find the outliers, with reasons, by robust rules that bear almost half of the updates being wrong; none below five.

    `discounts` [N] are what the updates were shortened by for their age, which says nothing against them.

    An update is an outlier if

    - the logarithm of its norm lies too many robust deviations from the median,
    - the median of its cosines to the others is negative and as far below that of the others: it undoes what they do;
      an update that only shares nothing with the others is another task, no outlier, or
    - it is nearly the same as one before it, while most have no such twin: it would count twice.

    Cosines of pairs, unlike those to a mean, cannot be turned by a few who work together.
    """
    norms, cosines = statistics.norms / discounts, statistics.pairwise_cosines
    count = len(norms)
    if count < _LEAST_FOR_OUTLIERS:
        return {}
    middle = float(np.median(norms))
    with np.errstate(all="ignore"):
        far = _excess(np.log(np.maximum(norms, 1e-300)), _NORM_FLOOR)
    others = cosines[~np.eye(count, dtype=bool)].reshape(count, count - 1)
    agreement = np.median(others, axis=1)
    low = _excess(agreement, _COSINE_FLOOR)
    alike = np.triu(cosines, 1) > _COPY
    twins_are_rare = np.median(others.max(axis=1)) <= _COPY
    found: dict[int, str] = {}
    for index, norm in enumerate(norms):
        earlier = [other for other in np.flatnonzero(alike[:, index]).tolist() if other not in found]
        if abs(far[index]) > 1:
            found[index] = f"its update's norm {norm:.3g} is {norm / middle if middle else np.inf:.3g} times the median"
        elif agreement[index] < _OPPOSED and low[index] < -1:
            found[index] = f"its update points against the others (median cosine {agreement[index]:.2f})"
        elif earlier and twins_are_rare:
            found[index] = f"its update is nearly that of {names[earlier[0]]} (cosine {cosines[earlier[0], index]:.4f})"
    return found


def not_finite(block: Block, total: NDArray[np.float64]) -> list[NotFinite]:
    """Return who has a not-a-number or infinity in this block; `total` is any sum over all of its contributions.

    A sum of float64 that is finite has only finite terms, so the usual case costs one pass over the sum.
    """
    with np.errstate(all="ignore"):
        if np.isfinite(total.sum()) and np.isfinite(block.base.sum(dtype=np.float64)):
            return []
    return [
        NotFinite(index - 1, block.name)
        for index, part in enumerate([block.base, *block.contributions])
        if not np.isfinite(part.astype(np.float64)).all()
    ]


def names_of(findings: Sequence[NotFinite], index: int) -> list[str]:
    """Return the tensors in which one contribution is not finite, each once, in the order found."""
    return list(dict.fromkeys(finding.tensor for finding in findings if finding.index == index))


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.divide(above, below, out=np.zeros_like(below), where=below > 0)


def _excess(values: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """Return how far each value lies from the median, in units of what makes an outlier; `floor` is the least that does."""
    middle = np.median(values)
    spread = 1.4826 * float(np.median(np.abs(values - middle)))
    allowed = float(np.interp(np.log(len(values)), np.log(_COUNTS), _DEVIATIONS)) * spread
    return (values - middle) / max(allowed, floor)
