"""Plans: boxes between key frames by hand, JSON, and what is refused."""

import json
import math

import pytest
import torch

import vstar_kernels as vk

LEFT, RIGHT = (0.0, 0.5, 0.25, 1.0), (0.5, 0.0, 1.0, 0.5)


def plan(*boxes):
    return vk.Trajectory("a cat runs", [vk.Subject("cat", "runs", boxes=boxes)])


def test_corners_move_linearly_between_key_frames():
    boxes, present = plan(LEFT, RIGHT, LEFT).boxes(9)
    assert present.tolist() == [[True] * 9]
    assert (boxes.shape, boxes.dtype) == ((1, 9, 4), torch.float32)
    for frame, share in enumerate((0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0)):
        by_hand = [(1 - share) * a + share * b for a, b in zip(LEFT, RIGHT, strict=True)]
        assert boxes[0, frame].tolist() == pytest.approx(by_hand)


def test_key_frames_lie_at_unrounded_places():
    """Six key frames on sixteen frames: each third frame is one; the others lie between."""
    ways = [(k / 10, 0.0, k / 10 + 0.5, 1.0) for k in range(6)]
    boxes, _ = plan(*ways).boxes(16)
    assert boxes[0, :, 0].tolist() == pytest.approx([frame / 30 for frame in range(16)], abs=1e-6)


def test_the_nearer_key_frame_decides_where_a_subject_is_absent_in_one():
    boxes, present = plan(LEFT, None, None, RIGHT).boxes(7)  # key frames at 0, 2, 4, 6
    assert present[0].tolist() == [True, True, False, False, False, False, True]
    assert boxes[0, 1].tolist() == list(LEFT)  # as near to both: the earlier one
    assert boxes[0, 6].tolist() == list(RIGHT)
    assert not boxes[0, 2:6].any()


@pytest.mark.parametrize("num_frames", [1, 2, 7])
def test_one_key_frame_is_for_all_frames(num_frames):
    boxes, present = plan(RIGHT).boxes(num_frames)
    assert present.all()
    assert (boxes == torch.tensor(RIGHT)).all()


def test_one_frame_of_many_key_frames_is_the_first():
    boxes, _ = plan(RIGHT, LEFT).boxes(1)
    assert boxes[0, 0].tolist() == list(RIGHT)


def test_subjects_are_apart():
    cat = vk.Subject("cat", boxes=[LEFT, LEFT])
    dog = vk.Subject("dog", boxes=[None, RIGHT])
    boxes, present = vk.Trajectory("a cat and a dog", [cat, dog]).boxes(2)
    assert present.tolist() == [[True, True], [False, True]]
    assert boxes[1, 1].tolist() == list(RIGHT)


def test_json(tmp_path):
    cat = vk.Subject("cat", "runs", "from left to right — fast", boxes=[LEFT, None])
    made = vk.Trajectory("a cat runs", [cat, vk.Subject("dog", boxes=[RIGHT, RIGHT])], "snow")
    assert vk.Trajectory.from_json(made.to_json()) == made
    made.save(tmp_path / "plan.json")
    assert vk.Trajectory.load(tmp_path / "plan.json") == made
    least = {"prompt": "a cat", "subjects": [{"noun": "cat", "boxes": [[0, 0, 1, 1]]}]}
    assert vk.Trajectory.from_json(json.dumps(least)).subjects[0].boxes == ((0, 0, 1, 1),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subjects": []}, "subjects must hold at least one Subject"),
        ({"prompt": " "}, "prompt must not be empty"),
        ({"prompt": None}, "prompt: .*string, got NoneType"),
        ({"colour": "red"}, "colour: there is no such field"),
        ({"subjects": [{"noun": "cat"}]}, r"subjects\[0\].boxes: it is missing"),
        ({"subjects": [{"noun": "cat", "boxes": []}]}, r"subjects\[0\]: boxes must hold a box"),
        ({"subjects": [{"noun": "cat", "boxes": [None]}]}, "boxes must hold a box"),
        ({"subjects": [{"noun": "cat", "boxes": [[0, 0, 1]]}]}, r"boxes\[0\]"),
        ({"subjects": [{"noun": "cat", "boxes": [[0, 0, "1", 1]]}]}, r"boxes\[0\]\[2\]"),
        ({"subjects": [{"noun": "cat", "boxes": [[0, 0, 1.5, 1]]}]}, "within 0 and 1"),
        ({"subjects": [{"noun": "cat", "boxes": [[0.5, 0, 0.5, 1]]}]}, "x0 < x1"),
    ],
)
def test_documents_that_are_no_plan(change, message):
    document = {"prompt": "a cat", "subjects": [{"noun": "cat", "boxes": [[0, 0, 1, 1]]}], **change}
    with pytest.raises(ValueError, match=f"not a plan: .*{message}"):
        vk.Trajectory.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("boxes", "error", "message"),
    [
        ([(0, 0, 1, math.nan)], ValueError, r"boxes\[0\] must lie within 0 and 1"),
        ([(-0.1, 0, 1, 1)], ValueError, "within 0 and 1, got .-0.1"),
        ([(0, 1, 1, 0)], ValueError, "y0 < y1"),
        ([(0, 0, 1, True)], TypeError, "four numbers"),
        ([(0, 0, 1)], TypeError, "x0, y0, x1, y1"),
        (["0011"], TypeError, "x0, y0, x1, y1"),
        ("boxes", TypeError, "list of boxes"),
        ((), ValueError, "one key frame at least"),
    ],
)
def test_boxes_that_are_none(boxes, error, message):
    with pytest.raises(error, match=message):
        vk.Subject("cat", boxes=boxes)


def test_subjects_have_one_number_of_key_frames():
    subjects = [vk.Subject("cat", boxes=[LEFT]), vk.Subject("dog", boxes=[LEFT, None])]
    with pytest.raises(ValueError, match="got 1 boxes of 'cat' and 2 of 'dog'"):
        vk.Trajectory("a cat and a dog", subjects)


@pytest.mark.parametrize(("num_frames", "error"), [(0, ValueError), (2.0, TypeError)])
def test_a_number_of_frames_that_is_none(num_frames, error):
    with pytest.raises(error, match="num_frames must be"):
        plan(LEFT).boxes(num_frames)
