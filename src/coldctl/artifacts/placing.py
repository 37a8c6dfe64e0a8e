"""Putting a finished directory in its place in a store, where no rename does it at once.

What takes long and may break happens beside the place: files are written to, or sent to, the hidden sibling
`.NAME.partial/`. Then the store copies them to NAME itself, and the manifest, which means "complete", is created last
and only if there is none: of two writers one wins. What breaks in between is gone on with by the same command.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coldctl.artifacts import layout
from coldctl.common.errors import BusyError, OutputError
from coldctl.common.progress import Progress
from coldctl.storage import conditional_write
from coldctl.storage.conditional_write import Version
from coldctl.storage.lease import Lease
from coldctl.storage.location import Location, raised_by_store


def send(folder: Path, partial: Location, progress: Progress, belongs: Callable[[str], bool] = lambda _: True) -> None:
    """Store the files of a local folder, whose names `belongs` likes, in `partial`. Raises OutputError."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    files = [path for path in found if belongs(path.relative_to(folder).as_posix())]
    progress.begin("store", sum(path.stat().st_size for path in files), "bytes")
    for path in files:
        target: Any = partial / path.relative_to(folder).as_posix()
        with _storing(target):
            target.fs.makedirs(target.parent.path, exist_ok=True)
            target.fs.put_file(str(path), target.path)
        progress.advance("store", path.stat().st_size)
    progress.end("store")


def place(partial: Location, path: Location, lease: Lease, replaced: Version | None) -> None:
    """Copy the files of `partial`, which the holder of `lease` has filled, to `path`, the manifest last.

    `replaced` is the manifest that stood there when the work began, and may be replaced. Nothing happens if there is no
    manifest in `partial`: another command has completed the same work. Raises BusyError if another one has completed
    `path` meanwhile, OutputError for what the store refuses.
    """
    staged: Any = partial
    target: Any = path
    with _storing(path):
        if (document := conditional_write.read(partial / layout.MANIFEST)) is None:
            return
        lease.check()
        files = _files(staged)
        before = _files(target) if path.exists() else []
        if conditional_write.read(path / layout.MANIFEST) != replaced:
            raise _outrun(path)
        if replaced is not None:  # unfinished from here on, rather than half the old and half the new
            target.fs.rm_file((target / layout.MANIFEST).path)
        for name in files:
            if name != layout.MANIFEST:
                target.fs.makedirs((target / name).parent.path, exist_ok=True)
                target.fs.cp_file((staged / name).path, (target / name).path)
                lease.check_age()
        lease.check()
        for name in sorted({*before} - {*files} - {layout.MANIFEST}):
            target.fs.rm_file((target / name).path)
        if not conditional_write.create(path / layout.MANIFEST, document.data):
            raise _outrun(path)


def _outrun(path: Location) -> BusyError:
    return BusyError(f"{path} was completed by another command at the same time: look at it with `coldctl check`")


def _files(folder: Any) -> list[str]:
    """The files below a folder by their paths from there; hidden ones are of the writing itself."""
    root = folder.path.rstrip("/")
    names = (found[len(root) :].strip("/") for found in folder.fs.find(root))
    return sorted(name for name in names if name and not name.rpartition("/")[2].startswith("."))


@contextmanager
def _storing(path: Location) -> Iterator[None]:
    """Turns whatever a store raises into one error of ours."""
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
