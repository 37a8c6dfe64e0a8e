"""Writing a directory so that nothing half-written is ever read.

Work happens in the hidden sibling `.NAME.partial/`; when it is done, every file is fsynced, the manifest is
written last, and one rename makes it visible. A complete output with the same identity is left alone.
"""

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coldctl.core import layout, manifest
from coldctl.core.errors import BusyError, ManifestError, OutputError
from coldctl.core.storage import is_url

IDENTITY = ".identity"  # in the partial directory: which config and inputs the unfinished work belongs to


def is_done(path: Path, identity: str, *, overwrite: bool) -> bool:
    """Whether `path` already holds the complete result of the same config and inputs.

    With `overwrite` every file of it is looked at, and one that was changed since makes it as good as not there.
    Raises OutputError if something else is there and `overwrite` is not given, ManifestError if its manifest is damaged.
    """
    if not path.exists():
        return False
    if not path.is_dir():
        raise OutputError(f"{path} is a file: give --output a directory that does not exist yet")
    if layout.is_complete(path):
        try:
            found = manifest.read_unchanged(path) if overwrite else manifest.read(path)
        except ManifestError as error:
            if overwrite:
                return False
            raise ManifestError(f"{error.message} (--overwrite makes it again)") from None
        if found.get("identity") == identity:
            return True
        if not overwrite:
            raise OutputError(
                f"{path} is complete but was made from other inputs or another config: "
                "give --overwrite to replace it, or another --output"
            )
    elif any(path.iterdir()):  # never deleted, whatever the flags
        raise OutputError(
            f"{path} holds files that coldctl did not write: give another --output, or remove them yourself"
        )
    return False


def refuse_overlap(path: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output that is one of its own inputs, lies in one, or holds one. Raises OutputError."""
    place = path.resolve()
    for item in inputs:
        if is_url(str(item)):
            continue
        other = Path(item).expanduser().resolve()
        if place == other or place.is_relative_to(other) or other.is_relative_to(place):
            raise OutputError(f"{path} would overwrite its own input {item}: give another --output")


@contextmanager
def writing(path: Path, identity: str | None, *, overwrite: bool) -> Iterator[Path]:
    """Give the partial directory of `path` to write into; on success publish it as `path`.

    The caller writes everything including the manifest. Unfinished work of the same `identity` is found there
    and may be gone on with; that of another identity is refused without `overwrite`. Without an `identity`
    the work is too short to be worth resuming: it starts from nothing, and leaves nothing if it fails.
    """
    partial = layout.partial(path)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        _lock(lock, path)
        _claim(partial, path, identity or "", overwrite=overwrite or identity is None)
        try:
            yield partial
            (partial / IDENTITY).unlink()
            sync_tree(partial)
            _replace(partial, path)
        except OSError as error:
            raise _cannot_write(path, error) from error
        finally:
            if identity is None:
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: a hidden sibling of the writer's own, fsync, rename. Others may do the same."""
    partial = layout.partial(path.with_name(f"{path.name}.{threading.get_native_id()}"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _cannot_write(path, error) from None


def sync_tree(folder: Path) -> None:
    """Make every file and directory below `folder` durable, with modes as the umask says.

    Some writers (safetensors among them) create files that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Hold the partial directory itself, so that a dead process leaves no lock behind."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return  # a file system without locks: we go on without this protection
        raise BusyError(f"{path} is being written by another command: wait for it, or give another --output") from None


def _claim(partial: Path, path: Path, identity: str, *, overwrite: bool) -> None:
    marker = partial / IDENTITY
    found = marker.read_text(encoding="utf-8") if marker.is_file() else None
    others = [child for child in partial.iterdir() if child != marker]
    if identity and found == identity:
        (partial / layout.MANIFEST).unlink(missing_ok=True)  # of a call that was killed while it wrote it
        return
    if found is not None and others and not overwrite:
        raise OutputError(
            f"{partial} holds unfinished work on {path.name} under another config or other inputs: "
            "give --overwrite to drop it, or repeat the earlier command to finish it"
        )
    for child in others:
        if child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()
    marker.write_text(identity, encoding="utf-8")


def _replace(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; what was there before goes only when the new one stands."""
    old = path.parent / f".{path.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _cannot_write(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {path}: {reason}: free the cause and run the same command again")
