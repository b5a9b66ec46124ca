"""A model that is let go of is freed, with its attention modules, whatever was on it."""

import gc
import weakref

import pytest
import torch

import vstar_kernels as vk
from tests.models.full3d.test_function_mode import LAYOUT, OwnAttention
from tests.models.full3d.tiny import TINY

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")
RULE = vk.FrameRule.tar(1.0)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What diffusers imports with the first call, and fails to, holds on to the frames above it."""
    with torch.no_grad():
        TINY["wan"].run(TINY["wan"].make())


class Unknown(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = OwnAttention()

    def forward(self, hidden_states, timestep=None):
        return self.attn(hidden_states)


def unknown():
    return Unknown(), {"hidden_states": torch.randn(2, LAYOUT.tokens, 8)}


def known(name):
    return lambda: (TINY[name].make(), TINY[name].call())


def blocks_compiled():
    """Layers that share their code, and a member of diffusers' backends."""
    model = TINY["wan"].make()
    model.compile_repeated_blocks(backend="eager")
    return model, TINY["wan"].call()


# Routes A, A for layers that share, B and C.
MAKE = {
    "backend": known("wan"),
    "shared": blocks_compiled,
    "processor": known("cogvideox"),
    "mode": unknown,
}


def apply(model, layout):
    return vk.apply_frames(model, RULE, layout=layout)


def capture(model, layout):
    return vk.capture_maps(model, layout=layout)


def prompts(model, layout):
    return vk.condition_frames(model, torch.randn(2, 3, 7, 16))


@pytest.mark.parametrize("is_removed", [True, False])
@pytest.mark.parametrize(
    ("kind", "put_on"),
    [
        ("backend", apply),
        ("shared", apply),
        ("processor", apply),
        ("mode", apply),
        ("backend", capture),
        ("processor", capture),
        ("mode", capture),
        ("backend", prompts),
    ],
)
def test_a_model_is_freed(kind, put_on, is_removed):
    model, call = MAKE[kind]()
    parts = [weakref.ref(part) for part in model.modules()]
    handle = put_on(model, LAYOUT if kind == "mode" else None)
    if kind != "shared":  # compiling takes seconds, and keeps nothing of ours
        with torch.no_grad():
            model(**call)
    if is_removed:
        handle.remove()
    del model, call, handle
    gc.collect()
    assert not [type(part()).__name__ for part in parts if part() is not None]
