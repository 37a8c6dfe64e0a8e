"""Settings from TOML files and flags, resolved once: flag > file > default.

One file may hold everything: `[run] [finetune] [fuse] [evaluate] [publish]` and the suite's `[[dataset]]`.
Unknown keys are errors that name the nearest known one. Each mistake is blamed on where it was made.
"""

import dataclasses
import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from coldctl.common.digests import LONGEST_NAME, digest_of
from coldctl.common.errors import ConfigError
from coldctl.common.parsing import TOML_LIMIT, toml_table
from coldctl.config.fields import settings_of
from coldctl.config.settings import SECTIONS, DatasetConfig, contributors_of
from coldctl.config.values import Scale, Size

MOST_CONTRIBUTORS = 10_000  # of a suite
_SHOWN = 60  # characters of a wrong key that a message spells out

C = TypeVar("C")


@dataclass(frozen=True)
class ConfigFile:
    """A TOML file as read: sections by name (still plain values), and the suite."""

    path: Path | None = None
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    datasets: tuple[DatasetConfig, ...] = ()
    digest: str = ""


def read(path: Path | None) -> ConfigFile:
    """Read and check a TOML file; None gives an empty one.

    Raises ConfigError for a file that is missing, not TOML, or has unknown keys or wrong types.
    """
    return ConfigFile() if path is None else parsed(document_of(path), path)


def read_suite(suite: Path, config: Path | None) -> tuple[tuple[DatasetConfig, ...], ConfigFile]:
    """Return a suite's datasets, and the file that settings come from: `config`, else the suite's file itself."""
    file = read(suite)
    if not file.datasets:
        raise ConfigError(f"{suite} has no [[dataset]]: add the datasets of the suite")
    return file.datasets, file if config is None else read(config)


def document_of(path: Path) -> dict[str, Any]:
    """Read a TOML file as plain values. Raises ConfigError for a file that is missing, too large, or not TOML."""
    try:
        with path.open("rb") as file:
            return toml_table(file.read(TOML_LIMIT + 1))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}: check the path") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def parsed(document: Mapping[str, Any], path: Path) -> ConfigFile:
    """Check the document of the file at `path`. Raises ConfigError for unknown keys and wrong types."""
    refuse_unknown(document, [*SECTIONS, "dataset"], f"{path}")
    sections: dict[str, Mapping[str, Any]] = {}
    for name, kind in SECTIONS.items():
        table = document.get(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: [{name}] must be a table")
        _checked(kind, table, f"{path}: [{name}]")
        sections[name] = dict(table)
    if base := sections["run"].get("base"):
        sections["run"] = {**sections["run"], "base": located(str(base), path.parent)}
    if keys := sections["fuse"].get("trusted_keys"):
        sections["fuse"] = {**sections["fuse"], "trusted_keys": str(_place(str(keys), path.parent))}
    return ConfigFile(path, sections, _datasets(document.get("dataset", []), path), digest_of(document))


def resolve(kind: type[C], file: ConfigFile, flags: Mapping[str, Any]) -> C:
    """Return one section's settings: the flags that are not None, else the file's values, else the defaults."""
    section = next(section for section, settings in SECTIONS.items() if settings is kind)
    from_file = _checked(kind, file.sections.get(section, {}), f"{file.path}: [{section}]")
    from_flags = {key: value for key, value in flags.items() if value is not None}
    return kind(**{**from_file, **_checked(kind, from_flags, "arguments")})


def as_record(config: Any) -> dict[str, Any]:
    """Return resolved settings as manifests store them: JSON values, one for equal settings."""
    record: dict[str, Any] = {}
    for name, value in vars(config).items():
        record[name] = list(value) if isinstance(value, tuple) else value
        if isinstance(value, Scale | Size):
            record[name] = str(value)
    return record


def identity(stage: str, config: Any, **inputs: Any) -> str:
    """Return what makes two calls of a stage the same work: a digest of its settings and its inputs' digests."""
    return digest_of({"stage": stage, "config": as_record(config), "inputs": inputs})


def check_name(name: str, where: str) -> None:
    """Check that a name can become a directory's. Raises ConfigError if not, or if it would lead elsewhere."""
    if len(name.encode(errors="replace")) > LONGEST_NAME:
        raise ConfigError(f"{where}: a name of {len(name)} characters is too long for a directory: shorten it")
    if not name or name.startswith(".") or set(name) & set('/\\\0\n\r\t"'):
        raise ConfigError(f"{where}: {name!r} cannot name a directory: no slashes, no leading dot")


def located(reference: str, folder: Path) -> str:
    """Return a reference as a file in `folder` means it: paths are relative to it, Hub ids and URLs stay as they are."""
    if "://" in reference or reference.startswith("hf:"):
        return reference
    path = _place(reference, folder)
    is_path = reference.startswith((".", "/", "~")) or reference.count("/") > 1 or path.exists()
    return str(path) if is_path else reference


def refuse_unknown(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise ConfigError for a key that is not known, with the nearest one that is."""
    names = list(known)
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key[:_SHOWN], names, n=1, cutoff=0.0)
            raise ConfigError(f"{where}: unknown key {key[:_SHOWN]!r}: did you mean {near[0]!r}?")


def _checked(kind: type, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a table's values as the types of a settings class. Raises ConfigError for unknown keys and bad values."""
    settings = settings_of(kind)
    refuse_unknown(table, settings, where)
    return {key: settings[key].check(value, where) for key, value in table.items()}


def _place(text: str, folder: Path) -> Path:
    """Return a path as a file in `folder` means it. Raises ConfigError for one that no file can have."""
    try:
        path = (folder / Path(text).expanduser()).resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, nobody's home, links in a circle
        raise ConfigError(f"{text[:_SHOWN]!r} names nothing that can be there ({type(error).__name__})") from None
    return path


def _datasets(tables: Any, path: Path) -> tuple[DatasetConfig, ...]:
    if not isinstance(tables, list):
        raise ConfigError(f"{path}: write each dataset as [[dataset]], with two brackets")
    datasets = [_dataset(table, number, path) for number, table in enumerate(tables, start=1)]
    if (total := sum(dataset.contributors for dataset in datasets)) > MOST_CONTRIBUTORS:
        raise ConfigError(f"{path}: {total} contributors in all: at most {MOST_CONTRIBUTORS}")
    contributors = contributors_of(datasets)
    names = [dataset.name for dataset in datasets] + [name for name, dataset in contributors if name != dataset.name]
    if doubled := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ConfigError(f"{path}: two datasets are called {doubled[0]!r}: give each a name of its own")
    return tuple(datasets)


def _dataset(table: Any, number: int, path: Path) -> DatasetConfig:
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: [[dataset]] must be a table")
    where = f"{path}: [[dataset]] {table.get('name', number)!r}"
    values = _checked(DatasetConfig, table, where)
    if missing := [name for name in ("name", "path") if name not in values]:
        raise ConfigError(f"{where}: {missing[0]!r} is missing: add it")
    dataset = DatasetConfig(**values)
    check_name(dataset.name, where)
    if dataset.part > dataset.contributors:
        raise ConfigError(
            f"{where}: part = {dataset.part} is out of range: there are {dataset.contributors} contributors"
        )
    return dataclasses.replace(dataset, path=located(dataset.path, path.parent))
