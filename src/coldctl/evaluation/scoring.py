"""Metrics, gains and their intervals.

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
_COUNTS = 1 << 22  # counts of drawn examples that are held at a time
_BOUNDS = (2.5, 97.5)  # percentiles of a 95 % interval

Verdict = Literal["better", "worse", "indistinguishable"]
Array = NDArray[Any]


@dataclass(frozen=True)
class Outcome:
    """Predictions of a model and of its baseline on the same test examples, one row per seed.

    Multi-label arrays are uint8 and end with an axis of classes: 1 for each class that an example has.
    """

    metric: str
    truth: Array  # [examples], class indices or numbers; or [examples, classes]
    predictions: Array  # [seeds, examples] or [seeds, examples, classes]
    baseline: Array  # as predictions


@dataclass(frozen=True)
class Gain:
    """A gain in points, its interval and its verdict, which is None if one seed cannot tell."""

    gain: float
    interval: tuple[float, float]
    verdict: Verdict | None


def score(metric: str, truth: Array, predictions: Array) -> float:
    """Return a metric in percent. Arrays are [examples], or [examples, classes] of 0 and 1 for multi-label.

    For multi-label `accuracy` is subset accuracy, the share of examples all of whose classes are right, and `macro_f1` the
    mean of the F1 of each class. Classes that the truth never has do not count. Correlations of a constant, which are
    undefined, count as 0.
    """
    from sklearn import metrics

    if metric == "macro_f1" and truth.ndim == 2:
        value = _mean_f1(truth, predictions, np.ones((1, len(truth))))[0]
    elif metric == "accuracy":
        value = metrics.accuracy_score(truth, predictions)
    elif metric == "macro_f1":
        value = metrics.f1_score(truth, predictions, average="macro", labels=np.unique(truth), zero_division=0.0)
    elif metric == "matthews":
        value = metrics.matthews_corrcoef(truth, predictions)
    else:
        value = _correlation(metric, truth, predictions)
    return 100.0 * float(value)


def resampled_gains(outcome: Outcome, seed: int, trainings: int | None = None) -> NDArray[np.float64]:
    """Return the gain in each of `RESAMPLES` crossed resamples, in points: float64 [RESAMPLES].

    Examples are drawn by `seed`. The outcome's seeds are drawn by `trainings`, which is the same for all datasets of one
    multitask training since they share its seeds; by default they are drawn by `seed`, too.
    """
    generator = np.random.default_rng(seed)
    seeds, examples = outcome.predictions.shape[:2]
    seed_generator = np.random.default_rng((seed, 1) if trainings is None else trainings)
    counts = seed_generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)  # how often each seed was drawn
    if outcome.metric == "accuracy" or outcome.truth.ndim == 2:
        per_seed = _accuracy_gains(outcome) if outcome.metric == "accuracy" else _f1_gains(outcome)
        even = np.full(examples, 1 / examples)
        step = max(1, _COUNTS // examples)  # all counts at once would take gigabytes
        sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
        gains_by_seed = np.concatenate([per_seed(generator.multinomial(examples, even, size)) for size in sizes])
        gains: NDArray[np.float64] = 100.0 * np.sum(counts * gains_by_seed, axis=1) / seeds
        return gains
    gains = np.empty(RESAMPLES)
    measure = _fast_metric(outcome.metric)
    for resample in range(RESAMPLES):
        drawn = generator.integers(0, examples, (examples,))
        truth = outcome.truth[drawn]
        gains[resample] = np.mean(
            [
                measure(truth, outcome.predictions[row][drawn]) - measure(truth, outcome.baseline[row][drawn])
                for row in np.repeat(np.arange(seeds), counts[resample]).tolist()
            ]
        )
    return 100.0 * gains


def judged(gain: float, resamples: NDArray[np.float64], *, certain: bool) -> Gain:
    """Return a gain with its interval and verdict. Without `certain` (one finetuning seed) there is no verdict."""
    low, high = (float(value) for value in np.percentile(resamples, _BOUNDS))
    verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "indistinguishable"
    return Gain(gain, (low, high), verdict if certain else None)


def average(gains: Sequence[float], resamples: Sequence[NDArray[np.float64]], *, certain: bool) -> Gain:
    """Return the gain averaged over fixed datasets, which are resampled independently of each other."""
    return judged(float(np.mean(gains)), np.mean(resamples, axis=0), certain=certain)


def regressions(results: Mapping[str, Any], margin: float) -> list[str]:
    """Return the averages over all datasets whose gain interval lies below −margin, in words: they fail the gate."""
    return [
        f"{entry['model']} by {entry['protocol']}: {entry['gain']:+.2f} points on average "
        f"[{entry['gain_interval'][0]:+.2f}, {entry['gain_interval'][1]:+.2f}]"
        for entry in results["averages"]
        if entry["group"] == "all" and entry["gain_interval"][1] < -margin
    ]


def _accuracy_gains(outcome: Outcome) -> Callable[[Array], Array]:
    """Return a function from counts of each example [resamples, examples] to gains in accuracy [resamples, seeds]."""
    hits = _right(outcome.truth, outcome.predictions) - _right(outcome.truth, outcome.baseline)
    return lambda counts: counts @ hits.T / len(outcome.truth)


def _right(truth: Array, predictions: Array) -> NDArray[np.float64]:
    """Return 1 where a prediction is right in all classes, else 0: [seeds, examples]."""
    same = predictions == truth
    return np.asarray(same.all(-1) if truth.ndim == 2 else same, np.float64)


def _f1_gains(outcome: Outcome) -> Callable[[Array], Array]:
    """Return a function from counts of each example [resamples, examples] to gains in multi-label F1 [resamples, seeds]."""

    def gains(counts: Array) -> Array:
        pairs = zip(outcome.predictions, outcome.baseline, strict=True)
        return np.stack(
            [_mean_f1(outcome.truth, new, counts) - _mean_f1(outcome.truth, old, counts) for new, old in pairs], 1
        )

    return gains


def _mean_f1(truth: Array, predictions: Array, counts: Array) -> Array:
    """Return the mean F1 over the classes that the truth has, for each row of `counts`.

    `truth` and `predictions` are 0 and 1 [examples, classes].
    """
    weights = counts.astype(np.float32)  # sums of whole numbers are exact in float32, and twice as fast
    actual, predicted, hits = (
        np.asarray(weights @ labels.astype(np.float32), np.float64)
        for labels in (truth, predictions, truth & predictions)
    )
    present = actual > 0
    scores = np.where(present, 2 * hits / np.maximum(actual + predicted, 1), 0.0)
    return np.asarray(scores.sum(1) / np.maximum(present.sum(1), 1))


def _fast_metric(metric: str) -> Callable[[Array, Array], float]:
    """Return the same metric as a function without the checks that need not be repeated for each resample."""
    if metric in ("pearson", "spearman"):
        return lambda truth, predictions: _correlation(metric, truth, predictions)

    def measure(truth: Array, predictions: Array) -> float:
        classes = int(max(truth.max(), predictions.max())) + 1
        confusion = np.bincount(truth * classes + predictions, minlength=classes * classes).reshape(classes, classes)
        hits, actual, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        if metric == "macro_f1":
            present = actual > 0
            return float(np.mean(2 * hits[present] / (actual[present] + predicted[present])))
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
