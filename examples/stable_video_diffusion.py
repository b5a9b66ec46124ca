"""VSTAR on Stable Video Diffusion, which animates an image."""

from pathlib import Path

import common
import tiny
from diffusers import StableVideoDiffusionPipeline

import vstar_kernels as vk


def main() -> None:
    """Animates an image with and without regularization."""
    parser = common.parser(__doc__, model="stabilityai/stable-video-diffusion-img2vid-xt")
    parser.add_argument("--image", type=Path, help="the image (default: a gradient)")
    options = parser.parse_args()
    pipe = common.load(StableVideoDiffusionPipeline, options, tiny.stable_video_diffusion)
    image = common.first_frame(options.image)
    config = vk.TARConfig(sigma={0: 1.0}, steps=0.56)

    def sample() -> list:
        settings = {**common.settings(options), "num_frames": options.frames}
        return pipe(image, decode_chunk_size=8, **settings).frames[0]

    common.save(sample(), options.output, "stock")
    with vk.apply_tar(pipe, config) as handle:
        print(handle.describe())
        common.save(sample(), options.output, "tar")


if __name__ == "__main__":
    main()
