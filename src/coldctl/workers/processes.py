"""Jobs side by side in processes of this machine, which share its cores."""

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
from coldctl.workers.jobs import Job, Outcome, Result, Sender, Work, attempt, deliver, thread_environment


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


_sender: Sender | None = None


def _start(events: Any, threads: int) -> None:
    """First thing in a worker: the parent alone handles Ctrl-C, and libraries see the share of the cores."""
    import signal

    global _sender  # noqa: PLW0603
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(thread_environment(threads))
    _sender = Sender(events.put)


def _die_with_parent() -> None:
    """A worker whose parent was killed must not go on holding its output."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _in_worker(index: int, work: "Work[Job, Result]", job: Job, threads: int) -> Outcome[Result]:
    assert _sender is not None
    return attempt(index, work, job, threads, _sender)


def _listen(events: Any, progress: Progress) -> None:
    while (event := events.get()) is not None:
        deliver(event, progress)
