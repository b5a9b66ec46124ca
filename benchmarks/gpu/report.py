"""A suite's result as a table in Markdown, and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.contestants import SDPA
from benchmarks.gpu.suites import LARGE

Row = dict[str, Any]


def seconds(row: Row, *names: str) -> float | None:
    """The fastest of some contestants, if any of them finished."""
    found = [row["times"][x]["median"] for x in names if x in row["times"]]
    return min((x for x in found if x is not None), default=None)


def share(row: Row) -> float | None:
    """Of the bandwidth of a copy of as many bytes, in the same rounds."""
    return ratio(seconds(row, "copy"), seconds(row, "vstar_kernels"))


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where either is missing."""
    return None if numerator is None or not denominator else numerator / denominator


def cells(row: Row) -> list[str]:
    """A row's figures: times are ours, factors how many times as long the others take."""
    ours = seconds(row, "vstar_kernels")
    plain = seconds(row, *SDPA)
    fastest = next((x[5:] for x in SDPA if plain and seconds(row, x) == plain), "")
    rate = ratio(row["operations"] / 1e12, ours)
    return [
        f"{row['model']} {row['level']}".strip(),
        *(str(row[x]) for x in ("batch", "frames", "heads", "head_dim")),
        f"{row['traffic'] / 1e6:.0f}",
        _number(ours and ours * 1e6, ".0f"),
        _number(share(row), ".0%"),
        _number(rate, ".0f"),
        _number(ratio(ours, seconds(row, "strength 0")), ".3f"),
        _number(ratio(seconds(row, "eager"), ours), ".1f"),
        _number(ratio(seconds(row, "flex"), ours), ".1f"),
        f"{_number(ratio(plain, ours), '.2f')} {fastest}".strip(),
    ]


HEAD = (
    "| case | batch | N | heads | D | MB moved | µs | of the copy's bandwidth | TFLOP/s "
    "| over strength 0 | eager | Flex, two passes | SDPA without TAR |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|"
)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    facts = result["environment"]
    lines = [f"| {' | '.join(cells(row))} |" for row in result["rows"]]
    text = (
        f"{facts['gpu']}, torch {facts['torch']}, triton {facts['triton']}, bfloat16, σ = 1, "
        "cold inputs, medians. The last three columns: how many times as long the others take.\n\n"
        f"{HEAD}\n" + "\n".join(lines) + "\n"
    )
    if result["not_reached"]:
        text += f"\nNot reached in the time: {len(result['not_reached'])} cases.\n"
    failed = failures(result)
    return text + ("\nThose that failed:\n\n" + "\n".join(failed) + "\n" if failed else "")


def failures(result: dict[str, Any]) -> list[str]:
    """Who failed on what, and how."""
    return [
        f"- {name} on ({row['batch']}, {row['frames']}, {row['heads']}, {row['head_dim']}): "
        f"{times['error']}"
        for row in result["rows"]
        for name, times in row["times"].items()
        if times["error"]
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Share of the copy's bandwidth by frames, or operations per second of long sequences."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    tile = result["suite"] == "tile"
    rows = [row for row in result["rows"] if not tile or row["traffic"] >= LARGE]
    for head_dim in sorted({row["head_dim"] for row in rows}):
        mine = sorted((x for x in rows if x["head_dim"] == head_dim), key=lambda x: x["frames"])
        for name, style in (("vstar_kernels", "o"), ("SDPA without TAR", "x")):
            points = [(x["frames"], _height(x, name, tile)) for x in mine]
            points = [point for point in points if point[1] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=f"{name}, D = {head_dim}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("frames")
    axes.set_ylabel("share of a copy's bandwidth" if tile else "TFLOP/s")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{result['environment']['gpu']}, bfloat16")
    if axes.has_data():
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _height(row: Row, name: str, tile: bool) -> float | None:
    took = seconds(row, *(SDPA if name.startswith("SDPA") else (name,)))
    return ratio(seconds(row, "copy"), took) if tile else ratio(row["operations"] / 1e12, took)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
