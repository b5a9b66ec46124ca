"""Tables for the terminal, in Markdown and in HTML."""

from __future__ import annotations

import html
import sys

import rich.table
from rich.console import Console

from benchmarks.report.tables import Table

FILE_COLUMNS = 160  # where the output is no terminal


def console() -> Console:
    """Of the terminal's width, or wide enough for a file."""
    return Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)


def terminal(table: Table) -> rich.table.Table:
    """For rich's console."""
    found = rich.table.Table(title=table.title, title_justify="left", caption=table.note or None)
    for index, name in enumerate(table.head):
        found.add_column(name, justify="left" if index < table.left else "right")
    for row in table.rows:
        found.add_row(*row)
    return found


def markdown(table: Table, heading: str = "## ") -> str:
    """With a heading, unless that is empty."""
    rule = ["---" if index < table.left else "--:" for index in range(len(table.head))]
    lines = [f"| {' | '.join(row)} |" for row in (table.head, tuple(rule), *table.rows)]
    parts = [f"{heading}{table.title}"] if heading else []
    if table.rows:
        parts.append("\n".join(lines))
    if table.note:
        parts.append(table.note)
    return "\n\n".join(parts) + "\n"


def html_table(table: Table) -> str:
    """Without its title."""
    if not table.rows:
        return f"<p>{html.escape(table.note)}</p>"
    css = [' class="left"' if index < table.left else "" for index in range(len(table.head))]
    head = "".join(f"<th{c}>{html.escape(x)}</th>" for c, x in zip(css, table.head, strict=True))
    rows = "".join(
        "<tr>"
        + "".join(f"<td{c}>{html.escape(x)}</td>" for c, x in zip(css, row, strict=True))
        + "</tr>"
        for row in table.rows
    )
    note = f'<p class="soft">{html.escape(table.note)}</p>' if table.note else ""
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>{note}'
