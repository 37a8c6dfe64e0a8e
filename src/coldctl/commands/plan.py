"""`coldctl plan` and `coldctl promote`: the two ends of an iteration, kept in `run.json`.

`plan` says which iterations are still to be made, `promote` decides about the one that has just been.
"""

import os
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from coldctl.artifacts import layout, manifest, run, store_output
from coldctl.artifacts.model_ref import Model, resolve
from coldctl.artifacts.run import Iteration, Run
from coldctl.common.errors import ConfigError, ManifestError, OutputError
from coldctl.common.progress import Progress
from coldctl.core.config import ConfigFile, RunConfig, contributors_of
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
    """Start or extend a run and return the numbers of the iterations to be made, perhaps begun already.

    `target` counts the run's iterations in all, in place of new `iterations`. Raises ConfigError if `[run]` names no base,
    or the config changed in the middle of an iteration.
    """
    if not config.base:
        raise ConfigError(f'{file.path}: [run] names no base: add `base = "…"`, a directory or a Hub id')
    model = resolve(config.base, config.revision)  # a base that cannot be had stops the run before it starts
    base = config.base
    if Path(base).is_absolute() and isinstance(folder, Path):  # relative, so that a run and its base can move together
        base = os.path.relpath(Path(base).resolve(), folder.resolve())
        base = base if base.startswith(".") else f"./{base}"
    elif Path(base).is_absolute():  # others find nothing of this machine
        base = f"./{layout.PRETRAINED}"
    wanted = iterations if target is None else target
    planned = Run(
        schema=run.SCHEMA,
        folder=folder,
        base=base,
        revision=config.revision,
        config_digest=file.digest,
        sample=config.sample,
        seed=seed,
        gate=gate,
        target=wanted,
        iterations=(),
    )
    if run.is_run(folder):
        found = run.read(folder)
        if target is not None:
            iterations = max(0, target - found.decided)
        planned = run.extended(found, planned, iterations, {name for name, _ in contributors_of(file.datasets)})
    elif folder.exists() and any(_is_anothers(child.name) for child in children(folder)):
        raise ConfigError(f"{folder} holds files but no {layout.RUN}: give a new directory as RUN")
    if base == f"./{layout.PRETRAINED}" and not isinstance(folder, Path):
        _share(model, folder / layout.PRETRAINED, progress)
    run.write(planned)
    return list(range(planned.decided + 1, planned.target + 1))


def _share(model: Model, place: Location, progress: Progress) -> None:
    """Store a pretrained model of this machine in the RUN, so that whoever works on it finds it. Raises OutputError."""
    digest = manifest.digest_of(
        {name: manifest.digest_of_reader(model.folder.open(name)) for name in model.folder.names() if _belongs(name)}
    )
    marker = place.parent / f".{place.name}.digest"
    if (known := conditional_write.read(marker)) is not None:
        if known.data.decode() != digest:
            raise ConfigError(f"{place} holds another model than {model.place}: restore the base, or give a new RUN")
        return
    progress.note(f"{model.name} is stored in {place}: whoever works on the run starts from there")
    store_output.upload(Path(model.place), place, progress, _belongs)
    conditional_write.create(marker, digest.encode())


def _is_anothers(name: str) -> bool:
    """Whether a plan that was broken off cannot have left this."""
    return not name.startswith(".") and name != layout.PRETRAINED


def _belongs(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in layout.MODEL_FILES)


def promote(folder: Location, number: int | None = None) -> Iteration:
    """Decide about the iteration after the last decided one: its fused model becomes the base, or the gate keeps the old.

    Of an iteration `number` that is decided already, perhaps by another command at this very moment, the decision is
    returned. Raises ManifestError if that iteration is not complete.
    """
    found = run.read(folder)
    number = number or found.decided + 1
    if number <= found.decided:
        return found.iterations[number - 1]
    fused = layout.fused(folder, number)
    if not layout.is_complete(fused):
        raise ManifestError(f"{fused} is not complete: fuse iteration {number} first")
    reason = _gate_says_no(layout.gate(folder, number)) if found.gate else None
    decision = Iteration(number, reason is None, manifest.read(fused)["body_digest"], reason)
    try:
        run.write(replace(found, iterations=(*found.iterations, decision)))
    except OutputError:
        found = run.read(folder)
        if number > found.decided:
            raise
        return found.iterations[number - 1]
    return decision


def _gate_says_no(gate: Location) -> str | None:
    """Why the gate refuses, from its evaluation against the iteration's own base; None if it does not."""
    if not layout.is_complete(gate):
        raise ManifestError(f"{gate} is not complete: evaluate against the iteration's base first")
    margin = manifest.read_unchanged(gate)["config"]["evaluate"]["regression_margin"]
    return "; ".join(scoring.regressions(results.read(gate), margin)) or None
