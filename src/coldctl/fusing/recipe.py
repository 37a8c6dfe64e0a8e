"""A merge method with its parameters for one fuse: weights, and the step from the base.

Weights are equal, by training examples, or from a file. They are normalised, and capped if --max-share asks for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.common.errors import ConfigError
from coldctl.common.parsing import JSON_LIMIT, find_mismatch, json_value, toml_table
from coldctl.config.settings import FuseConfig
from coldctl.fusing.blocks import Array, Block
from coldctl.fusing.contributions import Contribution

OUTER_STATES = {"sgd": ("momentum",), "nesterov": ("momentum",), "adam": ("momentum", "variance")}


class Need(StrEnum):
    """Knowledge that a method needs before the first element can be written."""

    NOTHING = "nothing"
    DIGESTS = "body digests"
    FISHER = "Fisher information"  # read beside the weights
    GRAM = "inner products of the updates"
    TENSOR_GRAM = "inner products of the updates, per tensor"
    TENSOR_PRODUCTS = "inner products of the contributions, per tensor"
    RANKS = "ranks of the updates' magnitudes, per tensor"

    @property
    def passes(self) -> int:
        """The number of passes over the inputs, the writing one included."""
        return 1 if self in (Need.NOTHING, Need.DIGESTS, Need.FISHER) else 2


@dataclass(frozen=True)
class Method:
    """A merge method: one function, and what everybody else must know of it."""

    name: str
    summary: str  # the fused model in one line, for help and docs
    paper: str
    # The method's own result for one block, before any scale: float64 [L].
    merge: Callable[[Block, "Recipe"], Array]
    linear: bool = False  # the result is Σ wᵢ xᵢ by `Recipe.weights`
    needs: Need = Need.NOTHING
    # Weights from a Gram matrix [N, N] and the nominal weights [N]: [N], or [N + 1] per tensor, the last of the base.
    solve: Callable[[Array, Array, FuseConfig], Array] | None = None
    takes_weights: bool = True
    settings: Sequence[str] = ()  # settings that only some methods read
    density: float = 1.0  # share of an update that is kept if --density is not given
    code: str | None = None  # digest of the code of a user's own method, which may change under the same name
    # Raises ConfigError if the settings do not go with this number of contributions.
    check: Callable[[FuseConfig, int], None] | None = None

    @property
    def per_tensor(self) -> bool:
        """Whether the result is Σ wᵢ xᵢ + w θ with weights per tensor."""
        return self.needs in (Need.TENSOR_GRAM, Need.TENSOR_PRODUCTS)


@dataclass(frozen=True)
class Recipe:
    """A method with its parameters for one fuse."""

    config: FuseConfig
    method: Method
    weights: Array  # [N], sum to one
    keys: Sequence[str]  # tell the contributions apart, for seeded draws
    shares: Array | None = None  # [N], the weights before they were made to sum to one
    scale: float = 1.0
    tensor_weights: Mapping[str, Array] = field(default_factory=dict)  # [N + 1] by tensor, the last of the base
    thresholds: Mapping[str, Array] = field(default_factory=dict)  # [N] by tensor: the smallest magnitude that is kept

    def apply(self, block: Block) -> Array:
        """Return the fused block, float64 [L]: the method's result, scaled."""
        return scaled(block.base, self.method.merge(block, self), self.scale)

    @property
    def density(self) -> float:
        """The share of elements that sparse methods keep."""
        return self.config.density or self.method.density


def scaled(base: NDArray[Any], merged: Array, scale: float) -> Array:
    """Return θ + λ (merged − θ): task arithmetic (arXiv 2212.04089) for the mean, and the same step for any other method.

    λ = 1 is the merged value itself, not a rounded way there and back; λ = 0 is the base itself.
    """
    if scale == 1.0:
        return merged
    start = base.astype(np.float64)
    return start if scale == 0.0 else start + scale * (merged - start)


def outer_step(
    optimizer: str, base: NDArray[Any], merged: Array, learning_rate: float, momentum: float, state: Sequence[Array]
) -> tuple[Array, list[Array]]:
    """Make one step of the server's optimiser on the pseudo-gradient g = θ − merged; returns the new θ and the new state.

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


_EXAMPLES_SHARE = 2.0  # with --weights examples no contribution gets more than this many equal shares


def shares_of(
    contributions: Sequence[Contribution], config: FuseConfig, table: Mapping[str, float] | None
) -> list[float]:
    """Return the weights of contributions before they are normalised. `table` is what the file of weights holds.

    Raises ConfigError for a contribution whose weight is not stated.
    """
    if config.weights == "equal":
        return [1.0] * len(contributions)
    if config.weights == "examples":
        return [_examples(contribution) for contribution in contributions]
    table = table or {}
    names = [one.name if one.name in table else one.contributor for one in contributions]
    if missing := [name for name in names if name not in table]:
        raise ConfigError(f"{config.weights} gives no weight for {missing[0]!r}: add it (0 leaves it out)")
    return [table[name] for name in names]


def weights_of(shares: Sequence[float] | Array, config: FuseConfig) -> Array:
    """Return shares as weights, float64 [N], that sum to one and observe --max-share. Raises ConfigError."""
    count = len(shares)
    if config.weights == "equal":
        return np.full(count, 1 / count)
    cap = config.max_share or None
    if config.weights == "examples":  # what a contributor declares of its size proves nothing
        cap = max(config.max_share or min(1.0, _EXAMPLES_SHARE / count), 1 / count)
    return normalised(shares, cap)


def _examples(contribution: Contribution) -> float:
    source = contribution.checkpoint.manifest if contribution.checkpoint else None
    count = source.get("dataset", {}).get("num_train") if source else None
    if not isinstance(count, int) or count <= 0:
        raise ConfigError(
            f"--weights examples: {contribution.name} does not say how many training examples it had: give a FILE"
        )
    return float(count)


def load_weights(path: Path) -> dict[str, float]:
    """Load names and weights from a JSON or TOML file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(JSON_LIMIT + 1)
        table = json_value(data) if path.suffix == ".json" else toml_table(data)
    except FileNotFoundError:
        raise ConfigError(f"--weights {path}: give equal, examples, or a file that exists") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--weights {path} cannot be read: {error}") from None
    if find_mismatch(table, dict[str, float]):
        raise ConfigError(f"--weights {path}: write one `name = weight` per contribution (JSON or TOML)")
    return {str(key): float(value) for key, value in table.items()}


def normalised(shares: Sequence[float] | Array, largest: float | None = None) -> Array:
    """Return shares as weights that sum to one, none above `largest`: what is cut off goes to the others in proportion.

    Raises ConfigError if a share is negative or not finite, all are zero, or `largest` cannot be met.
    """
    weights: Array = np.asarray(shares, np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ConfigError(f"weights must be finite, not negative, and not all zero: {np.asarray(shares).tolist()}")
    weights = np.divide(weights, weights.sum())
    if largest is None:
        return weights
    if largest * np.count_nonzero(weights) < 1 - 1e-9:
        raise ConfigError(
            f"--max-share {largest} is less than an equal share of {np.count_nonzero(weights)} contributions"
        )
    while (weights > largest * (1 + 1e-12)).any():
        full = weights >= largest
        weights[full] = largest
        free = weights[~full]
        weights[~full] = free * (1 - largest * np.count_nonzero(full)) / free.sum()
    return weights
