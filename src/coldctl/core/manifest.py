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
from pathlib import Path
from typing import Any, Literal, TypedDict

from coldctl import __version__
from coldctl.core import layout
from coldctl.core.errors import ManifestError
from coldctl.core.storage import Reader

SCHEMA = 1
MANIFEST_LIMIT = 64 << 20  # bytes; ancestors grow with iterations and contributors, but not to this
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
    age: int
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


def canonical(document: Mapping[str, Any]) -> bytes:
    """The bytes that digests of JSON documents are taken over: sorted keys, no spaces, UTF-8.

    >>> canonical({"b": 1, "a": "é"}).decode()
    '{"a":"é","b":1}'
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(document: Mapping[str, Any]) -> str:
    """`sha256:…` of a JSON document's canonical bytes."""
    return "sha256:" + hashlib.sha256(canonical(document)).hexdigest()


def digest_of_file(path: Path) -> str:
    """`sha256:…` of a file's bytes, read in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
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


def write(folder: Path, manifest: Manifest, known: Mapping[str, str] | None = None) -> Manifest:
    """Complete `manifest` with digests and write it into `folder` as the last file, fsynced.

    `known` gives digests that were computed while the files were written; the others are computed here.
    Returns the manifest as written.
    """
    known = known or {}
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / layout.MANIFEST and not path.name.startswith(".")
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
        file.flush()
        os.fsync(file.fileno())
    return whole


def parse(data: bytes, where: str) -> Manifest:
    """Read a manifest's bytes and prove that they are as they were written.

    Raises ManifestError if they are no manifest, of a newer schema, or were changed.
    """
    remedy = "make this stage again or fetch it again"
    if len(data) > MANIFEST_LIMIT:
        raise ManifestError(f"{where} is larger than {MANIFEST_LIMIT >> 20} MiB: {remedy}")
    try:
        document = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ManifestError(f"{where} is not readable JSON ({error}): {remedy}") from None
    if not isinstance(document, dict) or not isinstance(document.get("schema"), int):
        raise ManifestError(f"{where} is not a coldctl manifest: {remedy}")
    if document["schema"] > SCHEMA:
        raise ManifestError(
            f"{where} has schema {document['schema']}, newer than this program's {SCHEMA}: update coldctl"
        )
    stated = document.get("manifest_digest")
    try:
        actual = digest_of({key: value for key, value in document.items() if key != "manifest_digest"})
    except (UnicodeEncodeError, RecursionError) as error:
        raise ManifestError(f"{where} is not readable JSON ({error}): {remedy}") from None
    if stated != actual:
        raise ManifestError(f"{where} was changed after it was written (its digest does not match): {remedy}")
    _check_types(document, where)
    manifest: Manifest = document  # type: ignore[assignment]
    return manifest


def read(folder: Path) -> Manifest:
    """Read and verify `folder/coldctl.json`. Raises ManifestError."""
    path = folder / layout.MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ManifestError(f"{folder} has no {layout.MANIFEST}: it is not complete or not made by coldctl") from None
    return parse(data, str(path))


def changed_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of the files that are missing from `folder` or differ from the manifest's digests, in order."""
    return [
        name
        for name, digest in sorted(manifest["files"].items())
        if not (folder / name).is_file() or digest_of_file(folder / name) != digest
    ]


def read_unchanged(folder: Path) -> Manifest:
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
    )
    short: dict[str, Any] = {key: manifest[key] for key in kept if key in manifest}  # type: ignore[literal-required]
    if "contributions" in manifest:
        short["contributions"] = manifest["contributions"]
    if "config" in manifest:
        short["config"] = manifest["config"]
    return short


def _check_types(document: dict[str, Any], where: str) -> None:
    """Refuse a manifest whose fields that we rely on have other types than the contract says."""
    expected: dict[str, type | tuple[type, ...]] = {
        "kind": str,
        "name": str,
        "encoding": str,
        "body_digest": str,
        "base": dict,
        "files": dict,
        "config": dict,
        "dataset": dict,
        "metrics": dict,
        "contributions": list,
        "outside_body": dict,
        "ancestors": list,
        "card_blocks": list,
        "iteration": (int, type(None)),
        "license": (str, type(None)),
    }
    required = ("kind", "name", "body_digest", "files")
    for key, types in expected.items():
        if key in document and not isinstance(document[key], types):
            raise ManifestError(f"{where}: {key!r} has the wrong type: fetch or make this directory again")
        if key in required and key not in document:
            raise ManifestError(f"{where}: {key!r} is missing: fetch or make this directory again")
    if document["kind"] not in _KINDS or not _is_name(document["name"]):
        raise ManifestError(f"{where}: its kind or name is not usable: fetch or make this directory again")
    generations = [*document.get("ancestors", []), document]
    if not all(isinstance(item, dict) for item in generations):
        raise ManifestError(
            f"{where}: 'ancestors' holds something else than manifests: fetch or make this directory again"
        )
    for item in generations:
        records = item.get("contributions", [])
        if not isinstance(records, list) or not all(_is_record(record) for record in records):
            raise ManifestError(
                f"{where}: 'contributions' is not what it should be: fetch or make this directory again"
            )
    names = document["files"]
    if any(
        name.startswith("/") or ".." in Path(name).parts or not isinstance(value, str) for name, value in names.items()
    ):
        raise ManifestError(f"{where}: 'files' names a path outside the directory: do not use this directory")


def _is_name(name: object) -> bool:
    """A name may become a file's: no slashes, no control characters, not the directory itself or its parent."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0\n\r")


def _is_record(record: object) -> bool:
    """One entry of `contributions`, as far as we rely on it."""
    if not isinstance(record, dict) or not _is_name(record.get("name")):
        return False
    texts = (record.get(key) for key in ("dataset", "license", "body_digest", "status", "reason"))
    weight = record.get("weight", 0.0)
    return all(text is None or isinstance(text, str) for text in texts) and type(weight) in (int, float)
