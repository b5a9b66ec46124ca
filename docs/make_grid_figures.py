"""Draws docs/etc.md's figures.

    python -m docs.make_grid_figures [folder]

Everything is drawn: a grid's order, its mixed embedding, and what TAR does to the map between
frames of random tokens. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import vstar_kernels as vk
from vstar_kernels.analysis import grid_layout, mixed_embedding, token_frames

FOLDER = Path(__file__).parent / "images"
ROWS, COLS, SIDE, HEADS, HEAD_DIM = 4, 4, 8, 4, 32
INK = "#7d7d7d"


def embedding_figure() -> plt.Figure:
    """Draws which frame each token belongs to, and the embedding's four channels."""
    panels = {"frame (eq. 1)": token_frames(ROWS, COLS, SIDE, SIDE).view(ROWS * SIDE, -1)}
    mixed = mixed_embedding(ROWS, COLS, SIDE, SIDE, 4)
    for c in range(4):
        panels[f"channel {c}: {'place' if c < 2 else 'frame'}"] = mixed[c]
    colours = {"axes.titlecolor": INK, "axes.edgecolor": INK, "font.size": 9.0}
    with plt.rc_context(colours):
        figure, axes = plt.subplots(1, 5, figsize=(9.5, 2.1), layout="constrained")
        figure.patch.set_alpha(0)
        for panel, (name, values) in zip(axes, panels.items(), strict=True):
            panel.imshow(values, cmap="viridis", interpolation="nearest")
            panel.set_title(name)
            panel.set_xticks([])
            panel.set_yticks([])
        for j in range(COLS):
            for i in range(ROWS):
                x, y = (j + 0.5) * SIDE - 0.5, (i + 0.5) * SIDE - 0.5
                axes[0].text(x, y, str(i + j * ROWS), ha="center", va="center", color="white")
    return figure


def maps_figure() -> plt.Figure:
    """Draws the map between frames of random tokens in a grid, without a rule and under TAR."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, ROWS * COLS * SIDE**2, HEADS, HEAD_DIM)
    query, key, value = torch.randn(shape, generator=generator).unbind()
    layout = grid_layout(ROWS, COLS, SIDE, SIDE)
    by_time = [*layout.order(), layout.frames]
    maps = {}
    for name, rule in {
        "no rule": None,
        "TAR, σ = 1": vk.FrameRule.tar(1.0, strength=0.5, stat="row_max"),
        "TAR, σ = 3": vk.FrameRule.tar(3.0, strength=0.5, stat="row_max"),
    }.items():
        found = vk.frame_attention(query, key, value, layout, rule, return_map=True)[1][0]
        maps[name] = found[by_time[:-1]][:, by_time]
    return vk.analysis.plot_frame_maps(maps)


def main(folder: Path = FOLDER) -> None:
    """Draw the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in {"grid-embedding": embedding_figure(), "grid-maps": maps_figure()}.items():
        figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
