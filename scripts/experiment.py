"""Run ColD Fusion under several settings and compare the runs. `make experiment` calls this.

    python scripts/experiment.py configs/experiments/federated.toml --to runs/federated --jobs 2

The experiment's TOML names a configuration and what each variant changes in it (docs/evaluating.md). Each variant becomes an
ordinary configuration `TO/NAME.toml` and a run `TO/NAME`, made by `iterate.sh`; `TO/evaluation` compares the runs.
Stop it at any time: the same command continues and repeats nothing that is complete.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from coldctl.common.errors import ConfigError
from coldctl.config import loading, settings

ITERATE = Path(__file__).with_name("iterate.sh")
EVALUATION = "evaluation"  # the folder beside the variants' runs that compares them


@dataclass(frozen=True)
class Variant:
    """One variant of an experiment: an ordinary run with a configuration of its own."""

    name: str
    iterations: int
    text: str  # of its configuration, in TOML


def main() -> int:
    """Write the variants' configurations, run each, and evaluate all of them. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, metavar="FILE.toml")
    parser.add_argument("--to", type=Path, required=True, help="folder of the configurations, runs and the comparison")
    parser.add_argument("--jobs", default="2", help="how many contributors or models are trained at once (default 2)")
    arguments = parser.parse_args()
    to: Path = arguments.to
    try:
        variants = read_variants(arguments.experiment, to)
        write_configurations(variants, to)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for variant in variants:
        print(variant.name, file=sys.stderr)
        run = to / variant.name
        settings = {"RUN": str(run), "CONFIG": f"{run}.toml", "ITERATIONS": "0", "TARGET": str(variant.iterations)}
        settings |= {"JOBS": arguments.jobs, "SAMPLE": "", "GATE": ""}
        if code := subprocess.run(["sh", ITERATE], env={**os.environ, **settings}, check=False).returncode:
            return code
    runs = [to / variant.name for variant in variants]
    compare = ["--suite", f"{runs[-1]}.toml", "--output", to / EVALUATION, "--jobs", arguments.jobs]
    return subprocess.run(["coldctl", "evaluate", *runs, *compare], check=False).returncode


def read_variants(path: Path, to: Path) -> list[Variant]:
    """Read an experiment's file. The variants' configurations state local paths relative to the folder `to`.

    Raises ConfigError for a mistake in the file or in the configuration that it varies.
    """
    document = loading.document_of(path)
    loading.refuse_unknown(document, ("config", "iterations", "datasets", "variant", *settings.SECTIONS), str(path))
    if not isinstance(document.get("config"), str):
        raise ConfigError(f'{path}: no configuration to vary. Add config = "FILE.toml".')
    source = path.parent / document["config"]
    original = loading.document_of(source)
    loading.parsed(original, source)  # a mistake in the configuration is not blamed on the experiment
    loading.parsed({key: document[key] for key in settings.SECTIONS if key in document}, path)
    common = _merged(original, document)
    common["dataset"] = _selected(common.get("dataset", []), document.get("datasets"), path)
    tables = document.get("variant")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: no variants. Add [[variant]] tables, each with a name.")
    variants: list[Variant] = []
    for number, table in enumerate(tables, start=1):
        where = f"{path}: [[variant]] {table.get('name', number)!r}"
        loading.refuse_unknown(table, ("name", "iterations", "dataset", *settings.SECTIONS), where)
        name = _checked_name(table.get("name"), variants, where)
        iterations = table.get("iterations", document.get("iterations", 1))
        if type(iterations) is not int or iterations < 1:
            raise ConfigError(f"{where}: iterations = {iterations!r}. Write a whole number, at least 1.")
        varied = _merged(common, table)
        varied["dataset"] = _changed_datasets(common["dataset"], table.get("dataset", {}), where)
        try:
            loading.parsed(varied, source)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.message}") from None
        variants.append(Variant(name, iterations, tomli_w.dumps(_relocated(varied, source.parent, to))))
    return variants


def write_configurations(variants: list[Variant], to: Path) -> None:
    """Write `TO/NAME.toml` for each variant. Raises ConfigError if one exists with other settings: its run may have begun."""
    for variant in variants:
        path = to / f"{variant.name}.toml"
        if path.exists() and path.read_text(encoding="utf-8") != variant.text:
            raise ConfigError(
                f"{path}: belongs to another experiment. Choose another folder, or restore the experiment."
            )
    to.mkdir(parents=True, exist_ok=True)
    for variant in variants:
        (to / f"{variant.name}.toml").write_text(variant.text, encoding="utf-8")


def _merged(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration whose sections have the keys that `changes` names replaced."""
    merged = dict(document)
    for section in settings.SECTIONS:
        if section in changes:
            values = changes[section]
            merged[section] = {**merged.get(section, {}), **values} if isinstance(values, dict) else values
    return merged


def _selected(tables: list[dict[str, Any]], names: Any, path: Path) -> list[dict[str, Any]]:
    """Return the datasets that an experiment selects by `names`, or all of them."""
    if names is None:
        return tables
    if not isinstance(names, list):
        raise ConfigError(f'{path}: datasets = {names!r} is no list. Write for example ["tweets", "nyt"].')
    _check_datasets(names, tables, str(path))
    return [table for table in tables if table.get("name") in names]


def _changed_datasets(tables: list[dict[str, Any]], changes: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(changes, dict) or not all(isinstance(values, dict) for values in changes.values()):
        raise ConfigError(f"{where}: write what changes in a dataset as [variant.dataset.NAME].")
    _check_datasets(list(changes), tables, where)
    return [{**table, **changes.get(table.get("name"), {})} for table in tables]


def _check_datasets(names: list[Any], tables: list[dict[str, Any]], where: str) -> None:
    existing = [table.get("name") for table in tables]
    if missing := [name for name in names if name not in existing]:
        raise ConfigError(f"{where}: no dataset {missing[0]!r}. The suite has {', '.join(map(str, existing))}.")


def _checked_name(value: Any, earlier: list[Variant], where: str) -> str:
    """Return a variant's name, which is also a folder's. Raises ConfigError."""
    name = value if isinstance(value, str) and value.isprintable() else ""  # names are printed to a terminal
    loading.check_name(name, where)
    if name == EVALUATION:
        raise ConfigError(f"{where}: the folder {name!r} holds the comparison. Choose another name.")
    if name in [variant.name for variant in earlier]:
        raise ConfigError(f"{where}: two variants have this name. Rename one.")
    return name


def _relocated(document: Mapping[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """Return a configuration that means the same in folder `new` as it does in `old`: local paths are relative to it."""

    def relocate(table: dict[str, Any], key: str) -> dict[str, Any]:
        path = loading.located(str(table.get(key, "")), old)
        return (
            {**table, key: os.path.relpath(path, new.resolve())} if key in table and Path(path).is_absolute() else table
        )

    sections = {"run": "base", "fuse": "trusted_keys"}
    relocated = {name: relocate(document[name], key) for name, key in sections.items() if name in document}
    return {**document, **relocated, "dataset": [relocate(table, "path") for table in document["dataset"]]}


if __name__ == "__main__":
    sys.exit(main())
