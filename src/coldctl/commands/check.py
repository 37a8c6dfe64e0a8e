"""`coldctl check`: would these checkpoints fuse? Judged from headers, in milliseconds, or with `--deep` from all bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coldctl.artifacts import layout, signatures
from coldctl.artifacts.model_ref import Model
from coldctl.artifacts.signatures import TrustedKey
from coldctl.checkpoints.checkpoint import Checkpoint, body_digest, open_checkpoint
from coldctl.checkpoints.decoded import RelativeCheckpoint
from coldctl.checkpoints.header import DTYPES
from coldctl.common.errors import ColdctlError
from coldctl.common.progress import Progress
from coldctl.fusing.blocks import block_length
from coldctl.fusing.compatibility import compare
from coldctl.fusing.contributions import Candidate, gather
from coldctl.fusing.passes import differences
from coldctl.storage.remote import open_folder

NOT_EXAMINED = ("values (not-a-number, infinity)", "digests of files and body")
NOT_EXAMINED_DEEP = ("whether its data or training were what its manifest says",)


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
    """All verdicts, and what was not examined."""

    checked: tuple[Checked, ...]
    not_examined: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing speaks against any of them."""
        return not any(item.problems for item in self.checked)


def check(
    references: Sequence[str],
    base: Model | None,
    *,
    deep: bool,
    verify_key: Path | None,
    trusted_keys: Path | None,
    progress: Progress,
) -> Report:
    """Examine checkpoints, and against `base` if one is given; with keys whether and by whom they are signed, all files.

    `verify_key` is one public key, `trusted_keys` a directory of them. Raises ModelError if there are no checkpoints to
    be found, ConfigError if a key cannot be read.
    """
    keys = [signatures.public_key(verify_key, "--verify-key")] if verify_key is not None else []
    keys += signatures.trusted_keys(trusted_keys) if trusted_keys is not None else []
    base_checkpoint = open_checkpoint(base.folder, base.name) if base is not None else None
    base_digest = None
    if base_checkpoint is not None:
        base_digest = base_checkpoint.manifest["body_digest"] if base_checkpoint.manifest else None
        if base_digest is None and deep:
            base_digest = body_digest(base_checkpoint)
    candidates = gather(references, progress, base_checkpoint)
    progress.begin("check", len(candidates), "checkpoints")
    checked = []
    for item in candidates:
        if item.checkpoint is not None and base_checkpoint is not None:
            verdict = compare(base_checkpoint, item.checkpoint, base_digest, allow_other_base=False)
            item.problems += verdict.problems
            item.notes += verdict.notes
        undecodable = isinstance(item.checkpoint, RelativeCheckpoint) and item.problems
        if item.checkpoint is not None and deep and not undecodable:
            try:
                item.problems += _deep_problems(item.checkpoint)
            except ColdctlError as error:  # one unreadable checkpoint hides no other's verdict
                item.problems.append(error.message)
        if keys:
            item.problems += _unsigned(item, keys)
        checked.append(_checked(item))
        progress.advance("check", 1)
    progress.end("check")
    missing = () if base is not None else ("whether they fit a base (give --base)",)
    undone = NOT_EXAMINED_DEEP if deep else NOT_EXAMINED
    if base_checkpoint is not None and base_digest is None:
        undone = (*undone, "whether the base is the one they were finetuned from (it has no manifest, give --deep)")
    return Report(tuple(checked), (*undone, *missing))


def _unsigned(item: Candidate, keys: Sequence[TrustedKey]) -> list[str]:
    """Return why the signature is not accepted. Note the signer if it is."""
    try:
        signed = signatures.verify(open_folder(item.place), keys)
        signed.check_covers(item.checkpoint.files if item.checkpoint is not None else ())
    except ColdctlError as error:
        return [error.message]
    item.notes.append(f"signed by {signed.key.name}")
    return []


def _checked(item: Candidate) -> Checked:
    checkpoint = item.checkpoint
    if checkpoint is None:
        return Checked(item.name, item.place, "unreadable", 0, 0, tuple(item.problems), tuple(item.notes))
    kind = checkpoint.manifest["kind"] if checkpoint.manifest else "plain checkpoint"
    size = sum(checkpoint.files.values())
    return Checked(item.name, item.place, kind, len(checkpoint.body), size, tuple(item.problems), tuple(item.notes))


def _deep_problems(checkpoint: Checkpoint) -> list[str]:
    """What the bytes say: values that are not finite, digests that do not match."""
    problems = [f"{name} holds a not-a-number or infinity" for name in _not_finite(checkpoint)]
    document = checkpoint.manifest
    if document is None:
        return problems
    problems += differences(checkpoint, body_digest(checkpoint), whole=True)
    problems += [
        f"{name} is not named in the manifest"
        for name in checkpoint.folder.names()
        if name not in document["files"] and name not in (layout.MANIFEST, layout.SIGNATURE, *layout.KEPT_BY_GIT)
    ]
    return problems


def _not_finite(checkpoint: Checkpoint) -> list[str]:
    length = block_length(8)
    buffer = memoryview(bytearray(length * 8))
    found = []
    for name, tensor in checkpoint.body.items():
        dtype = DTYPES[tensor.dtype]
        for start in range(0, tensor.size if tensor.floating else 0, length):
            part = buffer[: (min(start + length, tensor.size) - start) * dtype.itemsize]
            checkpoint.read_into(tensor, start, part)
            if not np.isfinite(np.frombuffer(part, dtype).astype(np.float64)).all():
                found.append(name)
                break
    return found
