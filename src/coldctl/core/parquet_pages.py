"""What the pages of a parquet file will unpack to, read off their headers before anything is unpacked.

A page of a few bytes may unpack to two gigabytes, and what the file's footer says of sizes is only a claim. The reader obeys
the header in front of each page, so that is what is looked at: a struct of Thrift's compact protocol.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import IO, Any

LARGEST_PAGE = 64 << 20  # bytes of a page once it is unpacked; writers aim at one megabyte
MOST_VALUES = 1 << 26  # in one page
LARGEST_LISTS = 1 << 30  # bytes that one page of a column of lists may stand for
LARGEST_FOOTER = 16 << 20  # bytes
_LONGEST_HEADER = 1 << 16
_DICTIONARY, _DELTA = 2, 7  # a page's kind, and the encoding that repeats the beginning of the value before
_DEEPEST = 16
_VARINTS, _BOOLEANS = (4, 5, 6), (1, 2)


@dataclass(frozen=True)
class _Page:
    """One page: bytes once unpacked and as stored, values, and whether values may be repeated by reference."""

    unpacked: int
    stored: int
    values: int
    dictionary: bool
    repeats: bool


@dataclass(frozen=True)
class _Chunk:
    """Where the pages of one column of one group of rows lie, by the footer."""

    name: str
    nested: bool
    values: int
    begin: int
    end: int


def largest_repeated(file: IO[bytes], columns: Collection[str]) -> int:
    """Bytes of the longest value that a row of these columns may repeat by reference: at most the page's it stands in.

    Raises ValueError for a page that is larger than any writer's, or for what is no parquet file.
    """
    largest = 0
    try:
        for chunk in _chunks(file):
            if chunk.name not in columns:
                continue
            dictionary = 0
            for page in _pages(file, chunk):
                if page.unpacked > LARGEST_PAGE or page.values > MOST_VALUES:
                    raise ValueError(f"a page unpacks to {page.unpacked} bytes, {page.values} values")
                dictionary = max(dictionary, page.unpacked if page.dictionary or page.repeats else 0)
                if chunk.nested and dictionary * page.values > LARGEST_LISTS:
                    raise ValueError(f"{page.values} values of up to {dictionary} bytes in one page of lists")
            largest = max(largest, dictionary)
    except (IndexError, KeyError, TypeError, AttributeError):
        raise ValueError("its footer or a page's header is damaged") from None
    return largest


def _chunks(file: IO[bytes]) -> Iterator[_Chunk]:
    """What the footer says of each column chunk. pyarrow's own view of it ends the process for some damaged ones."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length > min(size - 8, LARGEST_FOOTER):
        raise ValueError("it has no footer that is read here")
    file.seek(size - 8 - length)
    footer, _ = _struct(file.read(length), 0, 0)
    for group in footer[4]:
        for column in group[1]:
            found = column[3]
            path, start, dictionary = found[3], found[9], found.get(11, 0)
            begin = dictionary if 0 < dictionary < start else start
            stored = found[7]
            if not all(isinstance(number, int) and number >= 0 for number in (begin, stored, found[5])):
                raise TypeError
            if begin + stored > size:
                raise ValueError(f"a column of {stored} bytes, more than the file has")
            yield _Chunk(path[0].decode(errors="replace"), len(path) > 1, found[5], begin, begin + stored)


def _pages(file: IO[bytes], chunk: _Chunk) -> Iterator[_Page]:
    """The pages of one column chunk, as the reader will meet them."""
    position, seen, size = chunk.begin, 0, file.seek(0, 2)
    while position < chunk.end and seen < chunk.values:
        file.seek(position)
        data = file.read(min(_LONGEST_HEADER, chunk.end - position))
        fields, length = _struct(data, 0, 0)
        page = _page(fields)
        if page.stored < 0 or page.unpacked < 0 or page.values < 0:
            raise TypeError
        if page.stored > size - position - length:  # the reader would make room for all of it before it looks
            raise ValueError(f"a page of {page.stored} bytes, more than the file has")
        seen += 0 if page.dictionary else page.values
        position += length + page.stored
        yield page


def _page(fields: dict[int, Any]) -> _Page:
    kind, unpacked, stored = fields[1], fields[2], fields[3]
    first, second = fields.get(5) or fields.get(7) or {}, fields.get(8) or {}  # the headers of both versions
    values = second[1] if second else first.get(1, 0)
    encoding = second.get(4) if second else first.get(2)
    if not all(isinstance(number, int) for number in (kind, unpacked, stored, values)):
        raise TypeError
    return _Page(unpacked, stored, values, kind == _DICTIONARY, encoding == _DELTA)


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct by number (whole numbers, bytes, structs, lists; others as None), and where it ends."""
    if depth > _DEEPEST:
        raise IndexError
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = data[at]
        at += 1
        if head == 0:
            return fields, at
        kind, step = head & 15, head >> 4
        if step:
            number += step
        else:
            number, at = _varint(data, at)
            number = (number >> 1) ^ -(number & 1)
        fields[number], at = (None, at) if kind in _BOOLEANS else _value(kind, data, at, depth)


def _value(kind: int, data: bytes, at: int, depth: int) -> tuple[Any, int]:
    if kind in _VARINTS:
        raw, at = _varint(data, at)
        return (raw >> 1) ^ -(raw & 1), at
    if kind == 12:
        return _struct(data, at, depth + 1)
    if kind in (1, 2, 3):  # in a list a boolean takes a byte
        return None, _within(data, at + 1)
    if kind == 7:
        return None, _within(data, at + 8)
    if kind == 8:
        length, at = _varint(data, at)
        end = _within(data, at + length)
        return data[at:end], end
    if kind in (9, 10):
        count, of = data[at] >> 4, data[at] & 15
        at += 1
        if count == 15:
            count, at = _varint(data, at)
        items = []
        for _ in range(count):  # each takes a byte at least
            item, at = _value(of, data, at, depth + 1)
            items.append(item)
        return items, at
    raise IndexError  # a map, which no page has, or nothing that there is


def _within(data: bytes, at: int) -> int:
    if at > len(data):
        raise IndexError
    return at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            return value, at
        if shift > 63:
            raise IndexError
