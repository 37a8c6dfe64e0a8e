"""Open a contribution in whatever encoding it has.

`full` and `body` are plain safetensors checkpoints, with and without a head; `delta-bf16` and `delta-int8` are
differences from the base (`checkpoints/deltas.py`); `adapter` is a low-rank one (`checkpoints/lora.py`). Pickles are
read only with --allow-pickle (`checkpoints/pickles.py`).
"""

from coldctl.artifacts import layout
from coldctl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from coldctl.checkpoints.deltas import open_delta
from coldctl.checkpoints.lora import open_adapter
from coldctl.checkpoints.pickles import open_pickled
from coldctl.common.errors import ModelError
from coldctl.storage.local import Folder


def open_contribution(folder: Folder, name: str, base: Checkpoint | None, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a contribution in whatever encoding. Differences and adapters are decoded with `base`.

    Raises CheckpointError or ModelError for what cannot be read, or not without its base.
    """
    if folder.has(layout.WEIGHTS) or folder.has(layout.WEIGHTS_INDEX):
        return open_checkpoint(folder, name)
    if folder.has(layout.DELTA_WEIGHTS):
        return open_delta(folder, name, _require(base, "a difference"))
    if folder.has(layout.ADAPTER_CONFIG):
        return open_adapter(folder, name, _require(base, "an adapter"))
    return open_pickled(folder, name) if allow_pickle else open_checkpoint(folder, name)


def _require(base: Checkpoint | None, kind: str) -> Checkpoint:
    """Return the base. Raises ModelError if there is none."""
    if base is None:
        raise ModelError(f"it is {kind}, which only its base can decode: give --base")
    return base
