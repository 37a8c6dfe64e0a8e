"""Passes over the inputs of a fuse that write nothing: prove them, look at their updates, find a method's parameters.

Each pass reads the inputs once, in blocks. A plain mean needs one; what must know a norm, a verdict or a rank
first needs a second. A pass runs here in one go, or in stretches on other machines, with the same result.
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
from coldctl.checkpoints.checkpoint import Checkpoint, body_digest, outside_body_digest
from coldctl.common.errors import CheckpointError
from coldctl.common.progress import Progress
from coldctl.config.settings import FuseConfig
from coldctl.fusing import methods
from coldctl.fusing.blocks import Block, Digester, Stretch, cut, read_blocks, stretches
from coldctl.fusing.methods import Array
from coldctl.fusing.recipe import Recipe, TensorWeights
from coldctl.fusing.statistics import NotFinite, UpdateStatistics, not_finite

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Spread(Protocol):
    """Runs the pieces of a pass in other places, where the pass is one of several machines."""

    def __call__(self, work: Callable[[Piece], Result], pieces: Sequence[Piece], name: str) -> Iterator[Result]:
        """Yield what `work` (which can be pickled) makes of each piece, in the order of the pieces.

        `name` is the pass's. Raises what a piece raised.
        """


@dataclass
class Inputs:
    """What is fused: the base, the contributions in the order of summation, and what is read along with them."""

    base: Checkpoint
    contributions: Sequence[Checkpoint]
    companions: Sequence[Checkpoint] = ()

    @property
    def names(self) -> list[str]:
        """The floating body tensors of the base in name order, which is the order of digests."""
        return [name for name, tensor in self.base.body.items() if tensor.floating]


@dataclass
class Proof:
    """What a pass found out about its inputs on the way."""

    findings: list[NotFinite] = field(default_factory=list)
    base_digest: str = ""
    digests: list[str] = field(default_factory=list)  # of the contributions' bodies
    problems: list[list[str]] = field(default_factory=list)  # per contribution: what differs from its manifest
    base_problems: list[str] = field(default_factory=list)


class Prover:
    """Takes digests while a pass reads, and compares them with the manifests when it is done."""

    def __init__(self, inputs: Inputs, *, verify: bool, whole: bool) -> None:
        """`whole` says that the pass reads all floating tensors in name order; otherwise digests are taken apart."""
        self._checkpoints = [inputs.base, *inputs.contributions]
        self._verify = verify
        takes = [verify or inputs.base.manifest is None, *([verify] * len(inputs.contributions))]
        self.digesters = [
            Digester() if whole and take and _reads_whole_body(checkpoint, inputs.names) else None
            for checkpoint, take in zip(self._checkpoints, takes, strict=True)
        ]
        self.findings: list[NotFinite] = []

    def prove(self, spread: Spread | None = None) -> Proof:
        """The digests, and what differs from the manifests."""
        pieces = list(range(len(self._checkpoints)))
        if spread:
            results = list(spread(self._prove_one, pieces, "verify"))
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                results = list(pool.map(self._prove_one, pieces))
        digests = [digest for digest, _ in results]
        problems = [found for _, found in results]
        return Proof(self.findings, digests[0], digests[1:], problems[1:], problems[0])

    def _prove_one(self, index: int) -> tuple[str, list[str]]:
        checkpoint, digester = self._checkpoints[index], self.digesters[index]
        if not self._verify and (index or checkpoint.manifest):
            return checkpoint.manifest["body_digest"] if checkpoint.manifest else "", []
        actual = digester.body_digest() if digester else body_digest(checkpoint)
        if checkpoint.manifest is None:
            return actual, [f"{name} changed while it was read" for name in checkpoint.folder.changed()]
        return actual, differences(checkpoint, actual) if self._verify else []


def _reads_whole_body(checkpoint: Checkpoint, names: Sequence[str]) -> bool:
    """Whether reading the tensors `names` in order is what a checkpoint's body digest is over."""
    own = [name for name, tensor in checkpoint.body.items() if tensor.floating]
    return checkpoint.original is None and own == list(names)


def differences(checkpoint: Checkpoint, actual: str, *, whole: bool = False) -> list[str]:
    """What the manifest that a checkpoint has states otherwise than its files say.

    What a model is loaded from must be there and as it was; of the rest (pictures, reports) only what is there is
    looked at, since whoever fetches a model leaves it out, and the card not at all, since people write into it. With
    `whole` all of it must be there and as it was.

    `actual` is its body digest. Where the manifest also has a digest of what a weight file holds outside the body,
    the two together cover every byte of the file, and no byte is hashed twice.
    """
    document = checkpoint.manifest
    assert document is not None
    problems = []
    if document["body_digest"] != actual:
        changed = [name for name in checkpoint.files if _changed(checkpoint, name, document)]
        where = f"{', '.join(changed)} was changed after it was written: " if changed else ""
        problems.append(f"{where}its body is {actual[:19]}…, its manifest says {document['body_digest'][:19]}…")
    outside = document.get("outside_body", {})
    for name in sorted(document["files"]):
        if name.startswith(f"{layout.LEAVE_ONE_OUT}/"):
            continue  # these models beside the model have manifests of their own
        if not checkpoint.folder.has(name):
            if whole or any(fnmatch(name, pattern) for pattern in layout.MODEL_FILES):
                problems.append(f"{name} is missing")
        elif name == layout.CARD and not whole:
            continue
        elif name in outside and name in checkpoint.files:
            if outside_body_digest(checkpoint, name) != outside[name]:
                problems.append(f"{name} was changed after it was written")
        else:
            try:
                if _changed(checkpoint, name, document):
                    problems.append(f"{name} was changed after it was written")
            except CheckpointError as error:  # a link to elsewhere, say: one file's fault stops no other checkpoint
                problems.append(error.message)
    return problems


def _changed(checkpoint: Checkpoint, name: str, document: Manifest) -> bool:
    return manifest.digest_of_reader(checkpoint.folder.open(name)) != document["files"].get(name)


def prove(checkpoint: Checkpoint, actual: str | None = None) -> None:
    """Refuse a checkpoint whose files are not what its manifest states; one without a manifest has nothing to prove.

    `actual` is its body digest, where that is known. Raises CheckpointError.
    """
    if checkpoint.manifest is None:
        return
    if problems := differences(checkpoint, actual or body_digest(checkpoint)):
        raise CheckpointError(
            f"{checkpoint.label}: {problems[0]}: make or fetch it again, or remove its {layout.MANIFEST} if it was "
            "changed on purpose"
        )


@dataclass
class Found:
    """What a pass found out about one stretch of its inputs."""

    statistics: UpdateStatistics | None
    findings: list[NotFinite] = field(default_factory=list)
    digests: dict[tuple[int, str], str] = field(
        default_factory=dict
    )  # of what was finished with it, by target and file

    def look(self, block: Block, averaged: Array, weights: Array, *, values: bool) -> None:
        """Take in a block and its mean by `weights`: the updates, and where asked values that are not finite."""
        if values:
            self.findings += not_finite(block, averaged if np.all(weights) else methods.mean(block.contributions))
        if self.statistics is not None:
            self.statistics.add(block, averaged)


def survey(
    inputs: Inputs,
    weights: Array,
    prover: Prover,
    *,
    gram: bool,
    pairs: bool,
    progress: Progress,
    spread: Spread | None = None,
) -> UpdateStatistics:
    """One pass that writes nothing: values, digests, the updates' norms, on request their inner products or directions."""
    statistics = UpdateStatistics(len(weights), gram=gram, pairs=pairs)
    pieces = stretches(inputs.base, inputs.contributions, inputs.names)
    work = partial(_surveyed, inputs, weights, deepcopy(statistics), None if spread else prover.digesters)
    for found in along(work, pieces, "survey", progress, spread):
        prover.findings += found.findings
        assert found.statistics is not None
        statistics.include(found.statistics)
    return statistics


def _surveyed(
    inputs: Inputs,
    weights: Array,
    empty: UpdateStatistics,
    digesters: Sequence[Digester | None] | None,
    pieces: Sequence[Stretch],
) -> Iterator[Found]:
    with closing(read_blocks(inputs.base, inputs.contributions, joined(pieces), digesters)) as blocks:
        for piece in pieces:
            found = Found(deepcopy(empty))
            for block in islice(blocks, len(piece)):
                found.look(block, methods.mean(block.contributions, weights), weights, values=True)
            yield found


def joined(pieces: Sequence[Stretch]) -> Stretch:
    """All blocks of several stretches."""
    return [extent for piece in pieces for extent in piece]


def along(
    work: Callable[[Sequence[Stretch]], Iterator[Result]],
    pieces: Sequence[Stretch],
    name: str,
    progress: Progress,
    spread: Spread | None,
    together: Sequence[Sequence[Stretch]] | None = None,
) -> Iterator[Result]:
    """One result per stretch, in order: here in one go, or of those that go `together` wherever they are computed."""
    progress.begin(name, sum(len(extent) for piece in pieces for extent in piece), "weights")
    if spread is None:
        results = work(pieces)
    else:
        results = chain.from_iterable(spread(partial(_all, work), together or [[piece] for piece in pieces], name))
    for piece, result in zip(pieces, results, strict=True):
        yield result
        progress.advance(name, sum(map(len, piece)))
    progress.end(name)


def _all(work: Callable[[Sequence[Stretch]], Iterator[Result]], pieces: Sequence[Stretch]) -> list[Result]:
    return list(work(pieces))


def tensor_weights(
    inputs: Inputs, config: FuseConfig, progress: Progress, spread: Spread | None = None
) -> dict[str, TensorWeights]:
    """One pass for the methods with weights per tensor: inner products within each tensor, then the weights.

    Model Stock looks at the updates, spherical interpolation at the tensors themselves.
    """
    pieces = [cut(inputs.base, inputs.contributions, [name]) for name in inputs.names]
    grams = along(partial(_products, inputs, config), pieces, "angles", progress, spread)
    return {name: _weights_within(gram, config) for name, gram in zip(inputs.names, grams, strict=True)}


def _products(inputs: Inputs, config: FuseConfig, pieces: Sequence[Stretch]) -> Iterator[Array]:
    count = len(inputs.contributions)
    with closing(read_blocks(inputs.base, inputs.contributions, joined(pieces))) as blocks:
        for piece in pieces:
            gram = np.zeros((count, count))
            for block in islice(blocks, len(piece)):
                rows = methods.stacked(block.contributions)
                if config.method == "model-stock":
                    rows -= block.base
                gram += rows @ rows.T
            yield gram


def _weights_within(gram: Array, config: FuseConfig) -> TensorWeights:
    if config.method == "slerp":
        return TensorWeights(methods.slerp_weights(gram, config.position), 0.0)
    share = methods.model_stock_share(gram)
    return TensorWeights(np.full(len(gram), share / len(gram)), 1 - share)


def thresholds(inputs: Inputs, density: float, progress: Progress, spread: Spread | None = None) -> dict[str, Array]:
    """The smallest magnitude that TIES keeps, per tensor and contribution: the k-th largest, k = max(1, ⌊density · n⌋).

    A rank needs a whole tensor, so this holds one update of one tensor at a time, in float32.
    """
    pieces = [cut(inputs.base, inputs.contributions[:1], [name]) for name in inputs.names]
    found = along(partial(_ranked, inputs, density), pieces, "ranks", progress, spread)
    return dict(zip(inputs.names, found, strict=True))


def _ranked(inputs: Inputs, density: float, pieces: Sequence[Stretch]) -> Iterator[Array]:
    for piece in pieces:
        size = piece[-1].stop
        found = np.zeros(len(inputs.contributions))
        if size and density < 1:
            magnitudes = np.empty(size, np.float32)
            for index, checkpoint in enumerate(inputs.contributions):
                for block in read_blocks(inputs.base, [checkpoint], piece):
                    difference = block.contributions[0].astype(np.float64) - block.base
                    magnitudes[block.start : block.stop] = np.abs(difference)
                rank = size - max(1, int(density * size))
                magnitudes.partition(rank)
                # One step down: the magnitudes compared later are float64, and this one was rounded to float32.
                found[index] = np.nextafter(magnitudes[rank], np.float32(0)) if magnitudes[rank] > 0 else 0.0
        yield found


def distance(inputs: Inputs, recipe: Recipe, progress: Progress, spread: Spread | None = None) -> float:
    """One pass for the norm of a method's own update, ‖merged − base‖ over all floating body tensors."""
    pieces = stretches(inputs.base, [*inputs.contributions, *inputs.companions], inputs.names)
    return float(np.sqrt(sum(along(partial(_moved, inputs, recipe), pieces, "norm", progress, spread))))


def _moved(inputs: Inputs, recipe: Recipe, pieces: Sequence[Stretch]) -> Iterator[float]:
    plan = joined(pieces)
    with closing(read_blocks(inputs.base, inputs.contributions, plan, companions=inputs.companions)) as blocks:
        for piece in pieces:
            total = 0.0
            for block in islice(blocks, len(piece)):
                step = recipe.merged(block) - block.base
                total += float(step @ step)
            yield total
