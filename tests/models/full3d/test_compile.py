"""Models under a rule and torch.compile, in whole graphs."""

import pytest
import torch

import vstar_kernels as vk
from tests.models.full3d.tiny import TINY

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 0.0, "atol": 3e-6}
RULES = (vk.FrameRule.tar(1.0), None, vk.FrameRule.tar(1.0) + vk.FrameRule.window(1))


def rule(step, timestep):
    """A new object each time, as a rule that turns with the steps is."""
    found = RULES[step]
    return None if found is None else found + vk.FrameRule()


@pytest.fixture(autouse=True)
def inference():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def whole(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def in_place(model):
    model.compile(backend="eager", fullgraph=True)
    return model


def in_blocks(model):
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    return model


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


CASES = [
    ("wan", whole, "before"),
    ("wan", in_place, "before"),
    ("wan", in_blocks, "before"),
    ("hunyuan", in_blocks, "after"),
    ("skyreels-v2-ar", whole, "after"),
    ("cosmos-3", in_blocks, "after"),
]


@pytest.mark.parametrize(("name", "compile_", "when"), CASES)
def test_steps_and_rules(name, compile_, when):
    tiny = TINY[name]
    # Tracing is slow: one block where it is not the blocks that are compiled.
    model = tiny.make() if compile_ is in_blocks else tiny.make(num_layers=1)
    stock = tiny.run(model)
    with vk.apply_frames(model, rule) as handle:
        expected = {}
        for handle.step in range(3):
            expected[handle.step] = tiny.run(model)
    runner = model
    if when == "before":
        runner = compile_(model)
        tiny.run(runner)
    with vk.apply_frames(model, rule) as handle:
        if when == "after":
            runner = compile_(model)
        for handle.step in (0, 1, 2):
            torch.testing.assert_close(tiny.run(runner), expected[handle.step], **CLOSE)
        before = graphs()
        for handle.step in (1, 0, 2, 0):
            torch.testing.assert_close(tiny.run(runner), expected[handle.step], **CLOSE)
        assert graphs() == before
    torch.testing.assert_close(tiny.run(runner), stock, **CLOSE)


def test_another_length_is_compiled_anew():
    tiny = TINY["wan"]
    model = tiny.make()
    with vk.apply_frames(model, RULES[0]):
        expected = {frames: tiny.run(model, frames) for frames in (3, 4)}
        runner = whole(model)
        for frames in (3, 4, 3):
            torch.testing.assert_close(tiny.run(runner, frames), expected[frames], **CLOSE)


def test_as_many_layers_as_blocks_are_one_graph():
    """More layers than torch.compile would compile a block for."""
    tiny = TINY["wan"]
    model = tiny.make(num_layers=10)
    with vk.apply_frames(model, RULES[0], layers=range(5, 10)):
        expected = tiny.run(model)
        in_blocks(model)
        before = graphs()
        torch.testing.assert_close(tiny.run(model), expected, **CLOSE)
        assert graphs() - before == 2  # those that follow the rule, and the others


def test_layers_of_several_sequences_in_compiled_blocks():
    tiny = TINY["motif"]
    model = tiny.make()
    with vk.apply_frames(model, RULES[0]):
        expected = tiny.run(model)
        for blocks in (model.transformer_blocks, model.single_transformer_blocks):
            for block in blocks:
                block.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(tiny.run(model), expected, **CLOSE)
