"""The user's cache: what may be deleted at any time, and is then computed, fetched or begun anew."""

import os
from pathlib import Path


def folder(kind: str) -> Path:
    """Where one kind of thing is kept: in `$COLDCTL_CACHE`, else in `coldctl` under the user's cache directory."""
    if given := os.environ.get("COLDCTL_CACHE"):
        return Path(given).expanduser() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coldctl" / kind
