"""What a person reads of an evaluation: the table in Markdown and the chart of gains."""

import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coldctl.core import leaderboard

_WORDS = {
    "better": "better",
    "worse": "worse",
    "indistinguishable": "not distinguishable from noise",
    None: "no verdict (one seed)",
}
_GROUP_NAMES = {"all": "average", "seen": "average seen", "unseen": "average unseen"}
_GAIN, _LOSS, _NOISE = "#2f7d4f", "#b5483a", "#8a8f98"


def verdict_in_words(verdict: str | None) -> str:
    """How reports say a verdict."""
    return _WORDS[verdict]


def group_name(group: str) -> str:
    """How tables call an average."""
    return _GROUP_NAMES[group]


def markdown(results: dict[str, Any]) -> str:
    """`report.md`: per model and protocol one table of scores, gains with their intervals, and verdicts."""
    lines = [f"# Evaluation against {escaped(results['baseline']['name'])}", ""]
    lines.append("Scores are percent on the test split, gains are points with a 95 % interval (paired bootstrap).")
    for model in results["models"]:
        for protocol in dict.fromkeys(entry["protocol"] for entry in results["results"]):
            lines += ["", f"## {escaped(model['name'])}, {protocol}", ""]
            lines += score_table(results, model["name"], protocol)
            if protocol == "finetune":
                lines += _published(results, model["name"])
    lines += ["", f"Baseline body: `{results['baseline']['body_digest']}`", ""]
    lines += [f"{escaped(model['name'])} body: `{model['body_digest']}`\n" for model in results["models"]]
    return "\n".join(lines)


def _published(results: dict[str, Any], model: str) -> list[str]:
    """Where a model stands on the public leaderboard, when the baseline is called what the leaderboard's is."""
    if results["baseline"]["name"] not in leaderboard.BASELINES:
        return []
    scores = {entry["dataset"]: entry["mean"] for entry in rows_of(results["results"], model, "finetune")}
    found = leaderboard.standing(scores)
    if found is None:
        return []
    deviation = "" if found.published_deviation is None else f" ± {found.published_deviation:.2f}"
    above = "" if found.next_better is None else f"; next above it: {escaped(found.next_better)}"
    return [
        "",
        f"Among the {found.models} published models of the [model-recycling leaderboard]({leaderboard.SOURCE}) it would "
        f"stand at rank {found.rank}: {found.mean:.2f} on {found.datasets} of its 36 datasets, where the published "
        f"roberta-base has {found.published_baseline:.2f}{deviation}{above}. Their splits, caps and seeds are the "
        "leaderboard's; compare with care.",
    ]


def escaped(text: str) -> str:
    """A stranger's name as plain text in a Markdown document."""
    clean = "".join(character for character in text if character.isprintable())
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>()#|!~" else character for character in clean).replace(
        "\\_", "_"
    )


def score_table(results: dict[str, Any], model: str, protocol: str) -> list[str]:
    """A Markdown table of one model's scores and gains under one protocol, with the averages at its end."""
    columns = [
        "dataset",
        "role",
        "metric",
        escaped(results["baseline"]["name"]),
        escaped(model),
        "gain",
        "95 % interval",
        "",
    ]
    rows = [columns, ["---", "---", "---", "--:", "--:", "--:", ":-:", "---"]]
    rows += [
        [escaped(entry["dataset"]), entry["role"], entry["metric"], *_numbers(entry)]
        for entry in rows_of(results["results"], model, protocol)
    ]
    rows += [
        [f"**{group_name(entry['group'])}**", "", "", *_numbers(entry)]
        for entry in rows_of(results["averages"], model, protocol)
    ]
    return [f"| {' | '.join(row)} |" for row in rows]


def _numbers(entry: dict[str, Any]) -> list[str]:
    deviation = f" ± {entry['std']:.1f}" if entry.get("std") is not None else ""
    score = f"{entry['mean']:.1f}{deviation}"
    return [
        f"{entry['baseline_mean']:.1f}",
        score,
        f"{entry['gain']:+.1f}",
        interval(entry),
        verdict_in_words(entry["verdict"]),
    ]


def interval(entry: dict[str, Any]) -> str:
    """A gain's interval in text."""
    low, high = entry["gain_interval"]
    return f"{low:+.1f} … {high:+.1f}"


def rows_of(entries: Sequence[dict[str, Any]], model: str, protocol: str) -> list[dict[str, Any]]:
    """The entries of one model under one protocol, in order."""
    return [entry for entry in entries if entry["model"] == model and entry["protocol"] == protocol]


def prepare_charts() -> None:
    """Import the plotting library in the background, while the caller waits for disks and digests."""

    def load() -> None:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot  # noqa: F401

    threading.Thread(target=load, daemon=True).start()


def fuse_chart(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """`fuse.png`: per fused contribution the norm of its update and its cosine to the mean update, as columns."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    fused = [record for record in records if record["status"] == "fused"]
    places = range(len(fused))
    inches = min(24.0, max(5.0, 0.5 * len(fused) + 2))
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(inches, 4.8), layout="constrained")
    thickness = min(40.0, 0.6 * 72 * (inches - 1) / len(fused))  # points
    columns = (("update_norm", "norm of the update"), ("cosine_to_mean", "cosine to the mean update"))
    for axis, (key, title) in zip(axes, columns, strict=True):
        colours = [_LOSS if any(note.startswith("outlier") for note in record["notes"]) else _GAIN for record in fused]
        # One collection of lines, where a thousand bars would be a thousand objects.
        axis.vlines(places, 0, [record[key] or 0.0 for record in fused], colors=colours, linewidth=thickness)
        axis.set_xlim(-0.6, len(fused) - 0.4)
        axis.set_title(title, loc="left", fontsize=10)
        axis.axhline(0, color="#333333", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    names = [_plain(record["name"])[:24] for record in fused]
    every = max(1, len(fused) // 60)  # more names than that cannot be read
    axes[1].set_xticks(list(places)[::every], names[::every], rotation=45, ha="right", fontsize=8)
    _save(figure, path, 110)


def _plain(name: str) -> str:
    """A stranger's name as text in a chart: no control codes, no formulas."""
    return "".join(character for character in name if character.isprintable()).replace("$", r"\$")


def training_chart(curve: Sequence[tuple[int, float, float]], title: str, metric: str, path: Path) -> None:
    """`training.png`: training loss and validation score by step, the best validation marked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps, losses, scores = ([row[column] for row in curve] for column in range(3))
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(6, 4.8), layout="constrained")
    titles = ("training loss, mean since the last validation", f"validation {metric}")
    for axis, values, words in zip(axes, (losses, scores), titles, strict=True):
        axis.plot(steps, values, color=_GAIN, linewidth=1.5, marker="o", markersize=3)
        axis.set_title(words, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    best = int(np.argmax(scores))
    axes[1].plot(steps[best], scores[best], marker="o", markersize=8, markerfacecolor="none", color=_LOSS)
    axes[1].set_title(f"validation {metric}, kept: {scores[best]:.1f} at step {steps[best]}", loc="left", fontsize=10)
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    axes[1].set_xlabel("step")
    figure.suptitle(_plain(title), fontsize=10, x=0.01, ha="left")
    _save(figure, path, 110)


def gain_chart(results: dict[str, Any], path: Path) -> None:
    """`gain.png`: the gain per dataset, sorted, with intervals; a panel per model and protocol."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((entry["model"], entry["protocol"]) for entry in results["results"]))
    rows = max(len(rows_of(results["results"], *panel)) for panel in panels) + 1
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, (1.1 + 0.34 * rows) * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, (model, protocol) in zip(axes[:, 0], panels, strict=True):
        entries = sorted(rows_of(results["results"], model, protocol), key=lambda entry: float(entry["gain"]))
        average = rows_of(results["averages"], model, protocol)[0]
        bars = [{**average, "dataset": "average"}, *entries]
        gains = [entry["gain"] for entry in bars]
        reach = [
            [max(0.0, entry["gain"] - entry["gain_interval"][0]) for entry in bars],
            [max(0.0, entry["gain_interval"][1] - entry["gain"]) for entry in bars],
        ]
        colours = [{"better": _GAIN, "worse": _LOSS}.get(entry["verdict"], _NOISE) for entry in bars]
        axis.barh(range(len(bars)), gains, color=colours, height=0.65)
        axis.errorbar(gains, range(len(bars)), xerr=reach, fmt="none", ecolor="#333333", elinewidth=1, capsize=2.5)
        names = [f"{entry['dataset']} ({entry['role']})" if "role" in entry else entry["dataset"] for entry in bars]
        axis.set_yticks(range(len(bars)), [_plain(name) for name in names])
        axis.axvline(0, color="#333333", linewidth=0.8)
        axis.set_xlabel("gain in points (bar) and 95 % interval (line)")
        axis.set_title(_plain(f"{model} against {results['baseline']['name']}, {protocol}"), loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    _save(figure, path, 144)


def _save(figure: Any, path: Path, dpi: int) -> None:
    """Write a PNG without a date or version in it, so that the same chart has the same bytes."""
    from matplotlib import pyplot as plt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure.savefig(path, dpi=dpi, metadata={"Software": None})
    plt.close(figure)
