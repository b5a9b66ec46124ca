"""Writes the report: to the terminal, as Markdown and as a page."""

from __future__ import annotations

from pathlib import Path

from benchmarks import results
from benchmarks.report import page
from benchmarks.report.render import console, markdown, terminal
from benchmarks.report.tables import IN_THE_TERMINAL, all_tables
from benchmarks.results import ResultsError


def write_report(file: Path, output: Path) -> None:
    """Print the tables of a run's file; write OUTPUT.md and OUTPUT.html.

    Raises:
        ResultsError: It cannot be read, or nothing in it was measured.
    """
    run = results.load(file)
    if not run.records:
        raise ResultsError(f"{file} has no results yet")
    screen = console()
    found = all_tables(run)
    for table in found:
        if table.title in IN_THE_TERMINAL:
            screen.print(terminal(table) if table.rows else table.note)
    text = "\n".join([f"# {page.describe(run)}\n", *map(markdown, found)])
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    output.with_suffix(".html").write_text(page.render(run), encoding="utf-8")
    screen.print(f"{output.with_suffix('.md')} and {output.with_suffix('.html')}")
