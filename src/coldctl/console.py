"""What a person sees: progress bars and prose on stderr, one JSON document or tables, never both on stdout."""

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.tree import Tree

from coldctl.common.errors import ColdctlError, TeamError
from coldctl.common.progress import SILENT, Progress
from coldctl.common.text import json_document, printable
from coldctl.evaluation.markdown import group_name

_VERDICT_STYLE = {"better": "green", "worse": "red"}
_LOG_WIDTH = 120  # columns of tables in logs, where nothing says how wide the reader is
_SHORT_VERDICT = {"better": "better", "worse": "worse", "indistinguishable": "within noise", None: "one seed"}


class Screen:
    """The one place that writes to the terminal."""

    def __init__(self, *, as_json: bool = False, silent: bool = False, mute: bool = False) -> None:
        self.as_json = as_json
        self._silent = silent
        self._mute = mute
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        if not self._errors.is_terminal:
            self._errors.width = _LOG_WIDTH

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A listener for stages: bars while stderr is a terminal, lines of prose otherwise, nothing with --quiet."""
        if self._silent:
            yield SILENT
            return
        if not self._errors.is_terminal:
            yield _Prose(self)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
        )
        more = (TimeRemainingColumn(), TextColumn("{task.fields[detail]}", style="dim", markup=False))
        with Bars(*columns, *more, console=self._errors, transient=True) as bars:
            yield _Bars(bars, self)

    def say(self, message: str, style: str | None = None) -> None:
        """One line of prose on stderr, unless --quiet. A stranger's control codes are made harmless."""
        if not self._silent:
            self._errors.print(escape(printable(message)), style=style)

    def show(self, *renderables: Any) -> None:
        """Tables and trees for people: on stderr, so that stdout stays free for --json and pipes."""
        if not self._silent:
            for renderable in renderables:
                self._errors.print(renderable)

    def result(self, document: Any) -> None:
        """The JSON document of --json."""
        if self.as_json:
            sys.stdout.write(json_document(_plain(document)) + "\n")

    def error(self, error: ColdctlError) -> None:
        """An error in one line, with the findings it lists below it."""
        if self.as_json:
            self.result({"error": error.message, "details": list(error.details), "exit_code": error.exit_code})
        if self._mute and not isinstance(error, TeamError):
            return
        self._errors.print(f"[bold red]error:[/] {escape(printable(error.message))}")
        for detail in error.details:
            self._errors.print(f"  - {escape(printable(detail))}")


class _Prose:
    """Without a terminal only the notes are said."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def begin(self, task: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, task: str, steps: int, detail: str = "") -> None:
        pass

    def end(self, task: str) -> None:
        pass

    def note(self, message: str) -> None:
        self._screen.say(message)


class _Bars:
    """Draws bars with rich; calls may come from several threads."""

    def __init__(self, bars: Bars, screen: Screen) -> None:
        self._bars = bars
        self._screen = screen
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def begin(self, task: str, total: int | None, unit: str) -> None:
        with self._lock:
            self._tasks[task] = self._bars.add_task(escape(printable(task)), total=total, unit=unit, detail="")

    def advance(self, task: str, steps: int, detail: str = "") -> None:
        with self._lock:
            if task in self._tasks:
                fields = {"detail": printable(detail)} if detail else {}
                self._bars.update(self._tasks[task], advance=steps, **fields)  # type: ignore[arg-type]

    def end(self, task: str) -> None:
        with self._lock:
            if task in self._tasks:
                self._bars.remove_task(self._tasks.pop(task))

    def note(self, message: str) -> None:
        self._screen.say(message)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the terminal to a library that draws bars of its own."""
        self._bars.stop()
        try:
            yield
        finally:
            self._bars.start()


def evaluation_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table per model and protocol: what the baseline scores, what the model scores, the gain."""
    tables = []
    baseline = results["baseline"]["name"]
    for model, protocol in dict.fromkeys((entry["model"], entry["protocol"]) for entry in results["results"]):
        table = Table(title=escape(printable(f"{model} against {baseline}, {protocol}")), title_justify="left")
        table.add_column("dataset", no_wrap=True)
        for column in (baseline, model):
            table.add_column(escape(printable(column)), justify="right")
        table.add_column("gain [95 % interval]", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for entry in results["results"]:
            if (entry["model"], entry["protocol"]) == (model, protocol):
                unseen = " (unseen)" if entry["role"] == "unseen" else ""
                table.add_row(escape(printable(entry["dataset"])) + unseen, *_cells(entry))
        table.add_section()
        for entry in results["averages"]:
            if (entry["model"], entry["protocol"]) == (model, protocol):
                table.add_row(group_name(entry["group"]), *_cells(entry), style="bold")
        tables.append(table)
    return tables


def _cells(entry: Mapping[str, Any]) -> list[str]:
    style = _VERDICT_STYLE.get(entry["verdict"] or "", "dim")
    deviation = f" ± {entry['std']:.1f}" if entry.get("std") is not None else ""
    return [
        f"{entry['baseline_mean']:.1f}",
        f"{entry['mean']:.1f}{deviation}",
        f"[{style}]{entry['gain']:+.1f}[/] \\[{entry['gain_interval'][0]:+.1f}, {entry['gain_interval'][1]:+.1f}]",
        f"[{style}]{_SHORT_VERDICT[entry['verdict']]}[/]",
    ]


def fuse_table(contributions: Sequence[dict[str, Any]]) -> Table:
    """What went into a fused model, and how each contribution moved."""
    table = Table()
    for column, justify in (
        ("contribution", "left"),
        ("weight", "right"),
        ("update norm", "right"),
        ("cosine to mean", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("")
    for item in contributions:
        note = "verified" if item["verified"] else "unverified"
        if item["status"] != "fused":
            note = f"[red]rejected: {escape(printable(item['reason'] or ''))}[/]"
        if item.get("age"):
            note += f", {_age(item['age'])}"
        if item.get("signer"):
            note += f", signed by {escape(printable(item['signer']))}"
        numbers = ["–" if item[key] is None else f"{item[key]:.3f}" for key in ("update_norm", "cosine_to_mean")]
        table.add_row(escape(printable(item["name"])), f"{item['weight']:.3f}", *numbers, note)
    return table


def _age(age: int) -> str:
    return f"{age} iteration{'s' if age > 1 else ''} old"


def check_table(report: Any) -> Table:
    """The verdicts of `check`."""
    table = Table()
    for column in ("checkpoint", "kind", "body tensors", "size", "verdict"):
        table.add_column(column, justify="right" if column in ("body tensors", "size") else "left")
    for item in report.checked:
        findings = [f"[red]{escape(printable(problem))}[/]" for problem in item.problems]
        findings += [f"[dim]{escape(printable(note))}[/]" for note in item.notes]
        if not item.problems:
            findings.insert(0, "[green]sound[/]")
        size = f"{item.bytes / 1e6:.1f} MB"
        table.add_row(
            escape(printable(item.name)), escape(printable(item.kind)), str(item.tensors), size, "\n".join(findings)
        )
    return table


def files_table(files: Mapping[str, int]) -> Table:
    """Files and their sizes, as `publish --dry-run` lists them."""
    table = Table()
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name, size in files.items():
        table.add_row(escape(printable(name)), f"{size:,}")
    return table


def lineage_tree(generations: Sequence[Any]) -> Tree:
    """The ancestry, newest first, with the contributions below the model they were fused into."""
    newest = generations[-1]
    tree = Tree(_generation(newest))
    branch = tree
    for index in range(len(generations) - 1, -1, -1):
        for item in generations[index].contributions:
            refused = item.get("status") == "rejected"
            note = f" [red]refused: {escape(printable(str(item.get('reason'))))}[/]" if refused else ""
            name, data = str(item.get("name")), str(item.get("dataset") or "a dataset not stated")
            about = [f"on {data}"] if data != name else []
            about += [_age(item["age"])] if item.get("age") else []
            about += [f"signed by {item['signer']}"] if item.get("signer") else []
            words = f" [dim]{escape(printable(', '.join(about)))}[/]" if about else ""
            branch.add(f"{escape(printable(name))}{words}{note}")
        if index:
            branch = branch.add(_generation(generations[index - 1]))
    return tree


def carriers_table(carriers: Sequence[Any]) -> Table:
    """Which models carry a signer's contributions."""
    table = Table()
    for column in ("model", "iteration", "carries", "of unknown signers"):
        table.add_column(column, justify="right" if column == "of unknown signers" else "left")
    for item in carriers:
        names = [f"{one.contribution} ({one.iteration})" for one in item.carried]
        style = "red" if names else "green"
        number = "–" if item.iteration is None else str(item.iteration)
        found = f"[{style}]{escape(printable(', '.join(names) or 'none'))}[/]"
        table.add_row(escape(printable(item.place)), escape(printable(number)), found, str(item.unsigned))
    return table


def _generation(generation: Any) -> str:
    digest = escape(printable(generation.body_digest[:19]))
    return f"[bold]{escape(printable(generation.name))}[/] [dim]{escape(printable(generation.kind))}, {digest}…[/]"


def status_table(status: Any) -> Table:
    """A run's iterations: what is there, what is missing, what is running."""
    table = Table(
        title=escape(
            printable(f"target {status.target} iterations, next base: {'/'.join(Path(status.base_model).parts[-2:])}")
        ),
        title_justify="left",
    )
    for column in ("iteration", "contributions", "running", "unfinished", "late", "fused", "evaluated", "promoted"):
        table.add_column(column)
    for item in status.iterations:
        promoted = {True: "yes", False: "no", None: "–"}[item.promoted]
        late = [f"{name} ({_age(age)})" for name, age in item.late.items()]
        lists = [
            escape(printable(", ".join(names))) or "–"
            for names in (item.contributions, item.running, item.unfinished, late)
        ]
        table.add_row(
            f"{item.number:03d}", *lists, *("yes" if there else "–" for there in (item.fused, item.evaluated)), promoted
        )
    return table


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
