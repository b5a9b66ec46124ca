"""Two subjects, each in its boxes: StarVid by a plan of one's own, and what guidance did."""

import common
import tiny
from diffusers import TextToVideoSDPipeline

import vstar_kernels as vk

PROMPT = "cat eats dog naps"  # the tiny text encoder takes 16 tokens, and a token is a letter
WALK = [(0.0, 0.3, 0.35, 0.9), (0.2, 0.3, 0.55, 0.9)]  # boxes at the first and the last frame
NAP = [(0.6, 0.4, 1.0, 0.9)] * 2


def load(options) -> TextToVideoSDPipeline:
    """Returns the pipeline; the tiny one's random cross-attention is made to have words' maps."""
    pipe = common.load(TextToVideoSDPipeline, options, tiny.text_to_video)
    if options.model is None:
        tiny.plant_words(pipe, PROMPT)
    return pipe


def main() -> None:
    """Makes the video by the plan, and pictures of the plan, the maps and the losses."""
    parser = common.parser(__doc__, model="cerspense/zeroscope_v2_576w")
    options = parser.parse_args()
    pipe = load(options)
    plan = vk.Trajectory(
        PROMPT, [vk.Subject("cat", "eats", boxes=WALK), vk.Subject("dog", "naps", boxes=NAP)]
    )
    config = vk.GuidanceConfig()
    if options.model is None:  # features at the finest level only, and larger steps than real ones
        config = vk.GuidanceConfig((0.0, 0.5), (0.5, 1.0), 2, 3000.0, levels=(0,), size=0)
    settings = common.settings(options)
    del settings["generator"]
    video = vk.StarVid(pipe, config)(plan, num_frames=options.frames, seed=options.seed, **settings)
    common.save(video.frames, options.output, "starvid")
    boxes, present = plan.boxes(options.frames)
    pictures = {
        "plan": vk.analysis.plot_plan(boxes, present, ["cat", "dog"], video.frames),
        "losses": vk.analysis.plot_guidance(video.updates),
        "maps": vk.analysis.plot_word_maps(video.guided_maps[0], video.words.texts),
    }
    for name, figure in pictures.items():
        figure.savefig(options.output / f"starvid_{name}.png")
    first, last = video.updates[0], video.updates[-1]
    print(f"nouns' attention in their boxes: {first.mass:.0%}, then {last.mass:.0%}")


if __name__ == "__main__":
    main()
