"""What the handles on a model's forward passes share."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from typing_extensions import Self


class Argument:
    """An argument of a module's ``forward``, which callers pass by position or by name.

    Args:
        module: The module.
        which: The argument's name or position. All video models take the latents at 0 and the
            timestep at 1.
    """

    def __init__(self, module: nn.Module, which: str | int) -> None:
        # The class's own: offloading replaces a module's `forward` by one of any arguments.
        _, *parameters = inspect.signature(type(module).forward).parameters
        self.index = which if isinstance(which, int) else parameters.index(which)
        self.name = parameters[self.index]

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its value in a call; None where the call leaves it out."""
        return args[self.index] if self.index < len(args) else kwargs.get(self.name)

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with another value."""
        if self.index < len(args):
            return (*args[: self.index], value, *args[self.index + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


class HookHandle:
    """Hooks on a model, as a context manager; :meth:`remove` takes them off, in any order."""

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    def remove(self) -> None:
        """Take the hooks off; nothing happens the second time."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def is_compiled(pipe_or_model: Any, name: str, model: nn.Module) -> bool:
    """Whether a model, ``name`` in a pipeline or ``""``, is compiled, in whole or in part.

    torch.compile does not notice hooks that are added after a module's first call.
    """
    given = getattr(pipe_or_model, name) if name else pipe_or_model
    in_place = (module._compiled_call_impl is not None for module in model.modules())
    return given is not model or any(in_place)
