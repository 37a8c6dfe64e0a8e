"""Locations: paths of this machine or of a store.

So the directory contract is written once (`RUN / "run.json"`), whether RUN is `runs/demo` or `s3://bucket/runs/demo`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union, cast

from coldctl.common.errors import ModelError

if TYPE_CHECKING:
    from upath import UPath

Location: TypeAlias = Union[Path, "UPath"]  # a name in quotes takes no other spelling

# Other machines write to the same store, so listings are never kept.
STORE_OPTIONS: Mapping[str, Any] = {"use_listings_cache": False}
_STORE_LIBRARIES = (
    "aiobotocore",
    "aiohttp",
    "azure",
    "adlfs",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "httpx",
    "s3fs",
)


def is_url(reference: str) -> bool:
    """Return True if a reference names a store of fsspec, such as `s3://bucket/folder` or `memory://folder`."""
    return re.match(r"[a-z][a-z0-9+.-]*://", reference) is not None


def locate(reference: "str | Location") -> Location:
    """Return the location that a reference means: a path in a store for a URL, else a path of this machine.

    Raises ModelError for a scheme whose library is missing.
    """
    if not isinstance(reference, str):
        return reference
    if not is_url(reference):
        return Path(reference).expanduser()
    from upath import UPath

    try:
        place = UPath(reference.rstrip("/"), **STORE_OPTIONS)
        place.fs  # noqa: B018 # the store's library is imported here
    except (ImportError, ValueError) as error:
        raise ModelError(f"cannot open {reference}: {error}") from None
    return cast("UPath", place)


def in_store(location: Location) -> bool:
    """Return True if a location lies in a store, not on this machine."""
    return not isinstance(location, Path)


def raised_by_store(error: BaseException) -> bool:
    """Return True if an exception comes from a library that talks to a store: they share no class of their own."""
    return type(error).__module__.partition(".")[0] in _STORE_LIBRARIES


def children(folder: Location) -> list[Location]:
    """Return the entries of a folder, sorted by name. Raises OSError."""
    entries: Any = folder.iterdir()
    return sorted(entries, key=lambda child: str(child.name))
