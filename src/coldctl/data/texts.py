"""Rows of unequal length, such as texts or token ids, in one file that is mapped and not held in memory.

A million examples then cost address space, not memory. The file has no name once it is open, so nothing is left
behind whatever happens to the process.
"""

import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

_PIECE = 1 << 22  # elements looked at in one go
_IN_MEMORY = 1 << 20  # elements up to which a file would only cost time
_BATCH = 4096  # texts that are moved at a time


class Ragged:
    """Rows of one dtype. `values` holds them one after the other, row i is `values[offsets[i]:offsets[i + 1]]`."""

    def __init__(self, values: NDArray[Any], offsets: NDArray[np.int64], mapping: mmap.mmap | None = None) -> None:
        """`mapping` is what `values` lie in if they lie in a file."""
        self.values, self.offsets, self._mapping = values, offsets, mapping

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Elements per row, int64 [rows]."""
        return np.diff(self.offsets)

    def pieces(self) -> Iterator[NDArray[Any]]:
        """All values in pieces of a bounded size, so that a pass over a mapped file stays small in memory."""
        for start in range(0, len(self.values), _PIECE):
            yield self.values[start : start + _PIECE]
            self.release()

    def release(self) -> None:
        """Give back the memory of what was read from the file; it comes back when it is asked for again."""
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)


class Spool:
    """Takes rows in and gives them back as `Ragged`: small ones from memory, large ones from a mapped file."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._pieces: list[NDArray[Any]] = []
        self._held = 0
        self._lengths: list[NDArray[np.int64]] = []
        self._file: IO[bytes] | None = None

    def extend(self, rows: Iterable[Any]) -> None:
        """Append rows, at least one: arrays or lists of numbers."""
        arrays = [np.asarray(row, self._dtype) for row in rows]
        self._append(np.concatenate(arrays), [len(array) for array in arrays])

    def extend_bytes(self, rows: Sequence[bytes]) -> None:
        """Append rows of bytes, where the dtype is uint8."""
        self._append(np.frombuffer(b"".join(rows), self._dtype), [len(row) for row in rows])

    def _append(self, piece: NDArray[Any], lengths: Sequence[int]) -> None:
        self._lengths.append(np.asarray(lengths, np.int64))
        self._pieces.append(piece)
        self._held += piece.size
        if self._held > _IN_MEMORY:
            self._spill()

    def finish(self) -> Ragged:
        """All rows in the order they came."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int64)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        if self._file is None:
            values = np.concatenate(self._pieces) if self._pieces else np.zeros(0, self._dtype)
            return Ragged(values, offsets)
        self._spill()
        self._file.flush()
        mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()  # the mapping stays
        return Ragged(np.frombuffer(mapping, self._dtype), offsets, mapping)

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  it outlives this method
        for piece in self._pieces:
            self._file.write(piece.data)
        self._pieces.clear()
        self._held = 0


class Texts(Sequence[str]):
    """Texts in a `Ragged` of UTF-8 bytes, optionally only those at `rows`, decoded one by one as they are asked for."""

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
        """The texts in UTF-8, one after the other."""
        values = self._data.values.data
        for start in range(0, len(self), _BATCH):
            rows = self._rows[start : start + _BATCH]
            bounds = zip(self._data.offsets[rows].tolist(), self._data.offsets[rows + 1].tolist(), strict=True)
            yield from (bytes(values[first:last]) for first, last in bounds)
            self._data.release()

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "Texts":
        """The texts at `indices`, in that order, without copying any."""
        return Texts(self._data, self._rows[np.asarray(indices, np.int64)])


class TextSpool:
    """Takes texts in one by one and gives them back as `Texts`."""

    def __init__(self) -> None:
        self._spool = Spool(np.uint8)
        self._batch: list[bytes] = []

    def append(self, text: str) -> None:
        """Add a text. Raises UnicodeEncodeError if half a surrogate pair is in it."""
        self._batch.append(text.encode())
        if len(self._batch) >= _BATCH:
            self._flush()

    def finish(self) -> Texts:
        """All texts in the order they came."""
        self._flush()
        return Texts(self._spool.finish())

    def _flush(self) -> None:
        if self._batch:
            self._spool.extend_bytes(self._batch)
            self._batch.clear()
