"""Jobs on this machine, one after the other or in processes."""

import os
from collections.abc import Iterator, Sequence

from coldctl.common.progress import Progress
from coldctl.workers.jobs import NOTHING_SPECIAL, Job, Needs, Outcome, Result, Work, run_job, side_by_side


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Local:
    """An engine of `jobs` at once (0: one per core), each with `threads`, or with its share of the cores.

    Results depend on the number of jobs at once only through the number of threads.
    """

    distant = False

    def __init__(self, jobs: int = 0, threads: int | None = None) -> None:
        self._jobs, self._threads = jobs, threads

    def run(
        self,
        work: "Work[Job, Result]",
        jobs: Sequence[Job],
        progress: Progress,
        needs: Needs = NOTHING_SPECIAL,  # noqa: ARG002  one machine has nothing to choose
    ) -> Iterator[Outcome[Result]]:
        """Run `work` on every job and yield the outcomes as they come; one failed job does not stop the others."""
        count = side_by_side(self._jobs, len(jobs), cores())
        threads = self._threads or max(1, cores() // count)
        if count == 1 and threads >= cores():  # a library's default is all cores
            for index, job in enumerate(jobs):
                yield run_job(index, work, job, threads, progress)
            return
        from coldctl.workers.processes import in_processes  # imported late: jobs in this process start sooner

        yield from in_processes(work, jobs, count, threads, progress)

    def close(self) -> None:
        """Do nothing: no process outlives a run."""
