"""The whole method in one call: :class:`VSTAR`."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from vstar_kernels.attention.bias import check_flag
from vstar_kernels.attention.frames.rules import FrameRule
from vstar_kernels.methods.arguments import check_integer
from vstar_kernels.methods.pipelines import (
    PipelineCall,
    check_pipeline,
    check_sampling,
    has_text_apart,
    is_full3d,
)
from vstar_kernels.methods.vstar.embeddings import (
    MODES,
    Interpolation,
    Rounding,
    check_rounding,
    interpolate_embeddings,
)
from vstar_kernels.methods.vstar.synopsis import Synopsis
from vstar_kernels.methods.vstar.writer import SynopsisWriter
from vstar_kernels.models.apply import TARHandle, apply_tar
from vstar_kernels.models.capture import capture_maps
from vstar_kernels.models.config import TARConfig
from vstar_kernels.models.frame_prompts import condition_frames
from vstar_kernels.models.full3d.apply import FramesHandle, RuledLayer, apply_frames
from vstar_kernels.models.full3d.config import FrameTAR
from vstar_kernels.models.hooks import Handle
from vstar_kernels.models.layers import RegularizedLayer
from vstar_kernels.models.map_capture import MapCapture
from vstar_kernels.models.progress import OnStep, steps_told

SEEDS = 2**32
# The paper's σ at the finest level and the official code's first 14 of 25 steps, for any model and
# any number of steps.
PAPER = TARConfig(sigma=1.0, steps=0.56)
# Of full-3D transformers, where nobody has published any.
FULL3D_DEFAULT = FrameTAR()
# Regularizes at no step: only the positions are extended.
NEVER = TARConfig(sigma=1.0, steps=lambda step, timestep: False)


@dataclass(frozen=True)
class Generation:
    """One video from :class:`VSTAR`, and all that it was made with.

    Attributes:
        frames: A list of PIL images, or what else the pipeline's ``output_type`` gives.
        synopsis: The stages; one, the prompt itself, where none were asked for.
        config: The regularization; None where there was none.
        seed: The seed of the noise.
        layers: The regularized layers.
        maps: The attention maps; None where they were not asked for.
    """

    frames: Any
    synopsis: Synopsis
    config: TARConfig | FrameTAR | FrameRule | None
    seed: int
    layers: list[RegularizedLayer] | list[RuledLayer]
    maps: MapCapture | None


class VSTAR:
    """Longer, more dynamic videos from a pretrained pipeline (VSTAR, arXiv 2403.13501).

    >>> vstar = vk.VSTAR(pipe, "64D1_32D8", writer=vk.SynopsisWriter.from_endpoint("llama3"))
    >>> video = vstar("A rose blooms in a garden.", num_frames=48, seed=1)
    >>> video.frames, video.synopsis.stages

    It puts together video synopsis prompting (:class:`SynopsisWriter`,
    :func:`interpolate_embeddings`, :func:`condition_frames`; §3.4) and temporal attention
    regularization (:func:`apply_tar`; §3.3). The pipeline is as it was after each call.

    Args:
        pipe: diffusers' ``TextToVideoSDPipeline``, ``AnimateDiffPipeline``, ``I2VGenXLPipeline`` or
            ``LattePipeline``, on its device; or, of full-3D transformers, ``WanPipeline``,
            ``SkyReelsV2Pipeline``, ``AnyFlowPipeline``, ``LTXPipeline``, ``AllegroPipeline``,
            ``CosmosTextToWorldPipeline``, ``CogVideoXPipeline``, ``HunyuanVideoPipeline`` or
            ``MochiPipeline``. The last three take one text for the whole video, as it is one
            sequence with it: a synopsis of one stage.
        config: A :class:`TARConfig` or a preset such as ``"64D1_32D8"``; by default σ = 1 at level
            0, as in the paper, in the first 56 % of the steps, the official code's 14 of 25. For a
            full-3D transformer a :class:`FrameTAR`, by default ``FrameTAR()``, or any
            :class:`vstar_kernels.FrameRule`, which is then on at all steps. None samples without
            regularization: the baseline, and with a synopsis VSP alone, which are two of the
            paper's four columns (Table 2).
        writer: Writes the synopses of prompts; without one, all frames have the prompt.
        mode, rounding: How to interpolate between stages, and on which frames stages without
            anchors are, see :func:`interpolate_embeddings`.
        backend, extend_positions: As for :func:`apply_tar`.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, or a preset is malformed.
    """

    def __init__(
        self,
        pipe: Any,
        config: TARConfig | FrameTAR | FrameRule | str | None = PAPER,
        *,
        writer: SynopsisWriter | None = None,
        mode: Interpolation = "linear",
        rounding: Rounding = "down",
        backend: str | None = None,
        extend_positions: bool = False,
    ) -> None:
        check_pipeline(pipe)
        if writer is not None and not isinstance(writer, SynopsisWriter):
            raise TypeError(f"writer must be a SynopsisWriter, got {type(writer).__name__}")
        if isinstance(config, str):
            config = TARConfig.preset(config)
        if is_full3d(pipe):
            config = FULL3D_DEFAULT if config is PAPER else config
            if extend_positions:
                raise ValueError(
                    f"extend_positions is for models with temporal layers, got a "
                    f"{type(pipe).__name__}"
                )
        kinds = (FrameTAR, FrameRule) if is_full3d(pipe) else (TARConfig,)
        if config is not None and not isinstance(config, kinds):
            allowed = "FrameTAR, a FrameRule" if is_full3d(pipe) else "TARConfig, a preset"
            raise TypeError(
                f"config must be a {allowed} or None, got {type(config).__name__}, for a "
                f"{type(pipe).__name__}"
            )
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        check_rounding(rounding)
        check_flag(extend_positions, "extend_positions")
        self._pipe = pipe
        self._config = config
        self._writer = writer
        self._mode = mode
        self._rounding = rounding
        self._backend = backend
        self._extend_positions = extend_positions

    def __call__(
        self,
        prompt: str | Synopsis,
        *,
        num_frames: int = 16,
        seed: int | None = None,
        num_stages: int | None = None,
        refresh: bool = False,
        maps: bool | Collection[int] = False,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Generation:
        """Makes one video.

        Args:
            prompt: The video in a sentence, of which the writer makes a synopsis if there is one;
                or a synopsis.
            num_frames: The video's number of frames. Full-3D pipelines make certain numbers, and
                others are refused: 1 more than a multiple of 4 (Wan, SkyReels-V2, AnyFlow,
                HunyuanVideo), of 6 (Mochi) or of 8 (LTX, Cosmos), which is how many a latent frame
                is of; a multiple of 8 or 1 more for CogVideoX; an even one or 1 more than a
                multiple of 4 for Allegro.
            seed: From 0 to 2³² − 1; None draws one, which the result has.
            num_stages: How many stages the writer makes; None leaves it to the writer.
            refresh: Whether to ask the writer even for what is in its cache.
            maps: Whether to capture the mean attention maps; or at which steps, see
                :func:`capture_maps`.
            on_step: Is called with a step's index and the number of steps when the step begins.
                What it raises, such as :class:`vstar_kernels.Cancelled`, ends the call, and the
                pipeline is as it was. See :func:`vstar_kernels.watch_steps`.
            options: The pipeline's own, such as ``num_inference_steps``, ``guidance_scale``,
                ``height``, ``negative_prompt``, and for I2VGen-XL ``image``.

        Raises:
            TypeError, ValueError: An argument is of the wrong kind, unknown, or does not fit the
                others, the model or the synopsis.
            vstar_kernels.methods.vstar.writer.SynopsisError: The writer has no synopsis.
        """
        call = PipelineCall(self._pipe, options)
        self._check(prompt, num_frames, seed, num_stages, refresh)
        check_sampling(self._pipe, options, maps)
        call.check_frames(num_frames)
        seed = secrets.randbelow(SEEDS) if seed is None else seed
        # These come first, as they find most mistakes.
        with steps_told(self._pipe, on_step), self._regularize() as tar:
            synopsis = self._synopsis(prompt, num_stages, refresh)
            with (
                self._condition(call, synopsis, num_frames),
                self._capture(maps) as capture,
            ):
                frames = call.sample(synopsis.prompt, num_frames, seed)
            layers = [] if self._config is None or tar is None else tar.layers
            return Generation(frames, synopsis, self._config, seed, layers, capture)

    def _condition(
        self, call: PipelineCall, synopsis: Synopsis, num_frames: int
    ) -> AbstractContextManager[Handle | None]:
        """Returns what gives the video's frames, or latent frames, their texts.

        A full-3D pipeline is given a single stage as its prompt.
        """
        single = len(synopsis.stages) == 1
        if is_full3d(self._pipe) and single and synopsis.stages[0] == synopsis.prompt:
            return nullcontext()
        if not has_text_apart(self._pipe):
            raise ValueError(
                f"{type(self._pipe).__name__} has one text for the whole video, as text and video "
                "are one sequence there: its synopsis must be of one stage, the prompt itself, got "
                f"{len(synopsis.stages)}"
            )
        encoded = call.encode(tuple(synopsis.stages))
        options: dict[str, Any] = {
            "num_frames": num_frames,
            "anchors": synopsis.anchors,
            "rounding": self._rounding,
            "every": call.frames_of_a_latent,
        }
        embeddings = interpolate_embeddings(encoded.embeddings, mode=self._mode, **options)
        masks: dict[str, Any] = {}
        if encoded.mask is not None:
            # What exists in a stage exists in all frames that have something of it.
            exists = encoded.mask[..., None].float()
            mode: Interpolation = "hold" if self._mode == "hold" else "linear"
            masks["mask"] = interpolate_embeddings(exists, mode=mode, **options)[..., 0] > 0
        negative = encoded.negative
        if negative is not None:
            negative = negative.expand(len(embeddings), -1, -1)
            if encoded.negative_mask is not None:
                masks["negative_mask"] = encoded.negative_mask.expand(len(embeddings), -1)
        return condition_frames(
            self._pipe, embeddings, negative=negative, guidance=call.guided, **masks
        )

    def _capture(self, maps: bool | Collection[int]) -> AbstractContextManager[MapCapture | None]:
        if maps is False:
            return nullcontext()
        return capture_maps(self._pipe, steps=None if maps is True else maps)

    def _regularize(self) -> AbstractContextManager[TARHandle | FramesHandle | None]:
        if self._config is None and not self._extend_positions:
            return nullcontext()
        if isinstance(self._config, FrameTAR):
            return apply_tar(self._pipe, self._config, backend=self._backend)
        if isinstance(self._config, FrameRule):
            return apply_frames(self._pipe, self._config, backend=self._backend)
        return apply_tar(
            self._pipe,
            NEVER if self._config is None else self._config,
            backend=self._backend,
            extend_positions=self._extend_positions,
        )

    def _synopsis(self, prompt: str | Synopsis, num_stages: int | None, refresh: bool) -> Synopsis:
        if isinstance(prompt, Synopsis):
            return prompt
        if self._writer is None:
            return Synopsis(prompt, [prompt])
        return self._writer.write(prompt, num_stages=num_stages, refresh=refresh)

    def _check(
        self, prompt: Any, num_frames: Any, seed: Any, num_stages: Any, refresh: Any
    ) -> None:
        """Raises for what would otherwise be found only after a synopsis has been paid for."""
        if not isinstance(prompt, str | Synopsis):
            raise TypeError(f"prompt must be a text or a Synopsis, got {type(prompt).__name__}")
        check_integer("num_frames", num_frames, 1)
        if seed is not None:
            check_integer("seed", seed, 0, SEEDS - 1)
        check_flag(refresh, "refresh")
        if self._writer is not None and not isinstance(prompt, Synopsis):
            return
        there = "a Synopsis" if isinstance(prompt, Synopsis) else "no writer"
        for name, is_given in (("num_stages", num_stages is not None), ("refresh", refresh)):
            if is_given:
                raise ValueError(f"{name} is for a prompt and a writer, got {there}")
