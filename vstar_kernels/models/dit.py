"""The front end of diffusers' video transformers, whose layers all have one resolution."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from vstar_kernels.models.attention_processor import ProcessorFrontEnd
from vstar_kernels.models.hooks import ModelCall
from vstar_kernels.models.layers import CrossLayer, TemporalLayer

_LATTE_CROSS_LAYER = re.compile(r"transformer_blocks\.\d+\.attn2")
_LATTE_LAYER = re.compile(r"temporal_transformer_blocks\.\d+\.attn1")


class TransformerFrontEnd(ProcessorFrontEnd):
    """TAR in Latte, which attends over frames and over each frame's patches by turns."""

    models = (
        "LatteTransformer3DModel of diffusers (with modules named like "
        "temporal_transformer_blocks.0.attn1)"
    )

    def layers(self, model: nn.Module) -> Iterator[TemporalLayer]:
        """Yields the temporal self-attention modules in the model's order."""
        for name, plain_name, module in self.self_attentions(model):
            if _LATTE_LAYER.fullmatch(plain_name):
                yield TemporalLayer(name, 0, "blocks", module)

    def cross_layers(self, model: nn.Module) -> Iterator[CrossLayer]:
        """Yields the cross-attention modules to the text."""
        for name, plain_name, module in self.cross_attentions(model):
            if _LATTE_CROSS_LAYER.fullmatch(plain_name):
                yield CrossLayer(name, 0, "blocks", module)

    def text_blocks(self, model: nn.Module) -> list[nn.Module]:
        """Returns the blocks whose ``encoder_hidden_states`` are the text of each frame."""
        return list(model.transformer_blocks)  # type: ignore[arg-type]

    def read_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> ModelCall:
        """Returns the facts of a call of the model; a patch counts as a pixel."""
        call = super().read_call(model, args, kwargs)
        patch_size: int = model.config.patch_size  # type: ignore[union-attr, assignment]
        return replace(call, width=call.width // patch_size)
