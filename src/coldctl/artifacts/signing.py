"""OpenSSF model signing with a key of one's own, offline: every file of a directory under one signature."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldctl.artifacts import layout, manifest, output, signatures
from coldctl.common.errors import CheckpointError, ConfigError, ModelError
from coldctl.storage.files import LocalFolder

_REMEDY = (
    "give a PEM file with an elliptic-curve private key without a password, "
    "such as `openssl ecparam -genkey -name prime256v1 -noout` makes"
)


def sign(folder: Path, key: Path) -> None:
    """Write `model.sig` into `folder`, over all its other files, by the elliptic-curve private key in the PEM file `key`.

    Raises ConfigError if the key cannot be used.
    """
    signing, hashing = _library("signing"), _library("hashing")
    ignored = [
        layout.SIGNATURE,
        ".cache/huggingface",
        output.IDENTITY,
    ]  # and git's, which the library leaves out itself
    named = _Named("model", hashing.Config().set_ignored_paths(paths=ignored))
    config = signing.Config().set_hashing_config(named)
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        made = Path(scratch) / layout.SIGNATURE
        try:
            config.use_elliptic_key_signer(private_key=key).sign(folder.resolve(), made)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"--sign-key {key} cannot be used ({_first_line(error)}): {_REMEDY}") from None
        output.write_text(folder / layout.SIGNATURE, made.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class _Named:
    """The library's hashing, but what is signed is called `name`: the directory's own name is its owner's alone."""

    name: str
    config: Any

    def hash(self, model_path: Path) -> Any:
        """The library's manifest of a directory."""
        manifests = _library("manifest")
        found = self.config.hash(model_path)
        items = [
            manifests.FileManifestItem(path=Path(item.identifier), digest=item.digest)
            for item in found.resource_descriptors()
        ]
        kind = manifests.SerializationType.from_args(found.serialization_type)
        return manifests.Manifest(self.name, items, kind)


def sign_complete(folder: Path, key: Path) -> bool:
    """Sign a complete directory whose files are as its manifest says; whether that was still to be done.

    A good signature by the same key is left alone. Raises ManifestError for files that were changed.
    """
    manifest.read_unchanged(folder)
    place, own = LocalFolder(folder), check_key(key)
    try:
        if not signatures.differences(place, signatures.read(place, [own]), manifest_proves=True):
            return False
    except CheckpointError:  # not signed, or by another key
        pass
    sign(folder, key)
    return True


def check_key(key: Path) -> signatures.TrustedKey:
    """The public part of a private key that can sign; others are refused before any work is done. Raises ConfigError."""
    _library("signing")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key.read_bytes(), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name not in signatures.CURVES:
            raise ValueError("it is another kind of key")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--sign-key {key} cannot be used ({_first_line(error)}): {_REMEDY}") from None
    return signatures.named(key.stem, private.public_key())


def _library(part: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{part}")
    except ImportError:
        raise ModelError(f"signatures need the model-signing library: {signatures.REMEDY}") from None


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
