"""`coldctl lineage`: where a model came from and whose contributions it carries."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coldctl.artifacts import layout, run, signatures
from coldctl.artifacts.lineage import Carried, Generation, carried, generations, known_keys, unsigned
from coldctl.artifacts.manifest import Manifest, parse
from coldctl.artifacts.model_ref import Model, resolve
from coldctl.common.errors import ConfigError, ManifestError
from coldctl.storage.location import is_url, locate


@dataclass(frozen=True)
class Carrier:
    """A model that was searched for a signer's contributions, to itself and to its ancestors."""

    place: str
    name: str
    iteration: int | None
    body_digest: str
    carried: tuple[Carried, ...]
    unsigned: int  # fused contributions without a known signer


def lineage(model: Model) -> list[Generation]:
    """Return the generations from the pretrained model to `model`, oldest first. Raises ManifestError."""
    return generations(_manifest(model))


def carriers(references: Sequence[str], signer: str) -> list[Carrier]:
    """Return which contributions of a signer the models carry. A RUN stands for the fused models of all its iterations.

    `signer` is a public key's file, or the name of a trusted key. Raises ManifestError, and ConfigError for a name that
    was trusted for none of the models.
    """
    models = [(model, _manifest(model)) for reference in references for model in _models(reference)]
    ancestries = [generations(document) for _, document in models]
    fingerprint = None
    if Path(signer).is_file():
        fingerprint = signatures.public_key(Path(signer), "--signer").fingerprint
    else:
        names = sorted({name for ancestry in ancestries for name in known_keys(ancestry)})
        if signer not in names:
            raise ConfigError(
                f"--signer {signer} is no file, and no key of that name was trusted: "
                + (f"known are {', '.join(names)}" if names else "these models were fused without --trusted-keys")
            )
    return [
        Carrier(
            model.place,
            str(document["name"]),
            document.get("iteration"),
            document["body_digest"],
            tuple(carried(ancestry, signer, fingerprint)),
            unsigned(ancestry),
        )
        for (model, document), ancestry in zip(models, ancestries, strict=True)
    ]


def in_words(carrier: Carrier) -> str:
    """Return the contributions that one model carries as a list in text."""
    return ", ".join(
        f"{each.contribution} (iteration {each.iteration}, weight {each.weight:.3g})" for each in carrier.carried
    )


def _models(reference: str) -> list[Model]:
    place = locate(reference)
    if not (is_url(reference) or place.is_dir()) or not run.is_run(place):
        return [resolve(reference)]
    fused = [layout.fused(place, number) for number in layout.iteration_numbers(place)]
    models = [resolve(str(path)) for path in fused if layout.is_complete(path)]
    if not models:
        raise ManifestError(f"{reference} has no fused model yet: fuse its first iteration")
    return models


def _manifest(model: Model) -> Manifest:
    folder = model.folder
    if not folder.has(layout.MANIFEST):
        raise ManifestError(f"{folder.label} has no {layout.MANIFEST}: it does not say where it came from")
    return parse(folder.read(layout.MANIFEST), f"{folder.label}/{layout.MANIFEST}")
