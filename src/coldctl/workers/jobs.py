"""The interface of all engines: jobs go in, outcomes and progress come back."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from coldctl.common.errors import ColdctlError
from coldctl.common.progress import Progress


class Titled(Protocol):
    """A job, as far as engines know it."""

    @property
    def title(self) -> str:
        """Return the job's name in messages."""


Job = TypeVar("Job", bound=Titled)
Result = TypeVar("Result")

Work = Callable[[Job, int, Progress], Result]
"""A module-level function of a job (plain configs and paths), its number of threads, and the progress to report to."""

Event = tuple[str, tuple[Any, ...]]  # a call of Progress in a worker: its method and arguments


@dataclass(frozen=True)
class Needs:
    """Resources of one job beside CPU threads, by which an engine with several machines places it."""

    memory: int = 0  # bytes
    gpu: bool = False  # one, if the machines have any


NOTHING_SPECIAL = Needs()


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """End of one job: its result, or the error that stopped it."""

    index: int
    result: Result | None
    error: ColdctlError | None


class Engine(Protocol):
    """A way to run jobs."""

    distant: bool  # jobs run on other machines, so one large job is worth splitting

    def run(
        self,
        work: "Work[Job, Result]",
        jobs: Sequence[Job],
        progress: Progress,
        needs: Needs = NOTHING_SPECIAL,
    ) -> Iterator[Outcome[Result]]:
        """Run `work` on every job and yield the outcomes as they come; one failed job does not stop the others."""

    def close(self) -> None:
        """Stop what was started for the jobs."""


def run_job(index: int, work: "Work[Job, Result]", job: Job, threads: int, progress: Progress) -> Outcome[Result]:
    """Run one job in this process. Errors other than ColdctlError are defects and are raised."""
    try:
        return Outcome(index, work(job, threads, progress), None)
    except ColdctlError as error:
        return Outcome(index, None, error)


def side_by_side(requested: int, jobs: int, cores: int) -> int:
    """Return how many of `jobs` run at once: as many as requested, or (0) one per core."""
    return max(1, min(requested or cores, jobs))


def thread_environment(threads: int) -> dict[str, str]:
    """Return environment variables that limit libraries to `threads`. Set them before the libraries are loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return dict.fromkeys(names, str(threads)) | {"TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}


class Sender:
    """Progress in a worker process, sent through `put` to the process that shows it."""

    def __init__(self, put: Callable[[Event], object]) -> None:
        self._put = put

    def begin(self, task: str, total: int | None, unit: str) -> None:
        """Send this call."""
        self._put(("begin", (task, total, unit)))

    def advance(self, task: str, steps: int, detail: str = "") -> None:
        """Send this call."""
        self._put(("advance", (task, steps, detail)))

    def end(self, task: str) -> None:
        """Send this call."""
        self._put(("end", (task,)))

    def note(self, message: str) -> None:
        """Send this call."""
        self._put(("note", (message,)))


def deliver(event: Event, progress: Progress) -> None:
    """Repeat a worker's call of Progress on `progress`."""
    name, arguments = event
    getattr(progress, name)(*arguments)
