"""A text for each frame, as video synopsis prompting conditions on, and the attention maps."""

import common
import tiny
from diffusers import TextToVideoSDPipeline
from PIL import Image
from torch import Tensor

import vstar_kernels as vk

STAGES = (
    "A landscape in spring, trees in blossom.",
    "A landscape in summer, green meadows.",
    "A landscape in winter, deep snow.",
)


def picture(attention_map: Tensor) -> Image.Image:
    """Draws a map, ``(frames, frames)``, from its smallest to its largest weight, in grey."""
    low, high = attention_map.aminmax()
    grey = (255 * (attention_map - low) / (high - low)).byte()
    return Image.fromarray(grey.numpy()).resize((256, 256), Image.Resampling.NEAREST)


def main() -> None:
    """Regularizes, conditions every frame, and looks at the maps, all at once."""
    parser = common.parser(__doc__, model="cerspense/zeroscope_v2_576w")
    options = parser.parse_args()
    pipe = common.load(TextToVideoSDPipeline, options, tiny.text_to_video)
    stages, _ = pipe.encode_prompt(list(STAGES), options.device, 1, False)
    embeddings = vk.interpolate_embeddings(stages, options.frames)
    with (
        vk.apply_tar(pipe, vk.TARConfig(sigma={0: 1.0, 1: 8.0}, steps=0.56)),
        vk.condition_frames(pipe, embeddings, guidance=True),
        vk.capture_maps(pipe, steps=[0, options.steps - 1]) as capture,
    ):
        video = pipe("", num_frames=options.frames, **common.settings(options)).frames[0]
    common.save(video, options.output, "frame_prompts")
    for step in (0, options.steps - 1):
        conditional = capture.mean(level=0, step=step)[1]  # the batch: without and with the text
        picture(conditional).save(options.output / f"map_step_{step}.png")


if __name__ == "__main__":
    main()
