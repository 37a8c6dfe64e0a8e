"""`coldctl plan` and `coldctl promote`: the two ends of an iteration, kept in `run.json`.

`plan` returns the iterations that are still to be made, `promote` decides about the newest one.
"""

import os
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from coldctl.artifacts import layout, manifest, run, store_output
from coldctl.artifacts.model_ref import Model, resolve
from coldctl.artifacts.run import Iteration, Run
from coldctl.common.digests import digest_of
from coldctl.common.errors import ConfigError, ManifestError, OutputError
from coldctl.common.progress import Progress
from coldctl.config.loading import ConfigFile
from coldctl.config.settings import RunConfig, contributors_of
from coldctl.evaluation import results, scoring
from coldctl.storage import conditional_write
from coldctl.storage.location import Location, children


def plan(
    folder: Location,
    file: ConfigFile,
    config: RunConfig,
    *,
    iterations: int,
    seed: int,
    gate: bool,
    target: int | None = None,
    progress: Progress,
) -> list[int]:
    """Start or extend a run and return the numbers of the iterations to be made, which may have begun already.

    `target` is the run's total number of iterations and replaces `iterations`, the number of new ones. Raises ConfigError
    if `[run]` names no base, or the config changed in the middle of an iteration.
    """
    if not config.base:
        raise ConfigError(f'{file.path}: [run] names no base: add `base = "…"`, a directory or a Hub id')
    model = resolve(config.base, config.revision)  # a missing base stops the run before it starts
    base = _as_recorded(config.base, folder)
    planned = Run(
        schema=run.SCHEMA,
        folder=folder,
        base=base,
        revision=config.revision,
        config_digest=file.digest,
        sample=config.sample,
        seed=seed,
        gate=gate,
        target=iterations if target is None else target,
        iterations=(),
    )
    if run.is_run(folder):
        existing = run.read(folder)
        if target is not None:
            iterations = max(0, target - existing.decided)
        planned = run.extended(existing, planned, iterations, {name for name, _ in contributors_of(file.datasets)})
    elif folder.exists() and any(_is_foreign(child.name) for child in children(folder)):
        raise ConfigError(f"{folder} holds files but no {layout.RUN}: give a new directory as RUN")
    if base == f"./{layout.PRETRAINED}" and not isinstance(folder, Path):
        _upload_base(model, folder / layout.PRETRAINED, progress)
    run.write(planned)
    return list(range(planned.decided + 1, planned.target + 1))


def _as_recorded(base: str, folder: Location) -> str:
    """Return the base as `run.json` names it: a local directory relative to the RUN, so that both can move together.

    A RUN in a store is used from several machines, so it gets a copy of a local directory.
    """
    if not Path(base).is_absolute():
        return base
    if not isinstance(folder, Path):
        return f"./{layout.PRETRAINED}"
    relative = os.path.relpath(Path(base).resolve(), folder.resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def _upload_base(model: Model, place: Location, progress: Progress) -> None:
    """Upload a local pretrained model into a RUN in a store, once. Raises OutputError or ConfigError."""
    digest = digest_of(
        {name: manifest.digest_of_reader(model.folder.open(name)) for name in model.folder.names() if _is_model(name)}
    )
    marker = place.parent / f".{place.name}.digest"
    if (uploaded := conditional_write.read(marker)) is not None:
        if uploaded.data.decode() != digest:
            raise ConfigError(f"{place} holds another model than {model.place}: restore the base, or give a new RUN")
        return
    progress.note(f"{model.name} is stored in {place}: whoever works on the run starts from there")
    store_output.upload(Path(model.place), place, progress, _is_model)
    conditional_write.create(marker, digest.encode())


def _is_foreign(name: str) -> bool:
    """Return False for names that an interrupted `plan` leaves."""
    return not name.startswith(".") and name != layout.PRETRAINED


def _is_model(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in layout.MODEL_FILES)


def promote(folder: Location, number: int | None = None) -> Iteration:
    """Decide whether the fused model of the first undecided iteration becomes the base, and record the decision.

    If iteration `number` is decided already, perhaps by another command at the same time, its decision is returned. Raises
    ManifestError if the iteration is not complete.
    """
    state = run.read(folder)
    number = number or state.decided + 1
    if number <= state.decided:
        return state.iterations[number - 1]
    fused = layout.fused(folder, number)
    if not layout.is_complete(fused):
        raise ManifestError(f"{fused} is not complete: fuse iteration {number} first")
    reason = _gate_refusal(layout.gate(folder, number)) if state.gate else None
    decision = Iteration(number, reason is None, manifest.read(fused)["body_digest"], reason)
    try:
        run.write(replace(state, iterations=(*state.iterations, decision)))
    except OutputError:
        state = run.read(folder)
        if number > state.decided:
            raise
        return state.iterations[number - 1]
    return decision


def _gate_refusal(gate: Location) -> str | None:
    """Return the regressions in the evaluation against the iteration's own base, or None if there are none."""
    if not layout.is_complete(gate):
        raise ManifestError(f"{gate} is not complete: evaluate against the iteration's base first")
    margin = manifest.read_unchanged(gate)["config"]["evaluate"]["regression_margin"]
    return "; ".join(scoring.regressions(results.read(gate), margin)) or None
