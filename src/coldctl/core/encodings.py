"""Contributions that are not plain safetensors bodies: low-rank adapters, and pickles where they are asked for.

Both are read as checkpoints whose body is decoded block by block, in the base's dtypes, so that everything
behind them (digests, screening, methods) sees a full body.
"""

import io
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.core import layout, merge
from coldctl.core.checkpoint import (
    CONFIG_LIMIT,
    DTYPES,
    Checkpoint,
    Tensor,
    body_prefix,
    is_pooler,
    json_object,
    modern_name,
    read_header,
    read_model_config,
)
from coldctl.core.config import HIGHEST_RANK
from coldctl.core.encoders import BODY_PREFIXES
from coldctl.core.errors import CheckpointError
from coldctl.core.manifest import parse
from coldctl.core.storage import Folder, Reader

_DECODED = "decoded:"  # stands for a file name in tensors that no file holds as they are
_SIMPLE_PATTERN = re.compile(r"[\w.\\*|\[\]-]{1,200}")
_MOST_PATTERNS, _MOST_STARRED, _MOST_STARS = 1000, 16, 2  # what is matched in no time, whatever the names
_PEFT = "base_model.model."
_PLAIN_DTYPES = (
    "torch.float64",
    "torch.float32",
    "torch.float16",
    "torch.bfloat16",
    "torch.int",
    "torch.uint8",
    "torch.bool",
)


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
    try:
        tensors = read_header(reader, layout.ADAPTER_WEIGHTS, f"{folder.label}/{layout.ADAPTER_WEIGHTS}")
        # What it holds is judged by the header: only what the base's body has a place for is read into memory.
        pairs, whole = _parts(tensors, settings, base, folder.label)
        deltas: dict[str, Delta] = {}
        for target, pair in pairs.items():
            a, b = (_array(reader, tensors[raw]).astype(np.float64) for raw in (pair.first, pair.second))
            left, right = (a.T.copy(), b.T.copy()) if pair.embedding else (b, a)
            deltas[target] = Delta(left, right, pair.scale)
        replaced = {
            path: merge.rounded(_array(reader, tensors[raw]).astype(np.float64), DTYPES[base.body[path].dtype])
            for path, raw in whole.items()
        }
    finally:
        reader.close()
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
    tensors = {key: Tensor(_DECODED + key, 0, _dtype_name(value), value.shape) for key, value in raw.items()}
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
    for key, dtype in DTYPES.items():
        if dtype == array.dtype:
            return key
    raise CheckpointError(f"dtype {array.dtype} is not supported: convert the checkpoint to safetensors")


def _settings(folder: Folder, where: str) -> dict[str, Any]:
    settings = json_object(folder.read(layout.ADAPTER_CONFIG, CONFIG_LIMIT), where)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{where} is not a LoRA adapter: merge it into its base and give the merged checkpoint")
    for option in ("use_dora", "fan_in_fan_out", "lora_bias"):
        if settings.get(option):
            raise CheckpointError(
                f"{where} uses {option}: merge the adapter into its base and give the merged checkpoint"
            )
    return settings


@dataclass(frozen=True)
class _Pair:
    """Two tensors of an adapter, by their raw names, that stand for one difference."""

    first: str
    second: str
    embedding: bool
    scale: float


def _array(reader: Reader, tensor: Tensor) -> NDArray[Any]:
    array = np.empty(tensor.shape, DTYPES[tensor.dtype])
    reader.read_into(tensor.offset, array.reshape(-1).view(np.uint8).data)
    return array


def _parts(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], base: Checkpoint, label: str
) -> tuple[dict[str, _Pair], dict[str, str]]:
    """What an adapter changes: pairs by the body tensor they are added to, raw names by the one they replace.

    Raises CheckpointError for what does not fit the base.
    """
    where = f"{label}/{layout.ADAPTER_CONFIG}"
    prefix = f"{BODY_PREFIXES[base.config['model_type']]}."
    scales = _Scales(settings, where)
    pairs: dict[str, _Pair] = {}
    whole: dict[str, str] = {}
    for raw, tensor in tensors.items():
        path = modern_name(raw.removeprefix(_PEFT).removeprefix(prefix).replace(".base_layer.", "."))
        if raw.endswith((".lora_B.weight", ".lora_embedding_B")):
            continue
        target = path
        if raw.endswith((".lora_A.weight", ".lora_embedding_A")):
            target, pair = _pair(raw, tensors, base, prefix, scales, where)
            if target in pairs:
                raise CheckpointError(f"{where}: two pairs belong to {target}: the adapter is ambiguous")
            pairs[target] = pair
        elif path in base.body:
            if base.body[path].shape != tensor.shape:
                raise CheckpointError(f"{label}: {path} has another shape than the base's: do not use this adapter")
            if path in whole:
                raise CheckpointError(f"{label}: two tensors are called {path}: the adapter is ambiguous")
            whole[path] = raw
        elif raw.removeprefix(_PEFT).startswith(prefix) and not is_pooler(path):
            raise CheckpointError(f"{label}: the base has no {path}, which {raw} belongs to: merge the adapter first")
    return pairs, whole


def _pair(
    raw: str, tensors: Mapping[str, Tensor], base: Checkpoint, prefix: str, scales: "_Scales", where: str
) -> tuple[str, _Pair]:
    """The tensor that a pair A, B belongs to, and the pair."""
    embedding = raw.endswith(".lora_embedding_A")
    module = raw.removesuffix(".lora_embedding_A").removesuffix(".lora_A.weight")
    other = f"{module}.lora_embedding_B" if embedding else f"{module}.lora_B.weight"
    first, second = tensors[raw].shape, tensors[other].shape if other in tensors else ()
    if len(first) != 2 or len(second) != 2 or first[0] != second[1]:
        raise CheckpointError(f"{where}: {raw} has no B of matching rank: fetch the adapter again")
    name = module.removeprefix(_PEFT)
    target = f"{name.removeprefix(prefix)}.weight"
    shape = (first[1], second[0]) if embedding else (second[0], first[1])
    if target not in base.body or base.body[target].shape != shape:
        raise CheckpointError(
            f"{where}: {target} of shape {shape} is not in the base: give the base the adapter was made from"
        )
    if not 0 < first[0] <= min(HIGHEST_RANK, max(shape)):  # beyond it is larger than what it is added to
        raise CheckpointError(f"{where}: {raw} has the rank {first[0]}: do not use this adapter")
    return target, _Pair(raw, other, embedding, scales.of(name, first[0]))


class _Scales:
    """What a pair's product is multiplied by: alpha / rank, or alpha / √rank, alpha perhaps by the module's name."""

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        """Raises CheckpointError for patterns that could take for ever, or are none."""
        self._where, self._rooted = where, bool(settings.get("use_rslora"))
        self._alpha = settings.get("lora_alpha", 1)
        patterns = settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
            raise CheckpointError(f"{where}: its alpha_pattern is not usable: merge the adapter first")
        if sum("*" in pattern for pattern in patterns) > _MOST_STARRED:
            raise CheckpointError(f"{where}: its alpha_pattern is too intricate: merge the adapter first")
        self._patterns = [(_compiled(pattern, where), alpha) for pattern, alpha in patterns.items()]

    def of(self, name: str, rank: int) -> float:
        """The scale of a module's pair. Raises CheckpointError if alpha is no number."""
        alpha = next((value for pattern, value in self._patterns if pattern.match(name)), self._alpha)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(
                f"{self._where}: lora_alpha is {str(alpha)[:40]}, not a number: fetch the adapter again"
            )
        return alpha / (math.sqrt(rank) if self._rooted else rank)


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    """PEFT's way with a pattern: a regular expression for the end of a module's path."""
    if not _SIMPLE_PATTERN.fullmatch(pattern) or pattern.count("*") > _MOST_STARS:  # none that takes for ever
        raise CheckpointError(f"{where}: the pattern {pattern[:40]!r} is too intricate: merge the adapter first")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        raise CheckpointError(f"{where}: {pattern!r} is no regular expression: fetch the adapter again") from None
