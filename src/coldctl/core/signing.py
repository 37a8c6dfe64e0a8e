"""OpenSSF model signing with a key of one's own, offline: every file of a directory under one signature."""

import re
from pathlib import Path
from typing import Any

from coldctl.core import layout
from coldctl.core.errors import ConfigError, ModelError
from coldctl.core.output import IDENTITY

_REMEDY = "install it with `pip install coldctl[sign]`"


def sign(folder: Path, key: Path) -> None:
    """Write `model.sig` into `folder`, over all its other files, by the elliptic-curve private key in the PEM file `key`.

    Raises ConfigError if the key cannot be used.
    """
    signing, hashing = _library("signing"), _library("hashing")
    config = signing.Config().set_hashing_config(_all_files(hashing))
    try:
        config.use_elliptic_key_signer(private_key=key).sign(folder, folder / layout.SIGNATURE)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--sign-key {key} cannot be used ({_first_line(error)}): give a PEM file with an elliptic-curve private key, "
            "such as `openssl ecparam -genkey -name prime256v1 -noout` makes"
        ) from None


def check_key(key: Path) -> None:
    """Refuse a private key that cannot sign, before any work is done. Raises ConfigError."""
    _library("signing")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        fine = isinstance(load_pem_private_key(key.read_bytes(), None), ec.EllipticCurvePrivateKey)
        reason = "it is another kind of key"
    except (OSError, ValueError, TypeError) as error:
        fine, reason = False, _first_line(error)
    if not fine:
        raise ConfigError(
            f"--sign-key {key} cannot be used ({reason}): give a PEM file with an elliptic-curve private key without "
            "a password, such as `openssl ecparam -genkey -name prime256v1 -noout` makes"
        )


def problems(folder: Path, key: Path) -> list[str]:
    """What is not as it was signed with the private key that the public key in the PEM file `key` belongs to.

    Empty if all is well. Raises ConfigError if the key cannot be read.
    """
    verifying, hashing = _library("verifying"), _library("hashing")
    if not (folder / layout.SIGNATURE).is_file():
        return [f"it is not signed: there is no {layout.SIGNATURE}"]
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--verify-key {key} cannot be used ({_first_line(error)}): give the PEM file with the public key"
        ) from None
    try:
        config.set_hashing_config(_all_files(hashing)).verify(folder, folder / layout.SIGNATURE)
    except Exception as error:  # whatever is wrong with a stranger's signature file
        return _differences(_first_line(error))
    return []


def _differences(message: str) -> list[str]:
    """The files that the library's answer is about, each in a sentence."""
    plain = message.replace("\\'", "'")
    found = [f"{name} is not as it was signed" for name in re.findall(r"Hash mismatch for '(.+?)'", plain)]
    for start, words in (
        ("Extra files found in", "was not there when it was signed"),
        ("Missing files in", "is missing"),
    ):
        for names in re.findall(rf"{start} model '.*?': (.+?)[\"\]]", plain):
            found += [f"{name} {words}" for name in names.split(", ")]
    return found or [f"its signature is not by this key, or was changed: {message}"]


def _all_files(hashing: Any) -> Any:
    """What is hashed: every file but the signature itself, and what git, the Hub's downloads and our outputs keep beside them."""
    return hashing.Config().set_ignored_paths(paths=[layout.SIGNATURE, ".cache/huggingface", IDENTITY])


def _library(part: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{part}")
    except ImportError:
        raise ModelError(f"signatures need the model-signing library: {_REMEDY}") from None


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
