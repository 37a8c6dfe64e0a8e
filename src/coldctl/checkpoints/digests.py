"""Digests of bodies, and of what else a weight file holds."""

import hashlib
from contextlib import closing

from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.checkpoints.header import DTYPES, Tensor

_CHUNK = 4 << 20  # bytes read at a time when hashing


def digest_prelude(name: str, tensor: Tensor) -> bytes:
    """Return what the body digest covers before a tensor's bytes: `name NUL dtype NUL d0,d1,… NUL`."""
    return b"\0".join([name.encode(), tensor.dtype.encode(), ",".join(map(str, tensor.shape)).encode(), b""])


def body_digest(checkpoint: Checkpoint) -> str:
    """Return the body digest of a checkpoint, computed from its files (from the decoded body, where it is encoded).

    sha256 over the floating body tensors sorted by unprefixed name, each as its prelude and its little-endian
    bytes: equal for equal bodies whatever layout, sharding, prefix or head.
    """
    checkpoint = checkpoint.original or checkpoint
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    for name, tensor in checkpoint.body.items():
        if not tensor.floating:
            continue
        hasher.update(digest_prelude(name, tensor))
        itemsize = DTYPES[tensor.dtype].itemsize
        step = _CHUNK // itemsize
        for start in range(0, tensor.size, step):
            chunk = buffer[: min(step, tensor.size - start) * itemsize]
            checkpoint.read_into(name, start, chunk)
            hasher.update(chunk)
    return "sha256:" + hasher.hexdigest()


def outside_body_digest(checkpoint: Checkpoint, file: str) -> str:
    """Return the sha256 over the bytes of a weight file that belong to no floating body tensor: header, heads, buffers.

    With the body digest it covers the whole file. Raises CheckpointError.
    """
    checkpoint = checkpoint.original or checkpoint
    spans = sorted(
        (tensor.offset, tensor.offset + tensor.nbytes)
        for tensor in checkpoint.body.values()
        if tensor.floating and tensor.file == file
    )
    size = checkpoint.files[file]
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    position = 0
    with closing(checkpoint.folder.open(file)) as reader:
        for begin, end in [*spans, (size, size)]:
            while position < begin:
                chunk = buffer[: min(_CHUNK, begin - position)]
                reader.read_into(position, chunk)
                hasher.update(chunk)
                position += len(chunk)
            position = max(position, end)
    return "sha256:" + hasher.hexdigest()


def outside_body(checkpoint: Checkpoint) -> dict[str, str]:
    """Return `outside_body_digest` of each weight file by name, as a manifest states it."""
    return {file: outside_body_digest(checkpoint, file) for file in checkpoint.files}
