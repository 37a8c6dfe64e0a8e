"""What a person reads of an evaluation, in words and tables."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from coldctl.common.text import code
from coldctl.common.text import markdown as plain
from coldctl.evaluation import leaderboard
from coldctl.evaluation.curves import Panel
from coldctl.evaluation.results import Results

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
    """How reports say a verdict."""
    return _WORDS[verdict]


def group_name(group: str) -> str:
    """How tables call an average."""
    return _GROUP_NAMES[group]


def markdown(results: Results, panels: Sequence[Panel]) -> str:
    """`report.md`: per model and protocol one table of scores, gains with their intervals, and verdicts.

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
        lines += [f"- {plain(sentence)}" for sentence in overlap_sentences(results)]
    lines += ["", f"Baseline body: {code(results['baseline']['body_digest'])}", ""]
    lines += [f"{plain(model['name'])} body: {code(model['body_digest'])}\n" for model in results["models"]]
    return "\n".join(lines)


def protocols_of(results: Mapping[str, Any], model: str) -> list[str]:
    """The protocols that a model was measured by."""
    return list(dict.fromkeys(entry["protocol"] for entry in results["results"] if entry["model"] == model))


def overlap_sentences(results: Mapping[str, Any]) -> list[str]:
    """What a reader should know about test examples that some training split of the suite holds too."""
    return [
        f"{item['examples']} of the {item['num_test']} test examples of {item['test_of']} also stand in the training "
        f"split of {item['train_of']}"
        for item in results["overlaps"]
    ]


def headline(results: Mapping[str, Any], model: str, protocol: str) -> str:
    """The answer in one sentence: the average gain over all datasets, its interval and its verdict."""
    entry = next(item for item in rows_of(results["averages"], model, protocol) if item["group"] == "all")
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
    """A Markdown table: a row per run and iteration, a column per protocol and group of datasets."""
    columns = [f"{panel.protocol}, {panel.group}" for panel in panels]
    rows = [["run", "iteration", *columns], ["---", "--:", *["--:"] * len(columns)]]
    levels = {words for panel in panels for words in panel.levels}
    for words in sorted(levels, reverse=True):
        found = [panel.levels.get(words) for panel in panels]
        rows.append([words, "", *("" if level is None else f"{level:.1f}" for level in found)])
    for run in dict.fromkeys(run for panel in panels for run in panel.curves):
        scores: dict[int, dict[int, float]] = {}
        for column, panel in enumerate(panels):
            for point in panel.curves.get(run, []):
                scores.setdefault(point.iteration, {})[column] = point.mean
        for iteration, row in sorted(scores.items()):
            cells = [f"{row[column]:.1f}" if column in row else "" for column in range(len(panels))]
            rows.append([plain(run), str(iteration), *cells])
    return [f"| {' | '.join(row)} |" for row in rows]


def published(results: Mapping[str, Any], model: str, baseline: str | None = None) -> list[str]:
    """Where a model stands on the public leaderboard, when the baseline is called what the leaderboard's is.

    `baseline` is its name on the Hub, where the evaluation knows it by another one.
    """
    if (baseline or results["baseline"]["name"]) not in leaderboard.BASELINES:
        return []
    scores = {entry["dataset"]: entry["mean"] for entry in rows_of(results["results"], model, "finetune")}
    found = leaderboard.standing(scores)
    if found is None:
        return []
    deviation = "" if found.published_deviation is None else f" ± {found.published_deviation:.2f}"
    above = "" if found.next_better is None else f"; next above it: {found.next_better}"
    return [
        f"Among the {found.models} published models of the {_LEADERBOARD} it would "
        f"stand at rank {found.rank}: {found.mean:.2f} on {found.datasets} of its 36 datasets, where the published "
        f"roberta-base has {found.published_baseline:.2f}{deviation}{above}. Their splits, caps and seeds are the "
        "leaderboard's; compare with care.",
    ]


def published_markdown(results: Mapping[str, Any], model: str, baseline: str | None = None) -> list[str]:
    """The sentences of `published` in Markdown, with a link to the leaderboard."""
    link = f"[{_LEADERBOARD}]({leaderboard.SOURCE})"
    return [plain(sentence).replace(_LEADERBOARD, link) for sentence in published(results, model, baseline)]


def score_table(results: Mapping[str, Any], model: str, protocol: str) -> list[str]:
    """A Markdown table of one model's scores and gains under one protocol, with the averages at its end."""
    columns = [
        "dataset",
        "role",
        "metric",
        plain(results["baseline"]["name"]),
        plain(model),
        "gain",
        "95 % interval",
        "",
    ]
    rows = [columns, ["---", "---", "---", "--:", "--:", "--:", ":-:", "---"]]
    rows += [
        [plain(entry["dataset"]), entry["role"], entry["metric"], *_numbers(entry)]
        for entry in rows_of(results["results"], model, protocol)
    ]
    rows += [
        [f"**{group_name(entry['group'])}**", "", "", *_numbers(entry)]
        for entry in rows_of(results["averages"], model, protocol)
    ]
    return [f"| {' | '.join(row)} |" for row in rows]


def _numbers(entry: Mapping[str, Any]) -> list[str]:
    deviation = f" ± {entry['std']:.1f}" if entry.get("std") is not None else ""
    score = f"{entry['mean']:.1f}{deviation}"
    return [
        f"{entry['baseline_mean']:.1f}",
        score,
        f"{entry['gain']:+.1f}",
        interval(entry),
        verdict_in_words(entry["verdict"]),
    ]


def interval(entry: Mapping[str, Any]) -> str:
    """A gain's interval in text."""
    low, high = entry["gain_interval"]
    return f"{low:+.1f} … {high:+.1f}"


def rows_of(entries: Sequence[Entry], model: str, protocol: str) -> list[Entry]:
    """The entries of one model under one protocol, in order."""
    return [entry for entry in entries if entry["model"] == model and entry["protocol"] == protocol]
