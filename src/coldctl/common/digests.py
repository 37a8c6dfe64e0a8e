"""Digests of JSON documents and of names."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

LONGEST_NAME = 200  # bytes; file systems take 255, and hidden siblings and logs need some


def canonical(document: Mapping[str, Any]) -> bytes:
    """Return the bytes that digests of JSON documents are taken over: sorted keys, no spaces, UTF-8.

    >>> canonical({"b": 1, "a": "é"}).decode()
    '{"a":"é","b":1}'
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(document: Mapping[str, Any]) -> str:
    """Return `sha256:…` of a JSON document's canonical bytes."""
    return "sha256:" + hashlib.sha256(canonical(document)).hexdigest()


def derived_seed(seed: int, *parts: object) -> int:
    """Return a seed of 31 bits for one piece of work: sha256 over `seed` and the names of the work."""
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
