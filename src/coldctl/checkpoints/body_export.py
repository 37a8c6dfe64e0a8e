"""Writing the body of a checkpoint alone, in one pass over its bytes that also proves them."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coldctl.artifacts import layout
from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.checkpoints.digests import body_digest, digest_prelude
from coldctl.checkpoints.header import DTYPE_NAMES, DTYPES, Tensor
from coldctl.checkpoints.sanitize import CODE, UNUSED
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
    wanted = DTYPE_NAMES[dtype] if dtype else None
    layouts = {
        name: Layout(name, wanted if wanted and tensor.floating else tensor.dtype, tensor.shape)
        for name, tensor in source.body.items()
    }
    converts = any(layouts[name].dtype != tensor.dtype for name, tensor in source.body.items())
    ordered = file_order(list(layouts.values()))
    floating = [item.name for item in ordered if source.body[item.name].floating]
    # The body digest goes by name and the file by width: the same order, unless dtypes are mixed and left as they are.
    provable = floating == sorted(floating)
    reading, writing = hashlib.sha256(), hashlib.sha256()
    writer = WeightsWriter(folder, list(layouts.values()), max_shard_size)
    progress.begin(task, sum(tensor.nbytes for tensor in source.body.values()), "bytes")
    pending: Future[None] | None = None
    try:
        with ThreadPoolExecutor(1) as beside:
            for name, start, part in _pieces(source, ordered):
                tensor = source.body[name]
                made = _rounded(name, tensor, layouts[name].dtype, part)
                if pending is not None:
                    pending.result()
                if tensor.floating and provable:
                    head = digest_prelude(name, tensor) if start == 0 else b""
                    other = digest_prelude(name, _as(tensor, layouts[name].dtype)) if start == 0 else b""
                    pending = beside.submit(
                        _hash, [(reading, head, part), *([(writing, other, made)] if converts else [])]
                    )
                writer.write(made)
                progress.advance(task, len(part))
            if pending is not None:
                pending.result()
        writer.close()
    finally:
        writer.abandon()
        progress.end(task)
    found = f"sha256:{reading.hexdigest()}" if provable else body_digest(source)
    if not converts:
        return WrittenBody(found, found, writer.digests)
    return WrittenBody(found, f"sha256:{writing.hexdigest()}", writer.digests)


def write_config(source: Checkpoint, folder: Path, dtype: str | None) -> None:
    """Write the `config.json` of the body alone, without what tells of machines and heads."""
    document = bare_config(source.config, dtype or source.config.get("dtype") or source.config.get("torch_dtype"))
    document = {key: value for key, value in document.items() if not is_path(value)}
    (folder / layout.MODEL_CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _pieces(source: Checkpoint, ordered: list[Layout]) -> Iterator[tuple[str, int, memoryview]]:
    """Pieces of the tensors in order. Three buffers take turns: one is read, one is written, one may still be hashed."""
    buffers = [memoryview(bytearray(_CHUNK)) for _ in range(3)]
    turn = 0
    for item in ordered:
        tensor = source.body[item.name]
        itemsize = DTYPES[tensor.dtype].itemsize
        for start in range(0, max(1, tensor.nbytes), _CHUNK):  # an empty tensor is one empty piece
            part = buffers[turn][: min(_CHUNK, tensor.nbytes - start)]
            turn = (turn + 1) % len(buffers)
            source.read_into(tensor, start // itemsize, part)
            yield item.name, start, part


def _rounded(name: str, tensor: Tensor, dtype: str, part: memoryview) -> memoryview:
    """The bytes of a piece in another dtype, rounded to nearest even."""
    if dtype == tensor.dtype:
        return part
    values = np.frombuffer(part, DTYPES[tensor.dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        made = values.astype(DTYPES[dtype])
    if not np.isfinite(made.astype(np.float32)).all():
        raise CheckpointError(
            f"{name} holds a value that is no finite number in {dtype}: take --dtype bfloat16 or float32"
        )
    return memoryview(made.view(np.uint8).data)


def _as(tensor: Tensor, dtype: str) -> Tensor:
    return Tensor(tensor.file, tensor.offset, dtype, tensor.shape)


def _hash(work: list[tuple["hashlib._Hash", bytes, memoryview]]) -> None:
    for hasher, head, part in work:
        hasher.update(head)
        hasher.update(part)


# About a head, about custom code or other files, or about the machine that the model came from.
_DROPPED = (
    *CODE,
    *UNUSED,
    "_name_or_path",
    "torch_dtype",
    "name_or_path",
)


def bare_architecture(architectures: object) -> str | None:
    """The bare model's class name from that of any of its head classes.

    >>> bare_architecture(["XLMRobertaForMaskedLM"])
    'XLMRobertaModel'
    >>> bare_architecture(["BertModel"])
    'BertModel'
    """
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        return None
    name = re.sub(r"(For|With)[A-Z]\w*$", "", architectures[0])
    return name if name.endswith("Model") else f"{name}Model"


def bare_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The `config.json` of a body alone, from that of the checkpoint it came from."""
    bare = {key: value for key, value in config.items() if key not in _DROPPED}
    if name := bare_architecture(config.get("architectures")):
        bare["architectures"] = [name]
    if dtype:
        bare["dtype"] = dtype
    return bare
