"""Who signed a directory, and what of it is not as it was signed: OpenSSF model signatures, read without any network.

`model.sig` is a DSSE envelope in a Sigstore bundle: a statement that names every file with its sha256, and an elliptic-curve
signature over it. It is a stranger's file, so it is bounded, and nothing in it is looked at before the signature is found
good, but for the envelope itself. Files are read through `Folder`, so a contribution in a store is verified where it is.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from coldctl.artifacts import layout
from coldctl.artifacts.manifest import Manifest, digest_of_reader, parse
from coldctl.artifacts.output import IDENTITY
from coldctl.common.errors import CheckpointError, ColdctlError, ConfigError, ManifestError, ModelError
from coldctl.common.parsing import json_value
from coldctl.config.loading import check_name
from coldctl.storage.files import Folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

SIGNATURE_LIMIT = 4 << 20  # bytes of a signature file: a few hundred per file that it covers
KEY_LIMIT = 64 << 10  # bytes of a key's file
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}  # and the digest that goes with each
REMEDY = "install it with `pip install coldctl[sign]`"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_LISTED = 5  # files that the verdict on one directory names
# What git, the Hub's downloads and unfinished outputs keep beside a model's files; nothing of it is ever read.
_BESIDE = (".git/", ".github/", ".cache/huggingface/")


@dataclass(frozen=True)
class TrustedKey:
    """A public key, under the name that its owner is known by here. `fingerprint` is the sha256 of its DER form."""

    name: str
    fingerprint: str
    hint: str  # how a signature's file says which key it is by: the sha256 of its PEM form
    public: "EllipticCurvePublicKey" = field(repr=False, compare=False)


@dataclass(frozen=True)
class Signed:
    """A signature that was found good: whose it is, and the sha256 of each file that it covers."""

    key: TrustedKey
    files: Mapping[str, str]


def trusted_keys(folder: Path) -> list[TrustedKey]:
    """The public keys `NAME.pem` of a directory, by name. Raises ConfigError if there are none, or one cannot be used."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".pem" and not path.name.startswith("."))
        odd = [path.name for path in paths if not path.is_file()]
    except OSError as error:
        raise ConfigError(f"--trusted-keys {folder} cannot be read: {error.strerror}") from None
    if not paths:
        raise ConfigError(f"--trusted-keys {folder} holds no key: put each contributor's public key there as NAME.pem")
    if odd:  # a pipe would be waited for
        raise ConfigError(f"--trusted-keys {folder}: {odd[0]} is no file: remove it")
    keys = [public_key(path, "--trusted-keys") for path in paths]
    known: dict[str, str] = {}
    for key in keys:
        if key.fingerprint in known:
            raise ConfigError(
                f"--trusted-keys {folder}: {known[key.fingerprint]}.pem and {key.name}.pem are the same key: remove one"
            )
        known[key.fingerprint] = key.name
    return keys


def public_key(path: Path, flag: str) -> TrustedKey:
    """The public key in a PEM file, called as the file is. Raises ConfigError, naming `flag`."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise ModelError(f"signatures need the cryptography library: {REMEDY}") from None
    check_name(path.stem, f"{flag} {path}")
    try:
        with path.open("rb") as file:
            data = file.read(KEY_LIMIT + 1)
        if len(data) > KEY_LIMIT:
            raise ValueError("it is too large for a key")
        if b"PRIVATE KEY" in data:
            raise ValueError("it is a private key, its owner's alone; `openssl ec -pubout` gives the public one")
        if data.count(b"-----BEGIN ") > 1:  # the second one would not be read
            raise ValueError("it holds more than one key")
        public = serialization.load_pem_public_key(data)
        if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name not in CURVES:
            raise ValueError("it is another kind of key")
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        wanted = "give a PEM file with an elliptic-curve public key (P-256, P-384 or P-521)"
        raise ConfigError(f"{flag} {path} cannot be used ({reason}): {wanted}") from None
    return named(path.stem, public)


def named(name: str, public: "EllipticCurvePublicKey") -> TrustedKey:
    """A public key under a name."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der, pem = (public.public_bytes(form, PublicFormat.SubjectPublicKeyInfo) for form in (Encoding.DER, Encoding.PEM))
    return TrustedKey(name, "sha256:" + hashlib.sha256(der).hexdigest(), hashlib.sha256(pem).hexdigest(), public)


def read(folder: Folder, keys: Sequence[TrustedKey]) -> Signed:
    """The signature of a directory, if one of `keys` made it. Raises CheckpointError with the reason if none did."""
    if not folder.has(layout.SIGNATURE):
        raise CheckpointError(f"it is not signed: there is no {layout.SIGNATURE}")
    payload, signature, hint = _envelope(folder.read(layout.SIGNATURE, SIGNATURE_LIMIT))
    candidates = [key for key in keys if hint is None or key.hint == hint]
    if not candidates:
        raise CheckpointError(f"it is signed by an unknown key: trusted are {_some([key.name for key in keys])}")
    for key in candidates:
        if _verifies(key, payload, signature):
            return Signed(key, _statement(payload))
    raise CheckpointError(f"its signature was changed, or is not by {_some([key.name for key in candidates])}")


def differences(folder: Folder, signed: Signed, *, manifest_proves: bool) -> list[str]:
    """What of a directory is not as it was signed, in sentences: files that differ, are missing, or were added.

    Every file is read and hashed, unless `manifest_proves`: then the caller is going to prove each file of the model that a
    signed `coldctl.json` names against that manifest, and only the others are read here.
    """
    found = sorted(name for name in folder.walk() if not _beside(name))
    problems = [f"{name} was not there when it was signed" for name in found if name not in signed.files]
    problems += [f"{name} is missing" for name in sorted(set(signed.files) - set(found))]
    present = [name for name in found if name in signed.files]
    stated = _stated_by_manifest(folder, signed) if manifest_proves else {}
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda name: stated.get(name) or _digest(folder, name), present))
    problems += [
        f"{name} is not as it was signed"
        for name, digest in zip(present, digests, strict=True)
        if digest != signed.files[name]
    ]
    more = [f"and {len(problems) - _LISTED} more files are not as they were signed"] if len(problems) > _LISTED else []
    return [*problems[:_LISTED], *more]


def _stated_by_manifest(folder: Folder, signed: Signed) -> dict[str, str]:
    """The digests in a manifest that is itself as it was signed, of the model's own files; none without one."""
    if layout.MANIFEST not in signed.files or not folder.has(layout.MANIFEST):
        return {}
    data = folder.read(layout.MANIFEST)
    if "sha256:" + hashlib.sha256(data).hexdigest() != signed.files[layout.MANIFEST]:
        return {}
    try:
        document: Manifest = parse(data, f"{folder.label}/{layout.MANIFEST}")
    except ManifestError:  # signed, but no manifest that anything can be proven by
        return {}
    return {name: str(digest) for name, digest in document["files"].items() if name != layout.CARD}


def _digest(folder: Folder, name: str) -> str:
    try:
        return digest_of_reader(folder.open(name))
    except ColdctlError:  # a link to elsewhere, or a file that cannot be read: not what was signed
        return ""


def _beside(name: str) -> bool:
    return name in (layout.SIGNATURE, IDENTITY, *layout.KEPT_BY_GIT) or name.startswith(_BESIDE)


def _envelope(data: bytes) -> tuple[bytes, bytes, str | None]:
    """The payload, the signature and the key's hint of a Sigstore bundle. Raises CheckpointError."""
    try:
        bundle = json_value(data, SIGNATURE_LIMIT)
        envelope = bundle["dsseEnvelope"]
        if envelope["payloadType"] != _PAYLOAD_TYPE:
            raise ValueError("another type of payload")
        hint = bundle["verificationMaterial"]["publicKey"].get("hint")
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise CheckpointError(f"{layout.SIGNATURE} is no model signature made with a key: sign it again") from None
    return payload, signature, hint if isinstance(hint, str) else None


def _verifies(key: TrustedKey, payload: bytes, signature: bytes) -> bool:
    """Whether `signature` is the key's over the payload in DSSE's encoding."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    message = b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)
    algorithm: hashes.HashAlgorithm = getattr(hashes, CURVES[key.public.curve.name])()
    try:
        key.public.verify(signature, message, ec.ECDSA(algorithm))
    except InvalidSignature:
        return False
    return True


def _statement(payload: bytes) -> dict[str, str]:
    """The files and digests that a good signature is over. Raises CheckpointError if they are stated in another way."""
    try:
        statement = json_value(payload, SIGNATURE_LIMIT)
        predicate = statement["predicate"]
        how = predicate["serialization"]
        kinds = (statement["_type"], statement["predicateType"], how["method"])
        if kinds != (_STATEMENT, _PREDICATE, "files"):
            raise ValueError("another kind of statement")
        files: dict[str, str] = {}
        for resource in predicate["resources"]:
            if resource["algorithm"] != "sha256" or not isinstance(resource["name"], str):
                raise ValueError("another kind of digest")
            files[resource["name"]] = f"sha256:{resource['digest']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{layout.SIGNATURE} states its files in a way that is not read here: sign it again, file by file, with sha256"
        ) from None
    return files


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
