"""`coldctl fuse`: average the bodies of contributions into a better base model.

The flow: open everything by header, compare with the base, read all bodies side by side in blocks, write the
fused body as it comes, and only publish it when every digest and every number has been found good.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from coldctl.artifacts import layout, manifest, output, run, signatures
from coldctl.artifacts.manifest import ContributionRecord, Manifest
from coldctl.artifacts.model_ref import Model
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.checkpoint import CONFIG_LIMIT, Checkpoint, body_digest, open_checkpoint, outside_body
from coldctl.checkpoints.header import DTYPES
from coldctl.common.errors import BusyError, CheckpointError, ConfigError, ManifestError, ModelError
from coldctl.common.progress import SILENT, Progress
from coldctl.config.loading import ConfigFile, identity, resolve
from coldctl.config.settings import FuseConfig
from coldctl.config.values import Scale
from coldctl.evaluation import charts
from coldctl.fusing.contributions import Candidate, gather
from coldctl.fusing.distributed import spread_over
from coldctl.fusing.fusion import Fusion, check_config, fuse_identity, judge, model_name, presumed_base, stated_digest
from coldctl.fusing.late import as_listed, counted_once, listed, waiting
from coldctl.fusing.passes import Inputs, Prover
from coldctl.fusing.recipe import Recipe
from coldctl.fusing.staleness import Ancestry
from coldctl.fusing.writer import write
from coldctl.storage.files import open_folder
from coldctl.storage.location import Location, locate
from coldctl.workers.jobs import Engine


@dataclass(frozen=True)
class Fused:
    """What `fuse` did: the fused model's manifest, and whether it already stood there."""

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
    """Fuse contributions into `destination`. Nothing is written unless all that goes in was found good.

    Where the contributions are those of an iteration of a RUN, so are the late ones of earlier iterations, and what
    comes after it was fused changes it no more. `old_bases` are MODELs that contributions may have been made on. With
    `manifests_only` what has no manifest is left for later: it may be a contribution that is still being put there.
    With an `engine` of several machines each reads, computes and writes a share of the weights.

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
    cheap = all(item.stated_digest for item in candidates)  # without manifests an identity costs reading everything
    if layout.is_complete(destination) and (cheap or not overwrite):
        key = fuse_identity(config, stated_digest(base_checkpoint) or body_digest(base_checkpoint), candidates, trusted)
        if output.is_done(destination, key, overwrite=overwrite):
            return Fused(destination, manifest.read(destination), unchanged=True)
    output.is_done(destination, "", overwrite=overwrite)
    spread = spread_over(engine, base_checkpoint, progress) if engine is not None and engine.distant else None
    job = Fusion(base, base_checkpoint, candidates, config, scale, destination, progress, trusted, spread)
    if config.screen != "off":
        charts.prepare()
        job.draw_chart = charts.fuse_chart
    with output.writing(destination, None, overwrite=overwrite) as partial:
        if closed and layout.is_complete(destination):  # it is what others go on from: a second one must not differ
            raise BusyError(f"{destination} was completed by another command meanwhile: run the same command again")
        document = job.run(partial)
    return Fused(destination, document, unchanged=False)


def fusible(references: Sequence[str], base: Model, config: FuseConfig) -> list[Candidate]:
    """What `fuse` would take of manifests now, judged by headers alone; those it would refuse have problems.

    Empty where there is nothing yet.
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
    """The RUN and the iteration whose contributions are fused, where the references mean those and nothing else."""
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
    """What is to be fused, each once: with `home`, the RUN and iteration they belong to, the late ones of earlier ones."""
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


def withdraw(
    fused: Model,
    name: str,
    others: Sequence[str],
    base: Model,
    destination: Location,
    config: FuseConfig,
    *,
    overwrite: bool,
    progress: Progress,
    old_bases: Sequence[str] = (),
    engine: Engine | None = None,
) -> Fused:
    """Make the fused model that `fused` would have been without the contribution `name`.

    Exactly, by fusing again, where all other contributions are found: among `others`, or in `contributions/` beside
    the fused model. Else by subtraction from the fused weights, which needs the withdrawn contribution itself and is
    exact only to the fused model's rounding; the manifest says how far. Later iterations still carry its influence.
    Raises ManifestError or CheckpointError.
    """
    source = open_checkpoint(fused.folder, fused.name)
    records = source.manifest.get("contributions", []) if source.manifest else []
    used = {record["name"]: record for record in records if record["status"] == "fused"}
    if source.manifest is None or name not in used:
        known = ", ".join(sorted(used)) or "none"
        raise ManifestError(f"{source.label} has no contribution {name!r} to withdraw: it has {known}")
    if len(used) < 2:
        raise ManifestError(f"{name!r} is the only contribution of {source.label}: use the base model instead")
    config = _recorded_config(source.manifest, config)
    places = list(others)
    beside = locate(fused.place).parent / layout.contributions(Path(), 1).name
    if not places and beside.is_dir():
        places = [str(beside), *_earlier(beside, [record for record in used.values() if record.get("age")])]
    base_checkpoint = open_checkpoint(base.folder, base.name)
    trusted = _trusted(config)
    found = (
        gather(places, progress, base_checkpoint, allow_pickle=config.allow_pickle, trusted=trusted) if places else []
    )
    by_digest = {
        item.stated_digest or body_digest(item.checkpoint): item for item in found if item.checkpoint is not None
    }
    wanted = {key: by_digest.get(record["body_digest"]) for key, record in used.items() if key != name}
    if all(wanted.values()):
        kept = [item.place for item in wanted.values() if item is not None]
        progress.note(f"{name} is withdrawn exactly: the other {len(kept)} contributions are fused again")
        return fuse(
            kept, base, destination, config, overwrite=overwrite, progress=progress, old_bases=old_bases, engine=engine
        )
    withdrawn = by_digest.get(used[name]["body_digest"])
    plain = (
        config.method == "mean"
        and config.scale == Scale()
        and config.outer_optimizer == "none"
        and not config.common_rows
    )
    if withdrawn is not None and withdrawn.checkpoint is not None:
        plain = plain and set(source.body) <= set(withdrawn.checkpoint.body) and used[name]["weight"] < 1
        plain = plain and not used[name].get("age")  # what was fused is not what it holds
    missing = sorted(key for key, item in wanted.items() if item is None)
    if withdrawn is None or withdrawn.checkpoint is None or not plain:
        why = "nor can it be subtracted from what this method gave" if not plain else f"nor is {name} to subtract"
        raise CheckpointError(
            f"{name!r} cannot be withdrawn: {', '.join(missing)} are not at hand to fuse again, {why}: "
            "give the folder of the contributions"
        )
    return _subtract(
        source, used[name], withdrawn.checkpoint, destination, config, overwrite=overwrite, progress=progress
    )


def _trusted(config: FuseConfig) -> list[signatures.TrustedKey] | None:
    return signatures.trusted_keys(Path(config.trusted_keys)) if config.trusted_keys is not None else None


def _earlier(contributions: Location, stale: Sequence[ContributionRecord]) -> list[str]:
    """The folders that late contributions to a fused model came from."""
    home = layout.iteration_of(contributions)
    if home is None or not stale:
        return []
    folders = [
        layout.contributions(home[0], number) for number in layout.iteration_numbers(home[0]) if number < home[1]
    ]
    return [str(folder) for folder in folders if folder.is_dir()]


def _recorded_config(document: Manifest, config: FuseConfig) -> FuseConfig:
    """The settings that a fused model was made with; how it is checked is up to this call."""
    recorded = {key: value for key, value in document["config"].items() if key in FuseConfig.__dataclass_fields__}
    kept: tuple[str, ...] = (
        "screen",
        "min_contributions",
        "strict",
        "verify",
        "trusted_keys",
        "allow_pickle",
        "allow_other_base",
        "leave_one_out",
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


def _subtract(
    source: Checkpoint,
    record: ContributionRecord,
    withdrawn: Checkpoint,
    destination: Location,
    config: FuseConfig,
    *,
    overwrite: bool,
    progress: Progress,
) -> Fused:
    """(fused - w x) / (1 - w) from the rounded fused weights, with the bound on its error said and stored.

    That is fused + λ (x - fused) with λ = -w / (1 - w). The fused weights were rounded once to their dtype, by at
    most ε/2 of their size, which the division makes 1 / (1 - w) times larger.
    """
    assert source.manifest is not None
    weight = record["weight"]
    dtype = next(tensor.dtype for tensor in source.body.values() if tensor.floating)
    bound = float(ml_dtypes.finfo(DTYPES[dtype]).eps) / 2 / (1 - weight)  # type: ignore[no-untyped-call]
    inputs = Inputs(source, [withdrawn])
    recipe = Recipe(config, np.ones(1), [record["name"]], scale=-weight / (1 - weight))
    key = identity("withdraw", config, fused=source.manifest["body_digest"], withdrawn=record["body_digest"])
    if output.is_done(destination, key, overwrite=overwrite):
        return Fused(destination, manifest.read(destination), unchanged=True)
    with output.writing(destination, None, overwrite=overwrite) as partial:
        prover = Prover(inputs, verify=True, whole=True)
        written, _ = write(inputs, recipe, partial, prover=prover, statistics=None, progress=progress)
        proof = prover.prove()
        if problems := [*proof.base_problems, *proof.problems[0]]:
            raise CheckpointError(f"{source.label} or {withdrawn.label}: {problems[0]}: make or fetch it again")
        (partial / layout.MODEL_CONFIG).write_bytes(source.folder.read(layout.MODEL_CONFIG, CONFIG_LIMIT))
        sanitize.copy_tokenizer(source.folder, partial)
        records = [item for item in source.manifest["contributions"] if item["name"] != record["name"]]
        for item in records:
            item["weight"] = item["weight"] / (1 - weight)
        document = source.manifest.copy()
        document["name"] = model_name(destination)
        document["identity"] = key
        document["body_digest"] = written.body_digest or body_digest(open_checkpoint(open_folder(partial), "fused"))
        document["outside_body"] = outside_body(open_checkpoint(open_folder(partial), "fused"))
        document["contributions"] = records
        document["config"] = {**source.manifest["config"], "withdrawn": record["name"], "relative_error_bound": bound}
        document = manifest.write(partial, document, written.digests)
    progress.note(
        f"{record['name']} is withdrawn by subtraction: not bit for bit what fusing the others gives; "
        f"each weight is off by at most {bound:.1e} of the fused weight's size"
    )
    return Fused(destination, document, unchanged=False)
