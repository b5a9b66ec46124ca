"""What a gradient through a model into its input needs of the model meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.checkpoint import checkpoint

from vstar_kernels.models.hooks import put_back


@contextlib.contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Keeps others from taking gradients through the model at the same time.

    What that changes in the model (its parameters' gradients, its blocks' ``forward``) can only be
    put back in the reverse order.

    Raises:
        RuntimeError: Somebody else does so already.
    """
    mine = object()
    try:
        if _OPTIMISING.setdefault(model, mine) is not mine:
            raise RuntimeError(
                f"gradients are being taken through this {type(model).__name__} already, in "
                "another thread: wait for that, or give each thread a model of its own"
            )
        yield
    finally:
        # Not by a flag: an interrupt may come between an entry and its being noted.
        if _OPTIMISING.get(model) is mine:
            del _OPTIMISING[model]


_OPTIMISING: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keeps no gradients of the model's own parameters, nor what they would need, meanwhile."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def thaw() -> None:
        for parameter in trainable:
            parameter.requires_grad_(True)

    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        put_back(thaw)


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Lets the model's blocks compute their insides again in the backward pass, to save memory.

    Few of diffusers' video models can do so by themselves (``UNet3DConditionModel`` cannot).
    """
    # What an offloading hook has put in the place of the class's own, else None.
    replaced = {block: block.__dict__.get("forward") for block in _blocks(model)}

    def restore() -> None:
        for block, before in replaced.items():
            if before is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = before

    try:
        for block in replaced:
            block.forward = _checkpointing(block.forward)
        yield
    finally:
        put_back(restore)


def _checkpointing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda: forward(*args, **kwargs), use_reentrant=False)

    return run


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yields what a model runs in sequence: a UNet's resolutions, a transformer's blocks."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif name in ("mid_block", "middle_block"):
            yield child
