"""Snapshots of a training, read only if they are whole."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from coldctl.common.errors import CheckpointError, as_os_errors
from coldctl.storage.conditional_write import sync

Tensors = Mapping[str, torch.Tensor]


def write(path: Path, tensors: Tensors, state: Mapping[str, Any]) -> None:
    """Write a checkpoint of tensors and a JSON-serialisable state, with a digest of both. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.partial")
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    text = json.dumps(state)
    with as_os_errors():
        save_file(contiguous, unfinished, {"state": text, "digest": _digest(contiguous, text)})
    # Without this a crash of the machine could leave a complete name and an empty file.
    sync(unfinished)
    unfinished.replace(path)


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and the state of a checkpoint. Raises CheckpointError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
        text, stated = metadata["state"], metadata["digest"]
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path} ({error}): start this training again") from None
    if stated != _digest(tensors, text):
        raise CheckpointError(f"{path} was changed after it was written: start this training again")
    state: dict[str, Any] = json.loads(text)
    return tensors, state


def _digest(tensors: Tensors, text: str) -> str:
    """Return the sha256 of the state's text and of the tensors' names, dtypes, shapes and bytes."""
    hasher = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        hasher.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
