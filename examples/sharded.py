"""One video by several processes, each of which computes a part of its frames.

torchrun --nproc-per-node 2 examples/sharded.py --check
"""

import os

import common
import numpy as np
import tiny
import torch
import torch.distributed as dist
from diffusers import AnimateDiffPipeline, MotionAdapter
from PIL import Image

import vstar_kernels as vk

ADAPTER = "guoyww/animatediff-motion-adapter-v1-5-2"


def join() -> str:
    """Joins the processes that torchrun has started; returns the device of this one."""
    if "RANK" not in os.environ:  # nobody has: it is alone
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return "cpu"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
        return str(device)
    dist.init_process_group("gloo")
    return "cpu"


def main() -> None:
    """Samples a video under TAR whose frames are spread over the processes."""
    parser = common.parser(__doc__, model="emilianJR/epiCRealism")
    parser.add_argument("--adapter", default=ADAPTER, help="with --model: the motion adapter")
    parser.add_argument("--prompt", default="A flower opens in the morning and closes at night.")
    parser.add_argument("--check", action="store_true", help="sample it by one process, too")
    options = parser.parse_args()
    options.device = join()
    more = {}
    if options.model:
        more["motion_adapter"] = MotionAdapter.from_pretrained(options.adapter)
    pipe = common.load(AnimateDiffPipeline, options, tiny.animatediff, **more)
    pipe.set_progress_bar_config(disable=dist.get_rank() > 0)

    def sample() -> np.ndarray:
        settings = common.settings(options) | {"output_type": "np"}  # with the seed of --seed
        return pipe(options.prompt, num_frames=options.frames, **settings).frames[0]

    mesh = dist.init_device_mesh(options.device.partition(":")[0], (dist.get_world_size(),))
    config = vk.TARConfig(sigma={0: 1.0, 1: 8.0}, steps=0.56)
    with vk.apply_tar(pipe, config):
        # On every process: they have the same seed, and each returns the whole video.
        with vk.shard_frames(pipe, mesh) as handle:
            video = sample()
        sent = ", ".join(f"{count / 1e6:.1f} MB for {what}" for what, count in handle.sent.items())
        print(f"process {dist.get_rank()} of {dist.get_world_size()} has sent {sent}")
        if options.check:
            error = np.abs(sample() - video).max()
            print(f"process {dist.get_rank()}: off by {error:.1e} of 1 from one process's video")
            if error > 1e-5:
                raise SystemExit("the videos differ")
    if dist.get_rank() == 0:
        frames = [Image.fromarray((255 * frame).round().astype("uint8")) for frame in video]
        common.save(frames, options.output, "sharded")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
