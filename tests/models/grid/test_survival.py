"""What diffusers does to a model under ``apply_grid``: the grid stays, and comes off cleanly."""

import threading

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_processor import AttnProcessor2_0

from tests.models.grid.unets import LAYERS, call, make
from tests.versions import offloads_to_the_cpu
from vstar_kernels.models.grid.model import GridAttnProcessor

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
TAR = vk.TARConfig({0: 1.0, 1: 0.6}, steps=None)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def ours(model):
    found = [isinstance(p, GridAttnProcessor) for p in model.attn_processors.values()]
    return sum(found) == LAYERS["SD 1.5"]


def changed(model, change):
    """The output under the grid stays what it was before a change, and ours stay in place."""
    stock = call(model)
    with vk.apply_grid(model, 4, config=TAR):
        expected = call(model)
        change(model)
        torch.testing.assert_close(call(model), expected, **CLOSE)
        assert ours(model)
    assert not any(isinstance(p, GridAttnProcessor) for p in model.attn_processors.values())
    torch.testing.assert_close(call(model), stock, **CLOSE)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.fuse_qkv_projections(),
        lambda model: model.set_attention_slice("max"),
        lambda model: model.set_default_attn_processor(),
        lambda model: model.set_attn_processor(
            {k: p.__class__() for k, p in model.attn_processors.items()}
        ),
        pytest.param(
            lambda model: apply_group_offloading(
                model,
                onload_device=torch.device("cpu"),
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
            ),
            marks=offloads_to_the_cpu,
        ),
    ],
    ids=["fused", "sliced", "default", "created anew", "offloaded"],
)
def test_changes_to_the_model(change):
    changed(make(), change)


def test_layerwise_casting():
    model = make()
    apply_layerwise_casting(
        model,
        storage_dtype=torch.float16,
        compute_dtype=torch.float32,
        skip_modules_pattern=["norm", "time_embedding"],
    )
    stock = call(model)
    with vk.apply_grid(model, 4, embedding=False):
        torch.testing.assert_close(call(model), stock, **CLOSE)


def test_freeu():
    model = make()
    model.enable_freeu(0.9, 0.2, 1.2, 1.4)
    stock = call(model)
    with vk.apply_grid(model, 4, embedding=False):
        torch.testing.assert_close(call(model), stock, **CLOSE)


def test_a_compiled_model():
    torch._dynamo.reset()
    model = make("SDXL")  # has the fewest blocks with attention: tracing is slow
    config = vk.TARConfig({1: 0.6}, steps=None)
    with vk.apply_grid(model, 4, config=config):
        expected = call(model)
    stock = call(model)
    runner = torch.compile(model, backend="eager")
    with vk.apply_grid(runner, 4, config=config):
        torch.testing.assert_close(call(runner), expected, **CLOSE)
    torch.testing.assert_close(call(runner), stock, **CLOSE)


@torch.enable_grad()
def gradients(checkpointing, **options):
    model = make().requires_grad_(True).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    with vk.apply_grid(model, 4, **options):
        call(model).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_training_with_gradient_checkpointing():
    plain, checkpointed = (gradients(x, config=TAR) for x in (False, True))
    reference = gradients(False, config=TAR, backend="reference")
    assert plain.keys() == checkpointed.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(plain[name], gradient, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-3, atol=1e-5)


def test_saving_and_loading(tmp_path):
    model = make()
    stock = call(model)
    with vk.apply_grid(model, 4, config=TAR):
        out = call(model)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).requires_grad_(False)
    torch.testing.assert_close(call(loaded), stock)
    with vk.apply_grid(loaded, 4, config=TAR):
        torch.testing.assert_close(call(loaded), out)


def test_threads_have_speeds_of_their_own():
    model = make()
    fps = vk.FPSEmbedding.for_unet(model)
    torch.nn.init.normal_(fps.layers[-1].weight)
    embedding = vk.GridEmbedding(fps=fps)
    speeds = (8, 30, 60)
    expected = {}
    for speed in speeds:
        with vk.apply_grid(model, 4, embedding=embedding, fps=speed):
            expected[speed] = call(model)
    found = {}
    with vk.apply_grid(model, 4, embedding=embedding) as handle:

        def run(speed):
            with torch.no_grad():
                handle.fps = speed
                found[speed] = [call(model) for _ in range(3)]

        threads = [threading.Thread(target=run, args=(speed,)) for speed in speeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for speed in speeds:
        assert all(torch.equal(out, expected[speed]) for out in found[speed])


def test_a_foreign_processor_is_refused():
    model = make()

    class Theirs(AttnProcessor2_0):
        pass

    with vk.apply_grid(model, 4):
        attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
        attention.set_processor(Theirs())
        with pytest.raises(ValueError, match=r"down_blocks.0.* has a Theirs"):
            call(model)
