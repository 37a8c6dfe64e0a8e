"""Scores over iterations: what a run's evaluations say when they are put side by side."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

REFERENCES = {"finetune": "finetune only", "multitask": "multitask"}  # of the baseline, as the paper draws them


@dataclass(frozen=True)
class Point:
    """The average score of one iteration's fused model, in percent, with the interval of its gain around it."""

    run: str
    iteration: int
    mean: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One protocol on one group of datasets: points by run, and the baseline's levels by what they stand for."""

    protocol: str
    group: str
    curves: dict[str, list[Point]]
    levels: dict[str, float]


def panels(results: Mapping[str, Any], earlier: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """The panels of one evaluation, complemented by those of a run's earlier iterations; none without two iterations.

    All are `results.json` documents with the same baseline and datasets. Multitask training is no panel but a level:
    the paper's upper reference.
    """
    entries: dict[tuple[str, str], list[Point]] = {}
    seen = set()
    for document in (results, *earlier):
        models = {model["name"]: model for model in document["models"]}
        for entry in document["averages"]:
            model = models[entry["model"]]
            if model.get("iteration") is None or entry["protocol"] == "multitask":
                continue
            place = (model["run"], model["iteration"], entry["protocol"], entry["group"])
            if place in seen:
                continue
            seen.add(place)
            low, high = (entry["baseline_mean"] + bound for bound in entry["gain_interval"])
            point = Point(model["run"], model["iteration"], entry["mean"], (low, high))
            entries.setdefault((entry["protocol"], entry["group"]), []).append(point)
    found = []
    for (protocol, group), points in entries.items():
        curves: dict[str, list[Point]] = {}
        for point in sorted(points, key=lambda point: point.iteration):
            curves.setdefault(point.run, []).append(point)
        if max(map(len, curves.values())) > 1:
            found.append(Panel(protocol, group, curves, _levels(results, protocol, group)))
    split = any(panel.group == "unseen" for panel in found)
    return [panel for panel in found if panel.group in (("seen", "unseen") if split else ("all",))]


def _levels(results: Mapping[str, Any], protocol: str, group: str) -> dict[str, float]:
    """What the baseline itself scores: by this protocol, finetuned, and trained on all datasets at once."""
    means = {entry["protocol"]: entry["baseline_mean"] for entry in results["averages"] if entry["group"] == group}
    levels = {"pretrained model": means[protocol]} if protocol in means else {}
    return levels | {words: means[other] for other, words in REFERENCES.items() if other in means and other != protocol}
