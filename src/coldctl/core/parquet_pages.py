"""What the pages of a parquet file will unpack to, read off their headers before anything is unpacked.

A page of a few bytes may unpack to two gigabytes, and what the file's footer says of sizes is only a claim. The reader obeys
the header in front of each page, so that is what is looked at: a struct of Thrift's compact protocol.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

LARGEST_PAGE = 64 << 20  # bytes of a page once it is unpacked; writers aim at one megabyte
MOST_VALUES = 1 << 26  # in one page
LARGEST_LISTS = 1 << 30  # bytes that one page of a column of lists may stand for
_LONGEST_HEADER = 1 << 16
_DICTIONARY, _DELTA = 2, 7  # a page's kind, and the encoding that repeats the beginning of the value before
_DEEPEST = 8
_VARINTS, _BOOLEANS = (4, 5, 6), (1, 2)


@dataclass(frozen=True)
class _Page:
    """One page: bytes once unpacked and as stored, values, and whether values may be repeated by reference."""

    unpacked: int
    stored: int
    values: int
    dictionary: bool
    repeats: bool


def largest_repeated(file: IO[bytes], metadata: Any, columns: list[int]) -> int:
    """Bytes of the longest value that a row may repeat by reference, at most: the size of the page it stands in.

    `metadata` is pyarrow's, `columns` are places in it. Raises ValueError for a page that is larger than any writer's.
    """
    largest = 0
    for group in range(metadata.num_row_groups):
        for place in columns:
            chunk = metadata.row_group(group).column(place)
            nested = metadata.schema.column(place).max_repetition_level > 0
            dictionary = 0
            for page in _pages(file, chunk):
                if page.unpacked > LARGEST_PAGE or page.values > MOST_VALUES:
                    raise ValueError(f"a page unpacks to {page.unpacked} bytes, {page.values} values")
                dictionary = max(dictionary, page.unpacked if page.dictionary or page.repeats else 0)
                if nested and dictionary * page.values > LARGEST_LISTS:
                    raise ValueError(f"{page.values} values of up to {dictionary} bytes in one page of lists")
            largest = max(largest, dictionary)
    return largest


def _pages(file: IO[bytes], chunk: Any) -> Iterator[_Page]:
    """The pages of one column chunk, as the reader will meet them."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    position, end, seen = start, start + chunk.total_compressed_size, 0
    while position < end and seen < chunk.num_values:
        file.seek(position)
        data = file.read(min(_LONGEST_HEADER, end - position))
        try:
            fields, length = _struct(data, 0, 0)
            page = _page(fields)
        except (IndexError, TypeError, KeyError, struct.error):
            raise ValueError("a page has no readable header") from None
        if page.stored < 0 or page.unpacked < 0:
            raise ValueError("a page has a negative size")
        seen += 0 if page.dictionary else page.values
        position += length + page.stored
        yield page


def _page(fields: dict[int, Any]) -> _Page:
    kind, unpacked, stored = fields[1], fields[2], fields[3]
    first, second = fields.get(5) or fields.get(7) or {}, fields.get(8) or {}  # the headers of both versions
    values = second[1] if second else first.get(1, 0)
    encoding = second.get(4) if second else first.get(2)
    return _Page(unpacked, stored, values, kind == _DICTIONARY, encoding == _DELTA)


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct by number (whole numbers and structs; other values as None), and where it ends."""
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
        return None, at + 1
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind in (9, 10):
        count, of = data[at] >> 4, data[at] & 15
        at += 1
        if count == 15:
            count, at = _varint(data, at)
        for _ in range(min(count, len(data))):
            _, at = _value(of, data, at, depth + 1)
        return None, at
    raise IndexError  # a map, which no page has, or nothing that there is


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
