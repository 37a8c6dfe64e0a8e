"""Publishing targets: a directory of this machine, a folder in a store, the Hub."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coldctl.artifacts import layout, output, store_output
from coldctl.artifacts.manifest import Manifest, parse
from coldctl.common.errors import CheckpointError, ManifestError, OutputError
from coldctl.common.progress import Progress
from coldctl.storage.local import Folder, LocalFolder
from coldctl.storage.location import Location, locate
from coldctl.storage.remote import RemoteFolder


@dataclass
class Upload:
    """A directory that the caller fills, and what the target says about it after it was published."""

    folder: Path
    message: str = ""  # of a commit, where the target has commits
    tag: str | None = None
    place: str = ""  # its path or URL


class Target(Protocol):
    """A place that holds one published model."""

    label: str  # its name in messages
    reference: str  # what a user of the model writes to load it
    page: str | None = None  # the URL of its files, if a browser can open them

    def is_done(self, identity: str, *, overwrite: bool) -> bool:
        """Return True if it holds the same work already. Raises OutputError if it holds something else that must stay."""

    def current(self) -> tuple[str | None, Manifest | None]:
        """Return the card and the manifest that are there now, as far as they are readable."""

    def repair_tag(self, tag: str | None) -> None:
        """Set the tag of complete work that an interrupted command could not set."""

    def writing(self) -> AbstractContextManager[Upload]:
        """Yield a directory to fill, and publish it if the block ends well."""


class LocalTarget(Target):
    """A directory of this machine, replaced by one rename."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        # The whole path would tell where this machine keeps it.
        self.reference = path.resolve().name

    def is_done(self, identity: str, *, overwrite: bool) -> bool:
        """Return True if the directory holds the same work already."""
        return output.is_done(self.path, identity, overwrite=overwrite, flag="--to")

    def current(self) -> tuple[str | None, Manifest | None]:
        """Return the directory's card and manifest."""
        return current_in(LocalFolder(self.path)) if self.path.is_dir() else (None, None)

    def repair_tag(self, tag: str | None) -> None:
        """Do nothing: there are no tags."""

    @contextmanager
    def writing(self) -> Iterator[Upload]:
        """Yield the partial directory, and rename it."""
        with output.local_workdir(self.path, None, overwrite=True) as partial:
            yield Upload(partial, place=str(self.path))


class StoreTarget(Target):
    """A folder in a store such as `s3://` or `memory://`.

    The files are uploaded to a hidden sibling first, so that a broken connection leaves the folder as it was. Then the
    store copies them, the manifest last, because stores cannot rename folders. The same command finishes what was
    interrupted in between.
    """

    def __init__(self, url: str, progress: Progress) -> None:
        self.label = url.rstrip("/")
        self.reference = self.label.rsplit("/", 1)[-1]
        self._place = locate(self.label)
        self._progress = progress

    def is_done(self, identity: str, *, overwrite: bool) -> bool:
        """Return True if the folder holds the same work already."""
        _, document = self.current()
        if document is not None and document.get("identity") == identity:
            return True
        if overwrite:
            return False
        if document is not None:
            raise OutputError(
                f"{self.label} is complete but was made from something else: give --overwrite to replace it"
            )
        if _exists(self._place) and not _exists(layout.partial(self._place) / layout.IDENTITY):
            raise OutputError(f"{self.label} holds files that coldctl did not write: give another --to")
        return False

    def current(self) -> tuple[str | None, Manifest | None]:
        """Return the folder's card and manifest."""
        return current_in(RemoteFolder(self.label)) if _exists(self._place) else (None, None)

    def repair_tag(self, tag: str | None) -> None:
        """Do nothing: there are no tags."""

    @contextmanager
    def writing(self) -> Iterator[Upload]:
        """Yield a temporary directory, and upload it."""
        with scratch_upload(self.label) as upload:
            yield upload
            with output.atomic_output(self._place, None, overwrite=True) as partial:
                store_output.upload(upload.folder, partial, self._progress)


@contextmanager
def scratch_upload(place: str = "") -> Iterator[Upload]:
    """Yield an upload with a temporary directory, which nothing is done with."""
    with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
        folder = Path(scratch) / "published"
        folder.mkdir()
        yield Upload(folder, place=place)


def _exists(place: Location) -> bool:
    try:
        return place.exists()
    except Exception as error:  # each store has exceptions of its own
        raise OutputError(f"cannot look into {place}: {error}: check the URL and your credentials") from None


def current_in(folder: Folder) -> tuple[str | None, Manifest | None]:
    """Return the card and the manifest of a directory, as far as it has them. Raises ManifestError for one that was changed."""
    card, document = None, None
    with suppress(CheckpointError, UnicodeDecodeError):
        card = folder.read(layout.CARD).decode("utf-8") if folder.has(layout.CARD) else None
    with suppress(CheckpointError, ManifestError):
        if folder.has(layout.MANIFEST):
            document = parse(folder.read(layout.MANIFEST), f"{folder.label}/{layout.MANIFEST}")
    return card, document
