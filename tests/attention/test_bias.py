import math

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.attention.bias import gaussian_table


@pytest.mark.parametrize("frames", [1, 2, 16, 33])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 8.0])
def test_gaussian_is_the_formula(sigma, frames):
    delta = vk.GaussianBias(sigma).matrix(frames)
    expected = [
        [math.exp(-((j - i) ** 2) / (2 * sigma**2)) for j in range(frames)] for i in range(frames)
    ]
    torch.testing.assert_close(delta, torch.tensor(expected), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("sigma", [0, 0.0, 1e-30, 5e-324])
def test_tiny_sigma_is_the_identity(sigma):
    assert torch.equal(vk.GaussianBias(sigma).matrix(5), torch.eye(5))


@pytest.mark.parametrize("sigma", [1e30, math.inf])
def test_huge_sigma_is_all_ones(sigma):
    assert torch.equal(vk.GaussianBias(sigma).matrix(5), torch.ones(5, 5))


def test_gaussian_table_has_no_subnormals():
    table = gaussian_table(1.0, 64)
    assert ((table == 0) | (table >= torch.finfo(torch.float32).tiny)).all()


def test_gaussian_table_is_made_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert gaussian_table(0.123, 5).device.type == "cpu"


def test_toeplitz_is_indexed_by_distance():
    values = torch.tensor([[1.0, 0.5, 0.25], [2.0, 3.0, 4.0]])
    delta = vk.ToeplitzBias(values).matrix(3)
    assert delta.shape == (2, 3, 3)
    for head in range(2):
        for i in range(3):
            for j in range(3):
                assert delta[head, i, j] == values[head, abs(j - i)]


def test_signed_toeplitz_tells_future_from_past():
    values = torch.arange(-3.0, 4.0)  # j - i itself
    delta = vk.ToeplitzBias(values, signed=True).matrix(3)  # L = 4 serves 3 frames too
    assert delta.tolist() == [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]]


def test_dense_is_itself():
    matrix = torch.randn(4, 4)
    assert vk.DenseBias(matrix).matrix(4) is matrix


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vk.GaussianBias(-1.0), "sigma must be at least 0"),
        (lambda: vk.GaussianBias(math.nan), "sigma must be at least 0"),
        (lambda: vk.GaussianBias(1.0, strength=math.inf), "strength must be finite"),
        (lambda: vk.GaussianBias(1.0, stat="rowmax"), "'row_max', 'map_max', 'none'.*'rowmax'"),
        (lambda: vk.GaussianBias(1.0, stat=torch.ones(2).double()), "stat tensor must be float32"),
        (lambda: vk.ToeplitzBias(torch.ones(4), signed=True), "odd length.*length 4"),
        (lambda: vk.ToeplitzBias(torch.ones(2, 3, 4)), r"\(L,\) or \(heads, L\)"),
        (lambda: vk.ToeplitzBias(torch.ones(0)), "at least one distance"),
        (lambda: vk.ToeplitzBias(torch.ones(4, dtype=torch.int64)), "floating point.*int64"),
        (lambda: vk.DenseBias(torch.ones(3, 4)), r"square, got shape \(3, 4\)"),
        (lambda: vk.DenseBias(torch.ones(3)), r"\(N, N\) or \(heads, N, N\)"),
        (lambda: vk.DenseBias(torch.ones(3, 3)).matrix(4), "3 frames, asked for 4"),
        (lambda: vk.ToeplitzBias(torch.ones(3)).matrix(5), "reaches 3 frames.*asked for 5"),
        (lambda: vk.GaussianBias(1.0).matrix(0), "num_frames must be 1 to .*got 0"),
        (lambda: vk.GaussianBias(1.0).matrix(10**400), "num_frames must be.*1329 bits"),
        (lambda: vk.GaussianBias(10**400), "sigma must fit a float.*1329 bits"),
        (lambda: vk.GaussianBias(-(10**400)), "sigma must be at least 0"),
        (lambda: vk.GaussianBias(1.0, strength=10**400), "strength must be finite.*1329 bits"),
        (lambda: vk.GaussianBias(1.0, strength=-1e39), "strength must be finite, in float32 too"),
        (lambda: vk.GaussianBias(1.0, strength=math.nan), "strength must be finite"),
        (lambda: vk.DenseBias(torch.ones(3, 3).to_sparse()), "delta must be an ordinary"),
        (
            lambda: vk.GaussianBias(1.0, stat=torch.ones(2, 2).to_sparse()),
            "stat tensor must be an ordinary",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vk.GaussianBias("1"), "sigma must be a number, got str"),
        (lambda: vk.GaussianBias(True), "sigma must be a number, got bool"),
        (lambda: vk.GaussianBias(1.0, strength=None), "strength must be a number"),
        (lambda: vk.GaussianBias(1.0, stat=3), "stat must be a string or a tensor, got int"),
        (lambda: vk.ToeplitzBias([1.0, 0.5]), "table must be a torch.Tensor, got list"),
        (lambda: vk.DenseBias(1.0), "delta must be a torch.Tensor, got float"),
        (lambda: vk.GaussianBias(1.0, clamp_negative="no"), "clamp_negative must be.*got str"),
        (lambda: vk.GaussianBias(1.0, detach_stat=1), "detach_stat must be True or False, got int"),
        (lambda: vk.ToeplitzBias(torch.ones(3), signed="no"), "signed must be.*got str"),
        (lambda: vk.GaussianBias(1j), "sigma must be a number, got complex"),
        (lambda: vk.GaussianBias(1.0).matrix(5.0), "num_frames must be an integer, got float"),
        (lambda: vk.ToeplitzBias(torch.ones(3)).matrix(True), "num_frames must be an integer"),
    ],
)
def test_wrong_kinds(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_frozen():
    with pytest.raises(AttributeError):
        vk.GaussianBias(1.0).sigma = 2.0
