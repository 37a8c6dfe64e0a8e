"""Find a MODEL: a directory, a Hub id, a URL, or a RUN."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coldctl.artifacts import layout, manifest, run
from coldctl.common.errors import ColdctlError, ManifestError, ModelError
from coldctl.storage import user_cache
from coldctl.storage.local import Folder
from coldctl.storage.location import Location, is_url, locate
from coldctl.storage.remote import RemoteFolder, open_folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Model:
    """A resolved MODEL: `place` is its local directory or URL, `name` its name in reports and manifests."""

    name: str
    place: str

    @property
    def folder(self) -> Folder:
        """Return its folder for reading ranges, without a copy."""
        return open_folder(self.place)

    def local(self) -> Path:
        """Return a local directory with its files: a copy in the user's cache if it is in a store. Raises ModelError."""
        if not is_url(self.place):
            return Path(self.place)
        return user_cache.local_copy(RemoteFolder(self.place), layout.MODEL_FILES, _is_unchanged)


def _is_unchanged(copy: Path) -> bool:
    """Return True if a copy's files have the digests that its manifest states, or there is no manifest."""
    if not (copy / layout.MANIFEST).is_file():
        return True
    try:
        stated = manifest.read(copy)["files"]
    except ManifestError:
        return False
    paths = [path for path in copy.rglob("*") if path.name != layout.MANIFEST]
    return all(stated.get(path.relative_to(copy).as_posix()) == manifest.digest_of_file(path) for path in paths)


def memory_needed(model: Model, *, training: bool) -> int:
    """Estimate the memory in bytes of a process that computes with a model, or trains it, for a cluster to reserve.

    Training holds weights, gradients, AdamW's two states, the best weights so far and a copy to be written.
    """
    weights = 0
    # The worker that opens the model reports what is wrong with it.
    with suppress(ColdctlError):
        folder = model.folder
        for name in folder.names():
            if name.endswith(".safetensors"):
                reader = folder.open(name)
                weights += reader.size
                reader.close()
    return 6 * weights + (2 << 30) if training else 2 * weights + (1 << 30)


def resolve(reference: str, revision: str | None = None) -> Model:
    """Return the model that a MODEL means. A RUN stands for its newest promoted fused model, else its pretrained model.

    Raises ModelError if there is none, with what was tried.
    """
    path = locate(reference)
    if is_url(reference) or path.is_dir():
        if run.is_run(path):
            started = run.read(path)
            return resolve(started.base_model, started.revision)
        return Model(_directory_name(path), str(path))
    if path.exists():
        raise ModelError(f"{reference} is a file: give the directory that holds the model")
    if reference.startswith((".", "/", "~")) or not HUB_ID.fullmatch(reference):
        raise ModelError(f"no directory {reference}: check the path")
    return Model(reference, _from_hub(reference, revision))


def _directory_name(path: Location) -> str:
    """Return a directory's own name, or `iteration-N` for a fused model of a RUN; never more of the path."""
    absolute = path.resolve()
    if absolute.name == "fused" and absolute.parent.name.startswith("iteration-"):
        return absolute.parent.name
    return as_text(absolute.name)


def as_text(name: str) -> str:
    """Return a file's name with `?` for bytes that are not UTF-8, which no JSON document can hold.

    >>> as_text("a" + chr(0xDCFF))
    'a?'
    """
    return name.encode("utf-8", "replace").decode()


def _from_hub(name: str, revision: str | None) -> str:
    """Return the local snapshot of a Hub model, downloaded if need be: weights as safetensors, config, tokenizer."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(layout.MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name!r} is no directory here and could not be fetched from the Hub{offline}: {reason}: "
            "check the name, or give a local directory"
        ) from None
