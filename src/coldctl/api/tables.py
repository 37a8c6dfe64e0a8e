"""Tables and trees of what commands return, for terminals and notebooks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from coldctl.common.text import printable
from coldctl.evaluation.markdown import group_name

_VERDICT_STYLE = {"better": "green", "worse": "red"}
_SHORT_VERDICT = {"better": "better", "worse": "worse", "indistinguishable": "within noise", None: "one seed"}


def evaluation_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return one table per model and protocol: the baseline's scores, the model's scores, the gain."""
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


def fuse_table(contributions: Sequence[Any]) -> Table:
    """Return the contributions of a fused model: status, weight, update norm, cosine to the mean."""
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
    """Return the verdicts of `check`."""
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
    """Return files and their sizes, as `publish --dry-run` lists them."""
    table = Table()
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name, size in files.items():
        table.add_row(escape(printable(name)), f"{size:,}")
    return table


def lineage_tree(generations: Sequence[Any]) -> Tree:
    """Return the ancestry, newest first, with the contributions below the model they were fused into."""
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
    """Return which models carry a signer's contributions."""
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
    """Return a run's iterations: what is complete, missing, running."""
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
