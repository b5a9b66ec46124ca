"""VSTAR on VideoCrafter2 with its official code and checkpoint, which VSTAR itself is built on.

Both come from https://github.com/AILab-CVC/VideoCrafter, with what that needs to be installed; its
sampler asks for a GPU.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
from PIL import Image

import vstar_kernels as vk

LATENT_SIZE = (40, 64)  # 320 × 512 pixels
GUIDANCE_SCALE = 12.0


def load(repository: Path, config: Path, checkpoint: Path | None) -> Any:
    """Returns the official model, with random weights where there is no checkpoint."""
    sys.path.insert(0, str(repository))
    from omegaconf import OmegaConf
    from utils.utils import instantiate_from_config

    model = instantiate_from_config(OmegaConf.load(config).model)
    if checkpoint is not None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("state_dict", state))
    return model.eval()


def sample(model: Any, prompt: str, frames: int, steps: int) -> torch.Tensor:
    """Samples a regularized video, ``(1, 3, frames, height, width)`` from −1 to 1."""
    from lvdm.models.samplers.ddim import DDIMSampler

    sampler = DDIMSampler(model)
    sampler.make_schedule(steps, ddim_eta=1.0, verbose=False)
    schedule = SimpleNamespace(timesteps=sampler.ddim_timesteps[::-1].copy())
    fps = torch.tensor([8], device=model.device)
    texts = {
        text: {"c_crossattn": [model.get_learned_conditioning([text])], "fps": fps}
        for text in (prompt, "")
    }
    # The UNet is told a timestep; the schedule says which step that is.
    with vk.apply_tar(model.model.diffusion_model, "64D1_32D8", scheduler=schedule) as handle:
        latents, _ = sampler.sample(
            S=steps,
            batch_size=1,
            shape=(model.channels, frames, *LATENT_SIZE),
            conditioning=texts[prompt],
            unconditional_conditioning=texts[""],
            unconditional_guidance_scale=GUIDANCE_SCALE,
            eta=1.0,
            temporal_length=frames,
            verbose=False,
        )
        print(handle.describe())
    return model.decode_first_stage_2DAE(latents)


@torch.no_grad()
def main() -> None:
    """Loads, samples and writes."""
    parser = common.parser(__doc__, model=None)
    parser.add_argument("--repository", type=Path, required=True, help="the official code")
    parser.add_argument("--config", type=Path, help="(default: its inference_t2v_512_v2.0.yaml)")
    parser.add_argument("--checkpoint", type=Path, help="model.ckpt (default: random weights)")
    parser.add_argument("--prompt", default="A landscape turns from spring to winter, time lapse.")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    config = options.config or options.repository / "configs" / "inference_t2v_512_v2.0.yaml"
    model = load(options.repository, config, options.checkpoint).to(options.device)
    video = sample(model, options.prompt, options.frames, options.steps)
    pixels = (127.5 * (video[0].float().clamp(-1, 1) + 1)).byte().permute(1, 2, 3, 0)
    common.save([Image.fromarray(frame.numpy()) for frame in pixels.cpu()], options.output, "tar")


if __name__ == "__main__":
    main()
