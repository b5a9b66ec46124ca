"""What a model makes a mask over all pairs of tokens of is not shown to it where a rule says it.

SkyReels-V2's autoregressive models hide later blocks of frames. Their forward makes one mask of
tokens × tokens for all layers, 2.4 GiB for 25 frames of 544 × 960, if their configuration has
blocks of more than one frame. In a forward pass in which a rule hides those frames from every
layer, the model reads another configuration.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from vstar_kernels.models.classes import ClassChange


class ShowsConfig(Protocol):
    """A hook on a model that says what the model reads as its configuration."""

    def shown_config(self, config: Any) -> Any:
        """Returns what the forward pass that runs in this thread reads in the place of its own."""


def _showing(base: Any) -> dict[str, Any]:
    """Returns the property that a model reads its configuration by."""

    read = base.config.fget  # here, as torch.compile does not trace it

    def config(model: nn.Module) -> Any:
        own = read(model)
        for hook in model._forward_pre_hooks.values():
            if hasattr(hook, "shown_config"):
                return hook.shown_config(own)
        return own

    return {"config": property(config)}


SHOWING = ClassChange(_showing)
