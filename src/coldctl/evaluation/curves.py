"""Scores over iterations: the evaluations of a run side by side."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

REFERENCES = {"finetune": "finetune only", "multitask": "multitask"}  # of the baseline, as the paper draws them


@dataclass(frozen=True)
class Point:
    """The average score of one iteration's fused model, in percent, with the interval of its gain added to the baseline."""

    run: str
    iteration: int
    mean: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One protocol on one group of datasets: points by run, and the baseline's scores by the names of their lines."""

    protocol: str
    group: str
    curves: dict[str, list[Point]]
    levels: dict[str, float]


def panels_of(results: Mapping[str, Any], earlier: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """Return the panels of one evaluation and of the `earlier` iterations of its run; none without two iterations.

    All are `results.json` documents with the same baseline and datasets. Multitask training has no panel: it is drawn as
    a level, the paper's upper reference.
    """
    panels = []
    for (protocol, group), points in _points(results, *earlier).items():
        curves: dict[str, list[Point]] = {}
        for point in sorted(points, key=lambda point: point.iteration):
            curves.setdefault(point.run, []).append(point)
        if max(map(len, curves.values())) > 1:
            panels.append(Panel(protocol, group, curves, _levels(results, protocol, group)))
    split = any(panel.group == "unseen" for panel in panels)
    return [panel for panel in panels if panel.group in (("seen", "unseen") if split else ("all",))]


def _points(*documents: Mapping[str, Any]) -> dict[tuple[str, str], list[Point]]:
    """Return the points by protocol and group. Of an iteration in several documents the first one counts."""
    points: dict[tuple[str, str], dict[tuple[str, int], Point]] = {}
    for document in documents:
        models = {model["name"]: model for model in document["models"]}
        for entry in document["averages"]:
            model = models[entry["model"]]
            if model.get("iteration") is None or entry["protocol"] == "multitask":
                continue
            low, high = (entry["baseline_mean"] + bound for bound in entry["gain_interval"])
            point = Point(model["run"], model["iteration"], entry["mean"], (low, high))
            points.setdefault((entry["protocol"], entry["group"]), {}).setdefault((point.run, point.iteration), point)
    return {panel: list(of_panel.values()) for panel, of_panel in points.items()}


def _levels(results: Mapping[str, Any], protocol: str, group: str) -> dict[str, float]:
    """Return the baseline's own scores: by this protocol, finetuned, and trained on all datasets at once."""
    means = {entry["protocol"]: entry["baseline_mean"] for entry in results["averages"] if entry["group"] == group}
    levels = {"pretrained model": means[protocol]} if protocol in means else {}
    return levels | {words: means[other] for other, words in REFERENCES.items() if other in means and other != protocol}
