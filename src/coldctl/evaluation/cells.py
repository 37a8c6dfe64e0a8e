"""The cells of an evaluation on disk: one measurement each, proven by a digest before it is believed.

A cell that is missing, cut short or changed is as good as none: it is measured again.
"""

import json
from collections.abc import Mapping
from typing import Any

from coldctl.artifacts import output
from coldctl.common.digests import digest_of
from coldctl.storage.location import Location


def write(path: Location, document: Mapping[str, Any]) -> None:
    """Write a measurement, atomically. Raises OutputError."""
    output.write_text(path, json.dumps({**document, "digest": digest_of(document)}) + "\n")


def read(path: Location) -> dict[str, Any] | None:
    """A measurement as it was written; None if there is no such."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        stated = document.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    found: dict[str, Any] = document
    return found if stated == digest_of(found) else None
