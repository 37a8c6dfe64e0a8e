"""Safetensors headers and dtypes, checked against the size of the file."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from coldctl.common.errors import CheckpointError
from coldctl.common.parsing import json_value
from coldctl.storage.local import Reader

HEADER_LIMIT = 4 << 20  # bytes; the largest encoders need a tenth of it
TENSOR_LIMIT = 20_000  # tensors in one checkpoint, and shards of one
_LONGEST_NAME = 500  # characters of a tensor's name
_LARGEST = 1 << 62  # elements of a tensor, the empty dimensions not counted
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Tensor:
    """The dtype and shape of a tensor, and where its bytes are, if a file stores them as they are."""

    dtype: str  # the safetensors name
    shape: tuple[int, ...]
    file: str = ""  # none: the tensor is decoded
    offset: int = 0  # of the first byte, in the file

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the number of bytes."""
        return self.size * DTYPES[self.dtype].itemsize

    @property
    def floating(self) -> bool:
        """Return whether it is averaged and digested; integer buffers come from the base."""
        return self.dtype in FLOATING


def read_header(reader: Reader, file: str, where: str) -> dict[str, Tensor]:
    """Return the tensors that a safetensors file declares, with every size and offset checked against the file.

    The tensors must cover the data exactly, in any order, without gaps or overlaps, as the format demands.
    Raises CheckpointError.
    """
    remedy = "the file is corrupt, fetch it again"
    if reader.size < 8:
        raise CheckpointError(f"{where} is too short for a safetensors file: {remedy}")
    head = memoryview(bytearray(8))
    reader.read_into(0, head)
    (length,) = struct.unpack("<Q", head)
    if length > HEADER_LIMIT or 8 + length > reader.size:
        raise CheckpointError(f"{where} claims a header of {length} bytes in a file of {reader.size}: {remedy}")
    raw = memoryview(bytearray(length))
    reader.read_into(8, raw)
    header = json_object(bytes(raw), f"{where} (header)")
    if len(header) > TENSOR_LIMIT:
        raise CheckpointError(f"{where} has more than {TENSOR_LIMIT} tensors: this is no encoder")
    start = 8 + length
    tensors: dict[str, Tensor] = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, span = _tensor(name, entry, file, start, where)
        tensors[name] = tensor
        spans.append((*span, name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise CheckpointError(f"{where}: {name!r} starts at byte {begin}, not at {end} (gap or overlap): {remedy}")
        end = stop
    if start + end != reader.size:
        raise CheckpointError(f"{where} holds {reader.size - start} bytes of data, its header says {end}: {remedy}")
    return tensors


def _tensor(name: str, entry: Any, file: str, start: int, where: str) -> tuple[Tensor, tuple[int, int]]:
    """Return the tensor of a header entry, and where in the data its bytes begin and end. Raises CheckpointError."""
    remedy = "the file is corrupt, fetch it again"
    if not name.isprintable() or len(name) > _LONGEST_NAME:  # half a surrogate pair or a NUL would spoil digests
        raise CheckpointError(f"{where}: {name[:40]!r} is no name of a tensor: {remedy}")
    try:
        dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{where}: {name!r} lacks dtype, shape or data_offsets: {remedy}") from None
    if dtype not in DTYPES if isinstance(dtype, str) else True:
        raise CheckpointError(
            f"{where}: {name!r} has the dtype {str(dtype)[:40]!r}, which is not supported: convert the checkpoint"
        )
    numbers = [*shape[:17], begin, stop] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < _LARGEST for number in numbers) or len(shape) > 16:
        raise CheckpointError(f"{where}: {name!r} has an impossible shape or offset: {remedy}")
    if math.prod(shape) * DTYPES[dtype].itemsize != stop - begin:
        raise CheckpointError(
            f"{where}: {name!r} of shape {shape} and {dtype} does not fill its {stop - begin} bytes: {remedy}"
        )
    if math.prod(max(1, number) for number in shape) >= _LARGEST:
        raise CheckpointError(f"{where}: {name!r} has an impossible shape or offset: {remedy}")
    return Tensor(dtype, tuple(shape), file, start + begin), (begin, stop)


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object of a checkpoint, within limits. Raises CheckpointError."""
    try:
        document = json_value(data)
    except ValueError as error:
        raise CheckpointError(f"{where} is not readable JSON ({error}): fetch it again") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{where} is not a JSON object: fetch it again")
    return document


def rounded(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round floating values to `dtype`, once, to nearest with ties to even.

    The conversions of ml_dtypes go through float32 and would round float64 twice, so for them the float32 in between
    is rounded to odd, which keeps what the second rounding needs to know (Boldo and Melquiond 2008).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if values.dtype != np.float64 or dtype in (np.float64, np.float32, np.float16):
            return values.astype(dtype)
        single = values.astype(np.float32)
        bits = single.view(np.uint32)
        too_far = np.abs(single.astype(np.float64)) > np.abs(values)
        bits[too_far] -= 1  # towards zero
        bits[single.astype(np.float64) != values] |= 1
        return single.astype(dtype)


DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
