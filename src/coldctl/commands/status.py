"""`coldctl status`: what a run has, what is missing, and what is being worked on."""

from dataclasses import dataclass

from coldctl.artifacts import layout, manifest, output, run
from coldctl.fusing import late
from coldctl.storage.location import Location, children


@dataclass(frozen=True)
class IterationStatus:
    """One iteration's pieces. `running` are those another command holds right now, `unfinished` those nobody does.

    `late` are those of earlier iterations that were fused here, with their ages.
    """

    number: int
    contributions: tuple[str, ...]
    running: tuple[str, ...]
    unfinished: tuple[str, ...]
    fused: bool
    evaluated: bool
    promoted: bool | None
    late: dict[str, int]


@dataclass(frozen=True)
class RunStatus:
    """A run as it stands."""

    pretrained: str
    base_model: str
    evaluation: str | None  # of the base model, where it is complete
    target: int
    iterations: tuple[IterationStatus, ...]
    waiting: tuple[str, ...]  # contributions that came after their iteration was fused, and that none has taken yet


def status(folder: Location) -> RunStatus:
    """Read a run off its folders. Raises ManifestError if `folder` is no run."""
    found = run.read(folder)
    decided = {item.number: item.promoted for item in found.iterations}
    numbers = sorted({*layout.iteration_numbers(folder), *decided})
    last = next((item.number for item in reversed(found.iterations) if item.promoted), None)
    closed = max((number for number in numbers if layout.is_complete(layout.fused(folder, number))), default=0)
    waiting = late.waiting(folder, closed + 1, late.listed(folder, but=0)) if closed else {}
    evaluation = None if last is None else layout.evaluation(folder, last)
    return RunStatus(
        found.pretrained,
        found.base_model,
        str(evaluation) if evaluation is not None and layout.is_complete(evaluation) else None,
        found.target,
        tuple(_iteration(folder, number, decided.get(number)) for number in numbers),
        tuple(waiting),
    )


def _iteration(folder: Location, number: int, promoted: bool | None) -> IterationStatus:
    contributions = layout.contributions(folder, number)
    found = children(contributions) if contributions.is_dir() else []
    complete = tuple(child.name for child in found if layout.is_complete(child) and not child.name.startswith("."))
    partials = [child for child in found if _is_partial(child)]
    partials += [child for child in children(layout.iteration(folder, number)) if _is_partial(child)]
    fused = layout.fused(folder, number)
    records = manifest.read(fused).get("contributions", []) if layout.is_complete(fused) else []
    held = {child for child in partials if output.is_held(child)}
    return IterationStatus(
        number,
        complete,
        tuple(_name(child) for child in partials if child in held),
        tuple(_name(child) for child in partials if child not in held),
        layout.is_complete(fused),
        layout.is_complete(layout.evaluation(folder, number)),
        promoted,
        {record["name"]: age for record in records if record["status"] == "fused" and (age := record.get("age"))},
    )


def _is_partial(path: Location) -> bool:
    return path.is_dir() and path.name.startswith(".") and path.name.endswith(".partial")


def _name(partial: Location) -> str:
    return partial.name.removeprefix(".").removesuffix(".partial")
