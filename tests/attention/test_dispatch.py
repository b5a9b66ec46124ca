import warnings

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.attention import cpu, dispatch, native
from vstar_kernels.testing import inputs

Q, K, V = inputs(2, 6, 3, 8)
BIAS = vk.GaussianBias(1.0)


@pytest.fixture
def no_library(monkeypatch):
    """As where the package was built without a compiler."""
    missing = native.Native(native.DIRECTORY, problems=["no native library: built without one"])
    monkeypatch.setattr(cpu.native, "load", lambda: missing)
    dispatch._warn_once.cache_clear()
    yield
    dispatch._warn_once.cache_clear()


def test_available_names_every_backend():
    assert list(vk.backends.available()) == ["cpu", "triton", "reference", "composed"]
    assert vk.backends.available()["reference"] == []


def test_automatic_choice_is_the_kernel(isa, monkeypatch):
    calls = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda call, **_: calls.append(call) or forward(call))
    vk.tar_attention(Q, K, V, BIAS)
    assert len(calls) == 1


@pytest.mark.usefixtures("no_library")
def test_without_the_library_it_warns_once_and_runs():
    with pytest.warns(vk.SlowBackendWarning, match="built without one"):
        out = vk.tar_attention(Q, K, V, BIAS)
    assert torch.equal(out, vk.reference.tar_attention(Q, K, V, BIAS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vk.tar_attention(Q, K, V, BIAS)
        vk.tar_attention(Q, K, V, BIAS, backend="reference")


@pytest.mark.usefixtures("no_library")
def test_explicit_choice_never_falls_back():
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run.*\n.*built without one"):
        vk.tar_attention(Q, K, V, BIAS, backend="cpu")
    assert vk.backends.available()["cpu"] == ["no native library: built without one"]


def test_every_reason_is_listed(isa):
    q = Q.double().mT.contiguous().mT
    with pytest.raises(ValueError) as error:
        vk.tar_attention(q, K.double(), V.double(), BIAS, return_map=True, backend="cpu")
    message = str(error.value)
    for part in [
        "query is torch.float64",
        "query has stride 3 in it",
        "query: (2, 6, 3, 8)",
        "GaussianBias",
    ]:
        assert part in message


def test_why_not_gives_the_reasons_of_every_backend(isa):
    assert vk.backends.why_not(Q, K, V, BIAS)["cpu"] == []
    double = [x.double() for x in (Q, K, V)]
    reasons = vk.backends.why_not(*double, BIAS, return_map=True)
    assert list(reasons) == ["cpu", "triton", "reference"]
    assert "query is torch.float64" in reasons["cpu"][0]
    assert reasons["reference"] == []
    with pytest.raises(ValueError, match="key must have query's shape"):
        vk.backends.why_not(Q, K[:1], V, BIAS)
