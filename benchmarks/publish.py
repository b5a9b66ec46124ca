"""``python -m benchmarks.publish``: writes the kept results' tables into the README and the docs.

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; it is never typed. ``--keep FOLDER``
first keeps what ``gpu_check.sh`` has left there, under the name of its GPU.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks import pages, pytest_lines, results
from benchmarks.gpu_check import STAGES
from benchmarks.machine import ROOT
from benchmarks.peers import EAGER, SDPA, VSTAR_KERNELS
from benchmarks.report import figures, plots
from benchmarks.report.page import describe
from benchmarks.report.tables import Table, all_tables, of_frame, percent
from benchmarks.results import ResultsError, Run
from vstar_kernels.cli.options import read_options

KEPT = ROOT / "benchmarks/results"
RESULTS = KEPT / "cpu-amd-epyc-zen5-2-cores"
ZEN_3 = KEPT / "cpu-amd-epyc-zen3-2-cores"
EMERALD_RAPIDS = KEPT / "cpu-intel-xeon-emerald-rapids-2-cores"
MACHINES = {"Zen 5": RESULTS, "Emerald Rapids": EMERALD_RAPIDS, "Zen 3": ZEN_3}
GPUS = "gpu-"  # how the names of GPUs' folders begin
NOTHING_MEASURED = "Nothing yet."
RUNS = ("float32", "calls", "long", "16-bit", "avx2", "avx2-bfloat16", "frames", "cross")
COMPARED = ("float32", "calls", "long", "16-bit")  # of them, those compared between machines
CODEGEN = KEPT / "codegen/report.json"
MARGIN_FRAMES = (16, 32, 64, 128)
PREDICTED_HEAD_DIMS = (40, 48, 64, 80, 160)
PLOTS = ROOT / "docs/performance/plots"
# Of the first run, by their titles: the names of their files.
PLOTTED = {
    "Time against frames": "time",
    "Share of the floor": "share",
    "Memory against frames": "memory",
    "Long sequences": "long",
}


def margins() -> str:
    """Returns the README's table: who takes how many times as long for a model's step."""
    found = [figures.steps(_read("float32", place)) for place in MACHINES.values()]
    ratios = pd.concat(found).groupby(["model", "frames", "peer"], sort=False).ratio
    ranges = pd.DataFrame({"low": ratios.min(), "high": ratios.max()})

    def cell(model: str, frames: int) -> str:
        pairs = (ranges.loc[model, frames, peer] for peer in (EAGER, SDPA))
        return " / ".join(f"{pair.low:.1f}–{pair.high:.1f}×" for pair in pairs)

    rows = [
        (model, *(cell(model, frames) for frames in MARGIN_FRAMES))
        for model in found[0].model.unique()
    ]
    table = Table("", ("model", *(f"N = {frames}" for frames in MARGIN_FRAMES)), rows)
    calls = []
    for machine, place in MACHINES.items():
        overhead = figures.kernel_rows(_read("calls", place), "overhead").set_index("peer").time
        calls.append(f"{overhead[VSTAR_KERNELS] * 1e6:.0f} µs on {machine}")
    return f"{table.markdown()}\nOne call on a tiny input costs {', '.join(calls)}."


def machines() -> str:
    """Returns the docs' table of every size of head on all machines, side by side."""
    found = [_kernels(place).set_index("key") for place in MACHINES.values()]
    common = set.intersection(*(set(frame.index) for frame in found))
    shown = found[0][found[0].index.isin(common) & found[0].share.notna()]
    sizes = ["suite", "dtype", "frames", "head_dim"]
    rows = []
    for key, case in shown.drop_duplicates(sizes).sort_values(sizes).iterrows():
        cells = []
        for frame in found:
            here = frame.loc[key]
            cells += [f"{here.time * 1e3:.1f} ms", f"{here.share:.0%}"]
            cells += [f"{here[peer]:.2f}×" if here[peer] > 0 else "–" for peer in (EAGER, SDPA)]
        rows.append(
            (f"{case.suite}, {case['dtype']}", f"{case.frames:,}", f"{case.head_dim}", *cells)
        )
    header = ["suite", "N", "D"]
    for name in MACHINES:
        header += [f"{name}: time", "of the floor", "eager", "SDPA"]
    return Table("", header, rows).markdown()


def _kernels(place: Path) -> pd.DataFrame:
    """Returns the kernels' rows of a machine's runs, with the peers' ratios."""
    rows = pd.concat(
        figures.kernel_rows(_read(name, place)) for name in COMPARED if _has(name, place)
    )
    ratios = rows.pivot_table(index="key", columns="peer", values="ratio")
    return rows[rows.peer == VSTAR_KERNELS].join(ratios[[EAGER, SDPA]], on="key")


def everything() -> str:
    """Returns the docs' tables: every one of every kept run."""
    parts = []
    for machine, place in MACHINES.items():
        for name in RUNS:
            if not _has(name, place):
                continue
            run = _read(name, place)
            parts.append(f"## {name}, {machine}\n\n{describe(run)}\n")
            parts += [table.markdown("### ") for table in all_tables(run)]
    return "\n".join(parts)


def of_pages() -> str:
    """Returns what new pages cost, and what spares them."""
    kept = json.loads((ZEN_3 / "pages.json").read_text())
    machine = f"AMD EPYC (Zen 3), {kept['environment']['threads']} threads"
    huge = kept["environment"]["transparent huge pages"]
    note = f"{machine}, PyTorch {kept['environment']['torch']}, transparent huge pages: `{huge}`."
    return f"{pages.table(kept['results']).markdown()}\n{note}"


def pictures() -> str:
    """Returns the docs' pictures: some of the first run's plots, for light and dark pages."""
    return "\n\n".join(
        f"**{title}**\n\n"
        f'<picture><source srcset="plots/{name}-dark.svg" media="(prefers-color-scheme: dark)">'
        f'<img src="plots/{name}-light.svg" alt="{title}"></picture>'
        for title, name in PLOTTED.items()
    )


def draw() -> None:
    """Writes the plots' files."""
    PLOTS.mkdir(exist_ok=True)
    for plot in plots.all_plots(_read(RUNS[0])):
        if name := PLOTTED.get(plot.title):
            for theme, svg in plot.svg.items():
                (PLOTS / f"{name}-{theme}.svg").write_text(svg, encoding="utf-8")


def predictions() -> str:
    """Returns what the compiled tiles in bfloat16 are predicted to reach, never measured."""
    report = json.loads(CODEGEN.read_text())
    found = pd.json_normalize(report["kernels"])
    found = found[
        (found.kernel == "tile") & (found.kind == "16-bit") & (found.variant == "gaussian")
    ]
    found = found[found.head_dim.isin(PREDICTED_HEAD_DIMS)].convert_dtypes()
    frame = pd.DataFrame(
        {
            "architecture": found.architecture,
            "N": found.frames,
            "D": found.head_dim,
            "bytes": found.sequence_bytes.map("{:,}".format),
            "operations": found.sequence_operations.map("{:,}".format),
            "warps": found["config.warps"],
            "registers": found.registers,
            "shared": found.shared.map("{:,}".format),
            "programs": found.resident,
            "share of the bandwidth": percent(found.share),
            "limit": found.limit.where(found.headroom < 1, "memory"),
        }
    )
    table = of_frame("", frame.astype(str)).markdown().strip()
    return f"Predicted from Triton {report['triton']}'s code, not measured:\n\n{table}"


def keep(folder: Path) -> Path:
    """Copies the files of ``gpu_check.sh`` to the kept results; returns their folder.

    Raises:
        ResultsError: They are not of one GPU.
    """
    runs = {x.name: folder / f"{x.name}.jsonl" for x in STAGES if x.suites}
    found = [results.load(path) for path in runs.values() if path.exists()]
    devices = sorted({str(run.environment["device"]) for run in found})
    if len(devices) != 1 or any(run.plan.device != "cuda" for run in found):
        raise ResultsError(
            f"{folder}: must have the results of one GPU, has those of {devices or 'none'}"
        )
    place = KEPT / (GPUS + re.sub(r"[^a-z0-9]+", "-", devices[0].lower()).strip("-"))
    place.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if (file := folder / f"{stage.name}.jsonl").exists():
            shutil.copyfile(file, place / file.name)
    return place


def measured() -> str:
    """Returns the docs' part on GPUs: what each of the kept ones' stages found."""
    parts = []
    for folder in sorted(KEPT.glob(f"{GPUS}*")):
        parts.append(f"### {folder.name.removeprefix(GPUS)}\n")
        for stage in STAGES:
            file = folder / f"{stage.name}.jsonl"
            if not file.exists():
                continue
            if stage.suites:
                run = _read(stage.name, folder)
                parts.append(f"#### {stage.title[0].upper()}{stage.title[1:]}\n\n{describe(run)}\n")
                parts += [table.markdown("##### ") for table in all_tables(run)]
            elif stage.name != "tune":
                counts = Counter(x["outcome"] for x in pytest_lines.read(file).values())
                told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
                parts.append(f"{stage.title[0].upper()}{stage.title[1:]}: {told}.\n")
    return "\n".join(parts) or NOTHING_MEASURED


def replace(path: Path, name: str, text: str) -> None:
    """Puts ``text`` between the marks called ``name``."""
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


def _read(name: str, folder: Path = RESULTS) -> Run:
    return results.load(folder / f"{name}.jsonl")


def _has(name: str, place: Path) -> bool:
    """Returns whether a machine has such a run: "long" is within another's "float32"."""
    return (place / f"{name}.jsonl").exists()


@dataclass(frozen=True)
class Options:
    """Write the kept results' tables into the README and the docs."""

    keep: Path | None = None
    """A folder of gpu_check.sh, whose results are kept from now on."""


def main(arguments: list[str] | None = None) -> None:
    """Writes all tables and pictures."""
    options = read_options(Options, arguments, prog="python -m benchmarks.publish")
    if options.keep is not None:
        print(keep(options.keep))
    replace(ROOT / "README.md", "cpu", margins())
    replace(ROOT / "docs/performance/cpu.md", "plots", pictures())
    replace(ROOT / "docs/performance/cpu.md", "cpu", everything())
    replace(ROOT / "docs/performance/cpu.md", "pages", of_pages())
    replace(ROOT / "docs/performance/cpu.md", "machines", machines())
    draw()
    replace(ROOT / "docs/performance/gpu.md", "predictions", predictions())
    replace(ROOT / "docs/performance/gpu.md", "measured", measured())


if __name__ == "__main__":
    main()
