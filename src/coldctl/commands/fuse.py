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
from coldctl.checkpoints.checkpoint import Checkpoint, body_digest, open_checkpoint
from coldctl.common.errors import BusyError, CheckpointError, ConfigError, ManifestError, ModelError
from coldctl.common.progress import SILENT, Progress
from coldctl.config.loading import ConfigFile, resolve
from coldctl.config.settings import FuseConfig
from coldctl.evaluation import charts
from coldctl.fusing.contributions import Candidate, gather
from coldctl.fusing.distributed import spread_over
from coldctl.fusing.fusion import (
    DrawChart,
    FuseRequest,
    Fusion,
    check_config,
    judge,
    presumed_base,
    stated_digest,
)
from coldctl.fusing.late import as_listed, counted_once, listed, waiting
from coldctl.fusing.staleness import Ancestry
from coldctl.storage.location import Location, locate
from coldctl.storage.remote import open_folder
from coldctl.workers.jobs import Engine


@dataclass(frozen=True)
class Fused:
    """The result of a fuse. `unchanged` says that the same model was complete already."""

    path: Location
    manifest: Manifest
    unchanged: bool


def fuse(
    references: Sequence[str],
    base: Model,
    destination: Location,
    config: FuseConfig,
    *,
    overwrite: bool,
    progress: Progress,
    old_bases: Sequence[str] = (),
    manifests_only: bool = False,
    engine: Engine | None = None,
) -> Fused:
    """Fuse contributions into `destination`. Nothing is written unless all inputs are sound.

    If the contributions are those of an iteration of a RUN, late ones of earlier iterations are fused as well, and
    contributions that arrive after the iteration was fused do not change it. `old_bases` are MODELs that contributions
    may have been made on. With `manifests_only` contributions without a manifest are left out, since they may still be
    uploading. With an `engine` of several machines each machine reads, computes and writes a share of the weights.

    Raises CheckpointError (with one detail per finding) if an input cannot be fused and `config.screen` is not
    "reject", DeclinedError if `config.strict` forbids a drop, ConfigError for settings that do not go together,
    OutputError.
    """
    scale = check_config(config)
    output.refuse_overlap(destination, [base.place])
    base_checkpoint = open_checkpoint(base.folder, base.name)
    trusted = _trusted(config)
    home = _home(references)
    config = _settled(config, home)
    candidates = _offered(references, base, base_checkpoint, home, config, old_bases, progress, to_read=True)
    if manifests_only:
        candidates = [item for item in candidates if _has_manifest(item)]
    closed = home is not None and not overwrite and str(destination.resolve()) == str(layout.fused(*home))
    if closed and layout.is_complete(destination):
        candidates = as_listed(candidates, manifest.read(destination), progress)
    output.refuse_overlap(destination, [item.place for item in candidates])
    _judge(candidates, base_checkpoint, config)
    if words := sanitize.note(base_checkpoint.config):
        progress.note(f"{base.name} {words}")
    for item in candidates:
        if item.checkpoint is not None and (words := sanitize.note(item.checkpoint.config)):
            progress.note(f"{item.name} {words}")
    request = FuseRequest.of(config, candidates, trusted)
    cheap = all(item.stated_digest for item in candidates)  # without manifests an identity needs every body
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


def fusible(references: Sequence[str], base: Model, config: FuseConfig) -> list[Candidate]:
    """Return the candidates that `fuse` would open now, checked by their headers only. Refused ones have problems.

    Returns an empty list if there is no contribution yet.
    """
    base_checkpoint = open_checkpoint(base.folder, base.name)
    home = _home(references)
    config = _settled(replace(config, verify=False), home)
    try:
        offered = _offered(references, base, base_checkpoint, home, config, (), SILENT, to_read=False)
    except ModelError:
        return []
    candidates = [item for item in offered if _has_manifest(item)]
    _judge(candidates, base_checkpoint, config)
    return candidates


def _has_manifest(item: Candidate) -> bool:
    if item.checkpoint is not None:
        return item.checkpoint.manifest is not None
    return open_folder(item.place).has(layout.MANIFEST)


def _home(references: Sequence[str]) -> tuple[Location, int] | None:
    """Return the RUN and the iteration if the references are exactly an iteration's contributions, else None."""
    return layout.iteration_of(locate(references[0])) if len(references) == 1 else None


def _settled(config: FuseConfig, home: tuple[Location, int] | None) -> FuseConfig:
    if config.stale != "auto":
        return config
    return replace(config, stale="discount" if home else "reject")


def _judge(candidates: Sequence[Candidate], base_checkpoint: Checkpoint, config: FuseConfig) -> None:
    base_digest = stated_digest(base_checkpoint) or presumed_base(candidates, config)
    if base_digest is None and any(item.stated_digest for item in candidates):
        base_digest = body_digest(base_checkpoint)
    for item in candidates:
        judge(item, base_checkpoint, base_digest, config)


def _offered(
    references: Sequence[str],
    base: Model,
    base_checkpoint: Checkpoint,
    home: tuple[Location, int] | None,
    config: FuseConfig,
    old_bases: Sequence[str],
    progress: Progress,
    *,
    to_read: bool,
) -> list[Candidate]:
    """Open what is to be fused, each contribution once. With `home`, a RUN and iteration, add late contributions.

    Raises ModelError if all of them are part of an earlier fused model.
    """
    within = home[0] if home else layout.enclosing_run(locate(base.place))
    places: list[tuple[str, str | None]] = [(place, None) for place in old_bases]
    if within is not None:
        found = run.read(within)
        places += [(place, found.revision) for place in found.bases.values()]
    ancestry = Ancestry(base_checkpoint.manifest, places, config.verify) if config.stale == "discount" else None
    opened = partial(
        gather,
        progress=progress,
        base=base_checkpoint,
        allow_pickle=config.allow_pickle,
        trusted=_trusted(config),
        ancestry=ancestry,
        to_read=to_read,
    )
    if home is None:
        return opened(references)
    counted = listed(home[0], but=home[1])
    late = waiting(*home, counted)
    if late and ancestry is None:
        progress.note(
            f"{', '.join(late)} came late and {'is' if len(late) == 1 else 'are'} not taken: --stale discount would"
        )
        late = {}
    candidates = opened([place for place in references if not late or locate(place).is_dir()], late=late)
    kept = counted_once(candidates, counted, progress)
    if not kept:
        raise ModelError(f"{references[0]} holds no contribution that has not been counted yet: wait for new ones")
    return kept


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
    opened = gather(references, progress, base_checkpoint, allow_pickle=config.allow_pickle, trusted=_trusted(config))
    return {
        item.stated_digest or body_digest(item.checkpoint): item.place for item in opened if item.checkpoint is not None
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
