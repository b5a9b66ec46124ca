"""Which frames a full-3D transformer attends to, at its trained length and for longer clips.

It captures the maps between frames of every layer at both lengths, draws the profile over the
distance of frames, each layer's share of its own and the next frames, and its entropy over frames,
and proposes the layers whose attention spreads the most. ``FrameRule.match`` then gives the long
clip the profile of the trained length, and the maps under it are drawn beside the others.

Nobody has shown yet that less spread makes a better video. See docs/full-3d.md.
"""

import common
import tiny_transformers
import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from torch import Tensor

import vstar_kernels as vk

PROMPT = "A landscape turns from spring to winter, time lapse."
TINY_FRAMES = 17  # of a tiny pipeline, where real ones default to their own trained length
HALF_WIDTH = 1  # frames beside the own one


def capture(pipe, options, num_frames: int, rule: vk.FrameRule) -> dict[str, Tensor]:
    """Returns each layer's map at the middle step, ``(frames, frames + 1)``, text last."""
    settings = common.settings(options) | {"output_type": "latent"}
    with (
        vk.apply_frames(pipe, rule),
        vk.capture_maps(pipe, steps=[options.steps // 2]) as captured,
    ):
        pipe(options.prompt, num_frames=num_frames, **settings)
    maps: dict[str, list[Tensor]] = {}
    for item in captured.maps:  # both sides of guidance, in one batch or one after the other
        name = f"{item.model} {item.layer}".strip()
        maps.setdefault(name, []).append(item.with_text.mean(dim=0))
    return {name: torch.stack(found).mean(dim=0) for name, found in maps.items()}


def near_share(frame_map: Tensor) -> float:
    """Returns the share of the attention to the video that stays within the next frames."""
    weights = vk.analysis.without_text(frame_map)
    return float(vk.analysis.band_share(weights, HALF_WIDTH))


def mean(maps: dict[str, Tensor]) -> Tensor:
    """Returns the mean map of all layers."""
    return torch.stack(list(maps.values())).mean(dim=0)


def draw(found: dict[str, dict[str, Tensor]]) -> Figure:
    """Draws the profiles of the mean maps, and two figures of each layer, by the clip's title."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    profiles, shares, entropies = figure.subplots(1, 3)
    for title, maps in found.items():
        profiles.plot(vk.analysis.frame_profile(mean(maps)).numpy(), marker=".", label=title)
        shares.plot([near_share(x) for x in maps.values()], marker=".", label=title)
        entropies.plot(
            [float(vk.analysis.frame_entropy(x)) for x in maps.values()], marker=".", label=title
        )
    profiles.set(title="profile", xlabel="distance in latent frames", ylabel="mean attention")
    profiles.set_yscale("log")
    shares.set(title=f"share within {HALF_WIDTH} frame", xlabel="layer")
    entropies.set(title="entropy over frames (1: uniform)", xlabel="layer")
    profiles.legend()
    return figure


def propose(native: dict[str, Tensor], long: dict[str, Tensor]) -> list[int]:
    """Returns the layers whose entropy over frames grows by more than the mean of all layers."""
    growth = torch.stack(
        [vk.analysis.frame_entropy(long[x]) - vk.analysis.frame_entropy(native[x]) for x in native]
    )
    return [index for index, value in enumerate(growth.tolist()) if value > growth.mean()]


def main() -> None:
    """Captures, draws, proposes."""
    parser = common.parser(__doc__, model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--factor", type=common.count, default=2, help="how many times as long")
    parser.set_defaults(frames=None)
    options = parser.parse_args()
    pipe = common.load(DiffusionPipeline, options, tiny_transformers.wan)
    frames = options.frames or (81 if options.model else TINY_FRAMES)
    longer = (frames - 1) * options.factor + 1

    native = capture(pipe, options, frames, vk.FrameRule())
    long = capture(pipe, options, longer, vk.FrameRule())
    rule = vk.FrameRule.match(mean(native), mean(long))
    matched = capture(pipe, options, longer, rule)
    titles = f"{frames} frames", f"{longer} frames", f"{longer} frames, matched"
    found = dict(zip(titles, (native, long, matched), strict=True))

    options.output.mkdir(parents=True, exist_ok=True)
    draw(found).savefig(options.output / "profiles.png", dpi=120)
    for name, maps in (("native", native), ("long", long), ("matched", matched)):
        shown = {layer: maps[layer] for layer in list(maps)[:4]}
        vk.analysis.plot_frame_maps(shown).savefig(options.output / f"maps_{name}.png", dpi=100)
    (options.output / "rule.json").write_text(rule.to_json(), encoding="utf-8")
    for title, maps in found.items():
        near, entropy = (
            sum(map(f, maps.values())) / len(maps)
            for f in (near_share, lambda x: float(vk.analysis.frame_entropy(x)))
        )
        print(f"{title}: {near:.1%} within {HALF_WIDTH} frame, entropy {entropy:.3f}")
    layers = propose(native, long)
    print(f"layers that spread more than the others: {layers}")
    if layers:
        print(f"to try: vk.apply_tar(pipe, vk.FrameTAR(layers={layers}))")
        print(
            f"or: vk.apply_frames(pipe, vk.FrameRule.from_json(…), layers={layers}), of rule.json"
        )
    print(f"pictures and the rule: {options.output}")


if __name__ == "__main__":
    main()
