"""The front end of the ``lvdm`` code base, which VideoCrafter and the official VSTAR are of.

Its ``CrossAttention`` has no processors: an instance's ``forward`` is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from vstar_kernels.analysis.maps import Place
from vstar_kernels.models.hooks import Argument, ModelCall
from vstar_kernels.models.layers import ColumnController, CrossLayer, TemporalLayer
from vstar_kernels.models.replaced_forward import (
    ColumnForward,
    ForwardFrontEnd,
    TARForward,
    why_not_self_attention,
)

_SECTIONS: dict[str, Place] = {
    "init_attn": "init",
    "input_blocks": "down",
    "middle_block": "mid",
    "output_blocks": "up",
}


def inner_model(model: Any) -> Any:
    """Returns the denoising model inside of lvdm's ``LatentDiffusion``; anything else itself."""
    inner = getattr(getattr(model, "model", None), "diffusion_model", None)
    return inner if isinstance(model, nn.Module) and isinstance(inner, nn.Module) else model


class LvdmTARForward(TARForward):
    """The ``forward`` of a temporal ``CrossAttention``, regularized.

    It takes ``(rows, frames, channels)``, rows being batch × height × width, and returns the same
    shape.
    """

    def __call__(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        time_index: Any = None,
        **unknown: Any,
    ) -> Tensor:
        """Attends over the frames of each row, projections included.

        ``time_index``, the official code's step, is left to the handle, which sees it as the
        ``step_index`` of the whole model.

        Raises:
            ValueError: The module or the call asks for more than temporal self-attention.
        """
        change = self.regularization()
        if change.stock:
            more = {} if time_index is None else {"time_index": time_index}
            return self.previous(x, context=context, mask=mask, **more, **unknown)
        module: Any = self.module
        reasons = _why_not(module, x, context, mask, unknown)
        if reasons:
            raise ValueError(f"TAR in {type(module).__name__} does not support {reasons}")
        return module.to_out(self.attend(module, x, change))


class LvdmColumnForward(ColumnForward):
    """The ``forward`` of a spatial ``CrossAttention``, with the maps of some words."""

    def __call__(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **more: Any
    ) -> Tensor:
        """Attends to the text, projections included.

        Raises:
            ValueError: The call asks for more than cross-attention.
        """
        text = x if context is None else context
        columns = self.controller.columns(self.layer, x, text.shape[1])
        if columns is None:
            return self.previous(x, context=context, mask=mask, **more)
        module: Any = self.module
        if mask is not None or getattr(module, "image_cross_attention", False):
            asked = "a mask" if mask is not None else "cross-attention to images"
            raise ValueError(f"capture_columns in {type(module).__name__} does not support {asked}")
        return module.to_out(self.attend(module, x, text, columns))


def _why_not(
    module: Any, x: Tensor, context: Tensor | None, mask: Tensor | None, unknown: dict[str, Any]
) -> str:
    reasons = why_not_self_attention(x, context, mask)
    if getattr(module, "relative_position", False):
        reasons.append("relative positions (relative_position)")
    if unknown:
        reasons.append(f"the arguments {', '.join(unknown)}")
    return "; ".join(reasons)


class LvdmFrontEnd(ForwardFrontEnd):
    """TAR in the ``UNetModel`` of ``lvdm``, the code base of VideoCrafter and VSTAR."""

    guides_in_turns = True
    models = "UNetModel of lvdm (VideoCrafter, VSTAR; with input_blocks and TemporalTransformer)"

    def layers(self, model: nn.Module) -> Iterator[TemporalLayer]:
        """Yields the temporal self-attention modules in the model's order."""
        for name, level, place, module in _attentions(model, "TemporalTransformer"):
            if name.rpartition(".")[2] in ("attn1", "attn2"):
                yield TemporalLayer(name, "init" if place == "init" else level, place, module)

    def cross_layers(self, model: nn.Module) -> Iterator[CrossLayer]:
        """Yields the cross-attention modules to the text."""
        for name, level, place, module in _attentions(model, "SpatialTransformer"):
            if name.rpartition(".")[2] == "attn2":
                yield CrossLayer(name, level, place, module)

    def text_blocks(self, model: nn.Module) -> list[nn.Module]:
        """Returns none: each frame's text is not known to be a row of theirs."""
        return []

    def read_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> ModelCall:
        """Returns the facts of a call; the official sampler announces the step as step_index."""
        sample = Argument(model, 0).get(args, kwargs)
        step = Argument(model, "step_index").get(args, kwargs)
        return ModelCall(
            sample,
            Argument(model, 1).get(args, kwargs),
            sample.shape[-1],
            None if step is None else int(step),
        )

    def make_attention(self, module: nn.Module, backend: str | None) -> LvdmTARForward:
        """Makes a forward for the module, plain until it is given a bias."""
        return LvdmTARForward(module, backend=backend)

    def watch_cross_attention(
        self, controller: ColumnController, layer: CrossLayer, backend: str | None
    ) -> LvdmColumnForward:
        """Makes a forward that gives a layer's column maps to the controller."""
        previous = self.get_attention(layer.module)
        return LvdmColumnForward(layer.module, controller, layer.name, previous, backend)


def _attentions(model: nn.Module, transformer: str) -> Iterator[tuple[str, int, Place, nn.Module]]:
    """Yields the name, level and place of each module in a kind of transformer, and the module."""
    for block_name, level, place, block in blocks_by_level(model):
        for name, module in block.named_modules(prefix=block_name):
            if type(module).__name__ == transformer:
                for child_name, child in module.named_modules(prefix=name):
                    yield child_name, level, place, child


def blocks_by_level(model: nn.Module) -> Iterator[tuple[str, int, Place, nn.Module]]:
    """Yields the name, level and place of each block of a UNet that is built as lvdm's, and itself.

    Its blocks are one flat list; a ``Downsample`` or ``Upsample`` ends a level. Of other models it
    yields nothing.
    """
    if not all(hasattr(model, name) for name in _SECTIONS if name != "init_attn"):
        return
    level = 0
    for section_name, place in _SECTIONS.items():
        section = getattr(model, section_name, None)
        if section is None:
            continue
        blocks = [(section_name, section)]
        if isinstance(section, nn.ModuleList):
            blocks = [(f"{section_name}.{name}", x) for name, x in section.named_children()]
        for name, block in blocks:
            yield name, level, place, block
            classes = {type(module).__name__ for module in block.modules()}
            level += ("Downsample" in classes) - ("Upsample" in classes)
