import re

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import vstar_kernels as vk
from tests.helpers import default_dtype
from vstar_kernels.methods.vstar import noise

FRAMES = 7
SAMPLES = (250, 400)


def expected_covariance(frames, beta, gamma):
    """Eq. 5, element by element."""
    rows = [[beta if i == j else gamma ** abs(i - j) for j in range(frames)] for i in range(frames)]
    return torch.tensor(rows, dtype=torch.float64)


def sample(prior, *shape, seed=0, **options):
    return prior.sample(shape, generator=torch.Generator().manual_seed(seed), **options)


# β = 1: autoregressive; above: and white noise; below, or |γ| > 1: by the Cholesky factor.
FORMS = [(1, 0), (1, 0.6), (1, -0.5), (1.7, 0.8), (1.5, 1), (0.8, 0.3), (0.9, -0.2), (40, 1.3)]


@pytest.mark.parametrize(("beta", "gamma"), FORMS)
def test_samples_have_the_covariance_of_eq_5(beta, gamma):
    prior = vk.NoisePrior(beta, gamma)
    expected = expected_covariance(FRAMES, beta, gamma)
    torch.testing.assert_close(prior.covariance(FRAMES), expected, rtol=1e-14, atol=0)
    frames = sample(prior, 1, 1, FRAMES, *SAMPLES)[0, 0].flatten(1).double()
    found = frames @ frames.T / frames.shape[1]
    # Five standard deviations of an estimate from so many samples.
    spread = (expected.diagonal()[:, None] * expected.diagonal() + expected.square()).sqrt()
    assert ((found - expected).abs() < 5 * spread / frames.shape[1] ** 0.5).all()
    assert frames.mean(1).abs().max() < 5 * (beta / frames.shape[1]) ** 0.5


@pytest.mark.parametrize(("beta", "gamma"), FORMS)
def test_only_forms_without_structure_are_factorised(beta, gamma, monkeypatch):
    def fail(*_):
        raise AssertionError("factorised")

    monkeypatch.setattr(noise, "_cholesky", fail)
    prior = vk.NoisePrior(beta, gamma)
    if beta < 1 or abs(gamma) > 1:
        with pytest.raises(AssertionError, match="factorised"):
            sample(prior, 1, 1, FRAMES, 2, 2)
    else:
        sample(prior, 1, 1, FRAMES, 2, 2)


def test_a_factor_is_computed_once():
    prior = vk.NoisePrior(0.83, 0.31)
    before = noise._cholesky.cache_info().misses
    for frames in (5, 5, 6, 5):
        sample(prior, 1, 1, frames, 2, 2)
    assert noise._cholesky.cache_info().misses == before + 2


@pytest.mark.parametrize("beta", [0.8, 1, 1.3])
def test_frames_seeds_means_and_types(beta):
    mean = torch.arange(5.0)[:, None, None]
    prior, shifted = vk.NoisePrior(beta, 0.4), vk.NoisePrior(beta, 0.4, mean)
    plain = sample(prior, 2, 3, 5, 4, 6)
    assert plain.dtype == torch.float32
    assert torch.equal(plain, sample(prior, 2, 3, 5, 4, 6))
    assert not torch.equal(plain, sample(prior, 2, 3, 5, 4, 6, seed=1))
    assert torch.equal(sample(shifted, 2, 3, 5, 4, 6), mean + plain)
    half = sample(prior, 2, 3, 5, 4, 6, dtype=torch.bfloat16)
    assert torch.equal(half, plain.bfloat16())
    # The same process along another dimension.
    first = sample(prior, 5, 40, 50, frame_dim=0)
    assert abs(float((first[0] * first[1]).mean()) - 0.4) < 0.1
    assert abs(float((first[:, 0] * first[:, 1]).mean())) < 0.15


@pytest.mark.parametrize(("beta", "gamma"), [(0.9, 0.95), (1, 1), (1, -1), (0, 0), (2, 1.5)])
def test_indefinite_covariances_are_refused(beta, gamma):
    message = f"beta={beta} and gamma={gamma} give no positive definite covariance over 8 frames"
    prior = vk.NoisePrior(beta, gamma)
    for use in (lambda: prior.covariance(8), lambda: prior.kl(8), lambda: sample(prior, 1, 1, 8)):
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            use()
    bound = float(re.search(r"beta must be above (\S+)$", str(raised.value))[1])
    above, below = bound + 1e-3 * abs(bound) + 1e-4, bound - 1e-3 * abs(bound) - 1e-4
    assert torch.linalg.eigvalsh(expected_covariance(8, above, gamma))[0] > 0
    assert torch.linalg.eigvalsh(expected_covariance(8, below, gamma))[0] < 0


@pytest.mark.parametrize("name", ["beta", "gamma"])
def test_parameters_must_be_finite(name):
    with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
        vk.NoisePrior(**{name: float("nan")})


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, -0.7])
def test_the_least_beta_is_that_of_long_videos(gamma):
    least = noise.min_stable_beta(gamma)
    for frames in (2, 9, 64):
        vk.NoisePrior(least + 1e-6, gamma).covariance(frames)
    if gamma:
        with pytest.raises(ValueError, match="positive definite"):
            vk.NoisePrior(0.99 * least, gamma).covariance(400)


@pytest.mark.parametrize(("beta", "gamma"), FORMS)
def test_the_divergence_is_that_of_the_normal_distributions(beta, gamma):
    mean = torch.randn(3, FRAMES, 2, 2, dtype=torch.float64)
    pixels = mean.movedim(1, -1).reshape(-1, FRAMES)
    normal = MultivariateNormal(pixels, expected_covariance(FRAMES, beta, gamma))
    standard = MultivariateNormal(torch.zeros_like(pixels), torch.eye(FRAMES).double())
    expected = kl_divergence(normal, standard).mean()
    found = vk.NoisePrior(beta, gamma, mean).kl(FRAMES)
    assert found == pytest.approx(float(expected), rel=1e-10, abs=1e-12)
    assert vk.NoisePrior().kl(FRAMES) == 0
    assert found > 0


def test_gradients_of_the_divergence_and_of_samples():
    def number(value):
        return torch.tensor(value, dtype=torch.float64, requires_grad=True)

    standard = torch.randn(2, 2, FRAMES, 2, dtype=torch.float64)
    mean = torch.randn(2, FRAMES, 2, dtype=torch.float64, requires_grad=True)
    for beta, gamma in ((1.0, 0.5), (1.4, -0.3), (0.9, 0.2)):
        arguments = (mean, number(beta), number(gamma))
        assert torch.autograd.gradcheck(lambda *a: noise.correlate(standard, *a), arguments)
        assert torch.autograd.gradcheck(
            lambda *a: noise.kl_to_standard_normal(*a, FRAMES), arguments
        )
    # Where optimisation begins: γ = 0, where powers of it are easily got wrong.
    numbers = number(1.0), number(0.0)
    noise.kl_to_standard_normal(mean, *numbers, FRAMES).backward()
    assert all(n.grad == 0 for n in numbers)
    white = noise.correlate(standard, mean, *numbers)
    assert torch.equal(white, mean + standard)


def test_differentiable_samples_have_the_covariance():
    standard = torch.randn(1, 1, 4, 200, 300, generator=torch.Generator().manual_seed(0))
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (0.9, -0.4))
    frames = noise.correlate(standard, torch.zeros(()), *numbers)[0, 0].flatten(1)
    found = (frames @ frames.T / frames.shape[1]).double()
    torch.testing.assert_close(found, expected_covariance(4, 0.9, -0.4), rtol=0, atol=0.025)


def test_a_seed_gives_the_same_noise_whatever_the_default_type():
    prior, shape = vk.NoisePrior(0.9, 0.3), (1, 4, 6, 2, 2)
    expected = sample(prior, *shape, dtype=torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        with default_dtype(dtype):
            assert torch.equal(sample(prior, *shape, dtype=torch.float32), expected)
