"""What a copy of a model under ``apply_tar`` has in the place of its hooks.

The copy is stock, as nobody holds a handle on it; lest that go unnoticed, it does not run until it
has been under ``apply_tar`` itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class CopiedHook:
    """In the place of our hook in a copy of a model, for which nobody holds a handle."""

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Refuse to run."""
        raise RuntimeError(
            f"this {type(model).__name__} is a copy of one under apply_tar, made without TAR: "
            "apply_tar(copy, …) regularizes it, and remove() of that handle makes it stock"
        )


class CopiedAfter:
    """In the place of our hook after each forward pass."""

    def __call__(self, *_: object) -> None:
        """Nothing: there is no state in a copy."""


def remove_copied_hooks(model: nn.Module) -> None:
    """Take them off a model."""
    for hooks, flags, kind in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, CopiedHook),
        (model._forward_hooks, model._forward_hooks_always_called, CopiedAfter),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key], flags[key]
