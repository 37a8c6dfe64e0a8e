"""Make a stranger's text safe to show.

Names, labels, licences and reasons may come from anybody. Nothing else in the project decides which characters may pass.
"""

import json
import re

# An absolute path of this machine or another one: two parts at least, after a blank, quote, bracket or nothing.
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/\\~-])(?:file://)?(?:~[\w.-]*|[A-Za-z]:\\|/(?=[\w.@+~-]+/))[^\s\"'<>|,;:()\[\]{}]*"
)
_OTHER = "�"
_MARKUP = re.compile(r"([\\`*{}\[\]<>()#|!~&$@^=])|(?<![^\W_])_|_(?![^\W_])|(?<=:)//|(?<=\bwww)\.", re.IGNORECASE)
_LINE_START = re.compile(r"[-+](?=\s|[-\s]*$)|\d+(?=\.(?:\s|$))")


def printable(text: object) -> str:
    """One line without anything that a terminal or an eye would obey: escape codes, line ends, turned directions.

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
    r"""Plain text in a Markdown document: no markup, HTML, links, mentions or formulas, wherever it stands.

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
    """Plain text in a Markdown code span, its marks included.

    >>> code("a`b")
    '`ab`'
    """
    return f"`{printable(text).replace('`', '') or ' '}`"


def chart(text: object, longest: int = 1000) -> str:
    r"""Plain text in a chart, cut to so many characters: no formulas.

    >>> chart("$x$ and more", 5)
    '\\$x\\$ …'
    """
    words = printable(text)
    return (words if len(words) <= longest else words[: longest - 1] + "…").replace("$", r"\$")


def json_document(value: object) -> str:
    """Indented JSON with every character that is not printable spelt as an escape of JSON's own."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)


def is_path(text: object) -> bool:
    """Whether a value is nothing but an absolute path."""
    return isinstance(text, str) and ABSOLUTE_PATH.fullmatch(text) is not None
