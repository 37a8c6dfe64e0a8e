"""Read, compare and damage the bodies of checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from coldctl.checkpoints.checkpoint import open_checkpoint
from coldctl.checkpoints.digests import body_digest
from coldctl.storage.local import LocalFolder
from helpers import tiny


def body(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    checkpoint = open_checkpoint(LocalFolder(path), path.name)
    return {name: checkpoint.read(name) for name in checkpoint.body}


def digest(path: Path) -> str:
    return body_digest(open_checkpoint(LocalFolder(path), path.name))


def poison(source: Path, target: Path, value: float) -> Path:
    import torch

    shutil.copytree(source, target)
    tensors, metadata = tiny.read_tensors(target / "model.safetensors")
    name = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    tensors[name][3, 3] = torch.tensor(value)
    tiny.write_tensors(target / "model.safetensors", list(tensors.items()), metadata)
    return target
