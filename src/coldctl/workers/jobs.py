"""What all engines have in common: jobs go in, outcomes come back, and someone listens on the way."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from coldctl.common.errors import ColdctlError
from coldctl.common.progress import Progress


class Titled(Protocol):
    """A job, as far as an engine looks at it."""

    @property
    def title(self) -> str:
        """How messages call it."""


Job = TypeVar("Job", bound=Titled)
Result = TypeVar("Result")

Work = Callable[[Job, int, Progress], Result]
"""A module-level function of a job (plain configs and paths), the threads it may use, and who listens."""

Event = tuple[str, tuple[Any, ...]]  # a call of Progress, on its way from a worker to the one who draws


@dataclass(frozen=True)
class Needs:
    """What a job takes of a machine beside CPU threads; an engine with several machines places it by that."""

    memory: int = 0  # bytes
    gpu: bool = False  # one, where there are any


NOTHING_SPECIAL = Needs()


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of one job: its result, or the error that ended it."""

    index: int
    result: Result | None
    error: ColdctlError | None


class Engine(Protocol):
    """Runs jobs somewhere."""

    distant: bool  # whether jobs run on other machines, so that big work is worth cutting into pieces

    def run(
        self,
        work: "Work[Job, Result]",
        jobs: Sequence[Job],
        progress: Progress,
        needs: Needs = NOTHING_SPECIAL,
    ) -> Iterator[Outcome[Result]]:
        """Run `work` on every job and yield the outcomes as they come; one failed job does not stop the others."""

    def close(self) -> None:
        """Let go of whatever was started for the jobs."""


def attempt(index: int, work: "Work[Job, Result]", job: Job, threads: int, progress: Progress) -> Outcome[Result]:
    """One job, here and now. Only what is no ColdctlError is raised: a defect."""
    try:
        return Outcome(index, work(job, threads, progress), None)
    except ColdctlError as error:
        return Outcome(index, None, error)


def side_by_side(jobs: int, pieces: int, cores: int) -> int:
    """How many jobs run side by side: as many as asked for, or (0) as many as there are cores and pieces."""
    return max(1, min(jobs or cores, pieces))


def thread_environment(threads: int) -> dict[str, str]:
    """The environment in which libraries see this share of the cores; it must stand before they are loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return dict.fromkeys(names, str(threads)) | {"TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}


class Sender:
    """Progress in a worker process: everything goes through `put` to the one who draws."""

    def __init__(self, put: Callable[[Event], object]) -> None:
        self._put = put

    def begin(self, task: str, total: int | None, unit: str) -> None:
        """Send it on."""
        self._put(("begin", (task, total, unit)))

    def advance(self, task: str, steps: int, detail: str = "") -> None:
        """Send it on."""
        self._put(("advance", (task, steps, detail)))

    def end(self, task: str) -> None:
        """Send it on."""
        self._put(("end", (task,)))

    def note(self, message: str) -> None:
        """Send it on."""
        self._put(("note", (message,)))


def deliver(event: Event, progress: Progress) -> None:
    """Tell the one who draws what a worker sent."""
    name, arguments = event
    getattr(progress, name)(*arguments)
