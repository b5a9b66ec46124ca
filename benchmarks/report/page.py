"""Writes a run's report: to the terminal, as Markdown and as one HTML page."""

from __future__ import annotations

from pathlib import Path

from benchmarks import results
from benchmarks.peers import PEERS
from benchmarks.report import figures
from benchmarks.report.plots import all_plots
from benchmarks.report.tables import IN_THE_TERMINAL, all_tables, console
from benchmarks.results import ResultsError, Run
from vstar_kernels.cli import page
from vstar_kernels.files import write_atomically
from vstar_kernels.reading import shorten

TEMPLATES = Path(__file__).parents[1] / "templates"


def write_report(file: Path, output: Path) -> None:
    """Prints the tables of a run's file; writes OUTPUT.md and OUTPUT.html.

    Raises:
        ResultsError: It cannot be read, or nothing in it was measured.
    """
    run = results.load(file)
    if not run.records:
        raise ResultsError(f"{file} has no results yet")
    if unknown := {peer for record in run.records for peer in record.peers} - set(PEERS):
        raise ResultsError(f"{file}: there is no peer {shorten(min(unknown))}")
    screen, tables = console(), all_tables(run)
    for table in tables:
        if table.title in IN_THE_TERMINAL:
            screen.print(table.for_terminal() if table.rows else table.note)
    text = "\n".join([f"# {describe(run)}\n", *(table.markdown() for table in tables)])
    try:
        write_atomically(output.with_suffix(".md"), text)
        write_atomically(output.with_suffix(".html"), render(run))
    except (OSError, ValueError) as error:  # ValueError where there is no name for a suffix
        raise ResultsError(f"cannot write the report at {output}: {error}") from error
    screen.print(f"{output.with_suffix('.md')} and {output.with_suffix('.html')}")


def render(run: Run) -> str:
    """Returns the whole page."""
    plan = run.plan
    rounds = f"at most {plan.rounds} rounds or {plan.seconds:g} s a case, at least 5 rounds"
    how = [("limited to", plan.isa or "nothing"), ("rounds", rounds)]
    return page.render(
        "report.html",
        TEMPLATES,
        run=run,
        description=describe(run),
        tables=all_tables(run),
        plots=[
            {"title": plot.title, "note": plot.note}
            | {theme: page.data_uri(svg.encode(), "svg+xml") for theme, svg in plot.svg.items()}
            for plot in all_plots(run)
        ],
        facts=[*run.environment.items(), *how],
    )


def describe(run: Run) -> str:
    """Returns in one line what the figures were measured on."""
    found = run.environment
    if run.plan.device == "cuda":
        driver = found["clocks and driver"]
        if isinstance(driver, dict):  # else it is why nobody can tell
            driver = driver["driver_version"]
        with_what = f", driver {driver}, Triton {found['triton']}"
    else:
        with_what = f", {found['threads']} threads, {found['isa']}"
    text = (
        f"{found['device']}{with_what}, PyTorch {found['torch']}, commit {found['commit']}. "
        f"Medians of at most {run.plan.rounds} interleaved rounds, σ = 1."
    )
    # What the device reached beside the kernels, over the models' calls on all its threads.
    short = figures.kernel_rows(run, "short").drop_duplicates("key")
    bandwidths, speeds = (short.bandwidth / 1e9).dropna(), (short.flops_per_second / 1e9).dropna()
    if bandwidths.empty or speeds.empty:
        return text
    return (
        f"{text} Beside the models' calls a copy of as many bytes reached {bandwidths.min():,.0f} "
        f"to {bandwidths.max():,.0f} GB/s (median {bandwidths.median():,.0f}) and a "
        f"matrix product {speeds.median():,.0f} GFLOP/s."
    )
