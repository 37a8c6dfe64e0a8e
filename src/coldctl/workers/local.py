"""Jobs on this machine: one after the other in this process, or side by side in processes that share the cores."""

import os
from collections.abc import Iterator, Sequence

from coldctl.common.progress import Progress
from coldctl.workers.jobs import NOTHING_SPECIAL, Job, Needs, Outcome, Result, Work, attempt, side_by_side


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Local:
    """`jobs` side by side (0: as many as there are cores), each with `threads`, or with its share of the cores.

    Results depend on the number of jobs only through the number of threads.
    """

    distant = False

    def __init__(self, jobs: int = 0, threads: int | None = None) -> None:
        self._jobs, self._threads = jobs, threads

    def run(
        self,
        work: "Work[Job, Result]",
        jobs: Sequence[Job],
        progress: Progress,
        needs: Needs = NOTHING_SPECIAL,  # noqa: ARG002 # there is one machine
    ) -> Iterator[Outcome[Result]]:
        """Run `work` on every job and yield the outcomes as they come; one failed job does not stop the others."""
        count = side_by_side(self._jobs, len(jobs), cores())
        threads = self._threads or max(1, cores() // count)
        if count == 1 and threads >= cores():  # libraries take all cores in a process that is not told otherwise
            for index, job in enumerate(jobs):
                yield attempt(index, work, job, threads, progress)
            return
        from coldctl.workers.processes import in_processes  # other jobs start sooner without it

        yield from in_processes(work, jobs, count, threads, progress)

    def close(self) -> None:
        """Nothing outlives a run."""
