"""Interrupts: whatever stops a forward pass, an application or a removal, the model is put back.

A signal can arrive between any two statements. First it arrives, as an exception, at each line of
what handles run, in turn; then real signals arrive in forward passes and in what calls them.
"""

import functools
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import vstar_kernels as vk
from tests.models.models import KINDS, TEXT, TOKENS, call, make, noise

pytest.importorskip("diffusers")
import diffusers

import vstar_kernels.models
from tests.models.test_threads import assert_stock
from vstar_kernels.models import classes, forwards, regularized, text
from vstar_kernels.models.front_end import temporal_layers

pytestmark = pytest.mark.usefixtures("one_thread")
MOTION, SPARSE, LATTE = "UNetMotionModel", "SparseControlNetModel", "LatteTransformer3DModel"
FRAMES = {MOTION: 17, SPARSE: 17, LATTE: 9}  # beyond the positions
PACKAGE = str(Path(vstar_kernels.models.__file__).parent)


def apply_tar(model):
    return vk.apply_tar(model, vk.TARConfig(1.0, steps=None), extend_positions=True)


HANDLES = {
    "apply_tar": apply_tar,
    "capture_maps": vk.capture_maps,
    "condition_frames": lambda model: vk.condition_frames(model, noise(6, TOKENS, TEXT)),
}
# apply_tar has more to put back in the one than in the other; the others do the same in both.
# They are small: all of a model is looked at for every line.
each = pytest.mark.parametrize(
    ("kind", "name"),
    [("apply_tar", SPARSE), *((kind, LATTE) for kind in HANDLES)],
)


@pytest.fixture(autouse=True)
def free_locks():
    """What is interrupted holds no lock of all models: other threads would wait for good."""
    yield
    for module in (classes, forwards, text, regularized):
        for name, lock in vars(module).items():
            if isinstance(lock, type(threading.RLock())):
                assert not lock._is_owned(), f"{module.__name__}.{name}"


class Interrupt(BaseException):
    """What a signal handler raises."""


@contextmanager
def interrupted_at(place, places):
    """Raises at a line of the package that has not been reached before; notes all that are.

    Args:
        place: The file and line, None for nowhere.
        places: Takes the lines that were reached, in order.
    """

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            here = frame.f_code.co_filename, frame.f_lineno
            places[here] = None
            if here == place:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(job):
    """The lines of the package that a job runs."""
    places = {}
    with interrupted_at(None, places):
        job()
    assert len(places) > 10
    return list(places)


def frames(kind, name):
    return FRAMES[name] if kind == "apply_tar" else 6


def state(model):
    """All of a model that handles may touch, by the module's name."""
    return {name: state_of_module(module) for name, module in model.named_modules()}


def state_of_module(module):
    processor = vars(module).get("processor", module._modules.get("processor"))
    return (
        type(module),
        sorted(vars(module)),  # a forward of its own among them
        (len(module._forward_hooks), len(module._forward_pre_hooks)),
        id(processor),
        {name: None if x is None else tuple(x.shape) for name, x in module._buffers.items()},
    )


@each
def test_an_application_that_is_interrupted_leaves_nothing(kind, name):
    model = make(name)
    before = state(model)
    places = lines_of(lambda: HANDLES[kind](model).remove())
    for place in places:
        handle = None
        try:
            with interrupted_at(place, {}):
                handle = HANDLES[kind](model)
        except Interrupt:
            assert handle is None
        else:
            handle.remove()
        assert state(model) == before, place
    assert_stock(model)


@each
def test_a_removal_that_is_interrupted_can_be_run_again(kind, name):
    model = make(name)
    before = state(model)
    places = lines_of(HANDLES[kind](model).remove)
    for place in places:
        handle = HANDLES[kind](model)
        during = state(model)
        try:
            with interrupted_at(place, {}):
                handle.remove()
        except Interrupt:
            assert state(model) in (during, before), place  # not begun, or done all the same
        handle.remove()
        assert state(model) == before, place


@each
def test_a_forward_pass_that_is_interrupted_leaves_nothing(kind, name):
    """Neither in the model nor in the thread, while the handle is on."""
    model, more = make(name), {"frames": frames(kind, name)}
    stock = call(model, name)
    with HANDLES[kind](model) as handle:
        expected = call(model, name, **more)
        all_maps = handle.maps if kind == "capture_maps" else []
        before = state(model)
        places = lines_of(lambda: call(model, name, **more))
        for place in places:
            if kind == "capture_maps":
                handle.clear()
            try:
                with interrupted_at(place, {}):
                    call(model, name, **more)
            except Interrupt:
                assert state(model) == before, place
                if kind == "capture_maps":  # all of them, or none
                    assert len(handle.maps) in (0, len(all_maps))
        if kind != "capture_maps":
            inputs = KINDS[name].inputs(noise(1, 4, 6, 8, 8))
            with pytest.raises(RuntimeError, match=r"not its forward"):
                model.forward(**inputs, timestep=torch.tensor([10]))
        assert torch.equal(call(model, name, **more), expected)
    assert torch.equal(call(model, name), stock)


# Real signals. Python runs their handler in the main thread, before the next statement.


@pytest.fixture
def interrupts():
    """A shell that starts the tests in the background has interrupts ignored: here they are not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def hooked(module, hook):
    """Runs a hook before a module's forward."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def assert_interrupted(job, at):
    """Runs a job, and interrupts it when it calls a module."""
    with hooked(at, interrupt), pytest.raises(KeyboardInterrupt):
        job()


@pytest.mark.parametrize("name", [MOTION, LATTE])
@pytest.mark.usefixtures("interrupts")
def test_a_signal_in_a_forward_pass(name):
    model = make(name)
    stock, before = call(model, name), state(model)
    layer = temporal_layers(model)[-1].module

    def run():
        return call(model, name, frames=FRAMES[name])

    with apply_tar(model):
        during = state(model)
        expected = run()
        assert_interrupted(run, layer)
        assert state(model) == during
        assert torch.equal(run(), expected)
        assert_interrupted(run, layer)
    assert state(model) == before
    assert torch.equal(call(model, name), stock)


@pytest.mark.usefixtures("interrupts")
def test_a_signal_while_another_thread_runs_the_model():
    """The main thread is interrupted in its pass; the other thread's goes on as it began."""
    model = make(LATTE)
    before = state(model)
    inside, go_on = threading.Event(), threading.Event()
    results = []

    def stop(*_):
        if threading.current_thread() is threading.main_thread():
            assert inside.wait(60)
            interrupt()
        else:
            inside.set()
            go_on.wait(60)

    with apply_tar(model):
        expected = call(model, LATTE, frames=9)
        thread = threading.Thread(target=lambda: results.append(call(model, LATTE, frames=9)))
        with hooked(model.temporal_transformer_blocks[0], stop):
            thread.start()
            try:
                with pytest.raises(KeyboardInterrupt):
                    call(model, LATTE, frames=7)
            finally:
                go_on.set()
                thread.join(60)
        assert torch.equal(results[0], expected)
    assert state(model) == before


@pytest.mark.usefixtures("interrupts")
def test_a_signal_in_optimize_noise():
    """In the forward pass, in what the backward pass calls again, and at the very end."""
    name = "UNet3DConditionModel"
    model = make(name).requires_grad_(True)
    before, stock = state(model), call(model, name)
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(4)
    layer = temporal_layers(model)[5].module.to_q
    calls = []

    def optimise(stop_at=None):
        def count(*_):
            calls.append(1)
            if len(calls) == stop_at:
                interrupt()

        calls.clear()
        with hooked(layer, count):
            return vk.optimize_noise(
                model,
                torch.eye(6),
                (1, 4, 6, 8, 8),
                {"encoder_hidden_states": noise(1, TOKENS, TEXT, seed=1)},
                scheduler=scheduler,
                iterations=2,
                progress=False,
                generator=torch.Generator().manual_seed(0),
            )

    expected = optimise()
    total = len(calls)
    assert total >= 5
    for place in range(1, total + 1):
        with pytest.raises(KeyboardInterrupt):
            optimise(place)
        assert state(model) == before
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(optimise().noise, expected.noise)
    assert torch.equal(call(model, name), stock)


@pytest.mark.usefixtures("interrupts")
def test_a_signal_in_a_whole_call():
    pytest.importorskip("transformers")
    from examples import tiny

    pipe = tiny.animatediff()
    pipe.set_progress_bar_config(disable=True)
    before, encoder = state(pipe.unet), sorted(vars(pipe.text_encoder))
    vstar = vk.VSTAR(pipe, vk.TARConfig(1.0), extend_positions=True)
    seeds = torch.get_rng_state()

    def make_video():
        return vstar(
            "a cat",
            num_frames=33,
            seed=1,
            maps=True,
            num_inference_steps=2,
            height=16,
            width=16,
            output_type="pt",
        ).frames

    expected = make_video()
    for place in (pipe.text_encoder, pipe.unet.conv_in, pipe.unet.conv_out, pipe.vae.decoder):
        assert_interrupted(make_video, place)
        assert state(pipe.unet) == before
        assert sorted(vars(pipe.text_encoder)) == encoder
        assert torch.equal(torch.get_rng_state(), seeds)
    assert torch.equal(make_video(), expected)


@pytest.mark.usefixtures("interrupts")
def test_a_signal_in_generate(tmp_path, monkeypatch):
    for package in ("av", "openai", "transformers", "tyro"):
        pytest.importorskip(package)
    from examples import tiny
    from vstar_kernels.cli.main import main

    model, output = tmp_path / "model", tmp_path / "output"
    tiny.text_to_video().save_pretrained(str(model))
    forward, calls = diffusers.UNet3DConditionModel.forward, []

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        calls.append(1)
        interrupt()
        return out

    monkeypatch.setattr(diffusers.UNet3DConditionModel, "forward", run)
    options = {"--model": model, "--output": output, "--frames": 3, "--steps": 2}
    words = [str(word) for option in options.items() for word in option]
    assert main(["generate", *words, "--prompt", "a kite"]) == 130
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == [model]
