"""Features on disk, so that a body's features of a dataset are computed once, whatever the output directory.

They lie in the user's cache (`storage/user_cache.py`), readable by the user alone, since features tell about the texts they
were made of. The least recently used are deleted when all of them exceed `LIMIT`. Damaged ones are computed again.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldctl.common.digests import digest_of
from coldctl.common.errors import as_os_errors
from coldctl.storage import user_cache

LIMIT = 4 << 30  # bytes
_SCHEMA = 1

Features = NDArray[np.float32]


def cached(
    key: Mapping[str, Any], compute: Callable[[], Sequence[Features]], complain: Callable[[str], None]
) -> Sequence[Features]:
    """The arrays of `key`, float32 [examples, hidden size] each, from the cache or from `compute`.

    A cache that cannot be written costs nothing but a word to `complain`.
    """
    path = (
        user_cache.cache_folder("features")
        / f"{digest_of({'schema': _SCHEMA, **key}).removeprefix('sha256:')}.safetensors"
    )
    if (found := _read(path)) is not None:
        return found
    parts = compute()
    try:
        _write(path, parts)
        user_cache.trim(path.parent, LIMIT)
    except OSError as error:
        complain(f"features are not cached: {path.parent}: {error.strerror or error}")
    return parts


def _read(path: Path) -> Sequence[Features] | None:
    """What a file holds, if it is as it was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            parts = [file.get_tensor(name) for name in sorted(file.keys())]
            stated = (file.metadata() or {}).get("digest")
        if stated != _digest(parts):
            return None
        os.utime(path)  # used just now
    except (OSError, SafetensorError):
        return None
    return parts


def _write(path: Path, parts: Sequence[Features]) -> None:
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".partial")  # for its owner only
    os.close(descriptor)
    try:
        named = {f"{number:03d}": np.ascontiguousarray(part) for number, part in enumerate(parts)}
        with as_os_errors():
            save_file(named, unfinished, {"digest": _digest(parts)})
        Path(unfinished).chmod(0o600)
        Path(unfinished).replace(path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _digest(parts: Sequence[Features]) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(f"{part.dtype} {part.shape} ".encode())
        hasher.update(np.ascontiguousarray(part).data)
    return hasher.hexdigest()
