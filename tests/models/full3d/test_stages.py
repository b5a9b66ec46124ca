"""Which tokens and which latent frames belong to the stages of a video."""

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.models.full3d.stages import stage_layout, stage_segments


@pytest.mark.parametrize("stages", range(1, 8))
@pytest.mark.parametrize("frames", [7, 9, 21])
def test_equal_parts_are_all_of_the_video(stages, frames):
    segments = stage_segments(stages, frames, None, 4)
    assert [n for first, last in segments for n in range(first, last + 1)] == list(range(frames))
    sizes = [last - first + 1 for first, last in segments]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("every", [1, 4, 8])
def test_a_latent_frame_is_of_the_last_stage_that_has_begun_at_it(every):
    """As ``mode="hold"`` of ``interpolate_embeddings`` has it, every so many frames."""
    anchors, frames = (5, 17, 40, 63), 65
    latent = (frames - 1) // every + 1
    segments = stage_segments(len(anchors), latent, anchors, every)
    found = [stage for stage, (first, last) in enumerate(segments) for _ in range(first, last + 1)]
    stages = torch.arange(4.0)[:, None, None]
    held = vk.interpolate_embeddings(stages, frames, anchors, "hold", every=every)
    assert found == held.flatten().tolist()


@pytest.mark.parametrize(
    ("stages", "frames", "anchors", "message"),
    [
        (4, 3, None, "as many as the video has latent frames at most, 3, got 4"),
        (2, 3, (0, 9), "stage 2 begins at frame 9, the last frame is 8, of 3 latent frames"),
        (2, 3, (5, 8), "stages 1 and 2 begin at frames 5 and 8"),
    ],
)
def test_each_stage_needs_a_latent_frame(stages, frames, anchors, message):
    with pytest.raises(ValueError, match=message):
        stage_segments(stages, frames, anchors, 4)


def test_texts_lie_side_by_side_behind_what_all_hear():
    layout = stage_layout([3, 5], [0, 1], shared=2)
    assert layout == vk.Layout(vk.Text(2), vk.Frames(1, 3), vk.Frames(1, 5, first=1))
    assert stage_layout([3, 3], [4, 2]) == vk.Layout(vk.Frames(1, 3, 4.0), vk.Frames(1, 3, 2.0))
