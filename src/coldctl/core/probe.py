"""Linear probing: features of the frozen body, then a solve to convergence, not a training run.

Features are the mean (or the first) of the last hidden state, standardised by train statistics; the head is
multinomial logistic regression over a fixed grid of C, chosen on validation, not refitted (ridge for numbers).
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from coldctl.core.model import Encoded, collate
from coldctl.core.progress import Progress
from coldctl.core.training import sorted_batches

GRID = (0.001, 0.01, 0.1, 1.0)  # C, the inverse strength of the L2 penalty per example sum
_ITERATIONS = 1000
_BATCH = 32

Array = NDArray[Any]


def features(
    body: nn.Module,
    encoded: Encoded,
    pooling: str,
    padding: int,
    device: torch.device,
    progress: Progress,
    task: str,
) -> NDArray[np.float32]:
    """Pooled last hidden states, float32 [examples, hidden size]; `pooling` is "mean" (over real tokens) or "first"."""
    rows: Array = np.empty((0, 0), np.float32)
    with torch.inference_mode():
        for batch in sorted_batches(encoded.lengths, _BATCH):
            inputs = collate(encoded, batch, padding, device)
            hidden = body(**inputs).last_hidden_state
            if pooling == "first":
                pooled = hidden[:, 0]
            else:
                mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                pooled = (hidden * mask).sum(1) / mask.sum(1)
            if not rows.size:
                rows = np.empty((len(encoded), pooled.shape[-1]), np.float32)
            rows[batch] = pooled.float().cpu().numpy()
            progress.advance(task, len(batch))
    return rows


def probe(
    train: tuple[Array, Array],
    validation: tuple[Array, Array],
    test: Array,
    measure: Callable[[Array, Array], float],
    *,
    regression: bool,
) -> tuple[Array, float, float]:
    """Fit the head and predict: test predictions, the C that validation chose, and its validation score.

    `train` and `validation` are (features [n, hidden], labels [n]); `measure(truth, predictions)` is higher for
    better. The smallest C wins a tie. Deterministic.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    centre, spread = train[0].mean(0, dtype=np.float64), train[0].std(0, dtype=np.float64)
    spread[spread == 0] = 1.0
    inputs, known, unknown = [((part - centre) / spread).astype(np.float64) for part in (train[0], validation[0], test)]
    best: tuple[float, float, Array] | None = None
    head: Any = None if regression else LogisticRegression(max_iter=_ITERATIONS, tol=1e-4, warm_start=True)
    for strength in GRID:
        if regression:
            head = Ridge(alpha=1 / strength)
        else:
            head.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what stops short of convergence still is a probe; validation judges it
            head.fit(inputs, train[1])
        reached = measure(validation[1], head.predict(known))
        if best is None or reached > best[0]:
            best = (reached, strength, head.predict(unknown))
    assert best is not None
    return best[2], best[1], best[0]
