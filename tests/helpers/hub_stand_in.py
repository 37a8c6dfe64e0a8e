"""A model hub in this process: the endpoints that huggingface_hub calls to make, read and commit to repositories.

What it answers, headers and status codes included, is what huggingface_hub 2.4.0 reads in an answer; repositories live
in memory. It can be told to misbehave (`Hub.refuse_writes`, `Hub.faults`), and it keeps every request (`Hub.requests`).
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_writer": "write", "hf_reader": "read", "hf_fine": "fineGrained"}
LFS_SUFFIXES = (".safetensors", ".onnx", ".png", ".model", ".bin")
Files = dict[str, bytes]


@dataclass
class Commit:
    """One state of a repository."""

    oid: str
    message: str
    files: Files


@dataclass
class Repository:
    """A model repository: what each branch, tag and pull request points to."""

    private: bool
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)  # "main", "refs/pr/1", … -> commit
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, message: str, files: Files) -> Commit:
        """Put a commit on top of `ref`."""
        oid = hashlib.sha1(f"{id(self)} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        self.refs[ref] = oid
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a commit's own name means."""
        oid = self.refs.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)

    @property
    def files(self) -> Files:
        """What stands on main."""
        commit = self.at("main")
        assert commit is not None
        return commit.files

    @property
    def messages(self) -> list[str]:
        """The commits on any branch, in order, but for the one that every repository begins with."""
        return [commit.message for commit in self.commits[1:]]


@dataclass
class Request:
    """What was asked for."""

    method: str
    path: str
    token: str | None
    writes: bool


class Hub:
    """The server's state and its switches."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.refuse_writes: int | None = None  # the status that writes are answered with
        # "upload", "commit", "commit after", "tag", … -> how many more times the connection breaks there ("…" as 5xx
        # statuses: ("upload", 503)); ("get_whoami", 429) -> how many more times a route is answered with that status.
        self.faults: Counter[Any] = Counter()
        self.endpoint = ""
        self._lock = threading.RLock()

    def add(self, name: str, files: Files, *, private: bool = False, message: str = "by hand") -> Repository:
        """Make a repository, or commit files on top of what main holds."""
        with self._lock:
            if name not in self.repositories:
                self.repositories[name] = Repository(private)
                self.repositories[name].commit("main", "initial commit", {".gitattributes": b"*.bin filter=lfs\n"})
            if files:
                repository = self.repositories[name]
                repository.commit("main", message, {**repository.files, **files})
            return self.repositories[name]

    @property
    def writes(self) -> list[str]:
        """The requests that change something, as "METHOD /path"."""
        return [f"{request.method} {request.path}" for request in self.requests if request.writes]

    def fails(self, *fault: Any) -> bool:
        """Whether this fault is still to happen; counts it."""
        key = fault[0] if len(fault) == 1 else fault
        with self._lock:
            if self.faults[key] <= 0:
                return False
            self.faults[key] -= 1
            return True


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at `Hub.endpoint` until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _RefusedError(Exception):
    """An answer that is no success: status, message and the Hub's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    _read: bytes | None = None  # the body of the request at hand

    def log_message(self, *arguments: Any) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.parameters = parse_qs(url.query)
        path = url.path
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        reads_only = path == "/api/validate-yaml" or "/preupload/" in path or path.endswith("/objects/batch")
        writes = self.command not in ("GET", "HEAD") and not reads_only
        self.hub.requests.append(Request(self.command, unquote(path), token, writes))
        self.role = TOKENS.get(token or "")
        try:
            for kind, pattern in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and kind.partition("_")[0] in (self.command.lower(), "any"):
                    if kind != "put_object":  # the store of objects knows no tokens, its addresses are signed
                        if token and self.role is None:
                            raise _RefusedError(401, "Invalid credentials in Authorization header")
                        if kind != "any_yaml" and self.command not in ("GET", "HEAD"):
                            self._may_write()
                    for status in (400, 401, 403, 409, 429, 500):
                        if self.hub.fails(kind, status):
                            raise _RefusedError(status, "not now")
                    getattr(self, f"_{kind}")(*(unquote(group) for group in match.groups() if group is not None))
                    return
            raise _RefusedError(404, f"no such endpoint: {self.command} {path}")
        except _RefusedError as refused:
            self._body()
            headers = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
            self._answer({"error": refused.message}, refused.status, headers)
        except _BrokenError:
            self._break()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    # ----------------------------------------------------------------------------------------------- endpoints

    def _get_whoami(self) -> None:
        if self.role is None:
            raise _RefusedError(401, "Invalid username or password.")
        self._answer({"name": "me", "auth": {"type": "access_token", "accessToken": {"role": self.role}}})

    def _any_yaml(self) -> None:
        self._fault("yaml")
        self._body()
        self._answer({"errors": [], "warnings": []})

    def _post_create(self) -> None:
        self._fault("create")
        wanted = json.loads(self._body())
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            raise _RefusedError(409, "You already created this model repo")
        self.hub.add(name, {}, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self._answer({"url": f"{self.hub.endpoint}/{name}", "name": name})

    def _get_info(self, name: str, revision: str | None = None) -> None:
        repository = self._repository(name)
        commit = self._at(repository, revision or "main")
        siblings = [{"rfilename": file} for file in commit.files]
        document = {"_id": "1", "id": name, "modelId": name, "sha": commit.oid, "private": repository.private}
        self._answer({**document, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def _get_refs(self, name: str) -> None:
        repository = self._repository(name)
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
            for ref, oid in repository.refs.items()
            if not ref.startswith("refs/")
        ]
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repository.tags.items()]
        self._answer({"branches": branches, "converts": [], "tags": tags})

    def _get_discussions(self, name: str) -> None:
        """Return the open pull requests, newest first."""
        numbers = [int(ref.rpartition("/")[2]) for ref in self._repository(name).refs if ref.startswith("refs/pr/")]
        common = {
            "title": "a request",
            "createdAt": "2025-01-01T00:00:00.000Z",
            "status": "open",
            "isPullRequest": True,
        }
        repo = {"name": name, "type": "model"}
        listed = [{**common, "num": number, "repo": repo} for number in sorted(numbers, reverse=True)]
        self._answer({"discussions": listed, "count": len(listed), "start": 0})

    def _post_preupload(self, name: str, revision: str) -> None:
        self._fault("preupload")
        standing = self._at(self._repository(name), revision).files
        document = json.loads(self._body())
        ignore = document.get("gitIgnore", standing.get(".gitignore", b"").decode()).split()
        files = []
        for item in document["files"]:
            path = item["path"]
            large = path.endswith(LFS_SUFFIXES)
            oid = None
            if path in standing:
                data = standing[path]
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data)
                oid = (hashlib.sha256(data) if large else blob).hexdigest()
            ignored = any(path.endswith(rule.lstrip("*")) for rule in ignore)
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, **({"oid": oid} if oid else {})})
        self._answer({"files": files})

    def _post_batch(self, name: str) -> None:
        self._repository(name)
        objects = []
        for item in json.loads(self._body())["objects"]:
            known = item["oid"] in self.hub.objects
            upload = {"upload": {"href": f"{self.hub.endpoint}/objects/{item['oid']}"}}
            objects.append({**item, **({} if known else {"actions": upload})})
        self._answer({"transfer": "basic", "objects": objects})

    def _put_object(self, oid: str) -> None:
        if self.hub.fails("upload"):
            self.rfile.read(1000)
            raise _BrokenError
        data = self._body()
        for status in (403, 500, 503):
            if self.hub.fails("upload", status):
                raise _RefusedError(status, "the store of objects says no")
        if hashlib.sha256(data).hexdigest() != oid:
            raise _RefusedError(400, "other bytes than announced")
        self.hub.objects[oid] = data
        self._answer({})

    def _post_commit(self, name: str, revision: str) -> None:
        if self.hub.fails("commit"):
            self.rfile.read(1000)
            raise _BrokenError
        repository = self._repository(name)
        parent = self._at(repository, revision)
        files, header = dict(parent.files), {}
        for line in self._body().decode().splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _RefusedError(400, f"no such object: {value['oid']}")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise _RefusedError(400, f"no such operation: {key}")
        for status in (500, 503):
            if self.hub.fails("commit", status):
                raise _RefusedError(status, "Internal error")
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
        ref, answer = revision, {}
        if "create_pr" in self.parameters:
            number = 1 + sum(known.startswith("refs/pr/") for known in repository.refs)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{number}"
        elif ref not in repository.refs:
            raise _RefusedError(400, "not a branch")
        commit = repository.commit(ref, header["summary"], files)
        self._fault("commit after")
        self._answer(
            {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit.oid}", "commitOid": commit.oid, **answer}
        )

    def _post_tag(self, name: str, revision: str) -> None:
        self._fault("tag")
        repository = self._repository(name)
        tag = json.loads(self._body())["tag"]
        if tag in repository.tags:
            raise _RefusedError(409, "Tag reference exists already")
        repository.tags[tag] = self._at(repository, revision).oid
        self._answer({})

    def _delete_tag(self, name: str, tag: str) -> None:
        repository = self._repository(name)
        if tag not in repository.tags:
            raise _RefusedError(404, "no such tag", "RevisionNotFound")
        del repository.tags[tag]
        self._answer({})

    def _post_branch(self, name: str, branch: str) -> None:
        repository = self._repository(name)
        start = json.loads(self._body()).get("startingPoint", "main")
        if branch in repository.refs:
            raise _RefusedError(409, "Reference already exists")
        repository.refs[branch] = self._at(repository, start).oid
        self._answer({})

    def _any_file(self, name: str, revision: str, path: str) -> None:
        commit = self._at(self._repository(name), revision)
        if path not in commit.files:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        self._answer(data, headers={"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit.oid})

    # ------------------------------------------------------------------------------------------------- answering

    def _may_write(self) -> None:
        if self.hub.refuse_writes:
            raise _RefusedError(self.hub.refuse_writes, "You don't have the rights to write here")
        if self.role is None:
            raise _RefusedError(401, "Invalid username or password.")
        if self.role == "read":
            raise _RefusedError(403, "You must use a write token")

    def _repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is not None and (self.role or not repository.private):
            return repository
        if self.role is None:  # over https the library takes every such 401 for this; over http it needs the code
            raise _RefusedError(401, "Invalid username or password.", "RepoNotFound")
        raise _RefusedError(404, "Repository not found", "RepoNotFound")

    def _at(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _fault(self, name: str) -> None:
        if self.hub.fails(name):
            raise _BrokenError

    def _body(self) -> bytes:
        if self._read is not None:
            return self._read
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            self._read = b"".join(parts)
        else:
            self._read = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self._read

    def _answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self._read = None  # the next request on this connection has a body of its own

    def _break(self) -> None:
        """End the connection as a fallen line does: by a reset, without an answer."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()


class _BrokenError(Exception):
    """The connection breaks here."""


_NAME = "([^/]+/[^/]+)"
_ROUTES = (
    ("get_whoami", "/api/whoami-v2"),
    ("any_yaml", "/api/validate-yaml"),
    ("post_create", "/api/repos/create"),
    ("post_preupload", f"/api/models/{_NAME}/preupload/([^/]+)"),
    ("post_commit", f"/api/models/{_NAME}/commit/([^/]+)"),
    ("post_tag", f"/api/models/{_NAME}/tag/([^/]+)"),
    ("delete_tag", f"/api/models/{_NAME}/tag/([^/]+)"),
    ("post_branch", f"/api/models/{_NAME}/branch/([^/]+)"),
    ("get_discussions", f"/api/models/{_NAME}/discussions"),
    ("get_refs", f"/api/models/{_NAME}/refs"),
    ("get_info", f"/api/models/{_NAME}(?:/revision/([^/]+))?"),
    ("post_batch", f"/{_NAME}\\.git/info/lfs/objects/batch"),
    ("put_object", "/objects/([0-9a-f]+)"),
    ("any_file", f"/{_NAME}/resolve/([^/]+)/(.+)"),
)
