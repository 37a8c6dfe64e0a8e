"""Find contributions that arrived after their iteration was fused, so that a later iteration can fuse them.

The manifests of the fused models are the only record: a contribution that one of them lists, fused or rejected, is not
fused again. A name counts once per iteration, and a body once in the whole RUN.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coldctl.artifacts import layout, manifest
from coldctl.artifacts.manifest import ContributionRecord, Manifest
from coldctl.checkpoints.digests import body_digest
from coldctl.common.errors import ManifestError
from coldctl.common.progress import Progress
from coldctl.fusing.contributions import Candidate
from coldctl.storage.location import Location, children


@dataclass(frozen=True)
class Listed:
    """The names and body digests of the contributions that the fused models of a RUN list."""

    names: frozenset[str]
    digests: frozenset[str]


def late_name(name: str, number: int) -> str:
    """Return the name under which a later iteration fuses a contribution to iteration `number`.

    >>> late_name("guest", 1)
    'guest-iteration-001'
    """
    return f"{name}-{layout.iteration(Path(), number).name}"


def listed(run: Location, *, but: int) -> Listed:
    """Return what the fused models of a RUN list, except that of iteration `but`. Raises ManifestError."""
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
    """Return the complete contributions to iterations before `number` that no fused model lists: places by name.

    A contribution whose manifest cannot be read is included. `gather` reports what is wrong with it.
    """
    places = {}
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
            places[name] = str(place)
    return places


def counted_once(candidates: Sequence[Candidate], counted: Listed, progress: Progress) -> list[Candidate]:
    """Drop candidates that an earlier fused model lists, and candidates with the same body as another one.

    Among equal bodies a contribution to this iteration is kept before a late one, then the first by name. The order of
    the candidates stays.
    """
    alike: dict[str, list[Candidate]] = {}
    for item in sorted(candidates, key=lambda item: (item.late, item.name)):
        alike.setdefault(item.stated_digest or "", []).append(item)
    copies: dict[str, str] = {}
    for digest, items in alike.items():
        # A manifest may state a digest that its body does not have, so the bodies are read.
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
    """Keep only candidates that a complete fused model lists. Later arrivals wait for the next iteration."""
    records = fused.get("contributions", [])
    digests = {record.get("body_digest") for record in records} - {""}
    unread = {record["name"] for record in records if not record.get("body_digest")}
    kept = [item for item in candidates if item.name in unread or _digest(item) in digests]
    if since := [item.name for item in candidates if item not in kept]:
        progress.note(f"{', '.join(since)} came after this iteration was fused: left to a later one")
    return kept


def _digest(item: Candidate) -> str | None:
    stated = item.stated_digest or item.digest
    return stated or (body_digest(item.checkpoint) if item.checkpoint else None)
