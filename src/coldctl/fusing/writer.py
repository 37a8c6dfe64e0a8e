"""The writing pass of a fuse: read, fuse, round and write, with digests and statistics if no earlier pass took them.

It runs in this process, or chunk by chunk on other machines: by position into files of a shared disk, or file by file
into a store, which takes only whole files.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

import numpy as np

from coldctl.artifacts import manifest
from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.checkpoints.digests import body_digest
from coldctl.checkpoints.header import FLOATING
from coldctl.checkpoints.writer import write_index
from coldctl.common.progress import Progress
from coldctl.fusing import methods
from coldctl.fusing.blocks import Digester, Stretch, read_blocks, stretches
from coldctl.fusing.passes import Inputs, PassResult, Prover, Spread, joined, run_chunks
from coldctl.fusing.recipe import OUTER_STATES, Recipe
from coldctl.fusing.sinks import RangeSink, Sink, StreamSink, Target, Written, prepare, target_in
from coldctl.fusing.statistics import UpdateStatistics
from coldctl.storage.location import Location, in_store


def write(
    inputs: Inputs,
    recipe: Recipe,
    folder: Location,
    *,
    prover: Prover | None,
    statistics: UpdateStatistics | None,
    states: Sequence[Checkpoint] = (),
    progress: Progress,
    spread: Spread | None = None,
) -> Written:
    """Write the fused model into `folder`, and fill `prover` and `statistics` from the blocks that are read.

    `states` are the outer optimiser's states so far (none: zero), read after the inputs' own companions.
    Returns the body's digest, and those of all files written.
    """
    config, base = recipe.config, inputs.base
    kinds = OUTER_STATES.get(config.outer_optimizer, ())
    targets = [target_in(folder, base, config), *(target_in(folder, base, config, kind) for kind in kinds)]
    job = _Writing(inputs, recipe, states, targets, prover is not None, deepcopy(statistics))

    def take(found: PassResult) -> None:
        if prover is not None:
            prover.findings += found.findings
        if statistics is not None and found.statistics is not None:
            statistics.include(found.statistics)

    if spread:
        written = _elsewhere(job, take, progress, spread)
    else:
        written = _here(job, take, progress, prover.digesters if prover else None)
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
    def stretches(self) -> list[Stretch]:
        """Return the chunks in the order of the model's files. No chunk is part of two files."""
        beside = [*self.inputs.contributions, *self.inputs.companions, *self.states]
        model = self.targets[0]
        first = {next((item.name for item in shard.layouts if item.dtype in FLOATING), "") for shard in model.shards}
        return stretches(self.inputs.base, beside, model.names, first)


def _here(
    job: _Writing, take: Callable[[PassResult], None], progress: Progress, digesters: Sequence[Digester | None] | None
) -> list[Written]:
    """Write front to back in this process, and take all digests while writing."""
    sinks = [StreamSink(item, job.inputs.base) for item in job.targets]
    try:
        for found in run_chunks(partial(_written, job, sinks, digesters), job.stretches, "fuse", progress, None):
            take(found)
        return [sink.close() for sink in sinks]
    finally:
        for sink in sinks:
            sink.abandon()


def _elsewhere(job: _Writing, take: Callable[[PassResult], None], progress: Progress, spread: Spread) -> list[Written]:
    """Write on the engine's workers, and take digests afterwards that could not be taken while writing."""
    base, pieces = job.inputs.base, job.stretches
    digests: dict[tuple[int, str], str] = {}
    if in_store(job.targets[0].folder):
        results = run_chunks(partial(_by_file, job), pieces, "fuse", progress, spread, _files(job, pieces))
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
        results = run_chunks(partial(_by_position, job), pieces, "fuse", progress, spread)
    for found in results:
        take(found)
        digests |= found.digests
    wanted = [(at, shard.name) for at, item in enumerate(job.targets) for shard in item.shards]
    wanted += [(at, "") for at, item in enumerate(job.targets) if item.single is None]
    missing = [key for key in wanted if key not in digests]
    digests |= dict(zip(missing, spread(partial(_digest, job.targets), missing, "digests"), strict=True))
    return [
        Written(digests.get((at, ""), ""), {shard.name: digests[at, shard.name] for shard in item.shards})
        for at, item in enumerate(job.targets)
    ]


def _files(job: _Writing, pieces: Sequence[Stretch]) -> list[list[Stretch]]:
    """Return the chunks of each file, or all together if the outer optimiser's states have files of their own."""
    if len(job.targets) > 1:
        return [list(pieces)]
    file = {item.name: shard.name for shard in job.targets[0].shards for item in shard.layouts}
    return [list(group) for _, group in groupby(pieces, key=lambda piece: file[piece[0].name])]


def _by_position(job: _Writing, pieces: Sequence[Stretch]) -> Iterator[PassResult]:
    """Write chunks at their positions in files that exist already."""
    sinks = [RangeSink(item) for item in job.targets]
    try:
        yield from _written(job, sinks, None, pieces)
    finally:
        for sink in sinks:
            sink.close()


def _by_file(job: _Writing, pieces: Sequence[Stretch]) -> Iterator[PassResult]:
    """Write all chunks of one file of each target, or of all files, front to back."""
    names = {extent.name for extent in joined(pieces)}
    parts = [item if names >= set(item.names) else _part(item, names) for item in job.targets]
    sinks = [StreamSink(part, job.inputs.base) for part in parts]
    try:
        *others, last = _written(job, sinks, None, pieces)
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
    job: _Writing, sinks: Sequence[Sink], digesters: Sequence[Digester | None] | None, pieces: Sequence[Stretch]
) -> Iterator[PassResult]:
    """Fuse the chunks into one sink per target, and yield the result of each chunk when it is written."""
    inputs, recipe, config = job.inputs, job.recipe, job.recipe.config
    kinds = OUTER_STATES.get(config.outer_optimizer, ())
    companions = [*inputs.companions, *job.states]
    with closing(read_blocks(inputs.base, inputs.contributions, joined(pieces), digesters, companions)) as blocks:
        for piece in pieces:
            found = PassResult(deepcopy(job.empty))
            for block in islice(blocks, len(piece)):
                merged = recipe.apply(block)
                if job.values or job.empty is not None:
                    plain = config.method == "mean" and recipe.scale == 1.0
                    averaged = merged if plain else methods.mean(block.contributions, recipe.weights)
                    found.look(block, averaged, recipe.weights, values=job.values)
                if kinds:
                    before = [array.astype(np.float64) for array in block.companions[len(inputs.companions) :]]
                    before = before or [np.zeros(block.base.size) for _ in kinds]
                    merged, after = methods.outer_step(
                        config.outer_optimizer, block.base, merged, config.outer_lr, config.outer_momentum, before
                    )
                    for sink, state in zip(sinks[1:], after, strict=True):
                        sink.write(block, state)
                sinks[0].write(block, merged)
            yield found


def _digest(targets: Sequence[Target], key: tuple[int, str]) -> str:
    """Return the digest of one file of a target, or of its body if the name is empty, by reading it again."""
    at, name = key
    checkpoint = targets[at].checkpoint()
    return manifest.digest_of_reader(checkpoint.folder.open(name)) if name else body_digest(checkpoint)
