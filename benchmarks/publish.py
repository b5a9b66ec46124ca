"""``python -m benchmarks.publish``: writes the kept results' tables into the README and the docs.

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; it is never typed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks import results
from benchmarks.peers import EAGER, SDPA, VSTAR_KERNELS
from benchmarks.report import figures, plots, tables
from benchmarks.report.page import describe
from benchmarks.report.render import markdown
from benchmarks.results import Run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu-amd-epyc-zen5-2-cores"
RUNS = ("float32", "16-bit", "avx2", "avx2-bfloat16")
CODEGEN = ROOT / "benchmarks/results/codegen/report.json"
MARGIN_FRAMES = (16, 32, 64, 128)
PLOTS = ROOT / "docs/performance/plots"
# Of the first run, by their titles: the names of their files.
PLOTTED = {
    "Time against frames": "time",
    "Share of the floor": "share",
    "Memory against frames": "memory",
    "Long sequences": "long",
}


def margins() -> str:
    """The README's: how many times as long others take for a model's step, by frames."""
    run = _read("float32")
    found = {(x.model, x.frames): x.seconds for x in figures.steps(run)}
    lines = [
        f"| model | {' | '.join(f'N = {frames}' for frames in MARGIN_FRAMES)} |",
        "|---|" + "--:|" * len(MARGIN_FRAMES),
    ]
    for model in dict.fromkeys(model for model, _ in found):
        cells = []
        for frames in MARGIN_FRAMES:
            seconds = found[model, frames]
            ours = seconds[VSTAR_KERNELS.name]
            times = (f"{seconds[x.name] / ours:.1f}×" for x in (EAGER, SDPA))
            cells.append(" / ".join(times))
        lines.append(f"| {model} | {' | '.join(cells)} |")
    (overhead,) = figures.of_suite(figures.kernels(run), "overhead")
    call = overhead.median(VSTAR_KERNELS.name) or 0.0
    return "\n".join([*lines, f"\nOne call on a tiny input costs {call * 1e6:.0f} µs."])


def everything() -> str:
    """The docs': every table of every kept run."""
    parts = []
    for name in RUNS:
        run = _read(name)
        parts.append(f"## {name}\n\n{describe(run)}\n")
        parts += [markdown(table, heading="### ") for table in tables.all_tables(run)]
    return "\n".join(parts)


def pictures() -> str:
    """The docs': some of the first run's plots, for light and dark pages."""
    return "\n\n".join(
        f"**{title}**\n\n"
        f'<picture><source srcset="plots/{name}-dark.svg" media="(prefers-color-scheme: dark)">'
        f'<img src="plots/{name}-light.svg" alt="{title}"></picture>'
        for title, name in PLOTTED.items()
    )


def draw() -> None:
    """Write the plots' files."""
    PLOTS.mkdir(exist_ok=True)
    for plot in plots.all_plots(_read(RUNS[0])):
        if name := PLOTTED.get(plot.title):
            for theme, svg in plot.svg.items():
                (PLOTS / f"{name}-{theme}.svg").write_text(svg, encoding="utf-8")


def predictions() -> str:
    """The compiled tiles in bfloat16: what they are predicted to reach, never measured."""
    report = json.loads(CODEGEN.read_text())
    lines = [
        f"Predicted from Triton {report['triton']}'s code, not measured:\n",
        "| architecture | N | D | bytes | operations | warps | registers | shared | programs "
        "| share of the bandwidth | limit |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in report["kernels"]:
        if (row["kernel"], row["kind"], row["variant"]) != ("tile", "16-bit", "gaussian"):
            continue
        if row["head_dim"] not in (40, 48, 64, 80, 160):
            continue
        limit = row["limit"] if row["headroom"] < 1 else "memory"
        lines.append(
            f"| {row['architecture']} | {row['frames']} | {row['head_dim']} "
            f"| {row['sequence_bytes']:,} | {row['sequence_operations']:,} "
            f"| {row['config']['warps']} | {row['registers']} | {row['shared']:,} "
            f"| {row['resident']} | {row['share']:.0%} | {limit} |"
        )
    return "\n".join(lines)


def replace(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks called ``name``."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    page, count = re.subn(
        pattern,
        lambda match: f"{match[1]}\n{text}\n\n{match[2]}",
        path.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"{path} has {count} places marked {name!r}, expected one")
    path.write_text(page, encoding="utf-8")


def _read(name: str) -> Run:
    return results.load(RESULTS / f"{name}.jsonl")


if __name__ == "__main__":
    replace(ROOT / "README.md", "cpu", margins())
    replace(ROOT / "docs/performance/cpu.md", "plots", pictures())
    replace(ROOT / "docs/performance/cpu.md", "cpu", everything())
    draw()
    replace(ROOT / "docs/performance/gpu.md", "predictions", predictions())
