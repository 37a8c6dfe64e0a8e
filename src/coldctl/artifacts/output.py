"""Writing a directory so that nothing half-written is ever read, on this machine or in a store.

Work happens in the hidden sibling `.NAME.partial/`; when it is done, the manifest is the last file of it. On this machine
every file is then fsynced and one rename makes the directory visible. Stores know no rename: there the files are
copied by the store itself, the manifest last and only if nobody else has completed the output (`artifacts/placing.py`).
A complete output with the same identity is left alone.
"""

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coldctl.artifacts import layout, manifest, placing
from coldctl.common.digests import digest_of
from coldctl.common.errors import BusyError, ManifestError, OutputError
from coldctl.common.progress import SILENT, Progress
from coldctl.storage import conditional_write, user_cache
from coldctl.storage.lease import Lease
from coldctl.storage.location import Location, children, in_store, locate

IDENTITY = ".identity"  # in the partial directory: which config and inputs the unfinished work belongs to
LEASE = ".lease"  # in a store, in place of a lock
_WHOLE = " whole"  # behind the identity: all is written and only to be made visible


def is_done(path: Location, identity: str, *, overwrite: bool, flag: str = "--output") -> bool:
    """Whether `path` already holds the complete result of the same config and inputs.

    With `overwrite` every file of it is looked at, and one that was changed since makes it as good as not there.
    Raises OutputError if something else is there and `overwrite` is not given, ManifestError if its manifest is damaged.
    Remedies name the `flag` that gave `path`.
    """
    if not path.exists():
        return isinstance(path, Path) and _finished(path, identity)
    if not path.is_dir():
        raise OutputError(f"{path} is a file: give {flag} a directory that does not exist yet")
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
                f"give --overwrite to replace it, or another {flag}"
            )
    elif in_store(path) and (layout.partial(path) / IDENTITY).exists():
        return False  # files that an interrupted call of ours has copied there already
    elif any(path.iterdir()):  # never deleted, whatever the flags
        raise OutputError(
            f"{path} holds files that coldctl did not write: give another {flag}, or remove them yourself"
        )
    return False


def unfinished(path: Location) -> str | None:
    """The identity of the unfinished work on `path` that `working` would find; None where there is none."""
    marker = _workplace(path) / IDENTITY
    return marker.read_text(encoding="utf-8") if marker.is_file() else None


def drop(path: Location) -> None:
    """Drop the unfinished work on `path` that `working` would find. Raises BusyError if a command is at it."""
    here = _workplace(path)
    with _held_here(here, path, None, overwrite=True):
        shutil.rmtree(here)


def _workplace(path: Location) -> Path:
    """Where on this machine `working` works on `path`."""
    if isinstance(path, Path):
        partial = layout.partial(path)
        assert isinstance(partial, Path)
        return partial
    key = digest_of({"output": str(path)}).removeprefix("sha256:")[:16]
    return user_cache.folder("unfinished") / f"{path.name}-{key}"


def refuse_overlap(path: Location, inputs: Iterable[str | Location], *, flag: str = "--output") -> None:
    """Refuse an output that is one of its own inputs, lies in one, or holds one. Raises OutputError."""
    place = path.resolve()
    for item in inputs:
        other = locate(item).resolve()
        if in_store(other) != in_store(place):
            continue
        if place == other or other in place.parents or place in other.parents:
            raise OutputError(f"{path} would overwrite its own input {item}: give another {flag}")


@contextmanager
def writing(path: Location, identity: str | None, *, overwrite: bool) -> Iterator[Location]:
    """Give the partial directory of `path` to write into; on success publish it as `path`.

    The caller writes everything including the manifest. Unfinished work of the same `identity` is found there
    and may be gone on with; that of another identity is refused without `overwrite`. Without an `identity`
    the work is too short to be worth resuming: it starts from nothing, and leaves nothing if it fails.
    Raises BusyError if another command is writing `path`.
    """
    if isinstance(path, Path):
        with _writing_here(path, identity, overwrite=overwrite) as here:
            yield here
        return
    partial = layout.partial(path)
    lease = Lease(partial / LEASE, str(path))
    try:
        _claim(partial, path, identity or "", overwrite=overwrite or identity is None)
        replaced = conditional_write.read(path / layout.MANIFEST)
        try:
            yield partial
            placing.place(partial, path, lease, replaced)
        except BaseException as error:
            if identity is None:
                with suppress(Exception):  # files that were placed already need the marker that says whose they are
                    half_placed = path.exists() and not layout.is_complete(path)
                    _remove(partial, but=(LEASE, IDENTITY) if half_placed else (LEASE,))
            if isinstance(error, OSError):
                raise _cannot_write(path, error) from error
            raise
        _remove(partial, but=(LEASE,))
    finally:
        lease.release()
        with suppress(Exception):  # stores that know directories keep empty ones
            if not children(partial):
                partial.rmdir()


def is_held(partial: Location) -> bool:
    """Whether a command is at work in a partial directory; in a store one that has died counts until its lease is over."""
    if not isinstance(partial, Path):
        return (partial / LEASE).is_file()
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def working(path: Location, identity: str | None, *, overwrite: bool, progress: Progress = SILENT) -> Iterator[Path]:
    """As `writing`, but always with a directory of this machine to write into, for what libraries write.

    For an output in a store it lies in the user's cache, where the same command finds unfinished work again.
    """
    if isinstance(path, Path):
        with _writing_here(path, identity, overwrite=overwrite) as here:
            yield here
        return
    here = _workplace(path)
    with _held_here(here, path, identity, overwrite=overwrite):
        yield here
        with writing(path, identity, overwrite=True) as partial:
            if not is_done(path, identity or "", overwrite=overwrite):
                placing.send(here, partial, progress)
        shutil.rmtree(here)


def write_text(path: Location, text: str) -> None:
    """Write a small file atomically: a hidden sibling of the writer's own, fsync, rename. Others may do the same."""
    try:
        if not isinstance(path, Path):
            path.write_text(text, encoding="utf-8")  # a store shows an object when it is whole
            return
        partial = layout.partial(path.with_name(f"{path.name}.{os.getpid()}-{threading.get_native_id()}"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _sync(path.parent)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    except OSError as error:
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


@contextmanager
def _writing_here(path: Path, identity: str | None, *, overwrite: bool) -> Iterator[Path]:
    partial = layout.partial(path)
    assert isinstance(partial, Path)
    with _held_here(partial, path, identity, overwrite=overwrite):
        if not overwrite and layout.is_complete(path):
            raise BusyError(f"{path} was completed by another command meanwhile: run the same command again")
        try:
            yield partial
            (partial / IDENTITY).write_text(f"{identity}{_WHOLE}", encoding="utf-8")
            sync_tree(partial)
            _replace(partial, path)
        except OSError as error:
            raise _cannot_write(path, error) from error
        finally:
            if identity is None:
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _held_here(
    partial: Path, path: Location, identity: str | None, *, overwrite: bool, claim: bool = True
) -> Iterator[None]:
    """Hold a directory of this machine for unfinished work on `path`, made or gone on with."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        _lock(lock, path, partial)
        if claim:
            _claim(partial, path, identity or "", overwrite=overwrite or identity is None)
        yield
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Location, partial: Path) -> None:
    """Hold the partial directory itself, so that a dead process leaves no lock behind."""
    busy = BusyError(f"{path} is being written by another command: wait for it, or write to another place")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return  # a file system without locks: we go on without this protection
        raise busy from None
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), partial.stat()):
            return
    raise busy  # it has completed the output since we looked, and what we hold is the output itself


def _claim(partial: Location, path: Location, identity: str, *, overwrite: bool) -> None:
    marker = partial / IDENTITY
    found = marker.read_text(encoding="utf-8").removesuffix(_WHOLE) if marker.is_file() else None
    others = [child for child in children(partial) if child.name not in (IDENTITY, LEASE)]
    if identity and found == identity:
        (partial / layout.MANIFEST).unlink(missing_ok=True)  # of a call that was killed while it wrote it
        return
    if found is not None and others and not overwrite:
        raise OutputError(
            f"{partial} holds unfinished work on {path.name} under another config or other inputs: "
            "give --overwrite to drop it, or repeat the earlier command to finish it"
        )
    _remove(partial, but=(LEASE,))
    marker.write_text(identity, encoding="utf-8")


def _remove(folder: Location, *, but: tuple[str, ...]) -> None:
    """Remove what a folder holds, but for these files."""
    for child in children(folder):
        if child.name in but:
            continue
        if not isinstance(child, Path):
            child.fs.rm(child.path, recursive=True)
        elif child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()


def _finished(path: Path, identity: str) -> bool:
    """Make an output visible for which a killed call had nothing else left to do."""
    partial = layout.partial(path)
    assert isinstance(partial, Path)
    if not _is_whole(partial, identity):
        return False
    with _held_here(partial, path, None, overwrite=False, claim=False):
        if not _is_whole(partial, identity):
            return False
        try:
            sync_tree(partial)
            _replace(partial, path)
        except OSError as error:
            raise _cannot_write(path, error) from error
    return True


def _is_whole(partial: Path, identity: str) -> bool:
    try:
        if (partial / IDENTITY).read_text(encoding="utf-8") != f"{identity}{_WHOLE}":
            return False
        return manifest.read_unchanged(partial).get("identity") == identity
    except (OSError, ManifestError):
        return False


def _replace(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; what was there before goes only when the new one stands."""
    old = path.parent / f".{path.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    (partial / IDENTITY).unlink()  # as late as can be: until then a killed call's work is known for what it is
    if path.exists():
        path.rename(old)
    partial.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _cannot_write(path: Location, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {path}: {reason}: free the cause and run the same command again")
