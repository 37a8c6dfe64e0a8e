"""Write the body of a checkpoint alone, in one pass that also verifies it."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coldctl.artifacts import layout
from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.checkpoints.digests import body_digest, digest_prelude
from coldctl.checkpoints.header import DTYPE_NAMES, DTYPES, Tensor, rounded
from coldctl.checkpoints.sanitize import CODE, UNUSED
from coldctl.checkpoints.writer import Layout, WeightsWriter, file_order
from coldctl.common.errors import CheckpointError
from coldctl.common.progress import Progress
from coldctl.common.text import is_path

_CHUNK = 8 << 20  # bytes of the source read at a time
# About a head, about custom code or other files, or about the machine that the model came from.
_DROPPED = (*CODE, *UNUSED, "_name_or_path", "torch_dtype", "name_or_path")


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
    target = {
        name: replace(tensor, dtype=DTYPE_NAMES[dtype]) if dtype and tensor.floating else tensor
        for name, tensor in source.body.items()
    }
    layouts = file_order([Layout(name, tensor.dtype, tensor.shape) for name, tensor in target.items()])
    converts = target != source.body
    names = [tensor.name for tensor in layouts]
    floating = [name for name in names if source.body[name].floating]
    # The body digest goes by name and the file by width: the same order, unless dtypes are mixed and left as they are.
    provable = floating == sorted(floating)
    reading, writing = hashlib.sha256(), hashlib.sha256()
    writer = WeightsWriter(folder, layouts, max_shard_size)
    progress.begin(task, sum(tensor.nbytes for tensor in source.body.values()), "bytes")
    pending: Future[None] | None = None
    try:
        with ThreadPoolExecutor(1) as beside:
            for name, start, chunk in _chunks(source, names):
                before, after = source.body[name], target[name]
                converted = _converted(name, before, after.dtype, chunk)
                if pending is not None:
                    pending.result()
                if before.floating and provable:
                    work = [(reading, digest_prelude(name, before) if start == 0 else b"", chunk)]
                    if converts:
                        work.append((writing, digest_prelude(name, after) if start == 0 else b"", converted))
                    pending = beside.submit(_hash, work)
                writer.write(converted)
                progress.advance(task, len(chunk))
            if pending is not None:
                pending.result()
        writer.close()
    finally:
        writer.abandon()
        progress.end(task)
    digest = f"sha256:{reading.hexdigest()}" if provable else body_digest(source)
    return WrittenBody(digest, f"sha256:{writing.hexdigest()}" if converts else digest, writer.digests)


def write_config(source: Checkpoint, folder: Path, dtype: str | None) -> None:
    """Write the `config.json` of the body alone, without what tells of machines and heads."""
    document = bare_config(source.config, dtype or source.config.get("dtype") or source.config.get("torch_dtype"))
    document = {key: value for key, value in document.items() if not is_path(value)}
    (folder / layout.MODEL_CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def bare_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return the `config.json` of a body alone, from that of the checkpoint it came from."""
    bare = {key: value for key, value in config.items() if key not in _DROPPED}
    if name := bare_architecture(config.get("architectures")):
        bare["architectures"] = [name]
    if dtype:
        bare["dtype"] = dtype
    return bare


def bare_architecture(architectures: object) -> str | None:
    """Return the bare model's class name, from that of any of its head classes.

    >>> bare_architecture(["XLMRobertaForMaskedLM"])
    'XLMRobertaModel'
    >>> bare_architecture(["BertModel"])
    'BertModel'
    """
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        return None
    name = re.sub(r"(For|With)[A-Z]\w*$", "", architectures[0])
    return name if name.endswith("Model") else f"{name}Model"


def _chunks(source: Checkpoint, names: Sequence[str]) -> Iterator[tuple[str, int, memoryview]]:
    """Yield chunks of the tensors in order: name, first byte, bytes.

    Three buffers take turns: one is read, one is written, one may still be hashed.
    """
    buffers = [memoryview(bytearray(_CHUNK)) for _ in range(3)]
    turn = 0
    for name in names:
        tensor = source.body[name]
        itemsize = DTYPES[tensor.dtype].itemsize
        for start in range(0, max(1, tensor.nbytes), _CHUNK):  # an empty tensor is one empty chunk
            chunk = buffers[turn][: min(_CHUNK, tensor.nbytes - start)]
            turn = (turn + 1) % len(buffers)
            source.read_into(name, start // itemsize, chunk)
            yield name, start, chunk


def _converted(name: str, tensor: Tensor, dtype: str, chunk: memoryview) -> memoryview:
    """Return the bytes of a chunk in another dtype, rounded to nearest even. Raises CheckpointError."""
    if dtype == tensor.dtype:
        return chunk
    values = np.frombuffer(chunk, DTYPES[tensor.dtype])
    converted = rounded(values, DTYPES[dtype])
    if not np.isfinite(converted.astype(np.float32)).all():
        raise CheckpointError(
            f"{name} holds a value that is no finite number in {dtype}: take --dtype bfloat16 or float32"
        )
    return memoryview(converted.view(np.uint8).data)


def _hash(work: Sequence[tuple["hashlib._Hash", bytes, memoryview]]) -> None:
    """Add prelude and bytes to each digest."""
    for hasher, prelude, data in work:
        hasher.update(prelude)
        hasher.update(data)
