"""Read checkpoints' files: the protocols `Folder` and `Reader`, and how they work on a disk.

Local files are read by position into the caller's buffer, so that nothing is mapped or kept.
"""

import os
import stat
from contextlib import closing, suppress
from pathlib import Path, PurePosixPath
from typing import Protocol

from coldctl.common.errors import CheckpointError

SMALL_FILE_LIMIT = 64 << 20  # bytes; the largest vocabularies need half of it


class Reader(Protocol):
    """An open file of known size that is read by position."""

    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) from `offset`. Raises CheckpointError if the file ends first or cannot be read."""

    def close(self) -> None:
        """Close the file."""


class Folder(Protocol):
    """A directory that holds a checkpoint."""

    label: str  # its name in messages

    def names(self) -> list[str]:
        """Return the names of the plain files in it, sorted."""

    def walk(self) -> list[str]:
        """Return all files in it and below it, links included, as sorted relative paths."""

    def has(self, name: str) -> bool:
        """Return True if it holds a file of that name."""

    def read(self, name: str, limit: int = SMALL_FILE_LIMIT) -> bytes:
        """Return a small file's bytes. Raises CheckpointError if it is missing, unsafe or larger than `limit` bytes."""

    def open(self, name: str) -> Reader:
        """Open a large file for reading by position. Raises CheckpointError."""

    def changed(self) -> list[str]:
        """Return the files, sorted, that were changed since the folder was opened, as far as that can be detected."""


class LocalReader:
    """A local file, read with `preadv` into the caller's memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        try:
            # Without O_NONBLOCK, opening a pipe waits for its writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:  # a NUL in the name
            raise CheckpointError(f"cannot read {str(path)!r}: {error}") from None
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is no plain file: do not use this checkpoint")
        self.size = status.st_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`, in as many calls as the kernel needs."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self._path}: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{self._path} ends at byte {offset + done}: it is truncated, fetch it again")
            done += count

    def close(self) -> None:
        """Close the descriptor, once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        with suppress(OSError):
            self.close()


class LocalFolder:
    """A directory on a disk of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)

    def names(self) -> list[str]:
        """Return the names of the plain files in it, sorted."""
        try:
            return sorted(entry.name for entry in os.scandir(self.path) if entry.is_file())
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from None

    def walk(self) -> list[str]:
        """Return all files in it and below it; links are listed, never followed."""
        paths = (path for path in self.path.rglob("*") if path.is_symlink() or not path.is_dir())
        return sorted(path.relative_to(self.path).as_posix() for path in paths)

    def has(self, name: str) -> bool:
        """Return True if it holds a file of that name."""
        return (self.path / name).is_file()

    def read(self, name: str, limit: int = SMALL_FILE_LIMIT) -> bytes:
        """Return a small file's bytes."""
        return read_whole(self.open(name), str(self.path / name), limit)

    def open(self, name: str) -> Reader:
        """Open a file for reading by position."""
        return LocalReader(self._inside(name))

    def changed(self) -> list[str]:
        """Return nothing: an open file keeps its bytes when another file takes its name."""
        return []

    def _inside(self, name: str) -> Path:
        """Return the path of a file. Raises CheckpointError if a stranger's name or link leads outside the directory."""
        if leads_outside(name):
            raise CheckpointError(f"{self.path}: {name!r} points outside the directory: do not use this checkpoint")
        path = self.path / name
        try:
            inner = path.parents[: len(path.parts) - len(self.path.parts) - 1]  # the folders between
            linked = path.is_symlink() or any(folder.is_symlink() for folder in inner)
            real, home = (path.resolve(), self.path.resolve()) if linked else (path, self.path)
        except (OSError, RuntimeError) as error:  # a name that is too long; links in a circle
            raise CheckpointError(f"cannot read {path}: {error}") from None
        if linked:
            # The Hub's cache keeps snapshots/REVISION/NAME as links to blobs/SHA beside snapshots/.
            blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
            if not real.is_relative_to(home) and not (blobs and real.parent == blobs):
                raise CheckpointError(f"{path} is a link to outside its directory: copy the file in its place")
        return path


def read_whole(reader: Reader, label: str, limit: int) -> bytes:
    """Return all bytes of an open file, and close it. Raises CheckpointError if there are more than `limit`."""
    with closing(reader):
        if reader.size > limit:
            raise CheckpointError(f"{label} is larger than {limit / (1 << 20):g} MiB: this is not what it should be")
        data = bytearray(reader.size)
        reader.read_into(0, memoryview(data))
    return bytes(data)


def leads_outside(name: str) -> bool:
    """Return True if a stranger's file name is not that of a file in the directory or in a folder inside it.

    >>> [leads_outside(name) for name in ("a.json", "1_Pooling/config.json", "../a", "/etc/passwd", "a/../../b", "a/b/c")]
    [False, False, True, True, True, False]
    """
    parts = PurePosixPath(name).parts
    return not name or name != "/".join(parts) or parts[0] == "/" or ".." in parts or "\\" in name
