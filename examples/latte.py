"""VSTAR on Latte, a transformer of one resolution, for more frames than it has positions for."""

import common
import tiny
from diffusers import LattePipeline

import vstar_kernels as vk


def main() -> None:
    """Samples 32 frames; Latte has positions for 16."""
    parser = common.parser(__doc__, model="maxin-cn/Latte-1")
    parser.add_argument("--prompt", default="A city from noon to midnight, time lapse.")
    parser.set_defaults(frames=32)
    options = parser.parse_args()
    pipe = common.load(LattePipeline, options, tiny.latte)
    config = vk.TARConfig(sigma=1.0, steps=0.56)  # its one resolution is level 0
    with vk.apply_tar(pipe, config, extend_positions=True) as handle:
        print(handle.describe())
        video = pipe(
            options.prompt,
            negative_prompt="",
            video_length=options.frames,
            clean_caption=False,
            **common.settings(options),
        )
    common.save(video.frames[0], options.output, "tar")


if __name__ == "__main__":
    main()
