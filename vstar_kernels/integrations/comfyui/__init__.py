"""ComfyUI's nodes: what of this package a graph of ComfyUI can use.

ComfyUI loads them through the pack in ``integrations/comfyui/``, which only names
:func:`comfy_entrypoint`. These are the modules that import ComfyUI, and nothing but the pack
imports them: elsewhere that is an ImportError.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension

from vstar_kernels.integrations.comfyui.apply_prompts import ApplyPrompts
from vstar_kernels.integrations.comfyui.frame_rule import ApplyFrameRule
from vstar_kernels.integrations.comfyui.maps import CaptureMaps, ShowMaps, ShowSimilarity
from vstar_kernels.integrations.comfyui.prompts import MakeSynopsis, WriteSynopsis
from vstar_kernels.integrations.comfyui.tar import ApplyTAR, BiasFromFrames, MakeConfig

NODES = [
    ApplyTAR,
    MakeConfig,
    MakeSynopsis,
    WriteSynopsis,
    BiasFromFrames,
    CaptureMaps,
    ShowMaps,
    ShowSimilarity,
    ApplyFrameRule,
    ApplyPrompts,
]


class VSTARExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[Any]:
        """Returns them."""
        return NODES


async def comfy_entrypoint() -> VSTARExtension:
    """Returns what ComfyUI loads the nodes from."""
    return VSTARExtension()
