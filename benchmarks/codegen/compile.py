"""Compiles a case as the JIT would, and reads what is in the binary."""

from __future__ import annotations

import hashlib
import pickle  # nosec B403
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import triton
from tqdm import tqdm
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from benchmarks.codegen import binary
from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import Case
from benchmarks.codegen.targets import TARGETS
from vstar_kernels.files import write_atomically

CACHE = Path(__file__).parents[2] / "build/codegen"
READER = hashlib.sha256(Path(binary.__file__).read_bytes()).hexdigest()[:8]
T = TypeVar("T")


def compile_case(case: Case) -> Any:
    """Compiles a kernel whose tensors are aligned to 16 bytes, as torch allocates them."""
    made, options = source(case)
    return triton.compile(made, target=TARGETS[case.entry.architecture].triton, options=options)


def source(case: Case) -> tuple[ASTSource, dict[str, Any]]:
    """Returns what Triton compiles of such a kernel, with its options."""
    target, launch = TARGETS[case.entry.architecture].triton, case.launch
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    tensors = [dtype and MockTensor(dtype) for dtype in case.tensor_types]
    arguments = launch.call_arguments(launch.needed._make(tensors))
    bound, specialization, options = bind(*arguments, **launch.keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def inspect(case: Case) -> Binary:
    """Returns what is in a compiled case; each kernel in Triton's cache is disassembled once."""
    kernel = compile_case(case)
    path = CACHE / f"{kernel.hash}-{READER}.pickle"
    if path.exists():
        # The lines below wrote it, into the user's own cache.
        return pickle.loads(path.read_bytes())  # nosec B301
    found = binary.read(kernel)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, pickle.dumps(found))
    return found


def in_processes(
    function: Callable[[Any], T], items: Sequence[Any], jobs: int, **bar: Any
) -> Iterator[T]:
    """Yields ``function`` of each item, from so many processes; from this one if it is one."""
    bar["total"] = len(items)
    if jobs == 1:
        yield from tqdm(map(function, items), **bar)
        return
    lock = {"initializer": tqdm.set_lock, "initargs": (tqdm.get_lock(),)}  # they write lines too
    with ProcessPoolExecutor(jobs, **lock) as executor:
        yield from tqdm(executor.map(function, items), **bar)
