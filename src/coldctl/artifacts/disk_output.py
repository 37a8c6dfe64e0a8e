"""Atomic output on this machine: a locked partial directory, fsync, one rename."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coldctl.artifacts import layout, manifest
from coldctl.artifacts.layout import IDENTITY, WHOLE, claim
from coldctl.common.errors import BusyError, ManifestError
from coldctl.storage.conditional_write import sync, write_error
from coldctl.storage.location import Location


@contextmanager
def write_directory(path: Path, identity: str | None, *, overwrite: bool) -> Iterator[Path]:
    """Lock and yield the partial directory of `path`; on success rename it to `path`. Raises BusyError, OutputError."""
    partial = layout.partial(path)
    with hold(partial, path):
        claim(partial, path, identity, overwrite=overwrite)
        if not overwrite and layout.is_complete(path):
            raise BusyError(f"{path} was completed by another command meanwhile: run the same command again")
        try:
            yield partial
            (partial / IDENTITY).write_text(f"{identity}{WHOLE}", encoding="utf-8")
            _publish(partial, path)
        except OSError as error:
            raise write_error(path, error) from error
        finally:
            if identity is None:
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def hold(partial: Path, path: Location) -> Iterator[None]:
    """Make and lock the partial directory of `path`. Raises BusyError if another process holds it."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise write_error(path, error) from None
    try:
        _lock(descriptor, path, partial)
        yield
    finally:
        os.close(descriptor)


def is_locked(partial: Path) -> bool:
    """Return True if a process holds the lock on a partial directory."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def finish_interrupted(path: Path, identity: str) -> bool:
    """Rename the partial directory of `path` if a killed command wrote all of it. Return True if it did."""
    partial = layout.partial(path)
    if not _is_whole(partial, identity):
        return False
    with hold(partial, path):
        if not _is_whole(partial, identity):
            return False
        try:
            _publish(partial, path)
        except OSError as error:
            raise write_error(path, error) from error
    return True


def _lock(descriptor: int, path: Location, partial: Path) -> None:
    """Lock the directory itself, so that a dead process leaves no lock behind."""
    busy = BusyError(f"{path} is being written by another command: wait for it, or write to another place")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks gives another error: there is no protection then.
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return
        raise busy from None
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), partial.stat()):
            return
    # Another process has completed the output since it was opened: the lock is on the output itself.
    raise busy


def _is_whole(partial: Path, identity: str) -> bool:
    try:
        if (partial / IDENTITY).read_text(encoding="utf-8") != f"{identity}{WHOLE}":
            return False
        return manifest.read_unchanged(partial).get("identity") == identity
    except (OSError, ManifestError):
        return False


def _publish(partial: Path, path: Path) -> None:
    """Make `partial` durable and rename it to `path`; an earlier `path` is removed only after that."""
    _sync_tree(partial)
    old = path.parent / f".{path.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    # As late as possible: until then a killed command's work is recognized as its own.
    (partial / IDENTITY).unlink()
    if path.exists():
        path.rename(old)
    partial.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Make every file and directory below `folder` durable, with modes as the umask says.

    Some writers (safetensors among them) create files that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)
        sync(path)
    sync(folder)
