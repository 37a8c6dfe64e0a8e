"""Rows of unequal length, such as texts or token ids, in memory or in a mapped file.

A million examples then cost address space, not memory. The file has no name once it is open, so nothing is left
behind if the process dies.
"""

import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

_CHUNK = 1 << 22  # elements
_IN_MEMORY = 1 << 20  # elements; more of them go into a file
_BATCH = 4096  # texts


class Ragged:
    """Rows of one dtype. `values` holds them one after the other, row i is `values[offsets[i]:offsets[i + 1]]`."""

    def __init__(self, values: NDArray[Any], offsets: NDArray[np.int64], mapping: mmap.mmap | None = None) -> None:
        """`mapping` holds `values` if they are in a file."""
        self.values, self.offsets, self._mapping = values, offsets, mapping

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of elements per row, int64 [rows]."""
        return np.diff(self.offsets)

    def chunks(self) -> Iterator[NDArray[Any]]:
        """Yield all values in chunks of bounded size, so that a pass over a mapped file stays small in memory."""
        for start in range(0, len(self.values), _CHUNK):
            yield self.values[start : start + _CHUNK]
            self.release()

    def release(self) -> None:
        """Free the memory of values read from the file; the next access reads them again."""
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)


class Spool:
    """A writer of rows, which become a `Ragged` in memory or in a mapped file."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._chunks: list[NDArray[Any]] = []
        self._held = 0
        self._lengths: list[NDArray[np.int64]] = []
        self._file: IO[bytes] | None = None

    def extend(self, rows: Iterable[Any]) -> None:
        """Append one or more rows: arrays or lists of numbers."""
        arrays = [np.asarray(row, self._dtype) for row in rows]
        self._append(np.concatenate(arrays), [len(array) for array in arrays])

    def extend_bytes(self, rows: Sequence[bytes]) -> None:
        """Append rows of bytes to a spool of uint8."""
        self._append(np.frombuffer(b"".join(rows), self._dtype), [len(row) for row in rows])

    def _append(self, values: NDArray[Any], lengths: Sequence[int]) -> None:
        self._lengths.append(np.asarray(lengths, np.int64))
        self._chunks.append(values)
        self._held += values.size
        if self._held > _IN_MEMORY:
            self._spill()

    def finish(self) -> Ragged:
        """Return all rows in the order they were appended."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int64)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        if self._file is None:
            values = np.concatenate(self._chunks) if self._chunks else np.zeros(0, self._dtype)
            return Ragged(values, offsets)
        self._spill()
        self._file.flush()
        mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()  # the mapping stays valid
        return Ragged(np.frombuffer(mapping, self._dtype), offsets, mapping)

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  finish closes it
        for values in self._chunks:
            self._file.write(values.data)
        self._chunks.clear()
        self._held = 0


class Texts(Sequence[str]):
    """Texts in a `Ragged` of UTF-8 bytes, optionally only those at `rows`, decoded on access."""

    def __init__(self, data: Ragged, rows: NDArray[np.int64] | None = None) -> None:
        self._data = data
        self._rows = np.arange(len(data)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return (text.decode() for text in self.encoded())

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Texts": ...
    def __getitem__(self, index: int | slice) -> "str | Texts":
        if isinstance(index, slice):
            return Texts(self._data, self._rows[index])
        return self._data[int(self._rows[index])].tobytes().decode()

    def encoded(self) -> Iterator[bytes]:
        """Yield the texts in UTF-8."""
        values = self._data.values.data
        for start in range(0, len(self), _BATCH):
            rows = self._rows[start : start + _BATCH]
            bounds = zip(self._data.offsets[rows].tolist(), self._data.offsets[rows + 1].tolist(), strict=True)
            yield from (bytes(values[first:last]) for first, last in bounds)
            self._data.release()

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "Texts":
        """Return the texts at `indices`, in that order, without copying any."""
        return Texts(self._data, self._rows[np.asarray(indices, np.int64)])


class TextSpool:
    """A writer of texts, which become `Texts`."""

    def __init__(self) -> None:
        self._spool = Spool(np.uint8)
        self._batch: list[bytes] = []

    def append(self, text: str) -> None:
        """Append a text. Raises UnicodeEncodeError if it has half a surrogate pair."""
        self._batch.append(text.encode())
        if len(self._batch) >= _BATCH:
            self._flush()

    def finish(self) -> Texts:
        """Return all texts in the order they were appended."""
        self._flush()
        return Texts(self._spool.finish())

    def _flush(self) -> None:
        if self._batch:
            self._spool.extend_bytes(self._batch)
            self._batch.clear()
