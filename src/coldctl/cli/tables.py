"""Tables and trees for people: what commands return, drawn by rich."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Column, Table
from rich.tree import Tree

from coldctl.common.text import printable
from coldctl.evaluation.markdown import group_name

_VERDICT_STYLE = {"better": "green", "worse": "red"}
_SHORT_VERDICT = {"better": "better", "worse": "worse", "indistinguishable": "within noise", None: "one seed"}


def evaluation_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return one table per model and protocol: the baseline's score, the model's score, the gain."""
    tables = []
    baseline = results["baseline"]["name"]
    for model, protocol in dict.fromkeys((entry["model"], entry["protocol"]) for entry in results["results"]):
        table = Table(
            Column("dataset", no_wrap=True),
            _number(_safe(baseline)),
            _number(_safe(model)),
            Column("gain [95 % interval]", justify="right", no_wrap=True),
            Column("", no_wrap=True),
            title=_safe(f"{model} against {baseline}, {protocol}"),
            title_justify="left",
        )
        for entry in results["results"]:
            if (entry["model"], entry["protocol"]) == (model, protocol):
                unseen = " (unseen)" if entry["role"] == "unseen" else ""
                table.add_row(_safe(entry["dataset"]) + unseen, *_cells(entry))
        table.add_section()
        for entry in results["averages"]:
            if (entry["model"], entry["protocol"]) == (model, protocol):
                table.add_row(group_name(entry["group"]), *_cells(entry), style="bold")
        tables.append(table)
    return tables


def fuse_table(contributions: Sequence[Mapping[str, Any]]) -> Table:
    """Return the contributions of a fused model, with their weights and statistics."""
    table = Table("contribution", _number("weight"), _number("update norm"), _number("cosine to mean"), "")
    for record in contributions:
        note = "verified" if record["verified"] else "unverified"
        if record["status"] != "fused":
            note = f"[red]rejected: {_safe(record['reason'] or '')}[/]"
        if record.get("age"):
            note += f", {_age(record['age'])}"
        if record.get("signer"):
            note += f", signed by {_safe(record['signer'])}"
        numbers = ["–" if record[key] is None else f"{record[key]:.3f}" for key in ("update_norm", "cosine_to_mean")]
        table.add_row(_safe(record["name"]), f"{record['weight']:.3f}", *numbers, note)
    return table


def check_table(report: Any) -> Table:
    """Return the verdicts of `check`."""
    table = Table("checkpoint", "kind", _number("body tensors"), _number("size"), "verdict")
    for checked in report.checked:
        findings = [f"[red]{_safe(problem)}[/]" for problem in checked.problems] or ["[green]sound[/]"]
        findings += [f"[dim]{_safe(note)}[/]" for note in checked.notes]
        size = f"{checked.bytes / 1e6:.1f} MB"
        table.add_row(_safe(checked.name), _safe(checked.kind), str(checked.tensors), size, "\n".join(findings))
    return table


def files_table(files: Mapping[str, int]) -> Table:
    """Return files and their sizes, as `publish --dry-run` lists them."""
    table = Table("file", _number("bytes"))
    for name, size in files.items():
        table.add_row(_safe(name), f"{size:,}")
    return table


def lineage_tree(generations: Sequence[Any]) -> Tree:
    """Return the ancestry, newest first, with the contributions below the model that they were fused into."""
    tree = branch = Tree(_generation(generations[-1]))
    for index in range(len(generations) - 1, -1, -1):
        for record in generations[index].contributions:
            rejected = record.get("status") == "rejected"
            note = f" [red]refused: {_safe(record.get('reason'))}[/]" if rejected else ""
            name, data = str(record.get("name")), str(record.get("dataset") or "a dataset not stated")
            about = [f"on {data}"] if data != name else []
            about += [_age(record["age"])] if record.get("age") else []
            about += [f"signed by {record['signer']}"] if record.get("signer") else []
            words = f" [dim]{_safe(', '.join(about))}[/]" if about else ""
            branch.add(f"{_safe(name)}{words}{note}")
        if index:
            branch = branch.add(_generation(generations[index - 1]))
    return tree


def carriers_table(carriers: Sequence[Any]) -> Table:
    """Return the models that carry a signer's contributions, and those that do not."""
    table = Table("model", "iteration", "carries", _number("of unknown signers"))
    for carrier in carriers:
        names = [f"{carried.contribution} ({carried.iteration})" for carried in carrier.carried]
        carries = f"[{'red' if names else 'green'}]{_safe(', '.join(names) or 'none')}[/]"
        number = "–" if carrier.iteration is None else str(carrier.iteration)
        table.add_row(_safe(carrier.place), number, carries, str(carrier.unsigned))
    return table


def status_table(status: Any) -> Table:
    """Return a run's iterations: complete, running, unfinished and missing work."""
    base = "/".join(Path(status.base_model).parts[-2:])
    table = Table(
        *("iteration", "contributions", "running", "unfinished", "late", "fused", "evaluated", "promoted"),
        title=_safe(f"target {status.target} iterations, next base: {base}"),
        title_justify="left",
    )
    for iteration in status.iterations:
        promoted = {True: "yes", False: "no", None: "–"}[iteration.promoted]
        late = [f"{name} ({_age(age)})" for name, age in iteration.late.items()]
        lists = (iteration.contributions, iteration.running, iteration.unfinished, late)
        stages = ("yes" if complete else "–" for complete in (iteration.fused, iteration.evaluated))
        table.add_row(
            f"{iteration.number:03d}", *(_safe(", ".join(names)) or "–" for names in lists), *stages, promoted
        )
    return table


def _safe(text: object) -> str:
    """Return a stranger's text as one line in which rich sees no markup and a terminal no control codes."""
    return escape(printable(text))


def _number(header: str) -> Column:
    return Column(header, justify="right")


def _cells(entry: Mapping[str, Any]) -> list[str]:
    style = _VERDICT_STYLE.get(entry["verdict"] or "", "dim")
    deviation = f" ± {entry['std']:.1f}" if entry.get("std") is not None else ""
    return [
        f"{entry['baseline_mean']:.1f}",
        f"{entry['mean']:.1f}{deviation}",
        f"[{style}]{entry['gain']:+.1f}[/] \\[{entry['gain_interval'][0]:+.1f}, {entry['gain_interval'][1]:+.1f}]",
        f"[{style}]{_SHORT_VERDICT[entry['verdict']]}[/]",
    ]


def _age(age: int) -> str:
    return f"{age} iteration{'s' if age > 1 else ''} old"


def _generation(generation: Any) -> str:
    digest = _safe(generation.body_digest[:19])
    return f"[bold]{_safe(generation.name)}[/] [dim]{_safe(generation.kind)}, {digest}…[/]"
