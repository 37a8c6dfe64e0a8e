"""Small files that several processes agree about, written only if nobody was quicker.

`create` and `replace` use the store's own conditional writes where it has them (If-None-Match and If-Match on S3), and
a lock around a comparison on this machine. In other stores they compare first and then write, so two writers at the same
moment can both succeed.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldctl.common.errors import OutputError
from coldctl.storage.location import Location

_TAGS = ("ETag", "etag", "generation")  # the stores' names for an object's version
_ATTEMPTS = 3


@dataclass(frozen=True)
class Version:
    """A small file as it was read: its bytes, and the store's tag of this version."""

    data: bytes
    tag: str | None = None


def read(path: Location) -> Version | None:
    """Return the current version of a file; None if there is none. Raises OutputError if it cannot be read."""
    try:
        if isinstance(path, Path):
            return Version(path.read_bytes())
        for _ in range(_ATTEMPTS):
            before = _tag(path)
            version = Version(path.fs.cat_file(path.path), before)
            if _tag(path) == before:
                return version
    except FileNotFoundError:
        return None
    except Exception as error:  # each store has exceptions of its own
        raise write_error(path, error, "read") from None
    raise OutputError(f"{path} changes faster than it can be read: run the same command again")


def create(path: Location, data: bytes) -> bool:
    """Write a file, whole and durable, if there is none. Return False if there is one. Raises OutputError."""
    if isinstance(path, Path):
        return _create_here(path, data)
    try:
        path.fs.pipe_file(path.path, data, mode="create")
    except Exception as error:  # each store has exceptions of its own
        current = read(path)
        if current is None:
            raise write_error(path, error) from None
        # A request that was answered too late and sent again meets its own result.
        return current.data == data
    return True


def replace(path: Location, data: bytes, version: Version) -> bool:
    """Overwrite a file if its current version is `version`. Return False if it is not. Raises OutputError."""
    if isinstance(path, Path):
        return _replace_here(path, data, version)
    condition: dict[str, Any] = {"IfMatch": version.tag} if _knows_if_match(path) else {}
    try:
        if not condition and read(path) != version:
            return False
        path.fs.pipe_file(path.path, data, **condition)
    except Exception as error:  # each store has exceptions of its own
        current = read(path)
        if current == version:
            raise write_error(path, error) from None
        return current is not None and current.data == data
    return True


def overwrite(path: Path, data: bytes) -> None:
    """Write a file of this machine, whole and durable, and replace an earlier one. Raises OutputError."""
    with _sibling(path, data) as unfinished:
        unfinished.replace(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Make a file or directory durable (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Location, error: Exception, verb: str = "write") -> OutputError:
    """Return the error that says why a file or directory could not be written (or read)."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return OutputError(f"cannot {verb} {path}: {reason}: free the cause and run the same command again")


def _knows_if_match(path: Any) -> bool:
    protocol = path.fs.protocol
    return "s3" in (protocol if isinstance(protocol, tuple | list) else (protocol,))


def _tag(path: Any) -> str | None:
    entry = path.fs.info(path.path)
    return next((str(entry[key]) for key in _TAGS if entry.get(key)), None)


def _create_here(path: Path, data: bytes) -> bool:
    with _sibling(path, data) as unfinished:
        try:
            os.link(unfinished, path)  # unlike a rename, it does not replace
        except FileExistsError:
            return False
    return True


def _replace_here(path: Path, data: bytes, version: Version) -> bool:
    try:
        lock = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise write_error(path, error) from None
    try:
        # On a file system without locks there is only the comparison.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if read(path) != version:
            return False
        with _sibling(path, data) as unfinished:
            unfinished.replace(path)
            os.fsync(lock)
    finally:
        os.close(lock)
    return True


@contextmanager
def _sibling(path: Path, data: bytes) -> Iterator[Path]:
    """Write a hidden sibling of this thread's own, fsynced, yield it and remove what is left. Raises OutputError."""
    unfinished = path.parent / f".{path.name}.{os.getpid()}-{threading.get_native_id()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield unfinished
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
