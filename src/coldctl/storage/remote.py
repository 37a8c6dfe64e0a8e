"""Read checkpoints' files in any store that fsspec knows, by range requests that are tried again when they fail."""

import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from coldctl.common.errors import CheckpointError, ModelError
from coldctl.storage.local import SMALL_FILE_LIMIT, Folder, LocalFolder, Reader, leads_outside, read_whole
from coldctl.storage.location import Location, is_url, locate

_FIRST_WINDOW = 64 << 10  # bytes; usually a whole safetensors header
_LARGEST_WINDOW = 16 << 20  # bytes
_WINDOWS = 768 << 20  # bytes of the windows of all files that are read side by side
_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds between tries

T = TypeVar("T")


class RemoteReader:
    """A file in a store, read by requests of at least `window` bytes, because the next bytes are usually read next."""

    def __init__(self, folder: "RemoteFolder", path: str, size: int, label: str) -> None:
        self._folder, self._path, self._label = folder, path, label
        self.size = size
        # Offset and bytes of the window: one value, because threads may share a reader.
        self._held = 0, b""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`, from the window or by requests."""
        done = 0
        while done < len(buffer):
            at = offset + done
            start, held = self._held
            if not start <= at < start + len(held):
                stop = min(self.size, at + max(self._folder.window, len(buffer) - done))
                if at >= stop:
                    raise CheckpointError(f"{self._label} ends at byte {self.size}: it is truncated, store it again")
                start, held = self._held = at, self._fetch(at, stop)
            chunk = memoryview(held)[at - start :][: len(buffer) - done]
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)

    def close(self) -> None:
        """Keep the window for the next reader of the file, which often begins with the header again."""

    def _fetch(self, start: int, stop: int) -> bytes:
        def request() -> bytes:
            data = bytes(self._folder.filesystem.cat_file(self._path, start=start, end=stop))
            if len(data) != stop - start:
                raise _ShortError(f"{len(data)} of {stop - start} bytes came")
            return data

        return _with_retries(request, self._label)


class _ShortError(OSError):
    """A store sent fewer bytes than it was asked for."""


def _with_retries(request: Callable[[], T], label: str) -> T:
    """Return what `request` returns, and try again after errors that may pass.

    Raises CheckpointError for a missing file or permission at once, for other errors after the last try.
    """
    pauses = iter(_PAUSES)
    while True:
        try:
            return request()
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
    """A directory in a store that fsspec knows. It is listed once, on first use."""

    def __init__(self, url: str, entries: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """`entries` are its files as listed before: by name, with size and version."""
        self.label = url
        self.window = _FIRST_WINDOW  # bytes of its readers' requests at least; `look_ahead` sets it
        self.filesystem, self._root = _filesystem(url)
        self._entries = entries
        self._readers: dict[str, RemoteReader] = {}

    @property
    def entries(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the store's description of each file in it and below, by relative path. Raises ModelError."""
        if self._entries is None:
            self._entries = _listed(self.filesystem, self._root, self.label)
        return self._entries

    def names(self) -> list[str]:
        """Return the names of the plain files in it, sorted."""
        return sorted(name for name in self.entries if "/" not in name)

    def walk(self) -> list[str]:
        """Return all files in it and below it, sorted."""
        return sorted(self.entries)

    def has(self, name: str) -> bool:
        """Return True if it holds a file of that name."""
        return name in self.entries

    def read(self, name: str, limit: int = SMALL_FILE_LIMIT) -> bytes:
        """Return a small file's bytes."""
        return read_whole(self.open(name), f"{self.label}/{name}", limit)

    def open(self, name: str) -> Reader:
        """Open a file for range requests."""
        size = self._size(name)
        if name not in self._readers:
            self._readers[name] = RemoteReader(self, f"{self._root}/{name}", size, f"{self.label}/{name}")
        return self._readers[name]

    def versions(self) -> dict[str, list[str]]:
        """Return the version of each file, as far as the store states one."""
        return {name: list(_version(entry)) for name, entry in sorted(self.entries.items())}

    def changed(self) -> list[str]:
        """Return the files, sorted, that were changed since the folder was listed. Raises ModelError."""
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


def remote_folders(url: str) -> tuple[Folder, dict[str, Folder]]:
    """Return a folder in a store, and the folders directly inside it by name, from one listing. Raises ModelError."""
    outer = RemoteFolder(url)
    inside: dict[str, dict[str, Mapping[str, Any]]] = {}
    for path, entry in outer.entries.items():
        name, slash, file = path.partition("/")
        if slash:
            inside.setdefault(name, {})[file] = entry
    return outer, {name: RemoteFolder(f"{url}/{name}", entries) for name, entries in sorted(inside.items())}


def look_ahead(folders: Sequence[RemoteFolder]) -> None:
    """Set the windows of folders that are read side by side: as large as the memory for all of them allows."""
    for folder in folders:
        folder.window = max(_FIRST_WINDOW, min(_LARGEST_WINDOW, _WINDOWS // len(folders)))


def _listed(filesystem: Any, root: str, label: str) -> dict[str, Mapping[str, Any]]:
    """Return every file below `root`, by relative path."""
    try:
        entries = _with_retries(lambda: filesystem.find(root, detail=True), label)
    except CheckpointError as error:
        raise ModelError(f"cannot list {label}: {error.message}: check the URL and your credentials") from None
    return {
        path[len(root) :].strip("/"): entry for path, entry in entries.items() if path.strip("/") != root.strip("/")
    }


def _version(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a store states about a file that differs between versions."""
    return tuple(str(entry.get(key)) for key in ("size", "ETag", "etag", "generation", "mtime", "created", "blob_id"))


def open_folder(reference: "str | Location") -> Folder:
    """Return the folder at a local path or a URL. Raises ModelError for a scheme whose library is missing."""
    place = str(reference)
    return RemoteFolder(place) if is_url(place) else LocalFolder(Path(place))


def download(source: RemoteFolder, folder: Path, patterns: Sequence[str] | None) -> None:
    """Copy the files directly in a remote folder that match `patterns` into a local one; None means all, also in folders below.

    Raises CheckpointError or ModelError.
    """
    filesystem, root = _filesystem(source.label)
    names = source.walk() if patterns is None else source.names()
    for name in names:
        if patterns is not None and not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        source.open(name)  # raises for unsafe names and links
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _with_retries(partial(filesystem.get_file, f"{root}/{name}", str(folder / name)), f"{source.label}/{name}")


def _filesystem(url: str) -> tuple[Any, str]:
    place: Any = locate(url)
    return place.fs, place.path.rstrip("/")
