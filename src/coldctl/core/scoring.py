"""Metrics, gains, and how sure one can be of them.

Scores are percent and gains are points. Intervals are 95 % percentile intervals of a crossed paired bootstrap:
each resample draws seeds and, independently, test examples, the same for model and baseline; the metric is
computed anew on each; datasets are fixed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_BOUNDS = (2.5, 97.5)  # percentiles of a 95 % interval

Verdict = Literal["better", "worse", "indistinguishable"]
Array = NDArray[Any]


@dataclass(frozen=True)
class Outcome:
    """Predictions of a model and of its baseline on the same test examples, one row per seed."""

    metric: str
    truth: Array  # [examples], class indices or numbers
    predictions: Array  # [seeds, examples]
    baseline: Array  # [seeds, examples]


@dataclass(frozen=True)
class Gain:
    """A gain in points, its interval, and what it says. No verdict where one seed cannot tell."""

    gain: float
    interval: tuple[float, float]
    verdict: Verdict | None


def score(metric: str, truth: Array, predictions: Array) -> float:
    """A metric in percent. Correlations of a constant, which are undefined, count as 0."""
    from sklearn import metrics

    if metric == "accuracy":
        value = metrics.accuracy_score(truth, predictions)
    elif metric == "macro_f1":
        value = metrics.f1_score(truth, predictions, average="macro", labels=np.unique(truth), zero_division=0.0)
    elif metric == "matthews":
        value = metrics.matthews_corrcoef(truth, predictions)
    else:
        value = _correlation(metric, truth, predictions)
    return 100.0 * float(value)


def resampled_gains(outcome: Outcome, seed: int) -> NDArray[np.float64]:
    """The gain in each of `RESAMPLES` crossed resamples, in points: float64 [RESAMPLES]."""
    generator = np.random.default_rng(seed)
    seeds, examples = outcome.predictions.shape
    if outcome.metric == "accuracy":
        # The mean over drawn seeds and examples of a difference of hits, as products of counts.
        hits = (outcome.predictions == outcome.truth).astype(np.float64) - (outcome.baseline == outcome.truth)
        drawn = generator.multinomial(examples, np.full(examples, 1 / examples), RESAMPLES) / examples
        chosen = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
        gains: NDArray[np.float64] = 100.0 * np.einsum("rs,se,re->r", chosen, hits, drawn, optimize=True)
        return gains
    gains = np.empty(RESAMPLES)
    measure = _fast_metric(outcome.metric)
    for resample in range(RESAMPLES):
        drawn = generator.integers(0, examples, (examples,))
        rows = generator.integers(0, seeds, (seeds,))
        truth = outcome.truth[drawn]
        gains[resample] = np.mean(
            [
                measure(truth, outcome.predictions[row][drawn]) - measure(truth, outcome.baseline[row][drawn])
                for row in rows.tolist()
            ]
        )
    return 100.0 * gains


def judged(gain: float, resamples: NDArray[np.float64], *, certain: bool) -> Gain:
    """A gain with its interval and verdict. Without `certain` (one finetuning seed) there is no verdict."""
    low, high = (float(value) for value in np.percentile(resamples, _BOUNDS))
    verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "indistinguishable"
    return Gain(gain, (low, high), verdict if certain else None)


def average(gains: Sequence[float], resamples: Sequence[NDArray[np.float64]], *, certain: bool) -> Gain:
    """The gain averaged over fixed datasets, which are resampled independently of each other."""
    return judged(float(np.mean(gains)), np.mean(resamples, axis=0), certain=certain)


def regressions(results: Mapping[str, Any], margin: float) -> list[str]:
    """The gate: averages over all datasets in a `results.json` whose gain interval lies below −margin, in words."""
    return [
        f"{entry['model']} by {entry['protocol']}: {entry['gain']:+.2f} points on average "
        f"[{entry['gain_interval'][0]:+.2f}, {entry['gain_interval'][1]:+.2f}]"
        for entry in results["averages"]
        if entry["group"] == "all" and entry["gain_interval"][1] < -margin
    ]


def _fast_metric(metric: str) -> Callable[[Array, Array], float]:
    """The same metrics on small integers or numbers, without the checks that a resample need not repeat."""
    if metric in ("pearson", "spearman"):
        return lambda truth, predictions: _correlation(metric, truth, predictions)

    def measure(truth: Array, predictions: Array) -> float:
        classes = int(max(truth.max(), predictions.max())) + 1
        confusion = np.bincount(truth * classes + predictions, minlength=classes * classes).reshape(classes, classes)
        hits, actual, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        if metric == "macro_f1":
            there = actual > 0
            return float(np.mean(2 * hits[there] / (actual[there] + predicted[there])))
        total = float(confusion.sum())
        covariance = hits.sum() * total - actual @ predicted
        spread = np.sqrt((total**2 - predicted @ predicted) * (total**2 - actual @ actual))
        return float(covariance / spread) if spread > 0 else 0.0

    return measure


def _correlation(metric: str, truth: Array, predictions: Array) -> float:
    from scipy import stats

    if np.ptp(truth) == 0 or np.ptp(predictions) == 0:
        return 0.0
    if metric == "spearman":
        truth, predictions = stats.rankdata(truth), stats.rankdata(predictions)
    return float(np.corrcoef(truth, predictions)[0, 1])
