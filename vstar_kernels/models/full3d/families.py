"""The full-3D transformers that are known, by the names of their classes and modules.

A family is data: which modules attend over all tokens of the video, how a call says which frame
each token belongs to, and by which route the attention is reached. Nothing of diffusers is
imported. To add a family: an entry here, a reading in ``layouts.py`` if no other has its arguments,
and a tiny model in ``tests/models/full3d/tiny.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from vstar_kernels.models.full3d import layouts
from vstar_kernels.models.full3d.layouts import Call
from vstar_kernels.models.full3d.seats import FrameLayer, Reading
from vstar_kernels.models.hooks import plain_name
from vstar_kernels.models.schedule import running_pipeline

Hook = Literal["backend", "processor", "function"]  # routes A, B and C


@dataclass(frozen=True)
class Family:
    """Models whose video self-attention is found and reached in the same way.

    Attributes:
        name: As people call it.
        classes: The names of its models' classes; subclasses count.
        layers: Matches the names of the modules that attend over the whole video.
        read: Returns the layouts that the arguments of a call describe.
        hook: ``"backend"`` where processors go through diffusers' attention dispatcher,
            ``"processor"`` where one of ours must take their place, ``"function"`` where PyTorch's
            attention is exchanged.
        timestep: Where the timestep is told as the scheduler has it: in the call of the model, or
            by the pipeline that calls it, where the call has another measure of noise.
        shows_config: Whether the model makes masks that its configuration asks for, and reads
            another where a rule takes their place (``own_masks.py``).
        uniform: Whether all layers attend over the same sequence.
        own_keys: Whether there are keys that are no queries, of which a ``layout=`` says nothing.
    """

    name: str
    classes: tuple[str, ...]
    layers: str
    read: Callable[[Call], Reading]
    hook: Hook = "backend"
    timestep: Literal["call", "pipeline"] = "call"
    shows_config: bool = False
    uniform: bool = True
    own_keys: bool = False

    def knows(self, model: nn.Module) -> bool:
        """Returns whether a model, which must not be wrapped, is of this family."""
        return not {cls.__name__ for cls in type(model).__mro__}.isdisjoint(self.classes)

    def read_timestep(self, call: Call) -> Any:
        """Returns the timestep that tells the step of a call: that of the noisiest tokens.

        Tokens that a condition gives have a timestep of their own (Wan 2.2 TI2V, LTX), and so have
        frames under diffusion forcing.
        """
        if self.timestep == "pipeline":
            found = getattr(running_pipeline(call.model), "_current_timestep", None)
            if found is not None:
                return found
        timestep = call.timestep
        is_many = isinstance(timestep, Tensor) and timestep.numel() > 1
        return timestep.max() if is_many else timestep

    def find_layers(self, model: nn.Module) -> list[FrameLayer]:
        """Returns the layers of a model in its order."""
        return list(_matching(model, re.compile(self.layers)))


class UnknownFamily(Family):
    """Models of any class, of which the caller gives the layout."""

    def find_layers(self, model: nn.Module) -> list[FrameLayer]:
        """Returns the modules that may attend over a video, in the model's order.

        They are those with a processor, as in diffusers, but for cross-attention; in a model that
        has none, those whose class is named after attention.
        """
        modules = list(model.named_modules())
        found = [
            (name, module)
            for name, module in modules
            if hasattr(module, "processor") and not getattr(module, "is_cross_attention", False)
        ]
        if not found:
            found = [item for item in modules if "attention" in type(item[1]).__name__.lower()]
        return [FrameLayer(name, index, module) for index, (name, module) in enumerate(found)]


def _matching(model: nn.Module, pattern: re.Pattern[str]) -> Iterator[FrameLayer]:
    index = 0
    for name, module in model.named_modules():
        if hasattr(module, "processor") and pattern.fullmatch(plain_name(name)):
            yield FrameLayer(name, index, module)
            index += 1


ALL_BLOCKS = r"(single_)?transformer_blocks\.\d+\.attn"
BLOCKS = r"transformer_blocks\.\d+\.attn1"

FAMILIES: tuple[Family, ...] = (
    Family(
        "Wan",
        ("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel"),
        r"(vace_)?blocks\.\d+\.attn1",
        layouts.video,
    ),
    Family(
        "ChronoEdit", ("ChronoEditTransformer3DModel",), r"blocks\.\d+\.attn1", layouts.chronoedit
    ),
    Family("AnyFlow", ("AnyFlowTransformer3DModel",), r"blocks\.\d+\.attn1", layouts.anyflow),
    Family(
        "SkyReels-V2",
        ("SkyReelsV2Transformer3DModel",),
        r"blocks\.\d+\.attn1",
        layouts.skyreels,
        shows_config=True,
    ),
    Family("Helios", ("HeliosTransformer3DModel",), r"blocks\.\d+\.attn1", layouts.helios),
    Family("HunyuanVideo", ("HunyuanVideoTransformer3DModel",), ALL_BLOCKS, layouts.hunyuan),
    Family(
        "FramePack", ("HunyuanVideoFramepackTransformer3DModel",), ALL_BLOCKS, layouts.framepack
    ),
    Family(
        "HunyuanVideo-1.5",
        ("HunyuanVideo15Transformer3DModel",),
        ALL_BLOCKS,
        layouts.hunyuan15,
        hook="processor",
    ),
    Family(
        "CogVideoX",
        ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        BLOCKS,
        layouts.cogvideox,
        hook="processor",
    ),
    Family(
        "EasyAnimate",
        ("EasyAnimateTransformer3DModel",),
        BLOCKS,
        layouts.easyanimate,
        hook="processor",
    ),
    Family(
        "LTX", ("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"), BLOCKS, layouts.ltx
    ),
    Family("Mochi", ("MochiTransformer3DModel",), BLOCKS, layouts.mochi, hook="processor"),
    Family("Allegro", ("AllegroTransformer3DModel",), BLOCKS, layouts.video, hook="processor"),
    Family(
        "Cosmos",
        ("CosmosTransformer3DModel",),
        BLOCKS,
        layouts.video,
        hook="processor",
        timestep="pipeline",
    ),
    Family(
        "Cosmos 3",
        ("Cosmos3OmniTransformer",),
        r"layers\.\d+\.self_attn",
        layouts.cosmos3,
        own_keys=True,
    ),
    Family(
        "Kandinsky 5",
        ("Kandinsky5Transformer3DModel",),
        r"visual_transformer_blocks\.\d+\.self_attention",
        layouts.kandinsky,
    ),
    Family(
        "Kandinsky 6",
        ("Kandinsky6Transformer3DModel",),
        r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
        layouts.kandinsky6,
    ),
    Family(
        "MotifVideo",
        ("MotifVideoTransformer3DModel",),
        ALL_BLOCKS,
        layouts.motif,
        uniform=False,
    ),
    Family(
        "MiniMax-H3",
        ("MiniMaxH3Transformer3DModel",),
        r"transformer_blocks\.\d+\.attn",
        layouts.minimax_h3,
        timestep="pipeline",
    ),
)


UNKNOWN = UnknownFamily("of a class that is not known", (), "", layouts.no_layout, hook="function")


def find_family(model: nn.Module) -> Family | None:
    """Returns the family of a model, which must not be wrapped; None if it is not known."""
    return next((family for family in FAMILIES if family.knows(model)), None)


def known_models() -> str:
    """Returns the classes of all families, in words."""
    return ", ".join(name for family in FAMILIES for name in family.classes)
