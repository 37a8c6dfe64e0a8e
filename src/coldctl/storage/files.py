"""Read ranges of files, on a disk or in a store.

A `Folder` is a checkpoint's directory. Local files are read by position into the caller's buffer, so that
nothing is mapped or kept; remote ones by range requests.
"""

import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from coldctl.common.errors import CheckpointError, ModelError
from coldctl.storage.location import Location, is_url, locate

SMALL_FILE_LIMIT = 64 << 20  # bytes; the largest vocabularies need half of it
_KEPT_FILE = 1 << 20  # bytes; what is read of a store and is no larger is kept for whoever asks next
_FIRST_WINDOW = 64 << 10  # bytes; a safetensors header, usually
_LARGEST_WINDOW = 16 << 20
_WINDOWS = 768 << 20  # bytes that are held ahead of all files that are read side by side
_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds between tries

T = TypeVar("T")


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

    def changed(self) -> list[str]:
        """The files, sorted, that are not any more what they were when the folder was opened, where that can be told."""


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

    def changed(self) -> list[str]:
        """None: an open file stays what it is when another one takes its name."""
        return []

    def _inside(self, name: str) -> Path:
        """The file's real path; a stranger's checkpoint must not reach outside its own directory."""
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


class RemoteReader:
    """A file in a store, read by range requests of at least `window` bytes: what follows is usually asked for next."""

    def __init__(self, folder: "RemoteFolder", path: str, size: int, label: str) -> None:
        self._folder, self._path, self._label = folder, path, label
        self.size = size
        self._held = 0, b""  # where the window begins, and its bytes: one value, since threads may share a reader

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`, from what is held or by requests."""
        done = 0
        while done < len(buffer):
            at = offset + done
            start, held = self._held
            if not start <= at < start + len(held):
                stop = min(self.size, at + max(self._folder.window, len(buffer) - done))
                if at >= stop:
                    raise CheckpointError(f"{self._label} ends at byte {self.size}: it is truncated, store it again")
                start, held = self._held = at, self._fetched(at, stop)
            part = memoryview(held)[at - start :][: len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def close(self) -> None:
        """What is held stays for whoever opens the file next: its header is often the beginning of what is read then."""

    def _fetched(self, start: int, stop: int) -> bytes:
        def fetch() -> bytes:
            data = bytes(self._folder.filesystem.cat_file(self._path, start=start, end=stop))
            if len(data) != stop - start:
                raise _ShortError(f"{len(data)} of {stop - start} bytes came")
            return data

        return _persistently(fetch, self._label)


class _ShortError(OSError):
    """A store sent fewer bytes than it was asked for."""


def _persistently(fetch: Callable[[], T], label: str) -> T:
    """What `fetch` returns, tried again when a request fails, breaks off or is refused for a while.

    Raises CheckpointError at once where another try cannot help, else after the last one.
    """
    pauses = iter(_PAUSES)
    while True:
        try:
            return fetch()
        except FileNotFoundError:
            raise CheckpointError(f"{label} is missing: it was removed, or never stored") from None
        except PermissionError as error:
            raise CheckpointError(f"cannot read {label}: {error}: check your credentials") from None
        except Exception as error:  # each store has exceptions of its own
            if (pause := next(pauses, None)) is None:
                reason = " ".join(str(error).split()) or type(error).__name__
                tries = len(_PAUSES) + 1
                raise CheckpointError(f"cannot read {label} in {tries} tries: {reason}: try again later") from None
            time.sleep(pause)


class RemoteFolder:
    """A directory in a store that fsspec knows. It is listed once, when it is first asked about."""

    def __init__(self, url: str, entries: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """`entries` are what a listing has already said about its files: by name, with size and version."""
        self.label = url
        self.window = _FIRST_WINDOW  # bytes that its readers ask for at least; whoever reads much sets it
        self.filesystem, self._root = _filesystem(url)
        self._entries = entries
        self._small: dict[str, bytes] = {}
        self._readers: dict[str, RemoteReader] = {}

    @property
    def entries(self) -> Mapping[str, Mapping[str, Any]]:
        """What the store says about each file in it and below, by name. Raises ModelError."""
        if self._entries is None:
            self._entries = _listed(self.filesystem, self._root, self.label)
        return self._entries

    def names(self) -> list[str]:
        """The plain files in it, sorted."""
        return sorted(name for name in self.entries if "/" not in name)

    def walk(self) -> list[str]:
        """All files in it and below it."""
        return sorted(self.entries)

    def has(self, name: str) -> bool:
        """Whether it holds a file of that name."""
        return name in self.entries

    def read(self, name: str, limit: int = SMALL_FILE_LIMIT) -> bytes:
        """A small file's bytes."""
        size = self._size(name)
        if size > limit:
            raise _too_large(f"{self.label}/{name}", limit)
        if name not in self._small:
            reader = self.open(name)
            data = bytearray(size)
            reader.read_into(0, memoryview(data))
            if size > _KEPT_FILE:
                return bytes(data)
            self._small[name] = bytes(data)
        return self._small[name]

    def open(self, name: str) -> Reader:
        """Open a file for range requests."""
        size = self._size(name)
        if name in self._small:
            return HeldReader(self._small[name], f"{self.label}/{name}")
        if name not in self._readers:
            self._readers[name] = RemoteReader(self, f"{self._root}/{name}", size, f"{self.label}/{name}")
        return self._readers[name]

    def versions(self) -> dict[str, list[str]]:
        """What tells this version of each file from others, as far as the store says."""
        return {name: list(_version(entry)) for name, entry in sorted(self.entries.items())}

    def changed(self) -> list[str]:
        """The files that are not any more what they were when the folder was listed, sorted. Raises ModelError."""
        before, now = self.entries, _listed(self.filesystem, self._root, self.label)
        return sorted(name for name in before if _version(before[name]) != _version(now.get(name, {})))

    def _size(self, name: str) -> int:
        if leads_outside(name):
            raise CheckpointError(f"{self.label}: {name!r} points outside the directory: do not use this checkpoint")
        if name not in self.entries:
            raise CheckpointError(f"cannot read {self.label}/{name}: no such file")
        if self.filesystem.protocol == ("file", "local"):  # links and pipes are as elsewhere on this machine
            LocalFolder(Path(self._root)).open(name).close()
        return int(self.entries[name]["size"] or 0)


class HeldReader:
    """A small file that was read before."""

    def __init__(self, data: bytes, label: str) -> None:
        self._data, self._label = data, label
        self.size = len(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        part = self._data[offset : offset + len(buffer)]
        if len(part) != len(buffer):
            raise CheckpointError(f"{self._label} ends at byte {self.size}: it is truncated, store it again")
        buffer[:] = part

    def close(self) -> None:
        """Nothing is held open."""


def remote_folders(url: str) -> tuple[Folder, dict[str, Folder]]:
    """A folder in a store, and the folders directly inside it by name, all from one listing. Raises ModelError."""
    whole = RemoteFolder(url)
    inside: dict[str, dict[str, Mapping[str, Any]]] = {}
    for path, entry in whole.entries.items():
        name, slash, rest = path.partition("/")
        if slash:
            inside.setdefault(name, {})[rest] = entry
    return whole, {name: RemoteFolder(f"{url}/{name}", found) for name, found in sorted(inside.items())}


def look_ahead(folders: Sequence[RemoteFolder]) -> None:
    """Let folders that are read side by side ask for pieces worth a request, which together fit the memory for them."""
    for folder in folders:
        folder.window = max(_FIRST_WINDOW, min(_LARGEST_WINDOW, _WINDOWS // len(folders)))


def _listed(filesystem: Any, root: str, label: str) -> dict[str, Mapping[str, Any]]:
    """Every file below `root`, by its path from there."""
    try:
        found = _persistently(lambda: filesystem.find(root, detail=True), label)
    except CheckpointError as error:
        raise ModelError(f"cannot list {label}: {error.message}: check the URL and your credentials") from None
    return {path[len(root) :].strip("/"): entry for path, entry in found.items() if path.strip("/") != root.strip("/")}


def _version(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells one version of a file in a store from another, as far as the store says."""
    return tuple(str(entry.get(key)) for key in ("size", "ETag", "etag", "generation", "mtime", "created", "blob_id"))


def _too_large(label: str, limit: int) -> CheckpointError:
    return CheckpointError(f"{label} is larger than {limit / (1 << 20):g} MiB: this is not what it should be")


def leads_outside(name: str) -> bool:
    """Whether a file name from a stranger is more than a name in the directory or in a folder inside it.

    >>> [leads_outside(name) for name in ("a.json", "1_Pooling/config.json", "../a", "/etc/passwd", "a/../../b", "a/b/c")]
    [False, False, True, True, True, False]
    """
    parts = PurePosixPath(name).parts
    return not name or name != "/".join(parts) or parts[0] == "/" or ".." in parts or "\\" in name


def open_folder(reference: "str | Location") -> Folder:
    """The folder at a local path or a URL. Raises ModelError for a scheme whose library is missing."""
    place = str(reference)
    return RemoteFolder(place) if is_url(place) else LocalFolder(Path(place))


def download(source: RemoteFolder, folder: Path, patterns: Sequence[str] | None) -> None:
    """Copy files of a remote folder into a local one: those directly in it that match `patterns`; None means all, also below.

    Raises CheckpointError or ModelError.
    """
    filesystem, root = _filesystem(source.label)
    names = source.walk() if patterns is None else source.names()
    for name in names:
        if patterns is not None and not any(fnmatch(name, pattern) for pattern in patterns):
            continue  # never code, never pickles
        source.open(name)  # refuses what may not be read
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _persistently(partial(filesystem.get_file, f"{root}/{name}", str(folder / name)), f"{source.label}/{name}")


def _filesystem(url: str) -> tuple[Any, str]:
    found: Any = locate(url)
    return found.fs, found.path.rstrip("/")
