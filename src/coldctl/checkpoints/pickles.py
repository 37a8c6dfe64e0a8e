"""Checkpoints in torch's pickles, where they are asked for: read by the weights-only unpickler, held in memory."""

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.artifacts import layout
from coldctl.checkpoints.checkpoint import Checkpoint, body_prefix, modern_name, read_model_config
from coldctl.checkpoints.decoded import DECODED
from coldctl.checkpoints.header import DTYPES, Tensor
from coldctl.common.errors import CheckpointError
from coldctl.storage.local import Folder

_PLAIN_DTYPES = (
    "torch.float64",
    "torch.float32",
    "torch.float16",
    "torch.bfloat16",
    "torch.int",
    "torch.uint8",
    "torch.bool",
)


@dataclass
class MemoryCheckpoint(Checkpoint):
    """Tensors that are held in memory, because their format has no ranges."""

    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Copy elements from `start` on."""
        data = self.arrays[tensor.file.removeprefix(DECODED)].reshape(-1).view(np.uint8).data
        begin = start * DTYPES[tensor.dtype].itemsize
        buffer[:] = data[begin : begin + len(buffer)]


def open_pickled(folder: Folder, name: str) -> Checkpoint:
    """A checkpoint in `pytorch_model.bin`, read by torch's weights-only unpickler, which executes nothing.

    Raises CheckpointError. Such a checkpoint is held in memory as a whole.
    """
    import torch

    config = read_model_config(folder)
    files = [file for file in folder.names() if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", file)]
    if not files:
        raise CheckpointError(f"{folder.label} has no {layout.WEIGHTS} and no pytorch_model.bin: it holds no weights")
    raw: dict[str, NDArray[Any]] = {}
    sizes: dict[str, int] = {}
    for file in files:
        where = f"{folder.label}/{file}"
        reader = folder.open(file)
        try:
            data = bytearray(reader.size)
            reader.read_into(0, memoryview(data))
        finally:
            reader.close()
        sizes[file] = reader.size
        _refuse_bomb(data, where)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice to whoever wrote it
                state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler refuses in many ways
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{where} is not plain weights ({reason}): do not use it") from None
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise CheckpointError(f"{where} holds other things than tensors: do not use it")
        for key, value in state.items():
            if str(key) in raw:
                raise CheckpointError(f"{folder.label}: {str(key)!r} stands twice: the checkpoint is ambiguous")
            raw[str(key)] = _as_array(value, len(data), f"{where}: {str(key)!r}")
    tensors = {key: Tensor(DECODED + key, 0, _dtype_name(value), value.shape) for key, value in raw.items()}
    prefix = body_prefix(config, tensors, folder.label)
    body: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix) and body.setdefault(modern_name(key[len(prefix) :]), tensor) is not tensor:
            raise CheckpointError(f"{folder.label}: two tensors are called {key!r}: the checkpoint is ambiguous")
    heads = tuple(key for key in tensors if not key.startswith(prefix))
    return MemoryCheckpoint(folder, name, config, dict(sorted(body.items())), heads, prefix, sizes, arrays=raw)


def _refuse_bomb(data: bytearray, where: str) -> None:
    """torch stores what it packs as it is: what is compressed was made to unpack to more than anybody expects."""
    file = io.BytesIO(data)
    try:
        packed = zipfile.is_zipfile(file) and any(
            item.compress_type != zipfile.ZIP_STORED for item in zipfile.ZipFile(file).infolist()
        )
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{where} is not plain weights ({error}): do not use it") from None
    if packed:
        raise CheckpointError(f"{where} is compressed, which torch's own files are not: do not use it")


def _as_array(value: Any, most: int, where: str) -> NDArray[Any]:
    """A tensor of a pickle as an array. One that claims more than `most` bytes repeats a few of them without end."""
    import torch

    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.numel() * value.element_size() > most or not str(value.dtype).startswith(_PLAIN_DTYPES):
        raise CheckpointError(f"{where} is no plain tensor: convert the checkpoint to safetensors")
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        words: NDArray[Any] = value.view(torch.int16).numpy()
        return words.view(DTYPES["BF16"])
    array: NDArray[Any] = value.numpy()
    return array


def _dtype_name(array: NDArray[Any]) -> str:
    return next(key for key, dtype in DTYPES.items() if dtype == array.dtype)
