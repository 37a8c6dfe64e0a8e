"""What people wrote into a generated document is kept when the document is generated again.

A document is a sequence of blocks: paragraphs, tables, headings, fenced code. The manifest keeps a digest of every block that
was generated. Any other block that is found in the document later was written by a person, who needs to know of no marks.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence

_FENCE = re.compile(r"\s{0,3}(`{3,}|~{3,})")


def blocks(text: str) -> list[str]:
    """The blocks of a Markdown text: what blank lines and headings separate, fenced code never cut.

    >>> blocks("# A\\nwords\\n\\n```\\nx\\n\\ny\\n```\\n")
    ['# A', 'words', '```\\nx\\n\\ny\\n```']
    """
    found: list[str] = []
    current: list[str] = []
    fence = ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if fence:
            current.append(line)
            if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
            continue
        if mark:
            fence = mark[1]
        if (not line.strip() or _level(line)) and current:
            found.append("\n".join(current))
            current = []
        if _level(line):
            found.append(line.rstrip())
        elif line.strip():
            current.append(line.rstrip())
    return [*found, "\n".join(current)] if current else found


def digests(text: str) -> list[str]:
    """A short digest (16 hexadecimal digits of sha256) of every block, in order."""
    return [_digest(block) for block in blocks(text)]


def keep(generated: str, existing: str, known: Iterable[str]) -> str:
    """`generated` with the blocks of `existing` that are not among the `known` digests.

    A block stays in the section (by its heading) that it was written in, at its end, and above the title what stood above
    it; a section that a person added follows the one that it followed.
    """
    machine = {*known, *digests(generated)}
    sections = [(heading, list(content)) for heading, content in _sections(blocks(generated))]
    if sections[0][0]:
        sections.insert(0, ("", []))
    places = {heading: index for index, (heading, _) in enumerate(sections)}
    last = 0
    for heading, content in _sections(blocks(existing)):
        if heading in places:
            last = places[heading]
        added = [] if not heading or heading in places or _digest(heading) in machine else [heading]
        added += [block for block in content if _digest(block) not in machine]
        sections[last][1].extend(added)
    return (
        "\n\n".join(block for heading, content in sections for block in ([heading] if heading else []) + content) + "\n"
    )


def _sections(found: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Headings with the blocks below them; what stands before the first one has the heading ""."""
    sections: list[tuple[str, list[str]]] = [("", [])]
    for block in found:
        if _level(block):
            sections.append((block, []))
        else:
            sections[-1][1].append(block)
    return sections if sections[0][1] or len(sections) == 1 else sections[1:]


def _level(line: str) -> int:
    match = re.match(r"(#{1,6})\s", line)
    return len(match[1]) if match else 0


def _digest(block: str) -> str:
    return hashlib.sha256(block.encode()).hexdigest()[:16]
