"""VSTAR on I2VGen-XL, which animates an image by a prompt."""

from pathlib import Path

import common
import tiny
from diffusers import I2VGenXLPipeline

import vstar_kernels as vk


def mend(pipe: I2VGenXLPipeline) -> None:
    """Adds ``text_encoder.text_model``, which the pipeline reads and transformers 5 has not."""
    if not hasattr(pipe.text_encoder, "text_model"):
        # Not by assignment, which would make the module a part of itself.
        object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)


def main() -> None:
    """Animates an image with and without regularization."""
    parser = common.parser(__doc__, model="ali-vilab/i2vgen-xl")
    parser.add_argument("--prompt", default="The sun sets over the sea.")
    parser.add_argument("--image", type=Path, help="the image (default: a gradient)")
    options = parser.parse_args()
    pipe = common.load(I2VGenXLPipeline, options, tiny.i2vgen_xl)
    mend(pipe)
    image = common.first_frame(options.image)
    config = vk.TARConfig(sigma={0: 1.0, 1: 8.0}, steps=0.56)

    def sample() -> list:
        settings = {**common.settings(options), "num_frames": options.frames}
        return pipe(options.prompt, image, **settings).frames[0]

    common.save(sample(), options.output, "stock")
    with vk.apply_tar(pipe, config) as handle:
        print(handle.describe())
        common.save(sample(), options.output, "tar")


if __name__ == "__main__":
    main()
