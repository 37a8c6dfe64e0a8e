"""Atomic outputs: complete or not there, on a disk and in a store.

Work happens in the hidden sibling `.NAME.partial/`, the manifest is its last file, and a complete output with the same
identity is left alone. `disk_output.py` makes the result visible by one rename, `store_output.py` by copies, manifest last.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from coldctl.artifacts import disk_output, layout, manifest, store_output
from coldctl.artifacts.layout import IDENTITY, LEASE, claim
from coldctl.common.digests import digest_of
from coldctl.common.errors import ManifestError, OutputError
from coldctl.common.progress import SILENT, Progress
from coldctl.storage import conditional_write
from coldctl.storage.location import Location, in_store, locate
from coldctl.storage.user_cache import cache_folder


def is_done(path: Location, identity: str, *, overwrite: bool, flag: str = "--output") -> bool:
    """Return True if `path` already holds the complete result of the same config and inputs.

    With `overwrite` every file is verified, and False is returned if one was changed since.
    Raises OutputError if something else is there and `overwrite` is not given, ManifestError if its manifest is damaged.
    Remedies name the `flag` that gave `path`.
    """
    if not path.exists():
        return isinstance(path, Path) and disk_output.finish_interrupted(path, identity)
    if not path.is_dir():
        raise OutputError(f"{path} is a file: give {flag} a directory that does not exist yet")
    if layout.is_complete(path):
        try:
            document = manifest.read_unchanged(path) if overwrite else manifest.read(path)
        except ManifestError as error:
            if overwrite:
                return False
            raise ManifestError(f"{error.message} (--overwrite makes it again)") from None
        if document.get("identity") == identity:
            return True
        if not overwrite:
            raise OutputError(
                f"{path} is complete but was made from other inputs or another config: "
                f"give --overwrite to replace it, or another {flag}"
            )
    elif in_store(path) and (layout.partial(path) / IDENTITY).exists():
        return False  # files that an interrupted call of ours has copied there already
    elif any(path.iterdir()):  # never deleted, whatever the flags
        raise OutputError(
            f"{path} holds files that coldctl did not write: give another {flag}, or remove them yourself"
        )
    return False


def partial_identity(path: Location) -> str | None:
    """Return the identity of the unfinished work on `path` that `local_workdir` would go on with; None without any."""
    marker = _local_partial(path) / IDENTITY
    return marker.read_text(encoding="utf-8") if marker.is_file() else None


def discard_partial(path: Location) -> None:
    """Remove the unfinished work on `path` that `local_workdir` would go on with. Raises BusyError if it is in use."""
    partial = _local_partial(path)
    with disk_output.hold(partial, path):
        shutil.rmtree(partial)


def refuse_overlap(path: Location, inputs: Iterable[str | Location], *, flag: str = "--output") -> None:
    """Refuse an output that is one of its own inputs, lies in one, or holds one. Raises OutputError."""
    place = path.resolve()
    for source in inputs:
        other = locate(source).resolve()
        if in_store(other) != in_store(place):
            continue
        if place == other or other in place.parents or place in other.parents:
            raise OutputError(f"{path} would overwrite its own input {source}: give another {flag}")


def atomic_output(
    path: Location, identity: str | None, *, overwrite: bool
) -> AbstractContextManager[Path] | AbstractContextManager[Location]:
    """Give the partial directory of `path` to write into; on success publish it as `path`.

    The caller writes everything including the manifest. Unfinished work of the same `identity` is kept there to go on
    with; that of another identity is refused without `overwrite`. Without an `identity` the work is too short to be
    worth resuming: it starts from nothing, and leaves nothing if it fails. Raises BusyError if another command is
    writing `path`, OutputError if it cannot be written.
    """
    if isinstance(path, Path):
        return disk_output.write_directory(path, identity, overwrite=overwrite)
    return store_output.write_directory(path, identity, overwrite=overwrite)


@contextmanager
def local_workdir(
    path: Location, identity: str | None, *, overwrite: bool, progress: Progress = SILENT
) -> Iterator[Path]:
    """Yield a partial directory as `atomic_output` does, but always on this machine, for libraries that know no stores.

    For an output in a store it lies in the user's cache, where the same command finds unfinished work again.
    """
    if isinstance(path, Path):
        with disk_output.write_directory(path, identity, overwrite=overwrite) as partial:
            yield partial
        return
    folder = _local_partial(path)
    with disk_output.hold(folder, path):
        claim(folder, path, identity, overwrite=overwrite)
        yield folder
        with store_output.write_directory(path, identity, overwrite=True) as staged:
            if not is_done(path, identity or "", overwrite=overwrite):
                store_output.upload(folder, staged, progress)
        shutil.rmtree(folder)


def is_held(partial: Location) -> bool:
    """Return True if a command is writing this partial directory.

    On a disk its lock is held; in a store its lease exists, until it expires also that of a command that has died.
    """
    return disk_output.is_locked(partial) if isinstance(partial, Path) else (partial / LEASE).is_file()


def write_text(path: Location, text: str) -> None:
    """Write a small file atomically, whether or not others write it at the same time. Raises OutputError."""
    if isinstance(path, Path):
        conditional_write.overwrite(path, text.encode())
        return
    try:
        path.write_text(text, encoding="utf-8")  # a store shows an object when it is whole
    except OSError as error:
        raise conditional_write.write_error(path, error) from None


def _local_partial(path: Location) -> Path:
    """Return the local directory of the unfinished work on `path`."""
    if isinstance(path, Path):
        return layout.partial(path)
    key = digest_of({"output": str(path)}).removeprefix("sha256:")[:16]
    return cache_folder("unfinished") / f"{path.name}-{key}"
