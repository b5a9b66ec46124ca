"""Closed forms: box-shaped and uniform maps, Gaussian blobs, and what must not matter."""

import math
import warnings

import pytest
import torch

from vstar_kernels.methods.starvid.losses import (
    map_distance,
    mass_inside,
    spatial_loss,
    syntax_loss,
)

SIDE = 8


def box(top, left, height=4, width=4, side=SIDE):
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def blob(x, y, sigma=6.0, side=64):
    """A Gaussian, narrow enough that nearly nothing of it is cut off."""
    cell = torch.arange(side, dtype=torch.float64)
    squares = (cell - x).square() + (cell[:, None] - y).square()
    return torch.exp(-squares / (2 * sigma**2))


def test_a_map_in_its_box_and_a_uniform_one():
    masks = torch.stack([box(0, 0), box(2, 3)])[None]  # 1 frame, 2 subjects
    maps = masks.double() * 0.9
    assert spatial_loss(maps, masks) == pytest.approx(0.1)
    assert spatial_loss(maps, masks, normalize="max") == pytest.approx(0)
    assert spatial_loss(maps, masks, form="mass") == pytest.approx(0)
    uniform = torch.full_like(maps, 0.25)
    assert spatial_loss(uniform, masks, inside=2, outside=3) == pytest.approx(2 * 0.75 + 3 * 0.25)
    assert spatial_loss(uniform, masks, form="mass") == pytest.approx((1 - 16 / 64) ** 2)
    away = (~masks).float()
    assert spatial_loss(away, masks, inside=2, outside=3) == pytest.approx(5)


def test_only_the_largest_cells_count():
    """Of 4 cells in the box and 12 outside, with p = 1/2 the best 2 and the best 6."""
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0] = True
    cells = torch.arange(16.0).view(4, 4) / 16
    loss = spatial_loss(cells[None, None], mask[None, None], share=0.5, inside=1, outside=1)
    assert loss == pytest.approx(1 - (3 + 2) / 32 + sum(range(10, 16)) / 6 / 16)
    # ⌈p·|M|⌉: 0.3 of 4 cells are 2, of 12 are 4
    loss = spatial_loss(cells[None, None], mask[None, None], share=0.3, inside=1, outside=1)
    assert loss == pytest.approx(1 - (3 + 2) / 32 + sum(range(12, 16)) / 4 / 16)


def test_an_absent_subject():
    mask = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
    uniform = torch.full((1, 1, SIDE, SIDE), 0.5)
    assert spatial_loss(uniform, mask, outside=4) == pytest.approx(2)
    assert spatial_loss(uniform, mask, outside=4, form="mass") == 0
    everywhere = ~mask
    assert spatial_loss(uniform, everywhere, outside=4) == pytest.approx(0.5)


def test_means_over_frames_and_subjects_and_not_over_the_batch():
    masks = torch.stack([box(0, 0), box(4, 4), box(1, 2)]).view(3, 1, SIDE, SIDE)
    maps = torch.rand(2, 3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for form in ("topk", "mass"):
        whole = spatial_loss(maps, masks, form=form)
        assert whole.shape == (2,)
        parts = [
            torch.stack([spatial_loss(video[f, None], masks[f, None], form=form) for f in range(3)])
            for video in maps
        ]
        torch.testing.assert_close(whole, torch.stack(parts).mean(1))


@pytest.mark.parametrize("settings", [{}, {"form": "mass"}, {"normalize": "max"}])
def test_one_step_along_the_gradient_raises_the_mass_in_the_box(settings):
    masks = box(1, 1)[None, None]
    logits = torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()

    def attention():
        return logits.flatten(-2).softmax(-1).view_as(logits)

    before = mass_inside(attention(), masks)
    (gradient,) = torch.autograd.grad(spatial_loss(attention(), masks, **settings).sum(), logits)
    assert gradient.isfinite().all()
    with torch.no_grad():
        logits -= 0.1 / gradient.abs().max() * gradient
        assert mass_inside(attention(), masks) > before


def test_the_distance_of_two_gaussians():
    """KL of Gaussians d apart is d²/(2σ²), both ways: 100/72."""
    near, far = blob(27, 32), blob(37, 32)
    assert map_distance(near, far) == pytest.approx(100 / 72, rel=1e-4)
    assert map_distance(near, 5 * far) == pytest.approx(100 / 72, rel=1e-4)
    assert map_distance(near, near) == pytest.approx(0)
    # The product of the two is a Gaussian of their overlap: exp(−d²/(4σ²)).
    expected = 1 - math.exp(-100 / 144)
    assert map_distance(near, far, "cosine") == pytest.approx(expected, rel=1e-3)


def test_a_cell_of_weight_0_is_far_but_finite():
    one, other = torch.zeros(2, 4, 4).unbind()
    one[:, :2], other[:, 2:] = 1, 1
    # Half of the mass is at ε = 10⁻⁸ / 2 of the mean of 1/2 … log(1 / 5e-9)
    assert map_distance(one, other) == pytest.approx(math.log(1 / (1e-8 * 0.5)), rel=1e-3)


def blobs(*centres, frames=3):
    """Words whose blobs are at places that move by a pixel a frame."""
    return torch.stack(
        [torch.stack([blob(x + frame, y) for x, y in centres]) for frame in range(frames)]
    )


def test_the_syntax_loss_of_blobs():
    """A verb 4 ahead of its noun; both move by a pixel a frame, and the other word stands still."""
    moving = blobs((20, 32), (24, 32))  # noun, verb
    maps = torch.cat([moving, blobs((20, 44), frames=1).expand(3, -1, -1, -1)], dim=1)

    def kl(dx, dy):
        return (dx**2 + dy**2) / 72

    def difference(frame, offset):
        return kl(4 - offset, 0) - kl(4 + frame, 12)

    windows = {0: (0, 1), 1: (-1, 0, 1), 2: (-1, 0)}
    means = [
        sum(difference(f, o) for o in offsets) / len(offsets) for f, offsets in windows.items()
    ]
    assert syntax_loss(maps, [(0, 1)], window=1) == pytest.approx(sum(means) / 3, rel=3e-3)
    expected = sum(difference(f, 0) for f in range(3)) / 3
    assert syntax_loss(maps, [(0, 1)], window=0) == pytest.approx(expected, rel=3e-3)
    limited = syntax_loss(maps, [(0, 1)], window=0, margin=0.5)
    assert limited == pytest.approx(kl(4, 0) - 0.5, rel=1e-3)
    assert syntax_loss(maps, [(0, 1)], window=99).isfinite()
    both = syntax_loss(torch.stack([maps, maps.flip(1)]), [(0, 1)], window=0)
    assert both.shape == (2,)
    assert both[0] == pytest.approx(expected, rel=3e-3)


def test_only_frames_with_the_subject_count():
    maps = blobs((20, 32), (24, 32), (20, 44), frames=4)
    there = torch.tensor([[True, True, False, False]])
    expected = syntax_loss(maps[:2], [(0, 1)])
    torch.testing.assert_close(syntax_loss(maps, [(0, 1)], present=there), expected)
    assert syntax_loss(maps, [(0, 1)], present=~there & False) == 0


def test_static_maps_make_the_window_irrelevant():
    still = blobs((20, 32), (24, 32), (20, 44), frames=1).expand(5, -1, -1, -1)
    for distance in ("kl", "cosine"):
        losses = [syntax_loss(still, [(0, 1)], window=r, distance=distance) for r in (0, 1, 2, 9)]
        torch.testing.assert_close(torch.stack(losses), losses[0].expand(4))


def test_swapping_the_verbs_of_two_pairs_raises_the_loss():
    maps = blobs((20, 20), (22, 20), (44, 44), (46, 44))  # noun, verb, noun, verb
    for distance in ("kl", "cosine"):
        right = syntax_loss(maps, [(0, 1), (2, 3)], distance=distance)
        assert syntax_loss(maps, [(0, 3), (2, 1)], distance=distance) > right + 0.5


def test_without_other_words_there_is_a_warning():
    with pytest.warns(UserWarning, match="nothing to keep them away from"):
        loss = syntax_loss(blobs((20, 32), (24, 32)), [(0, 1)], window=0)
    assert loss == pytest.approx(16 / 72, rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syntax_loss(blobs((20, 32), (24, 32), (1, 1)), [(0, 1)])


MAPS = torch.ones(2, 2, 4, 4)
MASKS = torch.ones(2, 2, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"maps": [1]}, TypeError, "maps must be a torch.Tensor, got list"),
        ({"maps": MAPS.int()}, ValueError, "floating-point .* got torch.int32"),
        ({"maps": MAPS[0]}, ValueError, r"got torch.float32 of shape \(2, 4, 4\)"),
        ({"masks": MASKS.float()}, TypeError, "masks must be a torch.Tensor of bool, got torch.fl"),
        ({"masks": MASKS[:1]}, ValueError, r"\(2, 2, 4, 4\), got \(1, 2, 4, 4\)"),
        ({"form": "hinge"}, ValueError, "form must be one of 'topk', 'mass', got 'hinge'"),
        ({"share": 0.0}, ValueError, r"share must be in \(0, 1\], got 0.0"),
        ({"outside": -1.0}, ValueError, "outside must be at least 0, got -1.0"),
        ({"inside": math.nan}, ValueError, "inside must be at least 0, got nan"),
        ({"normalize": "sum"}, ValueError, "normalize must be one of 'max', got 'sum'"),
    ],
)
def test_wrong_arguments_of_the_spatial_loss(change, error, message):
    with pytest.raises(error, match=message):
        spatial_loss(**{"maps": MAPS, "masks": MASKS} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": []}, "at least one noun and its verb, got none"),
        ({"pairs": [(0, 3)]}, "pairs must be of words 0 to 2, got 3"),
        ({"pairs": [(1, 1)]}, "two different words, got 1 twice"),
        ({"distance": "l2"}, "distance must be one of 'kl', 'cosine', got 'l2'"),
        ({"window": -1}, "window must be a number of frames of at least 0, got -1"),
        ({"margin": 0.0}, "margin must be more than 0, got 0.0"),
        ({"present": MASKS[0, 0]}, r"\(1 pairs, 2 frames\), got \(4, 4\)"),
    ],
)
def test_wrong_arguments_of_the_syntax_loss(change, message):
    with pytest.raises(ValueError, match=message):
        syntax_loss(**{"maps": torch.ones(2, 3, 4, 4), "pairs": [(0, 1)]} | change)
