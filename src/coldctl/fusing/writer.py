"""The pass that writes: read, merge, round once, write.

It runs in this process, or chunk by chunk on other machines: by position into files of a shared disk, or file by file
into a store, which takes only whole files. Both leave the same bytes. Front to back, a thread rounds, hashes and writes
while the next blocks are computed. By position, digests are taken afterwards.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Protocol

import numpy as np

from coldctl.artifacts import layout, manifest
from coldctl.checkpoints.checkpoint import Checkpoint, SafetensorsFiles
from coldctl.checkpoints.digests import body_digest, digest_prelude
from coldctl.checkpoints.header import DTYPE_NAMES, DTYPES, FLOATING, Tensor, rounded
from coldctl.checkpoints.writer import Layout, Shard, WeightsWriter, file_order, header, shards, write_index
from coldctl.common.progress import Progress
from coldctl.config.settings import FuseConfig
from coldctl.fusing import methods
from coldctl.fusing.blocks import Array, Block, Chunk, Digester, chunks_of, read_blocks
from coldctl.fusing.passes import Inputs, PassResult, Spread, Verifier, joined, run_chunks
from coldctl.fusing.recipe import OUTER_STATES, Recipe, outer_step
from coldctl.fusing.statistics import UpdateStatistics
from coldctl.storage.location import Location, in_store
from coldctl.storage.remote import open_folder

_PENDING = 4  # chunks that wait for the writing thread


def output_dtype(tensor: Tensor, config: FuseConfig) -> str:
    """Return the safetensors dtype that a base tensor is fused to."""
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
        """Return the target with one of its files."""
        return replace(self, layouts=shard.layouts, single=shard.name)

    def checkpoint(self) -> Checkpoint:
        """Open what was written, for reading."""
        body: dict[str, Tensor] = {}
        files: dict[str, int] = {}
        for shard in self.shards:
            body |= {item.name: Tensor(item.dtype, item.shape, shard.name, at) for item, at in shard.places()}
            files[shard.name] = len(header(shard.layouts)) + shard.nbytes
        folder, body = open_folder(self.folder), dict(sorted(body.items()))
        return Checkpoint(folder, self.folder.name, {}, body, files, SafetensorsFiles(folder, body))


def target_in(folder: Location, base: Checkpoint, config: FuseConfig, state: str | None = None) -> Target:
    """Describe a model with the base's tensors, or (`state`) one state of the outer optimiser, which is float32."""
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
                self._body.update(digest_prelude(name, Tensor(item.dtype, item.shape)))
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


def write(
    inputs: Inputs,
    recipe: Recipe,
    folder: Location,
    *,
    verifier: Verifier | None,
    statistics: UpdateStatistics | None,
    states: Sequence[Checkpoint] = (),
    progress: Progress,
    spread: Spread | None = None,
) -> Written:
    """Write the fused model into `folder`, and fill `verifier` and `statistics` from the blocks that are read.

    `states` are the outer optimiser's states so far (none: zero), read after the inputs' own companions.
    Returns the body's digest, and those of all files written.
    """
    config, base = recipe.config, inputs.base
    kinds = OUTER_STATES.get(config.outer_optimizer, ())
    targets = [target_in(folder, base, config), *(target_in(folder, base, config, kind) for kind in kinds)]
    job = _Writing(inputs, recipe, states, targets, verifier is not None, deepcopy(statistics))

    def take(result: PassResult) -> None:
        if verifier is not None:
            verifier.findings += result.findings
        if statistics is not None and result.statistics is not None:
            statistics.include(result.statistics)

    if spread:
        written = _elsewhere(job, take, progress, spread)
    else:
        written = _here(job, take, progress, verifier.digesters if verifier else None)
    digests = {name: digest for item in written for name, digest in item.digests.items()}
    return Written(written[0].body_digest, digests)


@dataclass(frozen=True)
class _Writing:
    """The work of the pass on every block, which can be sent to other machines."""

    inputs: Inputs
    recipe: Recipe
    states: Sequence[Checkpoint]
    targets: Sequence[Target]  # the model, then the outer optimiser's states
    values: bool  # whether to search for values not finite
    empty: UpdateStatistics | None  # copied and filled for each chunk, if updates are measured

    @property
    def chunks(self) -> list[Chunk]:
        """Return the chunks in the order of the model's files. No chunk is part of two files."""
        beside = [*self.inputs.contributions, *self.inputs.companions, *self.states]
        model = self.targets[0]
        first = {next((item.name for item in shard.layouts if item.dtype in FLOATING), "") for shard in model.shards}
        return chunks_of(self.inputs.base, beside, model.names, first)


def _here(
    job: _Writing, take: Callable[[PassResult], None], progress: Progress, digesters: Sequence[Digester | None] | None
) -> list[Written]:
    """Write front to back in this process, and take all digests while writing."""
    sinks = [StreamSink(item, job.inputs.base) for item in job.targets]
    try:
        for result in run_chunks(partial(_written, job, sinks, digesters), job.chunks, "fuse", progress, None):
            take(result)
        return [sink.close() for sink in sinks]
    finally:
        for sink in sinks:
            sink.abandon()


def _elsewhere(job: _Writing, take: Callable[[PassResult], None], progress: Progress, spread: Spread) -> list[Written]:
    """Write on the engine's workers, and take digests afterwards that could not be taken while writing."""
    base, chunks = job.inputs.base, job.chunks
    digests: dict[tuple[int, str], str] = {}
    if in_store(job.targets[0].folder):
        results = run_chunks(partial(_by_file, job), chunks, "fuse", progress, spread, _files(job, chunks))
        for at, item in enumerate(job.targets):
            for shard in item.shards:
                if not any(layout.dtype in FLOATING for layout in shard.layouts):  # in no chunk
                    written = StreamSink(item.only(shard), base).close()
                    digests |= {(at, name): digest for name, digest in written.digests.items()}
            if item.single is None:
                write_index(item.folder, item.shards)
    else:
        for item in job.targets:
            prepare(item, base)
        results = run_chunks(partial(_by_position, job), chunks, "fuse", progress, spread)
    for result in results:
        take(result)
        digests |= result.digests
    needed = [(at, shard.name) for at, item in enumerate(job.targets) for shard in item.shards]
    needed += [(at, "") for at, item in enumerate(job.targets) if item.single is None]
    missing = [key for key in needed if key not in digests]
    digests |= dict(zip(missing, spread(partial(_digest, job.targets), missing, "digests"), strict=True))
    return [
        Written(digests.get((at, ""), ""), {shard.name: digests[at, shard.name] for shard in item.shards})
        for at, item in enumerate(job.targets)
    ]


def _files(job: _Writing, chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Return the chunks of each file, or all together if the outer optimiser's states have files of their own."""
    if len(job.targets) > 1:
        return [list(chunks)]
    file = {item.name: shard.name for shard in job.targets[0].shards for item in shard.layouts}
    return [list(group) for _, group in groupby(chunks, key=lambda chunk: file[chunk[0].name])]


def _by_position(job: _Writing, chunks: Sequence[Chunk]) -> Iterator[PassResult]:
    """Write chunks at their positions in files that exist already."""
    sinks = [RangeSink(item) for item in job.targets]
    try:
        yield from _written(job, sinks, None, chunks)
    finally:
        for sink in sinks:
            sink.close()


def _by_file(job: _Writing, chunks: Sequence[Chunk]) -> Iterator[PassResult]:
    """Write all chunks of one file of each target, or of all files, front to back."""
    names = {block_range.name for block_range in joined(chunks)}
    parts = [item if names >= set(item.names) else _part(item, names) for item in job.targets]
    sinks = [StreamSink(part, job.inputs.base) for part in parts]
    try:
        *others, last = _written(job, sinks, None, chunks)
        yield from others
        for at, (part, sink) in enumerate(zip(parts, sinks, strict=True)):
            written = sink.close()
            last.digests |= {(at, name): digest for name, digest in written.digests.items()}
            if part.single is None and written.body_digest:
                last.digests[at, ""] = written.body_digest
        yield last
    finally:
        for sink in sinks:
            sink.abandon()


def _part(target: Target, names: set[str]) -> Target:
    return target.only(next(shard for shard in target.shards if any(item.name in names for item in shard.layouts)))


def _written(
    job: _Writing, sinks: Sequence[Sink], digesters: Sequence[Digester | None] | None, chunks: Sequence[Chunk]
) -> Iterator[PassResult]:
    """Fuse the chunks into one sink per target, and yield the result of each chunk when it is written."""
    inputs, recipe, config = job.inputs, job.recipe, job.recipe.config
    kinds = OUTER_STATES.get(config.outer_optimizer, ())
    companions = [*inputs.companions, *job.states]
    with closing(read_blocks(inputs.base, inputs.contributions, joined(chunks), digesters, companions)) as blocks:
        for chunk in chunks:
            result = PassResult(deepcopy(job.empty))
            for block in islice(blocks, len(chunk)):
                merged = recipe.apply(block)
                if job.values or job.empty is not None:
                    plain = config.method == "mean" and recipe.scale == 1.0
                    averaged = merged if plain else methods.mean(block.contributions, recipe.weights)
                    result.look(block, averaged, recipe.weights, values=job.values)
                if kinds:
                    before = [array.astype(np.float64) for array in block.companions[len(inputs.companions) :]]
                    before = before or [np.zeros(block.base.size) for _ in kinds]
                    merged, after = outer_step(
                        config.outer_optimizer, block.base, merged, config.outer_lr, config.outer_momentum, before
                    )
                    for sink, state in zip(sinks[1:], after, strict=True):
                        sink.write(block, state)
                sinks[0].write(block, merged)
            yield result


def _digest(targets: Sequence[Target], key: tuple[int, str]) -> str:
    """Return the digest of one file of a target, or of its body if the name is empty, by reading it again."""
    at, name = key
    checkpoint = targets[at].checkpoint()
    return manifest.digest_of_reader(checkpoint.folder.open(name)) if name else body_digest(checkpoint)
