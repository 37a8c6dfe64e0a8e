"""Labels of examples: class names, several classes per example, or numbers."""

import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.common.errors import DataError
from coldctl.config.settings import DatasetConfig

REGRESSION_METRICS = ("pearson", "spearman")
MULTILABEL_METRICS = ("accuracy", "macro_f1")
_SHOWN = 5  # labels or columns that a message spells out
_MOST_CLASSES = 1 << 16  # more of them mean that the column holds no classes
_LONGEST_LABEL = 1000  # characters
_LABEL_CHARACTERS = 1 << 19  # of all classes, which stand in configs and manifests
_HASHED = 1 << 60  # whole numbers up to here have hashes of their own

Labels = NDArray[Any]


class LabelCollector:
    """The labels of a split in little memory. What they mean shows only when all of train is read."""

    def __init__(self, config: DatasetConfig, split: str) -> None:
        self.lists = False  # whether each label is a list of classes
        self.fractions = False  # whether all are numbers and one is not whole
        self.split = split
        self._config = config
        self._words = False  # whether one is not a number
        self._classes: dict[str, int] = {}  # class -> its code, in order of occurrence
        self._codes = array("i")  # those of all lists one after the other
        self._ends = array("q")  # where each list ends in _codes
        self._numbers = array("d")
        self._cache: dict[Any, tuple[int, float]] = {}  # label -> code and number
        self._no_class: tuple[str, Any] | None = None  # place and value of the first label that cannot be a class
        self._no_number: tuple[str, Any] | None = None
        self._overflow = False

    def add(self, value: Any, where: str) -> None:
        """Add the label of the next example. Raises DataError if only some labels are lists."""
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
            self._codes.extend([self._look_up(label, where)[0] for label in value])
            self._ends.append(len(self._codes))
        else:
            code, number = self._look_up(value, where)
            self._codes.append(code)
            self._numbers.append(number)

    def classes(self) -> list[str]:
        """Return the classes in order of occurrence. Raises DataError for labels that cannot be classes."""
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
        """Return the labels as numbers, float64 [n]. Raises DataError for other labels and for infinite ones."""
        if self._no_number is not None:
            where, value = self._no_number
            raise DataError(f"{self._config.name}: the label of {where}, is {value!r}, not a number")
        return np.array(self._numbers)

    def indices(self, labels: Sequence[str]) -> Labels:
        """Return the labels as indices in `labels`, int64 [n], or for lists uint8 [n, len(labels)].

        Raises DataError for a class that is not in `labels`.
        """
        index_of = {label: index for index, label in enumerate(labels)}
        by_code = np.array([index_of.get(label, -1) for label in self.classes()], np.int64)
        mapped = by_code[np.array(self._codes, np.int32)]
        ends = np.array(self._ends, np.int64)
        if (unknown := np.flatnonzero(mapped < 0)).size:
            first = int(unknown[0])
            number = 1 + (int(np.searchsorted(ends, first, side="right")) if self.lists else first)
            raise DataError(
                f"{self._config.name}: label {list(self._classes)[self._codes[first]]!r} in {self.split}, example {number}, "
                f"never occurs in train ({shown(labels)}): add training examples of it or remove it"
            )
        if not self.lists:
            return mapped
        rows = np.zeros((len(ends), len(labels)), np.uint8)
        rows[np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0)), mapped] = 1
        return rows

    def _look_up(self, value: Any, where: str) -> tuple[int, float]:
        """Return a label's code, -1 if it cannot be a class, and its number, NaN if it has none."""
        if isinstance(value, int) and not -_HASHED < value < _HASHED:
            value = str(value)  # larger numbers can be chosen to have one hash, which makes a dict of them quadratic
        if isinstance(value, str | int | float) and (cached := self._cache.get(value)) is not None:
            return cached
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
            raise half_surrogate(self._config, where) from None
        if label not in self._classes and len(self._classes) == _MOST_CLASSES:
            self._overflow = True
            return -1, number
        self._cache[value] = self._classes.setdefault(label, len(self._classes)), number
        return self._cache[value]

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
    """Return the class that a label names if it is a text or a whole number."""
    if isinstance(value, str):
        return value or None
    integral = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if integral else None


def class_names(train: LabelCollector, names: list[str] | None, config: DatasetConfig) -> tuple[str, ...]:
    """Return the classes of train in the order of `names`, else sorted (whole numbers by value).

    Raises DataError for fewer than two.
    """
    classes = train.classes()
    if len(classes) < 2:
        only = f"one class only ({classes[0]!r})" if classes else "no class in any list"
        raise DataError(f"{config.name}: train has {only}: give examples of two or more")
    if names is not None:
        present = set(classes)
        return tuple(name for name in names if name in present)
    numeric = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in classes)
    return tuple(sorted(classes, key=int if numeric else None))


def encode(collected: LabelCollector, train: LabelCollector, labels: Sequence[str], config: DatasetConfig) -> Labels:
    """Return the labels of a split as indices in `labels`, or as numbers if there are none.

    Raises DataError for labels that do not fit, or that are lists where those of train are not.
    """
    if collected.lists != train.lists:
        kind = "lists" if collected.lists else "no lists"
        raise DataError(
            f"{config.name}: the labels of {collected.split} are {kind}, unlike those of train: make them alike"
        )
    return collected.indices(labels) if labels else collected.numbers()


def shown(names: Sequence[str]) -> str:
    """Return the first few names, quoted, and how many more there are."""
    first = ", ".join(repr(name) for name in names[:_SHOWN])
    return first + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") if names else "nothing"


def half_surrogate(config: DatasetConfig, where: str) -> DataError:
    """Return the error for an example that is not valid Unicode."""
    return DataError(f"{config.name}: {where}, has half a surrogate pair, which is no text: mend or remove it")
