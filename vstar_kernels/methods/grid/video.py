"""A video from an image pipeline in one call: :class:`GridVideo` (ETC)."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vstar_kernels.analysis.grids import from_grid, grid_shape
from vstar_kernels.methods.arguments import check_integer, check_text
from vstar_kernels.methods.pipelines import check_sampling
from vstar_kernels.methods.vstar.synopsis import Synopsis
from vstar_kernels.methods.vstar.vstar import SEEDS, Generation
from vstar_kernels.models.capture import capture_maps
from vstar_kernels.models.config import TARConfig, checked_tar
from vstar_kernels.models.grid.apply import apply_grid
from vstar_kernels.models.grid.embedding import GridEmbedding
from vstar_kernels.models.map_capture import MapCapture
from vstar_kernels.models.progress import OnStep, steps_told

XL = "StableDiffusionXLPipeline"
PIPELINES = ("StableDiffusionPipeline", XL)
Decode = Literal["frames", "grid"]
SIDE = 256  # pixels of a frame, the paper's
# The paper's sampling.
DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 7.0}
# Arguments of pipelines that are given otherwise here, and how.
OURS = {
    "prompt": "give the prompt as the first argument",
    "generator": "give seed",
    "latents": "give seed",
    "return_dict": "the result is a Generation",
    "num_images_per_prompt": "call again with another seed",
}


class GridVideo:
    """Videos from a pipeline for images, each sampled as one grid of frames (ETC).

    >>> video = vk.GridVideo(pipe, embedding=embedding)("a kite rises over a beach", frames=16)
    >>> video.frames[0].save("first.png")

    The pipeline is as it was after each call. A pretrained image model draws a grid of related
    pictures; it is training with ``embedding`` (:func:`vstar_kernels.grid_loss`) that makes a
    moving video of them.

    Args:
        pipe: diffusers' ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``, on its
            device.
        config: Temporal attention regularization between frames, or a preset; None has none.
        embedding, rows, backend: As for :func:`vstar_kernels.apply_grid`. An embedding is moved to
            the pipeline's device.
        decode: ``"frames"`` decodes the latents frame by frame, ``"grid"`` the grid's image at
            once, in which the decoder's convolutions see over the edges of frames.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind.
    """

    def __init__(
        self,
        pipe: Any,
        config: TARConfig | str | None = None,
        *,
        embedding: bool | GridEmbedding = True,
        rows: int | None = None,
        decode: Decode = "frames",
        backend: str | None = None,
    ) -> None:
        if _class_names(pipe).isdisjoint(PIPELINES):
            raise TypeError(
                f"pipe must be one of diffusers' {', '.join(PIPELINES)}, "
                f"got {type(pipe).__name__}; with others, use apply_grid, to_grid and from_grid"
            )
        config = None if config is None else checked_tar("config", config)
        if not isinstance(embedding, bool | GridEmbedding):
            raise TypeError(
                f"embedding must be True, False or a GridEmbedding, got {type(embedding).__name__}"
            )
        if decode not in get_args(Decode):
            raise ValueError(f"decode must be 'frames' or 'grid', got {decode!r}")
        self._pipe = pipe
        self._config = config
        self._embedding = embedding
        self._rows = rows
        self._decode: Decode = decode
        self._backend = backend

    def __call__(
        self,
        prompt: str | Synopsis,
        *,
        frames: int = 16,
        fps: float = 30,
        height: int = SIDE,
        width: int = SIDE,
        seed: int | None = None,
        maps: bool | Collection[int] = False,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Generation:
        """Makes one video.

        Args:
            prompt: The text of the grid's image. It is one for all frames: a
                :class:`Synopsis` of several stages, which VSTAR gives to frames, is refused.
            frames: The video's number of frames.
            fps: Its speed, for an embedding with an :class:`FPSEmbedding`; else it changes nothing.
            height, width: Of a frame, in pixels.
            seed: From 0 to 2³² − 1; None draws one, which the result has.
            maps: Whether to capture the maps between frames; or at which steps, see
                :func:`vstar_kernels.capture_maps`.
            on_step: As for :class:`vstar_kernels.VSTAR`.
            options: The pipeline's own; 50 steps at guidance 7 by default, as in the paper.

        Raises:
            TypeError, ValueError: An argument is of the wrong kind, unknown, or does not fit the
                others or the model.
        """
        text = self._check(prompt, frames, height, width, seed, options)
        options = {**DEFAULTS, **options}
        check_sampling(self._pipe, options, maps)
        rows, cols = grid_shape(frames, rows=self._rows)
        seed = secrets.randbelow(SEEDS) if seed is None else seed
        output_type = options.pop("output_type", "pil")
        pipe, embedding = self._pipe, self._embedding
        has_speed = isinstance(embedding, GridEmbedding) and embedding.fps is not None
        if isinstance(embedding, GridEmbedding):
            embedding.to(pipe.unet.device)
        with (
            steps_told(pipe, on_step),
            apply_grid(
                pipe,
                frames,
                rows=rows,
                config=self._config,
                embedding=embedding,
                fps=fps if has_speed else None,
                backend=self._backend,
            ) as grid,
            self._capture(maps) as capture,
        ):
            image = pipe(
                prompt=text,
                height=rows * height,
                width=cols * width,
                generator=torch.Generator().manual_seed(seed),  # the same on every device
                output_type="latent",
                **options,
            ).images
            layers = grid.layers
        video = self._finish(image, rows, cols, output_type)
        return Generation(video, Synopsis(text, [text]), self._config, seed, layers, capture)

    def _capture(self, maps: bool | Collection[int]) -> AbstractContextManager[MapCapture | None]:
        if maps is False:
            return nullcontext()
        return capture_maps(self._pipe, steps=None if maps is True else maps)

    @torch.no_grad()
    def _finish(self, latents: Tensor, rows: int, cols: int, output_type: str) -> Any:
        """Returns the frames of a grid of latents, ``(1, channels, height, width)``."""
        if output_type == "latent":
            return from_grid(latents, rows, cols)[0]
        pipe = self._pipe
        if self._decode == "grid":
            pixels = from_grid(decode_latents(pipe, latents), rows, cols)[0]
        else:
            pixels = decode_latents(pipe, from_grid(latents, rows, cols)[0], apart=True)
        unsafe = None
        if getattr(pipe, "safety_checker", None) is not None:
            pixels, unsafe = pipe.run_safety_checker(pixels, pixels.device, latents.dtype)
        pipe.maybe_free_model_hooks()
        denormalize = [True] * len(pixels) if unsafe is None else [not x for x in unsafe]
        processor = pipe.image_processor
        return processor.postprocess(pixels, output_type=output_type, do_denormalize=denormalize)

    def _check(
        self,
        prompt: Any,
        frames: Any,
        height: Any,
        width: Any,
        seed: Any,
        options: Mapping[str, Any],
    ) -> str:
        """Returns the prompt's text; raises for what would otherwise be found late."""
        if isinstance(prompt, Synopsis):
            if len(prompt.stages) > 1:
                raise ValueError(
                    "a grid of frames is one image with one text: a Synopsis, got one of "
                    f"{len(prompt.stages)} stages, is for VSTAR; TAR (config) works here"
                )
            prompt = prompt.stages[0]
        check_text("prompt", prompt)
        check_integer("frames", frames, 1)
        if seed is not None:
            check_integer("seed", seed, 0, SEEDS - 1)
        halvings = len(self._pipe.unet.down_blocks) - 1
        least = self._pipe.vae_scale_factor * 2**halvings
        for name, value in (("height", height), ("width", width)):
            check_integer(name, value, 1)
            if value % least:
                raise ValueError(
                    f"{name} of a frame must be a multiple of {least}, so that frames stay apart "
                    f"at all levels of the UNet, got {value}"
                )
        parameters = inspect.signature(type(self._pipe).__call__).parameters
        for name in options:
            if name in OURS:
                raise ValueError(f"{name} is set here: {OURS[name]}")
            if name not in parameters:
                raise TypeError(f"{type(self._pipe).__name__} takes no argument {name!r}")
        return str(prompt)


def decode_latents(pipe: Any, latents: Tensor, *, apart: bool = False) -> Tensor:
    """Returns the pixels of latents, −1 to 1, as diffusers' image pipelines decode them.

    Args:
        pipe: Has the ``vae``.
        latents: ``(batch, channels, h, w)``.
        apart: Decode one after the other, in the memory of one.
    """
    with _upcast(pipe) as vae:
        return torch.cat([_decode(vae, x) for x in latents.split(1 if apart else len(latents))])


@contextmanager
def _upcast(pipe: Any) -> Iterator[Any]:
    """Gives a pipeline's VAE, in float32 meanwhile where the pipeline would have it so.

    That is Stable Diffusion XL's; Stable Diffusion's decodes in float16, whatever its config says.
    """
    vae = pipe.vae
    if XL not in _class_names(pipe) or vae.dtype != torch.float16 or not vae.config.force_upcast:
        yield vae
        return
    try:
        yield vae.to(torch.float32)
    finally:
        vae.to(torch.float16)


def _decode(vae: Any, latents: Tensor) -> Tensor:
    latents = latents.to(torch.promote_types(latents.dtype, vae.dtype))
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    latents = latents / vae.config.scaling_factor
    if mean is not None and std is not None:
        shape = (1, latents.shape[1], 1, 1)
        mean, std = (torch.tensor(x).view(shape).to(latents) for x in (mean, std))
        latents = latents * std + mean
    pixels: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return pixels


def _class_names(pipe: Any) -> set[str]:
    return {cls.__name__ for cls in type(pipe).__mro__}
