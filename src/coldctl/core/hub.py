"""Publishing to the Hugging Face Hub with the user's own token: one commit, and a tag per iteration."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coldctl.core import layout
from coldctl.core.errors import ColdctlError, ConfigError, ManifestError, OutputError
from coldctl.core.manifest import Manifest, parse
from coldctl.core.targets import Sending

_REFERENCE = re.compile(r"hf://(?P<name>[^@]+?)/?(?:@(?P<revision>.+))?")
_INITIAL = {".gitattributes"}  # what a new repository holds


def target(reference: str, *, private: bool, create_pr: bool) -> "HubTarget":
    """The repository that `hf://ORG/NAME[@REVISION]` means. Raises ConfigError for a name that the Hub refuses."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    match = _REFERENCE.fullmatch(reference)
    name = match["name"] if match else ""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"--to {reference} is no name for the Hub ({reason}): write hf://ORG/NAME") from None
    if name.count("/") != 1:
        raise ConfigError(f"--to {reference} names no owner: write hf://ORG/NAME, with your user name or organisation")
    assert match is not None
    return HubTarget(name, match["revision"] or "main", private, create_pr)


@dataclass
class HubTarget:
    """A model repository. The address is the library's own (`HF_ENDPOINT`), and so is the token (`HF_TOKEN`, or a login)."""

    name: str
    revision: str
    private: bool
    create_pr: bool
    label: str = field(init=False)
    reference: str = field(init=False)
    page: str | None = field(init=False)

    def __post_init__(self) -> None:
        import huggingface_hub

        self._api = huggingface_hub.HfApi(library_name="coldctl")
        self.label = f"hf://{self.name}" + (f"@{self.revision}" if self.revision != "main" else "")
        self.reference = self.name
        self.page = f"{self._api.endpoint}/{self.name}/blob/{self.revision}"
        self._head: str | None = None  # the commit that stands there
        self._files: set[str] = set()
        self._manifest: Manifest | None = None
        self._card: str | None = None
        self._asked = False

    def is_done(self, identity: str, *, overwrite: bool) -> bool:
        """Whether this very work stands there. Raises OutputError if files that coldctl did not write would be replaced.

        A model that coldctl published needs no `overwrite`: the Hub keeps every earlier commit.
        """
        self._ask()
        if self._manifest is not None:
            return self._manifest.get("identity") == identity
        if self._files - _INITIAL - {layout.CARD} and not overwrite:
            raise OutputError(
                f"{self.label} holds files that coldctl did not write: give --overwrite to commit on top of them, or "
                "another --to"
            )
        return False

    def standing(self) -> tuple[str | None, Manifest | None]:
        """The card and the manifest of the revision, if it has them."""
        self._ask()
        return self._card, self._manifest

    @contextmanager
    def writing(self) -> Iterator[Sending]:
        """A temporary directory, sent as one commit when the block ends well."""
        with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
            sending = Sending(Path(scratch) / "published")
            sending.folder.mkdir()
            yield sending
            self._send(sending)

    def _send(self, sending: Sending) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        names = {path.relative_to(sending.folder).as_posix() for path in sending.folder.rglob("*") if path.is_file()}
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=sending.folder / name) for name in sorted(names)
        ]
        ours = set(self._manifest["files"]) if self._manifest else set()
        operations += [CommitOperationDelete(path_in_repo=name) for name in sorted((ours & self._files) - names)]
        with self._in_words("write to"):
            created = self._head is None and self._create()
            try:
                commit = self._api.create_commit(
                    self.name, operations, commit_message=sending.message, revision=self.revision,
                    create_pr=self.create_pr or None, parent_commit=self._head if not created else None,
                )  # fmt: skip
            except BaseException:
                if created:
                    self._take_back()
                raise
            sending.place = commit.pr_url or f"{self._api.endpoint}/{self.name}"
        if sending.tag and not self.create_pr:
            with self._in_words("tag"):
                self._api.create_tag(self.name, tag=sending.tag, revision=commit.oid, exist_ok=True)

    def _ask(self) -> None:
        """Find out what stands there, once."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        if self._asked:
            return
        with self._in_words("read"):
            try:
                info = self._api.model_info(self.name, revision=self.revision)
                self._head = info.sha
                self._files = {item.rfilename for item in info.siblings or []}
            except RevisionNotFoundError:
                pass
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:  # the Hub's answer to a wrong token, too
                    self._api.whoami()
            card, document = self._text(layout.CARD), self._text(layout.MANIFEST)
        self._card = card
        if document is not None:
            with suppress(ManifestError):  # somebody else's file of that name is not ours to judge
                self._manifest = parse(document.encode(), f"{self.label}/{layout.MANIFEST}")
        self._asked = True

    def _text(self, name: str) -> str | None:
        if name not in self._files:
            return None
        with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
            path = self._api.hf_hub_download(self.name, name, revision=self._head, local_dir=scratch)
            return Path(path).read_text(encoding="utf-8", errors="replace")

    def _create(self) -> bool:
        """Make the repository or the branch, whichever is missing. Returns whether the repository is new."""
        from huggingface_hub.errors import HfHubHTTPError

        created = True
        try:
            self._api.create_repo(self.name, private=self.private or None)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            created = False
        if self.revision != "main":
            self._api.create_branch(self.name, branch=self.revision, exist_ok=True)
        return created

    def _take_back(self) -> None:
        """Delete the repository that this call made, if it is still as empty as it was made."""
        with suppress(Exception):  # what went wrong first is what is told
            info = self._api.model_info(self.name)
            if {item.rfilename for item in info.siblings or []} <= _INITIAL:
                self._api.delete_repo(self.name, missing_ok=True)

    @contextmanager
    def _in_words(self, verb: str) -> Iterator[None]:
        """What the Hub or the way to it answered, in one line with its remedy. Raises OutputError."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            yield
        except ColdctlError:
            raise
        except HfHubHTTPError as error:
            code = error.response.status_code
            said = " ".join((error.server_message or str(error)).split())
            remedy = {
                401: "log in with `hf auth login`, or set HF_TOKEN to a token of yours",
                403: f"take a token that may write to {self.name} (a fine-grained one needs write access to it)",
                409: "somebody else committed at the same time: run the same command again",
                412: "somebody else committed at the same time: run the same command again",
            }.get(code, "run the same command again")
            raise OutputError(f"cannot {verb} {self.label}: the Hub answered {code} ({said}): {remedy}") from None
        except (OSError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise OutputError(
                f"cannot {verb} {self.label}: {said}: check the connection and run the same command again"
            ) from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in (
                "httpx",
                "httpx2",
                "httpcore",
                "httpcore2",
                "requests",
                "hf_xet",
            ):
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            raise OutputError(
                f"cannot {verb} {self.label}: {said}: check the connection and run the same command again"
            ) from None
