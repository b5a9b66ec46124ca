"""What all handles on a model need: hooks, and the arguments of a call in them."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


# Parts of a module's name that diffusers' split inference and torch.compile put in.
WRAPPERS = ("module", "_orig_mod")


def plain_name(name: str) -> str:
    """Returns a module's name without what wrappers have put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class Argument:
    """An argument of a module's ``forward``, which callers pass by position or by name.

    Args:
        module: The module.
        which: The argument's name or position. A name that ``forward`` does not have is one of its
            ``**kwargs``.
    """

    def __init__(self, module: nn.Module, which: str | int) -> None:
        # The class's own: offloading replaces a module's `forward` by one of any arguments.
        names = _parameters(type(module).forward)
        self.name = which if isinstance(which, str) else names[which]
        self.index = names.index(self.name) if self.name in names else len(names)

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns its value in a call; None where the call leaves it out."""
        return args[self.index] if self.index < len(args) else kwargs.get(self.name)

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the call with another value."""
        if self.index < len(args):
            return (*args[: self.index], value, *args[self.index + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


@functools.lru_cache(maxsize=64)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of a forward's parameters after ``self``."""
    return tuple(inspect.signature(forward).parameters)[1:]


@dataclass(frozen=True)
class ModelCall:
    """The facts of one call of a model.

    Attributes:
        sample: The latents, the batch first and the width last.
        timestep: A number, or a tensor of one for each of the batch.
        width: Of the feature maps at level 0.
        step: The index of the denoising step, where the model is told; None where it is not.
        branch: The side of guidance that the whole batch is of, 0 with the prompt and 1 without,
            where the model is told; 0 where it is not, and for a batch of both.
    """

    sample: Tensor
    timestep: Any
    width: int
    step: int | None = None
    branch: int = 0


class Installable(Protocol):
    """What a handle puts on one model."""

    def install(self) -> None:
        """Puts it on."""


class Handle:
    """What a public function put on a model, as a context manager; :meth:`remove` takes it off.

    Each kind puts back what it changed in a ``remove`` of its own, which calls this one first.
    """

    _was_removed = False

    def remove(self) -> None:
        """Puts everything back as it was, in any order; nothing happens the second time."""
        self._was_removed = True

    def _install_all(self, models: Iterable[Installable]) -> None:
        """Installs what there is for each model; where one fails, all are as they were."""
        try:
            for model in models:
                model.install()
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> Self:
        if self._was_removed:
            raise RuntimeError(
                f"this {type(self).__name__} was removed, by remove() or at the end of a with "
                "statement, and would change nothing in this one: call what returned it again"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Says why a handle can be neither pickled nor copied."""
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: it is what takes the hooks off "
            "one model of this process. Keep what was applied (the TARConfig, the embeddings) or "
            "found (the maps) instead, and apply it to the other model"
        )


class Hooks:
    """Hooks on modules, which :meth:`remove` takes off in any order.

    Each is noted before it is put on, so that no interrupt can leave one behind: what registering
    it returns would be lost.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[nn.Module, Callable[..., Any]]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> None:
        """Puts on a hook ``(module, args, kwargs)`` that runs before the module's forward.

        With ``first``, it runs before the hooks that are there.
        """
        self._noted.append((module, hook))
        module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Puts on a hook ``(module, args, kwargs, output)`` that runs after a forward returned."""
        self._noted.append((module, hook))
        module.register_forward_hook(hook, with_kwargs=True)

    def remove(self) -> None:
        """Takes the hooks off; nothing happens the second time.

        A forward pass in another thread may have looked them up already: it calls them without
        ``kwargs`` then, as torch looks up only now whether they take them.
        """
        for module, hook in self._noted:
            take_off(module, functools.partial(operator.is_, hook))
        self._noted.clear()


class CopiedHook:
    """The hook that a copy of a model under ``apply_tar`` and others has before each forward pass.

    The copy is stock, as nobody holds a handle on it; lest that go unnoticed, it does not run until
    it has been under that itself.

    Args:
        applied_by: The function that the model was under.
    """

    def __init__(self, applied_by: str) -> None:
        self._applied_by = applied_by

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        raise RuntimeError(
            f"this {type(model).__name__} is a copy of one under {self._applied_by}, made without "
            f"it: {self._applied_by}(copy, …) does the same to the copy, and remove() of that "
            "handle makes it stock"
        )


def take_off(module: nn.Module, is_meant: Callable[[Any], bool]) -> None:
    """Takes those hooks off a module that are meant."""
    for hooks, *flags in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        ),
    ):
        for key in [key for key, hook in list(hooks.items()) if is_meant(hook)]:
            for found in (*flags, hooks):
                found.pop(key, None)  # type: ignore[attr-defined]


def put_back(*steps: Callable[[], object]) -> None:
    """Runs steps that put things back: all of them, whatever is raised meanwhile.

    Each step can be repeated. If one is stopped, by Ctrl-C for one, then they all are run a second
    time before that is raised.
    """
    try:
        _run_all(steps)
    except BaseException:
        _run_all(steps)
        raise


def _run_all(steps: tuple[Callable[[], object], ...]) -> None:
    with ExitStack() as stack:
        for step in reversed(steps):
            stack.callback(step)


def class_names(model: nn.Module) -> set[str]:
    """Returns the names of a model's class and of those that it is derived from."""
    return {cls.__name__ for cls in type(model).__mro__}


def is_compiled(pipe_or_model: Any, name: str, model: nn.Module) -> bool:
    """Returns whether a model, ``name`` in a pipeline or ``""``, is compiled, at least in part.

    torch.compile does not notice hooks that are added after a module's first call.
    """
    given = getattr(pipe_or_model, name) if name else pipe_or_model
    in_place = (module._compiled_call_impl is not None for module in model.modules())
    return given is not model or any(in_place)
