"""Datasets: files or Hub datasets in, three labelled splits out, with a fingerprint and never a silent repair.

The test split is only ever scored. Without one, validation is the test split; a validation split that is then
missing is cut from train, stratified and seeded, never from test.
"""

import csv
import hashlib
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coldctl.core.config import Columns, DatasetConfig, derived_seed
from coldctl.core.errors import DataError

SPLITS = ("train", "validation", "test")
FORMATS = (".jsonl", ".csv", ".tsv", ".parquet")
REGRESSION_METRICS = ("pearson", "spearman")
_HELD_OUT = 0.1
_SHOWN = 5  # labels or columns that a message spells out

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Split:
    """Texts, their second texts where the dataset has pairs, and labels: class indices, or numbers."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> "Split":
        """The examples at `indices`, in that order."""
        return Split(
            [self.texts[index] for index in indices],
            None if self.pairs is None else [self.pairs[index] for index in indices],
            [self.labels[index] for index in indices],
        )


@dataclass(frozen=True)
class Dataset:
    """A dataset ready to learn from. `labels` are the class names in index order, empty for regression."""

    name: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    leaked: int  # test examples whose text (and pair) also stand in train or validation
    unlabelled: int  # rows left out because their source marks them as without a label

    @property
    def regression(self) -> bool:
        """Whether labels are numbers instead of classes."""
        return not self.labels


@dataclass(frozen=True)
class Limits:
    """How much of a dataset is used. 0 means all; `shots` counts training examples in all, stratified."""

    train: int = 0
    validation: int = 0
    test: int = 0
    shots: int = 0


def load(config: DatasetConfig, limits: Limits, seed: int) -> Dataset:
    """Read a dataset and cut it to `limits`, by `seed` where something is chosen.

    Raises DataError for anything that a person can have got wrong in it.
    """
    rows, names = _read_splits(config)
    unlabelled = _drop_unlabelled(rows, config) if names is not None else 0
    regression = config.metric in REGRESSION_METRICS or _is_regression(rows["train"], config.label)
    labels = () if regression else _class_names(rows, names, config)
    splits = {split: _to_split(rows[split], labels, config, split, regression=regression) for split in rows}
    train, validation, test = splits["train"], splits.get("validation"), splits.get("test")
    if test is None:  # nothing but train: the held-out tenth is the same whatever the seed, as a test file would be
        train, test = _cut(train, len(labels), derived_seed(0, config.name, "test"), config)
    if validation is None:
        train, validation = _cut(train, len(labels), derived_seed(seed, config.name, "validation"), config)
    leaked = _leaked(test, train, validation)
    train = _limited(train, limits.shots or limits.train, derived_seed(seed, config.name, "train"))
    validation = _limited(validation, limits.validation, derived_seed(seed, config.name, "validation cap"))
    test = _limited(test, limits.test, derived_seed(seed, config.name, "test cap"))
    if not regression and len(set(train.labels)) < 2:
        raise DataError(
            f"{config.name}: the {len(train)} training examples left have one class only: allow more of them"
        )
    fingerprint = _fingerprint(labels, train, validation, test)
    return Dataset(config.name, labels, train, validation, test, fingerprint, leaked, unlabelled)


def single(reference: str, columns: DatasetConfig) -> DatasetConfig:
    """The dataset that DATA on a command line means; its name is the file's or folder's own."""
    path = reference if is_hub(reference) else str(Path(reference).expanduser())
    file = Path(path.removeprefix("hf:"))
    last = file.stem if file.suffix in FORMATS else file.resolve().name
    name = columns.name or re.sub(r"[^\w.-]+", "-", last).strip("-.") or "dataset"
    return DatasetConfig(**{**vars(columns), "name": name, "path": path})


def stratified(labels: Sequence[int] | Sequence[float], count: int, seed: int) -> list[int]:
    """Indices of `count` examples, each class in proportion (largest remainders), at least one each if they fit.

    Numbers that are no classes (floats) are drawn without strata. The indices are ascending.
    """
    generator = np.random.default_rng(seed)
    if count >= len(labels):
        return list(range(len(labels)))
    if not all(isinstance(label, int) for label in labels):
        return sorted(generator.permutation(len(labels))[:count].tolist())
    array = np.asarray(labels)
    classes, sizes = np.unique(array, return_counts=True)
    ideal = sizes * (count / len(labels))
    shares = np.floor(ideal).astype(int)
    if count >= len(classes):
        shares = np.maximum(shares, 1)
    while shares.sum() < count:
        shares[np.argmax(np.where(shares < sizes, ideal - shares, -np.inf))] += 1
    while shares.sum() > count:
        shares[np.argmax(np.where(shares > 1, shares - ideal, -np.inf))] -= 1
    chosen: list[int] = []
    for label, share in zip(classes, shares, strict=True):
        chosen += generator.permutation(np.flatnonzero(array == label))[:share].tolist()
    return sorted(chosen)


def _limited(split: Split, count: int, seed: int) -> Split:
    return split if not count or count >= len(split) else split.take(stratified(split.labels, count, seed))


def _cut(train: Split, classes: int, seed: int, config: DatasetConfig) -> tuple[Split, Split]:
    """A stratified tenth of train, and what is left of it."""
    count = max(classes, round(len(train) * _HELD_OUT), 1)
    chosen = stratified(train.labels, count, seed)
    rest = sorted(set(range(len(train))) - set(chosen))
    if not rest:
        raise DataError(
            f"{config.name}: {len(train)} training examples are too few to hold some out: give more, or other splits"
        )
    return train.take(rest), train.take(chosen)


def _leaked(test: Split, *others: Split) -> int:
    known = {key for split in others for key in _keys(split)}
    return sum(key in known for key in _keys(test))


def _keys(split: Split) -> Iterator[tuple[str, str]]:
    return zip(split.texts, split.pairs or [""] * len(split), strict=True)


def _fingerprint(labels: Sequence[str], *splits: Split) -> str:
    """sha256 over the class names and every example of every split, in order: what was learned from and scored on."""
    hasher = hashlib.sha256(json.dumps(list(labels)).encode())
    for split in splits:
        hasher.update(b"\x1e")
        for index in range(len(split)):
            row = [split.texts[index], split.pairs[index] if split.pairs else None, split.labels[index]]
            hasher.update(json.dumps(row).encode() + b"\n")
    return "sha256:" + hasher.hexdigest()


# Reading ------------------------------------------------------------------------------------------------------


def is_hub(reference: str) -> bool:
    """Whether a DATA reference names a Hub dataset, `hf:[ORG/]NAME[:CONFIG]`."""
    return reference.startswith("hf:") and not reference.startswith("hf://")


def _read_splits(config: DatasetConfig) -> tuple[dict[str, list[Row]], list[str] | None]:
    """The rows of train and, where there are any, test and validation, and class names if the source names them."""
    wanted = {"train": config.train, "validation": config.validation, "test": config.test}
    source = _HubSource(config) if is_hub(config.path) else _FileSource(config)
    there = source.splits()
    chosen: dict[str, tuple[str, ...]] = {}
    for split in SPLITS:
        given = wanted[split]
        if given is not None:
            chosen[split] = (given,) if isinstance(given, str) else given
            if absent := [name for name in chosen[split] if name not in there]:
                raise DataError(f"{config.name}: {source.label} has no split {absent[0]!r}: it has {_some(there)}")
        elif split in there:
            chosen[split] = (split,)
    if "train" not in chosen:
        raise DataError(f"{config.name}: {source.label} has no train split: it has {_some(there)}")
    if "test" not in chosen and "validation" in chosen:
        chosen["test"] = chosen.pop("validation")
    if "validation" in chosen and chosen["validation"] == chosen["test"]:
        del chosen["validation"]
    rows = {split: [row for name in names for row in source.rows(name)] for split, names in chosen.items()}
    for split, found in rows.items():
        if not found:
            raise DataError(f"{config.name}: the {split} split of {source.label} is empty: give it examples")
    return rows, source.class_names()


class _FileSource:
    """A directory with one file per split, or a single file, which is the train split."""

    def __init__(self, config: DatasetConfig) -> None:
        path = Path(config.path)
        self.label = str(path)
        if path.is_file():
            if path.suffix not in FORMATS:
                raise DataError(f"{path}: unknown format {path.suffix!r}: give one of {', '.join(FORMATS)}")
            self._files = {"train": path}
        elif path.is_dir():
            self._files = {}
            for child in sorted(path.iterdir()):
                if child.suffix in FORMATS and not child.name.startswith("."):
                    if child.stem in self._files:
                        raise DataError(
                            f"{path} has both {self._files[child.stem].name} and {child.name}: keep one of them"
                        )
                    self._files[child.stem] = child
            if not self._files:
                raise DataError(
                    f"{path} holds no data: put train{FORMATS[0]} (validation, test) there; {', '.join(FORMATS)} are read"
                )
        else:
            raise DataError(f"no data at {path}: check the path, or write hf:ORG/NAME for a Hub dataset")

    def splits(self) -> list[str]:
        return list(self._files)

    def class_names(self) -> list[str] | None:
        return None

    def rows(self, split: str) -> list[Row]:
        path = self._files[split]
        try:
            if path.suffix == ".parquet":
                return _read_parquet(path)
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 text (byte {error.start}): convert it, for example with iconv"
            ) from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        return _read_jsonl(text, path) if path.suffix == ".jsonl" else _read_table(text, path)


def _read_jsonl(text: str, path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error}): write one object per line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object: write one object per line")
        rows.append(row)
    return rows


def _read_table(text: str, path: Path) -> list[Row]:
    tabs = path.suffix == ".tsv"
    reader = csv.DictReader(
        io.StringIO(text, newline=""),  # the csv module knows line ends; str.splitlines knows too many
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
    )
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: it has not as many columns as the header: mend that line"
                )
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}: mend that line") from None
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install 'coldctl[data]'") from None
    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is not a readable parquet file ({str(error).splitlines()[0]}): write it again"
        ) from None
    return rows


class _HubSource:
    """A dataset of the Hugging Face Hub, through the `datasets` library, at a pinned revision if one is given."""

    def __init__(self, config: DatasetConfig) -> None:
        try:
            import datasets
        except ImportError:
            raise DataError(f"{config.path} needs the datasets library: pip install 'coldctl[data]'") from None
        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it prints each of its retries
        name, _, subset = config.path.removeprefix("hf:").partition(":")
        self.label = config.path
        self._label_column = config.label
        try:
            self._data = datasets.load_dataset(name, subset or None, revision=config.revision)
        except Exception as error:  # network, missing names, formats: the library has no common exception
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            remedy = "check the name and the network, or give local files"
            raise DataError(f"{config.name}: cannot load {config.path} from the Hub: {reason}: {remedy}") from None

    def splits(self) -> list[str]:
        return list(self._data)

    def class_names(self) -> list[str] | None:
        features = next(iter(self._data.values())).features
        names = getattr(features.get(self._label_column), "names", None)
        return list(names) if names else None

    def rows(self, split: str) -> list[Row]:
        return list(self._data[split])


# Columns and labels -------------------------------------------------------------------------------------------


def _to_split(
    rows: Sequence[Row], labels: Sequence[str], config: DatasetConfig, split: str, *, regression: bool
) -> Split:
    index = {label: number for number, label in enumerate(labels)}
    texts = [_text(row, config.text, config, split, number) for number, row in enumerate(rows, 1)]
    pairs = None
    if config.text_pair is not None:
        pairs = [_text(row, config.text_pair, config, split, number) for number, row in enumerate(rows, 1)]
    elif rows and config.text == "text" and "text_pair" in rows[0]:
        pairs = [_text(row, "text_pair", config, split, number) for number, row in enumerate(rows, 1)]
    if regression:
        return Split(texts, pairs, [_number(row, config, split, number) for number, row in enumerate(rows, 1)])
    found = [_label(row, config, split, number) for number, row in enumerate(rows, 1)]
    for number, label in enumerate(found, start=1):
        if label not in index:
            raise DataError(
                f"{config.name}: label {label!r} in {split}, example {number}, never occurs in train ({_some(labels)}): "
                "add training examples of it or remove it"
            )
    return Split(texts, pairs, [index[label] for label in found])


def _text(row: Row, columns: Columns, config: DatasetConfig, split: str, number: int) -> str:
    parts = []
    for column in (columns,) if isinstance(columns, str) else columns:
        value = _value(row, column, config, split, number)
        if not isinstance(value, str):
            raise DataError(
                f"{config.name}: column {column!r} in {split}, example {number}, is {type(value).__name__}, not text"
            )
        _check_unicode(value, config, split, number)
        parts.append(value)
    return " ".join(parts)


def _check_unicode(value: str, config: DatasetConfig, split: str, number: int) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{config.name}: {split}, example {number}, has half a surrogate pair, which is no text: mend or remove it"
        ) from None


def _value(row: Row, column: str, config: DatasetConfig, split: str, number: int) -> Any:
    if column not in row:
        raise DataError(
            f"{config.name}: no column {column!r} in {split}, example {number} (it has {_some([str(key) for key in row])}): "
            "name the columns with --text, --text-pair and --label"
        )
    return row[column]


def _label(row: Row, config: DatasetConfig, split: str, number: int) -> str:
    value = _value(row, config.label, config, split, number)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if value is None or value == "" or not (isinstance(value, str) or whole):
        raise DataError(
            f"{config.name}: {split}, example {number}, has no usable label ({value!r}): give it one or remove it"
        )
    if isinstance(value, str):
        _check_unicode(value, config, split, number)
        return value
    return str(int(value))


def _number(row: Row, config: DatasetConfig, split: str, number: int) -> float:
    value = _value(row, config.label, config, split, number)
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = float("nan")
    if not np.isfinite(result):
        raise DataError(f"{config.name}: the label of {split}, example {number}, is {value!r}, not a number")
    return result


def _is_regression(rows: Sequence[Row], column: str) -> bool:
    """Labels are numbers to be predicted if all are numbers and one has a fraction."""
    try:
        values = [float(row[column]) for row in rows]
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
    return any(value != int(value) for value in values if np.isfinite(value))


def _class_names(rows: Mapping[str, list[Row]], names: list[str] | None, config: DatasetConfig) -> tuple[str, ...]:
    """The classes that train has, numbers in numeric order, or as the source names them.

    With names from the source the labels in the rows are their indices; they are replaced here.
    """
    if names is not None:
        for split in rows:
            rows[split][:] = [
                _with_name(row, names, config, split, number) for number, row in enumerate(rows[split], 1)
            ]
    counts = Counter(_label(row, config, "train", number) for number, row in enumerate(rows["train"], 1))
    if len(counts) < 2:
        raise DataError(
            f"{config.name}: train has one class only ({next(iter(counts))!r}): give examples of two or more"
        )
    if names is not None:
        return tuple(name for name in names if name in counts)
    if all(re.fullmatch(r"-?\d+", label) for label in counts):
        return tuple(sorted(counts, key=int))
    return tuple(sorted(counts))


def _drop_unlabelled(rows: Mapping[str, list[Row]], config: DatasetConfig) -> int:
    """Class labels of the Hub are −1 where there is none: a whole split of them is an error, single rows are left out."""
    dropped = 0
    for split, found in rows.items():
        labelled = [row for row in found if row.get(config.label) != -1]
        if not labelled:
            raise DataError(
                f"{config.name}: no example of the {split} split has a label on the Hub: name another split as {split}"
            )
        dropped += len(found) - len(labelled)
        found[:] = labelled
    return dropped


def _with_name(row: Row, names: Sequence[str], config: DatasetConfig, split: str, number: int) -> Row:
    value = row[config.label]
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise DataError(f"{config.name}: {split}, example {number}, has the label {value!r}, which names no class")
    return {**row, config.label: names[value]}


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") if names else "nothing"
