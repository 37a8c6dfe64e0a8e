"""Batches for the training loop: how examples are drawn, grouped by length, and padded."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coldctl.common.digests import derived_seed
from coldctl.data.texts import Ragged
from coldctl.training.model import Encoded

_WINDOW = 50  # batches among which examples are grouped by length


@dataclass(frozen=True)
class Examples:
    """Tokenised examples with their labels.

    Labels are class indices int64 [n], numbers float64 [n], or 0 and 1 for each class uint8 [n, classes].
    """

    encoded: Encoded
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.encoded)


def length_batches(lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """Yield one epoch's batches of row indices, int64 [batch]: shuffled, grouped by length within windows, in shuffled order.

    The sequence depends on `seed` and `epoch` alone.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    window = batch_size * _WINDOW
    for start in range(0, len(order), window):
        indices = order[start : start + window]
        order[start : start + window] = indices[np.argsort(lengths[indices], kind="stable")]
    # Windows are whole numbers of batches, so batches are ranges of the grouped order.
    for index in generator.permutation(math.ceil(len(order) / batch_size)).tolist():
        yield order[index * batch_size : (index + 1) * batch_size]


def task_batches(
    lengths: Sequence[NDArray[np.int64]], batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield one epoch's batches of several tasks, each with its task's number, interleaved by `seed` and `epoch`.

    `lengths` are the tokens per example of each task, int64 [examples].
    """
    if len(lengths) == 1:
        yield from ((0, batch) for batch in length_batches(lengths[0], batch_size, seed, epoch))
        return
    queues = [length_batches(own, batch_size, derived_seed(seed, number), epoch) for number, own in enumerate(lengths)]
    order = np.repeat(np.arange(len(lengths)), [math.ceil(len(own) / batch_size) for own in lengths])
    for number in np.random.default_rng([seed, epoch]).permutation(order).tolist():
        yield number, next(queues[number])


def sorted_batches(lengths: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield batches of row indices for a pass without training, longest first, so that memory peaks at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def collate(
    encoded: Encoded, indices: Sequence[int] | NDArray[np.int64], padding: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return a batch padded to its longest example: `input_ids` and `attention_mask` int64 [batch, length].

    Models with token types also get `token_type_ids`, int64 [batch, length].
    """
    rows = np.asarray(indices)
    lengths = encoded.tokens.offsets[rows + 1] - encoded.tokens.offsets[rows]
    real = np.arange(lengths.max(initial=0)) < lengths[:, None]
    batch = {"input_ids": _padded(encoded.tokens, rows, real, padding), "attention_mask": torch.from_numpy(real).long()}
    if encoded.types is not None:
        batch["token_type_ids"] = _padded(encoded.types, rows, real, 0)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _padded(data: Ragged, rows: NDArray[np.int64], real: NDArray[np.bool_], padding: int) -> torch.Tensor:
    """Return the rows of `data` where `real` is True and `padding` elsewhere, int64 of its shape."""
    filled = np.full(real.shape, padding, np.int64)
    filled[real] = np.concatenate([data[row] for row in rows.tolist()])
    return torch.from_numpy(filled)
