"""What the demo denoises: diffusers' text-to-video UNet with random or with real weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.cli.options import CommandError

SIZE = (320, 512)  # VideoCrafter2's, in pixels
PIXELS_PER_LATENT = 8
TEXT_TOKENS = 77


@dataclass
class VideoModel:
    """A ``UNet3DConditionModel`` with all that denoising one video takes.

    ``prompt_embeds`` is ``(2, tokens, channels)``, unconditional and conditional; ``latents`` is
    ``(1, channels, frames, height, width)``, standard normal. ``pipeline``, the
    ``TextToVideoSDPipeline``, is None where the weights are random: there is nothing to decode.
    """

    description: str
    unet: Any
    scheduler: Any
    prompt_embeds: Tensor
    latents: Tensor
    pipeline: Any = None

    def decode(self, latents: Tensor) -> list[Any]:
        """Returns the frames of ``(1, channels, frames, height, width)`` latents, as PIL images."""
        video = self.pipeline.decode_latents(latents)
        return self.pipeline.video_processor.postprocess_video(video, output_type="pil")[0]


def random_model(
    width: int, *, frames: int, size: tuple[int, int] | None, seed: int, device: str
) -> VideoModel:
    """Returns ModelScope's UNet, which has VideoCrafter2's arrangement, with untrained weights.

    Args:
        width: Channels of its first level.
        frames, size, seed: Of the noise, which is to become a video of ``size`` pixels.
        device: Where the model and the noise are put.
    """
    from diffusers import DDIMScheduler, UNet3DConditionModel

    torch.manual_seed(seed)
    unet: Any = UNet3DConditionModel(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        attention_head_dim=64 if width % 64 == 0 else 32,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    embeds = torch.randn(2, TEXT_TOKENS, unet.config.cross_attention_dim)
    return VideoModel(
        f"UNet3DConditionModel, random weights, {_channels(unet)} channels",
        unet.eval().to(device),
        scheduler,
        embeds.to(device),
        _noise(unet, frames, size or SIZE, PIXELS_PER_LATENT, seed).to(device),
    )


def pretrained_model(
    name: str, prompt: str, *, frames: int, size: tuple[int, int] | None, seed: int, device: str
) -> VideoModel:
    """Returns a text-to-video pipeline's model, from a folder or the hub.

    Args:
        name, prompt: The pipeline, and what it is to draw.
        frames, size, seed, device: As for :func:`random_model`; ``size`` None is the model's own.

    Raises:
        CommandError: It cannot be loaded.
    """
    from diffusers import TextToVideoSDPipeline, UNet3DConditionModel

    try:
        pipeline = TextToVideoSDPipeline.from_pretrained(name)
    # diffusers raises whatever its parts raise: of the network, of a file, of a wrong class.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CommandError(f"--model: cannot load {name}: {reason}") from error
    if not isinstance(pipeline.unet, UNet3DConditionModel):  # diffusers takes any
        raise CommandError(
            f"--model: {name} has a {type(pipeline.unet).__name__}, a TextToVideoSDPipeline a "
            "UNet3DConditionModel"
        )
    pipeline.to(device)
    conditional, unconditional = pipeline.encode_prompt(
        prompt, device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    unet, pixels_per_latent = pipeline.unet, pipeline.vae_scale_factor
    size = size or _native_size(unet, pixels_per_latent)
    return VideoModel(
        f"{name}, {_channels(unet)} channels",
        unet,
        pipeline.scheduler,
        torch.cat([unconditional, conditional]),
        _noise(unet, frames, size, pixels_per_latent, seed).to(device),
        pipeline,
    )


def _native_size(unet: Any, pixels_per_latent: int) -> tuple[int, int]:
    """Returns the height and width in pixels that a UNet was made for."""
    size = unet.config.sample_size
    if size is None:
        return SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return height * pixels_per_latent, width * pixels_per_latent


def _noise(
    unet: Any, frames: int, size: tuple[int, int], pixels_per_latent: int, seed: int
) -> Tensor:
    """Returns the initial latents, on the CPU, so that every device starts from the same."""
    height, width = (pixels // pixels_per_latent for pixels in size)
    shape = (1, unet.config.in_channels, frames, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _channels(unet: Any) -> str:
    return "/".join(map(str, unet.config.block_out_channels))
