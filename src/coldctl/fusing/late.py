"""Find contributions that arrived after their iteration was fused, so that a later iteration can fuse them.

The manifests of the fused models are the only record: a contribution that one of them records, fused or rejected, is
not fused again. A name counts once per iteration, and a body once in the whole RUN.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coldctl.artifacts import layout, manifest
from coldctl.artifacts.manifest import ContributionRecord, Manifest
from coldctl.checkpoints.digests import body_digest
from coldctl.common.errors import ManifestError
from coldctl.common.progress import Progress
from coldctl.fusing.contributions import Contribution
from coldctl.storage.location import Location, children


@dataclass(frozen=True)
class RecordedContributions:
    """The names and body digests of the contributions that the fused models of a RUN record."""

    names: frozenset[str]
    digests: frozenset[str]


def late_name(name: str, number: int) -> str:
    """Return the name under which a later iteration fuses a contribution to iteration `number`.

    >>> late_name("guest", 1)
    'guest-iteration-001'
    """
    return f"{name}-{layout.iteration(Path(), number).name}"


def recorded_contributions(run: Location, *, but: int) -> RecordedContributions:
    """Return what the fused models of a RUN record, except that of iteration `but`. Raises ManifestError."""
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
    return RecordedContributions(frozenset(names), frozenset(digests - {""}))


def late_contributions(run: Location, number: int, recorded: RecordedContributions) -> dict[str, str]:
    """Return the complete contributions to iterations before `number` that no fused model records: places by name.

    A contribution whose manifest cannot be read is included. `load_contributions` reports what is wrong with it.
    """
    places = {}
    for earlier in layout.iteration_numbers(run):
        folder = layout.contributions(run, earlier)
        if earlier >= number or not folder.is_dir():
            continue
        for place in children(folder):
            name = late_name(place.name, earlier)
            if name in recorded.names or place.name.startswith(".") or not layout.is_complete(place):
                continue
            try:
                if manifest.read(place)["body_digest"] in recorded.digests:
                    continue
            except ManifestError:
                pass
            places[name] = str(place)
    return places


def drop_duplicates(
    contributions: Sequence[Contribution], recorded: RecordedContributions, progress: Progress
) -> list[Contribution]:
    """Drop contributions that an earlier fused model records, and contributions with the same body as another one.

    Among equal bodies a contribution to this iteration is kept before a late one, then the first by name. The order of
    the contributions stays.
    """
    by_digest: dict[str, list[Contribution]] = {}
    for contribution in sorted(contributions, key=lambda contribution: (contribution.late, contribution.name)):
        if contribution.stated_digest:
            by_digest.setdefault(contribution.stated_digest, []).append(contribution)
    copies: dict[str, str] = {}
    for digest, alike in by_digest.items():
        if len(alike) > 1:
            # A manifest may state a digest that its body does not have, so the bodies are read.
            equal = [
                contribution
                for contribution in alike
                if not contribution.rejections and _has_body(contribution, digest)
            ]
            copies |= {contribution.name: equal[0].name for contribution in equal[1:]}
    kept = []
    for contribution in contributions:
        if contribution.age and contribution.stated_digest in recorded.digests:
            progress.note(f"{contribution.name} was given to an earlier iteration, which counted it: it counts once")
        elif contribution.name in copies:
            progress.note(f"{contribution.name} is the same as {copies[contribution.name]}: it counts once")
        else:
            kept.append(contribution)
    return kept


def _has_body(contribution: Contribution, digest: str) -> bool:
    return contribution.checkpoint is not None and body_digest(contribution.checkpoint) == digest


def keep_recorded(contributions: Sequence[Contribution], fused: Manifest, progress: Progress) -> list[Contribution]:
    """Keep only contributions that a complete fused model records. Later arrivals wait for the next iteration."""
    records = fused.get("contributions", [])
    digests = {record.get("body_digest") for record in records} - {""}
    without_digest = {record["name"] for record in records if not record.get("body_digest")}
    kept: list[Contribution] = []
    later: list[str] = []
    for contribution in contributions:
        if contribution.name in without_digest or _digest(contribution) in digests:
            kept.append(contribution)
        else:
            later.append(contribution.name)
    if later:
        progress.note(f"{', '.join(later)} came after this iteration was fused: left to a later one")
    return kept


def _digest(contribution: Contribution) -> str | None:
    stated = contribution.stated_digest or contribution.digest
    return stated or (body_digest(contribution.checkpoint) if contribution.checkpoint else None)
