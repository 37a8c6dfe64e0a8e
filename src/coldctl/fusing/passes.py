"""Passes that only read: verify, measure updates, compute a method's parameters.

Each pass reads the inputs once, in blocks. A plain mean needs only the writing pass. A method that needs a norm, a
verdict or a rank first needs one more. A pass runs in this process, or in chunks on other machines, with equal results.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from itertools import chain, islice
from typing import Protocol, TypeVar

import numpy as np

from coldctl.artifacts import layout, manifest
from coldctl.artifacts.manifest import Manifest
from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.checkpoints.digests import body_digest, outside_body_digest
from coldctl.common.errors import CheckpointError
from coldctl.common.progress import Progress
from coldctl.fusing import methods
from coldctl.fusing.blocks import Array, Block, Chunk, Digester, chunks_of, cut, read_blocks
from coldctl.fusing.recipe import Need, Recipe
from coldctl.fusing.statistics import NotFinite, UpdateStatistics, not_finite

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Spread(Protocol):
    """A function that runs the chunks of a pass on an engine's workers."""

    def __call__(self, work: Callable[[Piece], Result], chunks: Sequence[Piece], name: str) -> Iterator[Result]:
        """Yield the result of `work` (which can be pickled) for each chunk, in order. `name` names the pass.

        Raises what `work` raised.
        """


@dataclass(frozen=True)
class Inputs:
    """The base, the contributions in the order of summation, and the files read beside them."""

    base: Checkpoint
    contributions: Sequence[Checkpoint]
    companions: Sequence[Checkpoint] = ()

    @property
    def names(self) -> list[str]:
        """Return the names of the base's floating body tensors, sorted: the order of digests."""
        return [name for name, tensor in self.base.body.items() if tensor.floating]


@dataclass(frozen=True)
class Verification:
    """The digests of a fuse's inputs, and how they differ from their manifests."""

    findings: Sequence[NotFinite]
    base_digest: str
    digests: Sequence[str]  # of the contributions' bodies
    mismatches: Sequence[Sequence[str]]  # with the manifest, per contribution
    base_mismatches: Sequence[str]


class Verifier:
    """A verifier that takes digests while a pass reads and compares them with the manifests afterwards."""

    def __init__(self, inputs: Inputs, *, verify: bool, whole: bool) -> None:
        """Prepare to verify. With `whole` the pass reads all floating tensors in name order, so it can take digests."""
        self._checkpoints = [inputs.base, *inputs.contributions]
        self._verify = verify
        takes = [verify or inputs.base.manifest is None, *([verify] * len(inputs.contributions))]
        self.digesters = [
            Digester() if whole and take and _reads_whole_body(checkpoint, inputs.names) else None
            for checkpoint, take in zip(self._checkpoints, takes, strict=True)
        ]
        self.findings: list[NotFinite] = []

    def verification(self, spread: Spread | None = None) -> Verification:
        """Return the digests and the mismatches with the manifests. Reads bodies whose digest no pass has taken."""
        chunks = list(range(len(self._checkpoints)))
        if spread:
            results = list(spread(self._verify_one, chunks, "verify"))
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                results = list(pool.map(self._verify_one, chunks))
        digests = [digest for digest, _ in results]
        mismatches = [messages for _, messages in results]
        return Verification(self.findings, digests[0], digests[1:], mismatches[1:], mismatches[0])

    def _verify_one(self, index: int) -> tuple[str, list[str]]:
        checkpoint, digester = self._checkpoints[index], self.digesters[index]
        if not self._verify and (index or checkpoint.manifest):
            return checkpoint.manifest["body_digest"] if checkpoint.manifest else "", []
        actual = digester.body_digest() if digester else body_digest(checkpoint)
        if checkpoint.manifest is None:
            return actual, [f"{name} changed while it was read" for name in checkpoint.folder.changed()]
        return actual, manifest_mismatches(checkpoint, actual) if self._verify else []


def _reads_whole_body(checkpoint: Checkpoint, names: Sequence[str]) -> bool:
    """Return whether the body digest of a checkpoint covers exactly the tensors `names`, in this order."""
    own = [name for name, tensor in checkpoint.body.items() if tensor.floating]
    return checkpoint.original is None and own == list(names)


def manifest_mismatches(checkpoint: Checkpoint, actual: str, *, whole: bool = False) -> list[str]:
    """Return how the files of a checkpoint differ from its manifest, one message each. `actual` is its body digest.

    Files that a model is loaded from must be there and unchanged. Other files (pictures, reports) may be missing, since
    a download leaves them out, and the card may be edited. With `whole` every file must be there and unchanged.

    If the manifest states a digest of the bytes outside the body, it covers every byte of a weight file together with
    the body digest, and no byte is hashed twice.
    """
    document = checkpoint.manifest
    assert document is not None
    mismatches = []
    if document["body_digest"] != actual:
        changed = [name for name in checkpoint.files if _changed(checkpoint, name, document)]
        where = f"{', '.join(changed)} was changed after it was written: " if changed else ""
        mismatches.append(f"{where}its body is {actual[:19]}…, its manifest says {document['body_digest'][:19]}…")
    outside = document.get("outside_body", {})
    for name in sorted(document["files"]):
        if not checkpoint.folder.has(name):
            if whole or any(fnmatch(name, pattern) for pattern in layout.MODEL_FILES):
                mismatches.append(f"{name} is missing")
        elif name == layout.CARD and not whole:
            continue
        elif name in outside and name in checkpoint.files:
            if outside_body_digest(checkpoint, name) != outside[name]:
                mismatches.append(f"{name} was changed after it was written")
        else:
            try:
                if _changed(checkpoint, name, document):
                    mismatches.append(f"{name} was changed after it was written")
            except CheckpointError as error:  # a link to elsewhere, say: one file's fault stops no other checkpoint
                mismatches.append(error.message)
    return mismatches


def _changed(checkpoint: Checkpoint, name: str, document: Manifest) -> bool:
    return manifest.digest_of_reader(checkpoint.folder.open(name)) != document["files"].get(name)


def verify_checkpoint(checkpoint: Checkpoint, actual: str | None = None) -> None:
    """Verify a checkpoint against its manifest, if it has one. `actual` is its body digest, None if not computed yet.

    Raises CheckpointError if they differ.
    """
    if checkpoint.manifest is None:
        return
    if mismatches := manifest_mismatches(checkpoint, actual or body_digest(checkpoint)):
        raise CheckpointError(
            f"{checkpoint.label}: {mismatches[0]}: make or fetch it again, or remove its {layout.MANIFEST} if it was "
            "changed on purpose"
        )


@dataclass
class PassResult:
    """The statistics, unsound values and digests that a pass collected in one chunk."""

    statistics: UpdateStatistics | None
    findings: list[NotFinite] = field(default_factory=list)
    # Of the files that were completed with this chunk, by target and file name.
    digests: dict[tuple[int, str], str] = field(default_factory=dict)

    def look(self, block: Block, averaged: Array, weights: Array, *, values: bool) -> None:
        """Add a block and its mean by `weights` to the statistics. With `values` also search for values not finite."""
        if values:
            self.findings += not_finite(block, averaged if np.all(weights) else methods.mean(block.contributions))
        if self.statistics is not None:
            self.statistics.add(block, averaged)


def measure_updates(
    inputs: Inputs,
    weights: Array,
    verifier: Verifier,
    *,
    gram: bool,
    pairs: bool,
    progress: Progress,
    spread: Spread | None = None,
) -> UpdateStatistics:
    """Read all inputs once: find values not finite, take digests, and return the statistics of the updates.

    The statistics hold inner products with `gram`, and directions for the search for outliers with `pairs`.
    """
    statistics = UpdateStatistics(len(weights), gram=gram, pairs=pairs)
    chunks = chunks_of(inputs.base, inputs.contributions, inputs.names)
    work = partial(_surveyed, inputs, weights, deepcopy(statistics), None if spread else verifier.digesters)
    for result in run_chunks(work, chunks, "survey", progress, spread):
        verifier.findings += result.findings
        assert result.statistics is not None
        statistics.include(result.statistics)
    return statistics


def _surveyed(
    inputs: Inputs,
    weights: Array,
    empty: UpdateStatistics,
    digesters: Sequence[Digester | None] | None,
    chunks: Sequence[Chunk],
) -> Iterator[PassResult]:
    with closing(read_blocks(inputs.base, inputs.contributions, joined(chunks), digesters)) as blocks:
        for chunk in chunks:
            result = PassResult(deepcopy(empty))
            for block in islice(blocks, len(chunk)):
                result.look(block, methods.mean(block.contributions, weights), weights, values=True)
            yield result


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Return all blocks of several chunks."""
    return [block_range for chunk in chunks for block_range in chunk]


def run_chunks(
    work: Callable[[Sequence[Chunk]], Iterator[Result]],
    chunks: Sequence[Chunk],
    name: str,
    progress: Progress,
    spread: Spread | None,
    together: Sequence[Sequence[Chunk]] | None = None,
) -> Iterator[Result]:
    """Run `work` on every chunk and yield the results in order, in this process or on the engine's workers.

    Chunks that are `together` go to one worker. Raises what `work` raised.
    """
    progress.begin(name, sum(len(block_range) for chunk in chunks for block_range in chunk), "weights")
    if spread is None:
        results = work(chunks)
    else:
        results = chain.from_iterable(spread(partial(_all, work), together or [[chunk] for chunk in chunks], name))
    for chunk, result in zip(chunks, results, strict=True):
        yield result
        progress.advance(name, sum(map(len, chunk)))
    progress.end(name)


def _all(work: Callable[[Sequence[Chunk]], Iterator[Result]], chunks: Sequence[Chunk]) -> list[Result]:
    return list(work(chunks))


def tensor_weights(
    inputs: Inputs, recipe: Recipe, progress: Progress, spread: Spread | None = None
) -> dict[str, Array]:
    """Return weights per tensor by name, float64 [N + 1], the last of the base. Reads the inputs once.

    The method computes them from the inner products within each tensor, of the updates or of the contributions.
    """
    solve = recipe.method.solve
    assert solve is not None
    updates = recipe.method.needs is Need.TENSOR_GRAM
    chunks = [cut(inputs.base, inputs.contributions, [name]) for name in inputs.names]
    grams = run_chunks(partial(_products, inputs, updates), chunks, "angles", progress, spread)
    return {name: solve(gram, recipe.weights, recipe.config) for name, gram in zip(inputs.names, grams, strict=True)}


def _products(inputs: Inputs, updates: bool, chunks: Sequence[Chunk]) -> Iterator[Array]:
    count = len(inputs.contributions)
    with closing(read_blocks(inputs.base, inputs.contributions, joined(chunks))) as blocks:
        for chunk in chunks:
            gram = np.zeros((count, count))
            for block in islice(blocks, len(chunk)):
                rows = methods.stacked(block.contributions)
                if updates:
                    rows -= block.base
                gram += rows @ rows.T
            yield gram


def thresholds(inputs: Inputs, density: float, progress: Progress, spread: Spread | None = None) -> dict[str, Array]:
    """Return the smallest magnitude that TIES keeps: the k-th largest, k = max(1, ⌊density · n⌋).

    By tensor name, an array with one float64 per contribution.
    A rank needs a whole tensor, so this holds one update of one tensor at a time, in float32.
    """
    chunks = [cut(inputs.base, inputs.contributions[:1], [name]) for name in inputs.names]
    ranks = run_chunks(partial(_ranked, inputs, density), chunks, "ranks", progress, spread)
    return dict(zip(inputs.names, ranks, strict=True))


def _ranked(inputs: Inputs, density: float, chunks: Sequence[Chunk]) -> Iterator[Array]:
    for chunk in chunks:
        size = chunk[-1].stop
        smallest = np.zeros(len(inputs.contributions))
        if size and density < 1:
            magnitudes = np.empty(size, np.float32)
            for index, checkpoint in enumerate(inputs.contributions):
                for block in read_blocks(inputs.base, [checkpoint], chunk):
                    difference = block.contributions[0].astype(np.float64) - block.base
                    magnitudes[block.start : block.stop] = np.abs(difference)
                rank = size - max(1, int(density * size))
                magnitudes.partition(rank)
                # One step down: the magnitudes compared later are float64, and this one was rounded to float32.
                smallest[index] = np.nextafter(magnitudes[rank], np.float32(0)) if magnitudes[rank] > 0 else 0.0
        yield smallest


def distance(inputs: Inputs, recipe: Recipe, progress: Progress, spread: Spread | None = None) -> float:
    """Return the norm of a method's update, ‖merged − base‖ over all floating body tensors. Reads the inputs once."""
    chunks = chunks_of(inputs.base, [*inputs.contributions, *inputs.companions], inputs.names)
    return float(np.sqrt(sum(run_chunks(partial(_moved, inputs, recipe), chunks, "norm", progress, spread))))


def _moved(inputs: Inputs, recipe: Recipe, chunks: Sequence[Chunk]) -> Iterator[float]:
    plan = joined(chunks)
    with closing(read_blocks(inputs.base, inputs.contributions, plan, companions=inputs.companions)) as blocks:
        for chunk in chunks:
            total = 0.0
            for block in islice(blocks, len(chunk)):
                step = recipe.method.merge(block, recipe) - block.base
                total += float(step @ step)
            yield total
