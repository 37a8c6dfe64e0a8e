"""The hidden partial directory of an output: its identity, and how it is cleared."""

import shutil
from pathlib import Path

from coldctl.artifacts import layout
from coldctl.common.errors import OutputError
from coldctl.storage.location import Location, children

IDENTITY = ".identity"  # which config and inputs the unfinished work belongs to
LEASE = ".lease"  # in a store, in place of a lock
WHOLE = " whole"  # behind the identity: everything is written, only the rename is missing


def claim(partial: Location, path: Location, identity: str | None, *, overwrite: bool) -> None:
    """Keep the unfinished work on `path` if it has the same identity, else clear the directory and mark it as ours.

    Without an `identity` nothing is kept. Raises OutputError if other work is there and `overwrite` is not given.
    """
    marker = partial / IDENTITY
    earlier = marker.read_text(encoding="utf-8").removesuffix(WHOLE) if marker.is_file() else None
    if identity and earlier == identity:
        (partial / layout.MANIFEST).unlink(missing_ok=True)  # of a call that was killed while it wrote it
        return
    has_files = any(child.name not in (IDENTITY, LEASE) for child in children(partial))
    if earlier is not None and has_files and identity is not None and not overwrite:
        raise OutputError(
            f"{partial} holds unfinished work on {path.name} under another config or other inputs: "
            "give --overwrite to drop it, or repeat the earlier command to finish it"
        )
    clear(partial, keep=(LEASE,))
    marker.write_text(identity or "", encoding="utf-8")


def clear(folder: Location, *, keep: tuple[str, ...]) -> None:
    """Remove everything in a folder except the files named in `keep`."""
    for child in children(folder):
        if child.name in keep:
            continue
        if not isinstance(child, Path):
            child.fs.rm(child.path, recursive=True)
        elif child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()
