"""VSTAR on AnimateDiff, for more frames than its motion adapter was made for."""

import common
import tiny
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

import vstar_kernels as vk

ADAPTER = "guoyww/animatediff-motion-adapter-v1-5-2"


def main() -> None:
    """Samples 48 frames; the adapter has positions for 32."""
    parser = common.parser(__doc__, model="emilianJR/epiCRealism")
    parser.add_argument("--adapter", default=ADAPTER, help="with --model: the motion adapter")
    parser.add_argument("--prompt", default="A flower opens in the morning and closes at night.")
    parser.set_defaults(frames=48)
    options = parser.parse_args()
    more = {}
    if options.model:
        more["motion_adapter"] = MotionAdapter.from_pretrained(options.adapter)
    pipe = common.load(AnimateDiffPipeline, options, tiny.animatediff, **more)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, beta_schedule="linear", clip_sample=False, steps_offset=1
    )
    pipe.vae.enable_slicing()

    config = vk.TARConfig(sigma={0: 1.0, 1: 8.0}, steps=0.56)
    with vk.apply_tar(pipe, config, extend_positions=True) as handle:
        print(handle.describe())
        video = pipe(options.prompt, num_frames=options.frames, **common.settings(options))
    common.save(video.frames[0], options.output, "tar")


if __name__ == "__main__":
    main()
