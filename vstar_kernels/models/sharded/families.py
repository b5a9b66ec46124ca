"""What must be known of each model to spread its frames: its arguments, and its temporal parts.

Everything else in these models is computed frame by frame, with the frames in the batch, and needs
nothing. What normalises or convolves over frames is found by what it is given: a GroupNorm of five
dimensions has its statistics over frames, and a convolution in three is over frames where its
kernel is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vstar_kernels.models.front_end import find_front_end
from vstar_kernels.models.hooks import class_names, plain_name
from vstar_kernels.models.lavie import LavieFrontEnd

Rows = Literal["positions", "frames"]


@dataclass(frozen=True)
class Stack:
    """Blocks that attend over frames, one after the other: they are given some positions instead.

    Attributes:
        name: Of the blocks, or of the only one, in the model.
        first, last: The first block and the last.
        rows: What the rows of their hidden states are: ``(batch · positions, frames, channels)``,
            or ``(batch · frames, positions, channels)``.
    """

    name: str
    first: nn.Module
    last: nn.Module
    rows: Rows

    def is_in(self, model: nn.Module) -> bool:
        """Returns whether its blocks are still those of the model."""
        try:
            module = model.get_submodule(self.name)
        except AttributeError:
            return False
        if module is self.first:
            return True
        children = list(module.children())
        return bool(children) and children[0] is self.first and children[-1] is self.last


@dataclass(frozen=True)
class Family:
    """Models whose frames can be spread.

    Attributes:
        name: Of the models' class.
        sample: The name of the latents, whose dimension of frames the output has too.
        frames: The arguments with a dimension of frames, and which it is.
        rows: Those with a row for each frame of each video, or several such.
        shared: Those that are the same for all frames.
        stacks: The names of lists of blocks that attend over frames.
        blocks: The names of single such blocks.
        block_rows: What their rows are.
        returns_rows: Whether its outputs have a row for each frame of each video.
        refused: Arguments that must be None or 0.
    """

    name: str
    sample: str
    frames: dict[str, int]
    rows: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    stacks: str = "(?!)"
    blocks: str = "(?!)"
    block_rows: Rows = "positions"
    returns_rows: bool = False
    refused: tuple[str, ...] = ()

    def find_stacks(self, model: nn.Module) -> Iterator[Stack]:
        """Yields the blocks of a model that attend over frames, as they are at present."""
        for name, module in model.named_modules():
            plain = plain_name(name)
            if re.fullmatch(self.stacks, plain) and len(list(module.children())):
                children = list(module.children())
                yield Stack(name, children[0], children[-1], "positions")
            elif re.fullmatch(self.blocks, plain):
                yield Stack(name, module, module, self.block_rows)


RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
_MOTION = r".*motion_modules\.\d+\.transformer_blocks"
_TEMPORAL = r"(.*temp_attentions\.\d+|transformer_in)\.transformer_blocks"
_TEXT = ("encoder_hidden_states",)

FAMILIES = (
    Family("UNetMotionModel", "sample", {"sample": 2}, (*_TEXT, *RESIDUALS), stacks=_MOTION),
    Family(
        "SparseControlNetModel",
        "sample",
        {"sample": 2, "controlnet_cond": 2, "conditioning_mask": 2},
        _TEXT,
        stacks=_MOTION,
        returns_rows=True,
    ),
    Family(
        "LatteTransformer3DModel",
        "hidden_states",
        {"hidden_states": 2},
        shared=_TEXT,
        blocks=r"temporal_transformer_blocks\.\d+",
    ),
    Family("UNet3DConditionModel", "sample", {"sample": 2}, RESIDUALS, _TEXT, stacks=_TEMPORAL),
    Family(
        "I2VGenXLUNet",
        "sample",
        {"sample": 2, "image_latents": 2},
        shared=(*_TEXT, "image_embeddings"),
        stacks=_TEMPORAL,
        blocks="image_latents_temporal_encoder",
    ),
    Family(
        "UNetSpatioTemporalConditionModel",
        "sample",
        {"sample": 1},
        shared=_TEXT,
        blocks=r".*\.temporal_transformer_blocks\.\d+",
        block_rows="frames",
    ),
)

LAVIE = Family(
    "LaVie's UNet3DConditionModel",
    "sample",
    {"sample": 2},
    shared=_TEXT,
    blocks=r".*\.attn_temp",
    refused=("use_image_num",),
)


def find_family(model: nn.Module) -> Family:
    """Returns what is known of a model.

    Raises:
        ValueError: Nothing is.
    """
    if isinstance(find_front_end(model), LavieFrontEnd):
        return LAVIE  # whose class has the name of diffusers' own
    names = class_names(model)
    for family in FAMILIES:
        if family.name in names:
            return family
    if hasattr(model, "input_blocks") and hasattr(model, "output_blocks"):
        return _lvdm(model)
    raise ValueError(
        f"shard_frames does not know {type(model).__name__}: known are "
        f"{', '.join(family.name for family in FAMILIES)}, LaVie's base model and lvdm's UNetModel"
    )


def _lvdm(model: Any) -> Family:
    found = [
        re.escape(plain_name(name))
        for name, module in model.named_modules()
        if type(module).__name__ == "TemporalTransformer"
    ]
    blocks = rf"({'|'.join(found) or '(?!)'})\.transformer_blocks\.\d+"
    return Family(type(model).__name__, "x", {"x": 2}, ("context",), blocks=blocks)
