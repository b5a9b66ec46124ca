"""Scores of subjects on drawn squares, counted by their colours."""

import pytest
import torch

import vstar_kernels as vk

COLOURS = {"cat": 0, "dog": 1}


def video(*counts):
    """Frames with so many red and green squares of 4 × 4."""
    frames = torch.zeros(len(counts), 3, 8, 32)
    for frame, numbers in zip(frames, counts, strict=True):
        for channel, number in enumerate(numbers):
            for place in range(number):
                frame[channel, 4 * channel : 4 * channel + 4, 8 * place : 8 * place + 4] = 1
    return frames


def count(frames, nouns):
    """The squares of each colour, by their area."""
    areas = (frames == 1).sum((2, 3))
    return torch.stack([areas[:, COLOURS[noun]] // 16 for noun in nouns], 1)


def test_frames_with_the_right_counts():
    frames = video((1, 2), (1, 2), (2, 2), (2, 0))
    found = vk.analysis.numeracy(frames, count, {"cat": 1, "dog": 2})
    assert found.counts.tolist() == [[1, 2], [1, 2], [2, 2], [2, 0]]
    assert found.score == (1 + 1 + 0.5 + 0) / 4
    assert found.majority == 1.0  # the cats' counts 1 and 2 are as frequent: the smaller one
    assert vk.analysis.numeracy(frames, count, {"cat": 2, "dog": 0}).majority == 0.0


def test_it_sees_frames_from_the_first_to_the_last():
    numbers = [0, 1, 2, 3, 0, 1, 2, 3, 1]
    found = vk.analysis.numeracy(video(*((n, 0) for n in numbers)), count, {"cat": 1}, num_frames=3)
    assert found.counts.tolist() == [[0], [0], [1]]  # frames 0, 4 and 8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expected": {}}, ValueError, "expected must have a noun"),
        ({"expected": ["cat"]}, TypeError, "expected must map"),
        ({"expected": {"cat": -1}}, ValueError, r"expected\['cat'\] must be a number.*got -1"),
        ({"expected": {"cat": True}}, ValueError, "got True"),
        ({"num_frames": 0}, ValueError, "num_frames must be"),
        ({"detector": lambda frames, nouns: [1]}, ValueError, r"\(2 frames, 1 nouns\), got \[1\]"),
        ({"detector": lambda frames, nouns: [[0.5], [1]]}, ValueError, "whole numbers"),
        ({"detector": lambda frames, nouns: [[float("nan")], [1]]}, ValueError, "whole numbers"),
        ({"frames": torch.zeros(0, 3, 4, 4)}, ValueError, "frames must be"),
    ],
)
def test_numeracy_of_what_is_wrong(change, error, message):
    call = {"frames": video((1, 0), (1, 0)), "detector": count, "expected": {"cat": 1}, **change}
    with pytest.raises(error, match=message):
        vk.analysis.numeracy(call.pop("frames"), call.pop("detector"), **call)


def test_the_judge_sees_six_frames_in_three_rows_of_two():
    frames = torch.linspace(0, 1, 11)[:, None, None, None].expand(-1, 3, 4, 5)
    seen = []
    found = vk.analysis.action_binding(frames, lambda picture: seen.append(picture) or 4)
    assert found.score == 0.8
    assert found.picture is seen[0]
    assert seen[0].shape == (3, 12, 10)
    assert seen[0][0, ::4, ::5].flatten().tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_a_short_video_is_shown_twice():
    found = vk.analysis.action_binding(video((0, 0), (4, 0)), lambda picture: 5.0)
    assert found.score == 1.0
    assert found.picture.shape == (3, 24, 64)


@pytest.mark.parametrize("grade", [-1, 5.1, float("nan"), None, "very good"])
def test_a_grade_that_is_none(grade):
    with pytest.raises(ValueError, match=r"judge must return a number from 0 to 5, got"):
        vk.analysis.action_binding(video((1, 1)), lambda picture: grade)
