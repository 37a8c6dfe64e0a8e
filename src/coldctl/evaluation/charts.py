"""Charts by matplotlib: PNG files beside results, SVG for the page."""

import io
import itertools
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from coldctl.common.text import chart as plain
from coldctl.evaluation.curves import Panel
from coldctl.evaluation.markdown import rows_of
from coldctl.storage.location import Location

_GAIN, _LOSS, _NOISE, _INK, _GRID = "#2f7d4f", "#b5483a", "#8a8f98", "#333333", "#dddddd"
_CURVES = ("#2f7d4f", "#3a6ea5", "#c07f1f", "#8a4f9e", "#b5483a", "#4a9a9a")
_VARIABLES = {
    _GAIN: "gain", _LOSS: "loss", _NOISE: "noise", _INK: "ink", _GRID: "grid", _CURVES[1]: "second",
    _CURVES[2]: "third", _CURVES[3]: "fourth", _CURVES[5]: "sixth", "#000000": "ink",
}  # fmt: skip
_DASHES = ("--", ":", "-.")
_MOST_PANELS = 12
_MOST_BARS = 60
_MOST_COLUMNS = 30
_LONGEST = 24  # characters of a name beside a bar
_LONGEST_DATASET = 60  # characters of a dataset's name in the chart of gains


def prepare() -> None:
    """Import matplotlib in the background, while the caller waits for disks and digests."""
    threading.Thread(target=_pyplot, daemon=True).start()


def fuse_chart(records: Sequence[Mapping[str, Any]], path: Location) -> None:
    """Write `fuse.png`: per fused contribution the norm of its update and its cosine to the mean update, as columns."""
    fused = [record for record in records if record["status"] == "fused"]
    places = range(len(fused))
    inches = min(24.0, max(5.0, 0.5 * len(fused) + 2))
    figure, axes = _subplots(2, 1, inches, 4.8, sharex=True)
    thickness = min(40.0, 0.6 * 72 * (inches - 1) / len(fused))  # points
    columns = (("update_norm", "norm of the update"), ("cosine_to_mean", "cosine to the mean update"))
    for axis, (key, title) in zip(axes, columns, strict=True):
        colours = [_LOSS if any(note.startswith("outlier") for note in record["notes"]) else _GAIN for record in fused]
        # Lines are one collection of matplotlib's, while a thousand bars would be a thousand objects.
        axis.vlines(places, 0, [record[key] or 0.0 for record in fused], colors=colours, linewidth=thickness)
        axis.set_xlim(-0.6, len(fused) - 0.4)
        axis.axhline(0, color=_INK, linewidth=0.8)
        _finish(axis, "y", title)
    names = [plain(record["name"], _LONGEST) for record in fused]
    every = max(1, len(fused) // 60)  # more than sixty names are not readable
    axes[1].set_xticks(list(places)[::every], names[::every], rotation=45, ha="right", fontsize=8)
    _save(figure, path, 110)


def training_chart(curve: Sequence[tuple[int, float, float]], title: str, metric: str, path: Location) -> None:
    """Write `training.png`: training loss and validation score by step, the best validation marked."""
    steps, losses, scores = ([row[column] for row in curve] for column in range(3))
    figure, axes = _subplots(2, 1, 6, 4.8, sharex=True)
    best = int(np.argmax(scores))
    titles = (
        "training loss, mean since the last validation",
        f"validation {metric}, kept: {scores[best]:.1f} at step {steps[best]}",
    )
    for axis, values, words in zip(axes, (losses, scores), titles, strict=True):
        axis.plot(steps, values, color=_GAIN, linewidth=1.5, marker="o", markersize=3)
        _finish(axis, "y", words)
    axes[1].plot(steps[best], scores[best], marker="o", markersize=8, markerfacecolor="none", color=_LOSS)
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    axes[1].set_xlabel("step")
    figure.suptitle(plain(title), fontsize=10, x=0.01, ha="left")
    _save(figure, path, 110)


def charted(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the (model, protocol) pairs worth a chart of gains: of each run only the newest iteration, at most twelve."""
    newest: dict[str, int] = {}
    for model in results["models"]:
        if model.get("run") is not None:
            newest[model["run"]] = max(newest.get(model["run"], 0), model["iteration"])
    shown = {
        model["name"]
        for model in results["models"]
        if model.get("run") is None or model["iteration"] == newest[model["run"]]
    }
    pairs = dict.fromkeys((entry["model"], entry["protocol"]) for entry in results["results"])
    return [pair for pair in pairs if pair[0] in shown][:_MOST_PANELS]


def gain_chart(results: Mapping[str, Any], path: Location) -> None:
    """Write `gain.png`: the gain per dataset, sorted, with intervals; a panel per model and protocol."""
    _save(gain_figure(results, charted(results)), path, 144)


def gain_figure(results: Mapping[str, Any], pairs: Sequence[tuple[str, str]], width: float = 8) -> Any:
    """Draw the gains of (model, protocol) pairs, one panel each; `width` in inches."""
    rows = max(len(rows_of(results["results"], *pair)) for pair in pairs) + 1
    figure, axes = _subplots(len(pairs), 1, width, (1.1 + 0.34 * rows) * len(pairs), squeeze=False)
    for axis, (model, protocol) in zip(axes[:, 0], pairs, strict=True):
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
        axis.errorbar(gains, range(len(bars)), xerr=reach, fmt="none", ecolor=_INK, elinewidth=1, capsize=2.5)
        names = [f"{entry['dataset']} ({entry['role']})" if "role" in entry else entry["dataset"] for entry in bars]
        axis.set_yticks(range(len(bars)), [plain(name, _LONGEST_DATASET) for name in names])
        axis.axvline(0, color=_INK, linewidth=0.8)
        axis.set_xlabel("gain in points (bar) and 95 % interval (line)")
        _finish(axis, "x", plain(f"{model} against {results['baseline']['name']}, {protocol}"))
    return figure


def curve_chart(panels: Sequence[Panel], path: Location) -> None:
    """Write `curve.png`: scores over iterations."""
    _save(curve_figure(panels, columns=2), path, 144)


def curve_figure(panels: Sequence[Panel], columns: int) -> Any:
    """Draw scores over iterations, one panel per protocol and group of datasets; a band is the interval of the gain."""
    rows = -(-len(panels) // columns)
    width = min(columns, len(panels))
    figure, axes = _subplots(rows, width, 4.8 * width, 3.3 * rows, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for colour, (run, points) in zip(itertools.cycle(_CURVES), panel.curves.items(), strict=False):
            start = panel.levels.get("pretrained model")
            places, scores = [point.iteration for point in points], [point.mean for point in points]
            low, high = ([point.interval[side] for point in points] for side in (0, 1))
            if start is not None:  # every run begins there
                places, scores, low, high = [0, *places], [start, *scores], [start, *low], [start, *high]
            axis.plot(places, scores, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=plain(run))
            axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        for style, (words, level) in zip(itertools.cycle(_DASHES), panel.levels.items(), strict=False):
            axis.axhline(level, color=_NOISE, linewidth=1.2, linestyle=style, label=words)
        group = "all datasets" if panel.group == "all" else f"{panel.group} datasets"
        axis.set_xlabel("iteration")
        axis.set_ylabel("mean score, %")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, frameon=False)
        _finish(axis, "y", f"{panel.protocol}, {group}")
    return figure


def norm_figure(records: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the norm of each fused contribution's update in one iteration, one bar each."""
    shown = sorted(records, key=lambda record: record["update_norm"] or 0.0)[-_MOST_BARS:]
    figure, axis = _subplots(1, 1, 4.8, 0.9 + 0.3 * len(shown))
    axis.barh(range(len(shown)), [record["update_norm"] or 0.0 for record in shown], color=_GAIN, height=0.65)
    axis.set_yticks(range(len(shown)), [plain(record["name"], _LONGEST) for record in shown])
    axis.set_xlabel("L2 norm of contribution − base")
    _finish(axis, "x")
    return figure


def cosine_figure(cosines: Mapping[str, Mapping[int, float]]) -> Any:
    """Draw a heat map: rows are contributors, columns iterations, cells the cosine of an update to the mean update."""
    names = list(cosines)[:_MOST_BARS]
    iterations = sorted({iteration for row in cosines.values() for iteration in row})[-_MOST_COLUMNS:]
    table = np.array([[cosines[name].get(iteration, np.nan) for iteration in iterations] for name in names])
    figure, axis = _subplots(1, 1, max(3.2, 1.6 + 0.5 * len(iterations)), 1.1 + 0.32 * len(names))
    axis.pcolormesh(np.ma.masked_invalid(table), cmap="RdBu", vmin=-1, vmax=1, edgecolors=_GRID, linewidth=0.5)
    for row, column in np.argwhere(~np.isnan(table)).tolist():
        value = table[row, column]
        ink = "#ffffff" if abs(value) > 0.6 else "#111111"  # contrasts with the cell, in dark and light pages
        axis.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    axis.set_yticks(np.arange(len(names)) + 0.5, [plain(name, _LONGEST) for name in names])
    axis.set_xticks(np.arange(len(iterations)) + 0.5, [str(iteration) for iteration in iterations])
    axis.set_xlabel("iteration")
    axis.invert_yaxis()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def as_svg(figure: Any, salt: str) -> str:
    """Return a figure as SVG whose colours are CSS variables of the page. The same figure gives the same text.

    `salt` keeps the ids of several figures on one page apart.
    """
    with _pyplot().rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        text = _drawn(figure, format="svg", transparent=True, metadata={"Date": None, "Creator": None}).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    # The page decides the height; the viewBox keeps the proportions.
    return re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", text, count=1)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _subplots(rows: int, columns: int, width: float, height: float, **options: bool) -> tuple[Any, Any]:
    """Return a figure of so many inches, and its axes."""
    figure, axes = _pyplot().subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
    return figure, axes


def _finish(axis: Any, lines: Literal["x", "y"], title: str | None = None) -> None:
    """Leave no frame but the axes, put a light grid behind, and set the title."""
    if title is not None:
        axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=lines, color=_GRID, linewidth=0.6)
    axis.set_axisbelow(True)


def _save(figure: Any, path: Location, dpi: int) -> None:
    """Write a PNG without a date or version in it, so that the same chart has the same bytes."""
    path.write_bytes(_drawn(figure, format="png", dpi=dpi, metadata={"Software": None}))


def _drawn(figure: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font lacks are drawn as boxes
        figure.savefig(buffer, **options)
    _pyplot().close(figure)
    return buffer.getvalue()
