"""The node of full-3D transformers: Apply Frame Rule."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from vstar_kernels.attention.dispatch import FRAME_ATTENTION
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.integrations.comfyui.common import (
    CATEGORY,
    backend_input,
    backend_of,
    read_indices,
    share_input,
    steps_until,
    strength_input,
    wrapped,
)
from vstar_kernels.models.full3d.comfyui import FrameRuleWrapper, find_family

RULE_KEY = "vstar_frame_rule"  # of the wrapper: a later one takes the place of an earlier one
RULES = ("tar", "attenuate", "window")


class ApplyFrameRule(io.ComfyNode):
    """A rule between the frames of a full-3D transformer."""

    @classmethod
    def define_schema(cls) -> Any:
        """Returns what ComfyUI shows of the node."""
        return io.Schema(
            node_id="VSTARApplyFrameRule",
            display_name="VSTAR Apply Frame Rule",
            category=CATEGORY,
            description=(
                "Changes how the frames of Wan, HunyuanVideo and LTX attend to one another while "
                "the model is sampled. tar is VSTAR's regularization, for more motion; attenuate "
                "is UltraViCo's, for videos longer than the model was trained on; window hides far "
                "frames. A second one on the same model takes the place of the first."
            ),
            search_aliases=["TAR", "frame attention", "UltraViCo", "long video", "motion"],
            inputs=[
                io.Model.Input("model", tooltip="Wan, HunyuanVideo or LTX-Video."),
                io.Combo.Input(
                    "rule",
                    options=list(RULES),
                    default="tar",
                    tooltip=(
                        "tar uses sigma and strength, attenuate alpha and window, window just that."
                    ),
                ),
                io.Float.Input(
                    "sigma",
                    default=1.0,
                    min=0.0,
                    max=256.0,
                    step=0.1,
                    tooltip="Of tar: σ in latent frames, of which Wan makes one from 4 frames.",
                ),
                strength_input(
                    "Of tar: factor on the regularization; 0 is the model's own attention."
                ),
                io.Float.Input(
                    "alpha",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Of attenuate: the factor on positive logits of far frames.",
                ),
                io.Int.Input(
                    "window",
                    default=21,
                    min=1,
                    max=4096,
                    tooltip=(
                        "In latent frames. Of attenuate: the model's length in training, 21 for "
                        "Wan; far is half of it. Of window: how far frames see."
                    ),
                ),
                share_input(
                    "start", 0.0, "The share of the sampler's steps before the rule begins."
                ),
                share_input(
                    "end",
                    0.3,
                    "The share of the sampler's steps at which the rule ends; 1 for all.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    tooltip="Indices of blocks, such as 0-9 or 3, 5. Empty: all of them.",
                    advanced=True,
                ),
                backend_input(FRAME_ATTENTION.backends),
                io.String.Input(
                    "json",
                    display_name="JSON",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip=(
                        "What FrameRule.to_json of the library wrote, any rule or sum of rules, in "
                        "the place of the one above. Empty: the one above."
                    ),
                ),
            ],
            outputs=[io.Model.Output("MODEL", display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        rule: str,
        sigma: float,
        strength: float,
        alpha: float,
        window: int,
        start: float,
        end: float,
        layers: str,
        backend: str,
        json: str = "",
    ) -> Any:
        """Returns a clone of the model, under the rule."""
        find_family(model.get_model_object("diffusion_model"))
        steps = steps_until(start, end, "the rule is at no step")
        if json.strip():
            made = FrameRule.from_json(json)
            if not made.terms:
                raise ValueError("the rule changes nothing: its JSON has no terms")
        elif rule == "tar":
            made = FrameRule.tar(sigma, strength)
        elif rule == "attenuate":
            made = FrameRule.attenuate(alpha, window)
        else:
            made = FrameRule.window(window)
        wrapper = FrameRuleWrapper(
            made,
            steps=steps,
            start=start,
            layers=read_indices("layers", layers),
            backend=backend_of(backend),
        )
        return io.NodeOutput(wrapped(model, RULE_KEY, wrapper))
