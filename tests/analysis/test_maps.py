import math

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.analysis import AttentionMap, MeanMap

FRAMES = 16


def attention_map(level=0, place="down", step=0, layer="a", model="", value=None, batch=2):
    if value is None:
        seed = hash((level, place, step, layer, model)) % 1000
        generator = torch.Generator().manual_seed(seed)
        value = torch.rand(batch, FRAMES, FRAMES, generator=generator).softmax(-1)
    return AttentionMap(model, layer, level, place, step, 0.0, value, positions=4)


def test_maps_are_averaged_by_level_place_and_step():
    maps = [
        attention_map(level, place, step, layer)
        for step in (0, 13)
        for level, place, layer in (
            ("init", "init", "i"),
            (0, "down", "a"),
            (0, "down", "b"),
            (1, "mid", "c"),
            (0, "up", "d"),
        )
    ]
    means = vk.analysis.mean_maps(maps)
    found = [(item.level, item.place, item.step, item.layers) for item in means]
    assert found == [
        ("init", "init", 0, 1),
        ("init", "init", 13, 1),
        (0, "down", 0, 2),
        (0, "up", 0, 1),
        (0, "down", 13, 2),
        (0, "up", 13, 1),
        (1, "mid", 0, 1),
        (1, "mid", 13, 1),
    ]
    torch.testing.assert_close(means[2].map, (maps[1].map + maps[2].map) / 2)
    torch.testing.assert_close(means[2].map.sum(-1), torch.ones(2, FRAMES))
    by_step = vk.analysis.mean_maps(maps, by=["step"])
    assert [(item.step, item.level, item.place) for item in by_step] == [
        (0, None, None),
        (13, None, None),
    ]
    expected = torch.stack([item.map for item in maps[5:]]).mean(0)
    torch.testing.assert_close(by_step[1].map, expected)
    assert [item.label for item in (means[0], means[2], by_step[1])] == [
        "init, step 0",
        "level 0, down, step 0",
        "step 13",
    ]


def test_nothing_to_average_raises():
    with pytest.raises(ValueError, match="maps holds no attention map"):
        vk.analysis.mean_maps([])
    with pytest.raises(ValueError, match=r"by must be of 'model', .*, got 'layer'"):
        vk.analysis.mean_maps([attention_map()], by=["layer"])


def test_map_penalty_is_the_mean_of_frobenius_norms():
    maps, target = torch.rand(3, FRAMES, FRAMES + 1), torch.rand(FRAMES, FRAMES + 1)
    expected = sum((one - target).square().sum().sqrt() for one in maps) / 3
    torch.testing.assert_close(vk.analysis.map_penalty(maps, target), expected)
    each = torch.rand(3, FRAMES, FRAMES + 1)
    expected = sum((a - b).square().sum().sqrt() for a, b in zip(maps, each, strict=True)) / 3
    torch.testing.assert_close(vk.analysis.map_penalty(maps, each), expected)
    half = vk.analysis.map_penalty(maps.half(), target.half())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", None])
def test_map_penalty_has_gradients_through_a_kernels_map(backend):
    query, key = (torch.randn(2, 5, 4, 2, 8, requires_grad=True) for _ in range(2))
    bias, target = vk.GaussianBias(1.0), torch.eye(4)
    _, found = vk.tar_attention(query, key, key.detach(), bias, return_map=True, backend=backend)
    penalty = vk.analysis.map_penalty(found, target)
    gradients = torch.autograd.grad(penalty, (query, key))
    step = 0.1
    with torch.no_grad():
        moved = [x - step * g for x, g in zip((query, key), gradients, strict=True)]
        _, found = vk.tar_attention(*moved, key, bias, return_map=True, backend=backend)
        fell = float(penalty - vk.analysis.map_penalty(found, target))
    assert fell == pytest.approx(step * float(sum(g.square().sum() for g in gradients)), rel=0.1)
    perfect = target.clone().requires_grad_()
    vk.analysis.map_penalty(perfect, target).backward()
    assert perfect.grad.isfinite().all()


@pytest.mark.parametrize(
    ("map_", "target", "error", "message"),
    [
        ([[1.0]], torch.eye(1), TypeError, "map must be a torch.Tensor, got list"),
        (
            torch.eye(3),
            torch.eye(4),
            ValueError,
            r"target must broadcast to .* \(3, 3\), got \(4, 4\)",
        ),
        (torch.eye(3), torch.rand(2, 3, 3), ValueError, "target must broadcast"),
        (torch.rand(2, 3, 3), torch.rand(3, 3, 3), ValueError, "target must broadcast"),
        (torch.eye(3), torch.eye(3).long(), ValueError, "target must be floating-point"),
        (torch.rand(3), torch.eye(3), ValueError, "map must be floating-point"),
    ],
)
def test_map_penalty_refuses(map_, target, error, message):
    with pytest.raises(error, match=message):
        vk.analysis.map_penalty(map_, target)


def test_min_max_shows_each_map_on_its_own_scale():
    maps = torch.rand(3, FRAMES, FRAMES) * torch.tensor([1.0, 1e-6, 50.0])[:, None, None]
    shown = vk.analysis.min_max(maps)
    assert torch.equal(shown.amin((1, 2)), torch.zeros(3))
    torch.testing.assert_close(shown.amax((1, 2)), torch.ones(3))
    order = maps[1].flatten().argsort()
    assert torch.equal(shown[1].flatten().argsort(), order)
    assert torch.equal(vk.analysis.min_max(torch.full((4, 4), 0.25)), torch.zeros(4, 4))


def pearson(weights):
    """The definition: moments of (i, j) one pair at a time."""
    weights = weights.double()
    total = float(weights.sum())
    pairs = [(i, j, float(w) / total) for i, row in enumerate(weights) for j, w in enumerate(row)]
    mean_i, mean_j = (sum(p[k] * p[2] for p in pairs) for k in (0, 1))
    covariance = sum(w * (i - mean_i) * (j - mean_j) for i, j, w in pairs)
    variances = [sum(w * (x[k] - m) ** 2 for *x, w in pairs) for k, m in ((0, mean_i), (1, mean_j))]
    return covariance / math.sqrt(variances[0] * variances[1])


def test_diagonalness():
    gaussian = vk.GaussianBias(1.0).matrix(FRAMES)
    assert float(vk.analysis.diagonalness(gaussian)) == pytest.approx(0.976, abs=5e-4)
    uniform = torch.full((FRAMES, FRAMES), 1 / FRAMES)
    eye = torch.eye(FRAMES)
    stacked = torch.stack([eye, uniform, eye.flip(0), torch.rand(FRAMES, FRAMES)])
    found = vk.analysis.diagonalness(stacked)
    assert found.shape == (4,)
    expected = torch.tensor([1, 0, -1, pearson(stacked[3])], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert float(vk.analysis.diagonalness(torch.ones(1, 1))) == 0
    # A map may be scaled, and skewed towards some frames.
    skewed = torch.rand(5, 5).cumsum(1) ** 3
    assert float(vk.analysis.diagonalness(skewed)) == pytest.approx(pearson(skewed), rel=1e-5)


def test_band_figures():
    identity, uniform = torch.eye(9), torch.full((9, 9), 1 / 9)
    both = torch.stack([identity, uniform])
    assert vk.analysis.band_width(both).tolist() == pytest.approx([0, math.sqrt(2 * (81 - 1) / 12)])
    assert vk.analysis.band_share(both, 0).tolist() == pytest.approx([1, 1 / 9])
    assert vk.analysis.band_share(both, 1).tolist() == pytest.approx([1, (9 * 3 - 2) / 81])
    gaussian = vk.GaussianBias(4.0).matrix(400)
    width = vk.analysis.band_width(gaussian / gaussian.sum(-1, keepdim=True))
    assert float(width) == pytest.approx(4, rel=0.02)
    for figure in (vk.analysis.diagonalness, vk.analysis.band_share, vk.analysis.band_width):
        with pytest.raises(TypeError, match=r"maps must be a torch.Tensor, got list"):
            figure([[1.0]])
        for maps in (torch.ones(4), torch.ones(1, 4), torch.ones(2, 3), torch.eye(2).cfloat()):
            with pytest.raises(ValueError, match=r"maps must be real \(…, frames, frames\), got"):
                figure(maps)
        for dtype in (torch.bool, torch.int64):
            assert figure(torch.eye(2, dtype=dtype)) == figure(torch.eye(2))
    with pytest.raises(ValueError, match="half_width must be at least 0 frames, got -1"):
        vk.analysis.band_share(both, -1)


def test_figures_of_maps():
    item = MeanMap(torch.rand(2, 5, 5).softmax(-1), level=1)
    (figures,) = vk.analysis.map_figures([item], half_width=2)
    assert figures.source is item
    assert torch.equal(figures.diagonalness, vk.analysis.diagonalness(item.map))
    assert torch.equal(figures.band_width, vk.analysis.band_width(item.map))
    assert torch.equal(figures.band_share, vk.analysis.band_share(item.map, 2))
    assert not torch.equal(figures.band_share, vk.analysis.band_share(item.map, 1))


def test_deltas():
    deltas = vk.analysis.delta_matrices([0, 1, 2.5], 6)
    assert list(deltas) == ["σ = 0", "σ = 1", "σ = 2.5"]
    assert torch.equal(deltas["σ = 0"], torch.eye(6))
    assert float(deltas["σ = 2.5"][1, 4]) == pytest.approx(math.exp(-9 / 12.5))
    table = vk.ToeplitzBias(torch.linspace(1, 0, 6))
    assert torch.equal(vk.analysis.delta_matrices({"x": table}, 6)["x"], table.matrix(6))
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        vk.analysis.delta_matrices([1], 0)
