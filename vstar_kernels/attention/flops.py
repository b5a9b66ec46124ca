"""The operators' floating-point operations, as ``torch.utils.flop_counter`` counts them.

Importing that module takes Triton along, so nothing here does. Where somebody else imported it,
the first call under a ``FlopCounterMode`` makes the formulas known: to all modes to come, and to
those that count already. :mod:`autograd` takes every call under a mode through its operator.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

COUNTER = "torch.utils.flop_counter"
# By operator: the operations of its arguments, as the counter calls it.
FORMULAS: dict[Any, Callable[..., int]] = {}


def make_known() -> None:
    """Gives the formulas to every ``FlopCounterMode`` that is on, and to those to come."""
    if COUNTER not in sys.modules:
        return
    counters = [getattr(mode, "counter", mode) for mode in _get_current_dispatch_mode_stack()]
    registries = [x.flop_registry for x in counters if hasattr(x, "flop_registry")]
    if registries:
        _register()
    for registry in registries:
        registry.update(FORMULAS)


@functools.cache
def _register() -> None:
    register = sys.modules[COUNTER].register_flop_formula
    for operator, formula in FORMULAS.items():
        register(operator, get_raw=True)(formula)
