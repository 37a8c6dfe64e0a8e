"""Low-rank adapters as PEFT writes them, decoded block by block."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.artifacts import layout
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.architectures import BODY_PREFIXES
from coldctl.checkpoints.checkpoint import (
    CONFIG_LIMIT,
    Checkpoint,
    InMemory,
    is_pooler,
    modern_name,
    open_tensors,
    read_manifest,
)
from coldctl.checkpoints.header import DTYPES, Tensor, json_object, rounded
from coldctl.common.errors import CheckpointError
from coldctl.config.settings import HIGHEST_RANK
from coldctl.storage.local import Folder

_SIMPLE_PATTERN = re.compile(r"[\w.\\*|\[\]-]{1,200}")
_MOST_PATTERNS, _MOST_STARRED, _MOST_STARS = 1000, 16, 2  # what is matched in no time, whatever the names
_PEFT = "base_model.model."


@dataclass(frozen=True)
class LowRank:
    """A low-rank difference from the base: `left` [rows, r] @ `right` [r, columns] · `scale`."""

    left: NDArray[np.float64]
    right: NDArray[np.float64]
    scale: float

    def rows(self, first: int, last: int) -> NDArray[np.float64]:
        """Return rows `first:last` of the difference, flat.

        Summed in the order of the ranks: that of a matrix product is the machine's own, and so would be the body digest.
        """
        total = np.zeros((last - first, self.right.shape[1]))
        product = np.empty_like(total)
        with np.errstate(over="ignore", invalid="ignore"):  # a pass over the inputs finds and names values not finite
            for column, row in zip(self.left[first:last].T, self.right, strict=True):
                total += np.multiply.outer(column, row, out=product)
            return total.reshape(-1) * self.scale


@dataclass(frozen=True, eq=False)
class LoRA:
    """The source of the base plus low-rank differences, and of tensors that the adapter replaces as a whole."""

    base: Checkpoint
    deltas: Mapping[str, LowRank]
    replaced: InMemory

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Decode base + left @ right · scale in float64, rounded once to the base's dtype."""
        if name in self.replaced.arrays:
            self.replaced.read_into(name, start, buffer)
            return
        self.base.read_into(name, start, buffer)
        if name in self.deltas and len(buffer):
            delta, dtype = self.deltas[name], DTYPES[self.base.body[name].dtype]
            values = np.frombuffer(buffer, dtype)
            columns = delta.right.shape[1]
            first, last = start // columns, -(-(start + values.size) // columns)
            step = delta.rows(first, last)[start - first * columns :][: values.size]
            buffer[:] = rounded(values.astype(np.float64) + step, dtype).view(np.uint8).data


def open_adapter(folder: Folder, name: str, base: Checkpoint) -> Checkpoint:
    """Open a PEFT LoRA adapter as a checkpoint whose body is the base's with B · A · scale added to the right tensors.

    scale is alpha / r (alpha / √r for rank-stabilised ones). Sums are float64, rounded once to the base's dtype. Raises
    CheckpointError for what cannot be decoded exactly: other adapter kinds, DoRA, transposed layers, tensors that the
    base lacks.
    """
    settings = _settings(folder, f"{folder.label}/{layout.ADAPTER_CONFIG}")
    stored = open_tensors(folder, name, layout.ADAPTER_WEIGHTS)
    # What it holds is judged by the header: only what the base's body has a place for is read into memory.
    pairs, whole = _changes(stored.body, settings, base, folder.label)
    deltas: dict[str, LowRank] = {}
    for target, pair in pairs.items():
        a, b = (stored.read(raw).astype(np.float64) for raw in (pair.first, pair.second))
        left, right = (a.T.copy(), b.T.copy()) if pair.embedding else (b, a)
        deltas[target] = LowRank(left, right, pair.scale)
    replaced = {
        target: rounded(stored.read(raw).astype(np.float64), DTYPES[base.body[target].dtype])
        for target, raw in whole.items()
    }
    if not deltas and not replaced:
        raise CheckpointError(
            f"{folder.label}: no tensor of the adapter belongs to the base's body: give the base it was made from"
        )
    config = {**base.config, **{key: settings[key] for key in sanitize.code_named_in(settings)}}
    body = {key: Tensor(tensor.dtype, tensor.shape) for key, tensor in base.body.items()}
    source = LoRA(base, deltas, InMemory(replaced))
    return Checkpoint(folder, name, config, body, stored.files, source, read_manifest(folder), relative=True)


def _settings(folder: Folder, where: str) -> dict[str, Any]:
    """Load `adapter_config.json`. Raises CheckpointError for an adapter that cannot be decoded exactly."""
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


def _changes(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], base: Checkpoint, label: str
) -> tuple[dict[str, _Pair], dict[str, str]]:
    """Return what an adapter changes: pairs by the body tensor they are added to, raw names by the one they replace.

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
    """Return the tensor that a pair A, B belongs to, and the pair. Raises CheckpointError."""
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
    """The factors of the pairs' products: alpha / rank, or alpha / √rank; alpha may depend on the module's name."""

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        """Read the settings. Raises CheckpointError for patterns that are invalid, or could take for ever."""
        self._where, self._rooted = where, bool(settings.get("use_rslora"))
        self._alpha = settings.get("lora_alpha", 1)
        patterns = settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
            raise CheckpointError(f"{where}: its alpha_pattern is not usable: merge the adapter first")
        if sum("*" in pattern for pattern in patterns) > _MOST_STARRED:
            raise CheckpointError(f"{where}: its alpha_pattern is too intricate: merge the adapter first")
        self._patterns = [(_compiled(pattern, where), alpha) for pattern, alpha in patterns.items()]

    def of(self, name: str, rank: int) -> float:
        """Return the scale of a module's pair. Raises CheckpointError if alpha is no number."""
        alpha = next((value for pattern, value in self._patterns if pattern.match(name)), self._alpha)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(
                f"{self._where}: lora_alpha is {str(alpha)[:40]}, not a number: fetch the adapter again"
            )
        return alpha / (math.sqrt(rank) if self._rooted else rank)


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Compile a pattern as PEFT does, for the end of a module's path. Raises CheckpointError."""
    if not _SIMPLE_PATTERN.fullmatch(pattern) or pattern.count("*") > _MOST_STARS:  # none that takes for ever
        raise CheckpointError(f"{where}: the pattern {pattern[:40]!r} is too intricate: merge the adapter first")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        raise CheckpointError(f"{where}: {pattern!r} is no regular expression: fetch the adapter again") from None
