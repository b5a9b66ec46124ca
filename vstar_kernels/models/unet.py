"""The front end of diffusers' video UNets, known by the names of their attention modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from vstar_kernels.models.attention_processor import ProcessorFrontEnd
from vstar_kernels.models.hooks import class_names
from vstar_kernels.models.layers import CrossLayer, TemporalLayer

# UNet3DConditionModel, I2VGenXLUNet; UNetMotionModel, SparseControlNetModel;
# UNetSpatioTemporalConditionModel, whose temporal attn2 attends to an image.
_LAYER = re.compile(
    r"(?P<place>down|mid|up)_blocks?(?:\.(?P<index>\d+))?\."
    r"(?:(?:temp_attentions|motion_modules)\.\d+\.transformer_blocks\.\d+\.attn[12]"
    r"|attentions\.\d+\.temporal_transformer_blocks\.\d+\.attn1)"
)
_CROSS_LAYER = re.compile(
    r"(?P<place>down|mid|up)_blocks?(?:\.(?P<index>\d+))?\."
    r"attentions\.\d+\.transformer_blocks\.\d+\.attn2"
)
_INIT_LAYER = re.compile(r"transformer_in\.transformer_blocks\.\d+\.attn[12]")
_IMAGE_MODEL = "UNetSpatioTemporalConditionModel"  # conditioned on an image, not on a text


class UNetFrontEnd(ProcessorFrontEnd):
    """TAR in diffusers' UNets of several resolution levels."""

    models = (
        "UNet3DConditionModel, I2VGenXLUNet, UNetMotionModel, SparseControlNetModel and "
        "UNetSpatioTemporalConditionModel of diffusers (with modules named like "
        "down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1)"
    )

    def layers(self, model: nn.Module) -> Iterator[TemporalLayer]:
        """Yields the temporal self-attention modules in the model's order."""
        down_blocks = getattr(model, "down_blocks", None)
        # A MotionAdapter only carries AnimateDiff's motion modules into its UNet.
        if not isinstance(down_blocks, nn.ModuleList) or type(model).__name__ == "MotionAdapter":
            return
        for name, plain_name, module in self.self_attentions(model):
            if match := _LAYER.fullmatch(plain_name):
                level = level_of(match, len(down_blocks))
                yield TemporalLayer(name, level, match["place"], module)  # type: ignore[arg-type]
            elif _INIT_LAYER.fullmatch(plain_name):
                yield TemporalLayer(name, "init", "init", module)

    def cross_layers(self, model: nn.Module) -> Iterator[CrossLayer]:
        """Yields the cross-attention modules to the text; Stable Video Diffusion has no text."""
        down_blocks = getattr(model, "down_blocks", None)
        if not isinstance(down_blocks, nn.ModuleList) or _IMAGE_MODEL in class_names(model):
            return
        for name, plain_name, module in self.cross_attentions(model):
            if match := _CROSS_LAYER.fullmatch(plain_name):
                level = level_of(match, len(down_blocks))
                yield CrossLayer(name, level, match["place"], module)  # type: ignore[arg-type]

    def text_blocks(self, model: nn.Module) -> list[nn.Module]:
        """Returns the blocks whose ``encoder_hidden_states`` are the text of each frame."""
        parts: Any = model
        blocks = [*parts.down_blocks, parts.mid_block, *parts.up_blocks]
        return [block for block in blocks if getattr(block, "has_cross_attention", False)]


def level_of(match: re.Match[str], num_levels: int) -> int:
    """Returns the level of a module whose name says its ``place`` and ``index``."""
    if match["place"] == "mid":
        return num_levels - 1
    index = int(match["index"])
    return index if match["place"] == "down" else num_levels - 1 - index
