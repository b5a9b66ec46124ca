"""Draws the figures of docs/starvid.md: ``python -m docs.make_starvid_figures [folder]``.

From a tiny pipeline whose cross-attention was made to have words' maps that the latents decide, so
that nothing is downloaded: they show what guidance does to maps, and nothing about any real model.
Its videos are noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import vstar_kernels as vk
from examples import tiny

FOLDER = Path(__file__).parent / "images"
PROMPT = "cat eats dog naps"
PLAN = vk.Trajectory(
    PROMPT,
    [
        vk.Subject("cat", "eats", boxes=[(0.0, 0.1, 0.35, 0.6), (0.1, 0.4, 0.45, 0.9)]),
        vk.Subject("dog", "naps", boxes=[(0.6, 0.1, 1.0, 0.7), None]),
    ],
)
CONFIG = vk.GuidanceConfig(
    spatial=(0.0, 0.5),
    syntax=(0.0, 0.5),
    updates=32,
    step_size=8000.0,
    lambdas=(1.0, 0.1),
    levels=(0,),
    size=0,
)
FRAMES = 8


def main(folder: Path = FOLDER) -> None:
    """Draw them all."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = tiny.text_to_video()
    tiny.plant_words(pipe, PROMPT)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_frames": FRAMES, "seed": 0, "num_inference_steps": 2}
    size = {"height": 24, "width": 32}
    off = vk.GuidanceConfig(lambdas=(0.0, 0.0), levels=(0,), size=0)
    before = vk.StarVid(pipe, off)(PLAN, maps=[0], **settings, **size)
    after = vk.StarVid(pipe, CONFIG)(PLAN, **settings, **size)
    boxes, present = PLAN.boxes(FRAMES)
    labels = [f"{subject.noun}, {subject.verb}" for subject in PLAN.subjects]
    words = before.words.texts
    subjects = [[0], [1], [0], [1]]  # cat, dog, eats, naps

    def maps(found):
        return vk.analysis.plot_word_maps(found, words, boxes, present, subjects)

    figures = {
        "starvid-plan": vk.analysis.plot_plan(boxes, present, labels),
        "starvid-before": maps(before.maps.mean(level=0, step=0, size=0)[0]),
        "starvid-after": maps(after.guided_maps[0]),
        "starvid-losses": vk.analysis.plot_guidance(after.updates),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})
    for update in (after.updates[0], after.updates[-1]):
        print(f"step {update.step}, update {update.update}: mass in the boxes {update.mass:.2f}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
