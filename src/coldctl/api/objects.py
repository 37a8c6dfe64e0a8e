"""The objects that the functions of the Python API return.

The `path` of what lies in a store is a `UPath`, which has the methods of `Path`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldctl.artifacts import layout
from coldctl.artifacts.lineage import Generation
from coldctl.artifacts.manifest import ContributionRecord, Manifest
from coldctl.common.errors import ColdctlError, ConfigError, DeclinedError, OutputError
from coldctl.common.text import printable
from coldctl.evaluation import scoring
from coldctl.evaluation.results import Results

if TYPE_CHECKING:
    import pandas

    from coldctl.commands.check import Checked


@dataclass(frozen=True)
class Contribution:
    """A contribution that `finetune` made. `unchanged` says that it was complete already."""

    name: str
    path: Path
    unchanged: bool
    manifest: Mapping[str, Any]  # empty in a process of a team that writes nothing
    seconds: float
    train_examples_per_second: float | None
    stopped: str | None  # why the training ended
    signed: bool = False

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """The scores in percent, by split and metric."""
        metrics: Mapping[str, Mapping[str, float]] = self.manifest.get("metrics", {})
        return metrics

    def _repr_html_(self) -> str:
        from rich.markup import escape
        from rich.table import Table

        from coldctl.api.display import chart_html, table_html

        table = Table("split", "metric", "score", title=escape(printable(self.name)))
        for split, scores in self.metrics.items():
            for metric, score in scores.items():
                table.add_row(split, metric, f"{score:.1f}")
        return table_html(table) + chart_html(self.path / layout.TRAINING_CHART)


class SuiteError(DeclinedError):
    """Some contributions of a suite failed: `contributions` are those that were made, `failed` the errors by name."""

    def __init__(
        self, message: str, contributions: Sequence[Contribution] = (), failed: Mapping[str, ColdctlError] | None = None
    ) -> None:
        self.contributions = list(contributions)
        self.failed = dict(failed or {})
        if all(isinstance(error, OutputError) for error in self.failed.values()):
            self.exit_code = OutputError.exit_code
        super().__init__(
            message, [f"{name}: {error.message.removeprefix(f'{name}: ')}" for name, error in self.failed.items()]
        )


@dataclass(frozen=True)
class FusedModel:
    """A model that `fuse` wrote. `unchanged` says that it was complete already."""

    path: Path
    manifest: Manifest
    unchanged: bool

    @property
    def contributions(self) -> Sequence[ContributionRecord]:
        """What became of each contribution: its status, weight, update norm and cosine to the mean."""
        return self.manifest["contributions"]

    def _repr_html_(self) -> str:
        from coldctl.api.display import chart_html, table_html
        from coldctl.api.tables import fuse_table

        return table_html(fuse_table(self.contributions)) + chart_html(self.path / layout.FUSE_CHART)


@dataclass(frozen=True)
class Evaluation:
    """Models measured against a baseline: `results` is the document `results.json`."""

    path: Path
    manifest: Manifest
    results: Results
    unchanged: bool = True

    def regressions(self, margin: float | None = None) -> list[str]:
        """Return the average gains whose 95 % interval lies below −`margin` points, in words.

        The default margin is the evaluation's own setting `regression_margin`.
        """
        if margin is None:
            margin = float(self.manifest["config"]["evaluate"]["regression_margin"])
        return scoring.regressions(self.results, margin)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per model, dataset and protocol: scores in percent, gains in points."""
        return list(map(_row, self.results["results"]))

    def averages(self) -> list[dict[str, Any]]:
        """Return one row per model, protocol and group of datasets (all, seen, unseen)."""
        return list(map(_row, self.results["averages"]))

    def to_pandas(self) -> "pandas.DataFrame":
        """Return `rows()` as a pandas DataFrame. Raises ConfigError if pandas is not installed."""
        try:
            import pandas
        except ModuleNotFoundError:
            raise ConfigError("to_pandas() needs pandas: install it with `pip install pandas`") from None
        return pandas.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        from coldctl.api.display import chart_html, table_html
        from coldctl.api.tables import evaluation_tables

        tables = "".join(map(table_html, evaluation_tables(self.results)))
        return tables + chart_html(self.path / layout.GAIN_CHART) + chart_html(self.path / layout.CURVE_CHART)


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    low, high = entry["gain_interval"]
    plain = {key: value for key, value in entry.items() if key not in ("gain_interval", "seeds")}
    return plain | {"gain_low": low, "gain_high": high}


@dataclass(frozen=True)
class Publication:
    """A published model: where it is, and the names and sizes in bytes of its files."""

    place: str
    manifest: Manifest
    unchanged: bool
    dry_run: bool
    files: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        from coldctl.api.display import table_html
        from coldctl.api.tables import files_table

        return table_html(files_table(self.files))


@dataclass(frozen=True)
class CheckReport:
    """The verdicts of `check`, and what it did not examine."""

    checked: "tuple[Checked, ...]"
    not_examined: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Return True if no checkpoint has a problem."""
        return not any(one.problems for one in self.checked)

    def _repr_html_(self) -> str:
        from coldctl.api.display import table_html
        from coldctl.api.tables import check_table

        return table_html(check_table(self))


@dataclass(frozen=True)
class Lineage:
    """The ancestry of a model: its generations, oldest first."""

    generations: tuple[Generation, ...]

    def _repr_html_(self) -> str:
        from coldctl.api.display import tree_html
        from coldctl.api.tables import lineage_tree

        return tree_html(lineage_tree(self.generations))
