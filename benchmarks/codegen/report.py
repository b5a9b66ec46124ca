"""What was found in each compiled case, as plain data and as tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from benchmarks.codegen import cases, model, rules
from benchmarks.codegen.binary import Counts
from benchmarks.codegen.cases import Case
from benchmarks.codegen.compile import inspect
from benchmarks.codegen.targets import TARGETS
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig

Result = dict[str, Any]
HEAD = (
    "| kernel | type | N | D | blocks | warps | registers | shared | programs | loads | stores "
    "| matrix | instructions | bytes | operations | share | limit |\n"
    "|---|---|--:|--:|---|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|---|"
)


def examine(case: Case) -> Result:
    """Compile a case and say what came out; ``faults`` is empty where it may be shipped."""
    row, target = case.row, TARGETS[case.row.architecture]
    try:
        binary = inspect(case)
    except (RuntimeError, ValueError) as error:
        reason = f"does not compile: {type(error).__name__}: {str(error)[:200]}"
        return {"name": case.name, "faults": [reason]}
    faults = rules.faults(case, binary, target)
    if binary.shared > case.config.shared:
        faults.append(f"takes {binary.shared} bytes of shared memory, {case.config.shared} stated")
    result = {
        "name": case.name,
        "architecture": row.architecture,
        "kernel": case.kernel,
        "variant": case.variant.name,
        "kind": row.kind,
        "frames": row.frames,
        "head_dim": case.head_dim,
        "config": _sizes(case.config),
        **asdict(binary),
        "resident": model.resident(binary, case.config.warps, target),
        "faults": faults,
    }
    if case.kernel == "tile":
        prediction = model.predict(case, binary, target)
        result |= asdict(prediction) | {"share": prediction.share}
    return result


def _sizes(config: TileConfig | StreamConfig) -> dict[str, int]:
    return {name: value for name, value in vars(config).items() if name != "own"}


def is_main(result: Result) -> bool:
    """Whether it gets a line of its own in the tables: the commonest call of each row."""
    common = {cases.GAUSSIAN.name, cases.GRADIENTS.name}
    return result.get("variant") in common and "architecture" in result


def tables(results: list[Result]) -> str:
    """Markdown: a table for each architecture, then its other variants in short."""
    parts = []
    for name, group in itertools.groupby(
        (x for x in results if "architecture" in x), key=lambda x: x["architecture"]
    ):
        target, members = TARGETS[name], list(group)
        lines = "\n".join(line(x) for x in members if is_main(x))
        parts.append(
            f"## {name}\n\nShares of the bandwidth are predicted for {target.gpu}, "
            f"{target.bandwidth / 1e12:.2f} TB/s; none is measured.\n\n{HEAD}\n{lines}\n\n"
            f"{others(members)}\n"
        )
    return "\n".join(parts)


def line(result: Result) -> str:
    """One row of a table."""
    config = result["config"]
    registers = str(result["registers"])
    if result["in_lanes"]:
        registers += f" ({result['in_lanes']} scalar in lanes)"
    work = "| | | |"
    if result["kernel"] == "tile":
        limit = result["limit"] if result["headroom"] < 1 else "memory"
        work = (
            f"| {result['sequence_bytes']} | {result['sequence_operations']} "
            f"| {result['share']:.0%} | {limit}"
        )
    if "sequences" in config:
        blocks = f"{config['sequences']} of {config['rows']} rows"
    else:
        blocks = f"{config['rows']} × {config['keys']}, {config['stages']} stages"
    return (
        f"| {result['kernel']} | {result['kind']} | {result['frames'] or ''} "
        f"| {result['head_dim']} | {blocks} | {config['warps']} | {registers} "
        f"| {result['shared']} | {result['resident']} | {span(result['loads'])} "
        f"| {span(result['stores'])} | {', '.join(result['matrix']) or 'none'} "
        f"| {result['instructions']} {work} |"
    )


def others(results: Iterable[Result]) -> str:
    """The variants that have no line of their own, by the most that they need."""
    lines = [
        "| variant | kernels | most registers | most shared | fewest programs | narrowest load |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    rest = sorted((x for x in results if not is_main(x)), key=lambda x: x["variant"])
    for variant, group in itertools.groupby(rest, key=lambda x: x["variant"]):
        found = list(group)
        lines.append(
            f"| {variant} | {len(found)} | {max(x['registers'] for x in found)} "
            f"| {max(x['shared'] for x in found)} | {min(x['resident'] for x in found)} "
            f"| {min(min(x['loads']) for x in found)} |"
        )
    return "\n".join(lines)


def span(widths: Counts) -> str:
    """The narrowest and the widest, in bytes."""
    numbers = sorted(map(int, widths))
    return "–".join(str(x) for x in dict.fromkeys([numbers[0], numbers[-1]]))


def offenders(results: Iterable[Result]) -> list[str]:
    """What may not be shipped, and why."""
    return [f"{x['name']}: {'; '.join(x['faults'])}" for x in results if x["faults"]]
