"""`coldctl status`: what a run has, what is missing, and what is being worked on."""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from coldctl.core import layout, run


@dataclass(frozen=True)
class IterationStatus:
    """One iteration's pieces. `running` are those another command holds right now, `unfinished` those nobody does."""

    number: int
    contributions: tuple[str, ...]
    running: tuple[str, ...]
    unfinished: tuple[str, ...]
    fused: bool
    evaluated: bool
    promoted: bool | None


@dataclass(frozen=True)
class RunStatus:
    """A run as it stands."""

    pretrained: str
    base_model: str
    evaluation: str | None  # of the base model, where it is complete
    target: int
    iterations: tuple[IterationStatus, ...]


def status(folder: Path) -> RunStatus:
    """Read a run off its folders. Raises ManifestError if `folder` is no run."""
    found = run.read(folder)
    decided = {item.number: item.promoted for item in found.iterations}
    numbers = sorted({*layout.iteration_numbers(folder), *decided})
    last = next((item.number for item in reversed(found.iterations) if item.promoted), None)
    evaluation = None if last is None else layout.evaluation(folder, last)
    return RunStatus(
        found.pretrained,
        found.base_model,
        str(evaluation) if evaluation is not None and layout.is_complete(evaluation) else None,
        found.target,
        tuple(_iteration(folder, number, decided.get(number)) for number in numbers),
    )


def _iteration(folder: Path, number: int, promoted: bool | None) -> IterationStatus:
    contributions = layout.contributions(folder, number)
    children = sorted(contributions.iterdir()) if contributions.is_dir() else []
    complete = tuple(child.name for child in children if layout.is_complete(child) and not child.name.startswith("."))
    partials = [child for child in children if _is_partial(child)]
    partials += [child for child in layout.iteration(folder, number).glob(".*") if _is_partial(child)]
    held = {child for child in partials if _is_held(child)}
    return IterationStatus(
        number,
        complete,
        tuple(_name(child) for child in partials if child in held),
        tuple(_name(child) for child in partials if child not in held),
        layout.is_complete(layout.fused(folder, number)),
        layout.is_complete(layout.evaluation(folder, number)),
        promoted,
    )


def _is_partial(path: Path) -> bool:
    return path.is_dir() and path.name.startswith(".") and path.name.endswith(".partial")


def _name(partial: Path) -> str:
    return partial.name.removeprefix(".").removesuffix(".partial")


def _is_held(partial: Path) -> bool:
    """Whether a living process holds the lock of a partial directory."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
