"""A class of its own for a module or a scheduler, for as long as a handle needs it.

What is to happen around every call of a module, or whenever one of its attributes is read, belongs
to its class: torch runs no hook after a ``KeyboardInterrupt``, and none when an attribute is read.
PyTorch's ``fully_shard`` changes the classes of modules in the same way. A copy or a pickle of such
a module is of the class that the module had before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

_CHANGE, _BASE = "_vstar_kernels_change", "_vstar_kernels_base"
_LOCK = threading.RLock()  # of all modules' classes: several handles may change one at a time


class ClassChange:
    """A change to the classes of some modules, or schedulers; each keeps its class's name.

    Args:
        attributes: Returns what the new class has that the module's own, which it is given, has
            not, by name.
    """

    def __init__(self, attributes: Callable[[type], dict[str, Any]]) -> None:
        self._attributes = attributes
        self._made: WeakValueDictionary[type, type] = WeakValueDictionary()

    def put_on(self, module: Any) -> None:
        """Changes a module's class, unless it is changed already."""
        with _LOCK:
            if not any(cls.__dict__.get(_CHANGE) is self for cls in type(module).__mro__):
                module.__class__ = self._derive(type(module))

    def take_off(self, module: Any) -> None:
        """Gives a module the class back that it had.

        Where somebody else has put a class over ours since, ours stays underneath.
        """
        with _LOCK:
            if type(module).__dict__.get(_CHANGE) is self:
                module.__class__ = type(module).__dict__[_BASE]

    def _derive(self, base: Any) -> type:
        found = self._made.get(base)
        if found is not None:
            return found

        own = base  # without any change
        while _BASE in own.__dict__:
            own = own.__dict__[_BASE]

        def reduce(module: Any, protocol: Any) -> Any:
            make, arguments, *rest = base.__reduce_ex__(module, protocol)
            if derived not in arguments:
                return make, arguments, *rest
            # pickle refuses copyreg's own function for another class than the module's.
            return _new, tuple(own if x is derived else x for x in arguments), *rest

        names = ("__module__", "__qualname__", "__doc__")
        derived: type = type(
            base.__name__,
            (base,),
            {
                **{name: getattr(base, name) for name in names},
                **{_CHANGE: self, _BASE: base, "__reduce_ex__": reduce},
                **self._attributes(base),
            },
        )
        self._made[base] = derived
        return derived


def _new(cls: type, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)
