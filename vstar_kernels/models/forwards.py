"""The forward passes of a model: what a handle knows of each, in whatever thread it runs.

Nothing that concerns one forward pass is kept in a model, in a layer or in a handle, where another
pass would find it. It is in an object that is made when the pass begins, that nobody changes for
another pass, and that only the thread in which the pass runs is shown. What must end with the pass
ends in a ``with`` around the call of the model, so that whatever stops the pass ends it.

Gradient checkpointing calls layers again in the backward pass, which may be in another thread
(autograd's, on a GPU) and long after the forward pass. Which forward pass the layers were of is
told by the autograd node that the backward pass is at: nodes are numbered in the order in which a
thread makes them, and each forward pass notes the numbers between which it ran.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import nn

from vstar_kernels.models.classes import ClassChange
from vstar_kernels.models.schedule import Turns

if TYPE_CHECKING:
    from typing_extensions import Self

REMEMBERED = 1024  # forward passes with gradients whose layers may be called again


def _next_node() -> int:
    """Returns the number of the autograd node that this thread makes next."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


class ForwardPass:
    """What a handle knows of one forward pass of its model.

    Attributes:
        graph_task: The backward pass of autograd that it is a part of (where a whole model is
            checkpointed); -1 where it is of none.
        begun, ended: The numbers of the autograd nodes between which it ran; ``ended`` is None
            while it runs.
        is_cut: Whether its handle was removed while it ran.
    """

    def __init__(self) -> None:
        self.graph_task: int = torch._C._current_graph_task_id()
        self.begun: int = _next_node()
        self.ended: int | None = None
        self.is_cut = False

    def end(self) -> None:
        """Ends it."""
        self.ended = _next_node()

    def is_like(self, other: Any) -> bool:
        """Returns whether layers that are called again may take either of the two for theirs."""
        return self is other

    def holds(self, node: int) -> bool:
        """Returns whether an autograd node of this number may be of this pass."""
        return self.begun <= node and (self.ended is None or node < self.ended)


P = TypeVar("P", bound=ForwardPass)


def called_without_hooks(model: nn.Module, part: str, applied_by: str) -> RuntimeError:
    """Returns the error of a part of a model that is called in no forward pass that was begun.

    Args:
        model: The model.
        part: What was called.
        applied_by: What put the model's hooks on.
    """
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model:
            return RuntimeError(
                f"{applied_by} was put on this {type(model).__name__} while it ran, in another "
                "thread, or its hooks were taken off: put it on before the model is called"
            )
        frame = frame.f_back
    return RuntimeError(
        f"{part} under {applied_by} was called without its model's hooks, which tell it of the "
        "forward pass: call the model itself, not its forward()"
    )


class _Here(threading.local):
    """The forward pass that runs in this thread, and how many watched calls of its model do."""

    def __init__(self) -> None:  # of each thread: torch 2.11 traces a class's attribute instead
        self.forward: Any = None
        self.calls = 0


class ForwardPasses(Generic[P]):
    """The forward passes of one model under one handle.

    Args:
        on_cut: What to tell the caller of a forward pass that was running in another thread when
            the handle was removed; None where that does not change what the model returns.
        opens: A method that is called with the arguments of each call of the model, before its
            hooks, and begins a forward pass, as long as its object lives; torch.compile never
            traces it. None: a hook begins it.

    Attributes:
        turns: The sides of guidance that the calls are of, forgotten when a call fails.
    """

    def __init__(
        self,
        on_cut: str | None = None,
        opens: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    ) -> None:
        self.on_cut = on_cut
        # What watches a model is kept as long as the model lives, which its object may keep.
        self._opens = None if opens is None else WeakMethod(opens)
        self.turns = Turns()
        self._here = _Here()
        self._running: set[P] = set()
        self._with_gradients: deque[P] = deque(maxlen=REMEMBERED)
        self._closed = False
        self._untraced_find_again = torch.compiler.disable(self._find_again)

    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a forward pass in this thread, unless a hook does."""
        opens = None if self._opens is None else self._opens()
        if opens is not None:
            opens(args, kwargs)

    def begin(self, forward: P) -> None:
        """Begins a forward pass in this thread; what :func:`watch` does ends it.

        It does not begin in a call that was there before :func:`watch` was, in another thread, and
        found hooks that had been put on since: nothing would end it, nor say that it was cut.
        """
        if not self._here.calls:
            forward.end()
            return
        self._here.forward = forward  # first, so that `leave` ends it whatever comes now
        self._running.add(forward)
        # After `add`: either close() finds the pass among those that run, or it is seen here.
        forward.is_cut = self._closed
        if torch.is_grad_enabled():
            self._with_gradients.append(forward)

    def current(self) -> P | None:
        """Returns the forward pass in which a layer is called; None if it is called in none.

        Raises:
            RuntimeError: A backward pass calls the layer again, and it cannot be told for which of
                several forward passes that differ.
        """
        if torch.compiler.is_compiling():
            forward: P | None = self._here.forward
            return self._untraced_find_again() if forward is None else forward
        if (running := self.running()) is not None:
            return running
        return None if torch._C._current_graph_task_id() == -1 else self._find_again()

    def running(self) -> P | None:
        """Returns the forward pass that runs in this thread; None to layers that are called again.

        Those are called in the backward pass, by gradient checkpointing.
        """
        forward: P | None = self._here.forward
        if forward is None or forward.graph_task != torch._C._current_graph_task_id():
            return None
        return forward

    @property
    def are_running(self) -> bool:
        """Whether a forward pass runs in any thread."""
        return bool(self._running)

    def close(self) -> None:
        """Marks the forward passes that run at present as cut, and those that are yet to begin."""
        self._closed = True
        for forward in list(self._running):
            forward.is_cut = True
        self._with_gradients.clear()
        self.turns = Turns()

    def enter(self) -> P | None:
        """Returns what :meth:`leave` must be given after the model has been called."""
        self._here.calls += 1
        outer: P | None = self._here.forward
        return outer

    def leave(self, outer: P | None, *, failed: bool) -> bool:
        """Ends the forward pass that has begun since :meth:`enter`; returns whether it was cut.

        Where the model's call has failed, the next one begins a step.
        """
        self._here.calls -= 1
        if failed:
            self.turns.forget()
        forward: P | None = self._here.forward
        self._here.forward = outer
        if forward is None or forward is outer:
            return False
        self._running.discard(forward)
        forward.end()
        return forward.is_cut

    def _find_again(self) -> P | None:
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        number = node._sequence_nr()
        found = [forward for forward in list(self._with_gradients) if forward.holds(number)]
        if any(not forward.is_like(found[0]) for forward in found[1:]):
            raise RuntimeError(
                "gradient checkpointing calls a layer again, and it cannot be told for which of "
                f"{len(found)} forward passes that differ, as they ran in several threads: use one "
                "thread for them, or no gradient checkpointing"
            )
        return found[0] if found else None


class _Call:
    """A call of a watched model, as a context manager that ends its forward passes."""

    def __init__(self, model: nn.Module) -> None:
        self._outer = [(passes, passes.enter()) for passes in _WATCHED.get(model, ())]
        self._announced = _ANNOUNCED.model
        _ANNOUNCED.model = None

    def __enter__(self) -> Self:
        return self

    def open(self, model: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins the forward passes that no hook begins, unless the model's call has done so."""
        if model is None or self._announced is not model:
            for passes, _ in self._outer:
                passes.open(args, kwargs)

    def announce(self, model: nn.Module) -> None:
        """Tells the next watched call in this thread that it is a part of this one."""
        _ANNOUNCED.model = model

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _ANNOUNCED.model = None
        failed = kind is not None
        cut = [passes.on_cut for passes, outer in self._outer if passes.leave(outer, failed=failed)]
        # An interrupt stays one.
        if any(cut) and (kind is None or issubclass(kind, Exception)):
            raise RuntimeError(next(filter(None, cut)))


class _Announced(threading.local):
    """The model whose ``__call__`` has been entered in this thread, and not yet what it calls."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None


_ANNOUNCED = _Announced()


@functools.cache
def _untraced(manager: type[_Call]) -> type[_Call]:
    """Returns a context manager that torch.compile runs and does not trace."""
    names = ("__init__", "open", "announce", "__exit__")
    methods = {name: torch.compiler.disable(getattr(manager, name)) for name in names}
    return type(manager.__name__, (manager,), methods)


def _watched_calls(base: Any) -> dict[str, Callable[..., Any]]:
    """Returns the methods through which all calls of a module go.

    ``Module.compile()`` before this bypasses the second, and ``torch.compile(module)`` the first.
    """

    watched = _untraced(_Call)
    is_plain = base.__call__ is nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Twice, so that the one ends what an interrupt keeps the other from ending.
        with watched(module) as this, watched(module):
            this.open(None, args, kwargs)
            # What `Module.__call__` does, but that compiled code (torch.compile(module)) begins
            # behind the second method, which would break its graph.
            if is_plain and module._compiled_call_impl is None:
                return base._call_impl(module, *args, **kwargs)
            this.announce(module)
            return base.__call__(module, *args, **kwargs)

    def call_impl(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with watched(module) as this:
            this.open(module, args, kwargs)
            return base._call_impl(module, *args, **kwargs)

    # torch.compile is to run them and to trace what they call. (As decorators they would import
    # torch._dynamo with this package.)
    methods = {"__call__": call, "_call_impl": call_impl}
    return {name: torch.compiler.disable(f, recursive=False) for name, f in methods.items()}


_WATCHING = ClassChange(_watched_calls)
_WATCHED: WeakKeyDictionary[nn.Module, tuple[ForwardPasses[Any], ...]] = WeakKeyDictionary()
_LOCK = threading.RLock()


def watch(model: nn.Module, passes: ForwardPasses[Any]) -> None:
    """Ends, from now on, what ``passes.begin`` begins in a call of the model, however it ends."""
    with _LOCK:
        _WATCHED[model] = (*_WATCHED.get(model, ()), passes)
        _WATCHING.put_on(model)


def unwatch(model: nn.Module, passes: ForwardPasses[Any]) -> None:
    """Undoes :func:`watch`; nothing happens the second time."""
    with _LOCK:
        _WATCHED[model] = tuple(p for p in _WATCHED.get(model, ()) if p is not passes)
        if not _WATCHED[model]:
            _WATCHING.take_off(model)
            del _WATCHED[model]
