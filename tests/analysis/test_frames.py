import builtins
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import vstar_kernels as vk
from vstar_kernels.analysis.frames import DREAMSIM_SIZE

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES, SIDE = 10, 40


def moving_square(pixels_per_frame=2):
    video = torch.zeros(FRAMES, 3, SIDE, SIDE)
    for frame in range(FRAMES):
        left = frame * pixels_per_frame
        video[frame, :, 10:30, left : left + 20] = 1
    return video


@pytest.mark.parametrize("embedder", ["pixels", "ssim", lambda frames: frames.mean(1).flatten(1)])
def test_a_moving_square_becomes_less_alike_with_the_interval(embedder):
    video = moving_square()
    if callable(embedder):
        video = video.clamp(0.05, 1)  # so that black has a direction
    similarity = vk.analysis.frame_similarity(video, embedder)
    assert similarity.shape == (FRAMES, FRAMES)
    torch.testing.assert_close(similarity, similarity.mT)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(FRAMES))
    histogram = vk.analysis.similarity_histogram(similarity)
    assert (histogram.means.diff() < 0).all()
    still = vk.analysis.frame_similarity(moving_square(0), embedder)
    torch.testing.assert_close(still, torch.ones(FRAMES, FRAMES))


def test_pixels_are_compared_by_their_cosine():
    video = torch.rand(4, 3, 5, 6)
    flat = (2 * video - 1).flatten(1).double()
    expected = flat @ flat.T / (flat.norm(dim=1)[:, None] * flat.norm(dim=1))
    found = vk.analysis.frame_similarity(video)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    black_and_white = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    found = vk.analysis.frame_similarity(black_and_white)
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))


def plain_ssim(one, other):
    """Each window of 11 × 11 by itself, in float64."""
    x = np.arange(11) - 5
    window = np.exp(-(x[:, None] ** 2) / 4.5 - x[None, :] ** 2 / 4.5)
    window /= window.sum()
    values = []
    for top in range(one.shape[0] - 10):
        for left in range(one.shape[1] - 10):
            a, b = (i[top : top + 11, left : left + 11] for i in (one, other))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = ((window * (i - m) ** 2).sum() for i, m in ((a, mean_a), (b, mean_b)))
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append(
                (2 * mean_a * mean_b + c1)
                * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return float(np.mean(values))


def test_structural_similarity():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(1, 3, 16, 14, generator=generator)
    noise = torch.rand(3, 3, 16, 14, generator=generator)
    video = torch.cat([base, 0.7 * base + 0.3 * noise[:1], noise[1:2], base * 0.5])
    found = vk.analysis.structural_similarity(video)
    grey = (0.299 * video[:, 0] + 0.587 * video[:, 1] + 0.114 * video[:, 2]).double().numpy()
    expected = torch.tensor([[plain_ssim(a, b) for b in grey] for a in grey])
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)
    assert found[0, 1] > 0.5 > found[0, 2]
    with pytest.raises(ValueError, match="at least 11 × 11 pixels, got 10 × 20"):
        vk.analysis.structural_similarity(torch.rand(2, 3, 10, 20))


def test_videos_in_every_form():
    from PIL import Image

    array = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(0, 3, 1, 2) / 255
    images = [Image.fromarray(frame) for frame in array]
    forms = [array, array / 255, images, list(array), expected, expected.half().float()]
    forms += [torch.from_numpy(array).permute(0, 3, 1, 2), expected.double()]
    for form in forms:
        found = vk.analysis.as_frames(form)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    palette = [image.quantize(256) for image in images]
    assert palette[0].mode == "P"
    torch.testing.assert_close(vk.analysis.as_frames(palette), expected, rtol=0, atol=0.1)
    torch.testing.assert_close(
        vk.analysis.as_frames([palette[0], *images[1:]])[1:], expected[1:], rtol=0, atol=1e-3
    )
    grey = [image.convert("L") for image in images]
    assert vk.analysis.as_frames(grey).shape == (3, 3, 5, 7)
    assert vk.analysis.as_frames(expected[:, :1]).shape == (3, 3, 5, 7)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        ("video.mp4", TypeError, "got str"),
        (7, TypeError, "got int"),
        ([], ValueError, r"as a tensor it has shape \(0,\)"),
        (torch.rand(3, 8, 8), ValueError, r"shape \(3, 8, 8\)"),
        (torch.rand(2, 8, 8, 3), ValueError, r"three channels.*shape \(2, 8, 8, 3\)"),
        (
            torch.rand(2, 3, 8, 8) * 2 - 1,
            ValueError,
            r"from 0 to 1, got -0\.9.* \(frames \+ 1\) / 2",
        ),
        (torch.full((2, 3, 8, 8), math.nan), ValueError, "from 0 to 1, got nan"),
        (torch.ones(2, 3, 8, 8, dtype=torch.int64), ValueError, "uint8 or floating.*int64"),
        ([np.zeros((4, 4, 3)), np.zeros((5, 4, 3))], ValueError, r"one size, got \(4, 4, 3\), \(5"),
    ],
)
def test_what_is_no_video_is_refused(frames, error, message):
    with pytest.raises(error, match=message):
        vk.analysis.as_frames(frames)


@pytest.mark.parametrize(
    ("embedder", "error", "message"),
    [
        ("clip", ValueError, '"pixels", "ssim" or a callable, got \'clip\''),
        (lambda frames: [1], TypeError, "must return a tensor, got list"),
        (lambda frames: frames, ValueError, r"\(frames, channels\) for its 10 frames, got \(10, 3"),
        (lambda frames: torch.ones(3, 3), ValueError, r"its 10 frames, got \(3, 3\)"),
        (
            lambda frames: torch.eye(10) * (torch.arange(10) != 4),
            ValueError,
            "frame 4 has length 0",
        ),
        (lambda frames: torch.full((10, 2), math.nan), ValueError, "frame 0 has length nan"),
    ],
)
def test_embedders_that_return_something_else_are_refused(embedder, error, message):
    with pytest.raises(error, match=message):
        vk.analysis.frame_similarity(moving_square(), embedder)


class StubDreamSim(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.calls = []

    def embed(self, images):
        self.calls.append((tuple(images.shape), images.dtype))
        return images.mean((2, 3)) * self.weight


def test_dreamsim():
    model = StubDreamSim()
    embedder = vk.analysis.DreamSimEmbedder(model, batch_size=4)
    video = torch.rand(6, 3, 30, 50)
    embeddings = embedder(video)
    sides = (3, DREAMSIM_SIZE, DREAMSIM_SIZE)
    assert model.calls == [((4, *sides), torch.float64), ((2, *sides), torch.float64)]
    assert embeddings.dtype == torch.float32
    assert not embeddings.requires_grad
    torch.testing.assert_close(embeddings, video.mean((2, 3)), rtol=0, atol=0.01)
    assert vk.analysis.frame_similarity(video, embedder).shape == (6, 6)


def test_dreamsim_is_loaded_where_it_can_run_and_into_the_cache(monkeypatch, tmp_path):
    calls = []

    def dreamsim(pretrained=True, device="cuda", cache_dir="./models", dreamsim_type="ensemble"):
        calls.append((device, cache_dir, dreamsim_type))
        return StubDreamSim(), None

    monkeypatch.setitem(sys.modules, "dreamsim", SimpleNamespace(dreamsim=dreamsim))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    vk.analysis.DreamSimEmbedder()
    vk.analysis.DreamSimEmbedder(device="meta", cache_dir="here", dreamsim_type="dino_vitb16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = (device, str(tmp_path / "hub" / "dreamsim"), "ensemble")
    assert calls == [own, ("meta", "here", "dino_vitb16")]


def test_dreamsim_that_is_not_installed(monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "dreamsim":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="needs the package dreamsim"):
        vk.analysis.DreamSimEmbedder()


def test_methods_are_put_on_one_scale():
    one, other = torch.rand(4, 4) * 0.2 + 0.5, torch.rand(2, 6, 6) * 0.3 + 0.3
    joint = vk.analysis.normalize_jointly({"a": one, "b": list(other)})
    everything = torch.cat([one.flatten(), other.flatten()])
    assert (joint.low, joint.high) == (float(everything.min()), float(everything.max()))
    assert joint.matrices["a"].shape == (1, 4, 4)
    shown = torch.cat([matrix.flatten() for matrix in joint.matrices.values()])
    assert (float(shown.min()), float(shown.max())) == (0, 1)
    torch.testing.assert_close(shown * (joint.high - joint.low) + joint.low, everything)
    with pytest.raises(ValueError, match="at least one method, got none"):
        vk.analysis.normalize_jointly({})
    with pytest.raises(ValueError, match="all similarities are 1"):
        vk.analysis.normalize_jointly({"a": torch.ones(3, 3)})
    with pytest.raises(ValueError, match=r"b must be one .*, got \(1, 2, 3\)"):
        vk.analysis.normalize_jointly({"b": torch.ones(2, 3)})


def test_histograms_count_pairs_by_their_interval():
    similarity = torch.tensor(
        [[1.0, 0.9, 0.1, 0.4], [0.9, 1.0, 0.6, 0.2], [0.1, 0.6, 1.0, 0.9], [0.4, 0.2, 0.9, 1.0]]
    )
    found = vk.analysis.similarity_histogram(similarity, [1, 3], bins=2, limits=(0, 1))
    assert found.intervals == (1, 3)
    assert found.edges.tolist() == [0, 0.5, 1]
    assert found.shares.tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(found.means, torch.tensor([0.8, 0.4]))
    both = vk.analysis.similarity_histogram([similarity, 0 * similarity], bins=4)
    assert both.intervals == (1, 2, 3)
    drawn = vk.analysis.similarity_histogram((x for x in (similarity, 0 * similarity)), bins=4)
    assert torch.equal(drawn.shares, both.shares)
    torch.testing.assert_close(both.shares.sum(1), torch.ones(3))
    assert (float(both.edges[0]), float(both.edges[-1])) == (0, pytest.approx(0.9))
    assert both.shares[0].tolist() == pytest.approx([3 / 6, 0, 1 / 6, 2 / 6])
    equal = vk.analysis.similarity_histogram(torch.ones(3, 3))
    torch.testing.assert_close(equal.shares.sum(1), torch.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intervals": [4]}, "intervals of 4 frames are 1 to 3, got 4"),
        ({"intervals": [0]}, "1 to 3, got 0"),
        ({"intervals": []}, "at least one, got none"),
        ({"bins": 0}, "bins must be at least 1, got 0"),
        ({"limits": (1, 1)}, r"low < high, got \(1, 1\)"),
        ({"limits": (0, 0.5)}, r"from 1 to 1, outside limits \(0, 0.5\)"),
    ],
)
def test_wrong_histograms_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vk.analysis.similarity_histogram(torch.ones(4, 4), **options)
    with pytest.raises(ValueError, match=r"several, got \(\)"):
        vk.analysis.similarity_histogram(torch.tensor(1.0))
    for nothing in ([], torch.ones(0, 4, 4)):
        with pytest.raises(ValueError, match=r"similarity must be one .* or several, got none"):
            vk.analysis.similarity_histogram(nothing)


def gaussian_embedder(sigma):
    """Frames of which the cosine is a Gaussian of their distance."""

    def embed(frames):
        return torch.linalg.cholesky(vk.GaussianBias(sigma).matrix(len(frames)).double())

    return embed


def test_a_bias_from_frames():
    video = moving_square(1)
    similarity = vk.analysis.frame_similarity(video, "ssim")
    bias = vk.analysis.bias_from_frames(video, "ssim", strength=2.0, stat="none")
    assert (bias.strength, bias.stat) == (2.0, "none")
    assert float(bias.delta.max()) == 1
    torch.testing.assert_close(bias.delta, similarity)
    spread = vk.analysis.bias_from_frames(video, "ssim", min_max=True).delta
    assert (float(spread.min()), float(spread.max())) == (0, 1)
    low = similarity.min()
    torch.testing.assert_close(spread * (1 - low) + low, similarity)
    with pytest.raises(ValueError, match="needs frames that differ"):
        vk.analysis.bias_from_frames(moving_square(0), min_max=True)


@pytest.mark.parametrize("name", ["UNet3DConditionModel", "UNetMotionModel"])
def test_a_dense_gaussian_equals_the_gaussian_in_a_model(name):
    """Dynamics transfer (Fig. 8), with frames that are as similar as VSTAR's Δ says."""
    pytest.importorskip("diffusers")
    from tests.models import models

    model = models.make(name)
    plain = models.call(model, name)
    bias = vk.analysis.bias_from_frames(torch.rand(6, 3, 4, 4), gaussian_embedder(1.5))
    configs = [
        vk.TARConfig(sigma=1.5, strength=2.0, steps=None),
        vk.TARConfig(bias=bias, strength=2.0, steps=None),
    ]
    outputs = []
    for config in configs:
        with vk.apply_tar(model, config, backend="reference"):
            outputs.append(models.call(model, name))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert (outputs[0] - plain).abs().max() > 1e-2
