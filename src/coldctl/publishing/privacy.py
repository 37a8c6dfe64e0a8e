"""Nothing private leaves: local paths are taken out of what is published, and what is left is searched once more."""

import getpass
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coldctl.common.errors import OutputError
from coldctl.common.text import ABSOLUTE_PATH

_SECRET = re.compile(r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|PRIVATE|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST_SECRET = 8  # characters; shorter values stand in any text by chance
_SHORTEST_NAME = 6  # likewise: `root` is a word
_NOBODY = {"nobody", "ubuntu", "debian", "centos", "docker", "runner", "jenkins", "vagrant", "ec2-user", "localhost"}
_TEXTS = (".json", ".md", ".html", ".txt", ".svg", ".toml", ".onnx")  # an exporter's notes stand among the weights
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json")


def without_paths(value: Any) -> Any:
    """A JSON value whose texts name no directory: of an absolute path the last part stays.

    >>> without_paths({"reason": "cannot read /home/ann/models/x: no such file", "base": "org/name", "half": "and/or"})
    {'reason': 'cannot read x: no such file', 'base': 'org/name', 'half': 'and/or'}
    """
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return ABSOLUTE_PATH.sub(_last_part, value) if isinstance(value, str) else value


def search(folder: Path, places: Iterable[str]) -> None:
    """Look through the texts in `folder`, vocabularies excepted, for what tells of this machine or its user.

    That are `places` (directories that were read), home, working and temporary directory, where Python's packages and our
    own code lie, user and host name, and the values of environment variables that hold secrets. Raises OutputError naming
    the file and the kind of text.
    """
    private = _private(places)
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in _TEXTS or path.name in _VOCABULARIES:
            continue
        text = path.read_bytes()
        shortest = _SHORTEST_NAME if path.suffix == ".onnx" else 0  # `/tmp/` stands among weights by chance
        for kind, words in private.items():
            if any(len(word) >= shortest and _stands_in(word, text) for word in words):
                raise OutputError(
                    f"{path.name} would tell {kind}, and nothing was published: take it out of the model's or the "
                    "evaluation's files and publish again"
                )


def _stands_in(word: str, text: bytes) -> bool:
    """Whether the word stands in the text as a word of its own, or a directory with more behind it."""
    wanted = word.encode("utf-8", "surrogateescape")
    if wanted not in text:
        return False
    behind = rb"(?!\w)" if word[-1] != "/" else b""
    return re.search(rb"(?<!\w)" + re.escape(wanted) + behind, text) is not None


def _private(places: Iterable[str]) -> dict[str, set[str]]:
    here = {str(Path.cwd()), str(Path.home()), tempfile.gettempdir(), str(Path(__file__).parent), *places}
    if sys.prefix != sys.base_prefix:  # an environment of somebody's own
        here.add(sys.prefix)
    # `/root` alone may stand in any text; `/root/` tells where something lay.
    paths = {path if path.count("/") > 1 else f"{path}/" for path in here if path.startswith("/") and path != "/"}
    try:
        names = {getpass.getuser(), socket.gethostname()}
    except (KeyError, OSError):  # a container's user may have no name
        names = {socket.gethostname()}
    secrets = {value for key, value in os.environ.items() if _SECRET.search(key) and len(value) >= _SHORTEST_SECRET}
    return {
        "a directory of this machine": paths,
        "this user's or machine's name": {
            name for name in names if len(name) >= _SHORTEST_NAME and name not in _NOBODY
        },
        "a secret from the environment": secrets,
    }


def _last_part(match: re.Match[str]) -> str:
    parts = [part for part in re.split(r"[/\\]", match[0]) if part and part != "~"]
    return parts[-1] if parts else "…"
