"""Write safetensors files front to back, in shards above a size.

The header is known before the first byte of data, so memory does not grow with the model. The sha256 of each file is
computed while it is written.
"""

import hashlib
import json
import math
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
_UPLOAD = 16 << 20  # bytes that are sent to a store at a time
_WRITE_BACK = 32 << 20  # bytes after which the disk may begin, so that the sync at the end has little left


@dataclass(frozen=True)
class Layout:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the number of bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """One weight file: its name, and its tensors in the order of their data."""

    name: str
    layouts: tuple[Layout, ...]

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of data, behind the header."""
        return sum(tensor.nbytes for tensor in self.layouts)

    def places(self) -> Iterator[tuple[Layout, int]]:
        """Yield each tensor and the offset of its first byte in the file."""
        offset = len(header(self.layouts))
        for tensor in self.layouts:
            yield tensor, offset
            offset += tensor.nbytes


def file_order(layouts: Sequence[Layout]) -> list[Layout]:
    """Return tensors in the order in which they are written: wide dtypes first, so that all stay aligned, then by name."""
    return sorted(layouts, key=lambda tensor: (-DTYPES[tensor.dtype].itemsize, tensor.name))


class WeightsWriter:
    """A writer of tensors in `file_order`; `digests` holds the sha256 of each file once it is complete."""

    def __init__(
        self, folder: Location, layouts: Sequence[Layout], max_shard_size: int, *, single: str | None = None
    ) -> None:
        """Plan the files in `folder`. `single` names a file that takes all tensors instead of the model's weights."""
        self._folder = folder
        self._shards = shards(file_order(layouts), max_shard_size, single=single)
        self._pending = list(self._shards)
        self._file: Any = None
        self._hasher = hashlib.sha256()
        self._left = 0
        self._unsynced = 0
        self.digests: dict[str, str] = {}

    def write(self, data: memoryview) -> None:
        """Append bytes of the tensors, in order. A chunk must not span two shards: `close` would raise ValueError."""
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
        self._file = path.open("wb", buffering=0) if isinstance(path, Path) else path.open("wb", block_size=_UPLOAD)
        _write_all(self._file, memoryview(head))
        self._hasher = hashlib.sha256(head)
        self._left = shard.nbytes

    def _write_back(self) -> None:
        """Let the kernel begin to write to the disk, without waiting for it, so that fsync has little left."""
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
    """Write all of `data`, in as many calls as the kernel needs: a disk that fills up takes some bytes first."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def header(layouts: Sequence[Layout]) -> bytes:
    """Return the header for tensors that follow each other in this order, with the `format` that older readers demand."""
    entries: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in layouts:
        end = begin + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def shards(layouts: Sequence[Layout], limit: int, *, single: str | None = None) -> list[Shard]:
    """Divide tensors into files of at most `limit` bytes. A larger tensor has a file of its own.

    `single` names a file that takes all of them.
    """
    groups: list[list[Layout]] = [[]]
    size = 0
    for tensor in layouts:
        if groups[-1] and size + tensor.nbytes > limit and not single:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    count = len(groups)
    if count == 1:
        return [Shard(single or layout.WEIGHTS, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(group)) for number, group in enumerate(groups, 1)
    ]


def write_index(folder: Location, files: Sequence[Shard]) -> None:
    """Write the index that names the file of each tensor, if there is more than one file."""
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in files)},
            "weight_map": {tensor.name: shard.name for shard in files for tensor in shard.layouts},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / layout.WEIGHTS_INDEX).write_text(text, encoding="utf-8")
