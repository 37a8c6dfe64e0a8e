"""An experiment: the same run under several settings, so that their curves can be held against each other.

One file names a configuration and what each variant changes in it. A variant is an ordinary configuration, so whatever
makes runs can make it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from coldctl.common.errors import ConfigError
from coldctl.config import loading
from coldctl.config.settings import SECTIONS

_KEYS = ("config", "iterations", "datasets", "variant", *SECTIONS)
_COMPARED = "evaluation"  # beside the variants' runs, where scripts/experiment.sh has them measured
_VARIANT_KEYS = ("name", "iterations", "dataset", *SECTIONS)


@dataclass(frozen=True)
class Variant:
    """One variant: `text` is its configuration in TOML, as it stands in the folder that it was made for."""

    name: str
    iterations: int
    text: str


def read(path: Path, folder: Path) -> list[Variant]:
    """The variants of an experiment file, their paths relative to `folder`.

    Raises ConfigError for what a person got wrong in the file or in the configuration that it varies.
    """
    document = loading.document_of(path)
    loading.refuse_unknown(document, _KEYS, str(path))
    if not isinstance(document.get("config"), str):
        raise ConfigError(f'{path}: it names no configuration to vary: add config = "FILE.toml"')
    source = path.parent / document["config"]
    original = loading.document_of(source)
    loading.parsed(original, source)  # so that each mistake is blamed where it was made
    common = _merged(original, {key: document[key] for key in SECTIONS if key in document})
    if wanted := document.get("datasets"):
        if not isinstance(wanted, list):
            raise ConfigError(f'{path}: datasets = {wanted!r}: it must be a list, such as ["tweets", "nyt"]')
        known = [table.get("name") for table in common.get("dataset", [])]
        if missing := [name for name in wanted if name not in known]:
            raise ConfigError(f"{path}: {source} has no dataset {missing[0]!r}: it has {', '.join(map(str, known))}")
        common["dataset"] = [table for table in common["dataset"] if table.get("name") in wanted]
    tables = document.get("variant", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: it has no variants: add [[variant]] tables, each with a name")
    variants = []
    for number, table in enumerate(tables, start=1):
        where = f"{path}: [[variant]] {table.get('name', number)!r}"
        loading.refuse_unknown(table, _VARIANT_KEYS, where)
        name, iterations = table.get("name"), table.get("iterations", document.get("iterations", 1))
        loading.check_name(name if isinstance(name, str) and name.isprintable() else "", where)
        if name == _COMPARED:
            raise ConfigError(f"{where}: {name!r} is where the variants are compared: give it another name")
        if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
            raise ConfigError(f"{where}: iterations = {iterations!r}: it must be a whole number, at least 1")
        varied = _merged(common, {key: value for key, value in table.items() if key in SECTIONS})
        varied["dataset"] = _with_datasets(common.get("dataset", []), table.get("dataset", {}), where)
        try:
            loading.parsed(varied, source)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.message}") from None
        variants.append(Variant(str(name), iterations, tomli_w.dumps(_moved(varied, source.parent, folder))))
    names = [variant.name for variant in variants]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: two variants are called {doubled[0]!r}: give each a name of its own")
    return variants


def _merged(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A document with the keys of some of its tables replaced."""
    merged = dict(document)
    for section, values in changes.items():
        merged[section] = {**merged.get(section, {}), **values} if isinstance(values, dict) else values
    return merged


def _with_datasets(tables: list[dict[str, Any]], changes: Any, where: str) -> list[dict[str, Any]]:
    names = [table.get("name") for table in tables]
    if not isinstance(changes, dict) or not all(isinstance(values, dict) for values in changes.values()):
        raise ConfigError(f"{where}: write what changes in a dataset as [variant.dataset.NAME]")
    if unknown := [name for name in changes if name not in names]:
        raise ConfigError(f"{where}: there is no dataset {unknown[0]!r}: the suite has {', '.join(map(str, names))}")
    return [{**table, **changes.get(table.get("name"), {})} for table in tables]


def _moved(document: Mapping[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """The document as it reads from another folder: local paths are relative to where it lies."""

    def located(reference: str) -> str:
        place = Path(loading.located(reference, old))
        return os.path.relpath(place, new.resolve()) if place.is_absolute() else reference

    moved = dict(document)
    if "base" in moved.get("run", {}):
        moved["run"] = {**moved["run"], "base": located(str(moved["run"]["base"]))}
    moved["dataset"] = [{**table, "path": located(str(table["path"]))} for table in moved["dataset"]]
    return moved
