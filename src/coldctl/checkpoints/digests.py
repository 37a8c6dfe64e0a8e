"""Digests of bodies, and of what else a weight file holds."""

import hashlib
from collections.abc import Iterator

from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.checkpoints.header import DTYPES, Tensor

_CHUNK = 4 << 20  # bytes read at a time when hashing


def digest_prelude(name: str, tensor: Tensor) -> bytes:
    """What the body digest takes in before a tensor's bytes: `name NUL dtype NUL d0,d1,… NUL`."""
    return b"\0".join([name.encode(), tensor.dtype.encode(), ",".join(map(str, tensor.shape)).encode(), b""])


def body_digest(checkpoint: Checkpoint) -> str:
    """The body digest of a checkpoint, computed from its files (from the decoded body, where it is encoded).

    sha256 over the floating body tensors sorted by unprefixed name, each as its prelude and its little-endian
    bytes: equal for equal bodies whatever layout, sharding, prefix or head.
    """
    hasher = hashlib.sha256()
    for piece in _digested(checkpoint.original or checkpoint):
        hasher.update(piece)
    return "sha256:" + hasher.hexdigest()


def outside_body_digest(checkpoint: Checkpoint, file: str) -> str:
    """sha256 over the bytes of a weight file that belong to no floating body tensor: header, heads, buffers.

    With the body digest it covers the whole file.
    """
    checkpoint = checkpoint.original or checkpoint
    spans = sorted(
        (tensor.offset, tensor.offset + tensor.nbytes)
        for tensor in checkpoint.body.values()
        if tensor.floating and tensor.file == file
    )
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    position = 0
    for begin, end in [*spans, (checkpoint.files[file], checkpoint.files[file])]:
        while position < begin:
            part = buffer[: min(_CHUNK, begin - position)]
            checkpoint.read_file(file, position, part)
            hasher.update(part)
            position += len(part)
        position = max(position, end)
    return "sha256:" + hasher.hexdigest()


def outside_body(checkpoint: Checkpoint) -> dict[str, str]:
    """What a manifest says of each weight file beyond the body."""
    return {file: outside_body_digest(checkpoint, file) for file in checkpoint.files}


def _digested(checkpoint: Checkpoint) -> Iterator[bytes | memoryview]:
    buffer = memoryview(bytearray(_CHUNK))
    for name, tensor in checkpoint.body.items():
        if not tensor.floating:
            continue
        yield digest_prelude(name, tensor)
        itemsize = DTYPES[tensor.dtype].itemsize
        step = _CHUNK // itemsize
        for start in range(0, tensor.size, step):
            part = buffer[: min(step, tensor.size - start) * itemsize]
            checkpoint.read_into(tensor, start, part)
            yield part
