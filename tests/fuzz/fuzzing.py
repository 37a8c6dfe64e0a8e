"""Feeding a target: each input in a fresh file, timed; only our documented errors may come out."""

import json
import random
import re
import shutil
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

from targets import Target

from coldctl.common.errors import ColdctlError

SECONDS = 1.0  # of processor time that one input may cost
MEGABYTES = 200  # that all inputs together may add to the process, so that no single one can
LARGEST = 1 << 16  # bytes of an input
_KEPT = 400  # inputs that did something new, to go on from


class FindingError(Exception):
    """An input that our own code does not bear, with what it did."""

    def __init__(self, data: bytes, words: str) -> None:
        super().__init__(words)
        self.data = data


@dataclass
class Tally:
    """What became of a target's inputs."""

    target: str
    engine: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds of processor time
    megabytes: float = 0.0  # that the process grew by
    seconds: float = 0.0
    messages: set[str] = field(default_factory=set)  # ways to be refused, names and numbers taken out

    def as_json(self) -> str:
        return json.dumps({**asdict(self), "messages": len(self.messages)})


class Feeder:
    """A target with its directory, which is made once; only the file under test changes."""

    def __init__(self, target: Target, engine: str) -> None:
        self.target, self.tally = target, Tally(target.name, engine)
        shared = Path("/dev/shm")  # memory, where there is such a place: a disk would only wear out
        self._root = Path(tempfile.mkdtemp(prefix="coldctl-fuzz-", dir=shared if shared.is_dir() else None))
        self._folder = self._root / "it"
        self._folder.mkdir()
        for name, content in target.beside().items():
            (self._folder / name).write_bytes(content)
        self._started = time.perf_counter()
        self._resident = 0.0

    def begin(self) -> list[bytes]:
        """Feed the seeds, one of which must be accepted; what libraries take when they are first used counts for nobody."""
        seeds = self.target.seeds()
        for data in seeds:
            self.feed(data)
        assert self.tally.accepted, f"no seed of {self.target.name} is accepted"
        self._resident = resident()
        return seeds

    def feed(self, data: bytes) -> str:
        """Parse one input. Returns what it was: accepted, or refused in which words. Raises FindingError."""
        (self._folder / self.target.file).write_bytes(data)
        started = time.process_time()
        try:
            self.target.parse(self._folder)
            outcome = "accepted"
            self.tally.accepted += 1
        except ColdctlError as error:
            self._check_words(error.message, data)
            outcome = re.sub(r"'.*?'|\".*?\"|\d+|\S*/\S*", "…", error.message)[:120]
            self.tally.refused += 1
            self.tally.messages.add(outcome)
        except KeyboardInterrupt:
            raise
        except BaseException:
            raise FindingError(data, traceback.format_exc()) from None
        seconds = time.process_time() - started
        self.tally.inputs += 1
        self.tally.slowest = max(self.tally.slowest, seconds)
        if seconds > SECONDS:
            raise FindingError(data, f"it took {seconds:.1f} s")
        if self.tally.inputs % 64 == 0:
            self.measure(data)
        return outcome

    def measure(self, data: bytes) -> None:
        """Take memory and time. Raises FindingError if this or one of the last inputs took more than any may."""
        self.tally.seconds = time.perf_counter() - self._started
        self.tally.megabytes = max(0.0, resident() - self._resident) if self._resident else 0.0
        if self.tally.megabytes > MEGABYTES:
            raise FindingError(
                data, f"the process grew by {self.tally.megabytes:.0f} MB, at the latest with this input"
            )

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    @staticmethod
    def _check_words(message: str, data: bytes) -> None:
        if len(message) > 4000 or not message.strip():
            raise FindingError(data, f"a message of {len(message)} characters")


def resident() -> float:
    """The most memory that this process has held so far, in megabytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def feed_seeded(target: Target, inputs: int, seed: int) -> Tally:
    """Feed `inputs` mutations of the target's seeds, drawn by `seed`; what does something new is mutated again.

    Raises FindingError.
    """
    rng = random.Random(f"{target.name} {seed}")
    feeder = Feeder(target, "own")
    try:
        seeds = feeder.begin()
        known: set[str] = set()
        pool = list(seeds)
        for _ in range(inputs - len(seeds)):
            data = target.mutate(rng, rng.choice(seeds if rng.random() < 0.5 else pool))[:LARGEST]
            outcome = feeder.feed(data)
            if outcome not in known:
                known.add(outcome)
                pool.append(data)
                del pool[len(seeds) : -_KEPT]
        feeder.measure(b"")
    finally:
        feeder.close()
    return feeder.tally
