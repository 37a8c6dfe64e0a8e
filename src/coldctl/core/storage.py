"""Reading ranges of files, on this machine or in any store that fsspec knows.

A `Folder` is a checkpoint's directory. Local files are read by position into the caller's buffer, so that
nothing is mapped or kept; remote ones by range requests.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from coldctl.core import layout
from coldctl.core.errors import CheckpointError, ModelError
from coldctl.core.progress import Progress

SMALL_FILE_LIMIT = 64 << 20  # bytes; the largest vocabularies need half of it


class Reader(Protocol):
    """An open file of known size that is read by position."""

    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) from `offset`. Raises CheckpointError if the file ends first or cannot be read."""

    def close(self) -> None:
        """Let go of the file."""


class Folder(Protocol):
    """A directory that holds a checkpoint."""

    label: str  # how messages name it

    def names(self) -> list[str]:
        """The plain files in it, sorted."""

    def walk(self) -> list[str]:
        """All files in it and below it, links among them, as paths from it, sorted."""

    def has(self, name: str) -> bool:
        """Whether it holds a file of that name."""

    def read(self, name: str, limit: int = SMALL_FILE_LIMIT) -> bytes:
        """A small file's bytes. Raises CheckpointError if it is missing, unsafe or larger than `limit` bytes."""

    def open(self, name: str) -> Reader:
        """Open a large file for reading by position. Raises CheckpointError."""


class LocalReader:
    """A local file, read with `preadv` into the caller's memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:  # a NUL in the name
            raise CheckpointError(f"cannot read {str(path)!r}: {error}") from None
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is no plain file: do not use this checkpoint")
        self.size = found.st_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`, however many calls the kernel needs."""
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
    """A directory of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)

    def names(self) -> list[str]:
        """The plain files in it, sorted."""
        try:
            return sorted(entry.name for entry in os.scandir(self.path) if entry.is_file())
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from None

    def walk(self) -> list[str]:
        """All files in it and below it; links are listed, never followed."""
        found = (path for path in self.path.rglob("*") if path.is_symlink() or not path.is_dir())
        return sorted(path.relative_to(self.path).as_posix() for path in found)

    def has(self, name: str) -> bool:
        """Whether it holds a file of that name."""
        return (self.path / name).is_file()

    def read(self, name: str, limit: int = SMALL_FILE_LIMIT) -> bytes:
        """A small file's bytes."""
        reader = LocalReader(self._inside(name))
        try:
            if reader.size > limit:
                raise _too_large(str(self.path / name), limit)
            data = bytearray(reader.size)
            reader.read_into(0, memoryview(data))
        finally:
            reader.close()
        return bytes(data)

    def open(self, name: str) -> Reader:
        """Open a file for reading by position."""
        return LocalReader(self._inside(name))

    def _inside(self, name: str) -> Path:
        """The file's real path; a stranger's checkpoint must not reach outside its own directory."""
        if leads_outside(name):
            raise CheckpointError(f"{self.path}: {name!r} points outside the directory: do not use this checkpoint")
        path = self.path / name
        if path.is_symlink() or (path.parent != self.path and path.parent.is_symlink()):
            real, home = path.resolve(), self.path.resolve()
            # The Hub's cache keeps snapshots/REVISION/NAME as links to blobs/SHA beside snapshots/.
            blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
            if not real.is_relative_to(home) and not (blobs and real.parent == blobs):
                raise CheckpointError(f"{path} is a link to outside its directory: copy the file in its place")
        return path


class RemoteReader:
    """A file in a store, read by range requests."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self.size = int(filesystem.size(path) or 0)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` with one range request."""
        try:
            data = self._filesystem.cat_file(self._path, start=offset, end=offset + len(buffer))
        except Exception as error:  # each store has exceptions of its own
            raise CheckpointError(f"cannot read {self._path}: {error}") from None
        if len(data) != len(buffer):
            raise CheckpointError(f"{self._path} ends at byte {offset + len(data)}: it is truncated, store it again")
        buffer[:] = data

    def close(self) -> None:
        """Nothing is held between requests."""


class RemoteFolder:
    """A directory in a store that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.label = url
        self._filesystem, self._root = _filesystem(url)

    def names(self) -> list[str]:
        """The plain files in it, sorted."""
        return sorted(name for name, kind in self._entries() if kind == "file")

    def walk(self) -> list[str]:
        """All files in it and below it."""
        try:
            found = self._filesystem.find(self._root)
        except Exception as error:  # each store has exceptions of its own
            raise ModelError(f"cannot list {self.label}: {error}: check the URL and your credentials") from None
        return sorted(str(path).removeprefix(f"{self._root}/") for path in found)

    def has(self, name: str) -> bool:
        """Whether it holds a file of that name."""
        return bool(self._filesystem.isfile(f"{self._root}/{name}"))

    def read(self, name: str, limit: int = SMALL_FILE_LIMIT) -> bytes:
        """A small file's bytes."""
        if leads_outside(name):
            raise CheckpointError(f"{self.label}: {name!r} points outside the directory: do not use this checkpoint")
        try:
            if self._filesystem.size(f"{self._root}/{name}") > limit:
                raise _too_large(f"{self.label}/{name}", limit)
            return bytes(self._filesystem.cat_file(f"{self._root}/{name}"))
        except CheckpointError:
            raise
        except Exception as error:  # each store has exceptions of its own
            raise CheckpointError(f"cannot read {self.label}/{name}: {error}") from None

    def open(self, name: str) -> Reader:
        """Open a file for range requests."""
        if leads_outside(name):
            raise CheckpointError(f"{self.label}: {name!r} points outside the directory: do not use this checkpoint")
        return RemoteReader(self._filesystem, f"{self._root}/{name}")

    def folders(self) -> list[str]:
        """The directories in it, sorted."""
        return sorted(name for name, kind in self._entries() if kind == "directory")

    def _entries(self) -> Iterator[tuple[str, str]]:
        try:
            listing = self._filesystem.ls(self._root, detail=True)
        except Exception as error:  # each store has exceptions of its own
            raise ModelError(f"cannot list {self.label}: {error}: check the URL and your credentials") from None
        for entry in listing:
            yield PurePosixPath(entry["name"]).name, entry["type"]


def _too_large(label: str, limit: int) -> CheckpointError:
    return CheckpointError(f"{label} is larger than {limit / (1 << 20):g} MiB: this is not what it should be")


def leads_outside(name: str) -> bool:
    """Whether a file name from a stranger is more than a name in the directory or in a folder directly inside it.

    >>> [leads_outside(name) for name in ("a.json", "1_Pooling/config.json", "../a", "/etc/passwd", "a/../../b", "a/b/c")]
    [False, False, True, True, True, True]
    """
    parts = PurePosixPath(name).parts
    return not name or name != "/".join(parts) or len(parts) > 2 or ".." in parts or "\\" in name


def is_url(reference: str) -> bool:
    """Whether a reference names a store of fsspec, such as `s3://bucket/folder` or `memory://folder`."""
    return re.match(r"[a-z][a-z0-9+.-]*://", reference) is not None


def open_folder(reference: str | Path) -> Folder:
    """The folder at a local path or a URL. Raises ModelError for a scheme whose library is missing."""
    if isinstance(reference, str) and is_url(reference):
        return RemoteFolder(reference)
    return LocalFolder(Path(reference))


def subfolders(reference: str | Path) -> list[str | Path]:
    """References of the directories directly inside a folder, sorted by name."""
    if isinstance(reference, str) and is_url(reference):
        return [f"{reference.rstrip('/')}/{name}" for name in RemoteFolder(reference).folders()]
    try:
        return sorted(child for child in Path(reference).iterdir() if child.is_dir())
    except OSError as error:
        raise ModelError(f"cannot read {reference}: {error.strerror}: check the path") from None


def download(url: str, folder: Path) -> Path:
    """Copy the plain files of a remote folder into a local one, for libraries that need paths. Returns `folder`."""
    filesystem, root = _filesystem(url)
    folder.mkdir(parents=True, exist_ok=True)
    for name in RemoteFolder(url).names():
        if not any(fnmatch(name, pattern) for pattern in layout.MODEL_FILES):
            continue  # never code, never pickles
        filesystem.get_file(f"{root}/{name}", str(folder / name))
    return folder


def exists(url: str) -> bool:
    """Whether there is anything at a URL. Raises ModelError for a scheme whose library is missing."""
    filesystem, root = _filesystem(url)
    return bool(filesystem.exists(root))


def staging_of(url: str) -> str:
    """Where a folder in a store is put together before it takes its place: a hidden sibling."""
    parent, _, name = url.rstrip("/").rpartition("/")
    return f"{parent}/.{name}.partial"


def replace_folder(folder: Path, url: str, progress: Progress) -> None:
    """Put the files of a local folder where `url` points, in place of what stands there.

    They are stored in `staging_of(url)` first and copied from there by the store itself, the manifest last: what is long
    and may break leaves `url` alone. Raises what the store raises.
    """
    filesystem, root = _filesystem(url)
    staging = _filesystem(staging_of(url))[1]
    if filesystem.exists(staging):
        filesystem.rm(staging, recursive=True)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files.sort(key=lambda item: item == layout.MANIFEST)  # the manifest is last: it means "complete"
    progress.begin("store", sum((folder / item).stat().st_size for item in files), "bytes")
    for item in files:
        filesystem.makedirs(f"{staging}/{item}".rpartition("/")[0], exist_ok=True)
        filesystem.put_file(str(folder / item), f"{staging}/{item}")
        progress.advance("store", (folder / item).stat().st_size)
    progress.end("store")
    before = {path.removeprefix(f"{root}/") for path in filesystem.find(root)} if filesystem.exists(root) else set()
    for item in files:
        filesystem.makedirs(f"{root}/{item}".rpartition("/")[0], exist_ok=True)
        filesystem.cp_file(f"{staging}/{item}", f"{root}/{item}")
    for item in sorted(before.difference(files)):
        filesystem.rm_file(f"{root}/{item}")
    filesystem.rm(staging, recursive=True)


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ModelError(f"cannot open {url}: {error}") from None
    return filesystem, root.rstrip("/")
