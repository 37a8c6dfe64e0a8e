"""Checkpoints in torch's pickles, read by the weights-only unpickler."""

import io
import re
import warnings
import zipfile
from contextlib import closing
from typing import Any

from numpy.typing import NDArray

from coldctl.artifacts import layout
from coldctl.checkpoints.checkpoint import Checkpoint, InMemory, body_names, read_model_config
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


def open_pickled(folder: Folder, name: str) -> Checkpoint:
    """Open a checkpoint in `pytorch_model.bin`, read by torch's weights-only unpickler, which executes nothing.

    Raises CheckpointError. Such a checkpoint is held in memory as a whole.
    """
    config = read_model_config(folder)
    files = [file for file in folder.names() if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", file)]
    if not files:
        raise CheckpointError(f"{folder.label} has no {layout.WEIGHTS} and no pytorch_model.bin: it holds no weights")
    arrays: dict[str, NDArray[Any]] = {}
    sizes: dict[str, int] = {}
    for file in files:
        with closing(folder.open(file)) as reader:
            data = bytearray(reader.size)
            reader.read_into(0, memoryview(data))
        sizes[file] = len(data)
        for raw, array in _unpickled(data, f"{folder.label}/{file}").items():
            if raw in arrays:
                raise CheckpointError(f"{folder.label}: {raw!r} stands twice: the checkpoint is ambiguous")
            arrays[raw] = array
    held = {unprefixed: arrays[raw] for unprefixed, raw in body_names(config, arrays, folder.label).items()}
    body = {unprefixed: Tensor(_dtype_name(array), array.shape) for unprefixed, array in held.items()}
    return Checkpoint(folder, name, config, body, sizes, InMemory(held))


def _unpickled(data: bytearray, where: str) -> dict[str, NDArray[Any]]:
    """Return the tensors of a pickle by raw name. Raises CheckpointError for anything but plain tensors."""
    import torch

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
    arrays: dict[str, NDArray[Any]] = {}
    for key, value in state.items():
        if str(key) in arrays:
            raise CheckpointError(f"{where}: {str(key)!r} stands twice: the checkpoint is ambiguous")
        arrays[str(key)] = _as_array(value, len(data), f"{where}: {str(key)!r}")
    return arrays


def _refuse_bomb(data: bytearray, where: str) -> None:
    """Raise CheckpointError for a compressed archive: torch compresses nothing, and a small file could fill the memory."""
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
    """Return a tensor of a pickle as an array.

    Raises CheckpointError, also for a tensor of more than `most` bytes: it repeats a few of them without end.
    """
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
