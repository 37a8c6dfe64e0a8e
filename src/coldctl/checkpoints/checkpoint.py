"""Safetensors checkpoints, read by header and by range: which tensors there are, which are the body, their digest.

Nothing here maps or loads a whole file, and nothing imports torch. A checkpoint from a stranger is only ever
parsed: JSON headers with every offset checked, then bytes.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.artifacts import layout
from coldctl.artifacts.manifest import Manifest, parse
from coldctl.checkpoints.architectures import BODY_PREFIXES
from coldctl.checkpoints.header import DTYPES, HEADER_LIMIT, TENSOR_LIMIT, Tensor, json_object, read_header
from coldctl.common.errors import CheckpointError, ModelError
from coldctl.storage.local import Folder, Reader

CONFIG_LIMIT = 16 << 20  # bytes of config.json; tens of thousands of label names take most of it
_CHUNK = 4 << 20  # bytes read at a time when hashing


@dataclass
class Checkpoint:
    """A checkpoint whose headers have been read and checked; its tensors are read on demand."""

    folder: Folder
    name: str
    config: dict[str, Any]
    body: dict[str, Tensor]  # by unprefixed name, sorted
    heads: tuple[str, ...]  # raw names of the tensors outside the body, never fused
    prefix: str  # what stands before the body's names in the files, "" for a bare encoder
    files: dict[str, int]  # weight files and their sizes in bytes
    manifest: Manifest | None = None
    original: "Checkpoint | None" = None  # what this is a part of, where rows were left out: digests are of that
    _readers: dict[str, Reader] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: everything but the open files."""
        return {**self.__dict__, "_readers": {}}

    @property
    def label(self) -> str:
        """How messages name it: its place."""
        return self.folder.label

    def read_into(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Read elements of `tensor` from index `start` (row-major) into `buffer` (bytes). Raises CheckpointError."""
        self.read_file(tensor.file, tensor.offset + start * DTYPES[tensor.dtype].itemsize, buffer)

    def read_file(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a weight file. Raises CheckpointError."""
        reader = self._readers.get(name)
        if reader is None:
            reader = self._readers[name] = self.folder.open(name)
        reader.read_into(offset, buffer)

    def read(self, name: str) -> NDArray[Any]:
        """One whole body tensor, in its stored dtype and shape."""
        tensor = self.body[name]
        array = np.empty(tensor.shape, DTYPES[tensor.dtype])
        self.read_into(tensor, 0, array.reshape(-1).view(np.uint8).data)
        return array

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


def open_checkpoint(folder: Folder, name: str) -> Checkpoint:
    """Read a checkpoint's config, manifest (if it has one) and safetensors headers.

    Raises CheckpointError or ModelError for anything that is missing, inconsistent, unsafe, or no encoder.
    """
    config = read_model_config(folder)
    tensors, files = read_tensors(folder)
    prefix = body_prefix(config, tensors, folder.label)
    body, heads = {}, []
    for raw, tensor in tensors.items():
        if prefix and not raw.startswith(prefix):
            heads.append(raw)
            continue
        unprefixed = modern_name(raw[len(prefix) :])
        if unprefixed in body:
            raise CheckpointError(f"{folder.label}: two tensors are called {unprefixed!r}: the checkpoint is ambiguous")
        body[unprefixed] = tensor
    manifest = read_manifest(folder)
    return Checkpoint(folder, name, config, dict(sorted(body.items())), tuple(heads), prefix, files, manifest)


def read_manifest(folder: Folder) -> Manifest | None:
    """The manifest of a folder that has one. Raises ManifestError if it is not as it was written."""
    if not folder.has(layout.MANIFEST):
        return None
    return parse(folder.read(layout.MANIFEST), f"{folder.label}/{layout.MANIFEST}")


def open_companion(checkpoint: Checkpoint, file: str) -> Checkpoint:
    """Another safetensors file of a checkpoint's folder, with tensors named and shaped as its body's.

    Raises CheckpointError.
    """
    where = f"{checkpoint.label}/{file}"
    if not checkpoint.folder.has(file):
        raise CheckpointError(f"{where} is missing")
    reader = checkpoint.folder.open(file)
    try:
        tensors = read_header(reader, file, where)
    finally:
        reader.close()
    for name, tensor in checkpoint.body.items():
        if tensor.floating and (name in tensors or not is_pooler(name)):
            found = tensors.get(name)
            if found is None or found.shape != tensor.shape or not found.floating:
                raise CheckpointError(f"{where} has no tensor {name} of the body's shape: make it again")
    return Checkpoint(
        checkpoint.folder, checkpoint.name, {}, dict(sorted(tensors.items())), (), "", {file: reader.size}
    )


def with_common_rows(base: Checkpoint, other: Checkpoint) -> Checkpoint:
    """`other` cut to the rows that its vocabulary shares with the base's: the first ones of both."""
    body = dict(other.body)
    cut = False
    for name, tensor in other.body.items():
        known = base.body.get(name)
        if (
            known is not None
            and is_vocabulary(name)
            and tensor.shape[1:] == known.shape[1:]
            and tensor.shape != known.shape
        ):
            rows = min(tensor.shape[0], known.shape[0])
            body[name] = replace(tensor, shape=(rows, *tensor.shape[1:]))
            cut = True
    return replace(other, body=body, original=other, _readers={}) if cut else other


def is_vocabulary(name: str) -> bool:
    """Whether an unprefixed body tensor has one row per token of the vocabulary."""
    return name.endswith(("word_embeddings.weight", "tok_embeddings.weight", "embeddings.weight")) and (
        "position" not in name and "token_type" not in name
    )


def read_model_config(folder: Folder) -> dict[str, Any]:
    """`config.json` as a dict. Raises ModelError if it is missing or describes something that is no encoder."""
    if not folder.has(layout.MODEL_CONFIG) and folder.has(layout.DELTA_WEIGHTS):
        raise ModelError(f"{folder.label} is a difference from its base and no model: fuse it with that base first")
    if not folder.has(layout.MODEL_CONFIG):
        raise ModelError(f"{folder.label} has no {layout.MODEL_CONFIG}: it is not a Hugging Face checkpoint")
    config = json_object(folder.read(layout.MODEL_CONFIG, CONFIG_LIMIT), f"{folder.label}/{layout.MODEL_CONFIG}")
    kind = config.get("model_type")
    architectures = config.get("architectures") or [""]
    if not isinstance(kind, str) or not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise ModelError(
            f"{folder.label}/{layout.MODEL_CONFIG} names no model_type: it is not a Hugging Face checkpoint"
        )
    generates = architectures[0].endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))
    if kind not in BODY_PREFIXES or config.get("is_decoder") or config.get("is_encoder_decoder") or generates:
        raise ModelError(
            f"{folder.label} is a {kind} model ({architectures[0] or 'no architecture named'}), not a text encoder, says "
            f"its {layout.MODEL_CONFIG}: take one such as BERT, RoBERTa, DistilBERT, ELECTRA, DeBERTa-v2 or ModernBERT"
        )
    return config


def read_tensors(folder: Folder) -> tuple[dict[str, Tensor], dict[str, int]]:
    """All tensors of a checkpoint by raw name, over its shards, and the weight files with their sizes.

    Raises CheckpointError.
    """
    if folder.has(layout.WEIGHTS):
        names, where = [layout.WEIGHTS], None
    elif folder.has(layout.WEIGHTS_INDEX):
        index = json_object(folder.read(layout.WEIGHTS_INDEX, HEADER_LIMIT), f"{folder.label}/{layout.WEIGHTS_INDEX}")
        where = index.get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
            raise CheckpointError(
                f"{folder.label}/{layout.WEIGHTS_INDEX} has no weight_map: fetch the checkpoint again"
            )
        names = sorted(set(where.values()))
        if len(where) > TENSOR_LIMIT:
            raise CheckpointError(f"{folder.label} has more than {TENSOR_LIMIT} tensors: this is no encoder")
    else:
        pickled = [name for name in folder.names() if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickled:
            remedy = "convert them to safetensors, or fuse with --allow-pickle"
            raise CheckpointError(
                f"{folder.label} has only pickled weights ({pickled[0]}), which can run code: {remedy}"
            )
        raise CheckpointError(f"{folder.label} has no {layout.WEIGHTS}: it holds no weights")
    tensors: dict[str, Tensor] = {}
    files: dict[str, int] = {}
    for name in names:
        reader = folder.open(name)
        try:
            found = read_header(reader, name, f"{folder.label}/{name}")
        finally:
            reader.close()
        files[name] = reader.size
        for raw, tensor in found.items():
            if where is not None and where.get(raw) != name:
                raise CheckpointError(f"{folder.label}: {raw!r} stands in {name} but not in the index: fetch it again")
            tensors[raw] = tensor
    if where is not None and (lost := sorted(set(where) - set(tensors))):
        raise CheckpointError(f"{folder.label}: the index names {lost[0]!r}, which no shard holds: fetch it again")
    return tensors, files


def body_prefix(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> str:
    """What stands before the body's tensor names: `roberta.`, `bert.` …, or "" for a bare encoder."""
    prefix = BODY_PREFIXES[config["model_type"]] + "."
    if any(name.startswith(prefix) for name in tensors):
        return prefix
    if not tensors:
        raise CheckpointError(f"{where} holds no tensors: fetch it again")
    return ""


def modern_name(name: str) -> str:
    """Old checkpoints call a layer norm's parameters gamma and beta.

    >>> modern_name("encoder.layer.0.output.LayerNorm.gamma")
    'encoder.layer.0.output.LayerNorm.weight'
    """
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            return name[: -len(old)] + new
    return name


def is_pooler(name: str) -> bool:
    """Whether an unprefixed body tensor belongs to the pooler, which some head classes leave out."""
    return name.startswith("pooler.")


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
