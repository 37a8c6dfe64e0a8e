"""Jobs on a Ray cluster, as tasks of Ray Core that state their CPUs, GPUs and memory.

A job whose worker or node is lost is done again elsewhere. What it had finished lies in the shared storage, where the
stage's function finds it. Results come back through Ray and must be small.
"""

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from coldctl.common.errors import BusyError, ConfigError, WorkerError
from coldctl.common.progress import Progress
from coldctl.workers.jobs import (
    NOTHING_SPECIAL,
    Event,
    Job,
    Needs,
    Outcome,
    Result,
    Sender,
    Work,
    attempt,
    deliver,
    side_by_side,
    thread_environment,
)
from coldctl.workers.local import cores

_LOST = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,
    exceptions.ObjectLostError,  # a result that went down with its node
    exceptions.RuntimeEnvSetupError,  # so fails a node that is about to go
)
_ATTEMPTS = 5  # of one job whose workers are lost
_MOST_PENDING = 1000  # jobs that wait in the cluster, so that it may grow by them, without --jobs
_LEASE = 300.0  # seconds after which the lock of a machine that is gone must have been released
_PAUSE = 2.0  # seconds between looks at such a lock


@dataclass(frozen=True)
class _Try:
    """One more go at one job."""

    index: int
    memory: int  # bytes
    number: int = 1
    lost: float = 0.0  # when the try before was lost, by the monotonic clock
    why: str = ""
    earliest: float = 0.0  # when to begin


@dataclass(frozen=True)
class _Share:
    """What each job gets of the cluster as it is now."""

    threads: int
    gpus: int
    memory: int  # bytes of the largest node: nobody can have more


class Ray:
    """The cluster at `address` (None: $RAY_ADDRESS, else one on this machine that is ended by `close`).

    `jobs` are side by side at most (0: as many as there is room for), each with `threads`, or with its share of the
    nodes' CPUs. With as many threads per job the outputs have the same bytes as on one machine.
    """

    distant = True

    def __init__(self, jobs: int = 0, threads: int | None = None, address: str | None = None) -> None:
        self._jobs, self._threads = jobs, threads
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._mailbox: Any = None
        self._joined = False

    def run(
        self, work: "Work[Job, Result]", jobs: Sequence[Job], progress: Progress, needs: Needs = NOTHING_SPECIAL
    ) -> Iterator[Outcome[Result]]:
        """Run `work` on every job and yield the outcomes as they come; one failed job does not stop the others.

        Raises ConfigError if there is no cluster, and what is no ColdctlError as it was raised in the worker.
        """
        if not jobs:
            return
        self._start()
        share = self._share(len(jobs), needs, progress)
        shared = ray.put((work, str(Path.cwd())))
        listener = threading.Thread(target=_listen, args=(self._mailbox, progress), daemon=True)
        listener.start()
        waiting = [_Try(index, min(needs.memory, share.memory)) for index in range(len(jobs))]
        running: dict[Any, _Try] = {}
        try:
            while waiting or running:
                for item in _due(waiting, (self._jobs or _MOST_PENDING) - len(running)):
                    running[self._submit(shared, item, jobs[item.index], share)] = item
                if not running:
                    time.sleep(_PAUSE)
                    continue
                for reference in ray.wait(list(running), timeout=_PAUSE if waiting else None)[0]:
                    item = running.pop(reference)
                    outcome, again = _collected(reference, item, share)
                    if again is not None:
                        waiting.append(again)
                        if again.number > item.number:
                            progress.note(f"{jobs[item.index].title}: {again.why}, it is done again")
                    if outcome is not None:
                        yield outcome
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            self._mailbox.put.remote(None)
            listener.join(timeout=5)

    def close(self) -> None:
        """Leave the cluster; one that was started for these jobs ends."""
        if self._joined:
            ray.shutdown()
        self._mailbox, self._joined = None, False

    def _start(self) -> None:
        """Join the cluster. Raises ConfigError."""
        if self._mailbox is not None:
            return
        if not ray.is_initialized():
            local = self._address == "local"
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
            os.environ.setdefault(
                "RAY_worker_niceness", "0"
            )  # Ray's 15 would give way to everything else on this machine
            try:
                _knock(self._address)
                ray.init(
                    self._address,
                    num_cpus=cores() if local else None,
                    include_dashboard=False if local else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except (OSError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0].rstrip(".")
                raise ConfigError(
                    f"--ray-address {self._address}: {reason}: give the address of a running cluster with the same "
                    "versions of Ray and Python, or leave it out"
                ) from None
            self._joined = True
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._mailbox = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()

    def _share(self, pieces: int, needs: Needs, progress: Progress) -> _Share:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(needs.gpu and any(node.get("GPU") for node in nodes))
        room = [(int(node.get("CPU", 0)), int(node.get("GPU", 0)) if gpus else pieces) for node in nodes]
        largest = max((cpus for cpus, places in room if places), default=0)

        def fitting(threads: int) -> int:
            return sum(min(cpus // threads, places) for cpus, places in room)

        count = side_by_side(self._jobs, pieces, fitting(1))
        share = next((threads for threads in range(largest, 0, -1) if fitting(threads) >= count), 1)
        if (threads := self._threads or share) > largest:
            if self._address == "local":
                raise ConfigError(f"--threads {threads}: this machine has {largest} cores: give at most that")
            progress.note(f"no node of the cluster has {threads} free CPUs for a job yet: waiting for one that has")
        return _Share(threads, gpus, max((int(node.get("memory", 0)) for node in nodes), default=0))

    def _submit(self, shared: Any, item: _Try, job: Any, share: _Share) -> Any:
        options = {
            "num_cpus": share.threads,
            "num_gpus": share.gpus,
            "memory": item.memory or None,
            "max_retries": 0,  # we do it ourselves, and say so
            "runtime_env": {"env_vars": thread_environment(share.threads)},
        }
        task = ray.remote(_perform).options(**options)
        return task.remote(shared, item.index, job, share.threads, self._mailbox)


def _knock(address: str) -> None:
    """Raise OSError at once where nobody listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _due(waiting: list[_Try], room: int) -> list[_Try]:
    """Take those out of `waiting` that may begin now and for which there is room."""
    now = time.monotonic()
    chosen = [item for item in waiting if item.earliest <= now][: max(0, room)]
    for item in chosen:
        waiting.remove(item)
    return chosen


def _collected(reference: Any, item: _Try, share: _Share) -> tuple[Outcome[Any] | None, _Try | None]:
    """A job's outcome, or the try that follows a lost one."""
    now = time.monotonic()
    try:
        outcome: Outcome[Any] = ray.get(reference)
    except _LOST as error:
        if item.number >= _ATTEMPTS:
            remedy = "look at the nodes' memory and at Ray's logs, and run the same command again"
            return Outcome(
                item.index, None, WorkerError(f"its worker or node was lost {item.number} times: {remedy}")
            ), None
        if isinstance(error, exceptions.OutOfMemoryError):
            more, why = 2 * item.memory, "its node ran out of memory"
        else:
            more, why = item.memory, "its worker or node was lost"
        return None, _Try(item.index, min(more, share.memory), item.number + 1, now, why)
    except exceptions.RayTaskError as error:
        raise error.cause from None
    except exceptions.RayError as error:  # no other machine would do better
        reason = str(error).strip().splitlines()[0].rstrip(".") or type(error).__name__
        return Outcome(item.index, None, WorkerError(f"Ray gave it up: {reason}: look at Ray's logs")), None
    if isinstance(outcome.error, BusyError) and item.lost and now < item.lost + _LEASE:
        return None, replace(item, earliest=now + _PAUSE)  # the lock of the lost one is not yet gone
    return outcome, None


def _perform(shared: tuple[Any, str], index: int, job: Any, threads: int, mailbox: Any) -> Outcome[Any]:
    """In a worker: do one job, where the driver's relative paths mean what they mean there."""
    work, folder = shared
    try:
        os.chdir(folder)
    except OSError as error:
        where = ray.util.get_node_ip_address()
        finding = f"the node {where} cannot enter {folder} ({error.strerror})"
        return Outcome(index, None, ConfigError(f"{finding}: start the command in a folder that all nodes share"))
    outcome = attempt(index, work, job, threads, Sender(mailbox.put.remote))
    with suppress(exceptions.RayActorError):
        ray.get(mailbox.reached.remote())
    return outcome


class _Mailbox:
    """An actor beside the driver that holds what workers tell until the driver takes it."""

    def __init__(self) -> None:
        self._events: list[Event | None] = []
        self._arrived = asyncio.Event()

    async def put(self, event: Event | None) -> None:
        """Leave an event; None says that no more will be read."""
        self._events.append(event)
        self._arrived.set()

    async def reached(self) -> None:
        """Answer a caller, whose events before this call are all here."""

    async def take(self) -> list[Event | None]:
        """All events since the last call, once there is one."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events


def _listen(mailbox: Any, progress: Progress) -> None:
    try:
        while True:
            for event in ray.get(mailbox.take.remote()):
                if event is None:
                    return
                deliver(event, progress)
    except exceptions.RayError:
        return  # nobody hears the rest; the jobs go on
