"""Verify model signatures (OpenSSF), without any network.

A signature covers every file of a directory. The library verifies it; this module picks the key, bounds what a stranger's
`model.sig` can cost, and lets no signer leave files out. A contribution in a store is verified as a local copy in the cache.
"""

import base64
import hashlib
import importlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldctl.artifacts import layout, manifest, output
from coldctl.common.errors import CheckpointError, ConfigError, ModelError, OutputError
from coldctl.common.parsing import json_value
from coldctl.config.loading import check_name
from coldctl.storage import user_cache
from coldctl.storage.local import Folder, LocalFolder
from coldctl.storage.location import Location
from coldctl.storage.remote import RemoteFolder, open_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

SIGNATURE_LIMIT = 4 << 20  # bytes: a few hundred per file that it covers
KEY_LIMIT = 64 << 10  # bytes of a key's file
CURVES = ("secp256r1", "secp384r1", "secp521r1")
# What the Hub's downloads and unfinished outputs keep beside a model's files. The library itself ignores git's files.
_IGNORED = (layout.SIGNATURE, ".cache/huggingface", layout.IDENTITY)
_INSTALL = "install it with `pip install coldctl[sign]`"
_PRIVATE_KEY = (
    "give a PEM file with an elliptic-curve private key without a password, "
    "such as `openssl ecparam -genkey -name prime256v1 -noout` makes"
)
_LISTED = 5  # names in one message


@dataclass(frozen=True)
class TrustedKey:
    """A public key with the name of its owner. `fingerprint` is the sha256 of its DER form."""

    name: str
    fingerprint: str
    pem: bytes

    @property
    def hint(self) -> str:
        """Return how a signature file identifies the key: by the sha256 of its PEM form."""
        return hashlib.sha256(self.pem).hexdigest()


@dataclass(frozen=True)
class Signed:
    """A directory whose signature was verified: by which key, where the files lie, and the sha256 of each."""

    key: TrustedKey
    folder: LocalFolder
    files: Mapping[str, str]

    def check_covers(self, names: Iterable[str]) -> None:
        """Raise CheckpointError for a file that the signature does not cover, such as one in git's folder."""
        if uncovered := sorted(set(names) - set(self.files)):
            raise CheckpointError(f"{uncovered[0]} is not covered by the signature of {self.key.name}")


class AllFiles:
    """The library's hashing of all files of a directory by sha256. Keeps the digests in `files`."""

    def __init__(self, name: str | None = None) -> None:
        """`name` replaces the directory's own name, which only its owner should know."""
        config = library("hashing").Config().set_ignored_paths(paths=_IGNORED)
        self._config = config if name is not None else config.set_allow_symlinks(True)
        self._name = name
        self.files: dict[str, str] = {}

    def add_ignored_paths(self, **_: Any) -> None:
        """Ignore nothing else: the files that a signer left out are not signed."""

    def hash(self, model_path: Path, **_: Any) -> Any:
        """Return the library's manifest of a directory."""
        manifests = library("manifest")
        hashed = self._config.hash(model_path)
        resources = list(hashed.resource_descriptors())
        self.files = {resource.identifier: f"sha256:{resource.digest.digest_hex}" for resource in resources}
        if self._name is None:
            return hashed
        files = [manifests.FileManifestItem(path=Path(file.identifier), digest=file.digest) for file in resources]
        return manifests.Manifest(self._name, files, manifests.SerializationType.from_args(hashed.serialization_type))


def trusted_keys(folder: Path) -> list[TrustedKey]:
    """Read the public keys `NAME.pem` of a directory, by name. Raises ConfigError if there are none, or one cannot be used."""
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
    """Read the public key in a PEM file, named after the file. Raises ConfigError, naming `flag`."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise ModelError(f"signatures need the cryptography library: {_INSTALL}") from None
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
        remedy = "give a PEM file with an elliptic-curve public key (P-256, P-384 or P-521)"
        raise ConfigError(f"{flag} {path} cannot be used ({reason}): {remedy}") from None
    return named(path.stem, public)


def check_private_key(path: Path) -> TrustedKey:
    """Return the public part of a private key that can sign. Raises ConfigError for any other file."""
    library("signing")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(path.read_bytes(), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name not in CURVES:
            raise ValueError("it is another kind of key")
    except (OSError, ValueError, TypeError) as error:
        raise _unusable_private_key(path, error) from None
    return named(path.stem, private.public_key())


def named(name: str, public: "EllipticCurvePublicKey") -> TrustedKey:
    """Return a public key as that of its owner `name`."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der, pem = (public.public_bytes(form, PublicFormat.SubjectPublicKeyInfo) for form in (Encoding.DER, Encoding.PEM))
    return TrustedKey(name, "sha256:" + hashlib.sha256(der).hexdigest(), pem)


def sign(folder: Path, key: Path) -> None:
    """Write `model.sig` into `folder`: a signature of all its other files by the private key in the PEM file `key`.

    Raises ConfigError if the key cannot be used.
    """
    config = library("signing").Config().set_hashing_config(AllFiles(name="model"))
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        signature = Path(scratch) / layout.SIGNATURE
        try:
            config.use_elliptic_key_signer(private_key=key).sign(folder.resolve(), signature)
        except (OSError, ValueError, TypeError) as error:
            raise _unusable_private_key(key, error) from None
        output.write_text(folder / layout.SIGNATURE, signature.read_text(encoding="utf-8"))


def sign_complete(folder: Location, key: Path) -> bool:
    """Sign a complete directory, unless a good signature by `key` is there. Return True if it was signed now.

    Raises ManifestError if its files are not as its manifest states, OutputError for an unsigned directory in a store.
    """
    manifest.read_unchanged(folder)
    try:
        verify(open_folder(folder), [check_private_key(key)])
    except CheckpointError:  # not signed, by another key, or files came later
        if not isinstance(folder, Path):
            raise OutputError(
                f"{folder} is complete and not signed with {key}: give --overwrite to make and sign it again"
            ) from None
        sign(folder, key)
        return True
    return False


def _unusable_private_key(path: Path, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(f"--sign-key {path} cannot be used ({reason}): {_PRIVATE_KEY}")


def verify(folder: Folder, keys: Sequence[TrustedKey]) -> Signed:
    """Verify that one of `keys` signed a directory and that all its files are as they were signed.

    A directory in a store is downloaded into the user's cache if it names one of the keys. Raises CheckpointError.
    """
    if isinstance(folder, LocalFolder):
        return _verify(folder, keys)
    _signer(_signature(folder), keys)  # others' files are not downloaded
    assert isinstance(folder, RemoteFolder)
    copy = user_cache.local_copy(folder, None, is_sound=lambda _: True)
    try:
        return _verify(LocalFolder(copy), keys)
    except CheckpointError:
        shutil.rmtree(copy, ignore_errors=True)  # it may be the copy that was damaged
        raise


def _verify(folder: LocalFolder, keys: Sequence[TrustedKey]) -> Signed:
    signature = _signature(folder)
    key = _signer(signature, keys)
    for name in folder.walk():
        folder.open(name).close()  # refuses links to outside and what is no plain file
    hashing = AllFiles()
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        public, bundle = Path(scratch) / "key.pem", Path(scratch) / layout.SIGNATURE
        public.write_bytes(key.pem)
        bundle.write_bytes(signature)
        verifier = library("verifying").Config().use_elliptic_key_verifier(public_key=public)
        try:
            verifier.set_hashing_config(hashing).verify(folder.path, bundle)
        except Exception as error:  # the library lets its parsers' errors pass
            reason = f"its signature was changed, or is not by {key.name}"
            if hashing.files:  # these are hashed once the signature itself is verified
                reason = _signature_mismatches(signature, hashing.files) or " ".join(str(error).split())
            raise CheckpointError(reason) from None
    return Signed(key, folder, hashing.files)


def _signature_mismatches(signature: bytes, files: Mapping[str, str]) -> str:
    """Return in words which files differ from those that a verified signature covers."""
    try:
        envelope = json_value(signature, SIGNATURE_LIMIT)["dsseEnvelope"]
        predicate = json_value(base64.b64decode(envelope["payload"]), SIGNATURE_LIMIT)["predicate"]
        if (predicate["serialization"]["method"], predicate["serialization"]["hash_type"]) != ("files", "sha256"):
            raise ValueError("shards, or another digest")
        signed = {resource["name"]: f"sha256:{resource['digest']}" for resource in predicate["resources"]}
    except (ValueError, KeyError, TypeError):
        remedy = "sign it again, file by file, with sha256"
        return f"{layout.SIGNATURE} states its files in a way that is not read here: {remedy}"
    problems = [f"{name} was not there when it was signed" for name in sorted(set(files) - set(signed))]
    problems += [f"{name} is missing" for name in sorted(set(signed) - set(files))]
    problems += [
        f"{name} is not as it was signed" for name in sorted(files) if signed.get(name, files[name]) != files[name]
    ]
    return ", ".join(problems[:_LISTED]) + (f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else "")


def _signature(folder: Folder) -> bytes:
    if not folder.has(layout.SIGNATURE):
        raise CheckpointError(f"it is not signed: there is no {layout.SIGNATURE}")
    return folder.read(layout.SIGNATURE, SIGNATURE_LIMIT)


def _signer(signature: bytes, keys: Sequence[TrustedKey]) -> TrustedKey:
    """Return the key that a signature file names. Raises CheckpointError if it is none of `keys`."""
    try:
        hint = json_value(signature, SIGNATURE_LIMIT)["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise CheckpointError(f"{layout.SIGNATURE} is no model signature made with a key: sign it again") from None
    for key in keys:
        if key.hint == hint:
            return key
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    names = ", ".join(key.name for key in keys[:_LISTED])
    raise CheckpointError(f"it is signed by an unknown key: trusted are {names}{more}")


def library(module: str) -> Any:
    """Import a module of `model_signing`. Raises ModelError if it is not installed."""
    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError:
        raise ModelError(f"signatures need the model-signing library: {_INSTALL}") from None
