"""Checkpoints: headers that were checked, and the source of their tensors.

Nothing here maps or loads a whole file, and nothing imports torch. A checkpoint from a stranger is only ever parsed: JSON
headers with every offset checked, then bytes. The body is the encoder without the heads; its tensors have names without
the prefix of their architecture.
"""

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from coldctl.artifacts import layout
from coldctl.artifacts.manifest import Manifest, parse
from coldctl.checkpoints.architectures import BODY_PREFIXES
from coldctl.checkpoints.header import DTYPES, HEADER_LIMIT, TENSOR_LIMIT, Tensor, json_object, read_header
from coldctl.common.errors import CheckpointError, ModelError
from coldctl.storage.local import Folder, Reader

CONFIG_LIMIT = 16 << 20  # bytes of config.json; tens of thousands of label names take most of it


class TensorSource(Protocol):
    """What the elements of a body's tensors are read or decoded from. It can be pickled, without its open files."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) with the elements of a body tensor from index `start` (row-major) on.

        They have the dtype that the checkpoint's `body` says. Raises CheckpointError.
        """


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose headers have been read and checked; its tensors are read on demand."""

    folder: Folder
    name: str
    config: Mapping[str, Any]
    body: Mapping[str, Tensor]  # by unprefixed name, sorted
    files: Mapping[str, int]  # weight files and their sizes in bytes
    source: TensorSource
    manifest: Manifest | None = None
    original: "Checkpoint | None" = None  # what the files hold, if `body` is derived from it: digests are of that
    relative: bool = (
        False  # it states a difference from its base: with another base it would be decoded to something else
    )

    @property
    def label(self) -> str:
        """Return its place, which messages begin with."""
        return self.folder.label

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with elements of a body tensor in its stored dtype, as `TensorSource.read_into` does."""
        self.source.read_into(name, start, buffer)

    def read(self, name: str) -> NDArray[Any]:
        """Return one whole body tensor, in its stored dtype and shape. Raises CheckpointError."""
        tensor = self.body[name]
        return self._elements(name, 0, tensor.size).reshape(tensor.shape)

    def floats(self, name: str, start: int, stop: int) -> NDArray[np.float64]:
        """Return elements `start:stop` (row-major) of a body tensor as float64. Raises CheckpointError."""
        return self._elements(name, start, stop).astype(np.float64)

    def _elements(self, name: str, start: int, stop: int) -> NDArray[Any]:
        values = np.empty(stop - start, DTYPES[self.body[name].dtype])
        self.source.read_into(name, start, values.view(np.uint8).data)
        return values


@dataclass(eq=False)
class SafetensorsFiles:
    """The source of tensors that safetensors files store as they are. A file is opened when it is first read."""

    folder: Folder
    tensors: Mapping[str, Tensor]
    _readers: dict[str, Reader] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open files: another process opens its own."""
        return {**self.__dict__, "_readers": {}}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Read the elements from their file, straight into `buffer`."""
        tensor = self.tensors[name]
        reader = self._readers.get(tensor.file)
        if reader is None:
            reader = self._readers[tensor.file] = self.folder.open(tensor.file)
        reader.read_into(tensor.offset + start * DTYPES[tensor.dtype].itemsize, buffer)


@dataclass(frozen=True, eq=False)
class InMemory:
    """The source of tensors that are arrays in memory."""

    arrays: Mapping[str, NDArray[Any]]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Copy the elements."""
        array = self.arrays[name]
        begin = start * array.itemsize
        buffer[:] = array.reshape(-1).view(np.uint8).data[begin : begin + len(buffer)]


@dataclass(eq=False)
class LastRead:
    """A source that keeps what was read last, because many readers ask for the same elements in turn."""

    source: TensorSource
    _last: tuple[tuple[str, int, int], bytes] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the elements that were read last."""
        return {**self.__dict__, "_last": None}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Read the elements, or copy them if they were read last."""
        last, key = self._last, (name, start, len(buffer))
        if last is not None and last[0] == key:
            buffer[:] = last[1]
            return
        self.source.read_into(name, start, buffer)
        self._last = key, bytes(buffer)


def shared(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as the base that many others are decoded with: their common reads are made once."""
    return replace(checkpoint, source=LastRead(checkpoint.source))


def open_checkpoint(folder: Folder, name: str) -> Checkpoint:
    """Read a checkpoint's config, manifest (if it has one) and safetensors headers.

    Raises CheckpointError or ModelError for anything that is missing, inconsistent, unsafe, or no encoder.
    """
    config = read_model_config(folder)
    tensors, files = read_tensors(folder)
    body = {unprefixed: tensors[raw] for unprefixed, raw in body_names(config, tensors, folder.label).items()}
    return Checkpoint(folder, name, config, body, files, SafetensorsFiles(folder, body), read_manifest(folder))


def open_tensors(folder: Folder, name: str, file: str) -> Checkpoint:
    """Open one safetensors file, of whatever tensors, under their own names. Raises CheckpointError."""
    with closing(folder.open(file)) as reader:
        tensors = dict(sorted(read_header(reader, file, f"{folder.label}/{file}").items()))
        return Checkpoint(folder, name, {}, tensors, {file: reader.size}, SafetensorsFiles(folder, tensors))


def read_manifest(folder: Folder) -> Manifest | None:
    """Return the manifest of a folder, None if it has none. Raises ManifestError if it is not as it was written."""
    if not folder.has(layout.MANIFEST):
        return None
    return parse(folder.read(layout.MANIFEST), f"{folder.label}/{layout.MANIFEST}")


def open_companion(checkpoint: Checkpoint, file: str) -> Checkpoint:
    """Open another safetensors file of a checkpoint's folder, with tensors named and shaped as its body's.

    Raises CheckpointError.
    """
    where = f"{checkpoint.label}/{file}"
    if not checkpoint.folder.has(file):
        raise CheckpointError(f"{where} is missing")
    companion = open_tensors(checkpoint.folder, checkpoint.name, file)
    for name, tensor in checkpoint.body.items():
        if tensor.floating and (name in companion.body or not is_pooler(name)):
            stored = companion.body.get(name)
            if stored is None or stored.shape != tensor.shape or not stored.floating:
                raise CheckpointError(f"{where} has no tensor {name} of the body's shape: make it again")
    return companion


def with_common_rows(base: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Return `other` cut to the rows that its vocabulary shares with the base's: the first ones of both."""
    cut = {}
    for name, tensor in other.body.items():
        own = base.body.get(name)
        if own is None or not is_vocabulary(name) or tensor.shape == own.shape or tensor.shape[1:] != own.shape[1:]:
            continue
        cut[name] = replace(tensor, shape=(min(tensor.shape[0], own.shape[0]), *tensor.shape[1:]))
    return replace(other, body={**other.body, **cut}, original=other) if cut else other


def is_vocabulary(name: str) -> bool:
    """Return whether an unprefixed body tensor has one row per token of the vocabulary."""
    return name.endswith(("word_embeddings.weight", "tok_embeddings.weight", "embeddings.weight")) and (
        "position" not in name and "token_type" not in name
    )


def read_model_config(folder: Folder) -> dict[str, Any]:
    """Return `config.json` as a dict. Raises ModelError if it is missing or describes something that is no encoder."""
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
    """Return all tensors of a checkpoint by raw name, over its shards, and the weight files with their sizes.

    Raises CheckpointError.
    """
    names, shard_of = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    files: dict[str, int] = {}
    for name in names:
        shard = open_tensors(folder, name, name)
        files |= shard.files
        for raw in shard.body:
            if shard_of is not None and shard_of.get(raw) != name:
                raise CheckpointError(f"{folder.label}: {raw!r} stands in {name} but not in the index: fetch it again")
        tensors |= shard.body
    if shard_of is not None and (lost := sorted(set(shard_of) - set(tensors))):
        raise CheckpointError(f"{folder.label}: the index names {lost[0]!r}, which no shard holds: fetch it again")
    return tensors, files


def _weight_files(folder: Folder) -> tuple[list[str], dict[str, str] | None]:
    """Return the names of the weight files, and the file of each tensor where there is an index. Raises CheckpointError."""
    if folder.has(layout.WEIGHTS):
        return [layout.WEIGHTS], None
    if not folder.has(layout.WEIGHTS_INDEX):
        pickled = [name for name in folder.names() if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickled:
            remedy = "convert them to safetensors, or fuse with --allow-pickle"
            raise CheckpointError(
                f"{folder.label} has only pickled weights ({pickled[0]}), which can run code: {remedy}"
            )
        raise CheckpointError(f"{folder.label} has no {layout.WEIGHTS}: it holds no weights")
    where = f"{folder.label}/{layout.WEIGHTS_INDEX}"
    shard_of = json_object(folder.read(layout.WEIGHTS_INDEX, HEADER_LIMIT), where).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{where} has no weight_map: fetch the checkpoint again")
    if len(shard_of) > TENSOR_LIMIT:
        raise CheckpointError(f"{folder.label} has more than {TENSOR_LIMIT} tensors: this is no encoder")
    return sorted(set(shard_of.values())), shard_of


def body_names(config: Mapping[str, Any], raw_names: Iterable[str], where: str) -> dict[str, str]:
    """Return the raw names of the body's tensors by their names without prefix (`roberta.`, `bert.` …), sorted.

    The other tensors belong to heads. In a bare encoder no name has the prefix, and all tensors are its body's. Raises
    CheckpointError for two tensors of one name, and for none at all.
    """
    names = list(raw_names)
    if not names:
        raise CheckpointError(f"{where} holds no tensors: fetch it again")
    prefix = BODY_PREFIXES[config["model_type"]] + "."
    body: dict[str, str] = {}
    for raw in [name for name in names if name.startswith(prefix)] or names:
        unprefixed = modern_name(raw.removeprefix(prefix))
        if unprefixed in body:
            raise CheckpointError(f"{where}: two tensors are called {unprefixed!r}: the checkpoint is ambiguous")
        body[unprefixed] = raw
    return dict(sorted(body.items()))


def modern_name(name: str) -> str:
    """Return today's name of a tensor: old checkpoints call a layer norm's parameters gamma and beta.

    >>> modern_name("encoder.layer.0.output.LayerNorm.gamma")
    'encoder.layer.0.output.LayerNorm.weight'
    """
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            return name[: -len(old)] + new
    return name


def is_pooler(name: str) -> bool:
    """Return whether an unprefixed body tensor belongs to the pooler, which some head classes leave out."""
    return name.startswith("pooler.")
