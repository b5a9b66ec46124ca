"""What was found in each compiled case, as plain data and as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import triton

from benchmarks.codegen import cases, model
from benchmarks.codegen.cases import Case
from benchmarks.codegen.compile import inspect
from benchmarks.codegen.targets import TARGETS

Result = dict[str, Any]
TEMPLATE = Path(__file__).with_name("report.md.jinja")


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
        result |= asdict(model.predict(case, binary, target))
    return result


def offenders(results: Iterable[Result]) -> list[str]:
    """Returns what may not be shipped, and why."""
    return [f"{x['name']}: {'; '.join(x['faults'])}" for x in results if x["faults"]]


def tables(results: list[Result]) -> str:
    """Returns two tables for each architecture: the commonest calls, and the others in short."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text()).render(
        triton=triton.__version__,
        results=results,
        targets=TARGETS,
        common=(cases.GAUSSIAN.name, cases.GRADIENTS.name),
    )
