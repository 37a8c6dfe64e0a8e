"""HTML of tables, trees and charts for notebooks."""

import base64
import html
import itertools
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from coldctl.storage.location import Location


def table_html(table: Table) -> str:
    """Return a rich table as an HTML table."""
    title = f"<caption>{html.escape(_text(table.title).plain)}</caption>" if table.title else ""
    head = "".join(f"<th>{html.escape(_text(column.header).plain)}</th>" for column in table.columns)
    cells = zip(*(list(column.cells) for column in table.columns), strict=True)
    body = "".join(
        f"<tr style='font-weight: {'bold' if row.style == 'bold' else 'normal'}'>"
        + "".join(
            f"<td style='text-align: {column.justify}'>{_spans(_text(cell))}</td>"
            for column, cell in zip(table.columns, values, strict=True)
        )
        + "</tr>"
        for row, values in zip(table.rows, cells, strict=True)
    )
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def tree_html(tree: Tree) -> str:
    """Return a rich tree as nested HTML lists."""
    return f"<ul><li>{_spans(_text(tree.label))}{''.join(map(tree_html, tree.children))}</li></ul>"


def chart_html(chart: Location) -> str:
    """Return a chart's file (PNG) as an HTML image; nothing if there is none."""
    if not chart.is_file():
        return ""
    return f'<img alt="{chart.stem}" src="data:image/png;base64,{base64.b64encode(chart.read_bytes()).decode()}">'


def _text(value: object) -> Text:
    return value if isinstance(value, Text) else Text.from_markup(str(value), emoji=False)


def _spans(text: Text) -> str:
    return "".join(_styled(text)).replace("\n", "<br>")


def _styled(text: Text) -> Iterator[str]:
    """Yield a text's stretches of one style each, escaped."""
    edges = sorted({0, len(text), *(edge for span in text.spans for edge in (span.start, span.end))})
    for start, end in itertools.pairwise(edges):
        words = html.escape(text.plain[start:end])
        styles = {str(span.style) for span in text.spans if span.start <= start and end <= span.end}
        css = "; ".join(_CSS[style] for style in sorted(styles & _CSS.keys()))
        yield f"<span style='{css}'>{words}</span>" if css else words


_CSS = {"red": "color: firebrick", "green": "color: seagreen", "dim": "opacity: 0.6", "bold": "font-weight: bold"}
