"""What of a trained model goes into its contribution, in the encoding that was asked for."""

from pathlib import Path
from typing import Any

from torch import nn

from coldctl.artifacts import layout
from coldctl.checkpoints.body_export import write_body, write_config
from coldctl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from coldctl.checkpoints.deltas import ENCODINGS, open_delta, write_delta
from coldctl.checkpoints.lora import open_adapter
from coldctl.common.progress import Progress
from coldctl.config.settings import FinetuneConfig
from coldctl.storage.local import LocalFolder
from coldctl.training import trainable

_SHARD = 5_000_000_000  # bytes; larger bodies are written in several files
_WHOLE = "whole"  # below the training's own folder: the trained model as it is, until what is sent of it is written


def write_weights(
    model: nn.Module,
    adapted: Any | None,
    folder: Path,
    base: Checkpoint,
    config: FinetuneConfig,
    name: str,
    progress: Progress,
) -> None:
    """Write the weights that `config.send` asks for into `folder`; `adapted` is PEFT's wrapper where there is one.

    Raises CheckpointError for a difference that its encoding cannot hold.
    """
    if adapted is not None:
        trainable.save_adapter(adapted.cpu(), folder, base.name, body_only=config.body_only)
        return
    model.cpu()
    encoding = encoding_of(config)
    if encoding == "full":
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    whole = folder / layout.TRAINING / _WHOLE
    model.save_pretrained(whole)  # type: ignore[operator]
    source = open_checkpoint(LocalFolder(whole), name)
    if encoding == "body":
        write_body(source, folder, None, _SHARD, progress, f"{name}: write the body")
        write_config(source, folder, None)
        return
    write_delta(source, base, folder, encoding)


def open_written(folder: Path, name: str, base: Checkpoint, config: FinetuneConfig) -> Checkpoint:
    """What `write_weights` wrote, before it has a manifest."""
    encoding, place = encoding_of(config), LocalFolder(folder)
    if encoding == "adapter":
        return open_adapter(place, name, base)
    return open_delta(place, name, base, encoding) if encoding in ENCODINGS else open_checkpoint(place, name)


def encoding_of(config: FinetuneConfig) -> str:
    """How the manifest calls what is sent."""
    if config.send == "lora":
        return "adapter"
    return "body" if config.body_only and config.send == "full" else config.send or "full"
