"""Exported programs that compute without Python: the operators lowered to those of the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vstar_kernels.attention import autograd, native


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Returns what lowers the operators of an exported program to C++ ones, for the CPU.

    >>> program = torch.export.export(model, arguments)
    >>> program = program.run_decompositions(vk.backends.decompositions())
    >>> torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")

    ``torch.export`` leaves ``vstar_kernels::attention`` and its like in the graph: operators that
    are registered from Python, choose a backend when they run and have a gradient. Lowered, the
    graph calls the operators of :func:`native_library`, which need no Python and have no gradient.
    ``run_decompositions`` raises the ValueError of ``backend="cpu"`` for a call that the C++
    kernels do not take.
    """
    operators = (autograd.attention, autograd.frame_attention, autograd.column_attention)
    return {x.forward_operator.default: x.lowered for x in operators}


def native_library() -> Path:
    """Returns the C++ library, which a program without Python loads before a lowered package.

    It then calls the library's ``vstar_kernels_define_operators()``, which returns 0; where
    ``vstar_kernels`` is imported, that has been done, and it returns 1.

    Raises:
        RuntimeError: There is none here, with the reason.
    """
    library = native.load()
    if library.problems:
        raise RuntimeError("; ".join(library.problems))
    return library.path
