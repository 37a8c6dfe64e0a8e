"""Data-parallel training by `torchrun` or `accelerate launch`.

Each computes its share of every batch; gradients are summed, so the step is that of the whole batch. The first
process (rank 0) reads, decides and writes; the others follow. Without such a launcher the team has one member.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from coldctl.common.errors import ColdctlError, ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of a training, and the rank of this one. Alone, it has size 1 and needs no torch."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Return True in the process that writes."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Return the main process's value, in every process."""
        if self.size == 1:
            return value
        from torch import distributed

        self._connect()
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_tensors(self, tensors: Iterable[Any]) -> None:
        """Overwrite the tensors with the main process's."""
        if self.size > 1:
            from torch import distributed

            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        from torch import distributed

        self._connect()
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def check_agreement(self, key: str | None, error: ColdctlError | None) -> None:
        """Raise in every process the error of any of them, or ConfigError if their keys differ."""
        answers = self.all_gather((key, error))
        for rank, (_, theirs) in enumerate(answers):
            if theirs is not None:
                raise type(theirs)(f"process {rank}: {theirs.message}" if rank else theirs.message, theirs.details)
        if len({key for key, _ in answers}) > 1:
            raise ConfigError("the processes see different data or bases: give all of them the same files and flags")

    def sum_gradients(self, parameters: Iterable[Any], loss: Any) -> Any:
        """Replace each gradient by its sum over all processes; return the sum of the losses, a scalar tensor."""
        if self.size == 1:
            return loss
        import torch
        from torch import distributed

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([loss.reshape(1), *(gradient.reshape(-1) for gradient in gradients)])
        distributed.all_reduce(flat)
        total, *sums = torch.split(flat, [1, *(gradient.numel() for gradient in gradients)])
        for gradient, summed in zip(gradients, sums, strict=True):
            gradient.copy_(summed.view_as(gradient))
        return total.reshape(())

    def all_reduce(self, array: NDArray[Any], device: Any) -> NDArray[np.float64]:
        """Return the sum of all processes' arrays, float64 of the same shape."""
        if self.size == 1:
            return array.astype(np.float64)
        import torch
        from torch import distributed

        tensor = torch.from_numpy(array.astype(np.float64 if device.type != "mps" else np.float32)).to(device)
        distributed.all_reduce(tensor)
        result: NDArray[np.float64] = tensor.cpu().numpy().astype(np.float64)
        return result

    def _connect(self) -> None:
        """Join the process group, once."""
        import torch
        from torch import distributed

        if not distributed.is_initialized():
            if torch.cuda.is_available():  # pragma: no cover  (needs a GPU)
                torch.cuda.set_device(self.local_rank)
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def find() -> Team:
    """Return the team that a launcher's environment variables describe. Raises ConfigError."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        return Team()
    size = os.environ["WORLD_SIZE"]
    try:
        return Team(
            int(os.environ["RANK"]),
            int(size),
            int(os.environ.get("LOCAL_RANK", "0")),
            int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        )
    except ValueError:
        raise ConfigError(
            "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be whole numbers: start with torchrun, or unset them"
        ) from None


def disband() -> None:
    """Leave the process group, if this process joined one."""
    if "torch.distributed" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
