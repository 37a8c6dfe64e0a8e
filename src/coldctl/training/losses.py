"""Losses by problem type, in transformers' terms: single-label, multi-label, or regression."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def problem_of(model: nn.Module) -> str:
    """Return the model's problem type: `SINGLE_LABEL`, `MULTI_LABEL` or `REGRESSION`."""
    return str(model.config.problem_type)  # type: ignore[union-attr]


def example_losses(
    model: nn.Module, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Return the loss of each example, float32 [n].

    `weights` are class weights float32 [classes], or empty; they and `smoothing` apply to single-label problems only.
    """
    problem = problem_of(model)
    if problem == REGRESSION:
        return (logits.squeeze(-1) - labels).square()
    if problem == MULTI_LABEL:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    return nn.functional.cross_entropy(
        logits, labels, weights if len(weights) else None, reduction="none", label_smoothing=smoothing
    )


def negative_log_likelihoods(model: nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return −log p(label) of each example, float32 [n]; a regression's labels are normal with variance 1."""
    losses = example_losses(model, logits, labels, torch.zeros(0), 0.0)
    if problem_of(model) == REGRESSION:
        return losses / 2
    return losses * labels.shape[-1] if problem_of(model) == MULTI_LABEL else losses


def class_weights(model: nn.Module, labels: NDArray[np.int64]) -> torch.Tensor:
    """Return balanced weights float32 [classes], n / (classes · n_c); empty unless the problem is single-label."""
    if problem_of(model) != SINGLE_LABEL:
        return torch.zeros(0)
    counts = np.bincount(labels, minlength=int(model.config.num_labels))  # type: ignore[union-attr, arg-type]
    weights = counts.sum() / (np.maximum(counts, 1) * np.count_nonzero(counts))
    return torch.from_numpy(weights.astype(np.float32))


class Targets:
    """Training labels as the loss takes them: a regression's are standardized to mean 0 and deviation 1.

    Without that, a training whose labels lie far from 0 learns little but their mean.
    """

    def __init__(self, model: nn.Module, labels: NDArray[Any]) -> None:
        self._model, self._labels, self._problem = model, labels, problem_of(model)
        numbers = self._problem == REGRESSION and len(labels) > 0
        self._mean = float(labels.mean()) if numbers else 0.0
        self._deviation = (float(labels.std()) or 1.0) if numbers else 1.0

    def of(self, batch: NDArray[np.int64]) -> torch.Tensor:
        """Return the targets of the examples at `batch`: int64 [n], or float32 [n] or [n, classes]."""
        labels = self._labels[batch]
        if self._problem == REGRESSION:
            labels = (labels - self._mean) / self._deviation
        tensor = torch.from_numpy(np.ascontiguousarray(labels))
        return tensor if self._problem == SINGLE_LABEL else tensor.float()

    def unscale_model(self) -> None:
        """Change the model's last layer, in place, so that a regression predicts in the labels' own units."""
        if self._problem != REGRESSION:
            return
        layers = [module for module in self._model.modules() if isinstance(module, nn.Linear)]
        last = [layer for layer in layers if layer.out_features == 1 and layer.weight.requires_grad][-1]
        with torch.no_grad():
            last.weight.mul_(self._deviation)
            last.bias.mul_(self._deviation).add_(self._mean)
