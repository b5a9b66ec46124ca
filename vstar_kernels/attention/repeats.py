"""Calls like earlier ones, which go to their backend without checks, a choice or a plan's key.

Python takes longer to check a small call than its kernel runs, and a model makes the same few calls
at every step. They are found again by what they are given besides tensors, and by what
``torch.compile`` guards its graphs with: the type, shape, strides, device and requires_grad of each
tensor, and what torch would do with it, so that none is taken for another under autocast, inference
mode or a transform of ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention.call import autocasts, follows_tangents

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is torch's own affair; without it every call is checked
    TensorGuards = None  # type: ignore[assignment, misc]

MOST = 1024  # things given, of any operation, that are remembered
ALIKE = 8  # calls that were given the same, with tensors that differ in their strides or devices


class Repeats:
    """The calls of one operation that need no checks, as one like them has passed them.

    They are not for ``torch.compile``, which checks a call while it traces, once.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[tuple[Any, Callable[..., Any]], ...]] = {}

    def find(self, given: tuple[Any, ...], tensors: tuple[Any, ...]) -> Callable[..., Any] | None:
        """Returns what computes a call on such tensors; None where no call was like it.

        Args:
            given: The call's other arguments, as they came. They say how many tensors there are.
            tensors: The query first.
        """
        if _is_followed() or type(tensors[0]) is not Tensor:
            return None
        try:
            known = self._known.get(_key(given, tensors), ())
        except (TypeError, RuntimeError):  # without a hash, or a shape as nested tensors are
            return None
        for guards, run in known:
            if guards.check(*tensors):
                return run
        return None

    def keep(
        self,
        given: tuple[Any, ...],
        tensors: tuple[Any, ...],
        prepare: Callable[[], Callable[..., Any]],
    ) -> None:
        """Keeps what ``prepare`` gives: what computes calls like one, which has no gradient.

        It holds none of the tensors, nor may ``given``.
        """
        if TensorGuards is None or _is_followed() or autocasts(tensors[0]):  # of no one type
            return
        # A tensor that is given twice passes no guards.
        if len(set(map(id, tensors))) < len(tensors) or {*map(type, tensors)} != {Tensor}:
            return
        sizes: Any = [list(x.shape) for x in tensors]
        strides: Any = [list(x.stride()) for x in tensors]
        run = prepare()
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        if len(self._known) >= MOST:
            self._known.clear()
        key = _key(given, tensors)
        # A new tuple, as other threads may go through the old one.
        self._known[key] = ((guards, run), *self._known.get(key, ())[: ALIKE - 1])

    def forget(self) -> None:
        """Forgets all calls."""
        self._known.clear()


def _is_followed() -> bool:
    """Returns whether calls are watched or have tangents, which guards do not always see."""
    return torch._C._len_torch_dispatch_stack() > 0 or follows_tangents()


def _key(given: tuple[Any, ...], tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the key of a call; of types too, as True is 1, but no number of frames."""
    return tensors[0].shape, torch.is_grad_enabled(), *given, *map(type, given)
