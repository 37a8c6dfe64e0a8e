"""Weights of the contributions: equal, by training examples, or from a file; normalised and capped."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from coldctl.common.errors import ConfigError
from coldctl.common.parsing import JSON_LIMIT, find_mismatch, json_value, toml_table
from coldctl.config.settings import FuseConfig
from coldctl.fusing.blocks import Array
from coldctl.fusing.contributions import Contribution

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
