import pytest
import torch

from vstar_kernels.methods.starvid.masks import box_mask


def test_cells_whose_centre_is_inside():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.25], [0.26, 0.3, 0.9, 1.0]])
    mask = box_mask(boxes, 4, 4)  # centres at 1/8, 3/8, 5/8, 7/8
    assert mask.int().tolist() == [
        [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]],
    ]
    assert box_mask(torch.tensor([0.0, 0.0, 1.0, 1.0]), 3, 5).all()


def test_a_box_between_centres_has_the_nearest_cell():
    tiny_, thin = torch.tensor([[0.5, 0.5, 0.6, 0.6], [0.51, 0.0, 0.6, 1.0]])
    assert box_mask(tiny_, 4, 4).nonzero().tolist() == [[2, 2]]
    assert box_mask(thin, 4, 4).nonzero().tolist() == [[0, 2], [1, 2], [2, 2], [3, 2]]


def test_leading_dimensions():
    boxes = torch.tensor([0.1, 0.2, 0.7, 0.8]).expand(2, 3, 4)
    mask = box_mask(boxes, 5, 7)
    assert mask.shape == (2, 3, 5, 7)
    assert (mask == box_mask(boxes[0, 0], 5, 7)).all()


@pytest.mark.parametrize(
    "box",
    [(0.5, 0, 0.5, 1), (0, 0.7, 1, 0.2), (-0.1, 0, 1, 1), (0, 0, 1, 1.01), (0, 0, 1, torch.nan)],
)
def test_no_boxes(box):
    with pytest.raises(ValueError, match=r"in \[0, 1\] with x0 < x1 and y0 < y1, got"):
        box_mask(torch.tensor(box, dtype=torch.float64), 4, 4)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="boxes must be a tor"):
        box_mask([0, 0, 1, 1], 4, 4)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        box_mask(torch.zeros(3), 4, 4)
    with pytest.raises(ValueError, match="at least 1 cell, got 0 and 4"):
        box_mask(torch.tensor([0.0, 0.0, 1.0, 1.0]), 0, 4)
