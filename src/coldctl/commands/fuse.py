"""`coldctl fuse`: average the bodies of contributions into a better base model.

The flow: open everything by header, compare with the base, read all bodies side by side in blocks, write the
fused body as it comes, and only publish it when every digest and every number has been found good.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from coldctl.artifacts import layout, manifest, output, run, signatures
from coldctl.artifacts.manifest import ContributionRecord, Manifest
from coldctl.artifacts.model_ref import Model
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from coldctl.checkpoints.digests import body_digest
from coldctl.common.errors import BusyError, CheckpointError, ConfigError, ManifestError, ModelError
from coldctl.common.progress import SILENT, Progress
from coldctl.config.loading import ConfigFile, resolve
from coldctl.config.settings import FuseConfig
from coldctl.evaluation import charts
from coldctl.fusing.compatibility import judge, presumed_base, stated_digest
from coldctl.fusing.contributions import (
    Contribution,
    drop_duplicates,
    keep_recorded,
    late_contributions,
    load_contributions,
    recorded_contributions,
)
from coldctl.fusing.distributed import spread_over
from coldctl.fusing.fusion import DrawChart, Fusion, check_config
from coldctl.fusing.late import Ancestry
from coldctl.fusing.record import FuseRequest
from coldctl.storage.location import Location, locate
from coldctl.storage.remote import open_folder
from coldctl.workers.jobs import Engine


@dataclass(frozen=True)
class Fused:
    """The result of a fuse. `unchanged` says that the same model was complete already."""

    path: Location
    manifest: Manifest
    unchanged: bool


@dataclass(frozen=True)
class _Offer:
    """The contributions that a fuse is given: MODELs or folders, where old bases are, and which of them to take."""

    references: Sequence[str]
    old_bases: Sequence[str] = ()
    manifests_only: bool = False
    to_read: bool = True

    @property
    def home(self) -> tuple[Location, int] | None:
        """The RUN and the iteration if the references are exactly an iteration's contributions."""
        return layout.iteration_of(locate(self.references[0])) if len(self.references) == 1 else None


def fuse(
    references: Sequence[str],
    base: Model,
    destination: Location,
    config: FuseConfig,
    *,
    overwrite: bool,
    progress: Progress,
    old_bases: Sequence[str] = (),
    engine: Engine | None = None,
) -> Fused:
    """Fuse contributions into `destination`. Nothing is written unless all inputs are sound.

    If the contributions are those of an iteration of a RUN, late ones of earlier iterations are fused as well, and
    contributions that arrive after the iteration was fused do not change it. `old_bases` are MODELs that contributions
    may have been made on. With an `engine` of several machines each machine reads, computes and writes a share of the
    weights.

    Raises CheckpointError (with one detail per finding) if an input cannot be fused and `config.screen` is not
    "reject", DeclinedError if `config.strict` forbids a drop, ConfigError for settings that do not go together,
    OutputError.
    """
    return _fuse(_Offer(references, old_bases), base, destination, config, overwrite, progress, engine)


def fuse_complete(
    references: Sequence[str],
    base: Model,
    destination: Location,
    config: FuseConfig,
    *,
    progress: Progress,
    engine: Engine | None = None,
) -> Fused:
    """Fuse like `fuse`, but leave out contributions without a manifest, since they may still be uploading."""
    return _fuse(_Offer(references, manifests_only=True), base, destination, config, False, progress, engine)


def _fuse(
    offer: _Offer,
    base: Model,
    destination: Location,
    config: FuseConfig,
    overwrite: bool,
    progress: Progress,
    engine: Engine | None,
) -> Fused:
    scale = check_config(config)
    output.refuse_overlap(destination, [base.place])
    base_checkpoint = open_checkpoint(base.folder, base.name)
    trusted = _trusted(config)
    home = offer.home
    config = _settled(config, home)
    contributions = _offered(offer, base, base_checkpoint, config, progress)
    closed = home is not None and not overwrite and str(destination.resolve()) == str(layout.fused(*home))
    if closed and layout.is_complete(destination):
        contributions = keep_recorded(contributions, manifest.read(destination), progress)
    output.refuse_overlap(destination, [contribution.place for contribution in contributions])
    contributions = _judged(contributions, base_checkpoint, config)
    if words := sanitize.note(base_checkpoint.config):
        progress.note(f"{base.name} {words}")
    for contribution in contributions:
        if contribution.checkpoint is not None and (words := sanitize.note(contribution.checkpoint.config)):
            progress.note(f"{contribution.name} {words}")
    request = FuseRequest.of(config, contributions, trusted)
    cheap = all(
        contribution.stated_digest for contribution in contributions
    )  # without manifests an identity needs every body
    if layout.is_complete(destination) and (cheap or not overwrite):
        key = request.identity(stated_digest(base_checkpoint) or body_digest(base_checkpoint))
        if output.is_done(destination, key, overwrite=overwrite):
            return Fused(destination, manifest.read(destination), unchanged=True)
    output.is_done(destination, "", overwrite=overwrite)
    spread = spread_over(engine, base_checkpoint, progress) if engine is not None and engine.distant else None
    job = Fusion(base, base_checkpoint, request, scale, destination, progress, spread, _chart(config))
    with output.atomic_output(destination, None, overwrite=overwrite) as partial:
        if closed and layout.is_complete(destination):  # others continue from it, so it must not be replaced
            raise BusyError(f"{destination} was completed by another command meanwhile: run the same command again")
        document = job.run(partial)
    return Fused(destination, document, unchanged=False)


def _chart(config: FuseConfig) -> DrawChart | None:
    """Return what draws `fuse.png`, or None if screening is off; the plotting library is loaded in the background."""
    if config.screen == "off":
        return None
    charts.prepare()
    return charts.fuse_chart


def fusible(references: Sequence[str], base: Model, config: FuseConfig) -> list[Contribution]:
    """Return the contributions that `fuse_complete` would open now, checked by their headers only. Refused ones have rejections.

    Returns an empty list if there is no contribution yet.
    """
    check_config(config)
    base_checkpoint = open_checkpoint(base.folder, base.name)
    offer = _Offer(references, manifests_only=True, to_read=False)
    config = _settled(replace(config, verify=False), offer.home)
    try:
        contributions = _offered(offer, base, base_checkpoint, config, SILENT)
    except ModelError:
        return []
    return _judged(contributions, base_checkpoint, config)


def _has_manifest(contribution: Contribution) -> bool:
    if contribution.checkpoint is not None:
        return contribution.checkpoint.manifest is not None
    return open_folder(contribution.place).has(layout.MANIFEST)


def _settled(config: FuseConfig, home: tuple[Location, int] | None) -> FuseConfig:
    if config.stale != "auto":
        return config
    return replace(config, stale="discount" if home else "reject")


def _judged(
    contributions: Sequence[Contribution], base_checkpoint: Checkpoint, config: FuseConfig
) -> list[Contribution]:
    base_digest = stated_digest(base_checkpoint) or presumed_base(contributions, config)
    if base_digest is None and any(contribution.stated_digest for contribution in contributions):
        base_digest = body_digest(base_checkpoint)
    return [judge(contribution, base_checkpoint, base_digest, config) for contribution in contributions]


def _offered(
    offer: _Offer, base: Model, base_checkpoint: Checkpoint, config: FuseConfig, progress: Progress
) -> list[Contribution]:
    """Open what is to be fused, each contribution once. For an iteration of a RUN, add late contributions.

    Raises ModelError if all of them are part of an earlier fused model.
    """
    home, references = offer.home, offer.references
    run_folder = home[0] if home else layout.enclosing_run(locate(base.place))
    places: list[tuple[str, str | None]] = [(place, None) for place in offer.old_bases]
    if run_folder is not None:
        document = run.read(run_folder)
        places += [(place, document.revision) for place in document.bases.values()]
    ancestry = Ancestry(base_checkpoint.manifest, places, config.verify) if config.stale == "discount" else None
    opened = partial(
        load_contributions,
        progress=progress,
        base=base_checkpoint,
        allow_pickle=config.allow_pickle,
        trusted=_trusted(config),
        ancestry=ancestry,
        to_read=offer.to_read,
    )
    if home is None:
        contributions = opened(references)
    else:
        recorded = recorded_contributions(home[0], but=home[1])
        late = late_contributions(*home, recorded)
        if late and ancestry is None:
            progress.note(
                f"{', '.join(late)} came late and {'is' if len(late) == 1 else 'are'} not taken: --stale discount would"
            )
            late = {}
        contributions = opened([place for place in references if not late or locate(place).is_dir()], late=late)
        contributions = drop_duplicates(contributions, recorded, progress)
        if not contributions:
            raise ModelError(f"{references[0]} holds no contribution that has not been counted yet: wait for new ones")
    return (
        [contribution for contribution in contributions if _has_manifest(contribution)]
        if offer.manifests_only
        else contributions
    )


@dataclass(frozen=True)
class Withdrawal:
    """A fused model and the name of the contribution to withdraw from it."""

    fused: Model
    name: str
    others: Sequence[str] = ()  # where the other contributions are; empty: in `contributions/` beside the fused model


def withdraw(
    withdrawal: Withdrawal,
    base: Model,
    destination: Location,
    config: FuseConfig,
    *,
    overwrite: bool,
    progress: Progress,
    old_bases: Sequence[str] = (),
    engine: Engine | None = None,
) -> Fused:
    """Fuse the contributions of a fused model again, without the withdrawn one and with the settings recorded there.

    Models made from the fused model keep the influence of the withdrawn contribution. Raises ManifestError if the
    model has no such contribution or no other one, CheckpointError if another one is not found, and what `fuse` raises.
    """
    name = withdrawal.name
    source = open_checkpoint(withdrawal.fused.folder, withdrawal.fused.name)
    records = source.manifest.get("contributions", []) if source.manifest else []
    used = {record["name"]: record for record in records if record["status"] == "fused"}
    if source.manifest is None or name not in used:
        raise ManifestError(
            f"{source.label} has no contribution {name!r} to withdraw: it has {', '.join(sorted(used)) or 'none'}"
        )
    if len(used) < 2:
        raise ManifestError(f"{name!r} is the only contribution of {source.label}: use the base model instead")
    config = _recorded_config(source.manifest, config)
    others = {key: record for key, record in used.items() if key != name}
    references = withdrawal.others or _recorded_places(withdrawal.fused, list(others.values()))
    places = _places_by_digest(references, base, config, progress)
    if missing := sorted(key for key, record in others.items() if record["body_digest"] not in places):
        raise CheckpointError(
            f"{source.label}: {name!r} cannot be withdrawn because these contributions were not found to be fused "
            f"again: {', '.join(missing)}. Give the folders that hold them after the fused model"
        )
    progress.note(f"{name} is withdrawn exactly: the other {len(others)} contributions are fused again")
    return fuse(
        [places[record["body_digest"]] for record in others.values()],
        base,
        destination,
        config,
        overwrite=overwrite,
        progress=progress,
        old_bases=old_bases,
        engine=engine,
    )


def _places_by_digest(references: Sequence[str], base: Model, config: FuseConfig, progress: Progress) -> dict[str, str]:
    """Return the places of the contributions that can be opened, by body digest."""
    if not references:
        return {}
    base_checkpoint = open_checkpoint(base.folder, base.name)
    opened = load_contributions(
        references, progress, base_checkpoint, allow_pickle=config.allow_pickle, trusted=_trusted(config)
    )
    return {
        contribution.stated_digest or body_digest(contribution.checkpoint): contribution.place
        for contribution in opened
        if contribution.checkpoint is not None
    }


def _recorded_places(fused: Model, records: Sequence[ContributionRecord]) -> list[str]:
    """Return the folder of contributions beside a fused model, and those of earlier iterations if some came late."""
    beside = locate(fused.place).parent / layout.contributions(Path(), 1).name
    if not beside.is_dir():
        return []
    home = layout.iteration_of(beside)
    if home is None or not any(record.get("age") for record in records):
        return [str(beside)]
    run_folder, iteration = home
    earlier = [number for number in layout.iteration_numbers(run_folder) if number < iteration]
    folders = [layout.contributions(run_folder, number) for number in earlier]
    return [str(beside), *(str(folder) for folder in folders if folder.is_dir())]


def _trusted(config: FuseConfig) -> list[signatures.TrustedKey] | None:
    return signatures.trusted_keys(Path(config.trusted_keys)) if config.trusted_keys is not None else None


def _recorded_config(document: Manifest, config: FuseConfig) -> FuseConfig:
    """Return the settings recorded in a fused model, with the options for checks and drops from `config`.

    Raises ConfigError if the keys or the file of weights must be given again.
    """
    recorded = {key: value for key, value in document["config"].items() if key in FuseConfig.__dataclass_fields__}
    kept: tuple[str, ...] = (
        "screen",
        "min_contributions",
        "strict",
        "verify",
        "trusted_keys",
        "allow_pickle",
        "allow_other_base",
    )
    signed = recorded.pop("trusted_keys", None) is not None  # by fingerprints there, a directory here
    before = resolve(FuseConfig, ConfigFile(), recorded)
    if signed and config.trusted_keys is None:
        raise ConfigError(
            "it was fused from signed contributions: give --trusted-keys again, without a key that is revoked"
        )
    if before.weights not in ("equal", "examples"):  # the manifest names the file, not its place
        if config.weights == "equal":
            raise ConfigError(f"it was fused with the weights in {before.weights}: give that file with --weights")
        kept = (*kept, "weights")
    return replace(before, **{key: getattr(config, key) for key in kept})
