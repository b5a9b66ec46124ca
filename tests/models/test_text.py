"""Texts that frames share are projected once: how many rows, the same bits, and when it is off."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import vstar_kernels as vk

pytest.importorskip("diffusers")

from tests.models import models
from vstar_kernels.models import text as shared
from vstar_kernels.models.front_end import cross_layers

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES, TOKENS = 6, 32  # so many that two rows of the text are a product of FEWEST_ROWS
NAMES = ("UNet3DConditionModel", "I2VGenXLUNet", "LatteTransformer3DModel")
TAR = vk.TARConfig(1.0, steps=None)


@pytest.fixture(scope="module", params=NAMES)
def model(request, one_thread):
    return models.make(request.param)


@pytest.fixture(scope="module")
def unet(one_thread):
    return models.make("UNet3DConditionModel")


def texts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, TOKENS, models.TEXT, generator=generator)


def call(model, text):
    name, batch = type(model).__name__, len(text)
    inputs = models.KINDS[name].inputs(models.noise(batch, 4, FRAMES, 4, 4, seed=7))
    inputs |= {"timestep": torch.tensor([3]).expand(batch), "encoder_hidden_states": text}
    return model(**inputs, return_dict=False)[0]


def counted(model, text, monkeypatch):
    """The model's output, and how many rows of text each projection was given."""
    rows, modules = [], set()
    for layer in cross_layers(model):
        modules |= {layer.module.to_k, layer.module.to_v}
    linear = nn.Linear.forward

    def forward(module, x):
        if module in modules:
            rows.append(len(x))
        return linear(module, x)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.Linear, "forward", forward)
        return call(model, text), rows


def without(model, text, monkeypatch):
    """The same with all rows."""
    with monkeypatch.context() as patch:
        patch.setattr(shared, "FEWEST_ROWS", 10**9)
        found, rows = counted(model, text, monkeypatch)
    assert set(rows) == {len(text) * FRAMES}
    return found


def has_hooks(model):
    return any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ---- how many rows, and the same bits ----


@pytest.mark.parametrize("batch", [2, 3])
def test_under_tar_each_text_is_projected_once(model, batch, monkeypatch):
    text = texts(batch)
    with vk.apply_tar(model, TAR):
        found, rows = counted(model, text, monkeypatch)
        assert rows == [batch] * (2 * len(list(cross_layers(model))))
        assert torch.equal(found, without(model, text, monkeypatch))
    assert not has_hooks(model)


def test_one_text_is_not_even_copied(unet, monkeypatch):
    monkeypatch.setattr(shared, "FEWEST_ROWS", TOKENS)
    strides = []
    to_k = next(iter(cross_layers(unet))).module.to_k
    with vk.apply_tar(unet, TAR):
        handle = to_k.register_forward_hook(lambda *call: strides.append(call[-1].stride(0)))
        _, rows = counted(unet, texts(1), monkeypatch)
        handle.remove()
    assert set(rows) == {1}
    assert strides == [0]


def test_frame_prompts_are_projected_once_for_each_run_of_equal_ones(model, monkeypatch):
    stages = texts(3)
    embeddings = stages[[0, 0, 0, 1, 2, 2]]
    text = texts(2, seed=1)
    with vk.condition_frames(model, embeddings):
        found, rows = counted(model, text, monkeypatch)
        assert set(rows) == {1 + 3}
        assert torch.equal(found, without(model, text, monkeypatch))
    with vk.condition_frames(model, embeddings, negative=stages[:1].expand(FRAMES, -1, -1)):
        assert set(counted(model, text, monkeypatch)[1]) == {1 + 3}
    assert not has_hooks(model)


def test_frame_prompts_that_are_changed_in_place(unet, monkeypatch):
    """What was equal when the handle was made may have been changed in place since."""
    embeddings, text = texts(1).repeat(FRAMES, 1, 1), texts(2, seed=1)
    with vk.condition_frames(unet, embeddings):
        assert set(counted(unet, text, monkeypatch)[1]) == {2}
        embeddings[3] += 1
        found, rows = counted(unet, text, monkeypatch)
        assert set(rows) == {1 + FRAMES}
        assert torch.equal(found, without(unet, text, monkeypatch))


def test_two_handles_in_any_order(unet, monkeypatch):
    embeddings, text = texts(FRAMES), texts(2, seed=1)
    tar = vk.apply_tar(unet, TAR)
    with vk.condition_frames(unet, embeddings):
        found, rows = counted(unet, text, monkeypatch)
        assert set(rows) == {1 + FRAMES}
        assert torch.equal(found, without(unet, text, monkeypatch))
        tar.remove()
        assert set(counted(unet, text, monkeypatch)[1]) == {1 + FRAMES}
        with vk.apply_tar(unet, TAR):
            assert torch.equal(counted(unet, text, monkeypatch)[0], found)
    assert not has_hooks(unet)


def test_gradients_and_checkpoints(monkeypatch):
    """Layers that are called again do what they did the first time."""
    found, latte = [], models.make("LatteTransformer3DModel")
    for fewest, checkpoints in ((10**9, False), (64, False), (64, True)):
        monkeypatch.setattr(shared, "FEWEST_ROWS", fewest)
        text = texts(2).requires_grad_()
        if checkpoints:
            latte.enable_gradient_checkpointing()
        with vk.apply_tar(latte, TAR):
            found.append(torch.autograd.grad(call(latte, text).square().sum(), text)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


# ---- when it is off ----


def assert_projects_all(model, monkeypatch, rows=2 * FRAMES):
    """As the model without a handle does, with the same bits as with one."""
    text = texts(2)
    with vk.apply_tar(model, TAR):
        found, given = counted(model, text, monkeypatch)
        assert set(given) == {rows}
        with monkeypatch.context() as patch:
            patch.setattr(shared, "FEWEST_ROWS", 10**9)
            assert torch.equal(found, counted(model, text, monkeypatch)[0])


def test_another_text_of_somebody_elses(unet, monkeypatch):
    """Of a hook that comes before or after, in a tensor of its own or in the model's."""

    def own(block, args, kwargs):
        context = kwargs["encoder_hidden_states"]
        noise = torch.arange(len(context)).view(-1, 1, 1)
        return args, {**kwargs, "encoder_hidden_states": context + noise}

    def in_place(block, args, kwargs):
        kwargs["encoder_hidden_states"] += torch.arange(2 * FRAMES).view(-1, 1, 1)

    blocks = shared.text_blocks(unet)
    for hook, some in ((own, blocks), (in_place, blocks[:1])):
        handles = [x.register_forward_pre_hook(hook, with_kwargs=True) for x in some]
        assert_projects_all(unet, monkeypatch)
        for handle in handles:
            handle.remove()


def test_a_forward_of_somebody_elses(unet, monkeypatch):
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda *args, **kwargs: forward(*args, **kwargs))
    assert_projects_all(unet, monkeypatch)


def test_a_projection_that_drops_out(unet):
    module = next(iter(cross_layers(unet))).module

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.dropout, self.rows = base, nn.Dropout(0.5), []

        def forward(self, x):
            self.rows.append(len(x))
            return self.base(self.dropout(x))

    module.to_k = adapted = Adapted(module.to_k)
    was_training = unet.training
    with torch.no_grad(), vk.apply_tar(unet, TAR):
        call(unet.train(), texts(2))
        call(unet.eval(), texts(2))
    module.to_k = adapted.base
    unet.train(was_training)
    assert adapted.rows == [2 * FRAMES, 2]


def test_a_text_of_few_tokens(unet, monkeypatch):
    monkeypatch.setattr(shared, "FEWEST_ROWS", 2 * TOKENS + 1)
    assert_projects_all(unet, monkeypatch)


def test_layers_and_steps_that_are_left_to_the_model(unet, monkeypatch):
    with vk.apply_tar(unet, TAR, stock_elsewhere=True):
        assert set(counted(unet, texts(2), monkeypatch)[1]) == {2 * FRAMES}


def test_fused_projections(unet, monkeypatch):
    text = texts(2)
    with vk.apply_tar(unet, TAR), torch.no_grad():
        expected = call(unet, text)
        unet.fuse_qkv_projections()
        torch.testing.assert_close(call(unet, text), expected, rtol=1e-4, atol=2e-5)
        unet.unfuse_qkv_projections()
        assert set(counted(unet, text, monkeypatch)[1]) == {2}


def test_compiled_code_projects_all(unet):
    """A layer that is compiled by itself, in a model that is not."""
    model, text = copy.deepcopy(unet), texts(2)
    layer = next(iter(cross_layers(model))).module
    layer.compile(backend="eager")
    given = []
    to_k = layer.to_k.forward
    layer.to_k.forward = lambda x: (given.append(len(x)), to_k(x))[1]
    with torch.no_grad(), vk.apply_tar(model, TAR):
        found = call(model, text)
        assert set(given) == {2 * FRAMES}
        layer._compiled_call_impl = None
        torch.testing.assert_close(found, call(model, text), rtol=1e-4, atol=2e-5)
        assert given[-1] == 2
    torch.compiler.reset()


# ---- copies and threads ----


def test_a_copy_of_the_model_has_hooks_that_do_nothing(unet, monkeypatch):
    text = texts(2)
    with vk.condition_frames(unet, texts(FRAMES)) as prompts:
        prompts.remove()  # which cannot be copied
        with vk.apply_tar(unet, TAR) as handle:
            made = [copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))]
            handle.remove()
    for other in made:
        with vk.apply_tar(other, TAR):
            found, rows = counted(other, text, monkeypatch)
            assert set(rows) == {2}
            assert torch.equal(found, without(other, text, monkeypatch))


def test_removed_while_the_model_runs_in_another_thread(unet):
    """Inside of a projection: its rows are repeated all the same."""
    layer = next(iter(cross_layers(unet)))
    begun, go_on = threading.Event(), threading.Event()
    found = []

    def run():
        with torch.no_grad():
            found.append(call(unet, texts(2)))

    handle = vk.condition_frames(unet, texts(1).expand(FRAMES, -1, -1))
    wait = layer.module.to_k.register_forward_pre_hook(lambda *_: (begun.set(), go_on.wait(30))[:0])
    thread = threading.Thread(target=lambda: contained(run, found))
    thread.start()
    assert begun.wait(30)
    handle.remove()
    wait.remove()
    go_on.set()
    thread.join()
    assert "was removed from this UNet3DConditionModel while it ran" in str(found[-1])
    assert not has_hooks(unet)


def contained(run, found):
    try:
        run()
    except RuntimeError as error:
        found.append(error)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rows_that_were_changed_in_place_are_not_taken_for_equal(mode):
    """Under inference_mode nobody counts the changes."""
    with mode():
        text = texts(2).repeat_interleave(2, dim=0)
        shared.mark_equal_rows(text, [2, 2])
        if mode is torch.no_grad:
            assert shared.equal_rows(text) == (2, 2)
        text[1] += 1
        assert shared.equal_rows(text) == (1, 1, 1, 1)


def test_under_inference_mode_a_changed_text_is_heard(unet):
    """A hook that changes the text of one frame in place, after it has been seen to be repeated."""
    block = unet.down_blocks[0]

    def change(module, args, kwargs):
        kwargs["encoder_hidden_states"][1] += 1

    def changed(mode):
        hook = block.attentions[0].register_forward_pre_hook(change, with_kwargs=True)
        try:
            with mode():
                return call(unet, texts(2).clone())
        finally:
            hook.remove()

    with vk.apply_tar(unet, TAR):
        expected = changed(torch.no_grad)
        assert torch.equal(changed(torch.inference_mode), expected)
