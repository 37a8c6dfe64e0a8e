"""Jobs on this machine: one after the other in this process, or side by side in processes that share the cores."""

import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from coldctl.core.errors import ColdctlError, WorkerError
from coldctl.core.progress import Progress

Job = TypeVar("Job")
Result = TypeVar("Result")

Work = Callable[[Job, int, Progress], Result]
"""A module-level function of a job (plain configs and paths), the threads it may use, and who listens."""


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of one job: its result, or the error that ended it."""

    index: int
    result: Result | None
    error: ColdctlError | None


def workers(jobs: int, pieces: int) -> int:
    """How many jobs run side by side: as many as asked for, or (0) as many as there are cores and pieces."""
    return max(1, min(jobs or cores(), pieces))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(work: "Work[Job, Result]", jobs: Sequence[Job], count: int, progress: Progress) -> Iterator[Outcome[Result]]:
    """Run `work` on every job and yield the outcomes as they come; one failed job does not stop the others.

    `count` jobs run side by side, each with its share of the cores, so results depend on `count` only through
    the number of threads.
    """
    threads = max(1, cores() // count)
    if count == 1:
        for index, job in enumerate(jobs):
            yield _outcome(index, work, job, threads, progress)
        return
    yield from _side_by_side(work, jobs, count, threads, progress)


def _outcome(index: int, work: "Work[Job, Result]", job: Job, threads: int, progress: Progress) -> Outcome[Result]:
    try:
        return Outcome(index, work(job, threads, progress), None)
    except ColdctlError as error:
        return Outcome(index, None, error)


def _side_by_side(
    work: "Work[Job, Result]", jobs: Sequence[Job], count: int, threads: int, progress: Progress
) -> Iterator[Outcome[Result]]:
    context = multiprocessing.get_context("spawn")  # forked threads of torch hang
    events: Any = context.Queue()
    finished: queue.SimpleQueue[tuple[int, Future[Outcome[Result]]]] = queue.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(events, progress), daemon=True)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(events, threads))
    listener.start()
    try:
        for index, job in enumerate(jobs):
            future = pool.submit(_in_worker, index, work, job, threads)
            future.add_done_callback(partial(_announce, finished, index))
        for _ in jobs:
            yield _collected(*finished.get())
    except BaseException:
        _stop(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        events.put(None)
        listener.join(timeout=5)
        events.close()


def _announce(finished: "queue.SimpleQueue[tuple[int, Future[Any]]]", index: int, future: Future[Any]) -> None:
    finished.put((index, future))


def _collected(index: int, future: Future[Outcome[Result]]) -> Outcome[Result]:
    """A job's outcome; a defect of ours inside the worker is raised here as it was there."""
    try:
        return future.result()
    except BrokenProcessPool:
        remedy = "run the same command again, with fewer --jobs if memory was short"
        return Outcome(index, None, WorkerError(f"a worker process died before it was done: {remedy}"))


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers at once: what they have not finished stays in partial directories and is resumable."""
    for process in list((pool._processes or {}).values()):
        process.terminate()


class _Sender:
    """Progress in a worker process: everything goes through the queue to the one who draws."""

    def __init__(self, events: Any) -> None:
        self._events = events

    def begin(self, task: str, total: int | None, unit: str) -> None:
        self._events.put(("begin", (task, total, unit)))

    def advance(self, task: str, steps: int, detail: str = "") -> None:
        self._events.put(("advance", (task, steps, detail)))

    def end(self, task: str) -> None:
        self._events.put(("end", (task,)))

    def note(self, message: str) -> None:
        self._events.put(("note", (message,)))


_sender: _Sender | None = None


def _start(events: Any, threads: int) -> None:
    """First thing in a worker: the parent alone handles Ctrl-C, and libraries see the share of the cores."""
    import signal

    global _sender  # noqa: PLW0603
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    _sender = _Sender(events)


def _die_with_parent() -> None:
    """A worker whose parent was killed must not go on holding its output."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(index: int, work: "Work[Job, Result]", job: Job, threads: int) -> Outcome[Result]:
    assert _sender is not None
    return _outcome(index, work, job, threads, _sender)


def _listen(events: Any, progress: Progress) -> None:
    while (event := events.get()) is not None:
        name, arguments = event
        getattr(progress, name)(*arguments)
