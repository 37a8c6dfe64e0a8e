"""Passes over the inputs of a fuse: prove them, look at their updates, find a method's parameters, write the result.

Each pass reads the inputs once, in blocks. A plain mean needs one; what must know a norm, a verdict or a rank
first needs a second.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch

import numpy as np

from coldctl.core import layout, manifest, merge
from coldctl.core.blocks import Block, Digester, read_blocks
from coldctl.core.checkpoint import (
    DTYPES,
    FLOATING,
    Checkpoint,
    Tensor,
    body_digest,
    digest_prelude,
    outside_body_digest,
)
from coldctl.core.config import FuseConfig, size_in_bytes
from coldctl.core.errors import CheckpointError
from coldctl.core.location import Location
from coldctl.core.manifest import Manifest
from coldctl.core.merge import Array
from coldctl.core.progress import Progress
from coldctl.core.recipe import OUTER_STATES, Recipe, TensorWeights
from coldctl.core.statistics import NotFinite, UpdateStatistics, not_finite
from coldctl.core.weights import Layout, WeightsWriter, file_order

DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PENDING = 4  # pieces that wait for the writing thread


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

    def look(self, block: Block, total: Array) -> None:
        """Find values that are not finite; `total` is a sum over all contributions of the block."""
        self.findings += not_finite(block, total)

    def prove(self) -> Proof:
        """The digests, and what differs from the manifests."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(self._prove_one, range(len(self._checkpoints))))
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
    """What a checkpoint's manifest states otherwise than its files say; nothing where it has none.

    What a model is loaded from must be there and as it was; of the rest (pictures, reports) only what is there is
    looked at, since whoever fetches a model leaves it out, and the card not at all, since people write into it. With
    `whole` all of it must be there and as it was.

    `actual` is its body digest. Where the manifest also has a digest of what a weight file holds outside the body,
    the two together cover every byte of the file, and no byte is hashed twice.
    """
    document = checkpoint.manifest
    if document is None:
        return []
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
        elif _changed(checkpoint, name, document):
            problems.append(f"{name} was changed after it was written")
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


def survey(
    inputs: Inputs, weights: Array, prover: Prover, *, gram: bool, pairs: bool, progress: Progress
) -> UpdateStatistics:
    """One pass that writes nothing: values, digests, the updates' norms, on request their inner products or directions."""
    statistics = UpdateStatistics(len(weights), gram=gram, pairs=pairs)
    progress.begin("survey", _elements(inputs), "weights")
    for block in read_blocks(inputs.base, inputs.contributions, inputs.names, prover.digesters):
        averaged = merge.mean(block.contributions, weights)
        prover.look(block, averaged if np.all(weights) else merge.mean(block.contributions))
        statistics.add(block, averaged)
        progress.advance("survey", block.stop - block.start)
    progress.end("survey")
    return statistics


def tensor_weights(inputs: Inputs, config: FuseConfig, progress: Progress) -> dict[str, TensorWeights]:
    """One pass for the methods with weights per tensor: inner products within each tensor, then the weights.

    Model Stock looks at the updates, spherical interpolation at the tensors themselves.
    """
    count = len(inputs.contributions)
    grams: dict[str, Array] = {}
    found: dict[str, TensorWeights] = {}
    progress.begin("angles", _elements(inputs), "weights")
    for block in read_blocks(inputs.base, inputs.contributions, inputs.names):
        rows = merge.stacked(block.contributions)
        if config.method == "model-stock":
            rows -= block.base
        gram = grams.setdefault(block.name, np.zeros((count, count)))
        gram += rows @ rows.T
        if block.stop == inputs.base.body[block.name].size:
            found[block.name] = _weights_within(grams.pop(block.name), config)
        progress.advance("angles", block.stop - block.start)
    progress.end("angles")
    return found


def _weights_within(gram: Array, config: FuseConfig) -> TensorWeights:
    if config.method == "slerp":
        return TensorWeights(merge.slerp_weights(gram, config.position), 0.0)
    share = merge.model_stock_share(gram)
    return TensorWeights(np.full(len(gram), share / len(gram)), 1 - share)


def thresholds(inputs: Inputs, density: float, progress: Progress) -> dict[str, Array]:
    """The smallest magnitude that TIES keeps, per tensor and contribution: the k-th largest, k = max(1, ⌊density · n⌋).

    A rank needs a whole tensor, so this holds one update of one tensor at a time, in float32.
    """
    found: dict[str, Array] = {}
    progress.begin("ranks", _elements(inputs) * len(inputs.contributions), "weights")
    for name in inputs.names:
        size = inputs.base.body[name].size
        found[name] = np.zeros(len(inputs.contributions))
        if not size or density >= 1:
            continue
        magnitudes = np.empty(size, np.float32)
        for index, checkpoint in enumerate(inputs.contributions):
            for block in read_blocks(inputs.base, [checkpoint], [name]):
                difference = block.contributions[0].astype(np.float64) - block.base
                magnitudes[block.start : block.stop] = np.abs(difference)
            rank = size - max(1, int(density * size))
            magnitudes.partition(rank)
            # One step down: the magnitudes compared later are float64, and this one was rounded to float32.
            found[name][index] = np.nextafter(magnitudes[rank], np.float32(0)) if magnitudes[rank] > 0 else 0.0
            progress.advance("ranks", size)
    progress.end("ranks")
    return found


def distance(inputs: Inputs, recipe: Recipe, progress: Progress) -> float:
    """One pass for the norm of a method's own update, ‖merged − base‖ over all floating body tensors."""
    total = 0.0
    progress.begin("norm", _elements(inputs), "weights")
    for block in read_blocks(inputs.base, inputs.contributions, inputs.names, companions=inputs.companions):
        step = recipe.merged(block) - block.base
        total += float(step @ step)
        progress.advance("norm", block.stop - block.start)
    progress.end("norm")
    return float(np.sqrt(total))


@dataclass(frozen=True)
class Written:
    """What the writing pass left on disk."""

    body_digest: str
    digests: dict[str, str]  # sha256 of the weight files and of the outer optimiser's state


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
) -> tuple[Written, dict[int, Written]]:
    """The writing pass: read, fuse, round, write, front to back; with digests and statistics if no pass before took them.

    `states` are the outer optimiser's states so far (none: zero), read along after the inputs' own companions.
    Returns what was written, and what was written without each contribution in `without`.
    """
    config = recipe.config
    sinks = [_Sink(folder, inputs.base, config), *(_Sink(item.folder, inputs.base, config) for item in without)]
    kinds = OUTER_STATES.get(config.outer_optimizer, ())
    outer = [_Sink(folder, inputs.base, config, state=kind) for kind in kinds]
    progress.begin("fuse", _elements(inputs), "weights")
    try:
        reader = read_blocks(
            inputs.base,
            inputs.contributions,
            sinks[0].names,
            prover.digesters if prover else None,
            companions=[*inputs.companions, *states],
        )
        for block in reader:
            merged = recipe.apply(block)
            if prover is not None or statistics is not None:
                averaged = merged if recipe.config.method == "mean" and recipe.scale == 1.0 else None
                if averaged is None:
                    averaged = merge.mean(block.contributions, recipe.weights)
                if prover is not None:
                    prover.look(block, averaged if np.all(recipe.weights) else merge.mean(block.contributions))
                if statistics is not None:
                    statistics.add(block, averaged)
            if kinds:
                before = [array.astype(np.float64) for array in block.companions[len(inputs.companions) :]]
                before = before or [np.zeros(block.base.size) for _ in kinds]
                merged, after = merge.outer_step(
                    config.outer_optimizer, block.base, merged, config.outer_lr, config.outer_momentum, before
                )
                for sink, state in zip(outer, after, strict=True):
                    sink.write(block, state)
            sinks[0].write(block, merged)
            for sink, item in zip(sinks[1:], without, strict=True):
                sink.write(block, _lacking(block, recipe, item.index))
            progress.advance("fuse", block.stop - block.start)
        written = [sink.close() for sink in (*sinks, *outer)]
    finally:
        for sink in (*sinks, *outer):
            sink.abandon()
        progress.end("fuse")
    digests = {name: digest for item in (written[0], *written[len(sinks) :]) for name, digest in item.digests.items()}
    others = {item.index: written[1 + at] for at, item in enumerate(without)}
    return Written(written[0].body_digest, digests), others


def _lacking(block: Block, recipe: Recipe, index: int) -> Array:
    """The linear fused block without one contribution: (mean - wᵢ xᵢ) / (1 - wᵢ), in float64, then scaled."""
    whole = merge.mean(block.contributions, recipe.weights)
    weight = recipe.weights[index]
    rest = (whole - weight * block.contributions[index].astype(np.float64)) / (1 - weight)
    return merge.scaled(block.base, rest, recipe.scale)


def output_dtype(tensor: Tensor, config: FuseConfig) -> str:
    """The safetensors dtype that a base tensor is fused to."""
    return DTYPE_NAMES[config.dtype] if config.dtype else tensor.dtype


class _Sink:
    """Rounds, hashes and writes one model's (or one state's) tensors in a thread of its own."""

    def __init__(self, folder: Location, base: Checkpoint, config: FuseConfig, *, state: str | None = None) -> None:
        self._layouts = {
            name: Layout(name, "F32" if state else output_dtype(tensor, config), tensor.shape)
            if tensor.floating
            else Layout(name, tensor.dtype, tensor.shape)
            for name, tensor in base.body.items()
            if tensor.floating or not state
        }
        ordered = file_order(list(self._layouts.values()))
        self.names = [item.name for item in ordered if item.dtype in FLOATING]
        self._ahead = ordered
        self._base = base
        self._in_name_order = self.names == sorted(self.names)
        self._hashes_body = state is None
        self._folder = folder
        size = size_in_bytes(config.max_shard_size)
        single = layout.outer_state(state) if state else None
        self._writer = WeightsWriter(folder, list(self._layouts.values()), size, single=single)
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
        digest = ""
        if self._hashes_body:
            digest = "sha256:" + self._body.hexdigest() if self._in_name_order else ""
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
        data = merge.rounded(values, DTYPES[item.dtype]).view(np.uint8).data
        if self._hashes_body and self._in_name_order:
            if start == 0:
                self._body.update(digest_prelude(name, Tensor("", 0, item.dtype, item.shape)))
            self._body.update(data)
        self._writer.write(data)

    def _copy_integers(self) -> None:
        """Integer buffers that come next in the file are the base's own."""
        while self._ahead and self._ahead[0].dtype not in FLOATING:
            item = self._ahead.pop(0)
            self._writer.write(self._base.read(item.name).reshape(-1).view(np.uint8).data)


def _elements(inputs: Inputs) -> int:
    return sum(inputs.base.body[name].size for name in inputs.names)
