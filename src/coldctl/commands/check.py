"""`coldctl check`: would these checkpoints fuse? Judged from headers, with `--deep` from all bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coldctl.artifacts import layout, signatures
from coldctl.artifacts.model_ref import Model
from coldctl.artifacts.signatures import TrustedKey
from coldctl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from coldctl.checkpoints.digests import body_digest
from coldctl.checkpoints.header import DTYPES
from coldctl.common.errors import ColdctlError
from coldctl.common.progress import Progress
from coldctl.fusing.blocks import block_length
from coldctl.fusing.compatibility import compare
from coldctl.fusing.contributions import Contribution, load_contributions
from coldctl.fusing.passes import manifest_mismatches
from coldctl.storage.remote import open_folder

NOT_EXAMINED: tuple[str, ...] = ("values (not-a-number, infinity)", "digests of files and body")
NOT_EXAMINED_DEEP: tuple[str, ...] = ("whether its data or training were what its manifest says",)


@dataclass(frozen=True)
class Checked:
    """The verdict on one checkpoint."""

    name: str
    place: str
    kind: str
    tensors: int
    bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The verdicts on all checkpoints, and what was not examined."""

    checked: tuple[Checked, ...]
    not_examined: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Return True if no checkpoint has a problem."""
        return not any(checked.problems for checked in self.checked)


def check(
    references: Sequence[str],
    base: Model | None,
    *,
    deep: bool,
    verify_key: Path | None,
    trusted_keys: Path | None,
    progress: Progress,
) -> Report:
    """Examine checkpoints: whether they fit `base`, if it is given, and whether one of the keys signed all their files.

    `verify_key` is one public key, `trusted_keys` a directory of them. Raises ModelError if there are no checkpoints,
    ConfigError if a key cannot be read.
    """
    keys = [signatures.public_key(verify_key, "--verify-key")] if verify_key is not None else []
    keys += signatures.trusted_keys(trusted_keys) if trusted_keys is not None else []
    base_checkpoint = open_checkpoint(base.folder, base.name) if base is not None else None
    base_digest = None
    if base_checkpoint is not None and base_checkpoint.manifest is not None:
        base_digest = base_checkpoint.manifest["body_digest"]
    elif base_checkpoint is not None and deep:
        base_digest = body_digest(base_checkpoint)
    contributions = load_contributions(references, progress, base_checkpoint)
    progress.begin("check", len(contributions), "checkpoints")
    checked = []
    for contribution in contributions:
        judged = contribution
        if contribution.checkpoint is not None and base_checkpoint is not None:
            verdict = compare(base_checkpoint, contribution.checkpoint, base_digest, allow_other_base=False)
            judged = contribution.judged(verdict.rejections, verdict.notes)
        if deep:
            judged = judged.judged(_deep_rejections(judged))
        if keys:
            judged = _judged_by_signature(judged, keys)
        checked.append(_checked(judged))
        progress.advance("check", 1)
    progress.end("check")
    not_examined = NOT_EXAMINED_DEEP if deep else NOT_EXAMINED
    if base_checkpoint is None:
        not_examined += ("whether they fit a base (give --base)",)
    elif base_digest is None:
        not_examined += ("whether the base is the one they were finetuned from (it has no manifest, give --deep)",)
    return Report(tuple(checked), not_examined)


def _checked(contribution: Contribution) -> Checked:
    kind, tensors, size = "unreadable", 0, 0
    if (checkpoint := contribution.checkpoint) is not None:
        kind = checkpoint.manifest["kind"] if checkpoint.manifest else "plain checkpoint"
        tensors, size = len(checkpoint.body), sum(checkpoint.files.values())
    name, place = contribution.name, contribution.place
    return Checked(name, place, kind, tensors, size, contribution.rejections, contribution.notes)


def _judged_by_signature(contribution: Contribution, keys: Sequence[TrustedKey]) -> Contribution:
    """Return a contribution with the reason why its signature is not accepted, or else its signer as a note."""
    try:
        signed = signatures.verify(open_folder(contribution.place), keys)
        signed.check_covers(contribution.checkpoint.files if contribution.checkpoint is not None else ())
    except ColdctlError as error:
        return contribution.judged([error.message])
    return contribution.judged([], [f"signed by {signed.key.name}"])


def _deep_rejections(contribution: Contribution) -> list[str]:
    """Return values that are not finite and digests that do not match, or why the checkpoint cannot be read."""
    checkpoint = contribution.checkpoint
    if checkpoint is None or (checkpoint.relative and contribution.rejections):
        return []  # a delta that does not fit its base cannot be decoded
    try:
        return _content_rejections(checkpoint)
    except ColdctlError as error:
        return [error.message]


def _content_rejections(checkpoint: Checkpoint) -> list[str]:
    rejections = [f"{name} holds a not-a-number or infinity" for name in _not_finite(checkpoint)]
    document = checkpoint.manifest
    if document is None:
        return rejections
    rejections += manifest_mismatches(checkpoint, body_digest(checkpoint), whole=True)
    rejections += [
        f"{name} is not named in the manifest"
        for name in checkpoint.folder.names()
        if name not in document["files"] and name not in (layout.MANIFEST, layout.SIGNATURE, *layout.KEPT_BY_GIT)
    ]
    return rejections


def _not_finite(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the body tensors that hold a value that is not finite."""
    length = block_length(8)
    buffer = memoryview(bytearray(length * 8))
    names = []
    for name, tensor in checkpoint.body.items():
        dtype = DTYPES[tensor.dtype]
        for start in range(0, tensor.size if tensor.floating else 0, length):
            block = buffer[: (min(start + length, tensor.size) - start) * dtype.itemsize]
            checkpoint.read_into(name, start, block)
            if not np.isfinite(np.frombuffer(block, dtype).astype(np.float64)).all():
                names.append(name)
                break
    return names
