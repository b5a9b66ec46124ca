"""Draws docs/frame-attention.md's figure and measures its statistics.

    python -m docs.make_frame_figures [folder]

All tokens are drawn at random, so that nothing is downloaded: they show what the operation does,
and nothing about any real model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import vstar_kernels as vk

FOLDER = Path(__file__).parent / "images"
SCENES = ((0, 10), (1, 8), (0, 6))  # which scene is seen, for how many frames: the first returns
TOKENS, TEXT, HEADS, HEAD_DIM = 100, 20, 4, 64
# How many frames of how many tokens: VSTAR's own, Wan's 81 frames and HunyuanVideo's 129.
SIZES = ((16, 1), (64, 1), (21, 1560), (33, 3600))
DEVIATION = 2.0  # of the logits
QUERIES = 64


def drawn_video() -> Tensor:
    """Returns tokens like a video's with two cuts, ``(frames, TOKENS, channels)``.

    Each is a part of its scene, which is in part the same for all of the scene's tokens, a part
    that moves on from frame to frame, and noise.
    """
    generator = torch.Generator().manual_seed(0)
    channels = HEADS * HEAD_DIM
    scenes = torch.randn(2, TOKENS, channels, generator=generator)
    scenes = 0.8 * scenes + 0.6 * torch.randn(2, 1, channels, generator=generator)
    moving = torch.randn(TOKENS, channels, generator=generator)
    frames = []
    for scene, count in SCENES:
        for _ in range(count):
            change = torch.randn(TOKENS, channels, generator=generator)
            moving = 0.9 * moving + (1 - 0.9**2) ** 0.5 * change
            noise = torch.randn(TOKENS, channels, generator=generator)
            frames.append(0.7 * scenes[scene] + 0.6 * moving + 0.4 * noise)
    return torch.stack(frames)


def frame_maps() -> dict[str, Tensor]:
    """Returns the map between the drawn video's frames without a rule and with three."""
    video = drawn_video()
    layout = vk.Layout(vk.Frames(len(video), TOKENS), vk.Text(TEXT))
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(TEXT, HEADS * HEAD_DIM, generator=generator)
    tokens = torch.cat([video.flatten(0, 1), text]).unflatten(-1, (HEADS, HEAD_DIM))[None]
    # A token is its own query and key, so that like attends to like. Its logit with itself is 6.
    query = key = tokens / tokens.std() * (6 / HEAD_DIM**0.5) ** 0.5
    rules = {
        "no rule": None,
        "TAR, σ = 1, frame_max": vk.FrameRule.tar(1.0),
        "TAR, σ = 1, row_max": vk.FrameRule.tar(1.0, stat="row_max"),
        "window(4, sink=1)": vk.FrameRule.window(4, sink=1),
    }
    return {
        name: vk.frame_attention(query, key, tokens, layout, rule, return_map=True)[1]
        for name, rule in rules.items()
    }


def own_share(frames: int, tokens: int, stat: str) -> float:
    """Returns how much a row of unstructured logits attends to its own frame under TAR, σ = 1.

    The queries are unit vectors, so that every logit is an entry of the keys: normal numbers.
    """
    generator = torch.Generator().manual_seed(0)
    keys = vk.Layout(vk.Frames(frames, tokens))
    key = DEVIATION * torch.randn(1, keys.tokens, 1, QUERIES, generator=generator)
    query = torch.eye(QUERIES)[None, :, None]
    layout = vk.Layout(vk.Frames(1, QUERIES, first=frames // 2))
    rule = vk.FrameRule.tar(1.0, stat=stat)
    _, found = vk.frame_attention(
        query, key, key, layout, rule, key_layout=keys, scale=1.0, return_map=True
    )
    return float(found[0, 0, frames // 2])


def statistics() -> str:
    """Returns the table of both statistics in Markdown."""
    lines = ["| frames × tokens | without TAR | `frame_max` | `row_max` |", "|---|--:|--:|--:|"]
    for frames, tokens in SIZES:
        shares = [own_share(frames, tokens, stat) for stat in ("frame_max", "row_max")]
        cells = [f"{share:.0%}" for share in (1 / frames, *shares)]
        lines.append(f"| {frames} × {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(folder: Path = FOLDER) -> None:
    """Draw the figure, print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = vk.analysis.plot_frame_maps(frame_maps())
    figure.savefig(folder / "frame-maps.png", dpi=100, metadata={"Software": None})
    print(statistics())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
