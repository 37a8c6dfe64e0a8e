"""Small files that several processes agree about, written only if nobody was quicker.

`create` and `replace` are the store's own conditional writes where it has them (If-None-Match and If-Match on S3), and
a lock around a comparison on this machine. Other stores compare first and write then, which two writers can pass
through at the same instant.
"""

import fcntl
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldctl.common.errors import OutputError
from coldctl.storage.location import Location

_TAGS = ("ETag", "etag", "generation")  # what stores call an object's version
_ATTEMPTS = 3


@dataclass(frozen=True)
class Version:
    """A small file as it was read: its bytes, and what the store calls this version of it."""

    data: bytes
    tag: str | None = None


def read(path: Location) -> Version | None:
    """The file as it is now, None if there is none. Raises OutputError if it cannot be told."""
    try:
        if isinstance(path, Path):
            return Version(path.read_bytes())
        for _ in range(_ATTEMPTS):
            before = _tag(path)
            found = Version(path.fs.cat_file(path.path), before)
            if _tag(path) == before:
                return found
    except FileNotFoundError:
        return None
    except Exception as error:  # each store has exceptions of its own
        raise write_error(path, error, "read") from None
    raise OutputError(f"{path} changes faster than it can be read: run the same command again")


def create(path: Location, data: bytes) -> bool:
    """Write a file that must not exist yet, whole and durable. False if there is one. Raises OutputError."""
    if isinstance(path, Path):
        return _create_here(path, data)
    try:
        path.fs.pipe_file(path.path, data, mode="create")
    except Exception as error:  # each store has exceptions of its own
        found = read(path)
        if found is None:
            raise write_error(path, error) from None
        return found.data == data  # a request that was answered too late and sent again meets its own result
    return True


def replace(path: Location, data: bytes, version: Version) -> bool:
    """Overwrite a file that must still be as `version` has it. False if it is not. Raises OutputError."""
    if isinstance(path, Path):
        return _replace_here(path, data, version)
    condition: dict[str, Any] = {"IfMatch": version.tag} if _knows_if_match(path) else {}
    try:
        if not condition and read(path) != version:
            return False
        path.fs.pipe_file(path.path, data, **condition)
    except Exception as error:  # each store has exceptions of its own
        found = read(path)
        if found == version:
            raise write_error(path, error) from None
        return found is not None and found.data == data
    return True


def overwrite(path: Path, data: bytes) -> None:
    """Write a file of this machine, whole and durable, whatever is there. Raises OutputError."""
    unfinished = _write_sibling(path, data)
    try:
        unfinished.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise write_error(path, error) from None


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
    unfinished = _write_sibling(path, data)
    try:
        os.link(unfinished, path)  # unlike a rename, it does not replace
    except FileExistsError:
        return False
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return True


def _replace_here(path: Path, data: bytes, version: Version) -> bool:
    try:
        lock = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise write_error(path, error) from None
    try:
        with suppress(OSError):  # a file system without locks: the comparison is what remains
            fcntl.flock(lock, fcntl.LOCK_EX)
        if read(path) != version:
            return False
        unfinished = _write_sibling(path, data)
        unfinished.replace(path)
        os.fsync(lock)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        os.close(lock)
    return True


def _write_sibling(path: Path, data: bytes) -> Path:
    """Write a hidden sibling of this thread's own with these bytes, fsynced, and return its path."""
    unfinished = path.parent / f".{path.name}.{os.getpid()}-{threading.get_native_id()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise write_error(path, error) from None
    return unfinished
