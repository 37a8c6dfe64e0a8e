"""`coldctl status`: complete, missing and running work of a run."""

from dataclasses import dataclass

from coldctl.artifacts import layout, manifest, output, run
from coldctl.fusing.contributions import late_contributions, recorded_contributions
from coldctl.storage.location import Location, children


@dataclass(frozen=True)
class IterationStatus:
    """The outputs of one iteration, by name."""

    number: int
    contributions: tuple[str, ...]  # complete ones
    running: tuple[str, ...]  # another command is writing them
    unfinished: tuple[str, ...]  # partial, and no command is writing them
    fused: bool
    evaluated: bool
    promoted: bool | None  # None if not decided
    late: dict[str, int]  # contributions to earlier iterations that were fused here, with their ages


@dataclass(frozen=True)
class RunStatus:
    """The state of a run."""

    pretrained: str
    base_model: str
    evaluation: str | None  # of the base model, if it is complete
    target: int
    iterations: tuple[IterationStatus, ...]
    waiting: tuple[str, ...]  # contributions that arrived after their iteration was fused, not fused since


def status(folder: Location) -> RunStatus:
    """Return the state of a run, read from its folders. Raises ManifestError if `folder` is not a run."""
    state = run.read(folder)
    decided = {iteration.number: iteration.promoted for iteration in state.iterations}
    numbers = sorted({*layout.iteration_numbers(folder), *decided})
    promoted = [number for number, is_promoted in decided.items() if is_promoted]
    evaluation = layout.evaluation(folder, promoted[-1]) if promoted else None
    last_fused = max((number for number in numbers if layout.is_complete(layout.fused(folder, number))), default=0)
    waiting = late_contributions(folder, last_fused + 1, recorded_contributions(folder, but=0)) if last_fused else {}
    return RunStatus(
        state.pretrained,
        state.base_model,
        str(evaluation) if evaluation is not None and layout.is_complete(evaluation) else None,
        state.target,
        tuple(_iteration(folder, number, decided.get(number)) for number in numbers),
        tuple(waiting),
    )


def _iteration(folder: Location, number: int, promoted: bool | None) -> IterationStatus:
    contributions = layout.contributions(folder, number)
    offered = children(contributions) if contributions.is_dir() else []
    complete = tuple(child.name for child in offered if layout.is_complete(child) and not child.name.startswith("."))
    partials = [path for path in (*offered, *children(layout.iteration(folder, number))) if _is_partial(path)]
    fused = layout.fused(folder, number)
    records = manifest.read(fused).get("contributions", []) if layout.is_complete(fused) else []
    held = {path for path in partials if output.is_held(path)}
    return IterationStatus(
        number,
        complete,
        tuple(_name(path) for path in partials if path in held),
        tuple(_name(path) for path in partials if path not in held),
        layout.is_complete(fused),
        layout.is_complete(layout.evaluation(folder, number)),
        promoted,
        {record["name"]: age for record in records if record["status"] == "fused" and (age := record.get("age"))},
    )


def _is_partial(path: Location) -> bool:
    return path.is_dir() and path.name.startswith(".") and path.name.endswith(".partial")


def _name(partial: Location) -> str:
    return partial.name.removeprefix(".").removesuffix(".partial")
