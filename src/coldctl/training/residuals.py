"""What a contributor's 8-bit contributions still owe: their rounding errors, kept at home until the next one takes them along.

Error feedback (Seide et al. 2014, 1-bit SGD, section 2; Karimireddy et al. 2019, arXiv 1901.09847, algorithm 1): of an update Δ
and the residual r of before, Q(Δ + r) is sent, and r' = (Δ + r) − Q(Δ + r) is kept for the next time. So over many iterations
what was sent adds up to what was learned, but for one last rounding.

Residuals lie in `$COLDCTL_STATE`, else in `coldctl` under the user's state directory, as `residuals/NAME/BASE/CONTRIBUTION`:
the contributor's name, and the body digests of the base and of the contribution that owes it. They tell as much of the data as
weights do, are readable by the user alone, and nothing of them goes into a contribution, a manifest or a RUN.

A residual is what an update still lacks that was fused, so it is owed to a base in whose ancestry its contribution was fused,
unless another one that was fused there has taken it in. So nothing has to be undone: it is written before its contribution
is published, and a contribution that was never published or never fused is found in no ancestry.
"""

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from coldctl.artifacts.manifest import Manifest
from coldctl.checkpoints.checkpoint import Checkpoint
from coldctl.checkpoints.header import read_header
from coldctl.common.errors import CheckpointError, OutputError
from coldctl.storage.files import LocalFolder

_KEPT = 4  # residuals of one contributor on one base: repeated trainings leave one each
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_PARTIAL = ".partial.safetensors"
_SUFFIX = ".safetensors"
_TAKEN = ".taken"  # beside a residual: the contributions that took it in


def folder() -> Path:
    """Where residuals are kept."""
    if given := os.environ.get("COLDCTL_STATE"):
        return Path(given).expanduser() / "residuals"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "coldctl" / "residuals"


def prepare(name: str) -> Path:
    """The directory of a contributor's residuals, made if need be. Raises OutputError if they cannot be kept there."""
    place = folder() / name
    try:
        _make_private(place)
        (place / _PARTIAL).touch(mode=0o600)
    except OSError as error:
        raise _cannot_keep(place, error) from None
    return place


@dataclass
class Account:
    """The residuals of one contributor, while it makes a contribution on one base."""

    place: Path
    base_digest: str
    fused: frozenset[str]  # contributions, as hexadecimal digests, in the base's ancestry
    owed: list[Path] = field(default_factory=list)

    @property
    def draft(self) -> Path:
        """Where the new residual is to be written."""
        return self.place / _PARTIAL

    def opened(self, base: Checkpoint) -> list[Checkpoint]:
        """The residuals owed, float32, under the names of the base's body. Raises CheckpointError."""
        return [_opened(path, base) for path in self.owed]

    def settle(self, contribution: str) -> None:
        """Give the draft to the contribution of that body digest, which takes in all that was owed; durable on return.

        Repeated after an interruption it does the same again.
        """
        kept = self.place / _hexadecimal(self.base_digest) / f"{_hexadecimal(contribution)}{_SUFFIX}"
        try:
            _make_private(kept.parent)
            self.draft.chmod(0o600)
            self.draft.replace(kept)
            _sync(kept.parent)
            for path in self.owed:
                _note_taker(path, kept.stem)
            self._clear(kept)
        except OSError as error:
            raise _cannot_keep(self.place, error) from None

    def _clear(self, kept: Path) -> None:
        """Drop what was taken in by a contribution that was fused since, and all but the latest few of this base."""
        for path in _residuals(self.place):
            if path not in self.owed and path != kept and _takers(path) & self.fused:
                _drop(path)
        for path in sorted(_residuals(kept.parent.parent, kept.parent.name), key=_time)[:-_KEPT]:
            if path != kept:
                _drop(path)


@contextmanager
def account(name: str, base: Manifest | None, base_digest: str) -> Iterator[Account]:
    """The account of the contributor `name` for a contribution on a base; others of that name wait until it is closed.

    Raises OutputError if it cannot be kept.
    """
    place = prepare(name)
    lock = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fused = _fused(base)
        owed = [path for path in _residuals(place) if path.stem in fused and not _takers(path) & fused]
        yield Account(place, base_digest, fused, owed)
    finally:
        (place / _PARTIAL).unlink(missing_ok=True)
        os.close(lock)


def _fused(base: Manifest | None) -> frozenset[str]:
    """The contributions in a base's ancestry that were fused, by the hexadecimal part of their body digests."""
    generations = [base, *base.get("ancestors", [])] if base else []
    digests = (
        record.get("body_digest") or ""
        for generation in generations
        for record in generation.get("contributions", [])
        if record.get("status") == "fused"
    )
    return frozenset(found[1] for digest in digests if (found := _DIGEST.fullmatch(digest)))


def _residuals(place: Path, base: str = "*") -> Sequence[Path]:
    """The residuals on one base or on all, in an order that is always the same."""
    return sorted(path for path in place.glob(f"{base}/*{_SUFFIX}") if not path.name.startswith("."))


def _takers(path: Path) -> frozenset[str]:
    note = path.with_suffix(_TAKEN)
    return frozenset(note.read_text(encoding="utf-8").split()) if note.is_file() else frozenset()


def _note_taker(path: Path, contribution: str) -> None:
    """Write down, durably, that a residual was taken in by a contribution."""
    note = path.with_suffix(_TAKEN)
    partial = note.with_suffix(".partial")
    partial.write_text("".join(f"{taker}\n" for taker in sorted(_takers(path) | {contribution})), encoding="utf-8")
    partial.chmod(0o600)
    partial.replace(note)
    _sync(note.parent)


def _opened(path: Path, base: Checkpoint) -> Checkpoint:
    source = LocalFolder(path.parent)
    reader = source.open(path.name)
    try:
        tensors = read_header(reader, path.name, str(path))
    finally:
        reader.close()
    for name, tensor in tensors.items():
        known = base.body.get(name)
        if known is None or known.shape != tensor.shape or tensor.dtype != "F32":
            raise CheckpointError(f"{path} has {name}, which the base has not like this: remove the file")
    return Checkpoint(source, path.stem, {}, dict(sorted(tensors.items())), (), "", {path.name: reader.size})


def _drop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(_TAKEN).unlink(missing_ok=True)


def _time(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name


def _cannot_keep(place: Path, error: OSError) -> OutputError:
    remedy = "set COLDCTL_STATE to a directory of your own, or send delta-bf16"
    return OutputError(f"what 8-bit rounding loses cannot be kept in {place}: {error.strerror or error}: {remedy}")


def _hexadecimal(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _make_private(place: Path) -> None:
    """Make a directory and those above it; what is made is for the user alone."""
    for parent in (*reversed(place.parents), place):
        if not parent.exists():
            parent.mkdir(mode=0o700, exist_ok=True)


def _sync(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
