"""The nodes that show what attention does: Capture Maps, Show Maps and Show Similarity."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from vstar_kernels.analysis import (
    frame_similarity,
    mean_maps,
    normalize_jointly,
    plot_maps,
    plot_similarities,
)
from vstar_kernels.integrations.comfyui.common import (
    CATEGORY,
    Maps,
    as_video,
    embedder_input,
    embedder_of,
    read_indices,
    wrapped,
)
from vstar_kernels.models.comfyui_capture import MapsWrapper
from vstar_kernels.models.map_capture import MapCapture

MAPS_KEY = "vstar_maps"  # of the wrappers
DPI = 110


class CaptureMaps(io.ComfyNode):
    """The attention maps of a model while it is sampled."""

    @classmethod
    def define_schema(cls) -> Any:
        """Returns what ComfyUI shows of the node."""
        return io.Schema(
            node_id="VSTARCaptureMaps",
            display_name="VSTAR Capture Maps",
            category=CATEGORY,
            description=(
                "Collects the mean temporal attention maps of Stable Video Diffusion or "
                "AnimateDiff while the model is sampled: which frames each frame attends to. They "
                "are those of the last sampler that ran; the video stays the same, bit for bit."
            ),
            inputs=[
                io.Model.Input("model", tooltip="With VSTAR Apply TAR, its maps are shown."),
                io.String.Input(
                    "steps",
                    default="0,13",
                    tooltip="Indices of the sampler's steps, from 0. Empty: all of them.",
                ),
                io.String.Input(
                    "levels",
                    default="",
                    tooltip="The UNet's resolution levels, 0 the finest. Empty: all of them.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model"),
                Maps.Output("VSTAR_MAPS", display_name="maps"),
            ],
        )

    @classmethod
    def execute(cls, model: Any, steps: str, levels: str) -> Any:
        """Returns a clone of the model that is watched, and what its maps will be in."""
        wrapper = MapsWrapper(read_indices("steps", steps), read_indices("levels", levels))
        return io.NodeOutput(wrapped(model, MAPS_KEY, wrapper, wrapper.begin), wrapper.capture)


class ShowMaps(io.ComfyNode):
    """A picture of captured maps."""

    @classmethod
    def define_schema(cls) -> Any:
        """Returns what ComfyUI shows of the node."""
        return io.Schema(
            node_id="VSTARShowMaps",
            display_name="VSTAR Show Maps",
            category=CATEGORY,
            description=(
                "Draws what VSTAR Capture Maps has collected: a row for each level of the UNet, a "
                "column for each step (Figs. 3 and 10 of the paper)."
            ),
            inputs=[
                Maps.Input("maps"),
                io.Latent.Input(
                    "latent", tooltip="What the sampler returned, so that the maps are there."
                ),
            ],
            outputs=[io.Image.Output("IMAGE", display_name="image")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, maps: MapCapture, latent: Any) -> Any:
        """Returns the picture."""
        with_prompt = [found for found in maps.maps if found.branch == 0]
        if not with_prompt:
            raise ValueError(
                "there are no maps: sample the model that VSTAR Capture Maps returns, connect that "
                "sampler's latent here, and choose steps that it runs"
            )
        return _shown(cls, plot_maps(mean_maps(with_prompt)))


class ShowSimilarity(io.ComfyNode):
    """A picture of how alike the frames of a video are."""

    @classmethod
    def define_schema(cls) -> Any:
        """Returns what ComfyUI shows of the node."""
        return io.Schema(
            node_id="VSTARShowSimilarity",
            display_name="VSTAR Show Similarity",
            category=CATEGORY,
            description=(
                "Draws how alike each two frames of a video are (Fig. S.1 of the paper): a band "
                "along the diagonal is a video that changes, a plain square one that stands still."
            ),
            inputs=[
                io.Image.Input("frames"),
                io.Image.Input(
                    "other",
                    display_name="other frames",
                    optional=True,
                    tooltip="Another video, such as the one without TAR, on the same scale.",
                ),
                embedder_input(),
            ],
            outputs=[io.Image.Output("IMAGE", display_name="image")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, frames: Tensor, embedder: str, other: Tensor | None = None) -> Any:
        """Returns the picture."""
        videos = {"frames": frames} if other is None else {"frames": frames, "other frames": other}
        found = {
            name: frame_similarity(as_video(video), embedder_of(embedder))
            for name, video in videos.items()
        }
        return _shown(cls, plot_similarities(normalize_jointly(found)))


def _shown(node: Any, figure: Any) -> Any:
    """Returns a figure as a node's output and as its preview."""
    from matplotlib.image import imread

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
    buffer.seek(0)
    image = torch.from_numpy(imread(buffer, format="png"))[None, ..., :3]  # from 0 to 1
    return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=node))
