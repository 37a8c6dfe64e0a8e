"""How a block of contributions becomes a block of the fused model, once all that must be known first is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coldctl.config.settings import FuseConfig
from coldctl.fusing import methods
from coldctl.fusing.blocks import Block
from coldctl.fusing.methods import Array

WEIGHTED = ("mean", "task-arithmetic", "multi-krum", "geometric-median")  # one weight per contribution
PER_TENSOR = ("model-stock", "slerp")
UNWEIGHTED = ("multi-krum", "median", "trimmed-mean", "model-stock", "slerp")  # refuse --weights
DENSITY = {"ties": 0.2, "dare": 0.5}  # what the papers recommend to keep
OUTER_STATES = {"sgd": ("momentum",), "nesterov": ("momentum",), "adam": ("momentum", "variance")}


@dataclass(frozen=True)
class TensorWeights:
    """Weights of the contributions within one tensor, and of the base."""

    contributions: Array
    base: float


@dataclass
class Recipe:
    """A method with its parameters found: `apply` is pure."""

    config: FuseConfig
    weights: Array  # [N], sum to one
    keys: Sequence[str]  # what tells the contributions apart, for seeded draws
    shares: Array | None = None  # [N], what the weights were before they were made to sum to one
    scale: float = 1.0
    tensor_weights: Mapping[str, TensorWeights] = field(default_factory=dict)
    thresholds: Mapping[str, Array] = field(default_factory=dict)

    def merged(self, block: Block) -> Array:
        """The method's own result for one block, before any scale: float64 [L]."""
        config, parts = self.config, block.contributions
        method = config.method
        if method in WEIGHTED:
            return methods.mean(parts, self.weights if self.shares is None else self.shares)
        if method in PER_TENSOR:
            shares = self.tensor_weights[block.name]
            total = methods.stacked(parts).T @ shares.contributions
            return np.asarray(total + shares.base * block.base.astype(np.float64) if shares.base else total)
        if method == "median":
            return methods.median(parts)
        if method == "trimmed-mean":
            return methods.trimmed_mean(parts, config.trim)
        if method == "ties":
            return methods.ties(parts, block.base, self.thresholds[block.name], self.weights)
        if method == "dare":
            density = self.density
            return methods.dare(
                parts, block.base, self.weights, density, self.keys, block.name, block.start, config.seed
            )
        return methods.fisher(parts, block.companions[: len(parts)], self.weights)

    def apply(self, block: Block) -> Array:
        """The fused block: the method's result, scaled: float64 [L]."""
        return methods.scaled(block.base, self.merged(block), self.scale)

    @property
    def density(self) -> float:
        """The share of elements that sparse methods keep."""
        return self.config.density or DENSITY.get(self.config.method, 1.0)
