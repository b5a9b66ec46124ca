"""Launch → compiled kernel → what is in it, with the signature that the JIT would derive."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import triton
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from benchmarks.codegen import binary
from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import Case
from benchmarks.codegen.targets import TARGETS

CACHE = Path(__file__).parents[2] / "build/codegen"
READER = hashlib.sha256(Path(binary.__file__).read_bytes()).hexdigest()[:8]
T = TypeVar("T")


def compile_case(case: Case) -> Any:
    """The compiled kernel, whose tensors are aligned to 16 bytes, as torch allocates them."""
    target = TARGETS[case.row.architecture].triton
    kernel = case.launch.kernel
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    tensors = [None if dtype is None else MockTensor(dtype) for dtype in case.dtypes]
    bound, specialization, options = bind(*tensors, *case.launch.arguments, **case.launch.constants)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def inspect(case: Case) -> Binary:
    """What is in a compiled case; disassembled once for each kernel in Triton's cache."""
    kernel = compile_case(case)
    path = CACHE / f"{kernel.hash}-{READER}.json"
    if path.exists():
        return _from_json(json.loads(path.read_text()))
    found = binary.read(kernel)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{id(found)}.tmp")
    partial.write_text(json.dumps(asdict(found)))
    partial.rename(path)
    return found


def in_processes(function: Callable[[Any], T], items: Iterable[Any], jobs: int) -> Iterator[T]:
    """``function`` of each item in order, in so many processes; in this one if it is one."""
    if jobs == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(function, items)


def _from_json(fields: dict[str, Any]) -> Binary:
    """JSON's keys are strings; widths are numbers."""
    for name in ("loads", "other_loads", "stores"):
        fields[name] = {int(width): count for width, count in fields[name].items()}
    return Binary(**fields)
