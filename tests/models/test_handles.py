"""A handle that was removed is not entered again, of every kind that there is."""

import contextlib
import importlib
import pkgutil

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
import vstar_kernels.methods
import vstar_kernels.models
from tests.models.full3d.tiny import TINY
from tests.models.models import make
from vstar_kernels.models.hooks import Handle

UNET = "UNet3DConditionModel"
pytestmark = pytest.mark.usefixtures("one_thread")


def kinds(cls=Handle):
    for kind in cls.__subclasses__():
        yield kind
        yield from kinds(kind)


def wan():
    return TINY["wan"].make()


@pytest.mark.parametrize(
    "apply",
    [
        lambda: vk.apply_tar(make(UNET), vk.TARConfig(1.0, steps=None)),
        lambda: vk.capture_maps(make(UNET)),
        lambda: vk.condition_frames(make(UNET), torch.zeros(4, 3, 32)),
        lambda: vk.apply_frames(wan(), vk.FrameRule()),
        lambda: vk.condition_frames(wan(), torch.zeros(4, 3, 32)),
    ],
)
@pytest.mark.parametrize("by_statement", [True, False])
def test_a_handle_that_was_removed_is_not_entered_again(apply, by_statement):
    handle = apply()
    if by_statement:
        with handle:
            pass
    else:
        handle.remove()
    with pytest.raises(RuntimeError, match=f"this {type(handle).__name__} was removed"), handle:
        pass


def test_every_kind_knows_that_it_was_removed():
    for package in (vstar_kernels.models, vstar_kernels.methods):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found = set(kinds())
    assert len(found) >= 14
    for kind in found:
        handle = kind.__new__(kind)  # of nothing, so what follows fails
        with contextlib.suppress(AttributeError):
            handle.remove()
        with pytest.raises(RuntimeError, match="was removed"):
            handle.__enter__()
