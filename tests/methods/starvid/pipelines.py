"""Tiny pipelines under guidance, and how the tests call them."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

import vstar_kernels as vk

PROMPT = "cat eats dog naps"  # of which each letter is a token; the text encoder takes 16
LEFT, RIGHT = [(0.0, 0.1, 0.45, 0.9)] * 2, [(0.55, 0.1, 1.0, 0.9)] * 2
PLAN = vk.Trajectory(
    PROMPT,
    [vk.Subject("cat", "eats", boxes=LEFT), vk.Subject("dog", "naps", boxes=RIGHT)],
)
STEPS, FRAMES = 3, 2


def run(pipe: Any, prompt: Any = PROMPT, *, steps: int = STEPS, seeds: Any = 0, **changes: Any):
    """The latents of a short video, as the pipeline's own call makes it."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # I2VGen-XL draws the image's latents without the generator
    seeds = [seeds] if isinstance(seeds, int) else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": generators if len(generators) > 1 else generators[0],
        "output_type": "latent",
        "height": 16,
        "width": 16,
        "num_frames": FRAMES,
    }
    name = type(pipe).__name__
    if name == "LattePipeline":
        settings |= {"video_length": 16, "clean_caption": False}
        del settings["num_frames"]
    if name == "I2VGenXLPipeline":
        image = Image.new("RGB", (16, 16), (90, 120, 30))
        settings |= {"image": image, "clip_skip": None}
    return pipe(prompt=prompt, **settings | changes).frames
