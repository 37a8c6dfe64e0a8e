"""Writing the body of a checkpoint alone, in one pass over its bytes that also proves them."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coldctl.artifacts import layout
from coldctl.checkpoints.checkpoint import Checkpoint, body_digest, digest_prelude
from coldctl.checkpoints.describe import bare_config
from coldctl.checkpoints.header import DTYPE_NAMES, DTYPES, Tensor, rounded
from coldctl.checkpoints.writer import Layout, WeightsWriter, file_order
from coldctl.common.errors import CheckpointError
from coldctl.common.progress import Progress
from coldctl.common.text import is_path

_CHUNK = 8 << 20  # bytes of the source read at a time


@dataclass(frozen=True)
class WrittenBody:
    """Digests of a body as it was read, as it was written, and of the files it was written to."""

    source_digest: str
    body_digest: str
    files: dict[str, str]


def write_body(
    source: Checkpoint,
    folder: Path,
    dtype: str | None,
    max_shard_size: int,
    progress: Progress,
    task: str = "publish",
) -> WrittenBody:
    """Write the body's tensors into `folder`, unprefixed, without heads; floating ones rounded to `dtype` if one is given.

    `task` is what the progress bar is called.
    Raises CheckpointError for a value that is not finite in `dtype`.
    """
    target = DTYPE_NAMES[dtype] if dtype else None
    layouts = {
        name: Layout(name, target if target and tensor.floating else tensor.dtype, tensor.shape)
        for name, tensor in source.body.items()
    }
    converts = any(layouts[name].dtype != tensor.dtype for name, tensor in source.body.items())
    ordered = file_order(list(layouts.values()))
    floating = [entry.name for entry in ordered if source.body[entry.name].floating]
    # The body digest goes by name and the file by width: the same order, unless dtypes are mixed and left as they are.
    provable = floating == sorted(floating)
    reading, writing = hashlib.sha256(), hashlib.sha256()
    writer = WeightsWriter(folder, list(layouts.values()), max_shard_size)
    progress.begin(task, sum(tensor.nbytes for tensor in source.body.values()), "bytes")
    pending: Future[None] | None = None
    try:
        with ThreadPoolExecutor(1) as beside:
            for name, start, chunk in _chunks(source, ordered):
                tensor = source.body[name]
                made = _rounded(name, tensor, layouts[name].dtype, chunk)
                if pending is not None:
                    pending.result()
                if tensor.floating and provable:
                    head = digest_prelude(name, tensor) if start == 0 else b""
                    other = digest_prelude(name, _as(tensor, layouts[name].dtype)) if start == 0 else b""
                    pending = beside.submit(
                        _hash, [(reading, head, chunk), *([(writing, other, made)] if converts else [])]
                    )
                writer.write(made)
                progress.advance(task, len(chunk))
            if pending is not None:
                pending.result()
        writer.close()
    finally:
        writer.abandon()
        progress.end(task)
    digest = f"sha256:{reading.hexdigest()}" if provable else body_digest(source)
    if not converts:
        return WrittenBody(digest, digest, writer.digests)
    return WrittenBody(digest, f"sha256:{writing.hexdigest()}", writer.digests)


def write_config(source: Checkpoint, folder: Path, dtype: str | None) -> None:
    """Write the `config.json` of the body alone, without what tells of machines and heads."""
    document = bare_config(source.config, dtype or source.config.get("dtype") or source.config.get("torch_dtype"))
    document = {key: value for key, value in document.items() if not is_path(value)}
    (folder / layout.MODEL_CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _chunks(source: Checkpoint, ordered: list[Layout]) -> Iterator[tuple[str, int, memoryview]]:
    """Yield name, offset in bytes and bytes of each chunk in order. Three buffers take turns: read, written, hashed."""
    buffers = [memoryview(bytearray(_CHUNK)) for _ in range(3)]
    turn = 0
    for entry in ordered:
        tensor = source.body[entry.name]
        itemsize = DTYPES[tensor.dtype].itemsize
        for start in range(0, max(1, tensor.nbytes), _CHUNK):  # an empty tensor is one empty chunk
            chunk = buffers[turn][: min(_CHUNK, tensor.nbytes - start)]
            turn = (turn + 1) % len(buffers)
            source.read_into(tensor, start // itemsize, chunk)
            yield entry.name, start, chunk


def _rounded(name: str, tensor: Tensor, dtype: str, chunk: memoryview) -> memoryview:
    """Round the bytes of a chunk to another dtype. Raises CheckpointError for a value that is not finite in it."""
    if dtype == tensor.dtype:
        return chunk
    values = np.frombuffer(chunk, DTYPES[tensor.dtype])
    made = rounded(values, DTYPES[dtype])
    if not np.isfinite(made.astype(np.float32)).all():
        raise CheckpointError(
            f"{name} holds a value that is no finite number in {dtype}: take --dtype bfloat16 or float32"
        )
    return memoryview(made.view(np.uint8).data)


def _as(tensor: Tensor, dtype: str) -> Tensor:
    return Tensor(tensor.file, tensor.offset, dtype, tensor.shape)


def _hash(work: list[tuple["hashlib._Hash", bytes, memoryview]]) -> None:
    for hasher, head, chunk in work:
        hasher.update(head)
        hasher.update(chunk)
