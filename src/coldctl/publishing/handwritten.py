"""People's words in a card: everything outside the markers of generated blocks.

A generated block stands between the lines `<!-- coldctl:begin NAME -->` and `<!-- coldctl:end NAME -->`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping

from coldctl.common.errors import OutputError

_MARKER = re.compile(r"^[ \t]*<!--[ \t]*coldctl:(begin|end)[ \t]+([\w-]+)[ \t]*-->[ \t]*$", re.MULTILINE)
TOP = ""  # the name of the place above the first block


def split(text: str, label: str) -> tuple[dict[str, str], dict[str, str]]:
    r"""Return a document's generated blocks by name, and people's words by the block that they follow.

    Raises OutputError, naming the document by `label`, if a marker has no partner or a block occurs twice.

    >>> split("Mine.\n<!-- coldctl:begin a -->\n# A\n<!-- coldctl:end a -->\n\nMine, too.\n", "README.md")[1]
    {'': 'Mine.', 'a': 'Mine, too.'}
    """
    blocks: dict[str, str] = {}
    words: dict[str, str] = {}
    opened, last, at = None, TOP, 0
    for marker in _MARKER.finditer(text):
        kind, name = marker.groups()
        if kind == "begin" and opened is None and name not in blocks:
            words[last] = text[at : marker.start()].strip("\n")
            opened, at = name, marker.start()
        elif kind == "end" and name == opened:
            blocks[name] = text[at : marker.end()]
            opened, last, at = None, name, marker.end()
        else:
            raise _unbalanced(label, f"{kind} {name}")
    if opened is not None:
        raise _unbalanced(label, f"begin {opened}")
    words[last] = text[at:].strip("\n")
    return blocks, words


def keep(generated: str, earlier: Iterable[Mapping[str, str]]) -> tuple[str, str]:
    """Put people's words of `earlier` documents, as `split` returns them, into a `generated` one.

    Words stay behind the block that they followed. A document without markers is kept whole below the last block: nothing
    tells which of it a person wrote. Returns the document and the words alone.
    """
    blocks, kept = split(generated, "the generated document")
    for words in earlier:
        last = TOP if words.keys() - {TOP} else list(blocks)[-1]
        for name, text in words.items():
            last = name if name in blocks else last
            kept[last] = _union(kept[last], text)
    pieces = [kept[TOP], *(text for name, block in blocks.items() for text in (block, kept[name]))]
    return "\n\n".join(filter(None, pieces)) + "\n", "\n\n".join(filter(None, kept.values()))


def _union(ours: str, theirs: str) -> str:
    """Return the lines of both texts, those that they share once."""
    if not ours or not theirs or ours == theirs:
        return ours or theirs
    one, other = ours.split("\n"), theirs.split("\n")
    lines: list[str] = []
    for kind, start, end, other_start, other_end in difflib.SequenceMatcher(None, one, other, False).get_opcodes():
        lines += one[start:end]
        if kind in ("insert", "replace"):
            lines += other[other_start:other_end]
    return "\n".join(lines)


def _unbalanced(label: str, marker: str) -> OutputError:
    return OutputError(
        f"{label}: the marker <!-- coldctl:{marker} --> has no partner or occurs twice. Leave one begin line and one end "
        "line of each block, or delete all of them to keep the whole text."
    )
