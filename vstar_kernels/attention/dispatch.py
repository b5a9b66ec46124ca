"""Which backend runs a call. One question, ``why_not``, answers the automatic choice, the error of
an explicit one and :func:`available`."""

from __future__ import annotations

import functools
import warnings
from typing import Protocol

from torch import Tensor

from vstar_kernels.attention import cpu, reference, triton
from vstar_kernels.attention.call import Problem


class Backend(Protocol):
    """What a backend module provides."""

    def unavailable(self) -> list[str]:
        """Reasons it cannot run anything here; empty if it can."""

    def why_not(self, problem: Problem) -> list[str]:
        """Reasons it cannot run this call; empty if it can."""

    def run(self, problem: Problem) -> Tensor | tuple[Tensor, Tensor]:
        """The output, or ``(output, map)`` where the problem asks for the map."""

    def backward(
        self,
        problem: Problem,
        out: Tensor,
        grad_out: Tensor | None,
        grad_map: Tensor | None,
        wanted: set[str],
    ) -> dict[str, Tensor]:
        """Gradients of "query", "key" and "value", and of those of "values" and "stat" ``wanted``.

        ``out`` is what ``run`` returned; None for a gradient means that it is zero.
        """


class SlowBackendWarning(UserWarning):
    """A call was left to the reference, which holds every attention map in memory."""


# In the order of preference; the reference runs anything.
BACKENDS: dict[str, Backend] = {"cpu": cpu, "triton": triton, "reference": reference}


def available() -> dict[str, list[str]]:
    """Each backend's reasons why it cannot run here; an empty list if it can."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def backend(problem: Problem, name: str | None) -> Backend:
    """The backend that :func:`choose` names."""
    return BACKENDS[choose(problem, name)]


def choose(problem: Problem, name: str | None) -> str:
    """``name`` if that backend can run the problem, or the first that can.

    Raises:
        ValueError: Unknown name, or that backend cannot run the problem.
    """
    if name is not None:
        return _explicit(problem, name)
    reasons = {}
    for name, backend in BACKENDS.items():
        reasons[name] = backend.why_not(problem)
        if not reasons[name]:
            if backend is reference:
                _warn_once(_list_reasons(reasons))
            return name
    raise AssertionError("the reference runs any checked problem")


def _explicit(problem: Problem, name: str) -> str:
    if name not in BACKENDS:
        allowed = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend must be one of {allowed} or None, got {name!r}")
    reasons = BACKENDS[name].why_not(problem)
    if reasons:
        raise ValueError(
            f"backend {name!r} cannot run this call:\n{_list_reasons({name: reasons})}\n"
            f"It was given:\n{problem.describe()}"
        )
    return name


def _list_reasons(reasons: dict[str, list[str]]) -> str:
    return "\n".join(f"  {name}: {reason}" for name, rs in reasons.items() for reason in rs)


@functools.cache
def _warn_once(reasons: str) -> None:
    warnings.warn(
        "tar_attention runs on the slow PyTorch reference (backend='reference' says so "
        f"without this warning), because of\n{reasons}",
        SlowBackendWarning,
        stacklevel=4,
    )
