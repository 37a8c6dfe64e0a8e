"""Contributions as differences from their base, in bfloat16 or 8-bit integers.

`delta.safetensors` names its tensors as the base's body does, without prefix, and holds the floating ones:

- `delta-bf16`: NAME, the difference rounded to bfloat16;
- `delta-int8`: NAME, 8-bit integers, and NAME.scale, float32, one number per row (the first dimension; a vector or a
  scalar is one row). The difference is the product of both.

There is never a head in it. A pooler may be missing, and then counts as the base's own.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.artifacts import layout
from coldctl.checkpoints.checkpoint import Checkpoint, is_pooler, open_tensors, read_manifest
from coldctl.checkpoints.header import DTYPES, Tensor, rounded
from coldctl.checkpoints.writer import Layout, WeightsWriter, file_order
from coldctl.common.errors import CheckpointError
from coldctl.storage.local import Folder

ENCODINGS: Mapping[str, str] = {"delta-bf16": "BF16", "delta-int8": "I8"}  # and the dtype of their tensors
_SCALE = ".scale"
_LARGEST = 127  # of an 8-bit integer, on both sides of zero
_CHUNK = 1 << 20  # elements encoded at a time, in whole rows

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Delta:
    """The source of the base plus a difference, which is read from `stored`, with a scale per row if `scaled`."""

    base: Checkpoint
    stored: Checkpoint
    scaled: bool

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Decode base + difference · scale in float64, rounded once."""
        tensor = self.base.body[name]
        dtype = DTYPES[decoded_dtype(tensor)]
        stop = start + len(buffer) // dtype.itemsize
        if stop == start:
            return
        values = self.stored.floats(name, start, stop)
        with np.errstate(over="ignore", invalid="ignore"):  # a pass over the inputs finds and names values not finite
            if self.scaled:
                columns = rows_of(tensor.shape)[1]
                first, last = start // columns, -(-stop // columns)
                counts = np.full(last - first, columns)
                counts[0] = min(stop, (first + 1) * columns) - start
                counts[-1] = stop - max(start, (last - 1) * columns)
                values *= np.repeat(self.stored.floats(name + _SCALE, first, last), counts)
            values += self.base.floats(name, start, stop)
        buffer[:] = _bytes(rounded(values, dtype))


def open_delta(folder: Folder, name: str, base: Checkpoint, encoding: str | None = None) -> Checkpoint:
    """Open a difference as a checkpoint whose body is `base`'s with the difference added, rounded once.

    The header is checked against the base before anything else is read. The caller checks that `base` is the one that
    the manifest names. `encoding` is given for what has no manifest yet. Raises CheckpointError.
    """
    where = f"{folder.label}/{layout.DELTA_WEIGHTS}"
    manifest = read_manifest(folder) if encoding is None else None
    if encoding is None:
        if manifest is None:
            raise CheckpointError(
                f"{folder.label} has no {layout.MANIFEST}, which says from what it differs: fetch it again"
            )
        encoding = manifest.get("encoding", "")
    if encoding not in ENCODINGS:
        supported = ", ".join(ENCODINGS)
        raise CheckpointError(f"{where} has the encoding {encoding!r}, this program knows {supported}: update coldctl")
    stored = open_tensors(folder, name, layout.DELTA_WEIGHTS)
    _check_names(base, encoding)
    scaled = encoding == "delta-int8"
    body: dict[str, Tensor] = {}
    names: set[str] = set()
    for tensor_name, tensor in base.body.items():
        if not tensor.floating or (tensor_name not in stored.body and is_pooler(tensor_name)):
            continue
        _check_stored(stored, tensor_name, ENCODINGS[encoding], tensor.shape, where)
        names.add(tensor_name)
        if scaled:
            _check_stored(stored, tensor_name + _SCALE, "F32", (rows_of(tensor.shape)[0],), where)
            names.add(tensor_name + _SCALE)
        body[tensor_name] = Tensor(decoded_dtype(tensor), tensor.shape)
    if odd := sorted(set(stored.body) - names):
        raise CheckpointError(f"{where} has {odd[0]!r}, which the base lacks: give the base it was made from")
    source = Delta(base, stored, scaled)
    return Checkpoint(folder, name, base.config, body, stored.files, source, manifest, relative=True)


def write_delta(source: Checkpoint, base: Checkpoint, folder: Path, encoding: str) -> None:
    """Write the difference of the body of `source` from `base` into `folder`, in bounded memory.

    Of each row (float64) `delta-int8` stores q = round(row / s), s = max |row| / 127 as float32; s is 0 where that is too
    small for a float32, and then so is q. Tensors that only one of the two has (poolers, integers) are left out. Raises
    CheckpointError for a difference that is not finite.
    """
    _check_names(base, encoding)
    names = [name for name, tensor in base.body.items() if tensor.floating and name in source.body]
    layouts = [Layout(name, ENCODINGS[encoding], base.body[name].shape) for name in names]
    difference = _Difference(source, base)
    scales: dict[str, NDArray[np.float32]] = {}
    if encoding == "delta-int8":
        scales = {name + _SCALE: difference.scales(name) for name in names}
        layouts += [Layout(name, "F32", row_scales.shape) for name, row_scales in scales.items()]
    writer = WeightsWriter(folder, layouts, 0, single=layout.DELTA_WEIGHTS)
    try:
        for tensor in file_order(layouts):
            if tensor.name in scales:
                writer.write(_bytes(scales[tensor.name]))
                continue
            for first, rows in difference.rows(tensor.name):
                if scales:
                    row_scales = scales[tensor.name + _SCALE][first : first + len(rows)]
                    encoded: NDArray[Any] = quantised(rows, row_scales)
                else:
                    encoded = rounded(rows, DTYPES["BF16"])
                    difference.check_finite(encoded, tensor.name)
                writer.write(_bytes(encoded))
        writer.close()
    finally:
        writer.abandon()


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns that a tensor has for `delta-int8`: a vector or a scalar is one row.

    >>> rows_of((3, 4, 5)), rows_of((7,)), rows_of(())
    ((3, 20), (1, 7), (1, 1))
    """
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def quantised(rows: Array, scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return the integers nearest to rows [r, c] divided by their scales [r]; 0 where the scale is 0."""
    wide = scales.astype(np.float64)[:, None]
    steps = np.divide(rows, wide, out=np.zeros_like(rows), where=wide > 0)
    return np.clip(np.rint(steps), -_LARGEST, _LARGEST).astype(np.int8)


def decoded_dtype(tensor: Tensor) -> str:
    """Return the dtype that a difference is decoded to: the base's, but float32 where that is narrower.

    A 16-bit base is finetuned in float32, and most of what one contribution learns is less than the rounding to 16 bits.
    """
    return tensor.dtype if DTYPES[tensor.dtype].itemsize >= DTYPES["F32"].itemsize else "F32"


def _check_stored(stored: Checkpoint, name: str, dtype: str, shape: tuple[int, ...], where: str) -> None:
    """Raise CheckpointError unless a delta's file has this tensor, as the base and the encoding demand."""
    tensor = stored.body.get(name)
    if tensor is None:
        raise CheckpointError(f"{where} has no {name}: give the base it was made from, or fetch it again")
    if tensor.dtype != dtype or tensor.shape != shape:
        raise CheckpointError(
            f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}: give the base it was "
            "made from, or fetch it again"
        )


def _check_names(base: Checkpoint, encoding: str) -> None:
    """Raise CheckpointError for a base in which a tensor has the name of another one's scale."""
    doubled = [name for name in base.body if encoding == "delta-int8" and name + _SCALE in base.body]
    if doubled:
        raise CheckpointError(f"{base.label} has both {doubled[0]} and {doubled[0]}{_SCALE}: take delta-bf16")


@dataclass(frozen=True)
class _Difference:
    """The difference of one body from another, in whole rows."""

    source: Checkpoint
    base: Checkpoint

    def rows(self, name: str) -> Iterator[tuple[int, Array]]:
        """Yield a tensor chunk by chunk: the first row's number, and float64 [rows, columns]."""
        count, columns = rows_of(self.base.body[name].shape)
        step = max(1, _CHUNK // max(1, columns))
        for first in range(0, count if columns else 0, step):
            last = min(first + step, count)
            start, stop = first * columns, last * columns
            difference = self.source.floats(name, start, stop) - self.base.floats(name, start, stop)
            yield first, difference.reshape(last - first, columns)

    def scales(self, name: str) -> NDArray[np.float32]:
        """Return the scale of each row of a tensor: float32 [rows]. Raises CheckpointError where it is not finite."""
        scales = np.zeros(rows_of(self.base.body[name].shape)[0], np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for first, rows in self.rows(name):
                scales[first : first + len(rows)] = np.abs(rows).max(axis=1) / _LARGEST
        self.check_finite(scales, name)
        return scales

    def check_finite(self, values: NDArray[Any], name: str) -> None:
        """Raise CheckpointError if an encoded difference is no finite number."""
        if not np.isfinite(values.astype(np.float32)).all():
            raise CheckpointError(
                f"{self.source.name}: {name} differs from the base by what is no finite number: lower --learning-rate"
            )


def _bytes(values: NDArray[Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data
