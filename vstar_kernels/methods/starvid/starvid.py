"""The whole method in one call: :class:`StarVid`."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vstar_kernels.attention.bias import check_flag
from vstar_kernels.methods.arguments import check_integer
from vstar_kernels.methods.pipelines import (
    PIPELINES,
    PipelineCall,
    check_pipeline,
    check_sampling,
)
from vstar_kernels.methods.starvid.config import GuidanceConfig
from vstar_kernels.methods.starvid.guidance import GuidanceUpdate, guide_latents
from vstar_kernels.methods.starvid.trajectory import Trajectory
from vstar_kernels.methods.starvid.words import PlanWords
from vstar_kernels.methods.starvid.writer import TrajectoryWriter
from vstar_kernels.methods.vstar.embeddings import interpolate_embeddings
from vstar_kernels.methods.vstar.synopsis import Synopsis
from vstar_kernels.models.apply import apply_tar
from vstar_kernels.models.columns import ColumnCapture, capture_columns
from vstar_kernels.models.config import TARConfig, checked_tar
from vstar_kernels.models.frame_prompts import condition_frames
from vstar_kernels.models.progress import OnStep, steps_told

SEEDS = 2**32


@dataclass(frozen=True)
class GuidedVideo:
    """One video from :class:`StarVid`, and all that it was made with.

    Attributes:
        frames: A list of PIL images, or what else the pipeline's ``output_type`` gives.
        plan: Where the subjects were to be.
        config: When and how the latents were drawn towards the plan.
        tar: The regularization of temporal attention; None where there was none.
        seed: The seed of the noise.
        words: The plan's words, in the order of the maps.
        updates: The updates of the latents, with their losses; see
            :class:`vstar_kernels.methods.starvid.guidance.GuidanceHandle`, also for those that were
            not applied.
        guided_maps: By guided step the words' maps of its last record in ``updates``, ``(frames,
            words, height, width)``.
        maps: The words' maps in the pipeline's own forward passes; None where they were not asked
            for.
    """

    frames: Any
    plan: Trajectory
    config: GuidanceConfig
    tar: TARConfig | None
    seed: int
    words: PlanWords
    updates: list[GuidanceUpdate]
    guided_maps: dict[int, Tensor]
    maps: ColumnCapture | None


class StarVid:
    """Videos of several subjects, each in its place and at its motion (StarVid, arXiv 2409.15259).

    >>> starvid = vk.StarVid(pipe, writer=vk.TrajectoryWriter.from_endpoint("llama3"))
    >>> video = starvid("A cat chases a mouse through the snow.", num_frames=16, seed=1)
    >>> video.frames, video.plan, video.updates[-1].mass

    It puts together a plan by a language model (:class:`TrajectoryWriter`) and guidance of the
    latents by it (:func:`guide_latents`). The pipeline is as it was after each call.

    Args:
        pipe: diffusers' ``TextToVideoSDPipeline``, ``AnimateDiffPipeline``, ``I2VGenXLPipeline`` or
            ``LattePipeline``, on its device.
        config: When and how the latents are guided.
        writer: Writes the plans of prompts; without one, only plans are taken.
        tar: A :class:`TARConfig` or a preset, by which temporal attention is regularized as well
            (VSTAR); None does not.
        checkpointing, backend: As for :func:`guide_latents`.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind, or a preset is malformed.
    """

    def __init__(
        self,
        pipe: Any,
        config: GuidanceConfig | None = None,
        *,
        writer: TrajectoryWriter | None = None,
        tar: TARConfig | str | None = None,
        checkpointing: bool = True,
        backend: str | None = None,
    ) -> None:
        check_pipeline(pipe)
        if {cls.__name__ for cls in type(pipe).__mro__}.isdisjoint(PIPELINES):
            raise TypeError(
                f"pipe must be one of diffusers' {', '.join(PIPELINES)}, got {type(pipe).__name__}"
            )
        if config is not None and not isinstance(config, GuidanceConfig):
            raise TypeError(f"config must be a GuidanceConfig or None, got {type(config).__name__}")
        if writer is not None and not isinstance(writer, TrajectoryWriter):
            raise TypeError(f"writer must be a TrajectoryWriter, got {type(writer).__name__}")
        check_flag(checkpointing, "checkpointing")
        self._pipe = pipe
        self._config = GuidanceConfig() if config is None else config
        self._writer = writer
        self._tar = None if tar is None else checked_tar("tar", tar)
        self._checkpointing = checkpointing
        self._backend = backend

    def __call__(
        self,
        prompt: str | Trajectory,
        *,
        num_frames: int = 16,
        seed: int | None = None,
        key_frames: int | None = None,
        refresh: bool = False,
        synopsis: Synopsis | None = None,
        maps: bool | Collection[int] = False,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> GuidedVideo:
        """Makes one video.

        Args:
            prompt: A plan; or the video in a sentence, of which the writer makes one.
            num_frames: The video's number of frames.
            seed: From 0 to 2³² − 1; None draws one, which the result has.
            key_frames: For how many frames the writer plans boxes; None leaves it to the writer.
            refresh: Whether to ask the writer even for what is in its cache.
            synopsis: The stages that the frames are conditioned on instead of the plan's prompt
                (VSTAR). Each stage has the plan's words at the same tokens.
            maps: Whether to capture the words' maps in the pipeline's own forward passes, the
                unguided steps' too; or at which steps, see :func:`capture_columns`.
            on_step: As for :class:`vstar_kernels.VSTAR`; a step's updates of the latents are told
                together with the step.
            options: The pipeline's own, such as ``num_inference_steps``, ``guidance_scale``,
                ``height``, ``negative_prompt``, and for I2VGen-XL ``image``.

        Raises:
            TypeError, ValueError: An argument is of the wrong kind, unknown, or does not fit the
                others, the model or the plan.
            vstar_kernels.methods.starvid.writer.PlanError: The writer has no plan.
            FloatingPointError: A loss or its gradient is not finite.
        """
        call = PipelineCall(self._pipe, options)
        self._check(prompt, num_frames, seed, key_frames, synopsis, refresh)
        check_sampling(self._pipe, options, maps)
        seed = secrets.randbelow(SEEDS) if seed is None else seed
        with ExitStack() as stack:
            stack.enter_context(steps_told(self._pipe, on_step))
            plan = self._plan(prompt, key_frames, refresh)
            guided = stack.enter_context(
                guide_latents(
                    self._pipe,
                    plan,
                    self._config,
                    texts=None if synopsis is None else synopsis.stages,
                    guidance=call.guided,
                    checkpointing=self._checkpointing,
                    backend=self._backend,
                )
            )
            if self._tar is not None:
                stack.enter_context(apply_tar(self._pipe, self._tar))
            if synopsis is not None:
                encoded = call.encode(tuple(synopsis.stages))
                embeddings = interpolate_embeddings(
                    encoded.embeddings, num_frames, synopsis.anchors
                )
                negative = encoded.negative
                if negative is not None:
                    negative = negative.expand(num_frames, -1, -1)
                stack.enter_context(
                    condition_frames(
                        self._pipe, embeddings, negative=negative, guidance=call.guided
                    )
                )
            (words,) = guided.words
            capture = None
            if maps is not False:
                capture = stack.enter_context(
                    capture_columns(
                        self._pipe,
                        words.tokens,
                        steps=None if maps is True else maps,
                        guidance=call.guided,
                        backend=self._backend,
                    )
                )
            frames = call.sample(plan.prompt, num_frames, seed)
        return GuidedVideo(
            frames,
            plan,
            self._config,
            self._tar,
            seed,
            words,
            guided.updates,
            {step: videos[0] for step, videos in guided.maps.items()},
            capture,
        )

    def _plan(self, prompt: str | Trajectory, key_frames: int | None, refresh: bool) -> Trajectory:
        if isinstance(prompt, Trajectory):
            return prompt
        assert self._writer is not None
        return self._writer.write(prompt, key_frames=key_frames, refresh=refresh)

    def _check(
        self,
        prompt: Any,
        num_frames: Any,
        seed: Any,
        key_frames: Any,
        synopsis: Any,
        refresh: Any,
    ) -> None:
        """Raises for what would otherwise be found only after a plan has been paid for."""
        if not isinstance(prompt, str | Trajectory):
            raise TypeError(f"prompt must be a text or a Trajectory, got {type(prompt).__name__}")
        if isinstance(prompt, str) and self._writer is None:
            raise ValueError("a prompt needs a writer of plans: give StarVid one, or a Trajectory")
        check_integer("num_frames", num_frames, 1)
        if seed is not None:
            check_integer("seed", seed, 0, SEEDS - 1)
        check_flag(refresh, "refresh")
        for name, is_given in (("key_frames", key_frames is not None), ("refresh", refresh)):
            if is_given and isinstance(prompt, Trajectory):
                raise ValueError(f"{name} is for a prompt and a writer, got a Trajectory")
        if synopsis is not None and not isinstance(synopsis, Synopsis):
            raise TypeError(f"synopsis must be a Synopsis or None, got {type(synopsis).__name__}")
