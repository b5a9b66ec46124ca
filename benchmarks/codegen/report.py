"""What was found in each compiled case, as plain data and as Markdown tables."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from benchmarks.codegen import cases, model
from benchmarks.codegen.cases import Case
from benchmarks.codegen.compile import inspect
from benchmarks.codegen.targets import TARGETS

Result = dict[str, Any]
COLUMNS = (
    "kernel", "type", "N:", "D:", "blocks", "warps:", "registers:", "shared:", "programs:",
    "loads:", "stores:", "matrix", "instructions:", "bytes:", "operations:", "share:", "limit",
)  # fmt: skip
OTHER_COLUMNS = (
    "variant", "kernels:", "most registers:", "most shared:", "fewest programs:", "narrowest load:"
)  # fmt: skip


def examine(case: Case) -> Result:
    """Compiles a case and says what came out; ``faults`` is empty where it may be shipped."""
    entry, target = case.entry, TARGETS[case.entry.architecture]
    try:
        binary = inspect(case)
    except (RuntimeError, ValueError) as error:
        reason = f"does not compile: {type(error).__name__}: {str(error)[:200]}"
        return {"name": case.name, "faults": [reason]}
    faults = model.faults(case, binary, target)
    if binary.shared > case.config.shared:
        faults.append(f"takes {binary.shared} bytes of shared memory, {case.config.shared} stated")
    result = {
        "name": case.name,
        "architecture": entry.architecture,
        "kernel": case.kernel,
        "variant": case.variant.name,
        "kind": entry.kind,
        "frames": entry.frames,
        "head_dim": case.head_dim,
        "config": {name: n for name, n in vars(case.config).items() if isinstance(n, int)},
        **asdict(binary),
        "resident": model.resident(binary, case.config.warps, target),
        "faults": faults,
    }
    if case.kernel == "tile":
        prediction = model.predict(case, binary, target)
        result |= asdict(prediction) | {"share": prediction.share}
    return result


def offenders(results: Iterable[Result]) -> list[str]:
    """Returns what may not be shipped, and why."""
    return [f"{x['name']}: {'; '.join(x['faults'])}" for x in results if x["faults"]]


def tables(results: list[Result]) -> str:
    """Returns two tables for each architecture: the commonest calls, and the others in short."""
    common = {cases.GAUSSIAN.name, cases.GRADIENTS.name}
    compiled = (x for x in results if "architecture" in x)
    sections = []
    for name, group in itertools.groupby(compiled, key=lambda x: x["architecture"]):
        target, variants = TARGETS[name], defaultdict(list)
        for result in group:
            variants[None if result["variant"] in common else result["variant"]].append(result)
        lines = map(full_line, variants.pop(None, []))
        short = (short_line(variant, variants[variant]) for variant in sorted(variants))
        sections.append(
            f"## {name}\n\nShares of the bandwidth are predicted for {target.gpu}, "
            f"{target.bandwidth / 1e12:.2f} TB/s; none is measured.\n\n"
            f"{table(COLUMNS, lines)}\n\n{table(OTHER_COLUMNS, short)}\n"
        )
    return "\n".join(sections)


def full_line(result: Result) -> list[object]:
    """Returns a kernel's line in the table of the commonest calls."""
    config, registers, widths = result["config"], str(result["registers"]), []
    if result["in_lanes"]:
        registers += f" ({result['in_lanes']} scalar in lanes)"
    if "sequences" in config:
        blocks = f"{config['sequences']} of {config['queries']} queries"
    else:
        blocks = f"{config['queries']} × {config['keys']}, {config['stages']} stages"
    for counts in (result["loads"], result["stores"]):  # the narrowest and the widest
        widths.append("–".join(map(str, sorted({min(counts), max(counts)}))))
    prediction = [""] * 4
    if result["kernel"] == "tile":
        limit = result["limit"] if result["headroom"] < 1 else "memory"
        work = (result["sequence_bytes"], result["sequence_operations"])
        prediction = [*work, f"{result['share']:.0%}", limit]
    return [
        *(result["kernel"], result["kind"], result["frames"] or "", result["head_dim"]),
        *(blocks, config["warps"], registers, result["shared"], result["resident"], *widths),
        *(", ".join(result["matrix"]) or "none", result["instructions"], *prediction),
    ]


def short_line(variant: str, results: list[Result]) -> list[object]:
    """Returns a variant's line in the table of the others: the most that its kernels need."""
    most = [max(x[name] for x in results) for name in ("registers", "shared")]
    narrowest = min(min(x["loads"]) for x in results)
    return [variant, len(results), *most, min(x["resident"] for x in results), narrowest]


def table(columns: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    """Returns a table in Markdown; columns whose names end in a colon are set to the right."""
    rule = ["--:" if name.endswith(":") else "---" for name in columns]
    rows = [[name.rstrip(":") for name in columns], rule, *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
