"""Judge from headers and manifests whether a contribution fits the base."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coldctl.artifacts import layout
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.checkpoint import (
    Checkpoint,
    is_pooler,
    is_vocabulary,
    open_companion,
    with_common_rows,
)
from coldctl.common.errors import CheckpointError, ColdctlError
from coldctl.config.settings import FuseConfig
from coldctl.fusing.contributions import Contribution
from coldctl.fusing.late import generations, rebase
from coldctl.fusing.methods import find_method
from coldctl.fusing.recipe import Need

_LISTED = 3  # names that one finding spells out


@dataclass(frozen=True)
class Verdict:
    """What speaks against fusing a checkpoint, and what is only worth knowing."""

    rejections: Sequence[str]
    notes: Sequence[str]


def compare(base: Checkpoint, other: Checkpoint, base_digest: str | None, *, allow_other_base: bool) -> Verdict:
    """Compare a checkpoint's body with the base's by names, shapes and declared base.

    `base_digest` is the base's body digest where it is known; None leaves that comparison out.
    """
    kinds = base.config["model_type"], other.config["model_type"]
    if kinds[0] != kinds[1]:
        remedy = "take contributions finetuned from this base"
        return Verdict([f"is a {kinds[1]} model, the base a {kinds[0]} model: {remedy}"], [])
    rejections, notes = _compare_tensors(base, other)
    if finding := other_base(other, base_digest):
        remedy = "give that base as --base, or --allow-other-base to fuse it all the same"
        if other.relative:
            remedy = "it is a difference from that one, give it as --base"
        declared = other.manifest["base"].get("body_digest", "") if other.manifest else ""
        if age := generations(base.manifest).get(declared):
            remedy = f"that was the base {age} iteration{'s' if age > 1 else ''} ago, --stale discount takes it"
        if allow_other_base and not other.relative:
            notes.append(finding)
        else:
            rejections.append(f"{finding}: {remedy}")
    if other.original is not None:
        notes.append("has another vocabulary: only the common rows are taken")
    if other.manifest is None:
        notes.append("has no manifest: unverified")
    if words := sanitize.note(other.config):
        notes.append(words)
    return Verdict(rejections, notes)


def _compare_tensors(base: Checkpoint, other: Checkpoint) -> tuple[list[str], list[str]]:
    """Return the rejections and the notes that the names, shapes and dtypes of the tensors give rise to."""
    rejections: list[str] = []
    notes: list[str] = []
    missing = [name for name, tensor in base.body.items() if tensor.floating and name not in other.body]
    if lost := [name for name in missing if not is_pooler(name)]:
        rejections.append(f"lacks {_some(lost)} of the base's body: save the whole body")
    elif missing:
        notes.append("has no pooler: it counts as the base's")
    extra = [name for name, tensor in other.body.items() if tensor.floating and name not in base.body]
    if odd := [name for name in extra if not is_pooler(name)]:
        rejections.append(f"has {_some(odd)}, which the base lacks: take contributions finetuned from this base")
    elif extra:
        notes.append("has a pooler that the base lacks: it is left out")
    shapes: list[str] = []
    for name, tensor in other.body.items():
        known = base.body.get(name)
        if known is None or not known.floating:
            continue
        if tensor.shape != known.shape and not (other.original and is_vocabulary(name)):
            what = "another shape"
            if is_vocabulary(name) and tensor.shape[1:] == known.shape[1:]:
                rows = min(tensor.shape[0], known.shape[0])
                what = f"another vocabulary, --common-rows takes the {rows} rows they share"
            shapes.append(f"{name} is {_shape(tensor.shape)}, the base's is {_shape(known.shape)}: {what}")
        elif not tensor.floating:
            rejections.append(
                f"{name} is stored as {tensor.dtype}, the base's as {known.dtype}: save it in a floating dtype"
            )
    if shapes:
        more = f" (and {len(shapes) - 1} more tensors)" if len(shapes) > 1 else ""
        rejections.append(shapes[0] + more)
    if dtypes := {tensor.dtype for tensor in other.body.values() if tensor.floating} - {
        tensor.dtype for tensor in base.body.values() if tensor.floating
    }:
        notes.append(f"is stored as {', '.join(sorted(dtypes))}, unlike the base")
    return rejections, notes


def other_base(other: Checkpoint, base_digest: str | None) -> str | None:
    """Return the finding that a checkpoint's manifest names another base than this one, None if it does not."""
    if other.manifest is None or base_digest is None or "base" not in other.manifest:
        return None
    declared = other.manifest["base"].get("body_digest")
    if declared == base_digest:
        return None
    number = other.manifest.get("iteration")
    return (
        f"was finetuned from another base: {_short(declared)}"
        f"{f' (iteration {number})' if number is not None else ''}, not {_short(base_digest)}"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _short(digest: object) -> str:
    return f"{digest[:19]}…" if isinstance(digest, str) else "none"


def judge(contribution: Contribution, base: Checkpoint, base_digest: str | None, config: FuseConfig) -> Contribution:
    """Return a contribution, judged by its headers and moved to `base`; with --common-rows other rows are left out first."""
    checkpoint = contribution.checkpoint
    if checkpoint is None:
        return contribution
    if config.common_rows:
        checkpoint = with_common_rows(base, checkpoint)
    presumed = None if contribution.age else base_digest
    verdict = compare(base, checkpoint, presumed, allow_other_base=config.allow_other_base)
    judged = contribution.judged(verdict.rejections, verdict.notes)
    if contribution.original_base is not None and not judged.rejections:
        try:
            checkpoint = rebase(checkpoint, base, contribution.original_base, contribution.age)
        except CheckpointError as error:
            judged = judged.judged([error.message])
    if find_method(config.method).needs is Need.FISHER:
        try:
            open_companion(checkpoint, layout.FISHER)
        except ColdctlError as error:
            judged = judged.judged([f"{error.message}: --method {config.method} needs it"])
    return replace(judged, checkpoint=checkpoint)


def stated_digest(checkpoint: Checkpoint) -> str | None:
    """Return the body digest that a checkpoint's manifest states, None without a manifest."""
    return checkpoint.manifest["body_digest"] if checkpoint.manifest else None


def presumed_base(contributions: Sequence[Contribution], config: FuseConfig) -> str | None:
    """Return the body digest of the base that all manifests agree on, None if they do not agree.

    It stands in for the digest of a base without a manifest. The digest that is taken while reading confirms it later.
    """
    if config.allow_other_base:
        return None
    manifests = [
        contribution.checkpoint.manifest
        for contribution in contributions
        if contribution.checkpoint and contribution.checkpoint.manifest
    ]
    digests = {document.get("base", {}).get("body_digest") for document in manifests}
    return digests.pop() if len(digests) == 1 else None
