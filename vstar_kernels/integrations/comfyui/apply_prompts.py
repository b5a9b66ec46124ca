"""The node of prompts that change over time in full-3D transformers: Apply Prompts over Time."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from vstar_kernels.attention.dispatch import FRAME_ATTENTION
from vstar_kernels.integrations.comfyui.common import (
    CATEGORY,
    backend_input,
    backend_of,
    share_input,
    steps_until,
    wrapped,
)
from vstar_kernels.integrations.comfyui.prompts import encode, read_stages
from vstar_kernels.models.full3d.comfyui_prompts import (
    WHAT,
    PromptsWrapper,
    StageTexts,
    find_text_family,
)
from vstar_kernels.reading import shorten

PROMPTS_KEY = "vstar_prompts"  # of the wrappers: later ones take the place of earlier ones
WHOLE = -1.0  # of w: half of each stage's part


class ApplyPrompts(io.ComfyNode):
    """A prompt for each part of a video, in a full-3D transformer."""

    @classmethod
    def define_schema(cls) -> Any:
        """Returns what ComfyUI shows of the node."""
        return io.Schema(
            node_id="VSTARApplyPrompts",
            display_name=WHAT,
            category=CATEGORY,
            description=(
                "A prompt for each part of a video of Wan or LTX-Video: the stages, one a line, "
                "are one positive conditioning, and each frame hears its own stage, the others "
                "the less the further they are (Prompt Relay, arXiv 2604.10030). Connect both "
                "outputs to the same sampler. A second one on the same model takes the place of "
                "the first."
            ),
            search_aliases=["Prompt Relay", "prompt schedule", "prompt travel", "frame prompts"],
            inputs=[
                io.Model.Input("model", tooltip="Wan or LTX-Video."),
                io.Clip.Input("clip"),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip=(
                        "What all frames hear, beside their stage: what does not change, such as "
                        "the style. Empty: the stages alone."
                    ),
                ),
                io.String.Input(
                    "stages",
                    multiline=True,
                    default="",
                    tooltip=(
                        "What is seen in each part of the video, one a line. 12: before each of "
                        "them says at which frame of the video it begins, from 0; without, all "
                        "parts are equally long."
                    ),
                ),
                io.Float.Input(
                    "sigma",
                    default=0.5,
                    min=0.01,
                    max=256.0,
                    step=0.05,
                    tooltip=(
                        "σ in latent frames, of which Wan makes one from 4 frames, LTX from 8: how "
                        "far a stage is heard outside of its part."
                    ),
                ),
                io.Float.Input(
                    "w",
                    default=WHOLE,
                    min=WHOLE,
                    max=4096.0,
                    step=0.5,
                    tooltip=(
                        "In latent frames: how far from the middle of its part a stage is heard "
                        "undiminished. Below 0: in all of its part."
                    ),
                    advanced=True,
                ),
                share_input(
                    "start",
                    0.0,
                    "The share of the sampler's steps before the first at which each frame hears "
                    "its own stage. At other steps all frames hear all stages.",
                ),
                share_input(
                    "end", 1.0, "The share of the sampler's steps at which that ends; 1 for all."
                ),
                backend_input(FRAME_ATTENTION.backends),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model"),
                io.Conditioning.Output("CONDITIONING", display_name="positive"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        prompt: str,
        stages: str,
        sigma: float,
        w: float,
        start: float,
        end: float,
        backend: str,
    ) -> Any:
        """Returns a clone of the model that knows the stages, and their conditioning."""
        find_text_family(model.get_model_object("diffusion_model"))
        if not stages.strip():
            raise ValueError("stages must hold at least one, a line each; there is none")
        synopsis = read_stages(prompt, stages)
        shared = [prompt.strip()] if prompt.strip() else []
        words = [*shared, *synopsis.stages]
        encoded = [encode(clip, text, WHAT) for text in words]
        found = [_existing(*pair, text) for pair, text in zip(encoded, words, strict=True)]
        lengths = [text.shape[1] for text in found]
        text = torch.cat(found, dim=1)
        more = dict(encoded[0][1])
        if more.get("attention_mask") is not None:
            # LTX-Video's is always given one.
            more["attention_mask"] = torch.ones_like(more["attention_mask"][:, :1]).repeat(
                1, text.shape[1]
            )
        texts = StageTexts(
            text,
            tokens=tuple(lengths[len(shared) :]),
            anchors=synopsis.anchors,
            shared=sum(lengths[: len(shared)]),
        )
        wrapper = PromptsWrapper(
            texts,
            w=None if w < 0 else w,
            sigma=sigma,
            steps=steps_until(start, end, "each frame hears its own stage at no step"),
            start=start,
            backend=backend_of(backend),
        )
        return io.NodeOutput(wrapped(model, PROMPTS_KEY, wrapper, wrapper.begin), [[text, more]])


def _existing(text: Tensor, more: dict[str, Any], words: str) -> Tensor:
    """Returns the tokens of an encoded text that its mask leaves, all where it has none.

    Raises:
        ValueError: It leaves none.
    """
    mask = more.get("attention_mask")
    if mask is None:
        return text
    text = text[:, mask[0].bool()]
    if not text.shape[1]:
        raise ValueError(f"clip masks all tokens of {shorten(words)!r}: the model would hear none")
    return text
