"""What the demo denoises: diffusers' text-to-video UNet with random or with real weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.cli.demo.options import DemoOptions
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
        """The frames of ``(1, channels, frames, height, width)`` latents, as PIL images."""
        video = self.pipeline.decode_latents(latents)
        return self.pipeline.video_processor.postprocess_video(video, output_type="pil")[0]


def load(options: DemoOptions) -> VideoModel:
    """The model that the options ask for, on their device.

    Raises:
        CommandError: It cannot be loaded.
    """
    torch.manual_seed(options.seed)
    return _random(options) if options.model is None else _pretrained(options, options.model)


def _random(options: DemoOptions) -> VideoModel:
    """ModelScope's UNet, which has VideoCrafter2's arrangement, with untrained weights."""
    from diffusers import DDIMScheduler, UNet3DConditionModel

    width = options.width
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
        unet.eval().to(options.device),
        scheduler,
        embeds.to(options.device),
        _noise(unet, options, options.size or SIZE, PIXELS_PER_LATENT),
    )


def _pretrained(options: DemoOptions, model: str) -> VideoModel:
    from diffusers import TextToVideoSDPipeline

    try:
        pipeline = TextToVideoSDPipeline.from_pretrained(model)
    # diffusers raises whatever its parts raise: of the network, of a file, of a wrong class.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CommandError(f"--model: cannot load {model}: {reason}") from error
    pipeline.to(options.device)
    conditional, unconditional = pipeline.encode_prompt(
        options.prompt,
        options.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
    )
    unet = pipeline.unet
    size = options.size or _own_size(unet, pipeline.vae_scale_factor)
    return VideoModel(
        f"{model}, {_channels(unet)} channels",
        unet,
        pipeline.scheduler,
        torch.cat([unconditional, conditional]),
        _noise(unet, options, size, pipeline.vae_scale_factor),
        pipeline,
    )


def _own_size(unet: Any, pixels_per_latent: int) -> tuple[int, int]:
    size = unet.config.sample_size
    if size is None:
        return SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return height * pixels_per_latent, width * pixels_per_latent


def _noise(
    unet: Any, options: DemoOptions, size: tuple[int, int], pixels_per_latent: int
) -> Tensor:
    """The initial latents: drawn on the CPU, so that every device starts from the same."""
    height, width = (pixels // pixels_per_latent for pixels in size)
    generator = torch.Generator().manual_seed(options.seed)
    shape = (1, unet.config.in_channels, options.frames, height, width)
    return torch.randn(shape, generator=generator).to(options.device)


def _channels(unet: Any) -> str:
    return "/".join(map(str, unet.config.block_out_channels))
