"""Datasets: files or Hub datasets in, three labelled splits out, with a fingerprint and never a silent repair.

The test split is only ever scored. Without one, validation is the test split; a validation split that is then
missing is cut from train, stratified and seeded, never from test. Rows are read one at a time, and of each only
its texts and its label are kept, so that a million of them cost little memory.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.common.digests import derived_seed
from coldctl.common.errors import DataError
from coldctl.config.settings import Columns, DatasetConfig
from coldctl.data.sources import FORMATS, ROW_LIMIT, FileSource, HubSource, Row
from coldctl.data.texts import Texts, TextSpool

SPLITS = ("train", "validation", "test")
_ALIASES = {"validation": ("dev", "valid", "val")}
REGRESSION_METRICS = ("pearson", "spearman")
MULTILABEL_METRICS = ("accuracy", "macro_f1")
_HELD_OUT = 0.1
_SHOWN = 5  # labels or columns that a message spells out
_MOST_CLASSES = 1 << 16  # more of them mean that the column holds no classes
_LONGEST_LABEL = 1000  # characters
_LABEL_CHARACTERS = 1 << 19  # of all classes, which stand in configs and manifests
_HASHED = 1 << 60  # whole numbers up to here have hashes of their own
_BATCH = 4096  # labels that become Python objects at a time

Labels = NDArray[Any]


@dataclass(frozen=True)
class Split:
    """Texts, their second texts where the dataset has pairs, and labels.

    Labels are class indices int64 [n], numbers float64 [n] for regression, or uint8 [n, classes], 1 for each class
    that an example has, for multi-label.
    """

    texts: Texts
    pairs: Texts | None
    labels: Labels

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "Split":
        """The examples at `indices`, in that order. Texts are not copied."""
        rows = np.asarray(indices, np.int64)
        pairs = None if self.pairs is None else self.pairs.take(rows)
        return Split(self.texts.take(rows), pairs, self.labels[rows])


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
    repeated: int  # validation examples whose text (and pair) also stand in train
    duplicated: int  # train examples that repeat the text (and pair) of an earlier one
    unlabelled: int  # rows left out because their source marks them as without a label
    train_digests: NDArray[np.uint64]  # of the texts of all its training examples, sorted, whatever the limits

    @property
    def regression(self) -> bool:
        """Whether labels are numbers instead of classes."""
        return not self.labels

    @property
    def multilabel(self) -> bool:
        """Whether an example may have several classes, or none."""
        return self.train.labels.ndim == 2

    def tested_in(self, other: "Dataset") -> int:
        """How many test examples of this dataset, as limited, also stand in the training split of `other`."""
        return int(_among(_digests(self.test), other.train_digests).sum())

    def overlaps(self) -> list[str]:
        """What a reader of the scores should know about examples that stand in more than one place, in words."""
        counts = (
            (self.leaked, "test examples also stand in its train or validation split"),
            (self.repeated, "validation examples also stand in its train split"),
            (self.duplicated, "train examples repeat an earlier one"),
        )
        return [f"{count} {what}" for count, what in counts if count]


@dataclass(frozen=True)
class Limits:
    """How much of a dataset is used. 0 means all.

    `shots` counts training examples: in all, stratified, or with `per_class` of each class.
    """

    train: int = 0
    validation: int = 0
    test: int = 0
    shots: int = 0
    per_class: bool = False


def load(config: DatasetConfig, limits: Limits, seed: int) -> Dataset:
    """Read a dataset and cut it to `limits`, by `seed` where something is chosen.

    Raises DataError for anything that a person can have got wrong in it.
    """
    splits, labels, unlabelled = _read_splits(config)
    train, validation, test = splits["train"], splits.get("validation"), splits.get("test")
    if test is None:  # nothing but train: the held-out tenth is the same whatever the seed, as a test file would be
        train, test = _cut(train, len(labels), derived_seed(0, config.name, "test"), config)
    if validation is None:
        train, validation = _cut(train, len(labels), derived_seed(seed, config.name, "validation"), config)
    train_digests, (leaked, repeated, duplicated) = _overlaps(train, validation, test)
    if config.part:
        train, validation = _share(train, "train", config, seed), _share(validation, "validation", config, seed)
    train = _limited_train(train, limits, derived_seed(seed, config.name, "train"), config)
    validation = _limited(validation, limits.validation, derived_seed(seed, config.name, "validation cap"))
    test = _limited(test, limits.test, derived_seed(seed, config.name, "test cap"))
    if not labels and np.ptp(train.labels) == 0:
        raise DataError(
            f"{config.name}: all {len(train)} training labels are {train.labels[0]}: there is nothing to learn"
        )
    if labels and np.all(train.labels == train.labels[0]):
        only = "one class" if train.labels.ndim == 1 else "the same classes"
        raise DataError(f"{config.name}: the {len(train)} training examples left have {only} only: allow more of them")
    fingerprint = _fingerprint(labels, train, validation, test)
    dataset = Dataset(
        config.name,
        labels,
        train,
        validation,
        test,
        fingerprint,
        leaked,
        repeated,
        duplicated,
        unlabelled,
        train_digests,
    )
    metric_of(config, dataset)  # a metric that cannot be computed is refused before anything is learned
    return dataset


def metric_of(config: DatasetConfig, dataset: Dataset) -> str:
    """The metric that scores a dataset: the configured one, or spearman for numbers that are given another one.

    Raises DataError for a metric that multi-label has no use for.
    """
    if dataset.regression:
        return config.metric if config.metric in REGRESSION_METRICS else "spearman"
    if dataset.multilabel and config.metric not in MULTILABEL_METRICS:
        raise DataError(
            f"{config.name}: its labels are lists of classes, which {config.metric} cannot score: set metric to "
            "accuracy (an example counts if all its classes are right) or macro_f1"
        )
    return config.metric


def single(reference: str, columns: DatasetConfig) -> DatasetConfig:
    """The dataset that DATA on a command line means; its name is the file's or folder's own."""
    path = reference if is_hub(reference) else str(Path(reference).expanduser())
    file = Path(path.removeprefix("hf:"))
    last = file.stem if file.suffix in FORMATS else file.resolve().name
    name = columns.name or re.sub(r"[^\w.-]+", "-", last).strip("-.") or "dataset"
    return DatasetConfig(**{**vars(columns), "name": name, "path": path})


def stratified(labels: Sequence[int] | Sequence[float] | Labels, count: int, seed: int) -> list[int]:
    """Indices of `count` examples, each class in proportion (largest remainders), at least one each if they fit.

    Numbers that are no classes (floats) and multi-label (rows of 0 and 1) are drawn without strata. The indices are
    ascending.
    """
    generator = np.random.default_rng(seed)
    array = np.asarray(labels)
    if count >= len(array):
        return list(range(len(array)))
    if array.ndim == 2 or array.dtype.kind == "f":
        return sorted(generator.permutation(len(array))[:count].tolist())
    members = _members(array)
    sizes = np.array([len(member) for member in members])
    ideal = sizes * (count / len(array))
    shares = np.floor(ideal).astype(int)
    if count >= len(members):
        shares = np.maximum(shares, 1)
    while shares.sum() < count:
        shares[np.argmax(np.where(shares < sizes, ideal - shares, -np.inf))] += 1
    while shares.sum() > count:
        shares[np.argmax(np.where(shares > 1, shares - ideal, -np.inf))] -= 1
    chosen = [generator.permutation(member)[:share] for member, share in zip(members, shares, strict=True)]
    return sorted(np.concatenate(chosen).tolist())


def per_class(labels: Labels, count: int, seed: int) -> list[int]:
    """Indices of `count` examples of each class, all of a class that has fewer; int64 [n] in. They are ascending."""
    generator = np.random.default_rng(seed)
    return sorted(np.concatenate([generator.permutation(member)[:count] for member in _members(labels)]).tolist())


def is_hub(reference: str) -> bool:
    """Whether a DATA reference names a Hub dataset, `hf:[ORG/]NAME[:CONFIG]`."""
    return reference.startswith("hf:") and not reference.startswith("hf://")


def _members(labels: Labels) -> list[NDArray[np.int64]]:
    """The indices of each class's examples, ascending, one array per class that occurs."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, 1 + np.flatnonzero(np.diff(labels[order])))


def _limited(split: Split, count: int, seed: int) -> Split:
    return split if not count or count >= len(split) else split.take(stratified(split.labels, count, seed))


def _limited_train(train: Split, limits: Limits, seed: int, config: DatasetConfig) -> Split:
    if not (limits.shots and limits.per_class):
        return _limited(train, limits.shots or limits.train, seed)
    if train.labels.dtype != np.int64:
        kind = "are lists of classes" if train.labels.ndim == 2 else "are numbers"
        raise DataError(f"{config.name}: its labels {kind}, so shots cannot be drawn per class: let them count in all")
    return train.take(per_class(train.labels, limits.shots, seed))


def _cut(train: Split, classes: int, seed: int, config: DatasetConfig) -> tuple[Split, Split]:
    """A stratified tenth of train, and what is left of it."""
    count = max(classes, round(len(train) * _HELD_OUT), 1)
    chosen = stratified(train.labels, count, seed)
    if len(chosen) == len(train):
        raise DataError(
            f"{config.name}: {len(train)} training examples of {classes} classes are too few to hold some out: give more, "
            "other splits, or the right column with --label"
        )
    return train.take(np.delete(np.arange(len(train)), chosen)), train.take(chosen)


def _share(split: Split, kind: str, config: DatasetConfig, seed: int) -> Split:
    """What `config.part` of its contributors has of a split: disjoint shares, each class dealt out in turn."""
    if len(split) < config.contributors:
        raise DataError(
            f"{config.name}: {len(split)} {kind} examples cannot be shared among {config.contributors} contributors: "
            "give fewer contributors or more examples"
        )
    generator = np.random.default_rng(derived_seed(seed, config.name, kind, "contributors"))
    order = generator.permutation(len(split))
    if split.labels.dtype == np.int64:  # otherwise there are no classes to deal out evenly
        order = order[np.argsort(split.labels[order], kind="stable")]
    return split.take(np.sort(order[config.part - 1 :: config.contributors]))


def _overlaps(train: Split, validation: Split, test: Split) -> tuple[NDArray[np.uint64], tuple[int, int, int]]:
    """The sorted digests of train, and how many examples stand twice.

    Counted are test examples that stand in the others, validation examples that stand in train, and repetitions
    within train.
    """
    first, second, third = (np.sort(_digests(split)) for split in (train, validation, test))
    leaked = _among(third, first) | _among(third, second)
    return first, (int(leaked.sum()), int(_among(second, first).sum()), int(np.sum(first[1:] == first[:-1])))


def _among(values: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each value is among the known ones, which are sorted."""
    found: NDArray[np.bool_] = known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values
    return found


def _digests(split: Split) -> NDArray[np.uint64]:
    """A digest of each example's texts, uint64 [n]. Among a million, two that differ are mistaken once in 10⁷ datasets."""
    pairs = repeat(b"") if split.pairs is None else split.pairs.encoded()
    parts = zip(split.texts.encoded(), pairs, strict=False)  # repeat has no end
    digests = (hashlib.blake2b(b"%d:%b%b" % (len(text), text, pair), digest_size=8).digest() for text, pair in parts)
    return np.fromiter((int.from_bytes(digest) for digest in digests), np.uint64, len(split))


def _fingerprint(labels: Sequence[str], *splits: Split) -> str:
    """sha256 over the class names and every example of every split, in order: what was learned from and scored on."""
    hasher = hashlib.sha256(json.dumps(list(labels)).encode())
    for split in splits:
        hasher.update(b"\x1e")
        pairs = repeat(None) if split.pairs is None else split.pairs
        for row in zip(split.texts, pairs, _plain(split.labels), strict=False):  # repeat has no end
            hasher.update(json.dumps(row).encode() + b"\n")
    return "sha256:" + hasher.hexdigest()


def _plain(labels: Labels) -> Iterator[Any]:
    """Labels as JSON has them: an index, a number, or a list of indices."""
    for start in range(0, len(labels), _BATCH):
        part = labels[start : start + _BATCH]
        if part.ndim == 1:
            yield from part.tolist()
            continue
        places, ends = np.nonzero(part)[1].tolist(), np.cumsum(part.sum(1, dtype=np.int64)).tolist()
        yield from (places[first:last] for first, last in pairwise([0, *ends]))


# Reading ------------------------------------------------------------------------------------------------------


def _read_splits(config: DatasetConfig) -> tuple[dict[str, Split], tuple[str, ...], int]:
    """Train and, where there are any, test and validation; the classes; and how many rows had no label."""
    source = HubSource(config) if is_hub(config.path) else FileSource(config)
    names = source.class_names()
    found = {}
    for split, parts in _chosen(config, source).items():
        rows = (row for part in parts for row in source.rows(part))
        found[split] = _read(rows, names, config, split)
        if not len(found[split].texts):
            if found[split].unlabelled:
                raise DataError(
                    f"{config.name}: no example of the {split} split has a label on the Hub: name another split as {split}"
                )
            raise DataError(f"{config.name}: the {split} split of {source.label} is empty: give it examples")
    train = found["train"].labels
    regression = not train.lists and (config.metric in REGRESSION_METRICS or (names is None and train.fractions))
    labels = () if regression else _class_names(train, names, config)
    splits = {
        split: Split(read.texts, read.pairs, _finished(read.labels, train, labels, config))
        for split, read in found.items()
    }
    return splits, labels, sum(read.unlabelled for read in found.values())


def _chosen(config: DatasetConfig, source: FileSource | HubSource) -> dict[str, tuple[str, ...]]:
    """Which of the source's splits make up train, validation and test."""
    wanted = {"train": config.train, "validation": config.validation, "test": config.test}
    there = source.splits()
    chosen: dict[str, tuple[str, ...]] = {}
    for split in SPLITS:
        given = wanted[split]
        if given is not None:
            chosen[split] = (given,) if isinstance(given, str) else given
            if absent := [name for name in chosen[split] if name not in there]:
                raise DataError(f"{config.name}: {source.label} has no split {absent[0]!r}: it has {_some(there)}")
        elif names := [name for name in (split, *_ALIASES.get(split, ())) if name in there]:
            chosen[split] = (names[0],)
    if "train" not in chosen:
        raise DataError(f"{config.name}: {source.label} has no train split: it has {_some(there)}")
    if "test" not in chosen and "validation" in chosen:
        chosen["test"] = chosen.pop("validation")
    if "validation" in chosen and chosen["validation"] == chosen["test"]:
        del chosen["validation"]
    return chosen


@dataclass(frozen=True)
class _Read:
    """A split whose labels are not understood yet."""

    texts: Texts
    pairs: Texts | None
    labels: "_Collected"
    unlabelled: int


def _read(rows: Iterable[Row], names: list[str] | None, config: DatasetConfig, split: str) -> _Read:
    """Take out of each row what is needed. Class labels of the Hub are -1 where there is none: such rows are left out."""
    texts, pairs, labels = TextSpool(), TextSpool(), _Collected(config, split)
    second = config.text_pair
    count = unlabelled = 0
    for row in rows:
        if names is not None and row.get(config.label) == -1:
            unlabelled += 1
            continue
        count += 1
        if count == 1 and second is None and config.text == "text" and "text_pair" in row:
            second = "text_pair"
        where = f"{split}, example {count}"
        _add_text(texts, row, config.text, config, where)
        if second is not None:
            _add_text(pairs, row, second, config, where)
        label = _value(row, config.label, config, where)
        if names is not None and config.metric not in REGRESSION_METRICS:
            label = _named(label, names, config, where)
        labels.add(label, where)
    return _Read(texts.finish(), None if second is None else pairs.finish(), labels, unlabelled)


def _add_text(spool: TextSpool, row: Row, columns: Columns, config: DatasetConfig, where: str) -> None:
    parts = []
    for column in (columns,) if isinstance(columns, str) else columns:
        value = _value(row, column, config, where)
        if not isinstance(value, str):
            raise DataError(f"{config.name}: column {column!r} in {where}, is {type(value).__name__}, not text")
        parts.append(value)
    if sum(map(len, parts)) > ROW_LIMIT:
        raise DataError(f"{config.name}: the text of {where}, is longer than {ROW_LIMIT} characters: cut it")
    try:
        spool.append(" ".join(parts))
    except UnicodeEncodeError:
        raise _half_a_pair(config, where) from None


def _half_a_pair(config: DatasetConfig, where: str) -> DataError:
    return DataError(f"{config.name}: {where}, has half a surrogate pair, which is no text: mend or remove it")


def _value(row: Row, column: str, config: DatasetConfig, where: str) -> Any:
    if column not in row:
        raise DataError(
            f"{config.name}: no column {column!r} in {where} (it has {_some([str(key) for key in row])}): "
            "name the columns with --text, --text-pair and --label"
        )
    return row[column]


def _named(label: Any, names: Sequence[str], config: DatasetConfig, where: str) -> Any:
    """The name that an index on the Hub stands for, or a list of names for a list of indices."""
    if isinstance(label, list):
        return [_named(item, names, config, where) for item in label]
    if not isinstance(label, int) or not 0 <= label < len(names):
        raise DataError(f"{config.name}: {where}, has the label {label!r}, which names no class")
    return names[label]


# Labels -------------------------------------------------------------------------------------------------------


class _Collected:
    """The labels of a split as they come, in little memory. What they mean shows only when all of train is read."""

    def __init__(self, config: DatasetConfig, split: str) -> None:
        self.lists = False  # whether each label is a list of classes
        self.fractions = False  # whether all are numbers and one is not whole
        self.split = split
        self._config = config
        self._words = False  # whether one is no number
        self._classes: dict[str, int] = {}  # what occurs, in order of occurrence
        self._codes = array("i")  # places in _classes; those of all lists one after the other
        self._ends = array("q")  # where each list ends in _codes
        self._numbers = array("d")
        self._known: dict[Any, tuple[int, float]] = {}  # label -> code and number
        self._no_class: tuple[str, Any] | None = None  # where the first label stands that can be no class
        self._no_number: tuple[str, Any] | None = None
        self._overflow = False

    def add(self, value: Any, where: str) -> None:
        """Take in the label of the next example. Raises DataError if only some labels are lists."""
        listed = isinstance(value, list)
        if not self._numbers and not self._ends:
            self.lists = listed
        if listed != self.lists:
            remedy = "write [] where there is no class" if self.lists else "write lists for all examples or for none"
            kind = "is a list" if listed else "is no list"
            raise DataError(
                f"{self._config.name}: the label of {where}, {value!r}, {kind}, unlike those before: {remedy}"
            )
        if listed:
            self._codes.extend([self._look_up(item, where)[0] for item in value])
            self._ends.append(len(self._codes))
        else:
            code, number = self._look_up(value, where)
            self._codes.append(code)
            self._numbers.append(number)

    def classes(self) -> list[str]:
        """The classes that occur, in order of occurrence. Raises DataError for labels that can be no class."""
        name = self._config.name
        if self._no_class is not None:
            where, value = self._no_class
            number = isinstance(value, float) and np.isfinite(value)
            remedy = (
                'set metric = "spearman" in a suite if numbers are to be predicted'
                if number
                else "give it one or remove it"
            )
            raise DataError(f"{name}: {where}, has no usable label ({value!r}): {remedy}")
        if self._overflow:
            raise DataError(
                f"{name}: {self.split} has more than {_MOST_CLASSES} classes: name the column of the labels with --label, "
                'or set metric = "spearman" if they are numbers to be predicted'
            )
        if sum(map(len, self._classes)) > _LABEL_CHARACTERS:
            raise DataError(f"{name}: the classes' names have more than {_LABEL_CHARACTERS} characters: shorten them")
        return list(self._classes)

    def numbers(self) -> Labels:
        """The labels as numbers, float64 [n]. Raises DataError for what is none, or infinite."""
        if self._no_number is not None:
            where, value = self._no_number
            raise DataError(f"{self._config.name}: the label of {where}, is {value!r}, not a number")
        return np.array(self._numbers)

    def indices(self, labels: Sequence[str]) -> Labels:
        """The labels as places in `labels`, int64 [n], or for lists uint8 [n, len(labels)].

        Raises DataError for a class that is not among them.
        """
        places = {label: place for place, label in enumerate(labels)}
        mapped = np.array([places.get(label, -1) for label in self.classes()], np.int64)[
            np.array(self._codes, np.int32)
        ]
        ends = np.array(self._ends, np.int64)
        if (unknown := np.flatnonzero(mapped < 0)).size:
            first = int(unknown[0])
            number = 1 + (int(np.searchsorted(ends, first, side="right")) if self.lists else first)
            raise DataError(
                f"{self._config.name}: label {list(self._classes)[self._codes[first]]!r} in {self.split}, example {number}, "
                f"never occurs in train ({_some(labels)}): add training examples of it or remove it"
            )
        if not self.lists:
            return mapped
        rows = np.zeros((len(ends), len(labels)), np.uint8)
        rows[np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0)), mapped] = 1
        return rows

    def _look_up(self, value: Any, where: str) -> tuple[int, float]:
        """A label's place in the classes, -1 if it has none, and its number, NaN if it has none."""
        if isinstance(value, int) and not -_HASHED < value < _HASHED:
            value = str(value)  # larger numbers can be chosen to have one hash, and a table of them takes for ever
        if isinstance(value, str | int | float) and (known := self._known.get(value)) is not None:
            return known
        number = self._number(value, where)
        label = _class_of(value)
        if label is None:
            self._no_class = self._no_class or (where, value)
            return -1, number
        if len(label) > _LONGEST_LABEL:
            raise DataError(
                f"{self._config.name}: the label of {where}, has {len(label)} characters, which is no class"
            )
        try:
            label.encode()
        except UnicodeEncodeError:
            raise _half_a_pair(self._config, where) from None
        if label not in self._classes and len(self._classes) == _MOST_CLASSES:
            self._overflow = True
            return -1, number
        known = self._known[value] = self._classes.setdefault(label, len(self._classes)), number
        return known

    def _number(self, value: Any, where: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
            self._words = True
        if not np.isfinite(number):
            self._no_number = self._no_number or (where, value)
        elif number != int(number):
            self.fractions = True
        self.fractions = self.fractions and not self._words
        return number


def _class_of(value: Any) -> str | None:
    """The class that a label names: a text or a whole number."""
    if isinstance(value, str):
        return value or None
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if whole else None


def _class_names(train: _Collected, names: list[str] | None, config: DatasetConfig) -> tuple[str, ...]:
    """The classes that train has, numbers in numeric order, or as the source names them."""
    found = train.classes()
    if len(found) < 2:
        only = f"one class only ({found[0]!r})" if found else "no class in any list"
        raise DataError(f"{config.name}: train has {only}: give examples of two or more")
    if names is not None:
        present = set(found)
        return tuple(name for name in names if name in present)
    if all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def _finished(found: _Collected, train: _Collected, labels: Sequence[str], config: DatasetConfig) -> Labels:
    if found.lists != train.lists:
        kind = "lists" if found.lists else "no lists"
        raise DataError(
            f"{config.name}: the labels of {found.split} are {kind}, unlike those of train: make them alike"
        )
    return found.indices(labels) if labels else found.numbers()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") if names else "nothing"
