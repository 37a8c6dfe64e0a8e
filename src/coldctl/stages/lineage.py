"""`coldctl lineage`: where a model came from, read from its own manifest alone."""

from dataclasses import dataclass
from typing import Any

from coldctl.core import layout
from coldctl.core.errors import ManifestError
from coldctl.core.manifest import parse
from coldctl.core.reference import Model


@dataclass(frozen=True)
class Generation:
    """One model of the ancestry, with the contributions that were fused into it (or refused)."""

    kind: str
    name: str
    iteration: int | None
    body_digest: str
    contributions: tuple[dict[str, Any], ...]


def lineage(model: Model) -> list[Generation]:
    """The generations from the pretrained model to `model`, oldest first. Raises ManifestError."""
    folder = model.folder
    if not folder.has(layout.MANIFEST):
        raise ManifestError(f"{folder.label} has no {layout.MANIFEST}: it does not say where it came from")
    document = parse(folder.read(layout.MANIFEST), f"{folder.label}/{layout.MANIFEST}")
    ancestors: list[dict[str, Any]] = list(document.get("ancestors", []))
    if not ancestors and "base" in document:  # a contribution names its base only
        ancestors = [{"kind": "base", **document["base"]}]
    return [_generation(entry) for entry in [*ancestors, dict(document)]]


def _generation(entry: dict[str, Any]) -> Generation:
    return Generation(
        str(entry.get("kind", "model")),
        str(entry.get("name", "?")),
        entry.get("iteration"),
        str(entry.get("body_digest", "")),
        tuple(item for item in entry.get("contributions", []) if isinstance(item, dict)),
    )
