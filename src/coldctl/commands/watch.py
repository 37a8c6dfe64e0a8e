"""`coldctl watch`: whenever enough contributions have come to a RUN, fuse, evaluate, promote, and wait for the next ones.

A composition of stages, which know nothing of each other. It keeps no state: each look reads the RUN and does what is
missing, so after a kill at any moment the next look goes on. Any number of watchers may look at one RUN: whoever
claims an output writes it, and the others find it complete, or busy, and wait.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from coldctl.artifacts import layout, manifest, run
from coldctl.artifacts.manifest import Manifest
from coldctl.artifacts.model_ref import Model, resolve
from coldctl.commands import evaluate, fuse, plan
from coldctl.common.errors import BusyError, CheckpointError, ConfigError, DeclinedError, OutputError
from coldctl.common.progress import Progress
from coldctl.config.settings import DatasetConfig, EvaluateConfig, FinetuneConfig, FuseConfig
from coldctl.evaluation.results import Results
from coldctl.storage.location import Location
from coldctl.workers.jobs import Engine


@dataclass(frozen=True)
class Settings:
    """How iterations are made: `fuse.min_contributions` usable ones must have come. Without `datasets` none is evaluated."""

    fuse: FuseConfig
    evaluate: EvaluateConfig
    finetune: FinetuneConfig
    datasets: tuple[DatasetConfig, ...]
    engine: Engine


@dataclass(frozen=True)
class Look:
    """What one look at a RUN led to.

    `waiting` for contributions; `busy`, for another command is at work; `refused`, for what has come cannot be fused;
    or `decided`, with what was fused, what was measured, and whether it was promoted.
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
    """Look at a RUN every so many seconds, until so many more of its iterations are decided, by whomever; for ever if None.

    `announce` hears of each look that differs from the one before. Returns the iterations that were decided, and
    with `once`, which looks one time, that look. Raises ManifestError if `folder` is no RUN, ConfigError, and whatever
    stops evaluating.
    """
    if run.read(folder).gate and not settings.datasets:
        raise ConfigError(f"{folder} has a gate, which needs an evaluation: give --suite FILE.toml")
    start = run.read(folder).decided
    found: list[Look] = []
    before: Look | None = None
    while True:
        seen = look(folder, settings, progress)
        if seen != before:
            announce(seen)
        before = seen
        if once:
            return [seen]
        if seen.state == "decided":
            found.append(Look(seen.iteration, seen.state, seen.usable, seen.reason, seen.promoted))
        if iterations is not None and run.read(folder).decided >= start + iterations:
            return found
        if seen.state != "decided":
            time.sleep(every)


def look(folder: Location, settings: Settings, progress: Progress) -> Look:
    """Do what the open iteration of a RUN can have done now, up to its promotion."""
    state = run.read(folder)
    number = state.decided + 1
    place = layout.fused(folder, number)
    base = resolve(state.base_model, state.revision)
    try:
        if not layout.is_complete(place) and (short := _fused(folder, number, base, settings, progress)) is not None:
            return short
        results = _evaluated(folder, state, number, base, settings, progress)
        decision = plan.promote(folder, number)
    except BusyError as error:
        return Look(number, "busy", reason=error.message)
    return Look(number, "decided", 0, decision.reason, decision.promoted, manifest.read(place), results)


def _fused(folder: Location, number: int, base: Model, settings: Settings, progress: Progress) -> Look | None:
    """Fuse what has come, if it is enough and good; else why not. Raises BusyError."""
    given = [str(layout.contributions(folder, number))]
    usable = sum(not item.problems for item in fuse.fusible(given, base, settings.fuse))
    if usable < settings.fuse.min_contributions:
        return Look(number, "waiting", usable)
    place = layout.fused(folder, number)
    try:
        fuse.fuse_complete(given, base, place, settings.fuse, progress=progress, engine=settings.engine)
    except (CheckpointError, DeclinedError) as error:  # better ones may come, or somebody mends what is there
        return Look(number, "refused", usable, "; ".join([error.message, *error.details]))
    except OutputError as error:
        if layout.is_complete(place):  # another command was quicker, perhaps with one contribution less or more
            raise BusyError(f"{place} was completed by another command meanwhile") from error
        raise
    return None


def _evaluated(
    folder: Location, state: run.Run, number: int, base: Model, settings: Settings, progress: Progress
) -> Results | None:
    """Measure an iteration's fused model against the pretrained model, and for the gate against its own base."""
    if not settings.datasets:
        return None
    against = [(resolve(state.pretrained, state.revision), layout.evaluation(folder, number))]
    if state.gate:
        against.append((base, layout.gate(folder, number)))
    subject = evaluate.candidates_of([str(layout.fused(folder, number))], None)
    done = [
        evaluate.evaluate(
            subject, baseline, settings.datasets, output, settings.evaluate, settings.finetune,
            engine=settings.engine, overwrite=False, progress=progress,
        )
        for baseline, output in against
    ]  # fmt: skip
    return done[0].results
