"""The whole method in one call: :class:`VSTAR`."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from vstar_kernels.methods.arguments import check_integer
from vstar_kernels.methods.pipelines import PipelineCall, check_pipeline
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
from vstar_kernels.models.capture import MapCapture, capture_maps
from vstar_kernels.models.config import TARConfig
from vstar_kernels.models.frame_prompts import condition_frames
from vstar_kernels.models.layers import RegularizedLayer

SEEDS = 2**32
# The paper's σ at the finest level and the official code's first 14 of 25 steps, for any model and
# any number of steps.
PAPER = TARConfig(sigma=1.0, steps=0.56)
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
    config: TARConfig | None
    seed: int
    layers: list[RegularizedLayer]
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
            ``LattePipeline``, on its device.
        config: A :class:`TARConfig` or a preset such as ``"64D1_32D8"``; by default σ = 1 at level
            0, as in the paper, in the first 56 % of the steps, the official code's 14 of 25. None
            samples without regularization: the baseline, and with a synopsis VSP alone, which are
            two of the paper's four columns (Table 2).
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
        config: TARConfig | str | None = PAPER,
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
        elif config is not None and not isinstance(config, TARConfig):
            raise TypeError(
                f"config must be a TARConfig, a preset or None, got {type(config).__name__}"
            )
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        check_rounding(rounding)
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
        **options: Any,
    ) -> Generation:
        """Makes one video.

        Args:
            prompt: The video in a sentence, of which the writer makes a synopsis if there is one;
                or a synopsis.
            num_frames: The video's number of frames.
            seed: From 0 to 2³² − 1; None draws one, which the result has.
            num_stages: How many stages the writer makes; None leaves it to the writer.
            refresh: Whether to ask the writer even for what is in its cache.
            maps: Whether to capture the mean attention maps; or at which steps, see
                :func:`capture_maps`.
            options: The pipeline's own, such as ``num_inference_steps``, ``guidance_scale``,
                ``height``, ``negative_prompt``, and for I2VGen-XL ``image``.

        Raises:
            TypeError, ValueError: An argument is of the wrong kind, unknown, or does not fit the
                others, the model or the synopsis.
            vstar_kernels.methods.vstar.writer.SynopsisError: The writer has no synopsis.
        """
        call = PipelineCall(self._pipe, options)
        self._check(prompt, num_frames, seed, num_stages)
        seed = secrets.randbelow(SEEDS) if seed is None else seed
        with self._regularize() as tar:  # first, as it finds most mistakes
            synopsis = self._synopsis(prompt, num_stages, refresh)
            stages, negative = call.encode(tuple(synopsis.stages))
            embeddings = interpolate_embeddings(
                stages, num_frames, synopsis.anchors, self._mode, self._rounding
            )
            if negative is not None:
                negative = negative.expand(num_frames, -1, -1)
            with (
                condition_frames(self._pipe, embeddings, negative=negative, guidance=call.guided),
                self._capture(maps) as capture,
            ):
                frames = call.sample(synopsis.prompt, num_frames, seed)
            layers = [] if self._config is None or tar is None else tar.layers
            return Generation(frames, synopsis, self._config, seed, layers, capture)

    def _capture(self, maps: bool | Collection[int]) -> AbstractContextManager[MapCapture | None]:
        if maps is False:
            return nullcontext()
        return capture_maps(self._pipe, steps=None if maps is True else maps)

    def _regularize(self) -> AbstractContextManager[TARHandle | None]:
        if self._config is None and not self._extend_positions:
            return nullcontext()
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

    def _check(self, prompt: Any, num_frames: Any, seed: Any, num_stages: Any) -> None:
        """Raises for what would otherwise be found only after a synopsis has been paid for."""
        if not isinstance(prompt, str | Synopsis):
            raise TypeError(f"prompt must be a text or a Synopsis, got {type(prompt).__name__}")
        check_integer("num_frames", num_frames, 1)
        if seed is not None:
            check_integer("seed", seed, 0, SEEDS - 1)
        if num_stages is not None and (isinstance(prompt, Synopsis) or self._writer is None):
            there = "a Synopsis" if isinstance(prompt, Synopsis) else "no writer"
            raise ValueError(f"num_stages is for a prompt and a writer, got {there}")
