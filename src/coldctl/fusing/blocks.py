"""Read the same block of every body side by side, each byte once, and take digests.

A block is the same range of elements of the same tensor in the base and in every contribution. The memory for
blocks is a constant that the contributions share, so it grows neither with their number nor with their size.
Reader threads fill one set of buffers while the caller computes on the other; files and sha256 let go of the
interpreter's lock, so both cores work.
"""

import hashlib
from collections.abc import Callable, Container, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.checkpoints.digests import digest_prelude
from coldctl.checkpoints.header import DTYPES, Tensor
from coldctl.storage.remote import RemoteFolder, look_ahead

MEMORY = 48 << 20  # bytes of buffers, over both sets
_LARGEST = 1 << 18  # elements per block: what still fits the processor's shared cache
_WIDEST = 8  # bytes of the widest dtype
_CHUNK = 128 << 20  # bytes of all bodies together that are summed apart, and are worth sending to another machine
_MOST_CHUNKS = 2048
_THREADS = 2
# A store is far away: several of its files are read at a time.
_STORE_THREADS = 8


@dataclass(frozen=True)
class Block:
    """Elements `start:stop` (row-major) of one floating body tensor, in stored dtypes.

    The arrays are views of buffers that are overwritten after the next block has been asked for.
    """

    name: str
    start: int
    stop: int
    base: NDArray[Any]
    contributions: Sequence[NDArray[Any]]
    companions: Sequence[NDArray[Any]] = ()  # what is read along: Fisher information, the outer optimiser's state


@dataclass(frozen=True)
class BlockRange:
    """Elements `start:stop` (row-major) of a floating body tensor: where a block is."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        """Number of elements."""
        return self.stop - self.start


Chunk = Sequence[BlockRange]


class Digester:
    """Takes a checkpoint's body digest from pieces as they are read, in name order."""

    def __init__(self) -> None:
        self._body = hashlib.sha256()

    def feed(self, name: str, tensor: Tensor, start: int, data: memoryview) -> None:
        """Take in `data`, the elements of `tensor` from `start` on."""
        if start == 0:
            self._body.update(digest_prelude(name, tensor))
        self._body.update(data)

    def body_digest(self) -> str:
        """Return the body digest, once all floating body tensors were fed."""
        return "sha256:" + self._body.hexdigest()


def block_length(width: int) -> int:
    """Elements per block where one element of all bodies together has `width` bytes: two sets fit the memory."""
    return max(1, min(_LARGEST, MEMORY // (2 * width)))


def cut(base: Checkpoint, others: Sequence[Checkpoint], names: Sequence[str], length: int | None = None) -> Chunk:
    """Return the blocks in which tensors `names` of the base are read beside those of the other bodies, in that order.

    Every tensor has one, though it be empty. `length` is that of a block in elements, if it is not to be found out.
    """
    length = length or block_length(sum(map(_widest, [base, *others])))
    return [
        BlockRange(name, start, min(start + length, base.body[name].size))
        for name in names
        for start in range(0, max(1, base.body[name].size), length)
    ]


def chunks_of(
    base: Checkpoint, others: Sequence[Checkpoint], names: Sequence[str], apart: Container[str] = ()
) -> list[Chunk]:
    """Return the same blocks in consecutive groups, which depend on the inputs alone; a tensor in `apart` begins a new one.

    A pass sums up each for itself and then the sums, so that whoever computes them, the result has the same bits.
    """
    width = sum(map(_widest, [base, *others]))
    most = max(_CHUNK // width, sum(base.body[name].size for name in names) // _MOST_CHUNKS)
    found: list[list[BlockRange]] = []
    elements = most
    for block_range in cut(base, others, names):
        if elements >= most or (block_range.start == 0 and block_range.name in apart):
            found.append([])
            elements = 0
        found[-1].append(block_range)
        elements += len(block_range)
    return list(found)


def read_blocks(
    base: Checkpoint,
    contributions: Sequence[Checkpoint],
    plan: Chunk,
    digesters: Sequence[Digester | None] | None = None,
    companions: Sequence[Checkpoint] = (),
) -> Generator[Block, None, None]:
    """Yield the blocks of `plan` of the base and of all contributions.

    They are in floating body tensors of the base. A contribution that lacks one (a pooler) gives the base's
    elements, and one that has fewer rows gives the base's behind them; a companion that lacks one gives zeros.
    `digesters` (of the base and of each contribution) are fed with everything read. Raises CheckpointError.
    """
    inputs = [base, *contributions, *companions]
    takers = [*(digesters or [None] * (1 + len(contributions))), *([None] * len(companions))]
    longest = max(map(len, plan), default=0)
    sets = [[bytearray(longest * _widest(checkpoint)) for checkpoint in inputs] for _ in range(2)]
    last = 1 + len(contributions)
    with _Workers(len(inputs), _STORE_THREADS if _look_ahead(inputs) else _THREADS) as workers:

        def fill(number: int, index: int) -> NDArray[Any] | None:
            where = plan[number]
            return _fill(inputs[index], where.name, where.start, where.stop, sets[number % 2][index], takers[index])

        workers.begin(partial(fill, 0) if plan else None)
        for number, where in enumerate(plan):
            arrays = workers.collect()
            workers.begin(partial(fill, number + 1) if number + 1 < len(plan) else None)
            first = arrays[0]
            assert first is not None
            yield Block(
                where.name,
                where.start,
                where.stop,
                first,
                [_completed(array, first) for array in arrays[1:last]],
                [np.zeros(len(where)) if array is None else array for array in arrays[last:]],
            )


def _look_ahead(inputs: Sequence[Checkpoint]) -> bool:
    """Let the inputs that lie in a store be read in pieces worth a request. Whether there are any."""
    remote = [checkpoint.folder for checkpoint in inputs if isinstance(checkpoint.folder, RemoteFolder)]
    look_ahead(remote)
    return bool(remote)


def _completed(part: NDArray[Any] | None, base: NDArray[Any]) -> NDArray[Any]:
    """Fill in from the base what a contribution lacks of a block: a pooler, or the last rows of a smaller vocabulary."""
    if part is None:
        return base
    if part.size == base.size:
        return part
    return np.concatenate([part.astype(np.float64), base[part.size :].astype(np.float64)])


def _widest(checkpoint: Checkpoint) -> int:
    return max((DTYPES[tensor.dtype].itemsize for tensor in checkpoint.body.values()), default=_WIDEST)


def _fill(
    checkpoint: Checkpoint, name: str, start: int, stop: int, buffer: bytearray, digester: Digester | None
) -> NDArray[Any] | None:
    tensor = checkpoint.body.get(name)
    if tensor is None:
        return None
    dtype = DTYPES[tensor.dtype]
    stop = min(stop, tensor.size)
    if stop < start:
        return None
    part = memoryview(buffer)[: (stop - start) * dtype.itemsize]
    checkpoint.read_into(name, start, part)
    if digester is not None:
        digester.feed(name, tensor, start, part)
    return np.frombuffer(part, dtype)


def _each(fill: Callable[[int], NDArray[Any] | None], share: range) -> list[NDArray[Any] | None]:
    return [fill(index) for index in share]


class _Workers:
    """Threads that each own some of the inputs, so that one input's pieces are read and hashed in order."""

    def __init__(self, inputs: int, most: int) -> None:
        count = min(most, inputs)
        self._shares = [range(worker, inputs, count) for worker in range(count)]
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix="coldctl-read") for _ in range(count)]
        self._waiting: list[Future[list[NDArray[Any] | None]]] = []
        self._inputs = inputs

    def begin(self, fill: Callable[[int], NDArray[Any] | None] | None) -> None:
        """Have every input filled: one request per thread, not per input, for there may be hundreds."""
        if fill is not None:
            pairs = zip(self._pools, self._shares, strict=True)
            self._waiting = [pool.submit(_each, fill, share) for pool, share in pairs]

    def collect(self) -> list[NDArray[Any] | None]:
        """Return what was read, in the order of the inputs. Raises what reading raised."""
        arrays: list[NDArray[Any] | None] = [None] * self._inputs
        for future, share in zip(self._waiting, self._shares, strict=True):
            arrays[share.start :: share.step] = future.result()
        return arrays

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)


Array = NDArray[np.float64]
