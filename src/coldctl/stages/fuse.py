"""`coldctl fuse`: average the bodies of contributions into a better base model.

The flow: open everything by header, compare with the base, read all bodies side by side in blocks, write the
fused body as it comes, and only publish it when every digest and every number has been found good.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.core import layout, manifest, merge, output
from coldctl.core.blocks import Block, Digester, read_blocks
from coldctl.core.candidates import Candidate, gather
from coldctl.core.checkpoint import DTYPES, FLOATING, Checkpoint, Tensor, body_digest, open_checkpoint
from coldctl.core.compatibility import compare
from coldctl.core.config import FuseConfig, as_record, identity, size_in_bytes
from coldctl.core.describe import bare_config
from coldctl.core.errors import CheckpointError, DeclinedError
from coldctl.core.manifest import ContributionRecord, Manifest
from coldctl.core.progress import Progress
from coldctl.core.reference import Model
from coldctl.core.statistics import NotFinite, UpdateStatistics, names_of, not_finite
from coldctl.core.storage import LocalFolder
from coldctl.core.weights import Layout, WeightsWriter, file_order

_DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Fused:
    """What `fuse` did: the fused model's manifest, and whether it already stood there."""

    path: Path
    manifest: Manifest
    unchanged: bool


def fuse(
    references: Sequence[str],
    base: Model,
    destination: Path,
    config: FuseConfig,
    *,
    overwrite: bool,
    progress: Progress,
) -> Fused:
    """Fuse contributions into `destination`. Nothing is written unless all that goes in was found good.

    Raises CheckpointError (with one detail per finding) if an input cannot be fused and `config.screen` is not
    "reject", DeclinedError if too few remain or `config.strict` forbids a drop, OutputError.
    """
    base_checkpoint = open_checkpoint(base.folder, base.name)
    candidates = gather(references, progress)
    base_digest = _stated(base_checkpoint)
    if base_digest is None and any(item.checkpoint and item.checkpoint.manifest for item in candidates):
        base_digest = body_digest(base_checkpoint)
    for item in candidates:
        if item.checkpoint is not None:
            verdict = compare(base_checkpoint, item.checkpoint, base_digest, allow_other_base=config.allow_other_base)
            item.problems += verdict.problems
            item.notes += verdict.notes
    if layout.is_complete(destination):
        key = _identity(config, base_digest or body_digest(base_checkpoint), candidates)
        if output.is_done(destination, key, overwrite=overwrite):
            return Fused(destination, manifest.read(destination), unchanged=True)
    output.is_done(destination, "", overwrite=overwrite)
    accepted = _accepted(candidates, config)
    with output.writing(destination, None, overwrite=True) as partial:
        while True:
            written = _fuse_once(base_checkpoint, accepted, partial, config, progress)
            still_good = _accepted(candidates, config)
            if len(still_good) == len(accepted):
                break
            accepted = still_good
        document = _describe(base, base_checkpoint, written, candidates, accepted, partial, destination, config)
    return Fused(destination, document, unchanged=False)


def _stated(checkpoint: Checkpoint) -> str | None:
    return checkpoint.manifest["body_digest"] if checkpoint.manifest else None


def _accepted(candidates: Sequence[Candidate], config: FuseConfig) -> list[Candidate]:
    """The candidates without problems. Raises if a problem must stop everything."""
    good = [item for item in candidates if not item.problems]
    details = [f"{item.name}: {problem}" for item in candidates for problem in item.problems]
    if not details:
        return good
    bad = len(candidates) - len(good)
    if config.strict:
        raise DeclinedError(
            f"{bad} of {len(candidates)} contributions would be dropped, and --strict forbids that", details
        )
    if config.screen != "reject":
        raise CheckpointError(
            f"{bad} of {len(candidates)} contributions cannot be fused: mend or remove them, or drop them with --screen reject",
            details,
        )
    least = config.min_contributions or len(candidates) // 2 + 1
    if len(good) < least:
        raise CheckpointError(
            f"only {len(good)} of {len(candidates)} contributions can be fused, {least} are needed: "
            "mend the others, or lower --min-contributions",
            details,
        )
    return good


@dataclass(frozen=True)
class _Written:
    """What one pass over the inputs has left on disk."""

    body_digest: str
    base_digest: str
    digests: dict[str, str]  # of the weight files


def _fuse_once(
    base: Checkpoint, accepted: Sequence[Candidate], partial: Path, config: FuseConfig, progress: Progress
) -> _Written:
    """Read everything once and write the fused weights. Findings about inputs are left in their `problems`."""
    inputs = [item.checkpoint for item in accepted if item.checkpoint is not None]
    layouts = [
        Layout(name, _output_dtype(tensor, config), tensor.shape)
        if tensor.floating
        else Layout(name, tensor.dtype, tensor.shape)
        for name, tensor in base.body.items()
    ]
    ordered = file_order(layouts)
    names = [item.name for item in ordered if item.dtype in FLOATING]
    in_name_order = names == sorted(names)  # digests are taken in name order; mixed dtypes are written in another
    digesters = [
        Digester(checkpoint, files=config.verify and checkpoint.manifest is not None)
        if in_name_order and take
        else None
        for checkpoint, take in [(base, True), *((checkpoint, config.verify) for checkpoint in inputs)]
    ]
    statistics = UpdateStatistics(len(inputs)) if config.screen != "off" else None
    findings: list[NotFinite] = []
    writer = WeightsWriter(partial, layouts, size_in_bytes(config.max_shard_size))
    progress.begin("fuse", sum(base.body[name].size for name in names), "weights")
    try:
        for item in ordered:
            if item.dtype not in FLOATING:
                writer.write(base.read(item.name).reshape(-1).view(np.uint8).data)
        for block in read_blocks(base, inputs, names, digesters):
            averaged = _mean(block)
            findings += not_finite(block, averaged)
            if statistics is not None:
                statistics.add(block, averaged)
            values = merge.rounded(averaged, DTYPES[_output_dtype(base.body[block.name], config)])
            writer.write(values.view(np.uint8).data)
            progress.advance("fuse", block.stop - block.start)
        writer.close()
    finally:
        writer.abandon()
        progress.end("fuse")
    _report_findings(findings, base, accepted)
    _verify(base, [None, *accepted], digesters, config)
    if statistics is not None:
        for candidate, norm, cosine in zip(accepted, statistics.norms, statistics.cosines, strict=True):
            candidate.update_norm, candidate.cosine_to_mean = norm, cosine
    base_digest = digesters[0].body_digest() if digesters[0] else body_digest(base)
    # What is digested is what stands on disk, read back.
    _write_config(base, partial, config)
    return _Written(body_digest(open_checkpoint(LocalFolder(partial), "fused")), base_digest, writer.digests)


def _mean(block: Block) -> NDArray[np.float64]:
    if any(part.dtype == np.float64 for part in block.contributions):
        return merge.mean_of_doubles([part.astype(np.float64) for part in block.contributions])
    return merge.mean(block.contributions)


def _output_dtype(tensor: Tensor, config: FuseConfig) -> str:
    return _DTYPE_NAMES[config.dtype] if config.dtype else tensor.dtype


def _report_findings(findings: Sequence[NotFinite], base: Checkpoint, accepted: Sequence[Candidate]) -> None:
    if tensors := names_of(findings, -1):
        raise CheckpointError(f"{base.label}: {tensors[0]} holds a not-a-number or infinity: take a sound base model")
    for index, item in enumerate(accepted):
        if tensors := names_of(findings, index):
            more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
            item.problems.append(f"{tensors[0]}{more} holds a not-a-number or infinity")


def _verify(
    base: Checkpoint, accepted: Sequence[Candidate | None], digesters: Sequence[Digester | None], config: FuseConfig
) -> None:
    """Compare what was read with what the manifests state; differences become problems of the contribution."""

    def check(item: Candidate | None, digester: Digester | None) -> None:
        checkpoint = base if item is None else item.checkpoint
        assert checkpoint is not None
        if not config.verify:
            if item is not None:
                item.digest = item.stated_digest
            return
        actual = digester.body_digest() if digester else body_digest(checkpoint)
        problems = _differences(checkpoint, actual, digester)
        if item is None:
            if problems:
                raise CheckpointError(f"{base.label}: {problems[0]}: make or fetch the base model again")
        else:
            item.digest = actual
            item.verified = checkpoint.manifest is not None and not problems
            item.problems += problems

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check, accepted, digesters))


def _differences(checkpoint: Checkpoint, actual: str, digester: Digester | None) -> list[str]:
    document = checkpoint.manifest
    if document is None:
        return []
    problems = []
    if document["body_digest"] != actual:
        problems.append(f"its body is {actual[:19]}…, its manifest says {document['body_digest'][:19]}…")
    weights = digester.file_digests() if digester else {}
    for name, stated in sorted(document["files"].items()):
        if not checkpoint.folder.has(name):
            problems.append(f"{name} is missing")
        elif name in weights:
            if weights[name] != stated:
                problems.append(f"{name} was changed after it was written")
        elif manifest.digest_of_bytes(checkpoint.folder.read(name)) != stated:
            problems.append(f"{name} was changed after it was written")
    return problems


def _write_config(base: Checkpoint, partial: Path, config: FuseConfig) -> None:
    dtype = config.dtype or {name: key for key, name in _DTYPE_NAMES.items()}.get(
        next((tensor.dtype for tensor in base.body.values() if tensor.floating), "F32")
    )
    document = bare_config(base.config, dtype)
    (partial / layout.MODEL_CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _describe(
    base: Model,
    checkpoint: Checkpoint,
    written: _Written,
    candidates: Sequence[Candidate],
    accepted: Sequence[Candidate],
    partial: Path,
    destination: Path,
    config: FuseConfig,
) -> Manifest:
    """Copy the base's tokenizer and write the manifest: the last file."""
    for name in layout.TOKENIZER_FILES:
        if checkpoint.folder.has(name):
            (partial / name).write_bytes(checkpoint.folder.read(name))
    before = checkpoint.manifest
    number = (before.get("iteration") or 0) + 1 if before else 1
    name = destination.resolve().name
    if name == "fused" and destination.resolve().parent.name.startswith("iteration-"):
        name = destination.resolve().parent.name
    ancestor = (
        manifest.shortened(before)
        if before
        else {"kind": "pretrained", "name": base.name, "body_digest": written.base_digest}
    )
    document: Manifest = {
        "kind": "fused",
        "name": name,
        "iteration": number,
        "encoding": "full",
        "identity": _identity(config, written.base_digest, candidates),
        "body_digest": written.body_digest,
        "base": {"name": before["name"] if before else base.name, "body_digest": written.base_digest},
        "config": as_record(config),
        "environment": manifest.environment(["numpy", "ml-dtypes"]),
        "license": before.get("license") if before else None,
        "contributions": [_record(item, len(accepted) if item in accepted else 0) for item in candidates],
        "ancestors": [*(before.get("ancestors", []) if before else []), ancestor],
    }
    return manifest.write(partial, document, written.digests)


def _record(item: Candidate, shares: int) -> ContributionRecord:
    source = item.checkpoint.manifest if item.checkpoint else None
    data = source.get("dataset", {}) if source else {}
    return {
        "name": item.name,
        "dataset": data.get("name"),
        "num_train": data.get("num_train"),
        "license": source.get("license") if source else None,
        "body_digest": item.digest or "",
        "weight": 1 / shares if shares else 0.0,
        "status": "fused" if shares else "rejected",
        "reason": "; ".join(item.problems) or None,
        "verified": item.verified,
        "age": 0,
        "signer": None,
        "update_norm": item.update_norm if shares else None,
        "cosine_to_mean": item.cosine_to_mean if shares else None,
    }


def _identity(config: FuseConfig, base_digest: str, candidates: Sequence[Candidate]) -> str:
    """The config and the digests of all that was offered, whether it was then fused or not."""
    digests: list[Any] = []
    for item in candidates:
        if item.checkpoint is None:
            digests.append([item.name, *item.problems])
        else:
            digests.append(item.stated_digest or item.digest or body_digest(item.checkpoint))
    return identity("fuse", config, base=base_digest, contributions=digests)
