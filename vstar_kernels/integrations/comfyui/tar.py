"""The nodes of temporal attention regularization: Apply TAR, TAR Config and Bias from Frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from comfy_api.latest import io
from torch import Tensor

from vstar_kernels.analysis import bias_from_frames
from vstar_kernels.attention.bias import STATS
from vstar_kernels.attention.dispatch import TAR_ATTENTION
from vstar_kernels.integrations.comfyui.common import (
    CATEGORY,
    Bias,
    Config,
    as_video,
    backend_input,
    backend_of,
    embedder_input,
    embedder_of,
    share_input,
    steps_until,
    strength_input,
    wrapped,
)
from vstar_kernels.models.comfyui import TARWrapper
from vstar_kernels.models.config import TARConfig

TAR_KEY = "vstar_tar"  # of the wrapper: a later one takes the place of an earlier one
LEVELS = 4  # of the UNets
CUSTOM = "custom"
PRESETS = (CUSTOM, "64D1", "64D1_32D8", "64D4_32D8", "32D1", "32D1_16D8")
KEEP = "none"
PAPER_END = 0.56  # 14 of 25 steps, as in the official code


class TimedConfig(NamedTuple):
    """What a VSTAR_CONFIG is.

    Attributes:
        config: What to do, and when it ends.
        start: The share of the steps before it begins.
    """

    config: TARConfig
    start: float


def _config_inputs() -> list[Any]:
    """Returns the inputs that say what TAR does and when."""
    levels = [
        io.Float.Input(
            f"sigma_level_{level}",
            display_name=f"sigma level {level}",
            default=1.0 if level == 0 else 0.0,
            min=0.0,
            max=256.0,
            step=0.1,
            tooltip=(
                f"σ in frames at the UNet's resolution level {level}"
                + (", the finest" if level == 0 else "")
                + ": how far a frame attends to its neighbours. 0 leaves the level alone."
            ),
            advanced=True if level > 1 else None,
        )
        for level in range(LEVELS)
    ]
    return [
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default=CUSTOM,
            tooltip=(
                "σ by the width of the latents, as the paper names it: 64D1_32D8 is σ 1 where they "
                "are 64 wide (512 pixels at level 0) and 8 where they are 32. With custom, the "
                "sigmas below count; with a preset, they do not."
            ),
        ),
        *levels,
        strength_input(
            "Factor on the regularization: 0 is the model's own attention, more is more motion, "
            "less than 0 the opposite."
        ),
        share_input(
            "start", 0.0, "The share of the sampler's steps before the first that is regularized."
        ),
        share_input(
            "end",
            PAPER_END,
            "The share of the sampler's steps at which the regularization ends; 0.56 is the first "
            "14 of 25 steps, as in the paper's code.",
        ),
        io.Boolean.Input(
            "clamp_negative",
            default=False,
            tooltip="Leave rows whose largest logit is negative alone, which TAR would invert.",
        ),
    ]


def _make_config(
    preset: str,
    strength: float,
    start: float,
    end: float,
    clamp_negative: bool,
    *,
    stat: str = "row_max",
    override: Mapping[int, Any] | None = None,
    bias: Any = None,
    **levels: float,
) -> TimedConfig:
    """Returns what the inputs of :func:`_config_inputs` say.

    Raises:
        ValueError: They regularize nothing, or no step.
    """
    steps = steps_until(start, end, "no step is regularized")
    override = dict(override or {})
    common: dict[str, Any] = {
        "strength": strength,
        "steps": steps,
        "bias": bias,
        "stat": stat,
        "clamp_negative": clamp_negative,
        "override": override,
    }
    if preset != CUSTOM:
        if override:
            raise ValueError(
                "override is by level, and a preset by width: choose the preset custom, or no "
                "override"
            )
        preset_ = TARConfig.preset(preset)
        return TimedConfig(TARConfig(by_width=preset_.by_width, **common), start)
    sigmas = {level: levels[f"sigma_level_{level}"] for level in range(LEVELS)}
    sigma = {level: x for level, x in sigmas.items() if x > 0 and level not in override}
    if not sigma and not override and bias is None:
        raise ValueError(
            "every sigma level is 0, so that nothing is regularized: give one a sigma in frames, "
            "such as 1, or choose a preset"
        )
    return TimedConfig(TARConfig(sigma=sigma or None, **common), start)


class ApplyTAR(io.ComfyNode):
    """Temporal Attention Regularization on a model."""

    @classmethod
    def define_schema(cls) -> Any:
        """Returns what ComfyUI shows of the node."""
        return io.Schema(
            node_id="VSTARApplyTAR",
            display_name="VSTAR Apply TAR",
            category=CATEGORY,
            description=(
                "Makes a video more dynamic, and lets it follow prompts that change: regularizes "
                "the temporal attention of Stable Video Diffusion and AnimateDiff while the model "
                "is sampled (VSTAR, arXiv 2403.13501). No training, no other model. A second one "
                "on the same model takes the place of the first."
            ),
            search_aliases=["TAR", "temporal attention", "dynamics", "motion", "long video"],
            inputs=[
                io.Model.Input("model", tooltip="SVD, or a model with an AnimateDiff module."),
                *_config_inputs(),
                backend_input(TAR_ATTENTION.backends),
                Config.Input(
                    "config",
                    optional=True,
                    tooltip="From VSTAR TAR Config, in the place of all values above but backend.",
                ),
                Bias.Input(
                    "bias",
                    optional=True,
                    tooltip=(
                        "From VSTAR Bias from Frames: the similarity of a real video's frames in "
                        "the place of the Gaussian, at the same levels."
                    ),
                ),
            ],
            outputs=[io.Model.Output("MODEL", display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        backend: str,
        config: TimedConfig | None = None,
        bias: Any = None,
        **settings: Any,
    ) -> Any:
        """Returns a clone of the model, regularized."""
        if config is None:
            config = _make_config(bias=bias, **settings)
        elif bias is not None:
            config = config._replace(config=replace(config.config, bias=bias))
        wrapper = TARWrapper(config.config, start=config.start, backend=backend_of(backend))
        return io.NodeOutput(wrapped(model, TAR_KEY, wrapper))


class MakeConfig(io.ComfyNode):
    """What TAR does, with everything that the library knows."""

    @classmethod
    def define_schema(cls) -> Any:
        """Returns what ComfyUI shows of the node."""
        overrides = [
            io.Combo.Input(
                f"override_level_{level}",
                display_name=f"override level {level}",
                options=[KEEP, "identity", "uniform"],
                default=KEEP,
                tooltip=(
                    "What takes the place of this level's attention map (Fig. 4 of the paper): "
                    "identity, each frame by itself; uniform, the mean of all frames."
                ),
                advanced=True,
            )
            for level in range(LEVELS)
        ]
        return io.Schema(
            node_id="VSTARTARConfig",
            display_name="VSTAR TAR Config",
            category=CATEGORY,
            description=(
                "What VSTAR Apply TAR does, for several models at once or with what that node does "
                "not show: the statistic, replaced maps, or a TARConfig of the library as JSON."
            ),
            inputs=[
                *_config_inputs(),
                io.Combo.Input(
                    "stat",
                    options=list(STATS),
                    default="row_max",
                    tooltip=(
                        "What weighs the regularization: each row's largest logit (the paper's "
                        "code), the map's largest (its equation 3), or nothing."
                    ),
                ),
                *overrides,
                io.String.Input(
                    "json",
                    display_name="JSON",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip=(
                        "What TARConfig.to_json wrote, in the place of all values above but start. "
                        "Empty: the values above."
                    ),
                ),
            ],
            outputs=[Config.Output("VSTAR_CONFIG", display_name="config")],
        )

    @classmethod
    def execute(cls, start: float, json: str = "", **settings: Any) -> Any:
        """Returns the configuration."""
        if json.strip():
            return io.NodeOutput(TimedConfig(TARConfig.from_json(json), start))
        override = {
            level: kind
            for level in range(LEVELS)
            if (kind := settings.pop(f"override_level_{level}")) != KEEP
        }
        return io.NodeOutput(_make_config(start=start, override=override, **settings))


class BiasFromFrames(io.ComfyNode):
    """Δ of a real video."""

    @classmethod
    def define_schema(cls) -> Any:
        """Returns what ComfyUI shows of the node."""
        return io.Schema(
            node_id="VSTARBiasFromFrames",
            display_name="VSTAR Bias from Frames",
            category=CATEGORY,
            description=(
                "How alike the frames of a real video are, as the regularization of VSTAR Apply "
                "TAR: the new video takes over its dynamics (Fig. 8 of the paper). It needs as "
                "many frames as the new one has, of a context window if there are windows."
            ),
            inputs=[
                io.Image.Input("frames", tooltip="The reference video."),
                embedder_input(),
                io.Boolean.Input(
                    "min_max",
                    display_name="spread",
                    default=True,
                    tooltip=(
                        "Spread the similarities over 0 to 1. Only their differences tell, and "
                        "those of real frames are small."
                    ),
                ),
            ],
            outputs=[Bias.Output("VSTAR_BIAS", display_name="bias")],
        )

    @classmethod
    def execute(cls, frames: Tensor, embedder: str, min_max: bool) -> Any:
        """Returns the bias."""
        bias = bias_from_frames(as_video(frames), embedder_of(embedder), min_max=min_max)
        return io.NodeOutput(bias)
