"""The user's cache: files that may be deleted at any time.

It is `$COLDCTL_CACHE` if that is set, else the system's cache folder for `coldctl`.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import platformdirs

from coldctl.common.digests import digest_of
from coldctl.common.errors import CheckpointError
from coldctl.storage.remote import RemoteFolder, download

LIMIT = 16 << 30  # bytes of all copies of folders in stores
_IN_USE = 3600.0  # seconds since its last use in which a copy is not deleted: a command may be reading it


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of cached files. It may not exist yet."""
    folder = os.environ.get("COLDCTL_CACHE")
    return (Path(folder).expanduser() if folder else platformdirs.user_cache_path("coldctl", appauthor=False)) / kind


def local_copy(source: RemoteFolder, patterns: Sequence[str] | None, is_sound: Callable[[Path], bool]) -> Path:
    """Return a local directory with the current files of a folder in a store, for libraries that need paths.

    `patterns` select among the files directly in it; None selects all files, also those in folders below. A copy is
    downloaded once per version of the files, and again if it is not sound. Raises ModelError or CheckpointError.
    """
    inputs = {"url": source.label, "versions": source.versions(), **({} if patterns is not None else {"all": True})}
    copy = cache_folder("models") / digest_of(inputs).removeprefix("sha256:")[:32]
    if copy.is_dir() and not is_sound(copy):
        shutil.rmtree(copy)
    if not copy.is_dir():
        if (size := sum(int(entry["size"] or 0) for entry in source.entries.values())) > LIMIT:
            raise CheckpointError(
                f"{source.label}: {size >> 30} GiB do not fit in the cache. Copy it to a disk yourself."
            )
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = Path(tempfile.mkdtemp(dir=copy.parent, prefix="."))
        try:
            trim(copy.parent, LIMIT, in_use=_IN_USE)
            download(source, unfinished, patterns)
            with suppress(OSError):  # another process has made the copy meanwhile
                unfinished.rename(copy)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    os.utime(copy)
    return copy


def trim(folder: Path, limit: int, *, in_use: float = 0.0) -> None:
    """Delete the least recently used entries of a folder until the others fit in `limit` bytes.

    Entries used in the last `in_use` seconds before the latest use stay: only the file system's own clock is asked.
    Other processes may be trimming at the same time.
    """
    entries = []
    for entry in folder.iterdir():
        with suppress(OSError):
            size = sum(path.stat().st_size for path in (entry, *entry.rglob("*")) if path.is_file())
            entries.append((entry.stat().st_mtime, size, entry))
    excess = sum(size for _, size, _ in entries) - limit
    latest = max((used for used, _, _ in entries), default=0.0)
    for used, size, entry in sorted(entries):
        if excess <= 0 or latest - used < in_use:
            return
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        excess -= size
