"""Judge gains: `results.json` from the stored predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from coldctl.common.digests import derived_seed
from coldctl.config.settings import PROTOCOLS, DatasetConfig, EvaluateConfig
from coldctl.data.datasets import Dataset, metric_of
from coldctl.evaluation import scoring
from coldctl.evaluation.measure import Cell, Suite, measurement_of, seeds_of
from coldctl.evaluation.models import ModelUnderTest
from coldctl.evaluation.results import AverageEntry, OverlapEntry, ResultEntry, Results

_GROUPS = ("all", "seen", "unseen")
_Entry = dict[str, Any]
_Resamples = NDArray[np.float64]


@dataclass(frozen=True)
class _Predictions:
    """The test predictions of one model on one dataset with one seed, and the name of the cell that holds them."""

    cell: str
    labels: NDArray[Any]


_Measured = dict[tuple[str, str, str, int], _Predictions]  # by model, dataset, protocol and seed


def judge_gains(
    models: Sequence[ModelUnderTest],
    suite: Suite,
    loaded: Mapping[str, Dataset],
    cells: Sequence[Cell],
    overlaps: list[OverlapEntry],
) -> Results:
    """Return `results.json`: an entry per model, dataset and protocol, then the averages over groups of datasets.

    The first model is the baseline. Raises OutputError if a cell was changed or removed since it was measured.
    """
    measured = _read_predictions(cells, loaded)
    baseline, *others = models
    results: list[_Entry] = []
    averages: list[_Entry] = []
    for model in others:
        protocols = {cell.protocol for cell in cells if cell.model == model}
        for protocol in [name for name in PROTOCOLS if name in protocols]:
            pairs = [
                _Pair(model.name, baseline.name, dataset, loaded[dataset.name], protocol, suite.config)
                for dataset in suite.datasets
            ]
            judged = [pair.judge(measured) for pair in pairs]
            results += [entry for entry, _ in judged]
            averages += _averages(judged, certain=pairs[0].certain)
    return {
        "schema": 1,
        "baseline": {"name": baseline.name, "body_digest": baseline.body_digest},
        "models": [
            {"name": model.name, "body_digest": model.body_digest, "run": model.run, "iteration": model.iteration}
            for model in others
        ],
        "fingerprints": {dataset.name: loaded[dataset.name].fingerprint for dataset in suite.datasets},
        "results": cast(list[ResultEntry], results),
        "averages": cast(list[AverageEntry], averages),
        "overlaps": overlaps,
    }


def _read_predictions(cells: Sequence[Cell], loaded: Mapping[str, Dataset]) -> _Measured:
    measured = {}
    for cell in cells:
        predictions = measurement_of(cell)["predictions"]
        for dataset, labels in zip(cell.suite.datasets, predictions, strict=True):
            array = np.asarray(labels, loaded[dataset.name].test.labels.dtype)
            key = (cell.model.name, dataset.name, cell.protocol, cell.seed)
            measured[key] = _Predictions(PurePath(cell.path).stem, array)
    return measured


@dataclass(frozen=True)
class _Pair:
    """A model and the baseline on one dataset under one protocol."""

    model: str
    baseline: str
    config: DatasetConfig
    dataset: Dataset
    protocol: str
    settings: EvaluateConfig

    @property
    def certain(self) -> bool:
        """Return False if one seed of a training cannot tell a gain from luck."""
        return self.protocol == "linear-probe" or self.settings.seeds > 1

    def judge(self, measured: _Measured) -> tuple[_Entry, _Resamples]:
        """Return the entry of `results.json`, and the gain in each bootstrap resample."""
        seeds = seeds_of(self.protocol, self.settings)
        ours, theirs = (
            [measured[name, self.config.name, self.protocol, seed] for seed in seeds]
            for name in (self.model, self.baseline)
        )
        predictions, baseline = (np.stack([by_seed.labels for by_seed in rows]) for rows in (ours, theirs))
        metric, truth = metric_of(self.config, self.dataset), self.dataset.test.labels
        resamples = self._resampled(scoring.Outcome(metric, truth, predictions, baseline))
        scores, baseline_scores = (
            [scoring.score(metric, truth, row) for row in rows] for rows in (predictions, baseline)
        )
        mean, baseline_mean = float(np.mean(scores)), float(np.mean(baseline_scores))
        entry = {
            "model": self.model,
            "dataset": self.config.name,
            "role": self.config.role,
            "protocol": self.protocol,
            "metric": metric,
            "num_test": len(truth),
            "seeds": [
                {"seed": seed, "score": score, "baseline_score": before, "cell": new.cell, "baseline_cell": old.cell}
                for seed, score, before, new, old in zip(seeds, scores, baseline_scores, ours, theirs, strict=True)
            ],
            "mean": mean,
            "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
            "baseline_mean": baseline_mean,
            **_gain_fields(scoring.judged(mean - baseline_mean, resamples, certain=self.certain)),
        }
        return entry, resamples

    def _resampled(self, outcome: scoring.Outcome) -> _Resamples:
        """Return the gain in each resample. The datasets of one multitask training share its resampled seeds."""
        seed = self.settings.seed
        trainings = derived_seed(seed, "bootstrap", self.protocol) if self.protocol == "multitask" else None
        return scoring.resampled_gains(outcome, derived_seed(seed, "bootstrap", self.config.name), trainings)


def _averages(judged: Sequence[tuple[_Entry, _Resamples]], *, certain: bool) -> list[_Entry]:
    """Return the averages of one model under one protocol, over each group that has datasets."""
    averages = []
    for group in _GROUPS:
        members = [(entry, resamples) for entry, resamples in judged if group in ("all", entry["role"])]
        if not members:
            continue
        entries = [entry for entry, _ in members]
        gain = scoring.average(
            [entry["gain"] for entry in entries], [resamples for _, resamples in members], certain=certain
        )
        averages.append(
            {
                "model": entries[0]["model"],
                "protocol": entries[0]["protocol"],
                "group": group,
                "mean": float(np.mean([entry["mean"] for entry in entries])),
                "baseline_mean": float(np.mean([entry["baseline_mean"] for entry in entries])),
                **_gain_fields(gain),
            }
        )
    return averages


def _gain_fields(gain: scoring.Gain) -> _Entry:
    return {"gain": gain.gain, "gain_interval": list(gain.interval), "verdict": gain.verdict}
