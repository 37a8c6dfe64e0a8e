"""`report.md`: an evaluation in words and tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from coldctl.common.text import code
from coldctl.common.text import markdown as plain
from coldctl.evaluation import leaderboard
from coldctl.evaluation.curves import Panel
from coldctl.evaluation.results import OverlapEntry, Results

Entry = TypeVar("Entry", bound=Mapping[str, Any])

_WORDS = {
    "better": "better",
    "worse": "worse",
    "indistinguishable": "not distinguishable from noise",
    None: "no verdict (one seed)",
}
_LEADERBOARD = "model-recycling leaderboard"
_GROUP_NAMES = {"all": "average", "seen": "average seen", "unseen": "average unseen"}


def verdict_in_words(verdict: str | None) -> str:
    """Return a verdict as reports say it."""
    return _WORDS[verdict]


def group_name(group: str) -> str:
    """Return the name of an average in tables."""
    return _GROUP_NAMES[group]


def report(results: Results, panels: Sequence[Panel]) -> str:
    """Return `report.md`: per model and protocol one table of scores, gains with their intervals, and verdicts.

    `panels` are the scores over iterations, if there are several.
    """
    lines = [f"# Evaluation against {plain(results['baseline']['name'])}", ""]
    lines.append("Scores are percent on the test split, gains are points with a 95 % interval (paired bootstrap).")
    for model in results["models"]:
        for protocol in protocols_of(results, model["name"]):
            lines += ["", f"## {plain(model['name'])}, {protocol}", ""]
            lines += score_table(results, model["name"], protocol)
            if protocol == "finetune":
                lines += [f"\n{sentence}" for sentence in published_markdown(results, model["name"])]
    if panels:
        lines += ["", "## Over iterations", "", *_curve_table(panels)]
    if results["overlaps"]:
        lines += ["", "## Test examples that training splits hold", ""]
        lines += [f"- {plain(sentence)}" for sentence in overlap_sentences(results["overlaps"])]
    lines += ["", f"Baseline body: {code(results['baseline']['body_digest'])}", ""]
    lines += [f"{plain(model['name'])} body: {code(model['body_digest'])}\n" for model in results["models"]]
    return "\n".join(lines)


def protocols_of(results: Mapping[str, Any], model: str) -> list[str]:
    """Return the protocols that a model was measured by, in order."""
    return list(dict.fromkeys(entry["protocol"] for entry in results["results"] if entry["model"] == model))


def overlap_sentences(overlaps: Sequence[OverlapEntry]) -> list[str]:
    """Return one sentence for each pair of datasets whose test and training splits share examples."""
    return [
        f"{entry['examples']} of the {entry['num_test']} test examples of {entry['test_of']} also stand in the training "
        f"split of {entry['train_of']}"
        for entry in overlaps
    ]


def headline(results: Mapping[str, Any], model: str, protocol: str) -> str:
    """Return the answer in one sentence: the average gain over all datasets, its interval and its verdict."""
    entry = next(entry for entry in rows_of(results["averages"], model, protocol) if entry["group"] == "all")
    verdict = {
        "better": "is better than",
        "worse": "is worse than",
        "indistinguishable": "cannot be told from",
        None: "was measured once (so there is no verdict) against",
    }[entry["verdict"]]
    return (
        f"{model} {verdict} {results['baseline']['name']} by {protocol}: {entry['gain']:+.1f} points on average "
        f"[{interval(entry)}]"
    )


def _curve_table(panels: Sequence[Panel]) -> list[str]:
    """Return a table with a row per run and iteration and a column per protocol and group of datasets."""
    rows = [
        ["run", "iteration", *(f"{panel.protocol}, {panel.group}" for panel in panels)],
        ["---", "--:", *("--:" for _ in panels)],
    ]
    levels = {name for panel in panels for name in panel.levels}
    rows += [[name, "", *_scores(panel.levels.get(name) for panel in panels)] for name in sorted(levels, reverse=True)]
    for run in dict.fromkeys(run for panel in panels for run in panel.curves):
        means = [{point.iteration: point.mean for point in panel.curves.get(run, [])} for panel in panels]
        rows += [
            [plain(run), str(iteration), *_scores(by_iteration.get(iteration) for by_iteration in means)]
            for iteration in sorted({iteration for by_iteration in means for iteration in by_iteration})
        ]
    return _table(rows)


def _scores(scores: Iterable[float | None]) -> list[str]:
    return ["" if score is None else f"{score:.1f}" for score in scores]


def published(results: Mapping[str, Any], model: str, baseline: str | None = None) -> list[str]:
    """Return the rank on the public leaderboard in a sentence, or nothing if the baseline is another one.

    `baseline` is its name on the Hub, if the evaluation uses another name.
    """
    if (baseline or results["baseline"]["name"]) not in leaderboard.BASELINES:
        return []
    scores = {entry["dataset"]: entry["mean"] for entry in rows_of(results["results"], model, "finetune")}
    standing = leaderboard.standing(scores)
    if standing is None:
        return []
    deviation = "" if standing.published_deviation is None else f" ± {standing.published_deviation:.2f}"
    above = "" if standing.next_better is None else f"; next above it: {standing.next_better}"
    return [
        f"Among the {standing.models} published models of the {_LEADERBOARD} it would stand at rank {standing.rank}: "
        f"{standing.mean:.2f} on {standing.datasets} of its 36 datasets, where the published roberta-base has "
        f"{standing.published_baseline:.2f}{deviation}{above}. Their splits, caps and seeds are the "
        "leaderboard's; compare with care.",
    ]


def published_markdown(results: Mapping[str, Any], model: str, baseline: str | None = None) -> list[str]:
    """Return the sentences of `published` in Markdown, with a link to the leaderboard."""
    link = f"[{_LEADERBOARD}]({leaderboard.SOURCE})"
    return [plain(sentence).replace(_LEADERBOARD, link) for sentence in published(results, model, baseline)]


def score_table(results: Mapping[str, Any], model: str, protocol: str) -> list[str]:
    """Return a table of one model's scores and gains under one protocol, with the averages at its end."""
    baseline = plain(results["baseline"]["name"])
    columns = ["dataset", "role", "metric", baseline, plain(model), "gain", "95 % interval", ""]
    rows = [columns, ["---", "---", "---", "--:", "--:", "--:", ":-:", "---"]]
    rows += [
        [plain(entry["dataset"]), entry["role"], entry["metric"], *_numbers(entry)]
        for entry in rows_of(results["results"], model, protocol)
    ]
    rows += [
        [f"**{group_name(entry['group'])}**", "", "", *_numbers(entry)]
        for entry in rows_of(results["averages"], model, protocol)
    ]
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


def _numbers(entry: Mapping[str, Any]) -> list[str]:
    deviation = f" ± {entry['std']:.1f}" if entry.get("std") is not None else ""
    return [
        f"{entry['baseline_mean']:.1f}",
        f"{entry['mean']:.1f}{deviation}",
        f"{entry['gain']:+.1f}",
        interval(entry),
        verdict_in_words(entry["verdict"]),
    ]


def interval(entry: Mapping[str, Any]) -> str:
    """Return a gain's interval as text."""
    low, high = entry["gain_interval"]
    return f"{low:+.1f} … {high:+.1f}"


def rows_of(entries: Sequence[Entry], model: str, protocol: str) -> list[Entry]:
    """Return the entries of one model under one protocol, in order."""
    return [entry for entry in entries if entry["model"] == model and entry["protocol"] == protocol]
