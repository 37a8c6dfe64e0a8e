"""Find, open and de-duplicate contributions, in an order that depends on them alone.

Late contributions arrived after their iteration was fused, so that a later iteration fuses them. The manifests of the
fused models are the only record: a contribution that one of them records, fused or rejected, is not fused again. A name
counts once per iteration, and a body once in the whole RUN.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from coldctl.artifacts import layout, manifest, signatures
from coldctl.artifacts.manifest import ContributionRecord, Manifest
from coldctl.artifacts.model_ref import as_text, resolve
from coldctl.artifacts.signatures import Signed, TrustedKey
from coldctl.checkpoints.checkpoint import Checkpoint, read_manifest, shared
from coldctl.checkpoints.digests import body_digest
from coldctl.checkpoints.formats import open_contribution
from coldctl.common.errors import ColdctlError, ManifestError, ModelError
from coldctl.common.progress import Progress
from coldctl.fusing.late import Ancestry
from coldctl.storage.local import Folder, LocalFolder
from coldctl.storage.location import Location, children, is_url
from coldctl.storage.remote import RemoteFolder, look_ahead, open_folder, remote_folders

_OTHER_FILES = 256  # that a process has open beside its inputs: libraries, sockets, the output
_AT_ONCE = 16  # checkpoints in a store that are opened side by side


@dataclass(frozen=True)
class Contribution:
    """A contribution that was offered to a fuse, with the reasons to reject it and the notes so far.

    Steps that judge or read it return another object with more of both.
    """

    name: str
    place: str
    checkpoint: Checkpoint | None  # None if it could not even be opened
    rejections: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str | None = None  # of the body, computed or (unverified) stated
    verified: bool = False
    signed: Signed | None = None  # where only signed ones are accepted: by whom, and what the signature covers
    age: int = 0  # how many generations ago its base was the base
    original_base: Checkpoint | None = None  # that base, if it is not the current one
    late: bool = False  # from an earlier iteration: its rejection does not stop the fuse
    attacking: bool = False  # its weights are unsound: it counts among the attackers that multi-krum expects

    @property
    def contributor(self) -> str:
        """Return its name without the suffix that a late contribution gets."""
        manifest = self.checkpoint.manifest if self.checkpoint else None
        return manifest["name"] if self.late and manifest else self.name

    @property
    def stated_digest(self) -> str | None:
        """Return the body digest that its manifest states."""
        return self.checkpoint.manifest["body_digest"] if self.checkpoint and self.checkpoint.manifest else None

    def judged(self, rejections: Iterable[str], notes: Iterable[str] = ()) -> "Contribution":
        """Return this contribution with more reasons to reject it and more notes."""
        return replace(self, rejections=(*self.rejections, *rejections), notes=(*self.notes, *notes))


@dataclass(frozen=True)
class Accepted:
    """A contribution that is fused: its weight and, if updates were measured, the statistics of its own."""

    contribution: Contribution
    weight: float
    update_norm: float | None = None
    cosine_to_mean: float | None = None
    update_share: dict[str, float] | None = None  # of the squared norm, per group of layers


def load_contributions(
    references: Sequence[str],
    progress: Progress,
    base: Checkpoint | None = None,
    *,
    allow_pickle: bool = False,
    trusted: Sequence[TrustedKey] | None = None,
    ancestry: Ancestry | None = None,
    late: Mapping[str, str] | None = None,
    to_read: bool = False,
) -> list[Contribution]:
    """Open checkpoints, and the checkpoints directly inside folders. Adapters and deltas need `base` to be decoded.

    With `trusted` keys nothing of a checkpoint is opened unless one of them signed it and all its files are as signed.
    With an `ancestry` those made on one of its bodies are opened on that. `late` are the places, by name, of
    contributions that belong to earlier iterations. `to_read` says that the weights will be read, not their headers alone.

    Returns the contributions sorted by stated body digest, or by name where no digest is stated. A checkpoint that cannot
    be opened is a rejected contribution. Raises ModelError for an argument that holds no checkpoint.
    """
    offered = [folder for reference in references for folder in _folders_at(reference, progress, needed=not late)]
    folders = _without_duplicates(offered, progress)
    late_folders = [_ContributionFolder(name, open_folder(place)) for name, place in (late or {}).items()]
    _allow_files(len(folders) + len(late_folders))
    remote = [item.folder for item in (*folders, *late_folders) if isinstance(item.folder, RemoteFolder)]
    if to_read:  # a header comes with what is read after it
        look_ahead(remote)
    decoder = shared(base) if base is not None else None
    opened = partial(_open, base=decoder, allow_pickle=allow_pickle, trusted=trusted, ancestry=ancestry)
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # a store answers many requests in the time of one
        contributions = list(
            pool.map(opened, (*folders, *late_folders)) if remote else map(opened, (*folders, *late_folders))
        )
    for place, index in zip(late_folders, range(len(folders), len(contributions)), strict=True):
        contributions[index] = replace(contributions[index], name=place.name, late=True)
    names = [contribution.name for contribution in contributions]
    for index, contribution in enumerate(contributions):
        if names.count(contribution.name) > 1 and contribution.checkpoint and contribution.stated_digest is None:
            digest = body_digest(contribution.checkpoint)  # equal names do not order: their bodies do
            contributions[index] = replace(contribution, digest=digest)
    contributions.sort(key=lambda one: (one.stated_digest or one.name, one.digest or "", one.name))
    return _with_own_names(_without_copies(contributions))


def _with_own_names(contributions: Iterable[Contribution]) -> list[Contribution]:
    """Return contributions with a suffix where their name is taken; one that is refused takes nobody's name."""
    named = list(contributions)
    taken: set[str] = set()
    for index in sorted(range(len(named)), key=lambda index: bool(named[index].rejections)):
        name = next(name for name in free_names(named[index].name) if name not in taken)
        named[index] = replace(named[index], name=name)
        taken.add(name)
    return named


def free_names(name: str) -> Iterator[str]:
    """Yield a name, then the same name with the suffixes -2, -3 and so on."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def _allow_files(count: int) -> None:
    """Let this process hold `count` checkpoints open side by side. Raises ModelError where the system forbids it."""
    try:
        import resource
    except ImportError:  # pragma: no cover - a system that knows no such limit
        return
    needed = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ModelError(
            f"{count} contributions are more files than one process may open here ({hard}): raise that limit (`ulimit -n`), or "
            "fuse them in groups and then the groups (docs/scale.md)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@dataclass(frozen=True)
class _ContributionFolder:
    """A folder that holds a checkpoint, and the checkpoint's name."""

    name: str
    folder: Folder

    @property
    def place(self) -> str:
        return self.folder.label


def _without_duplicates(folders: Sequence[_ContributionFolder], progress: Progress) -> list[_ContributionFolder]:
    """Return each folder once, so that a checkpoint that two arguments name does not count twice."""
    seen: set[str] = set()
    kept = []
    for folder in folders:
        real = folder.place if is_url(folder.place) else str(Path(folder.place).resolve())
        if real in seen:
            progress.note(f"{folder.place} was given twice: it counts once")
        else:
            kept.append(folder)
        seen.add(real)
    return kept


def _folders_at(reference: str, progress: Progress, *, needed: bool) -> list[_ContributionFolder]:
    """Return the checkpoint that an argument names, or those directly inside it. Raises ModelError if there is none."""
    model = resolve(reference)
    whole: Folder
    if is_url(model.place):
        whole, children = remote_folders(model.place)
    else:
        whole = LocalFolder(Path(model.place))
        children = {} if _is_checkpoint(whole) else _children(Path(model.place))
    if _is_checkpoint(whole):
        return [_ContributionFolder(model.name, whole)]
    found = []
    for name, folder in children.items():
        being_put = f".{name}.partial" in children and not folder.has(layout.MANIFEST)  # in a store, file by file
        if name.startswith(".") or being_put:
            progress.note(f"skipped {name}: unfinished work")
        elif not _is_checkpoint(folder):
            progress.note(f"skipped {name}: not a checkpoint")
        else:
            found.append(_ContributionFolder(name, folder))
    if needed and not found:
        raise ModelError(f"{reference} holds no checkpoint and no folder that does: give contributions")
    return found


def _children(folder: Path) -> dict[str, Folder]:
    """Return the directories directly inside a local folder, sorted by name. Raises ModelError."""
    try:
        return {as_text(child.name): LocalFolder(child) for child in sorted(folder.iterdir()) if child.is_dir()}
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror}: check the path") from None


def _is_checkpoint(folder: Folder) -> bool:
    if folder.has(layout.MODEL_CONFIG) or folder.has(layout.ADAPTER_CONFIG):
        return True
    return folder.has(layout.MANIFEST) and not folder.has(layout.RESULTS)  # an evaluation has a manifest, too


def _without_copies(contributions: Sequence[Contribution]) -> Iterator[Contribution]:
    """Yield contributions, duplicates of a signed one as rejected.

    Copying needs no key, so copies could multiply one signer's weight.
    """
    originals: dict[tuple[tuple[str, str], ...], Contribution] = {}
    for contribution in contributions:
        signed = contribution.signed
        original = originals.setdefault(tuple(sorted(signed.files.items())), contribution) if signed else contribution
        if signed and original is not contribution:
            rejection = f"is a copy of {original.name}, which {signed.key.name} signed once: remove it"
            yield contribution.judged([rejection])
        else:
            yield contribution


def _open(
    offered: _ContributionFolder,
    base: Checkpoint | None,
    *,
    allow_pickle: bool,
    trusted: Sequence[TrustedKey] | None,
    ancestry: Ancestry | None,
) -> Contribution:
    """Open one contribution on the base that it was made on. A failure rejects the contribution."""
    signed, age, original_base = None, 0, None
    try:
        if trusted is not None:
            signed = signatures.verify(offered.folder, trusted)
        folder = signed.folder if signed is not None else offered.folder
        stated = read_manifest(folder) if ancestry is not None else None
        if ancestry is not None and stated is not None:
            digest = stated.get("base", {}).get("body_digest", "")
            age = ancestry.age(digest)
            original_base = ancestry.open(digest) if age else None
        checkpoint = open_contribution(folder, offered.name, original_base or base, allow_pickle=allow_pickle)
        if signed is not None:
            signed.check_covers(checkpoint.files)
    except ColdctlError as error:
        return Contribution(offered.name, offered.place, None, rejections=(error.message,), age=age)
    name = checkpoint.manifest["name"] if checkpoint.manifest is not None else offered.name
    return Contribution(name, offered.place, checkpoint, signed=signed, age=age, original_base=original_base)


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
