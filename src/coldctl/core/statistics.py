"""What the updates look like: how far each contribution moved from the base, and whether they agree.

An update is dᵢ = contribution − base over all floating body tensors together. Sums run in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coldctl.core.blocks import Block


@dataclass(frozen=True)
class NotFinite:
    """A not-a-number or infinity in a contribution (or, with index −1, in the base)."""

    index: int
    tensor: str


class UpdateStatistics:
    """Accumulates, block by block, the norms of the updates and their inner products with the mean update."""

    def __init__(self, count: int) -> None:
        self._squares = np.zeros(count)
        self._with_mean = np.zeros(count)
        self._mean_square = 0.0

    def add(self, block: Block, mean: NDArray[np.float64]) -> None:
        """Take in one block and the mean of its contributions."""
        base = block.base.astype(np.float64)
        update = np.empty_like(base)
        with np.errstate(invalid="ignore"):  # values that are not finite are found and named elsewhere
            towards = mean - base
            self._mean_square += float(towards @ towards)
            for index, part in enumerate(block.contributions):
                np.subtract(part, base, out=update)
                self._squares[index] += update @ update
                self._with_mean[index] += update @ towards

    @property
    def norms(self) -> list[float]:
        """‖dᵢ‖ per contribution."""
        return [float(value) for value in np.sqrt(self._squares)]

    @property
    def mean_norm(self) -> float:
        """‖mean of the dᵢ‖."""
        return float(np.sqrt(self._mean_square))

    @property
    def cosines(self) -> list[float]:
        """The cosine of each update to the mean update; 0 where one of them is zero."""
        scale = np.sqrt(self._squares * self._mean_square)
        with np.errstate(invalid="ignore"):
            cosines = np.divide(self._with_mean, scale, out=np.zeros_like(scale), where=scale > 0)
        return [float(value) for value in cosines]


def not_finite(block: Block, total: NDArray[np.float64]) -> list[NotFinite]:
    """Who has a not-a-number or infinity in this block; `total` is any sum over its contributions.

    A sum of float64 that is finite has only finite terms, so the usual case costs one pass over the sum.
    """
    if np.isfinite(total.sum()) and np.isfinite(block.base.astype(np.float64, copy=False).sum()):
        return []
    return [
        NotFinite(index - 1, block.name)
        for index, part in enumerate([block.base, *block.contributions])
        if not np.isfinite(part.astype(np.float64)).all()
    ]


def names_of(findings: Sequence[NotFinite], index: int) -> list[str]:
    """The tensors in which one contribution is not finite, each once, in the order found."""
    return list(dict.fromkeys(finding.tensor for finding in findings if finding.index == index))
