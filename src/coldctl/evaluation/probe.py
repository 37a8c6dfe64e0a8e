"""Linear probe: features of the frozen body, then logistic regression.

Features are the mean (or the first) of the last hidden state, standardised by train statistics; the head is
multinomial logistic regression over a fixed grid of C, chosen on validation, not refitted (ridge for numbers, one
logistic regression per class for multi-label).
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import nn

from coldctl.common.progress import Progress
from coldctl.training.batches import collate, sorted_batches
from coldctl.training.model import Encoded

GRID = (0.001, 0.01, 0.1, 1.0)  # C, the inverse strength of the L2 penalty per example sum
_ITERATIONS = 1000
_TOLERANCE = 1e-5  # of the gradient
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
    """Return pooled last hidden states, float32 [examples, hidden size]; `pooling` is "mean" (over real tokens) or "first"."""
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
) -> tuple[Array, float, float]:
    """Fit the head and return test predictions, the C that validation chose, and its validation score.

    `train` and `validation` are (features [n, hidden], labels); labels are class indices int64 [n], numbers float64
    [n], or uint8 [n, classes] for multi-label, and predictions are alike. `measure(truth, predictions)` is higher for
    better. The smallest C wins a tie. Deterministic.
    """
    centre, spread = train[0].mean(0, dtype=np.float64), train[0].std(0, dtype=np.float64)
    spread[spread == 0] = 1.0
    train_rows, validation_rows, test_rows = (
        ((rows - centre) / spread).astype(np.float64) for rows in (train[0], validation[0], test)
    )
    best: tuple[float, float, Array] | None = None
    head = _head(train[1])
    for strength in GRID:
        # On two threads products this small take several times as long, and the result would depend on the number.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore")  # a fit that stops before convergence is still judged on validation
            head.fit(train_rows, train[1], strength)
        score = measure(validation[1], head.predict(validation_rows))
        if best is None or score > best[0]:
            best = (score, strength, head.predict(test_rows))
    assert best is not None
    return best[2], best[1], best[0]


def _head(labels: Array) -> "_Ridge | _Logistic | _PerClass":
    if labels.ndim == 2:
        return _PerClass(labels.shape[1])
    return _Ridge() if labels.dtype.kind == "f" else _Logistic()


class _Ridge:
    def fit(self, inputs: Array, labels: Array, strength: float) -> None:
        from sklearn.linear_model import Ridge

        self._model = Ridge(alpha=1 / strength).fit(inputs, labels)

    def predict(self, inputs: Array) -> Array:
        return np.asarray(self._model.predict(inputs))


class _Logistic:
    """A logistic regression whose every fit starts from the solution of the last one, for a nearby C."""

    def __init__(self) -> None:
        from sklearn.linear_model import LogisticRegression

        self._model = LogisticRegression(max_iter=_ITERATIONS, tol=_TOLERANCE, warm_start=True)

    def fit(self, inputs: Array, labels: Array, strength: float) -> None:
        self._model.set_params(C=strength).fit(inputs, labels)

    def predict(self, inputs: Array) -> Array:
        return np.asarray(self._model.predict(inputs))


class _PerClass:
    """One logistic regression per column. A class that all training examples have, or none, is predicted alike for all."""

    def __init__(self, classes: int) -> None:
        self._columns = [_Logistic() for _ in range(classes)]

    def fit(self, inputs: Array, labels: Array, strength: float) -> None:
        share = labels.mean(0)
        self._constant, self._varied = share == 1, (share > 0) & (share < 1)
        for column in np.flatnonzero(self._varied):
            self._columns[column].fit(inputs, labels[:, column], strength)

    def predict(self, inputs: Array) -> Array:
        labels = np.tile(self._constant.astype(np.uint8), (len(inputs), 1))
        for column in np.flatnonzero(self._varied):
            labels[:, column] = self._columns[column].predict(inputs)
        return labels
