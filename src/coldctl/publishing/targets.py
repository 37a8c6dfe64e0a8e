"""Where a model can be published: a directory of this machine, a folder in a store that fsspec knows, the Hub."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from coldctl.artifacts import layout, output, store_output
from coldctl.artifacts.manifest import Manifest, parse
from coldctl.common.errors import CheckpointError, ManifestError, OutputError
from coldctl.common.progress import Progress
from coldctl.storage import files
from coldctl.storage.location import Location, locate


@dataclass
class Upload:
    """A directory that the caller fills, and what the target says of it after it was published."""

    folder: Path
    message: str = ""  # of a commit, where the target has commits
    tag: str | None = None
    place: str = ""  # where it stands now


class Target(Protocol):
    """A place that holds one published model."""

    label: str  # how messages name it
    reference: str  # what a user of the model writes to load it
    page: str | None  # the URL of its files, if a browser can open them

    def is_done(self, identity: str, *, overwrite: bool) -> bool:
        """Return True if it holds the same work already. Raises OutputError if it holds something else that must stay."""

    def current(self) -> tuple[str | None, Manifest | None]:
        """Return the card and the manifest that are there now, as far as they are readable."""

    def repair_tag(self, tag: str | None) -> None:
        """Set the tag of complete work that an interrupted call could not set."""

    def writing(self) -> AbstractContextManager[Upload]:
        """Yield a directory to fill, and publish it if the block ends well."""


@dataclass
class LocalTarget:
    """A directory of this machine, replaced by one rename."""

    path: Path
    page: str | None = None
    label: str = field(init=False)
    reference: str = field(init=False)

    def __post_init__(self) -> None:
        self.label = str(self.path)
        self.reference = self.path.resolve().name  # the whole path would tell where this machine keeps it

    def is_done(self, identity: str, *, overwrite: bool) -> bool:
        """As the protocol says."""
        return output.is_done(self.path, identity, overwrite=overwrite, flag="--to")

    def current(self) -> tuple[str | None, Manifest | None]:
        """As the protocol says."""
        return current_in(files.LocalFolder(self.path)) if self.path.is_dir() else (None, None)

    def repair_tag(self, tag: str | None) -> None:
        """Do nothing: there are no tags."""

    @contextmanager
    def writing(self) -> Iterator[Upload]:
        """As the protocol says."""
        with output.local_workdir(self.path, None, overwrite=True) as partial:
            yield Upload(partial, place=str(self.path))


@dataclass
class StoreTarget:
    """A folder in a store such as `s3://` or `memory://`.

    Everything is stored under a hidden sibling first, so that a connection that breaks leaves the folder as it was. Then
    the store copies the files, the manifest last: stores know no rename of folders. What breaks in between is gone on with
    by the same command.
    """

    url: str
    progress: Progress
    page: str | None = None
    label: str = field(init=False)
    reference: str = field(init=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.label = self.url
        self.reference = self.url.rsplit("/", 1)[-1]

    def is_done(self, identity: str, *, overwrite: bool) -> bool:
        """As the protocol says."""
        _, document = self.current()
        if document is not None and document.get("identity") == identity:
            return True
        if overwrite:
            return False
        if document is not None:
            raise OutputError(
                f"{self.label} is complete but was made from something else: give --overwrite to replace it"
            )
        place = locate(self.url)
        if _exists(place) and not _exists(layout.partial(place) / layout.IDENTITY):
            raise OutputError(f"{self.label} holds files that coldctl did not write: give another --to")
        return False

    def current(self) -> tuple[str | None, Manifest | None]:
        """As the protocol says."""
        return current_in(files.RemoteFolder(self.url)) if _exists(locate(self.url)) else (None, None)

    def repair_tag(self, tag: str | None) -> None:
        """Do nothing: there are no tags."""

    @contextmanager
    def writing(self) -> Iterator[Upload]:
        """As the protocol says."""
        with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
            upload = Upload(Path(scratch) / "published", place=self.url)
            upload.folder.mkdir()
            yield upload
            with output.atomic_output(locate(self.url), None, overwrite=True) as partial:
                store_output.upload(upload.folder, partial, self.progress)


@dataclass
class DryTarget:
    """Another target that is only asked what stands there: nothing is sent."""

    target: Target

    def __post_init__(self) -> None:
        self.label, self.reference, self.page = self.target.label, self.target.reference, self.target.page

    def is_done(self, identity: str, *, overwrite: bool) -> bool:
        """As the protocol says."""
        return self.target.is_done(identity, overwrite=overwrite)

    def current(self) -> tuple[str | None, Manifest | None]:
        """As the protocol says."""
        return self.target.current()

    def repair_tag(self, tag: str | None) -> None:
        """Do nothing."""

    @contextmanager
    def writing(self) -> Iterator[Upload]:
        """As the protocol says."""
        with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
            folder = Path(scratch) / "published"
            folder.mkdir()
            yield Upload(folder, place=self.label)


def _exists(place: Location) -> bool:
    try:
        return place.exists()
    except Exception as error:  # each store has exceptions of its own
        raise OutputError(f"cannot look into {place}: {error}: check the URL and your credentials") from None


def current_in(folder: files.Folder) -> tuple[str | None, Manifest | None]:
    """Return the card and the manifest of a directory, as far as it has them. Raises ManifestError for one that was changed."""
    card, document = None, None
    with suppress(CheckpointError, UnicodeDecodeError):
        card = folder.read(layout.CARD).decode("utf-8") if folder.has(layout.CARD) else None
    with suppress(CheckpointError, ManifestError):
        if folder.has(layout.MANIFEST):
            document = parse(folder.read(layout.MANIFEST), f"{folder.label}/{layout.MANIFEST}")
    return card, document
