"""Export of a trained model into its contribution, in the encoding that `--send` asks for."""

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
from coldctl.storage.files import LocalFolder
from coldctl.training import trainable

_SHARD = 5_000_000_000  # bytes; larger bodies are written in several files
_MODEL = "whole"  # folder of the full trained model, temporary, from which body or delta are written


def write_weights(
    model: nn.Module,
    adapted: Any | None,
    folder: Path,
    base: Checkpoint,
    config: FinetuneConfig,
    name: str,
    progress: Progress,
) -> None:
    """Write the weights that `config.send` asks for into `folder`; `adapted` is PEFT's wrapper of the model, if it has adapters.

    Raises CheckpointError for a delta that its encoding cannot represent.
    """
    if adapted is not None:
        trainable.save_adapter(adapted.cpu(), folder, base.name, body_only=config.body_only)
        return
    model.cpu()
    encoding = encoding_of(config)
    if encoding == "full":
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    full = folder / layout.TRAINING / _MODEL
    model.save_pretrained(full)  # type: ignore[operator]
    source = open_checkpoint(LocalFolder(full), name)
    if encoding == "body":
        write_body(source, folder, None, _SHARD, progress, f"{name}: write the body")
        write_config(source, folder, None)
        return
    write_delta(source, base, folder, encoding)


def open_written(folder: Path, name: str, base: Checkpoint, config: FinetuneConfig) -> Checkpoint:
    """Open the contribution that `write_weights` wrote, which has no manifest yet."""
    encoding, place = encoding_of(config), LocalFolder(folder)
    if encoding == "adapter":
        return open_adapter(place, name, base)
    return open_delta(place, name, base, encoding) if encoding in ENCODINGS else open_checkpoint(place, name)


def encoding_of(config: FinetuneConfig) -> str:
    """Return the encoding as the manifest names it."""
    if config.send == "lora":
        return "adapter"
    return "body" if config.body_only and config.send == "full" else config.send or "full"
