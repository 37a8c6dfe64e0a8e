"""Writing safetensors files front to back, one piece at a time, sharded above a size.

The header is known before the first byte of data, so memory does not grow with the model, and the file's
sha256 is taken as it is written.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldctl.artifacts import layout
from coldctl.checkpoints.header import DTYPES
from coldctl.storage.location import Location

_ALIGNMENT = 8
_PART = 16 << 20  # bytes that are sent to a store at a time
_WRITE_BACK = 32 << 20  # bytes after which the disk may begin, so that the sync at the end has little left


@dataclass(frozen=True)
class Layout:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        count = DTYPES[self.dtype].itemsize
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Shard:
    """One weight file: its name, and its tensors in the order of their data."""

    name: str
    layouts: tuple[Layout, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data, behind the header."""
        return sum(item.nbytes for item in self.layouts)

    def places(self) -> Iterator[tuple[Layout, int]]:
        """Each tensor and the offset of its first byte in the file."""
        offset = len(header(self.layouts))
        for item in self.layouts:
            yield item, offset
            offset += item.nbytes


def file_order(layouts: Sequence[Layout]) -> list[Layout]:
    """The order in which tensors are written: wide dtypes first, so that all stay aligned, then by name."""
    return sorted(layouts, key=lambda item: (-DTYPES[item.dtype].itemsize, item.name))


class WeightsWriter:
    """Writes tensors in `file_order` into `folder`; `digests` holds the sha256 of each file once closed."""

    def __init__(
        self, folder: Location, layouts: Sequence[Layout], max_shard_size: int, *, single: str | None = None
    ) -> None:
        """`single` names a file that takes all tensors instead of the model's weights."""
        self._folder = folder
        self._shards = shards(file_order(layouts), max_shard_size, single=single)
        self._pending = list(self._shards)
        self._file: Any = None
        self._hasher = hashlib.sha256()
        self._left = 0
        self._unsynced = 0
        self.digests: dict[str, str] = {}

    def write(self, data: memoryview) -> None:
        """Append bytes of the tensors, in order; a piece that spans two shards is refused at the end."""
        if not len(data):
            return
        if self._left == 0:
            self._next_shard()
        _write_all(self._file, data)
        self._hasher.update(data)
        self._left -= len(data)
        self._unsynced += len(data)
        if self._unsynced >= _WRITE_BACK:
            self._write_back()

    def close(self) -> None:
        """Finish the last file and write the index if there is more than one."""
        self._finish_shard()
        while self._pending:  # shards of empty tensors hold only a header
            self._next_shard()
            self._finish_shard()
        write_index(self._folder, self._shards)

    def abandon(self) -> None:
        """Close the file without finishing it."""
        if self._file is None:
            return
        if not isinstance(self._folder, Path):  # else a store would take what was written so far for all of it
            self._file.discard()
            with suppress(AttributeError):
                self._file.closed = True
        self._file.close()
        self._file = None

    def _next_shard(self) -> None:
        self._finish_shard()
        shard = self._pending.pop(0)
        self._name, head = shard.name, header(shard.layouts)
        path = self._folder / self._name
        self._file = path.open("wb", buffering=0) if isinstance(path, Path) else path.open("wb", block_size=_PART)
        _write_all(self._file, memoryview(head))
        self._hasher = hashlib.sha256(head)
        self._left = shard.nbytes

    def _write_back(self) -> None:
        """Let the disk begin with what was written; nothing waits for it, and nothing is dropped unwritten."""
        if hasattr(os, "posix_fadvise") and isinstance(self._folder, Path):
            end = self._file.tell()
            os.posix_fadvise(self._file.fileno(), end - self._unsynced, self._unsynced, os.POSIX_FADV_DONTNEED)
        self._unsynced = 0

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        if self._left:
            raise ValueError(f"{self._left} bytes of {self._name} were never written")
        if isinstance(self._folder, Path):
            os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.digests[self._name] = "sha256:" + self._hasher.hexdigest()


def _write_all(file: Any, data: memoryview) -> None:
    """Write all of `data`, however many calls the kernel needs: a disk that fills up takes a part first."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def header(layouts: Sequence[Layout]) -> bytes:
    """A safetensors header for tensors that follow each other in this order, with the `format` older readers demand."""
    entries: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for item in layouts:
        entries[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [begin, begin + item.nbytes],
        }
        begin += item.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def shards(layouts: Sequence[Layout], limit: int, *, single: str | None = None) -> list[Shard]:
    """Cut the sequence into files of at most `limit` bytes; a larger tensor has a file of its own.

    `single` names a file that takes all of them.
    """
    parts: list[list[Layout]] = [[]]
    size = 0
    for item in layouts:
        if parts[-1] and size + item.nbytes > limit and not single:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += item.nbytes
    count = len(parts)
    if count == 1:
        return [Shard(single or layout.WEIGHTS, tuple(parts[0]))]
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(part)) for number, part in enumerate(parts, 1)
    ]


def write_index(folder: Location, files: Sequence[Shard]) -> None:
    """Say which tensor stands in which file, if there is more than one."""
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in files)},
            "weight_map": {item.name: shard.name for shard in files for item in shard.layouts},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / layout.WEIGHTS_INDEX).write_text(text, encoding="utf-8")
