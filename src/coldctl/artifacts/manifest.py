"""The manifest `coldctl.json`: what a directory holds, where it came from, and the proof that it is complete.

It is written last, so that its existence means "complete". Every file of the directory but itself is named in
it with its sha256, and `manifest_digest` covers the manifest itself, so that one flipped bit anywhere is noticed.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any, Literal, TypedDict

from coldctl import __version__
from coldctl.artifacts import layout
from coldctl.common.digests import LONGEST_NAME, digest_of
from coldctl.common.errors import ManifestError
from coldctl.common.parsing import MAYBE_NUMBER, MAYBE_TEXT, NUMBER, SCALAR, Shape, json_value, misfit
from coldctl.storage.files import Reader
from coldctl.storage.location import Location

SCHEMA = 1
MANIFEST_LIMIT = 16 << 20  # bytes; some twenty thousand contributions over all iterations
_LONGEST_PATH = 1000  # characters
_MOST_ITERATIONS = 1_000_000
_COPY = 1 << 20
_KINDS = ("contribution", "fused", "published", "evaluation")


class BaseReference(TypedDict):
    """Which model something was made from, by name and proof."""

    name: str
    body_digest: str


class DatasetRecord(TypedDict, total=False):
    """What a contribution says about its data: never an example of it."""

    name: str
    source: str
    fingerprint: str
    num_train: int
    num_validation: int
    num_test: int
    labels: list[str]
    num_labels: int


class ContributionRecord(TypedDict, total=False):
    """One contribution as the fused model's manifest lists it."""

    name: str
    dataset: str | None
    num_train: int | None
    source: str | None
    license: str | None
    training: dict[str, Any]
    environment: dict[str, Any]
    body_digest: str
    weight: float
    status: Literal["fused", "rejected"]
    reason: str | None
    verified: bool
    iteration: int | None
    age: int
    discount: float
    signer: str | None
    signer_key: str | None
    signers_within: dict[str, str]
    update_norm: float | None
    cosine_to_mean: float | None
    update_share: dict[str, float] | None
    notes: list[str]


class Manifest(TypedDict, total=False):
    """`coldctl.json` as the design fixes it. Readers ignore unknown keys."""

    schema: int
    kind: Literal["contribution", "fused", "published", "evaluation"]
    name: str
    iteration: int | None
    encoding: str
    created: str
    coldctl_version: str
    identity: str
    body_digest: str
    base: BaseReference
    files: dict[str, str]
    outside_body: dict[str, str]
    manifest_digest: str
    config: dict[str, Any]
    environment: dict[str, Any]
    license: str | None
    dataset: DatasetRecord
    metrics: dict[str, dict[str, float]]
    contributions: list[ContributionRecord]
    ancestors: list[dict[str, Any]]
    card_blocks: list[str]
    fused_by: dict[str, Any]


def digest_of_file(path: Location) -> str:
    """`sha256:…` of a file's bytes, read in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb") as opened:
        file: Any = opened
        buffer = memoryview(bytearray(_COPY))
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return "sha256:" + hasher.hexdigest()


def environment(packages: Iterable[str], **more: Any) -> dict[str, Any]:
    """Versions of Python and of `packages`, the kind of machine, and what the caller adds; no user or host name."""
    versions = {name: metadata.version(name) for name in sorted(packages)}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions, **more}


def now() -> str:
    """The time as manifests write it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def digest_of_reader(reader: Reader) -> str:
    """`sha256:…` of a file in any store; the reader is closed."""
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(min(_COPY, reader.size)))
    for start in range(0, reader.size, _COPY):
        part = buffer[: min(_COPY, reader.size - start)]
        reader.read_into(start, part)
        hasher.update(part)
    reader.close()
    return "sha256:" + hasher.hexdigest()


def write(folder: Location, manifest: Manifest, known: Mapping[str, str] | None = None) -> Manifest:
    """Complete `manifest` with digests and write it into `folder` as the last file, fsynced.

    `known` gives digests that were computed while the files were written; the others are computed here.
    Returns the manifest as written.
    """
    known = known or {}
    found: Any = folder.rglob("*")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in found
        if path.is_file()
        and path != folder / layout.MANIFEST
        and not path.name.startswith(".")
        and folder / layout.TRAINING not in path.parents  # kept until this is written
    )
    whole: Manifest = {
        **manifest,
        "schema": SCHEMA,
        "created": now(),
        "coldctl_version": __version__,
        "files": {name: known.get(name) or digest_of_file(folder / name) for name in names},
    }
    whole.pop("manifest_digest", None)
    whole["manifest_digest"] = digest_of(whole)
    text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    with (folder / layout.MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        if isinstance(folder, Path):
            file.flush()
            os.fsync(file.fileno())
    return whole


def parse(data: bytes, where: str) -> Manifest:
    """Read a manifest's bytes and prove that they are as they were written.

    Raises ManifestError if they are no manifest, of a newer schema, or were changed.
    """
    remedy = "make this stage again or fetch it again"
    try:
        document = json_value(data, MANIFEST_LIMIT)
    except ValueError as error:
        raise ManifestError(f"{where} is not readable JSON ({error}): {remedy}") from None
    if not isinstance(document, dict) or type(document.get("schema")) is not int:
        raise ManifestError(f"{where} is not a coldctl manifest: {remedy}")
    if document["schema"] > SCHEMA:
        raise ManifestError(
            f"{where} has schema {document['schema']}, newer than this program's {SCHEMA}: update coldctl"
        )
    stated = document.get("manifest_digest")
    actual = digest_of({key: value for key, value in document.items() if key != "manifest_digest"})
    if stated != actual:
        raise ManifestError(f"{where} was changed after it was written (its digest does not match): {remedy}")
    _check_types(document, where)
    manifest: Manifest = document  # type: ignore[assignment]
    return manifest


def read(folder: Location) -> Manifest:
    """Read and verify `folder/coldctl.json`. Raises ManifestError."""
    path = folder / layout.MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST_LIMIT + 1)
    except FileNotFoundError:
        raise ManifestError(f"{folder} has no {layout.MANIFEST}: it is not complete or not made by coldctl") from None
    return parse(data, str(path))


def changed_files(folder: Location, manifest: Manifest) -> list[str]:
    """Names of the files that are missing from `folder` or differ from the manifest's digests, in order."""
    return [
        name
        for name, digest in sorted(manifest["files"].items())
        if not (folder / name).is_file() or digest_of_file(folder / name) != digest
    ]


def read_unchanged(folder: Location) -> Manifest:
    """Read a manifest and prove that every file it names is as it was written. Raises ManifestError."""
    document = read(folder)
    if changed := changed_files(folder, document):
        raise ManifestError(f"{folder}: {changed[0]} was changed after it was written: make this stage again")
    return document


def shortened(manifest: Manifest) -> dict[str, Any]:
    """A manifest as its descendants carry it under `ancestors`: enough to draw the lineage, without files."""
    kept = (
        "kind",
        "name",
        "iteration",
        "created",
        "body_digest",
        "base",
        "license",
        "dataset",
        "metrics",
        "environment",
        "fused_by",
    )
    short: dict[str, Any] = {key: manifest[key] for key in kept if key in manifest}  # type: ignore[literal-required]
    if "contributions" in manifest:
        short["contributions"] = manifest["contributions"]
    if "config" in manifest:
        short["config"] = manifest["config"]
    return short


def is_name(name: object) -> bool:
    """Whether a name may become a file's: no slashes, no line ends, not the directory itself or its parent, not too long."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0\n\r"):
        return False
    return len(name.encode(errors="replace")) <= LONGEST_NAME


def _is_file(name: object) -> bool:
    """Whether a name in `files` stays below the directory."""
    return isinstance(name, str) and name == "/".join(PurePosixPath(name).parts) and _is_inside(name)


def _is_inside(name: str) -> bool:
    return (
        bool(name)
        and name[0] != "/"
        and ".." not in name.split("/")
        and "\0" not in name
        and len(name) <= _LONGEST_PATH
    )


def _is_iteration(value: object) -> bool:
    return value is None or (type(value) is int and 0 <= value < _MOST_ITERATIONS)


_RECORD: Shape = {
    "name!": is_name, "dataset": MAYBE_TEXT, "num_train": (int, NoneType), "source": MAYBE_TEXT, "license": MAYBE_TEXT,
    "training": {...: SCALAR}, "environment": {...: SCALAR}, "body_digest!": str, "weight!": NUMBER,
    "status!": str, "reason": MAYBE_TEXT, "verified": (bool, NoneType), "age": (int, NoneType),
    "discount": MAYBE_NUMBER, "iteration": (int, NoneType),
    "signer": MAYBE_TEXT, "signer_key": MAYBE_TEXT, "signers_within": {...: str}, "update_norm": MAYBE_NUMBER,
    "cosine_to_mean": MAYBE_NUMBER, "notes": [str],
}  # fmt: skip
_COUNTS = ("num_train", "num_validation", "num_test")
# What a manifest and its ancestors have in common, as far as somebody relies on it.
_GENERATION: Shape = {
    "kind": str, "name": str, "iteration": _is_iteration, "created": str, "body_digest": str,
    "base": {"name": str, "body_digest": str}, "license": MAYBE_TEXT, "config": dict, "environment": {...: SCALAR},
    "dataset": {
        "name": MAYBE_TEXT, "source": MAYBE_TEXT, "fingerprint": MAYBE_TEXT, "labels": [str],
        **dict.fromkeys(_COUNTS, (int, NoneType)),
    },
    "metrics": {...: {...: MAYBE_NUMBER}}, "contributions": [_RECORD],
    "fused_by": {"config": dict, "environment": {...: SCALAR}},
}  # fmt: skip
_MANIFEST: Shape = {
    **_GENERATION, "kind!": lambda kind: kind in _KINDS, "name!": is_name, "body_digest!": str, "encoding": str,
    "files!": {...: str}, "outside_body": {...: str}, "identity": str, "card_blocks": [str], "ancestors": [_GENERATION],
}  # fmt: skip


def _check_types(document: dict[str, Any], where: str) -> None:
    """Refuse a manifest whose fields that we rely on have other types than the contract says. Raises ManifestError."""
    remedy = "fetch or make this directory again"
    if place := misfit(document, _MANIFEST):
        raise ManifestError(f"{where}: {place!r} is missing or not what it should be: {remedy}")
    if not all(map(_is_file, document["files"])):
        raise ManifestError(f"{where}: 'files' names a path outside the directory: do not use this directory")
