"""Rebase contributions that were made on an earlier base.

Notation: θ is the base that is fused into now, θ′ the base that a contribution x was made on, k generations earlier.
It enters as θ + s(k) · (x − θ′) with s(k) = (1 + k)^-½: the polynomial staleness of FedAsync (Xie et al. 2019, arXiv
1903.03934) with the exponent of FedBuff (Nguyen et al. 2022, arXiv 2106.06639).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from coldctl.artifacts.manifest import Manifest
from coldctl.artifacts.model_ref import resolve
from coldctl.checkpoints.checkpoint import Checkpoint, open_checkpoint, shared
from coldctl.checkpoints.digests import body_digest
from coldctl.checkpoints.header import Tensor
from coldctl.common.errors import CheckpointError, ColdctlError


def staleness_weight(age: int) -> float:
    """Return s(k) = (1 + k)^-½, the weight of the update of a contribution that is k generations old.

    >>> staleness_weight(0), staleness_weight(3)
    (1.0, 0.5)
    """
    return float((1 + age) ** -0.5)


def generations(base: Manifest | None) -> dict[str, int]:
    """Return the body digests of a base's ancestors with their ages in generations, 1 for its own base."""
    if base is None:
        return {}
    ancestors = [base.get("base", {}), *reversed(base.get("ancestors", []))]
    digests = dict.fromkeys(ancestor.get("body_digest") for ancestor in ancestors)
    own = base["body_digest"]  # a model that was fused to what it came from has no age
    return {digest: age for age, digest in enumerate(digests, start=1) if isinstance(digest, str) and digest != own}


@dataclass
class Ancestry:
    """The ancestors of a base by body digest, each opened when the first contribution needs it.

    They are searched among `places`: MODELs with their revisions. With `verify` their bodies are read and verified.
    """

    base: Manifest | None
    places: Sequence[tuple[str, str | None]]
    verify: bool = True
    _opened: dict[str, Checkpoint] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def age(self, digest: str | None) -> int:
        """Return how many generations ago a body was the base, 0 for the base itself and for an unknown body."""
        return generations(self.base).get(digest or "", 0)

    def open(self, digest: str) -> Checkpoint:
        """Return the ancestor with this body. Raises CheckpointError if it is missing or differs from its manifest."""
        with self._lock:
            if digest not in self._opened:
                self._opened[digest] = shared(self._find(digest))
            return self._opened[digest]

    def _find(self, digest: str) -> Checkpoint:
        for place, revision in self.places:
            try:
                model = resolve(place, revision)
                checkpoint = open_checkpoint(model.folder, model.name)
            except ColdctlError:
                continue  # another one may be there
            stated = checkpoint.manifest["body_digest"] if checkpoint.manifest else None
            if (stated or body_digest(checkpoint)) != digest:
                continue
            if stated and self.verify and body_digest(checkpoint) != stated:
                raise CheckpointError(f"{checkpoint.label}, its base, is not what its manifest says: fetch it again")
            return checkpoint
        raise CheckpointError(f"its base {digest[:19]}… is not at hand: give it as --old-base")


@dataclass(frozen=True, eq=False)
class Rebased:
    """The source of a contribution moved to another base: θ + weight · (x − θ′), float64."""

    contribution: Checkpoint
    base: Checkpoint
    original_base: Checkpoint
    weight: float

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Decode the elements block by block."""
        values = np.frombuffer(buffer, np.float64)
        stop = start + values.size
        values[:] = self.contribution.floats(name, start, stop)
        with np.errstate(all="ignore"):  # a pass over the inputs finds and names values not finite
            values -= self.original_base.floats(name, start, stop)
            values *= self.weight
            values += self.base.floats(name, start, stop)


def rebase(contribution: Checkpoint, base: Checkpoint, original_base: Checkpoint, age: int) -> Checkpoint:
    """Return a contribution that was made on `original_base` `age` generations ago as a contribution to `base`.

    Tensors that only one of them has (poolers) are left out. Raises CheckpointError if `original_base` lacks a tensor
    that the difference needs, or has it in another shape.
    """
    body = {}
    for name, tensor in contribution.body.items():
        current = base.body.get(name)
        if current is None or not current.floating or not tensor.floating:
            continue
        before = original_base.body.get(name)
        if before is None or before.shape[1:] != tensor.shape[1:] or before.size < tensor.size:
            raise CheckpointError(
                f"its base {original_base.label} has no tensor {name} of its shape: give the right one"
            )
        body[name] = Tensor("F64", tensor.shape)
    source = Rebased(contribution, base, original_base, staleness_weight(age))
    return replace(contribution, body=body, source=source, original=contribution.original or contribution)
