"""Where a model has temporal self-attention: diffusers' video models, and ``lvdm``'s UNet.

A model is known by the names of its modules, so that nothing of its front end is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from vstar_kernels.analysis.maps import Level, Place
from vstar_kernels.attention.bias import Bias, GaussianBias
from vstar_kernels.models.config import Override

# UNet3DConditionModel, I2VGenXLUNet; UNetMotionModel, SparseControlNetModel;
# UNetSpatioTemporalConditionModel, whose temporal attn2 attends to an image.
_UNET = re.compile(
    r"(?P<place>down|mid|up)_blocks?(?:\.(?P<index>\d+))?\."
    r"(?:(?:temp_attentions|motion_modules)\.\d+\.transformer_blocks\.\d+\.attn[12]"
    r"|attentions\.\d+\.temporal_transformer_blocks\.\d+\.attn1)"
)
_UNET_INIT = re.compile(r"transformer_in\.transformer_blocks\.\d+\.attn[12]")
_LATTE = re.compile(r"temporal_transformer_blocks\.\d+\.attn1")
# Parts of a name that diffusers' split inference and torch.compile put in.
_WRAPPERS = ("module", "_orig_mod")

_LVDM_BLOCKS: dict[str, Place] = {
    "init_attn": "init",
    "input_blocks": "down",
    "middle_block": "mid",
    "output_blocks": "up",
}


@dataclass(frozen=True)
class TemporalLayer:
    """One temporal self-attention module.

    Attributes:
        name: The module's name in its model.
        level: The UNet's resolution level, 0 the finest; each halves the latents' height and width,
            rounding up. ``"init"`` for the block before the UNet's own (``transformer_in``,
            ``init_attn``), which VSTAR leaves alone. A transformer of one resolution has level 0.
        place: ``"down"``, ``"mid"``, ``"up"`` or ``"init"``; ``"blocks"`` in a transformer.
        module: The attention module.
    """

    name: str
    level: Level
    place: Place
    module: Any


@dataclass(frozen=True)
class RegularizedLayer:
    """What TAR does to one temporal attention layer at the regularized steps.

    Attributes:
        model: The model's name in its pipeline; empty for a model by itself.
        name, level, place: Of the :class:`TemporalLayer`.
        width: Of the layer's feature maps, in the last forward pass; None before the first.
        bias: Δ and its weight; None where the map is replaced.
        override: What replaces the map; None where there is a bias.
    """

    model: str
    name: str
    level: Level
    place: str
    width: int | None
    bias: Bias | None
    override: Override | None

    @property
    def sigma(self) -> float | None:
        """σ in frames; None where Δ is not Gaussian."""
        return self.bias.sigma if isinstance(self.bias, GaussianBias) else None

    @property
    def strength(self) -> float | None:
        """The factor on Δ; None where the map is replaced."""
        return None if self.bias is None else self.bias.strength


def temporal_layers(model: nn.Module) -> list[TemporalLayer]:
    """The temporal self-attention modules of a model, in the model's order.

    Knows diffusers' ``UNet3DConditionModel``, ``I2VGenXLUNet``, ``UNetMotionModel``,
    ``SparseControlNetModel``, ``UNetSpatioTemporalConditionModel`` and ``LatteTransformer3DModel``,
    and the ``UNetModel`` of ``lvdm`` (VideoCrafter, VSTAR). A compiled model is unwrapped.

    Raises:
        ValueError: The model has none.
    """
    model = unwrap(model)
    layers = list(_lvdm_layers(model) if is_lvdm(model) else _diffusers_layers(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no temporal self-attention that is known here: no module "
            "is named like down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1 (see "
            "temporal_layers for the known models)"
        )
    return layers


def models_with_temporal_attention(pipe_or_model: Any) -> dict[str, nn.Module]:
    """The models with temporal self-attention by their name in a pipeline (``"unet"``), unwrapped.

    A model by itself has the name ``""``.

    Raises:
        TypeError: It is neither a model nor a pipeline (an object with ``components``).
        ValueError: There is none.
    """
    if isinstance(pipe_or_model, nn.Module):
        temporal_layers(pipe_or_model)
        return {"": unwrap(pipe_or_model)}
    components = getattr(pipe_or_model, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            "pipe_or_model must be a torch.nn.Module or a diffusers pipeline, "
            f"got {type(pipe_or_model).__name__}"
        )
    models: dict[str, nn.Module] = {}
    for name, component in components.items():
        # A MotionAdapter only carries AnimateDiff's motion modules into its UNet.
        if isinstance(component, nn.Module) and type(component).__name__ != "MotionAdapter":
            model = unwrap(component)
            if next(_diffusers_layers(model), None) is not None:
                models[name] = model
    if not models:
        raise ValueError(
            f"{type(pipe_or_model).__name__} holds no model with temporal self-attention that is "
            f"known here; it holds {', '.join(components)}"
        )
    return models


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself of one that ``torch.compile`` returned."""
    return getattr(model, "_orig_mod", model)


def is_lvdm(model: nn.Module) -> bool:
    """Whether it is built as ``lvdm``'s ``UNetModel`` is."""
    return all(hasattr(model, name) for name in ("input_blocks", "middle_block", "output_blocks"))


def _diffusers_layers(model: nn.Module) -> Iterator[TemporalLayer]:
    num_levels = len(list(model.get_submodule("down_blocks").children())) if _is_unet(model) else 1
    for name, module in model.named_modules():
        # Temporal transformers can be built to attend to the prompt in attn2.
        if getattr(module, "is_cross_attention", True):
            continue
        plain_name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if match := _UNET.fullmatch(plain_name):
            yield TemporalLayer(name, _level(match, num_levels), match["place"], module)  # type: ignore[arg-type]
        elif _UNET_INIT.fullmatch(plain_name):
            yield TemporalLayer(name, "init", "init", module)
        elif _LATTE.fullmatch(plain_name):
            yield TemporalLayer(name, 0, "blocks", module)


def _is_unet(model: nn.Module) -> bool:
    return isinstance(getattr(model, "down_blocks", None), nn.ModuleList)


def _level(match: re.Match[str], num_levels: int) -> int:
    if match["place"] == "mid":
        return num_levels - 1
    index = int(match["index"])
    return index if match["place"] == "down" else num_levels - 1 - index


def _lvdm_layers(model: nn.Module) -> Iterator[TemporalLayer]:
    """Its blocks are one flat list; a ``Downsample`` or ``Upsample`` ends a level."""
    level = 0
    for part, place in _LVDM_BLOCKS.items():
        section = getattr(model, part, None)
        if section is None:
            continue
        blocks = {part: section}
        if isinstance(section, nn.ModuleList):
            blocks = {f"{part}.{name}": block for name, block in section.named_children()}
        for block_name, block in blocks.items():
            for name, module in _lvdm_attentions(block, block_name):
                yield TemporalLayer(name, "init" if place == "init" else level, place, module)
            classes = {type(module).__name__ for module in block.modules()}
            level += ("Downsample" in classes) - ("Upsample" in classes)


def _lvdm_attentions(block: nn.Module, block_name: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in block.named_modules(prefix=block_name):
        if type(module).__name__ == "TemporalTransformer":
            for inner_name, inner in module.named_modules(prefix=name):
                if inner_name.rpartition(".")[2] in ("attn1", "attn2"):
                    yield inner_name, inner
