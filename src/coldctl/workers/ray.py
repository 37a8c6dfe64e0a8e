"""Jobs on a Ray cluster, as tasks with stated CPUs, GPUs and memory.

A job whose worker or node is lost is run again on another one, and resumes from what it left in the shared storage.
Results come back through Ray and must be small.
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
    deliver,
    run_job,
    side_by_side,
    thread_environment,
)
from coldctl.workers.local import cores

_LOST = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,
    exceptions.ObjectLostError,  # of a result on a lost node
    exceptions.RuntimeEnvSetupError,  # of a node that is shutting down
)
_ATTEMPTS = 5  # at one job whose workers are lost
_MOST_PENDING = 1000  # jobs submitted at once without --jobs: an autoscaling cluster grows by pending jobs
_LEASE = 300.0  # seconds after which the lock of a lost machine must have expired
_PAUSE = 2.0  # seconds between attempts to take such a lock


@dataclass(frozen=True)
class _Attempt:
    """One attempt at one job."""

    index: int
    memory: int  # bytes
    number: int = 1
    lost: float = 0.0  # when the previous attempt was lost, by the monotonic clock
    why: str = ""
    earliest: float = 0.0  # start time, by the monotonic clock


@dataclass(frozen=True)
class _Share:
    """Resources of each job on the cluster as it is now."""

    threads: int
    gpus: int
    memory: int  # bytes of the largest node, the limit of any job


class Ray:
    """An engine on the cluster at `address` (None: $RAY_ADDRESS, else one on this machine that `close` stops).

    At most `jobs` run at once (0: as many as fit), each with `threads`, or with its share of the nodes' CPUs. With the
    same threads per job the outputs have the same bytes as on one machine.
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

        Raises ConfigError if there is no cluster. Errors of a worker other than ColdctlError are raised here.
        """
        if not jobs:
            return
        self._start()
        share = self._share(len(jobs), needs, progress)
        shared = ray.put((work, str(Path.cwd())))
        listener = threading.Thread(target=_listen, args=(self._mailbox, progress), daemon=True)
        listener.start()
        waiting = [_Attempt(index, min(needs.memory, share.memory)) for index in range(len(jobs))]
        running: dict[Any, _Attempt] = {}
        try:
            while waiting or running:
                for attempt in _due(waiting, (self._jobs or _MOST_PENDING) - len(running)):
                    running[self._submit(shared, attempt, jobs[attempt.index], share)] = attempt
                if not running:
                    time.sleep(_PAUSE)
                    continue
                for reference in ray.wait(list(running), timeout=_PAUSE if waiting else None)[0]:
                    attempt = running.pop(reference)
                    outcome, again = _collected(reference, attempt, share)
                    if again is not None:
                        waiting.append(again)
                        if again.number > attempt.number:
                            progress.note(f"{jobs[attempt.index].title}: {again.why}, it is done again")
                    if outcome is not None:
                        yield outcome
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            self._mailbox.put.remote(None)
            listener.join(timeout=5)

    def close(self) -> None:
        """Leave the cluster; stop it if it was started for these jobs."""
        if self._joined:
            ray.shutdown()
        self._mailbox, self._joined = None, False

    def _start(self) -> None:
        """Connect to the cluster. Raises ConfigError."""
        if self._mailbox is not None:
            return
        if not ray.is_initialized():
            local = self._address == "local"
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
            # Ray's default of 15 would slow its workers down whenever anything else runs on this machine.
            os.environ.setdefault("RAY_worker_niceness", "0")
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

    def _share(self, jobs: int, needs: Needs, progress: Progress) -> _Share:
        """Return the resources of each of `jobs`, as many as possible at once. Raises ConfigError for too many threads."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(needs.gpu and any(node.get("GPU") for node in nodes))
        room = [(int(node.get("CPU", 0)), int(node.get("GPU", 0)) if gpus else jobs) for node in nodes]
        largest = max((cpus for cpus, places in room if places), default=0)

        def fitting(threads: int) -> int:
            """Return how many jobs of so many threads fit at once."""
            return sum(min(cpus // threads, places) for cpus, places in room)

        count = side_by_side(self._jobs, jobs, fitting(1))
        share = next((threads for threads in range(largest, 0, -1) if fitting(threads) >= count), 1)
        if (threads := self._threads or share) > largest:
            if self._address == "local":
                raise ConfigError(f"--threads {threads}: this machine has {largest} cores: give at most that")
            progress.note(f"no node of the cluster has {threads} free CPUs for a job yet: waiting for one that has")
        return _Share(threads, gpus, max((int(node.get("memory", 0)) for node in nodes), default=0))

    def _submit(self, shared: Any, attempt: _Attempt, job: Any, share: _Share) -> Any:
        """Submit one attempt and return its Ray reference."""
        options = {
            "num_cpus": share.threads,
            "num_gpus": share.gpus,
            "memory": attempt.memory or None,
            "max_retries": 0,  # `run` retries, and logs it
            "runtime_env": {"env_vars": thread_environment(share.threads)},
        }
        task = ray.remote(_perform).options(**options)
        return task.remote(shared, attempt.index, job, share.threads, self._mailbox)


def _knock(address: str) -> None:
    """Raise OSError at once if nothing listens at `address`; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _due(waiting: list[_Attempt], room: int) -> list[_Attempt]:
    """Remove and return up to `room` attempts of `waiting` that may start now."""
    now = time.monotonic()
    chosen = [attempt for attempt in waiting if attempt.earliest <= now][: max(0, room)]
    for attempt in chosen:
        waiting.remove(attempt)
    return chosen


def _collected(reference: Any, attempt: _Attempt, share: _Share) -> tuple[Outcome[Any] | None, _Attempt | None]:
    """Return a job's outcome, or the next attempt if this one was lost."""
    now = time.monotonic()
    try:
        outcome: Outcome[Any] = ray.get(reference)
    except _LOST as error:
        if attempt.number >= _ATTEMPTS:
            remedy = "look at the nodes' memory and at Ray's logs, and run the same command again"
            return Outcome(
                attempt.index, None, WorkerError(f"its worker or node was lost {attempt.number} times: {remedy}")
            ), None
        if isinstance(error, exceptions.OutOfMemoryError):
            memory, why = 2 * attempt.memory, "its node ran out of memory"
        else:
            memory, why = attempt.memory, "its worker or node was lost"
        return None, _Attempt(attempt.index, min(memory, share.memory), attempt.number + 1, now, why)
    except exceptions.RayTaskError as error:
        raise error.cause from None
    except exceptions.RayError as error:  # retrying on another node would not help
        reason = str(error).strip().splitlines()[0].rstrip(".") or type(error).__name__
        return Outcome(attempt.index, None, WorkerError(f"Ray gave it up: {reason}: look at Ray's logs")), None
    if isinstance(outcome.error, BusyError) and attempt.lost and now < attempt.lost + _LEASE:
        return None, replace(attempt, earliest=now + _PAUSE)  # the lost worker's lock has not expired yet
    return outcome, None


def _perform(shared: tuple[Any, str], index: int, job: Any, threads: int, mailbox: Any) -> Outcome[Any]:
    """Run one job in a worker, in the driver's working directory so that relative paths hold."""
    work, folder = shared
    try:
        os.chdir(folder)
    except OSError as error:
        where = ray.util.get_node_ip_address()
        finding = f"the node {where} cannot enter {folder} ({error.strerror})"
        return Outcome(index, None, ConfigError(f"{finding}: start the command in a folder that all nodes share"))
    outcome = run_job(index, work, job, threads, Sender(mailbox.put.remote))
    with suppress(exceptions.RayActorError):
        ray.get(mailbox.reached.remote())
    return outcome


class _Mailbox:
    """An actor on the driver's node that queues the workers' progress events."""

    def __init__(self) -> None:
        self._events: list[Event | None] = []
        self._arrived = asyncio.Event()

    async def put(self, event: Event | None) -> None:
        """Queue an event; None ends the queue."""
        self._events.append(event)
        self._arrived.set()

    async def reached(self) -> None:
        """Return once all earlier events of the caller have arrived."""

    async def take(self) -> list[Event | None]:
        """Wait for an event and return all since the last call."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events


def _listen(mailbox: Any, progress: Progress) -> None:
    """Repeat the workers' calls of Progress until the mailbox ends."""
    try:
        while True:
            for event in ray.get(mailbox.take.remote()):
                if event is None:
                    return
                deliver(event, progress)
    except exceptions.RayError:
        return  # the mailbox is lost: jobs continue without progress
