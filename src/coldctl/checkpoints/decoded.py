"""Checkpoints whose files do not hold the body as it is: it is decoded block by block, with the help of their base.

Everything behind them (digests, screening, methods) sees a full body.
"""

from dataclasses import dataclass, field

from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.checkpoints.header import Tensor

DECODED = "decoded:"  # stands for a file name in tensors that no file holds as they are


@dataclass
class RelativeCheckpoint(Checkpoint):
    """A checkpoint that says how it differs from `base`; with another base it would be decoded to something else."""

    base: Checkpoint | None = None


@dataclass
class SharedCheckpoint(Checkpoint):
    """A checkpoint of which many readers ask the same piece in turn: the last one is kept, and read once."""

    _last: tuple[tuple[str, int, int, int], bytes] | None = field(default=None, repr=False)

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Read elements of `tensor` from `start` on, or give what was read last. Raises CheckpointError."""
        asked = (tensor.file, tensor.offset, start, len(buffer))
        last = self._last
        if last is not None and last[0] == asked:
            buffer[:] = last[1]
            return
        super().read_into(tensor, start, buffer)
        self._last = asked, bytes(buffer)


def shared(checkpoint: Checkpoint) -> SharedCheckpoint:
    """A checkpoint for the use of many that are decoded with its help."""
    return SharedCheckpoint(
        checkpoint.folder, checkpoint.name, checkpoint.config, checkpoint.body, checkpoint.heads, checkpoint.prefix,
        checkpoint.files, checkpoint.manifest, checkpoint.original,
    )  # fmt: skip
