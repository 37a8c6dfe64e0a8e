"""`coldctl watch`: fuse, evaluate and promote whenever enough contributions have come.

It keeps no state: each look reads the RUN and does what is missing, so after a kill at any moment the next look goes on.
Any number of watchers may watch one RUN: one of them locks an output and writes it, the others wait.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from coldctl.artifacts import layout, manifest, run
from coldctl.artifacts.manifest import Manifest
from coldctl.artifacts.model_ref import Model, resolve
from coldctl.commands import evaluate, fuse, plan
from coldctl.common.errors import BusyError, CheckpointError, ConfigError, DeclinedError, OutputError
from coldctl.common.progress import Progress
from coldctl.config.settings import DatasetConfig, EvaluateConfig, FinetuneConfig, FuseConfig
from coldctl.evaluation.measure import Suite
from coldctl.evaluation.results import Results
from coldctl.storage.location import Location
from coldctl.workers.jobs import Engine


@dataclass(frozen=True)
class Settings:
    """The settings of the stages. Without `datasets` nothing is evaluated.

    An iteration is fused when `fuse.min_contributions` usable contributions have arrived.
    """

    fuse: FuseConfig
    evaluate: EvaluateConfig
    finetune: FinetuneConfig
    datasets: tuple[DatasetConfig, ...]
    engine: Engine


@dataclass(frozen=True)
class Look:
    """The result of one look at a RUN.

    `waiting`: contributions are missing. `busy`: another command is writing an output. `refused`: the contributions
    cannot be fused. `decided`: the iteration was fused, measured, and promoted or not.
    """

    iteration: int
    state: Literal["waiting", "busy", "refused", "decided"]
    usable: int = 0
    reason: str | None = None
    promoted: bool | None = None
    fused: Manifest | None = None
    results: Results | None = None


def watch(
    folder: Location,
    settings: Settings,
    *,
    every: float,
    iterations: int | None,
    once: bool,
    progress: Progress,
    announce: Callable[[Look], None],
) -> list[Look]:
    """Look at a RUN every `every` seconds, until `iterations` more are decided by any command; forever if None.

    `announce` is called with each look that differs from the one before. Returns the looks that decided an iteration, or
    with `once` a single look. Raises ManifestError if `folder` is not a RUN, ConfigError, and errors of evaluating.
    """
    if run.read(folder).gate and not settings.datasets:
        raise ConfigError(f"{folder} has a gate, which needs an evaluation: give --suite FILE.toml")
    start = run.read(folder).decided
    decided: list[Look] = []
    previous: Look | None = None
    while True:
        current = look(folder, settings, progress)
        if current != previous:
            announce(current)
        previous = current
        if once:
            return [current]
        if current.state == "decided":
            decided.append(replace(current, fused=None, results=None))
        if iterations is not None and run.read(folder).decided >= start + iterations:
            return decided
        if current.state != "decided":
            time.sleep(every)


def look(folder: Location, settings: Settings, progress: Progress) -> Look:
    """Fuse, evaluate and promote the open iteration of a RUN, as far as possible now."""
    state = run.read(folder)
    number = state.decided + 1
    place = layout.fused(folder, number)
    base = resolve(state.base_model, state.revision)
    try:
        if not layout.is_complete(place) and (stopped := _fuse(folder, number, base, settings, progress)) is not None:
            return stopped
        results = _evaluate(folder, state, settings, progress)
        decision = plan.promote(folder, number)
    except BusyError as error:
        return Look(number, "busy", reason=error.message)
    return Look(number, "decided", 0, decision.reason, decision.promoted, manifest.read(place), results)


def _fuse(folder: Location, number: int, base: Model, settings: Settings, progress: Progress) -> Look | None:
    """Fuse the contributions. Returns a look if they are too few or cannot be fused. Raises BusyError."""
    contributions = [str(layout.contributions(folder, number))]
    usable = sum(not contribution.rejections for contribution in fuse.fusible(contributions, base, settings.fuse))
    if usable < settings.fuse.min_contributions:
        return Look(number, "waiting", usable)
    place = layout.fused(folder, number)
    try:
        fuse.fuse_complete(contributions, base, place, settings.fuse, progress=progress, engine=settings.engine)
    except (CheckpointError, DeclinedError) as error:  # others may arrive, or contributors may replace theirs
        return Look(number, "refused", usable, "; ".join([error.message, *error.details]))
    except OutputError as error:
        if layout.is_complete(place):  # another command was faster, perhaps with other contributions
            raise BusyError(f"{place} was completed by another command meanwhile") from error
        raise
    return None


def _evaluate(folder: Location, state: run.Run, settings: Settings, progress: Progress) -> Results | None:
    """Measure an iteration's fused model against the pretrained model, and for the gate against its own base."""
    if not settings.datasets:
        return None
    number = state.decided + 1
    baselines = [(state.pretrained, layout.evaluation(folder, number))]
    if state.gate:
        baselines.append((state.base_model, layout.gate(folder, number)))
    suite = Suite(settings.datasets, settings.evaluate, settings.finetune)
    fused = str(layout.fused(folder, number))
    done = [
        evaluate.evaluate(
            [fused], baseline, suite, output,
            revision=state.revision, engine=settings.engine, overwrite=False, progress=progress,
        )
        for baseline, output in baselines
    ]  # fmt: skip
    return done[0].results
