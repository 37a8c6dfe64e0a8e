"""Scores of the public model-recycling leaderboard for roberta-base.

`leaderboard.csv` holds scores in percent as published by IBM's model-recycling project (repository
IBM/model-recycling, `results/roberta-base_table.csv` and `roberta-base_pretrain_scores_table.md`): first the baseline,
the mean over 20 seeds; then every fully tested model; last the baseline's standard deviation.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SOURCE = "https://github.com/IBM/model-recycling"
BASELINES = ("roberta-base", "FacebookAI/roberta-base")
_FILE = Path(__file__).with_name("leaderboard.csv")
_NO_DATASET = ("model_name", "avg", "mnli_lp")


@dataclass(frozen=True)
class Standing:
    """A model's place among the published ones, by its mean over the datasets that both were measured on."""

    rank: int
    models: int  # published ones with scores on all of these datasets
    datasets: int
    mean: float
    published_baseline: float
    published_deviation: float | None  # of the mean over all 36 datasets; for fewer it was not published
    next_better: str | None


def standing(scores: Mapping[str, float]) -> Standing | None:
    """Return the rank that `scores` (percent by dataset, finetuned) would have, or None if they share no dataset with it."""
    with _FILE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    datasets = [name for name in rows[0] if name not in _NO_DATASET]
    shared = [name for name in datasets if name in scores]
    if not shared:
        return None
    baseline, *others, deviation = rows
    complete = [row for row in others if all(row[name] for name in shared)]
    means = {row["model_name"]: float(np.mean([float(row[name]) for name in shared])) for row in complete}
    mean = float(np.mean([scores[name] for name in shared]))
    better = {name: value for name, value in means.items() if value > mean}
    return Standing(
        rank=len(better) + 1,
        models=len(means),
        datasets=len(shared),
        mean=mean,
        published_baseline=float(np.mean([float(baseline[name]) for name in shared])),
        published_deviation=float(deviation["avg"]) if len(shared) == len(datasets) else None,
        next_better=min(better, key=lambda name: better[name]) if better else None,
    )
