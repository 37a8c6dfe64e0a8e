"""Models of a store as files of this machine, for libraries that need paths: fetched once, found again by their versions.

They lie in the user's cache (`storage/user_cache.py`). The least recently used go when all of them exceed `LIMIT`.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from coldctl.artifacts import layout, manifest
from coldctl.common.digests import digest_of
from coldctl.common.errors import ManifestError
from coldctl.storage import user_cache
from coldctl.storage.files import RemoteFolder, download

LIMIT = 16 << 30  # bytes


def fetched(url: str) -> Path:
    """A local directory with the files of the model at `url` as they are now. Raises ModelError or CheckpointError."""
    key = digest_of({"url": url, "versions": RemoteFolder(url).versions()}).removeprefix("sha256:")[:32]
    place = user_cache.folder("models") / key
    if place.is_dir() and not _sound(place):
        shutil.rmtree(place)
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _trim(place.parent)
        unfinished = Path(tempfile.mkdtemp(dir=place.parent, prefix="."))
        try:
            download(url, unfinished, layout.MODEL_FILES)
            with suppress(OSError):  # another process has fetched it meanwhile
                unfinished.rename(place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    os.utime(place)  # used just now
    return place


def _sound(place: Path) -> bool:
    """Whether a copy is still what its manifest says, if it has one."""
    if not (place / layout.MANIFEST).is_file():
        return True
    try:
        stated = manifest.read(place)["files"]
    except ManifestError:
        return False
    here = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.name != layout.MANIFEST]
    return all(stated.get(name) == manifest.digest_of_file(place / name) for name in here)


def _trim(folder: Path) -> None:
    """Remove what was not used for longest until the rest fits. Others may be doing the same."""
    found = []
    for place in folder.iterdir():
        with suppress(OSError):
            size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            found.append((place.stat().st_mtime, size, place))
    excess = sum(size for _, size, _ in found) - LIMIT
    for _, size, place in sorted(found):
        if excess <= 0:
            return
        shutil.rmtree(place, ignore_errors=True)
        excess -= size
