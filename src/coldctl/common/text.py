"""Make a stranger's text safe to show.

Names, labels, licences and reasons may come from anybody. Only this module decides which characters may pass.
"""

import json
import re
from collections.abc import Callable
from typing import Any

# An absolute path of any machine, of two names at least, after a blank, quote, bracket or nothing.
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/\\~-])(?:file://)?(?:~[\w.-]*|[A-Za-z]:\\|/(?=[\w.@+~-]+/))[^\s\"'<>|,;:()\[\]{}]*"
)
_OTHER = "�"
_MARKUP = re.compile(r"([\\`*{}\[\]<>()#|!~&$@^=])|(?<![^\W_])_|_(?![^\W_])|(?<=:)//|(?<=\bwww)\.", re.IGNORECASE)
_LINE_START = re.compile(r"[-+](?=\s|[-\s]*$)|\d+(?=\.(?:\s|$))")


def printable(text: object) -> str:
    """Return one line without escape codes, line ends and characters that change the direction of writing.

    >>> printable("a\\x1b[31m b\\n" + chr(0x202E) + "c")
    'a�[31m b �c'
    """
    words = str(text)
    if words.isprintable():
        return words
    return "".join(
        letter if letter.isprintable() else " " if letter.isspace() and letter not in "\x1c\x1d\x1e\x1f" else _OTHER
        for letter in words
    )


def markdown(text: object) -> str:
    r"""Escape plain text for a Markdown document: no markup, HTML, links, mentions or formulas.

    >>> print(markdown("[x](http://y) <b> a_b _c_ www.z 1|2"))
    \[x\]\(http:\//y\) \<b\> a_b \_c\_ www\.z 1\|2
    """
    words = printable(text).strip()
    words = _MARKUP.sub(lambda match: f"\\{match[0]}", words)
    start = _LINE_START.match(words)
    if start is None:
        return words
    return f"{start[0]}\\{words[start.end() :]}" if start[0].isdigit() else f"\\{words}"


def code(text: object) -> str:
    """Return plain text as a Markdown code span.

    >>> code("a`b")
    '`ab`'
    """
    return f"`{printable(text).replace('`', '') or ' '}`"


def chart(text: object, longest: int = 1000) -> str:
    r"""Escape plain text for a chart, without formulas, cut to `longest` characters.

    >>> chart("$x$ and more", 5)
    '\\$x\\$ …'
    """
    words = printable(text)
    return (words if len(words) <= longest else words[: longest - 1] + "…").replace("$", r"\$")


def json_document(value: object, default: Callable[[Any], Any] | None = None) -> str:
    """Return indented JSON in which every character that is not printable is escaped; `default` as in `json.dumps`."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=default)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)


def is_path(text: object) -> bool:
    """Return True if a value is an absolute path and nothing else."""
    return isinstance(text, str) and ABSOLUTE_PATH.fullmatch(text) is not None
