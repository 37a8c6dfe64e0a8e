"""Sign a directory with a key of one's own (OpenSSF)."""

import tempfile
from pathlib import Path

from coldctl.artifacts import layout, manifest, output, signatures
from coldctl.common.errors import CheckpointError, ConfigError
from coldctl.storage.files import LocalFolder

_REMEDY = (
    "give a PEM file with an elliptic-curve private key without a password, "
    "such as `openssl ecparam -genkey -name prime256v1 -noout` makes"
)


def sign(folder: Path, key: Path) -> None:
    """Write `model.sig` into `folder`, over all its other files, by the elliptic-curve private key in the PEM file `key`.

    Raises ConfigError if the key cannot be used.
    """
    config = signatures.library("signing").Config().set_hashing_config(signatures.AllFiles(name="model"))
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        signature = Path(scratch) / layout.SIGNATURE
        try:
            config.use_elliptic_key_signer(private_key=key).sign(folder.resolve(), signature)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"--sign-key {key} cannot be used ({_first_line(error)}): {_REMEDY}") from None
        output.write_text(folder / layout.SIGNATURE, signature.read_text(encoding="utf-8"))


def sign_complete(folder: Path, key: Path) -> bool:
    """Sign a complete directory whose files are as its manifest says; whether that was still to be done.

    A good signature by the same key is left alone. Raises ManifestError for files that were changed.
    """
    manifest.read_unchanged(folder)
    try:
        signatures.verify(LocalFolder(folder), [check_key(key)])
    except CheckpointError:  # not signed, by another key, or files came later
        sign(folder, key)
        return True
    return False


def check_key(key: Path) -> signatures.TrustedKey:
    """The public part of a private key that can sign; others are refused before any work is done. Raises ConfigError."""
    signatures.library("signing")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key.read_bytes(), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name not in signatures.CURVES:
            raise ValueError("it is another kind of key")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--sign-key {key} cannot be used ({_first_line(error)}): {_REMEDY}") from None
    return signatures.named(key.stem, private.public_key())


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
