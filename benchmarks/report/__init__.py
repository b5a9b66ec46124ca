"""A run's report: tables in the terminal and in Markdown, and a page with plots."""
