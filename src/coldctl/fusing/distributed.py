"""The passes of a fuse as jobs on a cluster."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.common.progress import Progress
from coldctl.fusing.passes import Spread
from coldctl.workers.jobs import Engine, Needs

Result = TypeVar("Result")

_MEMORY = 1 << 30  # bytes that a part needs, for buffers and libraries


@dataclass(frozen=True)
class _Part:
    """A chunk of a pass, as an engine wants it."""

    title: str
    chunk: Any


def spread_over(engine: Engine, base: Checkpoint, progress: Progress) -> Spread:
    """Return what runs the chunks of a pass as jobs of an engine."""
    largest = max((tensor.size for tensor in base.body.values()), default=0)
    needs = Needs(_MEMORY + 4 * largest)  # some look at a whole tensor, in float32

    def spread(work: Callable[[Any], Result], chunks: Sequence[Any], name: str) -> Iterator[Result]:
        parts = [_Part(f"{name}, part {number} of {len(chunks)}", chunk) for number, chunk in enumerate(chunks, 1)]
        early: dict[int, Result] = {}
        awaited = 0
        for outcome in engine.run(partial(_perform, work), parts, progress, needs):
            if outcome.error is not None:
                raise outcome.error
            early[outcome.index] = cast(Result, outcome.result)
            while awaited in early:
                yield early.pop(awaited)
                awaited += 1

    return spread


def _perform(work: Callable[[Any], Result], part: _Part, threads: int, progress: Progress) -> Result:  # noqa: ARG001
    return work(part.chunk)
