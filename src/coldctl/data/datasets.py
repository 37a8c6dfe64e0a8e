"""Datasets: three labelled splits and a fingerprint.

The test split is only ever scored. Without one, validation is the test split; a validation split that is then
missing is cut from train, stratified and seeded, never from test. Rows are read one at a time, and only the texts and
the label of each are kept, so that a million of them need little memory.
"""

import hashlib
import json
import re
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
from coldctl.data.labels import (
    MULTILABEL_METRICS,
    REGRESSION_METRICS,
    LabelCollector,
    Labels,
    class_names,
    encode,
    half_surrogate,
    shown,
)
from coldctl.data.sampling import contributor_share, held_out, per_class, stratified
from coldctl.data.sources import FORMATS, ROW_LIMIT, FileSource, HubSource, Row, is_hub
from coldctl.data.texts import Texts, TextSpool

_ALIASES = {"validation": ("dev", "valid", "val")}
_BATCH = 4096  # labels that become Python objects at a time


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
        """Return the examples at `indices`, in that order. Texts are not copied."""
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
        """Return True if labels are numbers instead of classes."""
        return not self.labels

    @property
    def multilabel(self) -> bool:
        """Return True if an example may have several classes, or none."""
        return self.train.labels.ndim == 2

    def tested_in(self, other: "Dataset") -> int:
        """Count the test examples of this dataset, as limited, that also stand in the training split of `other`."""
        return int(_is_in(_digests(self.test), other.train_digests).sum())

    def overlaps(self) -> list[str]:
        """Return one sentence for each kind of example that stands in more than one place."""
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


def load_dataset(config: DatasetConfig, limits: Limits, seed: int) -> Dataset:
    """Load a dataset and cut it to `limits`, by `seed` where examples are drawn.

    Raises DataError for whatever is wrong with the files, their labels, the limits or the metric.
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
    _check_learnable(train, labels, config)
    dataset = Dataset(
        name=config.name,
        labels=labels,
        train=train,
        validation=validation,
        test=test,
        fingerprint=_fingerprint(labels, train, validation, test),
        leaked=leaked,
        repeated=repeated,
        duplicated=duplicated,
        unlabelled=unlabelled,
        train_digests=train_digests,
    )
    metric_of(config, dataset)  # a metric that cannot be computed is refused before training
    return dataset


def metric_of(config: DatasetConfig, dataset: Dataset) -> str:
    """Return the metric that scores a dataset: the configured one, but spearman where a class metric meets numbers.

    Raises DataError for a metric that cannot score multi-label.
    """
    if dataset.regression:
        return config.metric if config.metric in REGRESSION_METRICS else "spearman"
    if dataset.multilabel and config.metric not in MULTILABEL_METRICS:
        raise DataError(
            f"{config.name}: its labels are lists of classes, which {config.metric} cannot score: set metric to "
            "accuracy (an example counts if all its classes are right) or macro_f1"
        )
    return config.metric


def config_from_reference(reference: str, columns: DatasetConfig) -> DatasetConfig:
    """Return the dataset that DATA on a command line means; its default name is the file's or folder's own."""
    path = reference if is_hub(reference) else str(Path(reference).expanduser())
    file = Path(path.removeprefix("hf:"))
    last = file.stem if file.suffix in FORMATS else file.resolve().name
    name = columns.name or re.sub(r"[^\w.-]+", "-", last).strip("-.") or "dataset"
    return DatasetConfig(**{**vars(columns), "name": name, "path": path})


# Cutting ------------------------------------------------------------------------------------------------------


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
    """Return train without a stratified tenth, and that tenth."""
    chosen = held_out(train.labels, classes, seed)
    if len(chosen) == len(train):
        raise DataError(
            f"{config.name}: {len(train)} training examples of {classes} classes are too few to hold some out: give more, "
            "other splits, or the right column with --label"
        )
    return train.take(np.delete(np.arange(len(train)), chosen)), train.take(chosen)


def _share(split: Split, kind: str, config: DatasetConfig, seed: int) -> Split:
    """Return the share of a split that belongs to contributor `config.part`."""
    if len(split) < config.contributors:
        raise DataError(
            f"{config.name}: {len(split)} {kind} examples cannot be shared among {config.contributors} contributors: "
            "give fewer contributors or more examples"
        )
    seed = derived_seed(seed, config.name, kind, "contributors")
    return split.take(contributor_share(split.labels, config.part, config.contributors, seed))


def _check_learnable(train: Split, labels: Sequence[str], config: DatasetConfig) -> None:
    """Raise DataError if all training examples have the same label."""
    if not labels and np.ptp(train.labels) == 0:
        raise DataError(
            f"{config.name}: all {len(train)} training labels are {train.labels[0]}: there is nothing to learn"
        )
    if labels and np.all(train.labels == train.labels[0]):
        only = "one class" if train.labels.ndim == 1 else "the same classes"
        raise DataError(f"{config.name}: the {len(train)} training examples left have {only} only: allow more of them")


# Comparing ----------------------------------------------------------------------------------------------------


def _overlaps(train: Split, validation: Split, test: Split) -> tuple[NDArray[np.uint64], tuple[int, int, int]]:
    """Return the sorted digests of train, and the counts `leaked`, `repeated` and `duplicated` of a `Dataset`."""
    first, second, third = (np.sort(_digests(split)) for split in (train, validation, test))
    leaked = _is_in(third, first) | _is_in(third, second)
    return first, (int(leaked.sum()), int(_is_in(second, first).sum()), int(np.sum(first[1:] == first[:-1])))


def _is_in(values: NDArray[np.uint64], ascending: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each value whether it is in the other array, which is not empty."""
    matches: NDArray[np.bool_] = ascending[np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)] == values
    return matches


def _digests(split: Split) -> NDArray[np.uint64]:
    """Return a digest of each example's texts, uint64 [n]. A million examples collide in one of 10⁷ datasets."""
    pairs = repeat(b"") if split.pairs is None else split.pairs.encoded()
    both = zip(split.texts.encoded(), pairs, strict=False)  # repeat has no end
    digests = (hashlib.blake2b(b"%d:%b%b" % (len(text), text, pair), digest_size=8).digest() for text, pair in both)
    return np.fromiter((int.from_bytes(digest) for digest in digests), np.uint64, len(split))


def _fingerprint(labels: Sequence[str], *splits: Split) -> str:
    """Return the sha256 over the class names and every example of every split, in order."""
    hasher = hashlib.sha256(json.dumps(list(labels)).encode())
    for split in splits:
        hasher.update(b"\x1e")
        pairs = repeat(None) if split.pairs is None else split.pairs
        for row in zip(split.texts, pairs, _plain(split.labels), strict=False):  # repeat has no end
            hasher.update(json.dumps(row).encode() + b"\n")
    return "sha256:" + hasher.hexdigest()


def _plain(labels: Labels) -> Iterator[Any]:
    """Yield labels as JSON has them: an index, a number, or a list of indices."""
    for start in range(0, len(labels), _BATCH):
        batch = labels[start : start + _BATCH]
        if batch.ndim == 1:
            yield from batch.tolist()
            continue
        places, ends = np.nonzero(batch)[1].tolist(), np.cumsum(batch.sum(1, dtype=np.int64)).tolist()
        yield from (places[first:last] for first, last in pairwise([0, *ends]))


# Reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Collected:
    """A split as read: whether its labels are classes or numbers shows only when all of train is read."""

    texts: Texts
    pairs: Texts | None
    labels: LabelCollector
    unlabelled: int


def _read_splits(config: DatasetConfig) -> tuple[dict[str, Split], tuple[str, ...], int]:
    """Return train and, if the source has them, test and validation; the class names; how many rows had no label."""
    source = HubSource(config) if is_hub(config.path) else FileSource(config)
    names = source.class_names()
    collected = {}
    for split, source_splits in _source_splits(config, source).items():
        rows = (row for source_split in source_splits for row in source.rows(source_split))
        collected[split] = _collect(rows, names, config, split)
        if not len(collected[split].texts):
            if collected[split].unlabelled:
                raise DataError(
                    f"{config.name}: no example of the {split} split has a label on the Hub: name another split as {split}"
                )
            raise DataError(f"{config.name}: the {split} split of {source.label} is empty: give it examples")
    train = collected["train"].labels
    regression = not train.lists and (config.metric in REGRESSION_METRICS or (names is None and train.fractions))
    labels = () if regression else class_names(train, names, config)
    splits = {
        split: Split(read.texts, read.pairs, encode(read.labels, train, labels, config))
        for split, read in collected.items()
    }
    return splits, labels, sum(read.unlabelled for read in collected.values())


def _source_splits(config: DatasetConfig, source: FileSource | HubSource) -> dict[str, tuple[str, ...]]:
    """Return the names of the source's splits that make up train, validation and test."""
    configured = {"train": config.train, "validation": config.validation, "test": config.test}
    available = source.splits()
    chosen: dict[str, tuple[str, ...]] = {}
    for split, names in configured.items():
        if names is not None:
            chosen[split] = (names,) if isinstance(names, str) else names
            if absent := [name for name in chosen[split] if name not in available]:
                raise DataError(f"{config.name}: {source.label} has no split {absent[0]!r}: it has {shown(available)}")
        elif usual := [name for name in (split, *_ALIASES.get(split, ())) if name in available]:
            chosen[split] = (usual[0],)
    if "train" not in chosen:
        raise DataError(f"{config.name}: {source.label} has no train split: it has {shown(available)}")
    if "test" not in chosen and "validation" in chosen:
        chosen["test"] = chosen.pop("validation")
    if "validation" in chosen and chosen["validation"] == chosen["test"]:
        del chosen["validation"]
    return chosen


def _collect(rows: Iterable[Row], names: list[str] | None, config: DatasetConfig, split: str) -> _Collected:
    """Take the texts and the label out of each row. The Hub's class label -1 means none: such rows are left out."""
    texts, pairs, labels = TextSpool(), TextSpool(), LabelCollector(config, split)
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
    return _Collected(texts.finish(), None if second is None else pairs.finish(), labels, unlabelled)


def _add_text(spool: TextSpool, row: Row, columns: Columns, config: DatasetConfig, where: str) -> None:
    texts = []
    for column in (columns,) if isinstance(columns, str) else columns:
        value = _value(row, column, config, where)
        if not isinstance(value, str):
            raise DataError(f"{config.name}: column {column!r} in {where}, is {type(value).__name__}, not text")
        texts.append(value)
    if sum(map(len, texts)) > ROW_LIMIT:
        raise DataError(f"{config.name}: the text of {where}, is longer than {ROW_LIMIT} characters: cut it")
    try:
        spool.append(" ".join(texts))
    except UnicodeEncodeError:
        raise half_surrogate(config, where) from None


def _value(row: Row, column: str, config: DatasetConfig, where: str) -> Any:
    if column not in row:
        raise DataError(
            f"{config.name}: no column {column!r} in {where} (it has {shown([str(key) for key in row])}): "
            "name the columns with --text, --text-pair and --label"
        )
    return row[column]


def _named(label: Any, names: Sequence[str], config: DatasetConfig, where: str) -> Any:
    """Return the class name of a Hub index, or a list of names for a list of indices."""
    if isinstance(label, list):
        return [_named(index, names, config, where) for index in label]
    if not isinstance(label, int) or not 0 <= label < len(names):
        raise DataError(f"{config.name}: {where}, has the label {label!r}, which names no class")
    return names[label]
