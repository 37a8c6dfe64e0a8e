"""Contributions that are not plain safetensors bodies: low-rank adapters, and pickles where they are asked for.

Both are read as checkpoints whose body is decoded block by block, in the base's dtypes, so that everything
behind them (digests, screening, methods) sees a full body.
"""

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.core import layout, merge
from coldctl.core.checkpoint import (
    DTYPES,
    Checkpoint,
    Tensor,
    body_prefix,
    is_pooler,
    modern_name,
    read_header,
    read_model_config,
)
from coldctl.core.config import HIGHEST_RANK
from coldctl.core.encoders import BODY_PREFIXES
from coldctl.core.errors import CheckpointError
from coldctl.core.manifest import parse
from coldctl.core.storage import Folder

_DECODED = "decoded:"  # stands for a file name in tensors that no file holds as they are
_SIMPLE_PATTERN = re.compile(r"[\w.\\*|\[\]-]{1,200}")
_MOST_STARS = 3
_PEFT = "base_model.model."


@dataclass(frozen=True)
class Delta:
    """A low-rank difference from the base: `left` [rows, r] @ `right` [r, columns] · `scale`."""

    left: NDArray[np.float64]
    right: NDArray[np.float64]
    scale: float


@dataclass
class AdapterCheckpoint(Checkpoint):
    """The base plus low-rank differences, and tensors that the adapter replaces as a whole."""

    base: Checkpoint | None = None
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    replaced: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Decode elements from `start` on: base + left @ right · scale, rounded once to the base's dtype."""
        assert self.base is not None
        name = tensor.file.removeprefix(_DECODED)
        if name in self.replaced:
            data = self.replaced[name].reshape(-1).view(np.uint8).data
            begin = start * DTYPES[tensor.dtype].itemsize
            buffer[:] = data[begin : begin + len(buffer)]
            return
        self.base.read_into(self.base.body[name], start, buffer)
        if name in self.deltas and len(buffer):
            delta, dtype = self.deltas[name], DTYPES[tensor.dtype]
            values = np.frombuffer(buffer, dtype)
            columns = delta.right.shape[1]
            first, last = start // columns, -(-(start + values.size) // columns)
            step = (delta.left[first:last] @ delta.right).reshape(-1) * delta.scale
            step = step[start - first * columns :][: values.size]
            buffer[:] = merge.rounded(values.astype(np.float64) + step, dtype).view(np.uint8).data


@dataclass
class MemoryCheckpoint(Checkpoint):
    """Tensors that are held in memory, because their format has no ranges."""

    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Copy elements from `start` on."""
        data = self.arrays[tensor.file.removeprefix(_DECODED)].reshape(-1).view(np.uint8).data
        begin = start * DTYPES[tensor.dtype].itemsize
        buffer[:] = data[begin : begin + len(buffer)]


def open_adapter(folder: Folder, name: str, base: Checkpoint) -> Checkpoint:
    """A PEFT LoRA adapter as a checkpoint whose body is the base's with B · A · scale added to the right tensors.

    scale is alpha / r (alpha / √r for rank-stabilised ones). Raises CheckpointError for what cannot be decoded
    exactly: other adapter kinds, DoRA, transposed layers, tensors that the base lacks.
    """
    where = f"{folder.label}/{layout.ADAPTER_CONFIG}"
    settings = _settings(folder, where)
    reader = folder.open(layout.ADAPTER_WEIGHTS)
    tensors = read_header(reader, layout.ADAPTER_WEIGHTS, f"{folder.label}/{layout.ADAPTER_WEIGHTS}")
    arrays: dict[str, NDArray[Any]] = {}
    for raw, tensor in tensors.items():
        array = np.empty(tensor.shape, DTYPES[tensor.dtype])
        reader.read_into(tensor.offset, array.reshape(-1).view(np.uint8).data)
        arrays[raw] = array
    reader.close()
    prefix = f"{BODY_PREFIXES[base.config['model_type']]}."
    deltas: dict[str, Delta] = {}
    replaced: dict[str, NDArray[Any]] = {}
    for raw, array in arrays.items():
        path = modern_name(raw.removeprefix(_PEFT).removeprefix(prefix).replace(".base_layer.", "."))
        if raw.endswith((".lora_B.weight", ".lora_embedding_B")):
            continue
        if raw.endswith((".lora_A.weight", ".lora_embedding_A")):
            target, delta = _delta(raw, array, arrays, settings, prefix, where)
            _check_delta(target, delta, base, where)
            deltas[target] = delta
        elif path in base.body:
            if base.body[path].shape != array.shape:
                raise CheckpointError(
                    f"{folder.label}: {path} has another shape than the base's: do not use this adapter"
                )
            dtype = DTYPES[base.body[path].dtype]
            replaced[path] = merge.rounded(array.astype(np.float64), dtype)
        elif raw.removeprefix(_PEFT).startswith(prefix) and not is_pooler(path):
            raise CheckpointError(
                f"{folder.label}: the base has no {path}, which {raw} belongs to: merge the adapter first"
            )
    if not deltas and not replaced:
        raise CheckpointError(
            f"{folder.label}: no tensor of the adapter belongs to the base's body: give the base it was made from"
        )
    body = {key: Tensor(_DECODED + key, 0, tensor.dtype, tensor.shape) for key, tensor in base.body.items()}
    document = (
        parse(folder.read(layout.MANIFEST), f"{folder.label}/{layout.MANIFEST}")
        if folder.has(layout.MANIFEST)
        else None
    )
    files = {layout.ADAPTER_WEIGHTS: reader.size}
    return AdapterCheckpoint(
        folder, name, dict(base.config), body, (), "", files, document, base=base, deltas=deltas, replaced=replaced
    )


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
        reader = folder.open(file)
        data = bytearray(reader.size)
        reader.read_into(0, memoryview(data))
        sizes[file] = reader.size
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler refuses in many ways
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{folder.label}/{file} is not plain weights ({reason}): do not use it") from None
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise CheckpointError(f"{folder.label}/{file} holds other things than tensors: do not use it")
        for key, value in state.items():
            raw[str(key)] = _as_array(value.detach().contiguous())
    tensors = {key: Tensor(_DECODED + key, 0, _dtype_name(value), value.shape) for key, value in raw.items()}
    prefix = body_prefix(config, tensors, folder.label)
    body = {modern_name(key[len(prefix) :]): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    heads = tuple(key for key in tensors if not key.startswith(prefix))
    return MemoryCheckpoint(folder, name, config, dict(sorted(body.items())), heads, prefix, sizes, arrays=raw)


def _as_array(value: Any) -> NDArray[Any]:
    import torch

    if value.dtype == torch.bfloat16:
        words: NDArray[Any] = value.view(torch.int16).numpy()
        return words.view(DTYPES["BF16"])
    array: NDArray[Any] = value.numpy()
    return array


def _dtype_name(array: NDArray[Any]) -> str:
    for key, dtype in DTYPES.items():
        if dtype == array.dtype:
            return key
    raise CheckpointError(f"dtype {array.dtype} is not supported: convert the checkpoint to safetensors")


def _settings(folder: Folder, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(folder.read(layout.ADAPTER_CONFIG).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not readable JSON ({error}): fetch it again") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{where} is not a LoRA adapter: merge it into its base and give the merged checkpoint")
    for option in ("use_dora", "fan_in_fan_out", "lora_bias"):
        if settings.get(option):
            raise CheckpointError(
                f"{where} uses {option}: merge the adapter into its base and give the merged checkpoint"
            )
    return settings


def _delta(
    raw: str,
    first: NDArray[Any],
    arrays: Mapping[str, NDArray[Any]],
    settings: Mapping[str, Any],
    prefix: str,
    where: str,
) -> tuple[str, Delta]:
    """The tensor that a pair A, B belongs to, and the difference it stands for."""
    embedding = raw.endswith(".lora_embedding_A")
    module = raw.removesuffix(".lora_embedding_A").removesuffix(".lora_A.weight")
    second = arrays.get(f"{module}.lora_embedding_B" if embedding else f"{module}.lora_B.weight")
    if second is None or first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1]:
        raise CheckpointError(f"{where}: {raw} has no B of matching rank: fetch the adapter again")
    rank = first.shape[0]
    if not 0 < rank <= HIGHEST_RANK:
        raise CheckpointError(f"{where}: {raw} has the rank {rank}: do not use this adapter")
    name = module.removeprefix(_PEFT)
    alpha = settings.get("lora_alpha", 1)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if _matches(str(pattern), name, where):
            alpha = value
            break
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{where}: lora_alpha is {alpha!r}, not a number: fetch the adapter again")
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    a, b = first.astype(np.float64), second.astype(np.float64)
    target = f"{name.removeprefix(prefix)}.weight"
    return target, Delta(a.T.copy(), b.T.copy(), scale) if embedding else Delta(b, a, scale)


def _matches(pattern: str, name: str, where: str) -> bool:
    """Whether PEFT would apply a pattern's value to a module: a regular expression for the end of its path."""
    if not _SIMPLE_PATTERN.fullmatch(pattern) or pattern.count("*") > _MOST_STARS:  # none that takes for ever
        raise CheckpointError(f"{where}: the pattern {pattern[:40]!r} is too intricate: merge the adapter first")
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        raise CheckpointError(f"{where}: {pattern!r} is no regular expression: fetch the adapter again") from None


def _check_delta(target: str, delta: Delta, base: Checkpoint, where: str) -> None:
    known = base.body.get(target)
    shape = (delta.left.shape[0], delta.right.shape[1])
    if known is None or known.shape != shape:
        raise CheckpointError(
            f"{where}: {target} of shape {shape} is not in the base: give the base the adapter was made from"
        )
