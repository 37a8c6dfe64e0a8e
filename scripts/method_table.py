"""Write the table of merge methods into the docs, made from the registry: `method_table.py docs/fusing.md`."""

import re
import sys
from pathlib import Path

from coldctl.fusing.methods import METHODS
from coldctl.fusing.recipe import Method

BEGIN, END = "<!-- methods:begin, by `make reference` -->\n", "<!-- methods:end -->"


def table() -> str:
    """Return the table, one line per method."""
    rows = ["| `--method` | fused model | weights | reads | source |", "|---|---|---|--:|---|"]
    return "\n".join([*rows, *map(row, METHODS.values())]) + "\n"


def row(method: Method) -> str:
    """Return one line of the table."""
    weights = "yes" if method.takes_weights else "no"
    return f"| `{method.name}` | {method.summary} | {weights} | {method.needs.passes} | {method.paper} |"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    text = path.read_text(encoding="utf-8")
    marked = re.compile(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", re.DOTALL)
    path.write_text(marked.sub(lambda _: table(), text), encoding="utf-8")
