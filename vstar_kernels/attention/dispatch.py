"""Which backend runs a call.

A backend is a module. One question to it, ``why_not``, answers the automatic choice, the error of
an explicit choice, :func:`why_not` and :func:`available`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Protocol

from torch import Tensor

from vstar_kernels.attention import cpu, reference, triton
from vstar_kernels.attention.bias import Bias
from vstar_kernels.attention.call import Call, Forward, Gradients, Wanted, check_call


class Backend(Protocol):
    """The functions that a backend's module provides."""

    def unavailable(self) -> list[str]:
        """Returns the reasons why it cannot run anything here; none if it can."""

    def why_not(self, call: Call) -> list[str]:
        """Returns the reasons why it cannot run this call; none if it can."""

    def forward(self, call: Call, *, save: bool = False) -> Forward:
        """Computes the output, and the mean map where the call asks for it.

        With ``save``, a backward pass will follow: what the backend keeps for it is returned too.
        torch.compile and torch.func never ask for that: their operator has no place for it.
        """

    def backward(
        self,
        call: Call,
        out: Tensor,
        saved: tuple[Tensor, ...],
        grad_out: Tensor | None,
        grad_map: Tensor | None,
        wanted: Wanted,
    ) -> Gradients:
        """Computes the gradients of query, key and value, and those ``wanted`` besides.

        ``out`` is what ``forward`` returned, and ``saved`` what it saved, or nothing, and then all
        is computed anew. A gradient that is None is zero.
        """


class SlowBackendWarning(UserWarning):
    """A call was left to the reference, which holds every attention map in memory."""


# In the order of preference; the reference runs anything.
BACKENDS: dict[str, Backend] = {"cpu": cpu, "triton": triton, "reference": reference}


def available() -> dict[str, list[str]]:
    """Returns each backend's reasons why it cannot run here; an empty list if it can."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = None,
    *,
    scale: float | None = None,
    return_map: bool = False,
    map_block: int = 1,
) -> dict[str, list[str]]:
    """Returns each backend's reasons why it cannot run this call; an empty list if it can.

    >>> vk.backends.why_not(query.double(), key.double(), value.double())["cpu"]
    ['takes torch.float32, torch.bfloat16, torch.float16, query is torch.float64']

    Args:
        query, key, value, bias, scale, return_map, map_block: As for
            :func:`vstar_kernels.tar_attention`, which raises for the same bad arguments.
    """
    call = check_call(
        query, key, value, bias, scale=scale, return_map=return_map, map_block=map_block
    )
    return {name: backend.why_not(call) for name, backend in BACKENDS.items()}


def backend(call: Call, name: str | None) -> Backend:
    """Returns the backend that :func:`choose` names."""
    return BACKENDS[choose(call, name)]


def choose(call: Call, name: str | None) -> str:
    """Returns ``name`` if that backend can run the call; of None, the first backend that can.

    Raises:
        ValueError: The name is unknown, or that backend cannot run the call.
    """
    if name is not None:
        return _check_choice(call, name)
    reasons = {}
    for name, backend in BACKENDS.items():
        reasons[name] = backend.why_not(call)
        if not reasons[name]:
            if backend is reference:
                _warn_once(_list_reasons(reasons))
            return name
    raise AssertionError("the reference runs any checked call")


def _check_choice(call: Call, name: str) -> str:
    if name not in BACKENDS:
        allowed = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend must be one of {allowed} or None, got {name!r}")
    reasons = BACKENDS[name].why_not(call)
    if reasons:
        raise ValueError(
            f"backend {name!r} cannot run this call:\n{_list_reasons({name: reasons})}\n"
            f"It was given:\n{call.describe()}"
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
