"""A run's report: tables in the terminal and in Markdown, and a page with plots."""

from benchmarks.report.write import write_report

__all__ = ["write_report"]
