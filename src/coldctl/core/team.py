"""Several processes that train one model together, as `torchrun` and `accelerate launch` start them.

Each computes its share of every batch; gradients are summed, so the step is that of the whole batch. The first
process (rank 0) reads, decides and writes; the others follow. Without such a launcher the team has one member.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The place of this process among its peers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def agreed(self, value: T) -> T:
        """The leader's value, everywhere."""
        if self.size == 1:
            return value
        from torch import distributed

        self._meet()
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, tensors: Iterable[Any]) -> None:
        """Overwrite tensors by the leader's."""
        if self.size > 1:
            from torch import distributed

            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def sum_gradients(self, parameters: Iterable[Any]) -> None:
        """Replace each gradient by the sum over the team."""
        if self.size > 1:
            import torch
            from torch import distributed

            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            distributed.all_reduce(flat)
            sizes = [gradient.numel() for gradient in gradients]
            for gradient, part in zip(gradients, torch.split(flat, sizes), strict=True):
                gradient.copy_(part.view_as(gradient))

    def summed(self, array: NDArray[Any], device: Any) -> NDArray[np.float64]:
        """The sum of everyone's array, float64."""
        if self.size == 1:
            return array.astype(np.float64)
        import torch
        from torch import distributed

        tensor = torch.from_numpy(array.astype(np.float64 if device.type != "mps" else np.float32)).to(device)
        distributed.all_reduce(tensor)
        result: NDArray[np.float64] = tensor.cpu().numpy().astype(np.float64)
        return result

    def _meet(self) -> None:
        import torch
        from torch import distributed

        if not distributed.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(self.local_rank)
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def find() -> Team:
    """The team that a launcher's environment describes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return Team()
    return Team(
        int(os.environ["RANK"]),
        size,
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", str(size))),
    )


def disband() -> None:
    """Leave the team in order, if there is one."""
    import sys

    if "torch.distributed" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
