"""Publish to the Hugging Face Hub: one commit, and a tag per iteration."""

import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from coldctl.artifacts import layout
from coldctl.artifacts.manifest import Manifest, parse
from coldctl.common.errors import ColdctlError, ConfigError, ManifestError, OutputError
from coldctl.common.progress import Drawing, Progress
from coldctl.publishing.targets import Target, Upload, scratch_upload

_REFERENCE = re.compile(r"hf://(?P<name>[^@]+?)/?(?:@(?P<revision>.+))?")
_MAIN = "main"
_INITIAL = {".gitattributes"}  # files of a new repository
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token of yours that may write"
_AGAIN = "run the same command again"
_REQUESTS = 20  # open pull requests that are searched, newest first
_TRANSPORT = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "hf_xet")


def target(reference: str, progress: Progress, *, private: bool, create_pr: bool) -> "HubTarget":
    """Return the repository that `hf://ORG/NAME[@REVISION]` means. Raises ConfigError for a name that the Hub refuses."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ConfigError(f"--to {reference} names no repository: write hf://ORG/NAME or hf://ORG/NAME@REVISION")
    name, revision = match["name"], match["revision"] or _MAIN
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"--to {reference} is no name for the Hub ({reason}): write hf://ORG/NAME") from None
    if name.count("/") != 1:
        raise ConfigError(f"--to {reference} names no owner: write hf://ORG/NAME, with your user name or organisation")
    if create_pr and revision != _MAIN:
        raise ConfigError(f"--create-pr asks to change main, not {revision}: leave --create-pr or @{revision} out")
    return HubTarget(name, revision, progress, private=private, create_pr=create_pr)


class HubTarget(Target):
    """A model repository. The address is the library's own (`HF_ENDPOINT`), and so is the token (`HF_TOKEN`, or a login).

    There is one commit, so a failure leaves the files as they were. A repository, a branch or a pull request that was made
    before the failure stays, and the same command goes on with it.
    """

    def __init__(self, name: str, revision: str, progress: Progress, *, private: bool, create_pr: bool) -> None:
        import huggingface_hub

        self.name, self.revision = name, revision
        self.private, self.create_pr, self.progress = private, create_pr, progress
        self._api = huggingface_hub.HfApi(library_name="coldctl")
        self.label = f"hf://{name}" + (f"@{revision}" if revision != _MAIN else "")
        self.reference = name
        self.page = f"{self._api.endpoint}/{name}/blob/{revision}"
        self._head: str | None = None  # the current commit, or the one that a new branch begins with
        self._is_new_branch = False
        self._is_public = False
        self._files: set[str] = set()
        self._manifest: Manifest | None = None
        self._card: str | None = None
        self._asked = False

    def is_done(self, identity: str, *, overwrite: bool) -> bool:
        """Return True if the same work is published already. Raises OutputError if it would replace others' files.

        A model that coldctl published needs no `overwrite`: the Hub keeps every earlier commit.
        """
        self._ask()
        if self.private and self._is_public:
            raise OutputError(
                f"{self.label} is public already: make it private in its settings on the Hub, or leave --private out"
            )
        if self._manifest is not None:
            # People may have deleted a file by hand.
            complete = set(self._manifest["files"]) <= self._files
            if complete and not self._is_new_branch and self._manifest.get("identity") == identity:
                return True
        if self.create_pr and self._is_requested(identity):
            return True
        if self._manifest is not None:
            return False
        if self._files - _INITIAL - {layout.CARD} and not overwrite:
            raise OutputError(
                f"{self.label} holds files that coldctl did not write: give --overwrite to commit on top of them, or "
                "another --to"
            )
        return False

    def _is_requested(self, identity: str) -> bool:
        """Return True if an open pull request holds the same work: an earlier command may have been cut off after sending it."""
        with self._library("read"):
            requests = self._api.get_repo_discussions(
                self.name, discussion_type="pull_request", discussion_status="open"
            )
            for request in islice(requests if self._head else (), _REQUESTS):
                document = self._read(layout.MANIFEST, f"refs/pr/{request.num}")
                if document is not None and document.get("identity") == identity:
                    self._manifest, self.label = document, request.url
                    return True
        return False

    def current(self) -> tuple[str | None, Manifest | None]:
        """Return the card and the manifest of the revision, if it has them."""
        self._ask()
        return self._card, self._manifest

    def repair_tag(self, tag: str | None) -> None:
        """Set the tag that an earlier command, interrupted after its commit, could not set."""
        self._ask()
        if tag is None or self.create_pr or self._manifest is None or self._head is None:
            return
        with self._library("tag"):
            if tag in self._tags():
                document = self._read(layout.MANIFEST, tag)
                # The tag stays where it is if people have committed on top since.
                if document is not None and document.get("identity") == self._manifest.get("identity"):
                    return
            self._tag(tag, self._head)

    @contextmanager
    def writing(self) -> Iterator[Upload]:
        """Yield a temporary directory, and send it as one commit when the block ends well."""
        self._ask()
        self._check_token()  # filling the directory may take long
        with scratch_upload() as upload:
            yield upload
            self._send(upload)

    def _send(self, upload: Upload) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        names = {path.relative_to(upload.folder).as_posix() for path in upload.folder.rglob("*") if path.is_file()}
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=upload.folder / name) for name in sorted(names)]
        # An earlier signature does not cover the new files.
        ours = {*self._manifest["files"], layout.SIGNATURE} if self._manifest else set()
        deleted = [CommitOperationDelete(path_in_repo=name) for name in sorted((ours & self._files) - names)]
        operations: list[Any] = [*added, *deleted]
        with self._library("write to", bars=True):
            self._make_missing()
            # `create_commit` would do this, too, but a .gitignore on the Hub would then leave files out in silence.
            self._api.preupload_lfs_files(
                self.name, added, revision=self.revision, create_pr=self.create_pr or None, free_memory=False,
                gitignore_content="",
            )  # fmt: skip
            commit = self._api.create_commit(
                self.name, operations, commit_message=upload.message, revision=self.revision,
                create_pr=self.create_pr or None, parent_commit=self._head,
            )  # fmt: skip
        upload.place = commit.pr_url or f"{self._api.endpoint}/{self.name}"
        if upload.tag and not self.create_pr:
            with self._library("tag"):
                self._tag(upload.tag, commit.oid)

    def _tags(self) -> dict[str, str]:
        return {ref.name: ref.target_commit for ref in self._api.list_repo_refs(self.name).tags}

    def _tag(self, tag: str, commit: str) -> None:
        """Tag a commit. On main the tag of an iteration moves to the new commit; other branches leave an earlier tag alone."""
        before = self._tags().get(tag)
        if before == commit or (before is not None and self.revision != _MAIN):
            return
        if before is not None:
            self._api.delete_tag(self.name, tag=tag)
        self._api.create_tag(self.name, tag=tag, revision=commit)

    def _ask(self) -> None:
        """Read the state of the repository, once."""
        if self._asked:
            return
        with self._library("read"):
            info = self._info(self.revision)
            if info is None and self.revision != _MAIN:
                info = self._info(_MAIN)  # a new branch begins with it
                self._is_new_branch = True
            if info is not None:
                self._head, self._is_public = info.sha, info.private is False
                self._files = {sibling.rfilename for sibling in info.siblings or []}
                self._card = self._text(layout.CARD, self._head) if layout.CARD in self._files else None
                self._manifest = self._read(layout.MANIFEST, self._head) if layout.MANIFEST in self._files else None
        self._asked = True

    def _info(self, revision: str) -> Any:
        """Return the Hub's description of a revision; None if it does not exist."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return self._api.model_info(self.name, revision=revision)
        except HfHubHTTPError as error:
            # Without a valid token the Hub does not say what exists.
            if error.response.status_code == 401:
                if get_token() is None:
                    raise self._without_token("read") from None
                self._api.whoami()
            elif error.response.status_code != 404:
                raise
            return None

    def _text(self, name: str, revision: str | None) -> str:
        with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
            path = self._api.hf_hub_download(self.name, name, revision=revision, local_dir=scratch)
            return Path(path).read_text(encoding="utf-8", errors="replace")

    def _read(self, name: str, revision: str | None) -> Manifest | None:
        """Read a manifest of a revision; None if it is missing or not valid."""
        from huggingface_hub.errors import EntryNotFoundError

        with suppress(ManifestError, EntryNotFoundError):
            return parse(self._text(name, revision).encode(), f"{self.label}/{name}")
        return None

    def _without_token(self, verb: str) -> OutputError:
        return OutputError(f"cannot {verb} {self.label}: there is no token: {_LOG_IN}")

    def _check_token(self) -> None:
        """Raise OutputError if the token cannot write, before the work is done."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

        if get_token() is None:
            raise self._without_token("write to")
        with self._library("write to"):
            try:
                role = self._api.whoami().get("auth", {}).get("accessToken", {}).get("role")
            except HfHubHTTPError as error:
                if error.response.status_code == 401:
                    raise
                return  # too many requests, or a token without this right: the commit will fail if it must
        if role == "read":
            raise OutputError(
                f"cannot write to {self.label}: this token may only read: take a token that may write to {self.name}"
            )

    def _make_missing(self) -> None:
        """Make the repository and the branch where they are missing. Raises OutputError for a name that is taken."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            if self._head is None:
                self._api.create_repo(self.name, private=self.private or None)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            raise OutputError(
                f"cannot make {self.label}: the name is taken by a repository that this token may not see: take a "
                "token of its owner, or another name"
            ) from None
        if self._is_new_branch:
            self._api.create_branch(self.name, branch=self.revision, revision=self._head)

    @contextmanager
    def _library(self, verb: str, *, bars: bool = False) -> Iterator[None]:
        """Run calls of the library silently but for `bars` on a terminal. Raises OutputError for their errors, in one line."""
        from huggingface_hub import constants
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        drawing = self.progress if bars and isinstance(self.progress, Drawing) else None
        shown: AbstractContextManager[Any] = nullcontext()
        if drawing is not None:
            shown = _bars_shown()
        elif constants.HF_HUB_DISABLE_PROGRESS_BARS is not False:  # False: the user asked for bars
            shown = disable_progress_bars()
        logger = logging.getLogger("huggingface_hub")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it prints each of its retries
        try:
            with warnings.catch_warnings(), shown, drawing.aside() if drawing is not None else nullcontext():
                warnings.simplefilter("ignore")
                yield
        except ColdctlError:
            raise
        except Exception as error:
            raise self._in_words(verb, error) from None
        finally:
            logger.setLevel(level)

    def _in_words(self, verb: str, error: BaseException) -> BaseException:
        """Return the Hub's or the connection's error in one line with its remedy; any other error as it is."""
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        # "Error while uploading" has the reason as its cause.
        while isinstance(error, RuntimeError) and error.__cause__ is not None:
            error = error.__cause__
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, HfHubHTTPError):
            code = error.response.status_code
            said = " ".join((error.server_message or said).split()).rstrip(".")
            remedy = {
                401: _LOG_IN,
                403: f"take a token that may write to {self.name} (a fine-grained one needs write access to it)",
                409: f"somebody else committed at the same time: {_AGAIN}",
                412: f"somebody else committed at the same time: {_AGAIN}",
                429: f"the Hub has had too many requests of yours: wait some minutes and {_AGAIN}",
            }.get(code, _AGAIN)
            return OutputError(f"cannot {verb} {self.label}: the Hub answered {code} ({said}): {remedy}")
        if isinstance(error, OfflineModeIsEnabled):
            return OutputError(f"cannot {verb} {self.label}: HF_HUB_OFFLINE is set: unset it and {_AGAIN}")
        if isinstance(error, ValueError) and said.startswith("Invalid metadata"):
            return OutputError(f"cannot {verb} {self.label}: {said}: correct the front matter of its {layout.CARD}")
        if isinstance(error, OSError | ValueError | RuntimeError) or type(error).__module__.split(".")[0] in _TRANSPORT:
            return OutputError(f"cannot {verb} {self.label}: {said}: check the connection and {_AGAIN}")
        return error  # pragma: no cover - a defect of ours


@contextmanager
def _bars_shown() -> Iterator[None]:
    """Show the library's bars, which transformers hides together with its own, unless the user wants none."""
    from huggingface_hub import constants, utils

    if constants.HF_HUB_DISABLE_PROGRESS_BARS:
        yield
        return
    hidden = utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    utils.enable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if hidden:
            utils.disable_progress_bars()  # type: ignore[attr-defined]
