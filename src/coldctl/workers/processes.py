"""Jobs side by side in processes that share the cores."""

import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from coldctl.common.errors import WorkerError
from coldctl.common.progress import Progress
from coldctl.workers.jobs import Job, Outcome, Result, Sender, Work, deliver, run_job, thread_environment


def in_processes(
    work: "Work[Job, Result]", jobs: Sequence[Job], count: int, threads: int, progress: Progress
) -> Iterator[Outcome[Result]]:
    """Run the jobs in `count` processes of `threads` threads each, and yield the outcomes as they come."""
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
    """Queue a finished job with its index."""
    finished.put((index, future))


def _collected(index: int, future: Future[Outcome[Result]]) -> Outcome[Result]:
    """Return a job's outcome. A defect inside the worker is raised here."""
    try:
        return future.result()
    except BrokenProcessPool:
        remedy = "run the same command again, with fewer --jobs if memory was short"
        return Outcome(index, None, WorkerError(f"a worker process died before it was done: {remedy}"))


def _stop(pool: ProcessPoolExecutor) -> None:
    """Terminate the workers. Unfinished work stays in partial directories and can be resumed."""
    for process in list((pool._processes or {}).values()):
        process.terminate()


_sender: Sender | None = None


def _start(events: Any, threads: int) -> None:
    """Set up a worker: it ignores Ctrl-C, which the parent handles, and its libraries use `threads`."""
    import signal

    global _sender  # noqa: PLW0603
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(thread_environment(threads))
    _sender = Sender(events.put)


def _die_with_parent() -> None:
    """End this worker when its parent is killed, so that it holds no lock on an output."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _in_worker(index: int, work: "Work[Job, Result]", job: Job, threads: int) -> Outcome[Result]:
    """Run one job in a worker process."""
    assert _sender is not None
    return run_job(index, work, job, threads, _sender)


def _listen(events: Any, progress: Progress) -> None:
    """Repeat the workers' calls of Progress until None comes."""
    while (event := events.get()) is not None:
        deliver(event, progress)
