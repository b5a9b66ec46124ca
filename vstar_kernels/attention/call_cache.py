"""Calls like earlier ones, which go to their backend without checks, a choice or a plan's key.

Python takes longer to check a small call than its kernel runs, and a model makes the same few calls
at every step. They are found again by their other arguments, and by what ``torch.compile`` guards
its graphs with: the type, shape, strides, device and requires_grad of each tensor, and what torch
would do with it, so that none is taken for another under autocast, inference mode or a transform of
``torch.func``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention.call import autocasts, follows_tangents

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is torch's own affair; without it every call is checked
    TensorGuards = None  # type: ignore[assignment, misc]

# Of arguments, those that have no ideas of their own of what is equal, and that nothing changes.
KINDS = frozenset({type(None), bool, int, float, str, tuple})
MAX_VARIANTS = 8  # of the same arguments, with tensors that differ in their strides or types


class CallCache:
    """Functions that compute calls like those that were checked, for one operation.

    They are not for ``torch.compile``, which checks a call once, while it traces.

    Args:
        max_keys: How many different arguments are remembered; the oldest are forgotten.
        kinds: The types of such arguments, besides KINDS. Calls with others, and with subclasses of
            these, are not remembered.
    """

    def __init__(self, max_keys: int, kinds: Iterable[type] = ()) -> None:
        self.max_keys, self.kinds = max_keys, KINDS.union(kinds)
        self._known: OrderedDict[tuple[Any, ...], tuple[tuple[Any, Callable[..., Any]], ...]]
        self._known = OrderedDict()

    def get(
        self, arguments: tuple[Any, ...], tensors: tuple[Any, ...]
    ) -> Callable[..., Any] | None:
        """Returns what computes a call on such tensors; None where no call was like it.

        Args:
            arguments: The call's other arguments, as they came. They say how many tensors there
                are.
            tensors: The query and the key first.
        """
        for x in tensors:
            if type(x) is not Tensor or x.is_nested:  # at which guards end the process
                return None
        # Modes and tangents are what guards do not see, or not always.
        if torch._C._len_torch_dispatch_stack() or follows_tangents():
            return None
        key = self._key(arguments, tensors)
        if key is not None:
            for guards, run in self._known.get(key, ()):
                if guards.check(*tensors):
                    return run
        return None

    def put(
        self,
        arguments: tuple[Any, ...],
        tensors: tuple[Any, ...],
        prepare: Callable[[], Callable[..., Any]],
    ) -> None:
        """Keeps what ``prepare`` gives for calls like one, which no autograd and no mode sees.

        Not before the second time, as many arguments never come again. It may hold none of the
        tensors, nor may the arguments.
        """
        if autocasts(tensors[0]):  # guards would not see to which type
            return
        if torch._C._get_tracing_state() is not None:  # torch.jit's, for which shapes are tensors
            return
        key = self._key(arguments, tensors)
        if key is None:
            return
        variants = self._known.get(key)
        if variants is None:
            while len(self._known) >= self.max_keys:
                self._known.popitem(last=False)
            self._known[key] = ()
        elif len(variants) < MAX_VARIANTS and (guards := _guards(tensors)) is not None:
            # A new tuple, as other threads may go through the old one.
            self._known[key] = (*variants, (guards, prepare()))

    def _key(self, arguments: tuple[Any, ...], tensors: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Returns the key of a call, if all its arguments are of ``kinds``.

        Types are of it too, as True is 1, but no number of frames.
        """
        kinds = tuple(map(type, arguments))
        if not self.kinds.issuperset(kinds):
            return None
        return tensors[0].shape, tensors[1].shape, torch.is_grad_enabled(), arguments, kinds

    def clear(self) -> None:
        """Forgets all calls."""
        self._known.clear()


def _guards(tensors: tuple[Any, ...]) -> Any:
    """Returns the guards of tensors; None where some would pass none, or torch has other guards."""
    global TensorGuards
    # A tensor that comes twice passes no guards.
    if TensorGuards is None or len(set(map(id, tensors))) < len(tensors):
        return None
    if {*map(type, tensors)} != {Tensor}:
        return None
    sizes: Any = [list(x.shape) for x in tensors]
    strides: Any = [list(x.stride()) for x in tensors]
    try:
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    except TypeError:  # another torch's take other arguments: from here on every call is checked
        TensorGuards = None  # type: ignore[assignment, misc]
        return None
