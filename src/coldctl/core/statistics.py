"""What the updates look like: how far each contribution moved from the base, where, and whether they agree.

An update is dᵢ = contribution − base over all floating body tensors together. Sums over a block run in the
inputs' own precision (at least float32), sums over blocks in float64.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coldctl.core.blocks import Block
from coldctl.core.merge import stacked

_PIECE = 1 << 15  # elements looked at together: what stays in the core's own cache
_DEVIATIONS = 3.5  # robust deviations from the median that make an outlier (Iglewicz and Hoaglin 1993)
_LEAST_FOR_OUTLIERS = 5
_NORM_FLOOR = 0.10  # natural-log units: norms within 10 % of each other are never told apart
_COSINE_FLOOR = 0.05


@dataclass(frozen=True)
class NotFinite:
    """A not-a-number or infinity in a contribution (or, with index -1, in the base)."""

    index: int
    tensor: str


class UpdateStatistics:
    """Accumulates the updates' norms, their inner products with the mean update and, on request, with each other."""

    def __init__(self, weights: NDArray[np.float64], *, gram: bool = False) -> None:
        """`weights` are those of the mean that `add` is given."""
        count = len(weights)
        self._weights = weights
        self._squares = np.zeros(count)
        self._with_mean = np.zeros(count)
        self._mean_square = 0.0
        self._groups: dict[str, NDArray[np.float64]] = {}
        self.gram: NDArray[np.float64] | None = np.zeros((count, count)) if gram else None

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
                if self.gram is not None:
                    updates = stacked([part[piece] for part in block.contributions]) - block.base[piece]
                    self.gram += updates @ updates.T

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

    @property
    def cosines_to_others(self) -> NDArray[np.float64]:
        """The cosine of each update to the weighted mean of all the others: float64 [N].

        Unlike the cosine to the mean, a long update does not point at itself here.
        """
        count = len(self._squares)
        if count < 2:
            return np.ones(count)
        with_others = self._with_mean - self._weights * self._squares
        others = self._mean_square - 2 * self._weights * self._with_mean + self._weights**2 * self._squares
        return _ratio(with_others, np.sqrt(np.maximum(self._squares * others, 0.0)))

    def shares(self, index: int) -> dict[str, float]:
        """How one update's squared norm is spread over groups of layers: shares that sum to one."""
        total = self._squares[index]
        return {name: float(squares[index] / total) if total > 0 else 0.0 for name, squares in self._groups.items()}


def layer_group(name: str) -> str:
    """The group that a body tensor is reported under: embeddings, one per layer, or what is left.

    >>> layer_group("encoder.layer.11.output.dense.weight"), layer_group("embeddings.word_embeddings.weight")
    ('layer 11', 'embeddings')
    """
    if found := re.search(r"(?:^|\.)(?:layer|layers)\.(\d+)\.", name):
        return f"layer {found[1]}"
    return "embeddings" if "embedding" in name else "other"


def outliers(statistics: UpdateStatistics) -> Mapping[int, str]:
    """Which updates stand out, and why, by a robust rule; none below five contributions.

    An update is an outlier if the logarithm of its norm lies more than 3.5 robust deviations (1.4826 × the median
    absolute deviation) from the median, or its cosine to the mean of the others lies that far below the median.
    """
    norms = statistics.norms
    if len(norms) < _LEAST_FOR_OUTLIERS:
        return {}
    found: dict[int, str] = {}
    middle = float(np.median(norms))
    with np.errstate(divide="ignore", invalid="ignore"):
        far = _deviations(np.log(np.maximum(norms, 1e-300)), _NORM_FLOOR)
    low = _deviations(statistics.cosines_to_others, _COSINE_FLOOR)
    for index, norm in enumerate(norms):
        if abs(far[index]) > _DEVIATIONS:
            found[index] = f"its update's norm {norm:.3g} is {norm / middle if middle else np.inf:.3g} times the median"
        elif low[index] < -_DEVIATIONS:
            cosine = statistics.cosines_to_others[index]
            found[index] = f"its update points away from the others (cosine {cosine:.2f})"
    return found


def not_finite(block: Block, total: NDArray[np.float64]) -> list[NotFinite]:
    """Who has a not-a-number or infinity in this block; `total` is any sum over all of its contributions.

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
    """The tensors in which one contribution is not finite, each once, in the order found."""
    return list(dict.fromkeys(finding.tensor for finding in findings if finding.index == index))


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.divide(above, below, out=np.zeros_like(below), where=below > 0)


def _deviations(values: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """How many robust deviations each value lies from the median; `floor` is the least deviation that counts as one."""
    middle = np.median(values)
    spread = max(1.4826 * float(np.median(np.abs(values - middle))), floor)
    return (values - middle) / spread
