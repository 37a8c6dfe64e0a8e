"""Settings: frozen dataclasses, read from TOML, resolved once as flag > file > default.

One file may hold everything: `[run] [finetune] [fuse] [evaluate] [publish]` and the suite's `[[dataset]]`.
Unknown keys are errors that name the nearest known one.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from coldctl.common.digests import LONGEST_NAME, digest_of
from coldctl.core.documents import TOML_LIMIT, toml_table
from coldctl.core.errors import ConfigError

HIGHEST_RANK = 4096  # of a low-rank adapter
DEFAULT_RANK = 8  # where an adapter is asked for, and no rank is given
MOST_CONTRIBUTORS = 10_000  # of a suite
_TOO_LARGE = 1 << 63  # for any whole number
_SHOWN = 60  # characters of a wrong key that a message spells out

Metric = Literal["accuracy", "macro_f1", "matthews", "pearson", "spearman"]
Protocol = Literal["linear-probe", "finetune", "few-shot", "multitask"]
PROTOCOLS: tuple[Protocol, ...] = typing.get_args(Protocol)
Method = Literal[
    "mean",
    "task-arithmetic",
    "ties",
    "dare",
    "model-stock",
    "slerp",
    "median",
    "trimmed-mean",
    "multi-krum",
    "geometric-median",
    "fisher",
]
Send = Literal["full", "delta-bf16", "delta-int8", "lora"]
Columns = str | tuple[str, ...]


@dataclass(frozen=True)
class RunConfig:
    """`[run]`: what `make iterate` needs to know."""

    base: str = ""
    sample: int = 0
    revision: str | None = None


@dataclass(frozen=True)
class FinetuneConfig:
    """`[finetune]`: how a contribution is trained. The defaults are the protocol's hyperparameters (arXiv 2211.00107)."""

    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.0
    max_gradient_norm: float = 1.0
    max_length: int = 512
    max_train_examples: int = 0
    max_validation_examples: int = 0
    max_test_examples: int = 0
    shots: int = 0
    shots_per_class: bool = False
    validate_every: int = 50
    patience: int = 20
    epsilon: float = 0.001
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    micro_batch: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    freeze_embeddings: bool = False
    freeze_layers: int = 0
    lora_rank: int = 0
    send: Send | None = None
    body_only: bool = False
    anchor: float = 0.0
    fisher: bool = False
    seed: int = 0


@dataclass(frozen=True)
class FuseConfig:
    """`[fuse]`: how contributions become a fused model. The defaults are the paper's plain mean."""

    method: Method = "mean"
    scale: str = "1"
    weights: str = "equal"
    max_share: float = 0.0
    density: float = 0.0
    trim: float = 0.2
    byzantine: int = 1
    position: float = 0.5
    outer_optimizer: Literal["none", "sgd", "nesterov", "adam"] = "none"
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    seed: int = 0
    leave_one_out: bool = False
    common_rows: bool = False
    allow_pickle: bool = False
    screen: Literal["report", "reject", "off"] = "report"
    min_contributions: int = 0
    strict: bool = False
    verify: bool = True
    trusted_keys: str | None = None
    allow_other_base: bool = False
    stale: Literal["auto", "reject", "discount"] = "auto"
    dtype: str | None = None
    max_shard_size: str = "5GB"


@dataclass(frozen=True)
class EvaluateConfig:
    """`[evaluate]`: how models are compared."""

    protocol: tuple[Protocol, ...] = ("linear-probe",)
    shortlist: int = 0
    seeds: int = 1
    shots: int = 100
    pooling: Literal["mean", "first"] = "mean"
    max_length: int = 512
    max_train_examples: int = 0
    max_validation_examples: int = 0
    max_test_examples: int = 0
    regression_margin: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class PublishConfig:
    """`[publish]`: what a published directory says about itself."""

    license: str | None = None
    name: str | None = None
    language: str = "en"
    base_model: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    onnx: bool = False
    max_shard_size: str = "5GB"


@dataclass(frozen=True)
class DatasetConfig:
    """One `[[dataset]]` of a suite. `path` is absolute or a Hub reference once the file is read.

    With `contributors` above 1 its training and validation examples are shared out among so many contributors, as in
    federated learning; `part` is the share of one of them, counted from 1, and 0 means all of it.
    """

    name: str
    path: str
    role: Literal["seen", "unseen"] = "seen"
    contributors: int = 1
    part: int = 0
    metric: Metric = "accuracy"
    text: Columns = "text"
    text_pair: Columns | None = None
    label: str = "label"
    train: Columns | None = None
    validation: Columns | None = None
    test: Columns | None = None
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class ConfigFile:
    """A TOML file as read: sections by name (still plain values), and the suite."""

    path: Path | None = None
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    datasets: tuple[DatasetConfig, ...] = ()
    digest: str = ""


SECTIONS: Mapping[str, type] = {
    "run": RunConfig,
    "finetune": FinetuneConfig,
    "fuse": FuseConfig,
    "evaluate": EvaluateConfig,
    "publish": PublishConfig,
}
_AT_MOST_ONE = {"warmup", "label_smoothing"}
_POSITIVE = {
    "epochs", "batch_size", "learning_rate", "max_length", "validate_every", "patience", "seeds", "contributors",
}  # fmt: skip

C = TypeVar("C")


def read(path: Path | None) -> ConfigFile:
    """Read and check a TOML file; None gives an empty one.

    Raises ConfigError for a file that is missing, no TOML, or has unknown keys or wrong types.
    """
    return ConfigFile() if path is None else parsed(document_of(path), path)


def document_of(path: Path) -> dict[str, Any]:
    """A TOML file as plain values. Raises ConfigError for a file that is missing, too large, or no TOML."""
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
    """The document of the file at `path`, checked. Raises ConfigError for unknown keys and wrong types."""
    refuse_unknown(document, [*SECTIONS, "dataset"], f"{path}")
    sections: dict[str, Mapping[str, Any]] = {}
    for name, kind in SECTIONS.items():
        table = document.get(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: [{name}] must be a table")
        _build(kind, table, f"{path}: [{name}]")
        sections[name] = dict(table)
    digest = digest_of(document)
    if base := sections["run"].get("base"):
        sections["run"] = {**sections["run"], "base": located(str(base), path.parent)}
    if keys := sections["fuse"].get("trusted_keys"):
        sections["fuse"] = {**sections["fuse"], "trusted_keys": str(_place(str(keys), path.parent))}
    return ConfigFile(path, sections, _datasets(document.get("dataset", []), path), digest)


def resolve(kind: type[C], file: ConfigFile, flags: Mapping[str, Any]) -> C:
    """One section's config: the flags that were given (not None), else the file's values, else the defaults."""
    name = next(section for section, known in SECTIONS.items() if known is kind)
    given = {key: value for key, value in flags.items() if value is not None}
    _build(kind, given, "on the command line", complete=False)  # so that each mistake is blamed where it was made
    merged = {**file.sections.get(name, {}), **given}
    return _build(kind, merged, f"{file.path}: [{name}]" if file.path else "flags")


def as_record(config: Any) -> dict[str, Any]:
    """A resolved config as the manifest stores it (JSON values only)."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }


def identity(stage: str, config: Any, **inputs: Any) -> str:
    """What makes two calls of a stage the same work: its resolved config and its inputs' digests."""
    return digest_of({"stage": stage, "config": as_record(config), "inputs": inputs})


def check_name(name: str, where: str) -> None:
    """A name becomes a directory. Raises ConfigError if it cannot be one, or would lead elsewhere."""
    if len(name.encode(errors="replace")) > LONGEST_NAME:
        raise ConfigError(f"{where}: a name of {len(name)} characters is too long for a directory: shorten it")
    if not name or name.startswith(".") or set(name) & set('/\\\0\n\r\t"'):
        raise ConfigError(f"{where}: {name!r} cannot name a directory: no slashes, no leading dot")


def contributors_of(datasets: Sequence[DatasetConfig]) -> list[tuple[str, DatasetConfig]]:
    """The contributors of a suite by name, each with its dataset, or with its part of one that several share."""
    found: list[tuple[str, DatasetConfig]] = []
    for dataset in datasets:
        if dataset.role != "seen":
            continue
        if dataset.part or dataset.contributors == 1:
            found.append((dataset.name, dataset))
            continue
        width = len(str(dataset.contributors))
        parts = range(1, dataset.contributors + 1)
        found += [(f"{dataset.name}-{part:0{width}d}", dataclasses.replace(dataset, part=part)) for part in parts]
    return found


def settled_finetuning(config: FinetuneConfig) -> FinetuneConfig:
    """The settings with what follows from them: `send` from the rank of adapters, and the other way round.

    Raises ConfigError for settings that contradict each other.
    """
    if config.lora_rank > HIGHEST_RANK:
        raise ConfigError(f"--lora-rank {config.lora_rank} is out of range: at most {HIGHEST_RANK}")
    if config.lora_rank and config.send not in (None, "lora"):
        raise ConfigError(
            f"--send {config.send} and --lora-rank {config.lora_rank} exclude each other: leave one out, or --send lora"
        )
    if config.send is None:
        config = dataclasses.replace(config, send="lora" if config.lora_rank else "full")
    elif config.send == "lora" and not config.lora_rank:
        config = dataclasses.replace(config, lora_rank=DEFAULT_RANK)
    if config.shots_per_class and not config.shots:
        raise ConfigError("--shots-per-class says how --shots counts: give --shots, too")
    if config.label_smoothing == 1:
        raise ConfigError("--label-smoothing 1 leaves nothing to learn: it is a share below 1")
    for flag, given in (
        ("--fisher", config.fisher),
        ("--anchor", config.anchor),
        ("--freeze-embeddings", config.freeze_embeddings),
        ("--freeze-layers", config.freeze_layers),
    ):
        if given and config.lora_rank:
            raise ConfigError(
                f"{flag} is about the body's own weights, which adapters leave alone: leave out --lora-rank and --send lora"
            )
    return config


def size_in_bytes(text: str) -> int:
    """`"5GB"`, `"200MB"`, `"1000"` in bytes, with decimal units as transformers counts them. Raises ConfigError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        size = int(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{text!r} is no size: write for example 5GB or 200MB")
    return size


def seconds_in(text: str) -> float:
    """`"30s"`, `"10m"`, `"2h"`, `"1d"` in seconds. Raises ConfigError.

    >>> seconds_in("10m")
    600.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"{text!r} is no length of time: write for example 30s, 10m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _datasets(tables: Any, path: Path) -> tuple[DatasetConfig, ...]:
    if not isinstance(tables, list):
        raise ConfigError(f"{path}: write each dataset as [[dataset]], with two brackets")
    datasets = []
    for number, table in enumerate(tables, start=1):
        where = (
            f"{path}: [[dataset]] {table.get('name', number)!r}" if isinstance(table, dict) else f"{path}: [[dataset]]"
        )
        if not isinstance(table, dict):
            raise ConfigError(f"{where} must be a table")
        dataset = _build(DatasetConfig, table, where)
        check_name(dataset.name, where)
        datasets.append(dataclasses.replace(dataset, path=located(dataset.path, path.parent)))
        if dataset.part > dataset.contributors:
            raise ConfigError(
                f"{where}: part = {dataset.part} is out of range: there are {dataset.contributors} contributors"
            )
    if (total := sum(dataset.contributors for dataset in datasets)) > MOST_CONTRIBUTORS:
        raise ConfigError(f"{path}: {total} contributors in all: at most {MOST_CONTRIBUTORS}")
    contributors = contributors_of(datasets)
    names = [dataset.name for dataset in datasets] + [name for name, dataset in contributors if name != dataset.name]
    if doubled := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ConfigError(f"{path}: two datasets are called {doubled[0]!r}: give each a name of its own")
    return tuple(datasets)


def located(reference: str, folder: Path) -> str:
    """A reference as a file in `folder` means it: its paths are relative to it, Hub ids and URLs stay as they are."""
    if "://" in reference or reference.startswith("hf:"):
        return reference
    path = _place(reference, folder)
    is_path = reference.startswith((".", "/", "~")) or reference.count("/") > 1 or path.exists()
    return str(path) if is_path else reference


def _place(text: str, folder: Path) -> Path:
    """A path as a file in `folder` means it. Raises ConfigError for one that no file can have."""
    try:
        path = (folder / Path(text).expanduser()).resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, nobody's home, links in a circle
        raise ConfigError(f"{text[:_SHOWN]!r} names nothing that can be there ({type(error).__name__})") from None
    return path


def _build(kind: type[C], table: Mapping[str, Any], where: str, *, complete: bool = True) -> C:
    """Make a config dataclass from plain values. Raises ConfigError for unknown keys and wrong types."""
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    refuse_unknown(table, [f.name for f in fields], where)
    if complete and (missing := [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in table]):
        raise ConfigError(f"{where}: {missing[0]!r} is missing: add it")
    values = {key: _checked(value, hints[key], f"{where}: {key}") for key, value in table.items()}
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            low_is_bad = value <= 0 if key in _POSITIVE else value < 0
            if low_is_bad or (isinstance(value, int) and value >= _TOO_LARGE) or not math.isfinite(value):
                raise ConfigError(
                    f"{where}: {key} = {value} is out of range: it must be {'> 0' if key in _POSITIVE else '>= 0'}"
                )
            if key in _AT_MOST_ONE and value > 1:
                raise ConfigError(f"{where}: {key} = {value} is out of range: it is a share, at most 1")
    return kind(**values)


def refuse_unknown(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise ConfigError for a key that is not known, with the nearest one that is."""
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key[:_SHOWN], known, n=1, cutoff=0.0)
            raise ConfigError(f"{where}: unknown key {key[:_SHOWN]!r}: did you mean {near[0]!r}?")


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint` (str, int, float, bool, Literal, tuple of those, unions). Raises ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _checked(value, option, where)
            except ConfigError:
                continue
        choices = [
            str(choice)
            for option in arguments
            if typing.get_origin(option) is Literal
            for choice in typing.get_args(option)
        ]
        remedy = f": choose one of {', '.join(choices)}" if choices else " has the wrong type"
        raise ConfigError(f"{where} = {value!r}{remedy}")
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where} = {value!r}: choose one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        if items and not (arguments[0] is str and isinstance(value, str)):
            return tuple(_checked(item, arguments[0], where) for item in items)
    elif hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # scale = 2.5 in a file
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} = {value!r} has the wrong type: it must be {wanted}")
