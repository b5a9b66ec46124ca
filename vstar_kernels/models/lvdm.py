"""Temporal attention regularization in the ``lvdm`` code base: VideoCrafter and VSTAR itself.

Its ``CrossAttention`` has no processors: an instance's ``forward`` is replaced.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn

from vstar_kernels.attention.bias import Bias
from vstar_kernels.models.config import Override
from vstar_kernels.models.unet import Owner, attend


class LvdmTARForward:
    """The ``forward`` of a temporal ``CrossAttention``, regularized.

    It takes ``(rows, frames, channels)``, rows being batch × height × width, and returns the same
    shape. Attributes as of :class:`vstar_kernels.models.unet.TARAttnProcessor`.
    """

    owner: Owner | None = None
    previous: Any = None
    stock: bool = False

    def __init__(self, module: nn.Module, *, backend: str | None = None) -> None:
        self.module = module
        self.bias: Bias | None = None
        self.override: Override | None = None
        self.backend = backend

    def __call__(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        time_index: Any = None,
        **unknown: Any,
    ) -> Tensor:
        """Attention over the frames of each row, projections included.

        ``time_index``, the official code's step, is left to the handle, which sees it as the
        ``step_index`` of the whole model.

        Raises:
            ValueError: The module or the call asks for more than temporal self-attention.
        """
        if self.owner is not None:
            self.owner.check_running()
        if self.stock:
            more = {} if time_index is None else {"time_index": time_index}
            return self.previous(x, context=context, mask=mask, **more, **unknown)
        module: Any = self.module
        reasons = _why_not(module, x, context, mask, unknown)
        if reasons:
            raise ValueError(f"TAR in {type(module).__name__} does not support {reasons}")
        out = attend(module, x, self.bias, override=self.override, backend=self.backend)
        return module.to_out(out)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a copy of a model that has an owner, the class's own forward: the copy has none."""
        return types.MethodType, (type(self.module).forward, self.module)


def _why_not(
    module: Any, x: Tensor, context: Tensor | None, mask: Tensor | None, unknown: dict[str, Any]
) -> str:
    reasons = []
    if x.ndim != 3:
        reasons.append(f"inputs other than (rows, frames, channels), got shape {tuple(x.shape)}")
    if context is not None and context is not x:
        reasons.append(f"cross-attention (context of shape {tuple(context.shape)})")
    if mask is not None:
        reasons.append(f"a mask, got shape {tuple(mask.shape)} (causal attention)")
    if getattr(module, "relative_position", False):
        reasons.append("relative positions (relative_position)")
    if unknown:
        reasons.append(f"the arguments {', '.join(unknown)}")
    return "; ".join(reasons)


def get_processor(module: nn.Module) -> Any:
    """The module's forward, replaced or its own."""
    return module.forward


def set_processor(module: nn.Module, forward: Any) -> None:
    """Give the module a forward; its class's own needs no replacement."""
    if getattr(forward, "__func__", None) is type(module).forward:
        module.__dict__.pop("forward", None)
    else:
        module.forward = forward


def make_processor(module: nn.Module, backend: str | None) -> LvdmTARForward:
    """A forward for the module, plain until it is given a bias."""
    return LvdmTARForward(module, backend=backend)


def why_not_replace(forward: Any) -> str | None:
    """Why a forward that is found in a model cannot make way for TAR; None if it can."""
    if isinstance(forward, LvdmTARForward | types.MethodType):
        return None
    return f"its forward is {forward!r}, which TAR would replace"
