"""Which backend runs a call of an operation.

A backend is a module. One question to it, ``why_not``, answers the automatic choice, the error of
an explicit choice, :func:`why_not` and :func:`available`. Each operation has its own backends;
those of one name share their libraries and their reasons to be unavailable.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from vstar_kernels.attention import cpu, reference, triton
from vstar_kernels.attention.bias import Bias
from vstar_kernels.attention.call import (
    Call,
    Forward,
    Gradients,
    Wanted,
    carry_tangents,
    check_call,
    follows_tangents,
)
from vstar_kernels.attention.call_cache import CallCache
from vstar_kernels.attention.columns import cpu as columns_cpu
from vstar_kernels.attention.columns import reference as columns_reference
from vstar_kernels.attention.columns.call import ColumnCall, ColumnGradients, ColumnWanted
from vstar_kernels.attention.columns.call import check_call as check_column_call
from vstar_kernels.attention.frames import composed
from vstar_kernels.attention.frames import cpu as frames_cpu
from vstar_kernels.attention.frames import reference as frames_reference
from vstar_kernels.attention.frames.call import (
    FrameCall,
    FrameGradients,
    FrameWanted,
    check_own_keys,
)
from vstar_kernels.attention.frames.call import check_call as check_frame_call
from vstar_kernels.attention.frames.layout import Layout
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.attention.triton import columns as columns_triton
from vstar_kernels.attention.triton import frames as frames_triton


class Describable(Protocol):
    """A call of any operation."""

    options: Any

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that there are, by their names in messages."""

    def describe(self) -> str:
        """Returns a line for each tensor and one for the options, for messages."""


C = TypeVar("C", bound=Describable)
C_contra = TypeVar("C_contra", contravariant=True)
W_contra = TypeVar("W_contra", contravariant=True)
G_co = TypeVar("G_co", covariant=True)


class Backend(Protocol[C_contra, W_contra, G_co]):
    """The functions that a backend's module provides, for calls of one operation.

    One whose ``why_not`` goes by nothing else than a call's options and its tensors' types, shapes,
    strides, devices and requires_grad provides ``prepare(call)`` too: it returns ``forward`` for
    calls that are like this one in all of that, though torch's settings may be others by then. Such
    calls are not checked again; see :mod:`call_cache`.
    """

    def unavailable(self) -> list[str]:
        """Returns the reasons why it cannot run anything here; none if it can."""

    def why_not(self, call: C_contra) -> list[str]:
        """Returns the reasons why it cannot run this call; none if it can."""

    def forward(self, call: C_contra, *, save: bool = False) -> Forward:
        """Computes the output, and the mean map where the call asks for it.

        With ``save``, a backward pass will follow: what the backend keeps for it is returned too.
        torch.compile and torch.func never ask for that: their operator has no place for it.
        """

    def backward(
        self,
        call: C_contra,
        out: Any,
        saved: tuple[Tensor, ...],
        grad_out: Tensor | None,
        grad_map: Tensor | None,
        wanted: W_contra,
    ) -> G_co:
        """Computes the gradients of query, key and value, and those ``wanted`` besides.

        Where ``wanted`` names query, key and value too, only what it says. ``out`` is what
        ``forward`` returned, of an operation that keeps it, and otherwise None; ``saved`` is what
        it saved, or nothing, and then all is computed anew. A gradient that is None is zero.
        """


class SlowBackendWarning(UserWarning):
    """A call was left to the reference, which holds every attention map in memory."""


class Operation(Generic[C, W_contra, G_co]):
    """An operation and its backends, in the order of preference; the last, the reference, runs all.

    ``name`` is the public function's, for messages. ``has_out`` tells of a call's options whether
    they ask for an output, and ``calls`` are those that need no checks.
    """

    def __init__(
        self,
        name: str,
        backends: dict[str, Backend[C, W_contra, G_co]],
        *,
        calls: CallCache,
        has_out: Callable[[Any], bool] = lambda options: True,
    ) -> None:
        self.name, self.backends, self.calls, self.has_out = name, backends, calls, has_out

    def why_not(self, call: C) -> dict[str, list[str]]:
        """Returns each backend's reasons why it cannot run this call; an empty list if it can."""
        return {name: self._reasons(call, name) for name in self.backends}

    def run(self, chosen: str, call: C, *, save: bool = False) -> Forward:
        """Runs the forward pass of a backend that can run the call; see :class:`Backend`."""
        return self._run(chosen, functools.partial(self.backends[chosen].forward, save=save), call)

    def _run(self, chosen: str, forward: Callable[[C], Forward], call: C) -> Forward:
        if not _profiled():
            return forward(call)
        with record_function(f"{self.name} ({chosen})"):
            return forward(call)

    def results(self, options: Any, out: Tensor, mean_map: Tensor | None) -> Any:
        """Returns what the public function returns: the output, the map, or both."""
        if not self.has_out(options):
            return mean_map
        return out if mean_map is None else (out, mean_map)

    def remember(
        self,
        arguments: tuple[Any, ...],
        tensors: tuple[Any, ...],
        chosen: str,
        call: C,
        make: Callable[..., C],
    ) -> None:
        """Has calls like this one computed without checks, where the backend can prepare for them.

        ``make`` returns the call on tensors like these; it holds none.
        """
        prepare = getattr(self.backends[chosen], "prepare", None)
        if prepare is None:
            return

        def prepared() -> Callable[..., Any]:
            forward, options = prepare(call), call.options

            def run(*tensors: Tensor) -> Any:
                out, mean_map, _ = self._run(chosen, forward, make(*tensors))
                return self.results(options, out, mean_map)

            return run

        self.calls.put(arguments, tensors, prepared)

    def run_backward(
        self,
        chosen: str,
        call: C,
        out: Any,
        saved: tuple[Tensor, ...],
        grad_out: Tensor | None,
        grad_map: Tensor | None,
        wanted: W_contra,
    ) -> G_co:
        """Runs the backward pass of a backend that can; see :class:`Backend`."""
        backend = self.backends[chosen]
        if not _profiled():
            return backend.backward(call, out, saved, grad_out, grad_map, wanted)
        with record_function(f"{self.name} backward ({chosen})"):
            return backend.backward(call, out, saved, grad_out, grad_map, wanted)

    def choose(self, call: C, name: str | None) -> str:
        """Returns ``name`` if that backend can run the call; of None, the first that can.

        Raises:
            ValueError: The name is unknown, or that backend cannot run the call.
            TypeError: The name is no string.
        """
        if name is not None:
            self.check_name(name)
            return self._check_choice(call, name)
        reasons = {}
        for name in self.backends:
            reasons[name] = self._reasons(call, name)
            if not reasons[name]:
                if name == "reference":
                    _warn_once(self.name, _list_reasons(reasons))
                return name
        raise AssertionError("the reference runs any checked call")

    def _reasons(self, call: C, name: str) -> list[str]:
        """Returns a backend's reasons, and that kernels have no forward-mode derivative."""
        reasons = self.backends[name].why_not(call)
        if name != "reference" and follows_tangents() and carry_tangents(call.tensors().values()):
            reasons = [*reasons, "has no forward-mode derivative, and a tensor carries a tangent"]
        return reasons

    def check_name(self, name: str | None) -> None:
        """Raises TypeError or ValueError unless a backend has this name, or it is None."""
        if name is None or (isinstance(name, str) and name in self.backends):
            return
        allowed = ", ".join(map(repr, self.backends))
        if not isinstance(name, str):
            raise TypeError(f"backend must be one of {allowed} or None, got {type(name).__name__}")
        raise ValueError(f"backend must be one of {allowed} or None, got {name!r}")

    def _check_choice(self, call: C, name: str) -> str:
        reasons = self._reasons(call, name)
        if reasons:
            raise ValueError(
                f"backend {name!r} cannot run this call:\n{_list_reasons({name: reasons})}\n"
                f"It was given:\n{call.describe()}"
            )
        return name


def _profiled() -> bool:
    """Returns whether the profiler is on: of Triton's launches it would see the kernels alone."""
    return not torch.compiler.is_compiling() and torch._C._autograd._profiler_enabled()


def _list_reasons(reasons: dict[str, list[str]]) -> str:
    return "\n".join(f"  {name}: {reason}" for name, rs in reasons.items() for reason in rs)


@functools.cache
def _warn_once(operation: str, reasons: str) -> None:
    warnings.warn(
        f"{operation} runs on the slow PyTorch reference (backend='reference' says so "
        f"without this warning), because of\n{reasons}",
        SlowBackendWarning,
        stacklevel=5,
    )


TAR_ATTENTION: Operation[Call, Wanted, Gradients] = Operation(
    "tar_attention",
    {"cpu": cpu, "triton": triton, "reference": reference},
    calls=CallCache(max_keys=1024),
)
FRAME_ATTENTION: Operation[FrameCall, FrameWanted, FrameGradients] = Operation(
    "frame_attention",
    {
        "triton": frames_triton,
        "cpu": frames_cpu,
        "composed": composed,
        "reference": frames_reference,
    },
    calls=CallCache(max_keys=64, kinds=(Layout, FrameRule)),  # they hold their rules' tables
)
COLUMN_ATTENTION: Operation[ColumnCall, ColumnWanted, ColumnGradients] = Operation(
    "column_attention",
    {"triton": columns_triton, "cpu": columns_cpu, "reference": columns_reference},
    calls=CallCache(max_keys=1024),
    has_out=lambda options: bool(options.wants_out),
)


# ---- what users ask ----


def available() -> dict[str, list[str]]:
    """Returns each backend's reasons why it cannot run here; an empty list if it can.

    It never raises: what a backend raises when it is asked is its reason.
    """
    every: dict[str, Any] = {**FRAME_ATTENTION.backends, **TAR_ATTENTION.backends}
    names = [*TAR_ATTENTION.backends, *(x for x in every if x not in TAR_ATTENTION.backends)]
    return {name: _told(every[name].unavailable) for name in names}


def _told(unavailable: Callable[[], list[str]]) -> list[str]:
    try:
        return unavailable()
    except Exception as error:  # whatever a damaged installation raises
        return [f"{type(error).__name__}: {error}"]


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = None,
    *,
    scale: float | None = None,
    return_map: bool = False,
    map_heads: bool = False,
    map_block: int = 1,
) -> dict[str, list[str]]:
    """Returns each backend's reasons why it cannot run this call; an empty list if it can.

    >>> vk.backends.why_not(query.double(), key.double(), value.double())["cpu"]
    ['takes torch.float32, torch.bfloat16, torch.float16, query is torch.float64']

    Args:
        query, key, value, bias, scale, return_map, map_heads, map_block: As for
            :func:`vstar_kernels.tar_attention`, which raises for the same bad arguments.
    """
    call = check_call(
        query,
        key,
        value,
        bias,
        scale=scale,
        return_map=return_map,
        map_heads=map_heads,
        map_block=map_block,
    )
    return TAR_ATTENTION.why_not(call)


def why_not_frames(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: FrameRule | None = None,
    **options: Any,
) -> dict[str, list[str]]:
    """Returns each backend's reasons why it cannot run this call; an empty list if it can.

    Args:
        query, key, value, layout, rule, options: As for :func:`vstar_kernels.frame_attention`,
            which raises for the same bad arguments.
    """
    if isinstance(rule, FrameRule) and rule.is_identity:  # no backend has anything to compute
        call = check_frame_call(query, key, value, layout, None, **options)
        check_own_keys(call, layout, options.get("key_layout"))
        return {name: [] for name in FRAME_ATTENTION.backends}
    return FRAME_ATTENTION.why_not(check_frame_call(query, key, value, layout, rule, **options))


def why_not_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    columns: Tensor,
    *,
    scale: float | None = None,
) -> dict[str, list[str]]:
    """Returns each backend's reasons why it cannot run this call; an empty list if it can.

    Args:
        query, key, value, columns, scale: As for :func:`vstar_kernels.column_attention`, which
            raises for the same bad arguments.
    """
    call = check_column_call(query, key, value, columns, scale=scale)
    return COLUMN_ATTENTION.why_not(call)
