"""VSTAR on ModelScope's and Zeroscope's text-to-video UNet, with and without regularization."""

import common
import tiny
from diffusers import TextToVideoSDPipeline

import vstar_kernels as vk


def main() -> None:
    """Samples the same noise twice."""
    parser = common.parser(__doc__, model="cerspense/zeroscope_v2_576w")
    parser.add_argument("--prompt", default="A landscape turns from spring to winter, time lapse.")
    options = parser.parse_args()
    pipe = common.load(TextToVideoSDPipeline, options, tiny.text_to_video)

    # By level, 0 the finest. Models of the paper's widths also take a preset, such as "64D1_32D8".
    config = vk.TARConfig(sigma={0: 1.0, 1: 8.0}, steps=0.56)

    def sample() -> list:
        return pipe(options.prompt, num_frames=options.frames, **common.settings(options)).frames[0]

    common.save(sample(), options.output, "stock")
    with vk.apply_tar(pipe, config) as handle:
        print(handle.describe())
        common.save(sample(), options.output, "tar")


if __name__ == "__main__":
    main()
