"""Atomic output in a store, where no rename makes a directory visible at once.

Files are written to the hidden sibling `.NAME.partial/`, which a lease holds. Then the store copies them to NAME itself,
and the manifest, which means "complete", is created last and only if there is none: of two writers one wins. The same
command goes on with what was interrupted in between.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from coldctl.artifacts import layout
from coldctl.artifacts.layout import IDENTITY, LEASE, claim, clear
from coldctl.common.errors import BusyError, OutputError
from coldctl.common.progress import Progress
from coldctl.storage import conditional_write
from coldctl.storage.conditional_write import Version
from coldctl.storage.lease import Lease
from coldctl.storage.location import Location, children, raised_by_store


@contextmanager
def write_directory(path: Location, identity: str | None, *, overwrite: bool) -> Iterator[Location]:
    """Hold and yield the partial directory of `path`; on success publish it as `path`. Raises BusyError, OutputError."""
    partial = layout.partial(path)
    lease = Lease(partial / LEASE, str(path))
    try:
        claim(partial, path, identity, overwrite=overwrite)
        replaced = conditional_write.read(path / layout.MANIFEST)
        try:
            yield partial
            publish(partial, path, lease, replaced)
        except BaseException as error:
            if identity is None:
                with suppress(Exception):  # files that were copied already need the marker that says whose they are
                    half_copied = path.exists() and not layout.is_complete(path)
                    clear(partial, keep=(LEASE, IDENTITY) if half_copied else (LEASE,))
            if isinstance(error, OSError):
                raise conditional_write.write_error(path, error) from error
            raise
        clear(partial, keep=(LEASE,))
    finally:
        lease.release()
        with suppress(Exception):  # stores that know directories keep empty ones
            if not children(partial):
                partial.rmdir()


def upload(
    folder: Path, partial: Location, progress: Progress, belongs: Callable[[str], bool] = lambda _: True
) -> None:
    """Copy the files of a local folder whose names `belongs` accepts to `partial`. Raises OutputError."""
    visible = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    files = [path for path in visible if belongs(path.relative_to(folder).as_posix())]
    progress.begin("store", sum(path.stat().st_size for path in files), "bytes")
    for path in files:
        target: Any = partial / path.relative_to(folder).as_posix()
        with _store_errors(target):
            target.fs.makedirs(target.parent.path, exist_ok=True)
            target.fs.put_file(str(path), target.path)
        progress.advance("store", path.stat().st_size)
    progress.end("store")


def publish(partial: Location, path: Location, lease: Lease, replaced: Version | None) -> None:
    """Copy the files of `partial`, which the holder of `lease` has filled, to `path`, the manifest last.

    `replaced` is the manifest that stood there when the work began, and may be replaced. Nothing happens if there is no
    manifest in `partial`: another command has completed the same work. Raises BusyError if another one has completed
    `path` meanwhile, OutputError for what the store refuses.
    """
    source: Any = partial
    target: Any = path
    with _store_errors(path):
        if (document := conditional_write.read(partial / layout.MANIFEST)) is None:
            return
        lease.check()
        files = _files(source)
        before = _files(target) if path.exists() else []
        if conditional_write.read(path / layout.MANIFEST) != replaced:
            raise _completed_by_another(path)
        if replaced is not None:  # unfinished from here on, rather than half the old and half the new
            target.fs.rm_file((target / layout.MANIFEST).path)
        for name in files:
            if name != layout.MANIFEST:
                target.fs.makedirs((target / name).parent.path, exist_ok=True)
                target.fs.cp_file((source / name).path, (target / name).path)
                lease.check_age()
        lease.check()
        for name in sorted({*before} - {*files} - {layout.MANIFEST}):
            target.fs.rm_file((target / name).path)
        if not conditional_write.create(path / layout.MANIFEST, document.data):
            raise _completed_by_another(path)


def _completed_by_another(path: Location) -> BusyError:
    return BusyError(f"{path} was completed by another command at the same time: look at it with `coldctl check`")


def _files(folder: Any) -> list[str]:
    """Return the paths of a folder's files below it, without hidden ones, which belong to the writing itself."""
    root = folder.path.rstrip("/")
    names = (path[len(root) :].strip("/") for path in folder.fs.find(root))
    return sorted(name for name in names if name and not name.rpartition("/")[2].startswith("."))


@contextmanager
def _store_errors(path: Location) -> Iterator[None]:
    """Turn every exception of a store into OutputError."""
    try:
        yield
    except Exception as error:  # each store has exceptions of its own
        if not isinstance(error, OSError) and not raised_by_store(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OutputError(
            f"{path} could not be written ({reason}): check your credentials and the connection, and run the same "
            "command again"
        ) from None
