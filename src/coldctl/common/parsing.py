"""JSON and TOML that strangers wrote, parsed within limits: no document costs more memory or time than it is worth.

What a parser of the standard library does with hostile text is bounded before or right after it: bytes, values, depth,
digits of a number, dots of a key. Names that stand twice are refused, because two readers could take different ones.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from types import NoneType
from typing import Any

JSON_LIMIT = 16 << 20  # bytes
TOML_LIMIT = 256 << 10  # bytes; the parser is slow
MOST_VALUES = 1_000_000
_MOST_IN_A_ROW = 500_000  # most of them commas in texts
DEEPEST = 32  # lists and objects inside each other
LONGEST_NUMBER = 100  # characters of a whole number: more than any float holds
# So many names joined by dots nest so deep; the parser takes the square of their number to read them.
_DOTTED = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')\s*+\.\s*+){32}""")

Shape = Any  # a type, a tuple of types, a predicate, [shape of each], {"known": shape}, {...: shape of each}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"a key stands twice: {twice[:40]!r}")
    return document


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_whole)


def json_value(data: bytes, largest: int = JSON_LIMIT, values: int = MOST_VALUES) -> Any:
    """Parse UTF-8 JSON. Raises ValueError that says in words what is wrong with it.

    >>> json_value(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: a key stands twice: 'a'
    """
    _check_size(data, largest)
    most = data.count(b",") + data.count(b"[") + data.count(b"{")  # values there can be at most, without parsing
    if most > values:
        raise ValueError(f"more than {values} values")
    try:
        document = _DECODER.decode(data.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    _check_depth(document)
    if b"\\ud" in data or b"\\uD" in data:  # half a surrogate pair could be read, and not written down again
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair, which is no text") from None
    return document


def json_row(text: str) -> Any:
    """Parse one line of JSON that is no longer than its reader allows. Raises ValueError."""
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") > _MOST_IN_A_ROW:
        raise ValueError(f"more than {_MOST_IN_A_ROW} values")
    try:
        row = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    if opened > DEEPEST:
        _check_depth(row)
    return row


def toml_table(data: bytes) -> dict[str, Any]:
    """Parse UTF-8 TOML. Raises ValueError that says in words what is wrong with it."""
    _check_size(data, TOML_LIMIT)
    text = data.decode("utf-8")
    if _DOTTED.search(text):
        raise ValueError(f"nested more than {DEEPEST} deep")
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    for value in _check_depth(document):
        if not isinstance(value, str | int | float | bool):
            raise ValueError(f"{type(value).__name__} {value} is no setting: write it as text")
        if type(value) is int and not -(1 << 63) <= value < 1 << 63:
            raise ValueError("a whole number of more than 64 bits")
    return document


def misfit(value: Any, shape: Shape, place: str = "") -> str | None:
    """Where a parsed document departs from a shape; None if it does not.

    Keys that a shape does not name are ignored, keys named with a `!` behind them must be there.

    >>> misfit({"a": [1, "x"]}, {"a!": [int]}), misfit({}, {"a!": [int]}), misfit({"b": 0}, {"a": int})
    ('a[1]', 'a', None)
    """
    here = place or "the whole"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return here
        return _first(misfit(item, shape[0], f"{place}[{index}]") for index, item in enumerate(value))
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return here
        if ... in shape:
            return _first(misfit(item, shape[...], f"{place}[{key[:40]!r}]") for key, item in value.items())
        return _first(_misfit_at(value, key, part, place) for key, part in shape.items())
    if isinstance(shape, tuple | type):
        types = shape if isinstance(shape, tuple) else (shape,)
        fits = isinstance(value, types) and (type(value) is not bool or bool in types)  # to Python a bool is an int
    else:
        fits = shape(value)
    return None if fits else here


NUMBER: Shape = (int, float)
MAYBE_NUMBER: Shape = (int, float, NoneType)
MAYBE_TEXT: Shape = (str, NoneType)
SCALAR: Shape = (str, int, float, bool, NoneType)


def _misfit_at(value: Mapping[str, Any], key: str, shape: Shape, place: str) -> str | None:
    name = key.removesuffix("!")
    where = f"{place}.{name}" if place else name
    if name not in value:
        return where if key.endswith("!") else None
    return misfit(value[name], shape, where)


def _first(found: Any) -> str | None:
    return next((place for place in found if place is not None), None)


def _check_size(data: bytes, largest: int) -> None:
    if len(data) > largest:
        raise ValueError(f"{len(data)} bytes, more than {largest}")


def _check_depth(document: Any) -> list[Any]:
    """Refuse what is nested too deeply, level by level; returns what is neither list nor object. Raises ValueError."""
    level, leaves = [document], []
    for _ in range(DEEPEST + 1):
        inner = [item for item in level if type(item) in (dict, list)]
        leaves += [item for item in level if type(item) not in (dict, list)]
        level = [value for item in inner for value in (item.values() if type(item) is dict else item)]
        if not level:
            return leaves
    raise ValueError(f"nested more than {DEEPEST} deep")
