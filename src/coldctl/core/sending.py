"""What of a trained model goes into its contribution, in the encoding that was asked for."""

from pathlib import Path
from typing import Any

from torch import nn

from coldctl.core import layout, trainable
from coldctl.core.adapters import open_adapter
from coldctl.core.checkpoint import Checkpoint, body_digest, open_checkpoint
from coldctl.core.config import FinetuneConfig
from coldctl.core.deltas import open_delta, write_delta
from coldctl.core.progress import Progress
from coldctl.core.residuals import account
from coldctl.core.storage import LocalFolder

_WHOLE = "whole"  # below the training's own folder: the trained model as it is, until what is sent of it is written


def write_weights(
    model: nn.Module,
    adapted: Any | None,
    folder: Path,
    base: Checkpoint,
    base_digest: str,
    config: FinetuneConfig,
    name: str,
    progress: Progress,
) -> None:
    """Write the weights that `config.send` asks for into `folder`; `adapted` is PEFT's wrapper where there is one.

    What 8-bit rounding loses is settled in the account of the contributor `name`. Raises CheckpointError for a
    difference that its encoding cannot hold, OutputError for an account that cannot be kept.
    """
    if adapted is not None:
        trainable.save_adapter(adapted.cpu(), folder, base.name)
        return
    model.cpu()
    if config.send == "full":
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    whole = folder / layout.TRAINING / _WHOLE
    model.save_pretrained(whole)  # type: ignore[operator]
    source = open_checkpoint(LocalFolder(whole), name)
    if config.send != "delta-int8":
        write_delta(source, base, folder, encoding_of(config))
        return
    with account(name, base.manifest, base_digest) as own:
        owed = own.opened(base)
        if owed:
            progress.note(f"{name}: takes along what rounding left of {len(owed)} contribution(s) before")
        write_delta(source, base, folder, "delta-int8", owed=owed, residual=own.draft)
        own.settle(body_digest(open_written(folder, name, base, config)))


def open_written(folder: Path, name: str, base: Checkpoint, config: FinetuneConfig) -> Checkpoint:
    """What `write_weights` wrote, before it has a manifest."""
    encoding, place = encoding_of(config), LocalFolder(folder)
    if encoding == "adapter":
        return open_adapter(place, name, base)
    return open_checkpoint(place, name) if encoding == "full" else open_delta(place, name, base, encoding)


def encoding_of(config: FinetuneConfig) -> str:
    """How the manifest calls what is sent."""
    return "adapter" if config.send == "lora" else config.send or "full"
