"""``python -m benchmarks.publish``: writes the kept results' tables into the README and the docs.

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; it is never typed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks import cpu_backward
from benchmarks.cpu import describe, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu-amd-epyc-zen5-2-cores"
RUNS = ("native", "avx2")
CODEGEN = ROOT / "benchmarks/results/codegen/report.json"


def short_table() -> str:
    """The README's: the first suites with the warm allocator, in ratios."""
    lines = [
        "| type | instructions | N | here | eager TAR | SDPA *without* TAR |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name in RUNS:
        warm = _read(name)[0]
        for row in warm["rows"]:
            if row["dtype"] == "float16" or row["frames"] not in (16, 32, 64, 128):
                continue
            if row["head_dim"] != 64:
                continue
            ours, eager, sdpa = (row["seconds"][x] for x in ("vstar_kernels", "eager", "sdpa"))
            lines.append(
                f"| {row['dtype']} | {warm['environment']['isa']} | {row['frames']} "
                f"| {ours * 1e3:.1f} ms | {eager / ours:.1f}× as long "
                f"| {sdpa / ours:.1f}× as long |"
            )
    overhead = _read(RUNS[0])[0]["overhead_seconds"]
    lines.append(f"\nOne call on a tiny input costs {overhead * 1e6:.0f} µs.")
    return "\n".join(lines)


def full_tables() -> str:
    """The docs': everything that was measured."""
    parts = []
    for name in RUNS:
        for result in _read(name):
            parts.append(f"{describe(result)}\n\n{table(result)}")
    return "\n\n".join(parts)


def gradient_table() -> str:
    """Forward and backward together, and the mean map."""
    result = json.loads((RESULTS / "backward.json").read_text())
    return f"{describe(result)}\n\n{cpu_backward.table(result)}"


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


def _read(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())


if __name__ == "__main__":
    replace(ROOT / "README.md", "cpu", short_table())
    replace(ROOT / "docs/performance/cpu.md", "cpu", full_tables())
    replace(ROOT / "docs/performance/cpu.md", "cpu-backward", gradient_table())
    replace(ROOT / "docs/performance/gpu.md", "predictions", predictions())
