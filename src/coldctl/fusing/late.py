"""Contributions that came after their iteration was fused: they wait in its folder until a later iteration takes them.

Which have been taken is read off the fused models' manifests, so nothing else has to be kept, or kept in step: what a
fused model lists, fused or rejected, has been counted. A name counts once per iteration, and a body once in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coldctl.artifacts import layout, manifest
from coldctl.artifacts.manifest import ContributionRecord, Manifest
from coldctl.checkpoints.checkpoint import body_digest
from coldctl.common.errors import ManifestError
from coldctl.common.progress import Progress
from coldctl.fusing.contributions import Candidate
from coldctl.storage.location import Location, children


@dataclass(frozen=True)
class Listed:
    """What the fused models of a RUN list: names as late ones are called, and body digests."""

    names: frozenset[str]
    digests: frozenset[str]


def late_name(name: str, number: int) -> str:
    """What a contribution to iteration `number` is called when a later one takes it.

    >>> late_name("guest", 1)
    'guest-iteration-001'
    """
    return f"{name}-{layout.iteration(Path(), number).name}"


def listed(run: Location, *, but: int) -> Listed:
    """What the fused models of a RUN list, without that of iteration `but`. Raises ManifestError."""
    names: set[str] = set()
    digests: set[str] = set()
    for number in layout.iteration_numbers(run):
        place = layout.fused(run, number)
        if number == but or not layout.is_complete(place):
            continue
        records: Sequence[ContributionRecord] = manifest.read(place).get("contributions", [])
        for record in records:
            names |= {record["name"], late_name(record["name"], number)}
            digests.add(record.get("body_digest") or "")
    return Listed(frozenset(names), frozenset(digests - {""}))


def waiting(run: Location, number: int, counted: Listed) -> dict[str, str]:
    """Complete contributions in iterations before `number` that nothing has counted yet: places by name, in order.

    One whose manifest cannot be read is among them, for whoever opens it says what is wrong.
    """
    found = {}
    for earlier in layout.iteration_numbers(run):
        folder = layout.contributions(run, earlier)
        if earlier >= number or not folder.is_dir():
            continue
        for place in children(folder):
            name = late_name(place.name, earlier)
            if name in counted.names or place.name.startswith(".") or not layout.is_complete(place):
                continue
            try:
                if manifest.read(place)["body_digest"] in counted.digests:
                    continue
            except ManifestError:
                pass
            found[name] = str(place)
    return found


def counted_once(candidates: Sequence[Candidate], counted: Listed, progress: Progress) -> list[Candidate]:
    """The candidates without those that count already: in an earlier fused model, or under another name here.

    The order stays. A contribution to this iteration goes before a late one, then the first name.
    """
    alike: dict[str, list[Candidate]] = {}
    for item in sorted(candidates, key=lambda item: (item.late, item.name)):
        alike.setdefault(item.stated_digest or "", []).append(item)
    copies: dict[str, str] = {}
    for digest, items in alike.items():
        # What only says that it is the same, and is not, must not stand in the way of the sound one.
        same = [item for item in items if digest and len(items) > 1 and not item.problems and _is(item, digest)]
        copies |= {item.name: same[0].name for item in same[1:]}
    kept = []
    for item in candidates:
        if item.age and item.stated_digest in counted.digests:
            progress.note(f"{item.name} was given to an earlier iteration, which counted it: it counts once")
        elif item.name in copies:
            progress.note(f"{item.name} is the same as {copies[item.name]}: it counts once")
        else:
            kept.append(item)
    return kept


def _is(item: Candidate, digest: str) -> bool:
    return item.checkpoint is not None and body_digest(item.checkpoint) == digest


def as_listed(candidates: Sequence[Candidate], fused: Manifest, progress: Progress) -> list[Candidate]:
    """Those candidates that a complete fused model lists: what has come since is late, and undoes nothing."""
    records = fused.get("contributions", [])
    digests = {record.get("body_digest") for record in records} - {""}
    unread = {record["name"] for record in records if not record.get("body_digest")}
    kept = [item for item in candidates if item.name in unread or _digest(item) in digests]
    if since := [item.name for item in candidates if item not in kept]:
        progress.note(f"{', '.join(since)} came after this iteration was fused: left to a later one")
    return kept


def _digest(item: Candidate) -> str | None:
    known = item.stated_digest or item.digest
    return known or (body_digest(item.checkpoint) if item.checkpoint else None)
