"""One launch of a kernel, which finds what Triton compiled for it without Triton's search."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vstar_kernels.attention.triton.devices import DeviceTables

VECTOR_BYTES = 16  # the widest load of one thread
# Versions of Triton whose choice of a kernel has been read: it is documented nowhere, and another
# version may go by more than :class:`Launch` knows.
READ_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
# What is asked of Triton's compiler: products that are added to in one instruction. Triton warns
# from 3.9 on where nobody says so, as that will be its default no longer.
COMPILER = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid and all of its arguments but the tensors.

    ``needed`` is a tuple of the kernel's tensors, which says of each whether the kernel touches it.
    The others have to be None: then a kernel that touches one of them after all does not compile.

    A kernel that Triton has compiled is kept, as Triton's search for it takes longer than a small
    kernel runs. Triton chooses a kernel by types, alignment, device and settings; its other inputs
    are the plan's. A launch does not see that Triton's own caches are emptied or sources change:
    the plans' ``cache_clear`` forgets their kernels.

    ``tables`` are those of the needed tensors that are the same at every launch.
    """

    kernel: Any
    programs: int
    needed: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    tables: DeviceTables | None = None
    _compiled: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[Any, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def to(self, device: torch.device) -> Launch:
        """Returns the same launch with its tables on a device."""
        return self if self.tables is None else replace(self, tables=self.tables.to(device))

    def on(self, **tensors: Tensor | None) -> None:
        """Launches the kernel on its tables, and those of the named tensors that it needs.

        Raises:
            ValueError: One of them is not there.
        """
        if self.tables is not None:
            self.tables.in_use()
        given, get = self._own.copy(), tensors.get
        for name, place in self._places.items():
            given[place] = get(name)
        self._launch(tuple(given))

    def _launch(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Launches the kernel on tensors in the order of ``needed``, of others None."""
        key = self._specialization(tensors)
        kept = None if key is None else self._compiled.get(key)
        if kept is None:
            self._by_triton(key, tensors)
        else:
            launch, rest = kept
            launch(*self._of_tensors(tensors), *rest)

    @functools.cached_property
    def _keeps(self) -> bool:
        """Whether the kernel is compiled, and for nothing else than :meth:`_specialization` says.

        On AMD Triton goes by the size of each tensor's memory too.
        """
        triton = _triton()
        was_read = triton.version.startswith(READ_VERSIONS)
        return isinstance(self.kernel, triton.JITFunction) and was_read and not torch.version.hip

    def _specialization(self, tensors: Any) -> tuple[Any, ...] | None:
        """Returns what Triton compiles a kernel anew for, of what changes between launches.

        Of a tensor that is its type and whether it is aligned to 16 bytes; a plan's numbers, tables
        and grid stay. Then the current device, and whether Triton debugs. None where Triton is
        asked at every launch.
        """
        if not self._keeps:
            return None
        triton = _triton()
        # Triton calls these as it searches: a kernel that is launched by itself calls neither, and
        # only the second one's answer says which kernel it is.
        if self.kernel.pre_run_hooks or triton.runtime.add_stages_inspection_hook is not None:
            return None
        # Instrumented kernels are compiled by settings of their own, which grow with Triton.
        if triton.compilation.instrumentation_mode:
            return None
        changing = self._changing(tensors)
        return (
            triton.driver.active.get_current_device(),
            triton.runtime.debug,
            *[x if x is None else (x.dtype, x.data_ptr() % VECTOR_BYTES == 0) for x in changing],
        )

    @functools.cached_property
    def _changing(self) -> Callable[[Any], tuple[Tensor | None, ...]]:
        """Returns those of a launch's tensors that it needs and that are no tables."""
        first, *others = self._places.values()
        # Of a single place it returns no tuple.
        return operator.itemgetter(first, *(others or [first]))

    def _by_triton(self, key: tuple[Any, ...] | None, tensors: Any) -> None:
        """Launches the kernel as Triton finds or compiles it, and keeps what is compiled."""
        for name, place in self._places.items():
            if tensors[place] is None:
                raise ValueError(f"{self.kernel.__name__} needs {name}, none is given")
        arguments = self.call_arguments(self.needed._make(tensors))  # kernels go by their names
        compiled = self.kernel[(self.programs,)](*arguments, **self.keywords)
        if key is not None and isinstance(compiled, _triton().CompiledKernel):
            signature = self.kernel.signature
            named = {x: y for x, y in self.constants.items() if x in signature.parameters}
            bound = signature.bind(*arguments, **named)
            bound.apply_defaults()
            rest = tuple(bound.arguments.values())[len(self._of_tensors(tensors)) :]
            self._compiled[key] = compiled[(self.programs, 1, 1)], rest

    @property
    def keywords(self) -> dict[str, Any]:
        """What Triton is given besides :meth:`call_arguments`."""
        return {**self.constants, **COMPILER}

    def call_arguments(self, tensors: Any) -> tuple[Any, ...]:
        """Returns all arguments but constants of a launch on these tensors."""
        made = self._of_tensors(tensors)
        return (*made, *self.arguments[len(made) - 1 :])

    def _of_tensors(self, tensors: Any) -> tuple[Any, ...]:
        """Returns the first arguments, those that are others at the next launch."""
        return (tensors,)

    @functools.cached_property
    def _own(self) -> list[Tensor | None]:
        """The tables in their places."""
        tables = {} if self.tables is None else self.tables.tensors
        return [tables.get(name) for name in self.needed._fields]

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        """The place of each tensor that the kernel needs and that is no table, by its name."""
        own = zip(self.needed._fields, self.needed, self._own, strict=True)
        named = enumerate((name, needed and table is None) for name, needed, table in own)
        return {name: place for place, (name, changes) in named if changes}


class _Triton(NamedTuple):
    """What a launch asks of Triton, which nothing imports before it is used."""

    version: str
    driver: Any
    runtime: Any  # settings
    compilation: Any
    JITFunction: Any
    CompiledKernel: Any


@functools.cache
def _triton() -> _Triton:
    from triton import __version__, knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import JITFunction, driver

    settings = knobs.runtime, knobs.compilation
    return _Triton(__version__, driver, *settings, JITFunction, CompiledKernel)
