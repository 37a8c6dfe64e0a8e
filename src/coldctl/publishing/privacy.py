"""Remove local paths from what is published, and search the rest for private names."""

import getpass
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from coldctl.artifacts import layout
from coldctl.common.errors import OutputError
from coldctl.common.parsing import json_value
from coldctl.common.text import ABSOLUTE_PATH
from coldctl.storage.local import SMALL_FILE_LIMIT

_SECRET = re.compile(r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|PRIVATE|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST_SECRET = 8  # characters; shorter values occur in any text by chance
_SHORTEST_NAME = 6  # characters; `root` is a word
_NOBODY = {"nobody", "ubuntu", "debian", "centos", "docker", "runner", "jenkins", "vagrant", "ec2-user", "localhost"}
_CODE_LANGUAGE = re.compile(r"(?<=^```)\w+|(?<=^~~~)\w+", re.MULTILINE)  # of fenced code
_TEXTS = (".json", ".md", ".html", ".txt", ".svg", ".toml", ".onnx")  # an exporter's notes stand among the weights
# Keys whose values come from fixed lists: ours, those of transformers, SPDX.
_FIXED = {
    "license", "kind", "status", "encoding", "method", "outer_optimizer", "protocol", "metric", "metrics", "verdict", "role",
    "group", "pooling", "send", "model_type", "architectures", "tokenizer_class", "hidden_act", "position_embedding_type",
    "dtype", "torch_dtype", "library_name", "pipeline_tag",
}  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json")


def without_paths(value: Any) -> Any:
    """Return a JSON value in which every absolute path is replaced by its last part.

    >>> without_paths({"reason": "cannot read /home/ann/models/x: no such file", "base": "org/name", "half": "and/or"})
    {'reason': 'cannot read x: no such file', 'base': 'org/name', 'half': 'and/or'}
    """
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    return ABSOLUTE_PATH.sub(_last_part, value) if isinstance(value, str) else value


def texts(value: Any) -> list[str]:
    """Return all texts of a JSON value, but for those under keys that hold words of a fixed list."""
    if isinstance(value, dict):
        return [text for key, entry in value.items() if key not in _FIXED for text in texts(entry)]
    if isinstance(value, list | tuple):
        return [text for entry in value for text in texts(entry)]
    return [value] if isinstance(value, str) else []


def search(folder: Path, places: Iterable[str], by_people: str, public: Iterable[str]) -> None:
    """Search the texts in `folder`, except vocabularies, for traces of this machine and its user.

    Directories (`places` that were read, home, working and temporary directory, where Python's packages and this package
    lie) and the values of environment variables that hold secrets must not occur in any text. User and host name may be
    ordinary words, so they are looked for in what others put in: the values of JSON documents and what is written `by_people`
    into the card. Names that occur in `public` texts are looked for only as home directories and addresses.
    Raises OutputError naming the file and the kind of text.
    """
    paths, names, secrets = _directories(places), _names(), _secrets()
    ordinary = {name for name in names if any(_occurs_in(name, text.encode()) for text in public)}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in _TEXTS or path.name in _VOCABULARIES:
            continue
        text = path.read_bytes()
        shortest = _SHORTEST_NAME if path.suffix == ".onnx" else 0  # `/tmp/` stands among weights by chance
        if any(len(word) >= shortest and _occurs_in(word, text) for word in paths):
            raise _leak(path.name, "a directory of this machine")
        put_in = _put_in(path.name, text, by_people)
        if any(_is_address(name, text) for name in names) or any(_occurs_in(name, put_in) for name in names - ordinary):
            raise _leak(path.name, "this user's or machine's name")
        if any(len(word) >= shortest and _occurs_in(word, text) for word in secrets):
            raise _leak(path.name, "a secret from the environment")


def _leak(name: str, kind: str) -> OutputError:
    return OutputError(
        f"{name} would tell {kind}, and nothing was published: take it out of the model's or the evaluation's files and "
        "publish again"
    )


def _put_in(name: str, text: bytes, by_people: str) -> bytes:
    """Return what of a published file is not coldctl's own wording. Reports say what `results.json` says."""
    if name == layout.CARD:
        return _CODE_LANGUAGE.sub("", by_people).encode()
    if not name.endswith(".json"):
        return b""
    try:
        return "\n".join(texts(json_value(text, SMALL_FILE_LIMIT))).encode()
    except ValueError:
        return text


def _occurs_in(word: str, text: bytes) -> bool:
    """Return True if the text holds the word as a word of its own, or a directory with more behind it."""
    encoded = word.encode("utf-8", "surrogateescape")
    if encoded not in text:
        return False
    behind = rb"(?!\w)" if word[-1] != "/" else b""
    return re.search(rb"(?<!\w)" + re.escape(encoded) + behind, text) is not None


def _is_address(name: str, text: bytes) -> bool:
    """Return True if the text holds the name's home directory (`/home/NAME`, `~NAME`) or an address (`NAME@…`)."""
    encoded = name.encode("utf-8", "surrogateescape")
    if encoded not in text:
        return False
    escaped = re.escape(encoded)
    home = rb"(?:[/\\](?:home|Users)[/\\]{1,2}|~)" + escaped + rb"(?!\w)"
    return re.search(home + rb"|(?<!\w)" + escaped + rb"@\w", text) is not None


def _directories(places: Iterable[str]) -> set[str]:
    here = {str(Path.cwd()), str(Path.home()), tempfile.gettempdir(), str(Path(__file__).parent), *places}
    if sys.prefix != sys.base_prefix:  # an environment of somebody's own
        here.add(sys.prefix)
    # `/root` alone may stand in any text; `/root/` tells where something lay.
    return {path if path.count("/") > 1 else f"{path}/" for path in here if path.startswith("/") and path != "/"}


def _names() -> set[str]:
    names = {socket.gethostname()}
    with suppress(KeyError, OSError):  # a container's user may have no name
        names.add(getpass.getuser())
    return {name for name in names if len(name) >= _SHORTEST_NAME and name not in _NOBODY}


def _secrets() -> set[str]:
    return {value for key, value in os.environ.items() if _SECRET.search(key) and len(value) >= _SHORTEST_SECRET}


def _last_part(match: re.Match[str]) -> str:
    names = [name for name in re.split(r"[/\\]", match[0]) if name and name != "~"]
    return names[-1] if names else "…"
