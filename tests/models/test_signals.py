"""Interrupts: whatever stops a forward pass, an application or a removal, the model is put back.

A signal can arrive between any two statements. Here it arrives at each line of what handles run, in
turn; and real ones in processes of their own.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import vstar_kernels as vk
from tests.helpers import run_python
from tests.models.models import TEXT, TOKENS, call, make, noise

pytest.importorskip("diffusers")

import vstar_kernels.models
from tests.models.test_threads import assert_stock

pytestmark = pytest.mark.usefixtures("one_thread")
MOTION, LATTE = "UNetMotionModel", "LatteTransformer3DModel"
FRAMES = {MOTION: 17, LATTE: 9}  # beyond the positions
PACKAGE = str(Path(vstar_kernels.models.__file__).parent)


def apply_tar(model):
    return vk.apply_tar(model, vk.TARConfig(1.0, steps=None), extend_positions=True)


HANDLES = {
    "apply_tar": apply_tar,
    "capture_maps": vk.capture_maps,
    "condition_frames": lambda model: vk.condition_frames(model, noise(6, TOKENS, TEXT)),
}
each = pytest.mark.parametrize("kind", HANDLES)
both = pytest.mark.parametrize("name", [MOTION, LATTE])


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
    """All of a model that handles may touch."""
    return {
        "class": {key: type(module) for key, module in model.named_modules()},
        "own": {key: sorted(vars(module)) for key, module in model.named_modules()},
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()
        ],
        "processors": {
            key: id(module.processor)
            for key, module in model.named_modules()
            if hasattr(module, "processor")
        },
        "buffers": {key: tuple(buffer.shape) for key, buffer in model.named_buffers()},
        "forward": [key for key, module in model.named_modules() if "forward" in vars(module)],
    }


@each
@both
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
@both
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
@both
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
            with pytest.raises(RuntimeError, match=r"not its forward"):
                model.forward(*arguments(name))
        assert torch.equal(call(model, name, **more), expected)
    assert torch.equal(call(model, name), stock)


def arguments(name):
    sample = noise(1, 4, 6, 8, 8)
    text = noise(6 if name == MOTION else 1, TOKENS, TEXT)
    return (sample, torch.tensor([10]), text)


@pytest.fixture(scope="module")
def results():
    """What :mod:`tests.models.interrupted` finds, where signals are real ones."""
    for package in ("av", "openai", "transformers", "tyro"):
        pytest.importorskip(package)
    child = run_python(
        "import runpy; runpy.run_module('tests.models.interrupted', run_name='__main__')"
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_a_signal_in_a_forward_pass(results):
    assert results["in_a_forward_pass"] == {MOTION: [True] * 5, LATTE: [True] * 5}


def test_a_signal_while_another_thread_runs_the_model(results):
    """The main thread is interrupted in its pass; the other thread's goes on as it began."""
    assert results["while_another_thread_runs_the_model"] == [True] * 3


def test_a_signal_in_optimize_noise(results):
    """In the forward pass, in what the backward pass calls again, and at the very end."""
    total, ok = results["in_optimize_noise"]
    assert total >= 5
    assert all(ok)


def test_a_signal_in_a_whole_call(results):
    assert results["in_a_whole_call"] == [True] * 17


def test_a_signal_in_generate(results):
    assert results["in_generate"] == [130, 1, ["model"]]
