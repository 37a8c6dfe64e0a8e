"""Measurements and features on disk, each proven by a digest before it is used.

A cell is one measurement of an evaluation. Features lie in the user's cache (`storage/user_cache.py`), whatever the output
directory, readable by the user alone, since they tell about the texts they were made of. The least recently used are
deleted when all of them exceed `LIMIT`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.artifacts import output
from coldctl.common.digests import digest_of
from coldctl.common.errors import as_os_errors
from coldctl.storage import user_cache
from coldctl.storage.location import Location

LIMIT = 4 << 30  # bytes
_SCHEMA = 1

Features = NDArray[np.float32]


def write_cell(path: Location, document: Mapping[str, Any]) -> None:
    """Write a cell atomically, with a digest of its content. Raises OutputError."""
    output.write_text(path, json.dumps({**document, "digest": digest_of(document)}) + "\n")


def read_cell(path: Location) -> dict[str, Any] | None:
    """Return a cell as it was written, or None if there is none with a correct digest."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stated = document.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return document if stated == digest_of(document) else None


def cached_features(
    key: Mapping[str, Any], compute: Callable[[], Sequence[Features]], complain: Callable[[str], None]
) -> Sequence[Features]:
    """Return the arrays of `key`, float32 [examples, hidden size] each, from the cache or from `compute`.

    `complain` is told if the cache cannot be written.
    """
    name = digest_of({"schema": _SCHEMA, **key}).removeprefix("sha256:")
    path = user_cache.cache_folder("features") / f"{name}.safetensors"
    if (cached := _read(path)) is not None:
        return cached
    arrays = compute()
    try:
        _write(path, arrays)
        user_cache.trim(path.parent, LIMIT)
    except OSError as error:
        complain(f"features are not cached: {path.parent}: {error.strerror or error}")
    return arrays


def _read(path: Path) -> Sequence[Features] | None:
    """Return the arrays of a file, or None if they are not as they were written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            arrays = [file.get_tensor(name) for name in sorted(file.keys())]
            stated = (file.metadata() or {}).get("digest")
        if stated != _digest(arrays):
            return None
        os.utime(path)  # the time of its last use
    except (OSError, SafetensorError):
        return None
    return arrays


def _write(path: Path, arrays: Sequence[Features]) -> None:
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".partial")  # readable by its owner alone
    os.close(descriptor)
    try:
        named = {f"{number:03d}": np.ascontiguousarray(array) for number, array in enumerate(arrays)}
        with as_os_errors():
            save_file(named, unfinished, {"digest": _digest(arrays)})
        Path(unfinished).chmod(0o600)
        Path(unfinished).replace(path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _digest(arrays: Sequence[Features]) -> str:
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(f"{array.dtype} {array.shape} ".encode())
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()
