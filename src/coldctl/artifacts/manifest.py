"""`coldctl.json`: what a directory holds, where it came from, and the proof of it.

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
from typing import Annotated, Any, Literal, Required, TypedDict, cast

from msgspec import Meta

from coldctl import __version__
from coldctl.artifacts import layout
from coldctl.common.digests import LONGEST_NAME, digest_of
from coldctl.common.errors import ManifestError
from coldctl.common.parsing import find_mismatch, json_value
from coldctl.common.text import printable
from coldctl.storage.local import Reader
from coldctl.storage.location import Location

SCHEMA = 1
# Bytes; about 10,000 contributions over all iterations (docs/scale.md).
MANIFEST_LIMIT = 16 << 20
_LONGEST_PATH = 1000  # characters
_COPY = 1 << 20  # bytes that are hashed at a time

Scalar = str | int | float | bool | None


class BaseReference(TypedDict):
    """The model that something was made from, by its name and the digest of its body."""

    name: str
    body_digest: str


class DatasetRecord(TypedDict, total=False):
    """A contribution's data: names and counts, never an example."""

    name: str | None
    # Hub id as `ORG/NAME[:CONFIG]`; None for local files.
    source: str | None
    # Digest over all examples of all splits.
    fingerprint: str | None
    num_train: int | None
    num_validation: int | None
    num_test: int | None
    labels: list[str]
    num_labels: int


class ContributionRecord(TypedDict, total=False):
    """One contribution as the fused model's manifest lists it, whether it was fused or rejected."""

    name: Required[str]
    # These are copied from the contribution's own manifest.
    dataset: str | None
    num_train: int | None
    source: str | None
    license: str | None
    training: dict[str, Scalar]
    environment: dict[str, Scalar]
    body_digest: Required[str]
    # Its share of the fused model: 0 to 1, and 0 if it was rejected.
    weight: Required[float]
    status: Required[Literal["fused", "rejected"]]
    # Why it was rejected.
    reason: str | None
    # Whether its files were compared with the digests in its manifest.
    verified: bool | None
    # The iteration whose base it was made on, how many iterations ago that was, and by how much it is shortened for it.
    iteration: int | None
    age: int | None
    discount: float | None
    # The trusted key that signed it: its name, and the sha256 of its DER form.
    signer: str | None
    signer_key: str | None
    # Names by key of all who signed what was fused into it, if it is a fused model itself.
    signers_within: dict[str, str]
    # Statistics of its difference from the base: length, cosine to the mean, share of the squared length by layer group.
    update_norm: float | None
    cosine_to_mean: float | None
    update_share: dict[str, float] | None
    # What screening and conversion said about it.
    notes: list[str]


class FusionRecord(TypedDict, total=False):
    """The settings and versions that a published model was fused with."""

    config: dict[str, Any]
    environment: dict[str, Scalar]


class GenerationRecord(TypedDict, total=False):
    """A model as its descendants list it under `ancestors`: enough to draw the lineage, without files."""

    kind: Required[Literal["pretrained", "contribution", "fused", "published", "evaluation"]]
    name: Required[str]
    iteration: Annotated[int, Meta(ge=0, lt=1_000_000)] | None
    # UTC, to the second.
    created: str
    # Digest of the encoder's tensors, whatever files they are in.
    body_digest: Required[str]
    base: BaseReference
    license: str | None
    # Of a contribution: its data, and its scores by split and metric.
    dataset: DatasetRecord
    metrics: Mapping[str, Mapping[str, float | None]]
    # Versions of libraries, kind of machine and seconds; no user or host name.
    environment: dict[str, Scalar]
    # Of a published model that was fused: `config` and `environment` are those of `publish`.
    fused_by: FusionRecord
    contributions: list[ContributionRecord]
    # The resolved settings of the command that made it.
    config: dict[str, Any]


class Manifest(GenerationRecord, total=False):
    """`coldctl.json` as it is written, and checked when it is read. Readers ignore unknown keys."""

    schema: int
    # How the weights are stored: full, delta-bf16, delta-int8 or lora.
    encoding: str
    coldctl_version: str
    # Digest of settings and inputs: the same command with the same inputs leaves complete work alone.
    identity: str
    # sha256 of every other file, by path below the directory. `write` adds it.
    files: dict[str, str]
    # Digest of what each weights file holds beside the body, such as a head.
    outside_body: dict[str, str]
    # Digest of this document without this key.
    manifest_digest: str
    # From the pretrained model on, oldest first.
    ancestors: list[GenerationRecord]


def digest_of_file(path: Location) -> str:
    """Return `sha256:…` of a file's bytes, read in chunks."""
    with path.open("rb") as opened:
        file: Any = opened
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def environment(packages: Iterable[str], **more: Any) -> dict[str, Any]:
    """Return the versions of Python and of `packages`, the kind of machine, and what the caller adds; no user or host name."""
    versions = {name: metadata.version(name) for name in sorted(packages)}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions, **more}


def now() -> str:
    """Return the time as manifests write it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def digest_of_reader(reader: Reader) -> str:
    """Return `sha256:…` of a file in any store, and close the reader."""
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(min(_COPY, reader.size)))
    for start in range(0, reader.size, _COPY):
        chunk = buffer[: min(_COPY, reader.size - start)]
        reader.read_into(start, chunk)
        hasher.update(chunk)
    reader.close()
    return "sha256:" + hasher.hexdigest()


def write(folder: Location, manifest: Manifest, digests: Mapping[str, str] | None = None) -> Manifest:
    """Complete `manifest` with digests and write it into `folder` as the last file, fsynced.

    `digests` holds those that were computed while the files were written; the others are computed here.
    Returns the manifest as written. Raises ManifestError if it is too large to be read again.
    """
    digests = digests or {}
    paths: Any = folder.rglob("*")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in paths
        if path.is_file()
        and path != folder / layout.MANIFEST
        and not path.name.startswith(".")
        and folder / layout.TRAINING not in path.parents  # kept until this is written
    )
    complete: Manifest = {
        **manifest,
        "schema": SCHEMA,
        "created": now(),
        "coldctl_version": __version__,
        "files": {name: digests.get(name) or digest_of_file(folder / name) for name in names},
    }
    complete.pop("manifest_digest", None)
    complete["manifest_digest"] = digest_of(complete)
    data = (json.dumps(complete, indent=2, ensure_ascii=False) + "\n").encode()
    if len(data) > MANIFEST_LIMIT:
        raise ManifestError(
            f"{folder}: its {layout.MANIFEST} would have {len(data)} bytes, and {MANIFEST_LIMIT} can be read. "
            f"Fuse fewer contributions, or start a new RUN from a copy of the base model without its {layout.MANIFEST}."
        )
    with (folder / layout.MANIFEST).open("wb") as file:
        file.write(data)
        if isinstance(folder, Path):
            file.flush()
            os.fsync(file.fileno())
    return complete


def parse(data: bytes, where: str) -> Manifest:
    """Parse a manifest's bytes and check that they are as they were written.

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
    covered = {key: value for key, value in document.items() if key != "manifest_digest"}
    if document.get("manifest_digest") != digest_of(covered):
        raise ManifestError(f"{where} was changed after it was written (its digest does not match): {remedy}")
    _check_types(document, where)
    return cast(Manifest, document)


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
    """Return the names of the files that are missing from `folder` or differ from the manifest's digests, in order."""
    return [
        name
        for name, digest in sorted(manifest["files"].items())
        if not (folder / name).is_file() or digest_of_file(folder / name) != digest
    ]


def read_unchanged(folder: Location) -> Manifest:
    """Read a manifest and check that every file it names is as it was written. Raises ManifestError."""
    document = read(folder)
    if changed := changed_files(folder, document):
        raise ManifestError(f"{folder}: {changed[0]} was changed after it was written: make this stage again")
    return document


def shortened(manifest: Manifest) -> GenerationRecord:
    """Return a manifest as its descendants carry it under `ancestors`."""
    stated: Mapping[str, Any] = manifest
    return cast(GenerationRecord, {key: stated[key] for key in GenerationRecord.__annotations__ if key in stated})


def _check_types(document: dict[str, Any], where: str) -> None:
    """Refuse a manifest that is not as its types declare it, or whose names are unsafe. Raises ManifestError."""
    remedy = "Fetch or make this directory again"
    if mismatch := find_mismatch(document, Manifest):
        raise ManifestError(f"{where}: {mismatch}. {remedy}.")
    generations = (document, *document.get("ancestors", []))
    records = [record for generation in generations for record in generation.get("contributions", [])]
    # An evaluation's name is that of a model, RUN/iteration-001 where it compares several RUNs. It names no file.
    own = () if document["kind"] == "evaluation" else (document["name"],)
    for name in (*own, *(record["name"] for record in records)):
        if not _is_name(name):
            raise ManifestError(f"{where}: {printable(name)[:40]!r} cannot name a file. {remedy}.")
    if "files" not in document:
        raise ManifestError(f"{where}: it lists no files. {remedy}.")
    if not all(map(_is_file, document["files"])):
        raise ManifestError(f"{where}: 'files' names a path outside the directory: do not use this directory")


def _is_name(name: str) -> bool:
    """Return True if a name may become a file's: no slash or line end, not `.` or `..`, not too long."""
    unsafe = name in ("", ".", "..") or set(name) & set("/\\\0\n\r")
    return not unsafe and len(name.encode()) <= LONGEST_NAME


def _is_file(name: str) -> bool:
    """Return True if a name in `files` stays below the directory."""
    inside = bool(name) and name[0] != "/" and ".." not in name.split("/") and "\0" not in name
    return inside and len(name) <= _LONGEST_PATH and name == PurePosixPath(name).as_posix()
