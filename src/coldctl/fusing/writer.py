"""The writing pass of a fuse: read, fuse, round, write; with digests and statistics where no pass before took them.

It runs here in one go, or stretch by stretch on other machines: by position into files of a shared disk, whole files where
a store takes nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

import numpy as np

from coldctl.artifacts import manifest
from coldctl.checkpoints.checkpoint import Checkpoint, body_digest
from coldctl.checkpoints.header import FLOATING
from coldctl.checkpoints.writer import write_index
from coldctl.common.progress import Progress
from coldctl.fusing import methods
from coldctl.fusing.blocks import Block, Digester, Stretch, read_blocks, stretches
from coldctl.fusing.methods import Array
from coldctl.fusing.passes import Found, Inputs, Prover, Spread, along, joined
from coldctl.fusing.recipe import OUTER_STATES, Recipe
from coldctl.fusing.sinks import RangeSink, Sink, StreamSink, Target, Written, prepare, target_in
from coldctl.fusing.statistics import UpdateStatistics
from coldctl.storage.location import Location, in_store


@dataclass(frozen=True)
class Without:
    """A fused model that lacks one contribution, written in the same pass."""

    index: int
    folder: Location


def write(
    inputs: Inputs,
    recipe: Recipe,
    folder: Location,
    *,
    prover: Prover | None,
    statistics: UpdateStatistics | None,
    states: Sequence[Checkpoint] = (),
    without: Sequence[Without] = (),
    progress: Progress,
    spread: Spread | None = None,
) -> tuple[Written, dict[int, Written]]:
    """Write the fused model into `folder`; `prover` and `statistics` take in what is seen on the way.

    `states` are the outer optimiser's states so far (none: zero), read along after the inputs' own companions.
    Returns what was written, and what was written without each contribution in `without`.
    """
    config, base = recipe.config, inputs.base
    targets = [target_in(place, base, config) for place in (folder, *(item.folder for item in without))]
    targets += [target_in(folder, base, config, kind) for kind in OUTER_STATES.get(config.outer_optimizer, ())]
    job = _Writing(
        inputs, recipe, states, targets, [item.index for item in without], prover is not None, deepcopy(statistics)
    )

    def take(found: Found) -> None:
        if prover is not None:
            prover.findings += found.findings
        if statistics is not None and found.statistics is not None:
            statistics.include(found.statistics)

    if spread:
        written = _elsewhere(job, take, progress, spread)
    else:
        written = _here(job, take, progress, prover.digesters if prover else None)
    last = 1 + len(without)
    digests = {name: digest for item in (written[0], *written[last:]) for name, digest in item.digests.items()}
    others = {item.index: done for item, done in zip(without, written[1:last], strict=True)}
    return Written(written[0].body_digest, digests), others


@dataclass(frozen=True)
class _Writing:
    """What the pass makes of every block, beside reading it."""

    inputs: Inputs
    recipe: Recipe
    states: Sequence[Checkpoint]
    targets: Sequence[Target]  # the model, those without one contribution each, the outer optimiser's states
    without: Sequence[int]
    values: bool  # whether to look for what is not finite
    empty: UpdateStatistics | None  # to be filled for each stretch, if updates are to be looked at

    @property
    def stretches(self) -> list[Stretch]:
        """The blocks in the order of the model's files; no stretch is in two of them."""
        beside = [*self.inputs.contributions, *self.inputs.companions, *self.states]
        model = self.targets[0]
        first = {next((item.name for item in shard.layouts if item.dtype in FLOATING), "") for shard in model.shards}
        return stretches(self.inputs.base, beside, model.names, first)


def _here(
    job: _Writing, take: Callable[[Found], None], progress: Progress, digesters: Sequence[Digester | None] | None
) -> list[Written]:
    """Front to back, with all digests by the way."""
    sinks = [StreamSink(item, job.inputs.base) for item in job.targets]
    try:
        for found in along(partial(_written, job, sinks, digesters), job.stretches, "fuse", progress, None):
            take(found)
        return [sink.close() for sink in sinks]
    finally:
        for sink in sinks:
            sink.abandon()


def _elsewhere(job: _Writing, take: Callable[[Found], None], progress: Progress, spread: Spread) -> list[Written]:
    """Wherever `spread` has it done, digests afterwards where they could not be taken by the way."""
    base, pieces = job.inputs.base, job.stretches
    digests: dict[tuple[int, str], str] = {}
    if in_store(job.targets[0].folder):
        results = along(partial(_by_file, job), pieces, "fuse", progress, spread, _files(job, pieces))
        for at, item in enumerate(job.targets):
            for shard in item.shards:
                if not any(layout.dtype in FLOATING for layout in shard.layouts):  # in no stretch
                    written = StreamSink(item.only(shard), base).close()
                    digests |= {(at, name): digest for name, digest in written.digests.items()}
            if item.single is None:
                write_index(item.folder, item.shards)
    else:
        for item in job.targets:
            prepare(item, base)
        results = along(partial(_by_position, job), pieces, "fuse", progress, spread)
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
    """The stretches of each file of the model; all of them, where the outer optimiser's states make files of their own."""
    if len(job.targets) > 1 + len(job.without):
        return [list(pieces)]
    file = {item.name: shard.name for shard in job.targets[0].shards for item in shard.layouts}
    return [list(group) for _, group in groupby(pieces, key=lambda piece: file[piece[0].name])]


def _by_position(job: _Writing, pieces: Sequence[Stretch]) -> Iterator[Found]:
    """Some of the stretches, written where they belong in files that stand already."""
    sinks = [RangeSink(item) for item in job.targets]
    try:
        yield from _written(job, sinks, None, pieces)
    finally:
        for sink in sinks:
            sink.close()


def _by_file(job: _Writing, pieces: Sequence[Stretch]) -> Iterator[Found]:
    """All stretches of one file of each target, or of all files, written front to back."""
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
) -> Iterator[Found]:
    """Fuse the stretches, one sink per target; what was found out about each comes when it is done."""
    inputs, recipe, config = job.inputs, job.recipe, job.recipe.config
    kinds = OUTER_STATES.get(config.outer_optimizer, ())
    companions = [*inputs.companions, *job.states]
    last = 1 + len(job.without)
    with closing(read_blocks(inputs.base, inputs.contributions, joined(pieces), digesters, companions)) as blocks:
        for piece in pieces:
            found = Found(deepcopy(job.empty))
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
                    for sink, state in zip(sinks[last:], after, strict=True):
                        sink.write(block, state)
                sinks[0].write(block, merged)
                for sink, index in zip(sinks[1:last], job.without, strict=True):
                    sink.write(block, _lacking(block, recipe, index))
            yield found


def _lacking(block: Block, recipe: Recipe, index: int) -> Array:
    """The linear fused block without one contribution: (mean - wᵢ xᵢ) / (1 - wᵢ), in float64, then scaled."""
    whole = methods.mean(block.contributions, recipe.weights)
    weight = recipe.weights[index]
    rest = (whole - weight * block.contributions[index].astype(np.float64)) / (1 - weight)
    return methods.scaled(block.base, rest, recipe.scale)


def _digest(targets: Sequence[Target], key: tuple[int, str]) -> str:
    """Of one file of a target, or (without a name) of its body, read again."""
    at, name = key
    checkpoint = targets[at].checkpoint()
    return manifest.digest_of_reader(checkpoint.folder.open(name)) if name else body_digest(checkpoint)
