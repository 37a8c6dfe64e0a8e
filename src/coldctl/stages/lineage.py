"""`coldctl lineage`: where a model came from, read from its own manifest alone."""

from coldctl.core import layout
from coldctl.core.errors import ManifestError
from coldctl.core.lineage import Generation, generations
from coldctl.core.manifest import parse
from coldctl.core.reference import Model


def lineage(model: Model) -> list[Generation]:
    """The generations from the pretrained model to `model`, oldest first. Raises ManifestError."""
    folder = model.folder
    if not folder.has(layout.MANIFEST):
        raise ManifestError(f"{folder.label} has no {layout.MANIFEST}: it does not say where it came from")
    return generations(parse(folder.read(layout.MANIFEST), f"{folder.label}/{layout.MANIFEST}"))
