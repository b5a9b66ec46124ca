"""Forward passes under a rule: in several threads, interrupted, and while a handle is removed."""

import gc
import threading

import pytest
import torch

import vstar_kernels as vk
from tests.models.full3d.tiny import TINY

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from tests.models.test_signals import Interrupt, interrupted_at, lines_of
from tests.models.test_threads import together
from vstar_kernels.models.full3d.families import find_family
from vstar_kernels.models.full3d.seats import FrameChange
from vstar_kernels.models.hooks import Hooks

pytestmark = pytest.mark.usefixtures("one_thread")
WAIT = 20  # seconds, for a test that would hang
RULE = vk.FrameRule.tar(1.0)
WAN, COGVIDEOX = TINY["wan"], TINY["cogvideox"]
routes = pytest.mark.parametrize("tiny", [WAN, COGVIDEOX], ids=["backend", "processor"])


def layers_of(model):
    return find_family(model).find_layers(model)


class InStep:
    """Lets forward passes of several threads enter each layer together."""

    def __init__(self, model, parties):
        self._hooks = Hooks()
        barrier = threading.Barrier(parties)

        def before(*_):
            barrier.wait(WAIT)

        def after(*_):
            barrier.wait(WAIT)

        for layer in layers_of(model):
            self._hooks.before(layer.module, before)
            self._hooks.after(layer.module, after)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._hooks.remove()


@routes
def test_passes_of_several_steps_and_lengths_at_a_time(tiny):
    model = tiny.make()
    rules = (RULE, None, vk.FrameRule.window(0))
    runs = [(0, 3), (1, 4), (2, 3), (0, 5)]
    with vk.apply_frames(model, lambda step, timestep: rules[step]) as handle:

        def run(step, frames):
            handle.step = step
            return tiny.run(model, frames)

        expected = [run(*args) for args in runs]
        handle.step = None
        with InStep(model, len(runs)):
            for _ in range(2):
                found = together(*(lambda args=args: run(*args) for args in runs))
                for out, wanted in zip(found, expected, strict=True):
                    assert torch.equal(out, wanted)


@routes
def test_a_handle_removed_while_another_thread_runs(tiny):
    model = tiny.make()
    stock = tiny.run(model)
    handle = vk.apply_frames(model, RULE)
    inside, removed = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        removed.wait(WAIT)

    hook = layers_of(model)[1].module.register_forward_pre_hook(wait)

    def remove():
        inside.wait(WAIT)
        handle.remove()
        removed.set()

    out, _ = together(lambda: tiny.run(model), remove)
    hook.remove()
    assert isinstance(out, RuntimeError)
    assert "apply_frames was removed from this" in str(out)
    assert torch.equal(tiny.run(model), stock)


@routes
def test_a_handle_put_on_while_another_thread_runs(tiny):
    model = tiny.make()
    inside, put_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        put_on.wait(WAIT)

    hook = layers_of(model)[0].module.register_forward_pre_hook(wait)

    def put():
        inside.wait(WAIT)
        handle = vk.apply_frames(model, RULE)
        put_on.set()
        return handle

    out, handle = together(lambda: tiny.run(model), put)
    hook.remove()
    assert isinstance(out, RuntimeError)
    assert "apply_frames was put on this" in str(out)
    handle.remove()
    with vk.apply_frames(model, RULE), pytest.raises(RuntimeError, match="not its forward"):
        model.forward(**tiny.call())


def state(model):
    """All of a model that a handle may touch."""
    return [
        (
            type(module),
            sorted(vars(module)),
            len(module._forward_pre_hooks),
            id(getattr(module, "processor", None)),
            dict(getattr(getattr(module, "processor", None), "__dict__", {})),
        )
        for module in model.modules()
    ]


def apply(model):
    return vk.apply_frames(model, RULE)


@routes
def test_an_application_that_is_interrupted_leaves_nothing(tiny):
    model = tiny.make()
    stock, before = tiny.run(model), state(model)
    for place in lines_of(lambda: apply(model).remove()):
        handle = None
        try:
            with interrupted_at(place, {}):
                handle = apply(model)
        except Interrupt:
            assert handle is None
        else:
            handle.remove()
        assert state(model) == before, place
    assert torch.equal(tiny.run(model), stock)


@routes
def test_a_removal_that_is_interrupted_can_be_run_again(tiny):
    model = tiny.make()
    before = state(model)
    for place in lines_of(apply(model).remove):
        handle = apply(model)
        try:
            with interrupted_at(place, {}):
                handle.remove()
        except Interrupt:
            pass
        handle.remove()
        assert state(model) == before, place


@routes
def test_a_forward_pass_that_is_interrupted_leaves_nothing(tiny):
    model = tiny.make()
    stock = tiny.run(model)
    with apply(model):
        expected = tiny.run(model)
        before = state(model)
        for place in lines_of(lambda: tiny.run(model)):
            try:
                with interrupted_at(place, {}):
                    tiny.run(model)
            except Interrupt:
                assert state(model) == before, place
        with pytest.raises(RuntimeError, match=r"not its forward"):
            model.forward(**tiny.call())
        assert torch.equal(tiny.run(model), expected)
    assert torch.equal(tiny.run(model), stock)


def changes():
    gc.collect()
    return {id(x) for x in gc.get_objects() if type(x) is FrameChange}


def test_nothing_of_a_forward_pass_is_kept():
    tiny = TINY["hunyuan"]
    model = tiny.make()
    before = changes()
    with apply(model):
        tiny.run(model)
        assert changes() <= before


@pytest.mark.parametrize("order", ["apply, capture", "capture, apply"])
@pytest.mark.parametrize("first", ["apply", "capture"])
@routes
def test_a_rule_and_maps_come_and_go_in_any_order(tiny, order, first):
    model = tiny.make()
    stock, before = tiny.run(model), state(model)
    make = {
        "apply": lambda: vk.apply_frames(model, RULE, layers=[0]),
        "capture": lambda: vk.capture_maps(model),
    }
    handles = {name: make[name]() for name in order.split(", ")}
    changed = tiny.run(model)
    handles.pop(first).remove()
    assert torch.equal(tiny.run(model), stock if first == "apply" else changed)
    handles.popitem()[1].remove()
    assert state(model) == before
    assert torch.equal(tiny.run(model), stock)
