"""Parse and validate JSON and TOML from strangers, within limits.

The parsers of the standard library have no limits, so these are checked before or right after them: bytes, values, depth,
digits of a number, dots of a key. Duplicate keys are refused, because two readers could take different ones.
"""

import json
import re
import tomllib
from typing import Any

import msgspec

from coldctl.common.text import printable

JSON_LIMIT = 16 << 20  # bytes
TOML_LIMIT = 256 << 10  # bytes; the parser is slow
MOST_VALUES = 1_000_000
_MOST_IN_A_ROW = 500_000  # most of them commas in texts
DEEPEST = 32  # lists and objects inside each other
LONGEST_NUMBER = 100  # characters of a whole number: more than any float holds
_LONGEST_PROBLEM = 200  # characters; it may quote a value of the document
# A key of so many names nests too deeply; the parser's time grows with the square of their number.
_DOTTED = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')\s*+\.\s*+){32}""")


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


def find_mismatch(document: Any, kind: Any) -> str | None:
    """Return in one line where a parsed document departs from the type that declares it; None if it conforms.

    Keys that the type does not name are ignored.

    >>> find_mismatch({"a": [1, "x"]}, dict[str, list[int]])
    'Expected `int`, got `str` - at `$[...][1]`'
    """
    try:
        msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        problem = printable(error)
        return problem if len(problem) <= _LONGEST_PROBLEM else f"{problem[:80]}…{problem[-80:]}"
    return None


def _check_size(data: bytes, largest: int) -> None:
    if len(data) > largest:
        raise ValueError(f"{len(data)} bytes, more than {largest}")


def _check_depth(document: Any) -> list[Any]:
    """Return the values that are neither list nor object. Raises ValueError for a document that is nested too deeply."""
    level, leaves = [document], []
    for _ in range(DEEPEST + 1):
        nested = [value for value in level if type(value) in (dict, list)]
        leaves += [value for value in level if type(value) not in (dict, list)]
        level = [inner for value in nested for inner in (value.values() if type(value) is dict else value)]
        if not level:
            return leaves
    raise ValueError(f"nested more than {DEEPEST} deep")
