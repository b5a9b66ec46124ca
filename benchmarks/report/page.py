"""The report as one HTML file."""

from __future__ import annotations

import base64
import html
import statistics

from benchmarks.report import figures, plots, tables
from benchmarks.report.plots import Plot
from benchmarks.report.render import html_table
from benchmarks.results import Run
from vstar_kernels.cli.demo.page import facts, page, section

STYLE = """
body { max-width: 72rem; }
th.left, td.left { text-align: left; }
td.left:first-child { white-space: nowrap; }
.scroll table { font-size: .85rem; }
.scroll th { vertical-align: bottom; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 500; }
figure { margin: 0 0 1rem; }
figure img { width: 100%; }
"""
# Long tables are folded, the others shown.
FEW_ROWS = 12


def render(run: Run) -> str:
    """The whole page."""
    overview, *rest = tables.all_tables(run)
    return page(
        f"vstar_kernels on {run.environment['device']}",
        "\n".join(
            [
                _head(run),
                section(overview.title, html_table(overview)),
                *(section(plot.title, _figure(plot)) for plot in plots.all_plots(run)),
                *(section(table.title, _folded(table)) for table in rest),
                section("Environment", facts(_environment(run))),
            ]
        ),
        STYLE,
    )


def describe(run: Run) -> str:
    """What the figures were measured on, in one line."""
    found = run.environment
    threads = "" if run.plan.device == "cuda" else f", {found['threads']} threads, {found['isa']}"
    return (
        f"{found['device']}{threads}, PyTorch {found['torch']}, commit {found['commit']}. "
        f"Medians of at most {run.plan.rounds} interleaved rounds, σ = 1. {_speeds(run)}"
    )


def _speeds(run: Run) -> str:
    """What the device reached beside the kernels, over the models' calls on all its threads."""
    records = figures.of_suite(figures.kernels(run), "short")
    bandwidths = [x.bandwidth / 1e9 for x in records if x.bandwidth]
    rates = [x.rate / 1e9 for x in records if x.rate]
    if not bandwidths or not rates:
        return ""
    return (
        f"Beside the models' calls a copy of as many bytes reached {min(bandwidths):,.0f} to "
        f"{max(bandwidths):,.0f} GB/s (median {statistics.median(bandwidths):,.0f}) and a matrix "
        f"product {statistics.median(rates):,.0f} GFLOP/s."
    )


def _head(run: Run) -> str:
    missing = len(run.missing)
    more = f' <span class="bad">{missing} cases are still to be measured.</span>' if missing else ""
    return (
        "<h1>Temporal attention regularization: vstar_kernels and its peers</h1>"
        f'<p class="soft">{html.escape(describe(run))}{more}</p>'
    )


def _figure(plot: Plot) -> str:
    light, dark = (_data(plot.svg[theme]) for theme in ("light", "dark"))
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{html.escape(plot.title)}"></picture>'
        f"<figcaption>{html.escape(plot.note)}</figcaption></figure>"
    )


def _data(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _folded(table: tables.Table) -> str:
    content = html_table(table)
    if len(table.rows) <= FEW_ROWS:
        return content
    return f"<details><summary>{len(table.rows)} rows</summary>{content}</details>"


def _environment(run: Run) -> list[tuple[str, object]]:
    plan = run.plan
    how = f"at most {plan.rounds} rounds or {plan.seconds:g} s a case, at least 5 rounds"
    return [*run.environment.items(), ("limited to", plan.isa or "nothing"), ("rounds", how)]
