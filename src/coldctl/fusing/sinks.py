"""Where a writing pass puts what it computed: into files front to back, or by position into files that others write to.

Both leave the same bytes. Front to back the digests come by the way, and one thread rounds, hashes and writes behind the
computation; by position any worker of a cluster can write its share of a file, and digests are taken afterwards.
"""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from coldctl.artifacts import layout
from coldctl.checkpoints.checkpoint import Checkpoint, digest_prelude
from coldctl.checkpoints.header import DTYPE_NAMES, DTYPES, FLOATING, Tensor, rounded
from coldctl.checkpoints.writer import Layout, Shard, WeightsWriter, file_order, header, shards, write_index
from coldctl.config.settings import FuseConfig
from coldctl.fusing.blocks import Block
from coldctl.fusing.methods import Array
from coldctl.storage.location import Location
from coldctl.storage.remote import open_folder

_PENDING = 4  # pieces that wait for the writing thread


def output_dtype(tensor: Tensor, config: FuseConfig) -> str:
    """The safetensors dtype that a base tensor is fused to."""
    return DTYPE_NAMES[config.dtype] if config.dtype else tensor.dtype


@dataclass(frozen=True)
class Written:
    """What a writing pass left on disk."""

    body_digest: str  # "" where it has yet to be taken
    digests: dict[str, str]  # sha256 of the weight files


@dataclass(frozen=True)
class Target:
    """A model, or a state of the outer optimiser, that is to be written."""

    folder: Location
    layouts: tuple[Layout, ...]  # in the order of the file
    max_shard_size: int  # bytes
    single: str | None = None  # the one file that holds all tensors, where it is not the model's weights

    @property
    def names(self) -> list[str]:
        """The floating tensors in the order of the file."""
        return [item.name for item in self.layouts if item.dtype in FLOATING]

    @property
    def shards(self) -> list[Shard]:
        """The files."""
        return shards(self.layouts, self.max_shard_size, single=self.single)

    def only(self, shard: Shard) -> "Target":
        """One of its files."""
        return replace(self, layouts=shard.layouts, single=shard.name)

    def checkpoint(self) -> Checkpoint:
        """What was written, for reading."""
        body: dict[str, Tensor] = {}
        files: dict[str, int] = {}
        for shard in self.shards:
            body |= {item.name: Tensor(shard.name, at, item.dtype, item.shape) for item, at in shard.places()}
            files[shard.name] = len(header(shard.layouts)) + shard.nbytes
        return Checkpoint(open_folder(self.folder), self.folder.name, {}, dict(sorted(body.items())), (), "", files)


def target_in(folder: Location, base: Checkpoint, config: FuseConfig, state: str | None = None) -> Target:
    """A model with the base's tensors, or (`state`) one state of the outer optimiser, which is float32."""
    layouts = [
        Layout(
            name, ("F32" if state else output_dtype(tensor, config)) if tensor.floating else tensor.dtype, tensor.shape
        )
        for name, tensor in base.body.items()
        if tensor.floating or not state
    ]
    single = layout.outer_state(state) if state else None
    return Target(folder, tuple(file_order(layouts)), config.max_shard_size, single)


class Sink(Protocol):
    """Takes the blocks of one target."""

    def write(self, block: Block, values: Array) -> None:
        """Round and write one block, float64 [L]."""


class StreamSink:
    """Rounds, hashes and writes one target front to back, in a thread of its own."""

    def __init__(self, place: Target, base: Checkpoint) -> None:
        self._layouts = {item.name: item for item in place.layouts}
        self._ahead = list(place.layouts)
        self._base = base
        self._hashes_body = place.single is None and place.names == sorted(place.names)
        self._writer = WeightsWriter(place.folder, place.layouts, place.max_shard_size, single=place.single)
        self._body = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="coldctl-write")
        self._pending: list[Future[None]] = []

    def write(self, block: Block, values: Array) -> None:
        """Queue one block, which must be the next in the file."""
        while len(self._pending) >= _PENDING:
            self._pending.pop(0).result()
        self._pending.append(self._pool.submit(self._write, block.name, block.start, values))

    def close(self) -> Written:
        """Wait for all, finish the files, and say what stands in them."""
        for future in self._pending:
            future.result()
        self._copy_integers()
        self._writer.close()
        digest = "sha256:" + self._body.hexdigest() if self._hashes_body else ""
        return Written(digest, self._writer.digests)

    def abandon(self) -> None:
        """Let go of thread and file."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._writer.abandon()

    def _write(self, name: str, start: int, values: Array) -> None:
        item = self._layouts[name]
        if start == 0:
            self._copy_integers()
            self._ahead.pop(0)
        data = rounded(values, DTYPES[item.dtype]).view(np.uint8).data
        if self._hashes_body:
            if start == 0:
                self._body.update(digest_prelude(name, Tensor("", 0, item.dtype, item.shape)))
            self._body.update(data)
        self._writer.write(data)

    def _copy_integers(self) -> None:
        """Integer buffers that come next in the file are the base's own."""
        while self._ahead and self._ahead[0].dtype not in FLOATING:
            item = self._ahead.pop(0)
            self._writer.write(self._base.read(item.name).reshape(-1).view(np.uint8).data)


class RangeSink:
    """Rounds blocks and writes them where they belong in files that `prepare` has made."""

    def __init__(self, place: Target) -> None:
        assert isinstance(place.folder, Path), "stores take whole files only"
        self._folder = place.folder
        self._places = {
            item.name: (shard.name, offset, DTYPES[item.dtype])
            for shard in place.shards
            for item, offset in shard.places()
        }
        self._open: dict[str, int] = {}

    def write(self, block: Block, values: Array) -> None:
        """Write one block."""
        name, offset, dtype = self._places[block.name]
        if name not in self._open:
            self._open[name] = os.open(self._folder / name, os.O_WRONLY)
        data = rounded(values, dtype).view(np.uint8).data
        at = offset + block.start * dtype.itemsize
        while len(data):
            count = os.pwrite(self._open[name], data, at)
            data, at = data[count:], at + count

    def close(self) -> None:
        """Make it durable and visible to other machines."""
        for descriptor in self._open.values():
            os.fsync(descriptor)
            os.close(descriptor)
        self._open.clear()


def prepare(place: Target, base: Checkpoint) -> None:
    """Make the files at their full size, with everything in them that no pass computes: headers and integer buffers."""
    for shard in place.shards:
        with (place.folder / shard.name).open("wb") as file:
            file.write(header(shard.layouts))
            for item, offset in shard.places():
                if item.dtype not in FLOATING:
                    file.seek(offset)
                    file.write(base.read(item.name).reshape(-1).view(np.uint8).data)
            file.truncate(len(header(shard.layouts)) + shard.nbytes)
            file.flush()
            os.fsync(file.fileno())
    if place.single is None:
        write_index(place.folder, place.shards)
