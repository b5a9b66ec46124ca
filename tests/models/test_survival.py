"""What diffusers does to a model under TAR: TAR goes on, or says why not, and comes off cleanly."""

import copy

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
from diffusers import DDIMScheduler, LayerSkipConfig
from diffusers.hooks import apply_group_offloading, apply_layer_skip, apply_layerwise_casting
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)

from tests.models.models import KINDS, call, make, make_one_block
from tests.pairwise import pairwise
from tests.versions import offloads_to_the_cpu
from vstar_kernels.models.attention_processor import TARAttnProcessor
from vstar_kernels.models.front_end import temporal_layers

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
TAR = vk.TARConfig({0: 1.0, 1: 4.0}, steps=None)
UNETS = ("UNet3DConditionModel", "UNetMotionModel")
LATTE = "LatteTransformer3DModel"
CHECKPOINTED = ("UNetMotionModel", "UNetSpatioTemporalConditionModel", LATTE)
DIFFUSERS = [name for name in KINDS if name not in ("lvdm", "LaVie")]
unets = pytest.mark.parametrize("name", UNETS)
each = pytest.mark.parametrize("name", KINDS)


def config(name):
    return vk.TARConfig(1.0, steps=None) if name == LATTE else TAR


def ours(model):
    return [
        isinstance(layer.module.processor, TARAttnProcessor) for layer in temporal_layers(model)
    ]


def in_place(model, kind=AttnProcessor2_0):
    return all(type(layer.module.processor) is kind for layer in temporal_layers(model))


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@unets
def test_fused_projections(name):
    model = make(name)
    stock = call(model, name)
    with vk.apply_tar(model, TAR):
        expected = call(model, name)
        model.fuse_qkv_projections()
        torch.testing.assert_close(call(model, name), expected, **CLOSE)
        assert all(ours(model))
        model.unfuse_qkv_projections()
        torch.testing.assert_close(call(model, name), expected, **CLOSE)
        assert all(ours(model))
    assert in_place(model)
    assert torch.equal(call(model, name), stock)


@unets
def test_removed_while_fused_and_unfused_later(name):
    model = make(name)
    stock = call(model, name)
    handle = vk.apply_tar(model, TAR)
    model.fuse_qkv_projections()
    call(model, name)
    handle.remove()
    assert in_place(model, FusedAttnProcessor2_0)
    torch.testing.assert_close(call(model, name), stock, **CLOSE)
    model.unfuse_qkv_projections()  # puts back what it found: ours, which now does nothing
    assert torch.equal(call(model, name), stock)
    with vk.apply_tar(model, TAR):
        assert (call(model, name) - stock).abs().max() > 1e-3
    assert torch.equal(call(model, name), stock)


def test_attention_slicing():
    name = "UNet3DConditionModel"
    model = make(name)
    with vk.apply_tar(model, TAR):
        expected = call(model, name)
        model.set_attention_slice("max")
        torch.testing.assert_close(call(model, name), expected, **CLOSE)
        assert all(ours(model))
    assert in_place(model, SlicedAttnProcessor)


def test_processors_that_are_created_anew():
    """IP adapters put ``processor.__class__()`` everywhere."""
    name = "UNetMotionModel"
    model = make(name)
    before = [layer.module.processor for layer in temporal_layers(model)]
    with vk.apply_tar(model, TAR):
        expected = call(model, name)
        for _ in range(2):
            model.set_attn_processor({k: p.__class__() for k, p in model.attn_processors.items()})
            assert torch.equal(call(model, name), expected)
    for layer, processor in zip(temporal_layers(model), before, strict=True):
        assert layer.module.processor is processor


@unets
def test_default_processors_leave_tar_in_place_and_reset_the_rest(name):
    model = make(name)
    temporal = {f"{layer.name}.processor" for layer in temporal_layers(model)}
    with vk.apply_tar(model, TAR):
        expected = call(model, name)
        for _ in range(2):
            model.set_default_attn_processor()
            rest = {k: p for k, p in model.attn_processors.items() if k not in temporal}
            assert all(ours(model))
            assert rest
            assert all(type(p) is AttnProcessor for p in rest.values())
            torch.testing.assert_close(call(model, name), expected, **CLOSE)
    assert in_place(model, AttnProcessor)
    assert type(model) is type(make(name))


def test_default_processors_are_refused_because_of_others_only():
    name = "UNet3DConditionModel"
    model = make(name)

    class Theirs(AttnProcessor2_0):
        pass

    spatial = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    spatial.set_processor(Theirs())
    with vk.apply_tar(model, TAR):
        expected = call(model, name)
        with pytest.raises(ValueError, match="Cannot call `set_default_attn_processor`"):
            model.set_default_attn_processor()
        assert all(ours(model))
        assert torch.equal(call(model, name), expected)
    assert in_place(model)


def test_a_foreign_processor_during_tar_raises():
    name = "UNetMotionModel"
    model = make(name)

    class Theirs(AttnProcessor2_0):
        pass

    with vk.apply_tar(model, TAR):
        temporal_layers(model)[0].module.set_processor(Theirs())
        with pytest.raises(ValueError, match=r"down_blocks.0.* has a Theirs, which TAR would"):
            call(model, name)


@pytest.mark.parametrize("name", UNETS)
def test_freeu(name):
    model = make(name)
    model.enable_freeu(0.9, 0.2, 1.2, 1.4)
    stock = call(model, name)
    with vk.apply_tar(model, vk.TARConfig(1.0, strength=0.0, steps=None)):
        torch.testing.assert_close(call(model, name), stock, **CLOSE)
    with vk.apply_tar(model, TAR):
        expected = call(model, name)
        model.disable_freeu()
        assert (call(model, name) - expected).abs().max() > 1e-3
        model.enable_freeu(0.9, 0.2, 1.2, 1.4)
        assert torch.equal(call(model, name), expected)


# What apply_tar is given differs before; after, both trace the same model.
@pytest.mark.parametrize(
    ("how", "when"), [("torch.compile", "before"), ("compile", "before"), ("compile", "after")]
)
def test_compiled_models(how, when):
    """Whole models, compiled before or after ``apply_tar``, over steps on and off."""
    name = LATTE
    torch._dynamo.reset()
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(25)
    model = make_one_block()

    def at(model, step):
        return call(model, name, timestep=scheduler.timesteps[step])

    with vk.apply_tar(model, vk.TARConfig(1.0), scheduler=scheduler):
        expected = {step: at(model, step) for step in (0, 13, 14, 20)}
    stock = at(model, 13)

    def compiled(model):
        if how == "compile":
            model.compile(backend="eager")
            return model
        return torch.compile(model, backend="eager")

    runner = model
    if when == "before":
        runner = compiled(model)
        at(runner, 0)
    with vk.apply_tar(runner, vk.TARConfig(1.0), scheduler=scheduler):
        if when == "after":
            runner = compiled(runner)
        for step in (13, 14, 0, 20, 13):
            torch.testing.assert_close(at(runner, step), expected[step], **CLOSE)
    torch.testing.assert_close(at(runner, 13), stock, **CLOSE)
    assert (expected[13] - stock).abs().max() > 1e-3


@pytest.mark.parametrize("name", DIFFUSERS)
def test_layerwise_casting(name):
    model = make(name)
    apply_layerwise_casting(
        model,
        storage_dtype=torch.float16,
        compute_dtype=torch.float32,
        skip_modules_pattern=["pos_embed", "norm", "time_embedding"],
    )
    stock = call(model, name)
    with vk.apply_tar(model, vk.TARConfig(1.0, strength=0.0, steps=None)):
        torch.testing.assert_close(call(model, name), stock, **CLOSE)
    with vk.apply_tar(model, config(name)):
        assert (call(model, name) - stock).abs().max() > 1e-3
    assert temporal_layers(model)[0].module.to_q.weight.dtype == torch.float16


OFFLOADING = {
    "name": DIFFUSERS,
    "level": ["block_level", "leaf_level"],
    "when": ["before", "after"],
}


@offloads_to_the_cpu
@pytest.mark.parametrize(tuple(OFFLOADING), [tuple(x.values()) for x in pairwise(OFFLOADING)])
def test_group_offloading(name, level, when):
    model = make(name)
    with vk.apply_tar(model, config(name), extend_positions=True):
        expected = call(model, name, frames=17)
    more = {"num_blocks_per_group": 1} if level == "block_level" else {}

    def offload():
        cpu = torch.device("cpu")
        apply_group_offloading(
            model, onload_device=cpu, offload_device=cpu, offload_type=level, **more
        )

    if when == "before":
        offload()
    with vk.apply_tar(model, config(name), extend_positions=True):
        if when == "after":
            offload()
        assert torch.equal(call(model, name, frames=17), expected)


@pytest.mark.parametrize("name", UNETS)
def test_accelerates_hooks(name):
    """Model and sequential offloading replace ``forward``."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = make(name)
    with vk.apply_tar(model, TAR):
        expected = call(model, name)
        hooks.add_hook_to_module(model, hooks.AlignDevicesHook(execution_device="cpu"))
        assert torch.equal(call(model, name), expected)
        hooks.remove_hook_from_module(model, recurse=True)
        hooks.attach_align_device_hook(
            model, execution_device="cpu", offload=True, weights_map=dict(model.state_dict())
        )
        assert temporal_layers(model)[0].module.to_q.weight.is_meta
        torch.testing.assert_close(call(model, name), expected, **CLOSE)
    with vk.apply_tar(model, TAR):
        torch.testing.assert_close(call(model, name), expected, **CLOSE)


def test_adapters():
    peft = pytest.importorskip("peft")
    name = "UNetMotionModel"
    model = make(name)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with vk.apply_tar(model, TAR):
        without = call(model, name)
        model.add_adapter(lora)
        adapted = call(model, name)
        assert (adapted - without).abs().max() > 1e-3
        assert all(ours(model))
        model.fuse_lora()
        torch.testing.assert_close(call(model, name), adapted, **CLOSE)
        model.unfuse_lora()
        torch.testing.assert_close(call(model, name), adapted, **CLOSE)
        model.disable_adapters()
        torch.testing.assert_close(call(model, name), without, **CLOSE)
        model.enable_adapters()
    stock = call(model, name)
    with vk.apply_tar(model, TAR):
        torch.testing.assert_close(call(model, name), adapted, **CLOSE)
        model.delete_adapters("default")
        torch.testing.assert_close(call(model, name), without, **CLOSE)
    assert (stock - adapted).abs().max() > 1e-3


@pytest.mark.parametrize("name", DIFFUSERS)
def test_saving_and_loading(name, tmp_path):
    model = make(name)
    stock = call(model, name)
    with vk.apply_tar(model, config(name)):
        out = call(model, name)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).requires_grad_(False)
    torch.testing.assert_close(call(loaded, name), stock)
    with vk.apply_tar(loaded, config(name)):
        torch.testing.assert_close(call(loaded, name), out)


@each
def test_a_copy_is_stock_and_says_so(name):
    model = make(name)
    stock = call(model, name)
    with vk.apply_tar(model, config(name)):
        out = call(model, name)
        twin = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=r"copy of one under apply_tar.*apply_tar\(copy"):
            call(twin, name)
        with vk.apply_tar(twin, config(name)):
            assert torch.equal(call(twin, name), out)
        assert torch.equal(call(twin, name), stock)
        assert torch.equal(call(model, name), out)
        assert not twin._forward_pre_hooks
        assert not twin._forward_hooks
    modules = [set(map(id, m.modules())) for m in (model, twin)]
    assert not modules[0] & modules[1]
    for layer in temporal_layers(twin):
        assert type(layer.module.forward).__name__ == "method"
        assert layer.module.forward.__self__ is layer.module


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_training_at_strength_0(name):
    """The kernels have no gradients yet: the reference has."""

    @torch.enable_grad()
    def gradients(model):
        model.train().requires_grad_(True)
        model.enable_gradient_checkpointing()
        call(model, name).square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    stock = gradients(make(name))
    model = make(name)
    plain = vk.TARConfig(1.0, strength=0.0, steps=None)
    with vk.apply_tar(model, plain, backend="reference"):
        found = gradients(model)
    assert found.keys() == stock.keys()
    for key, gradient in stock.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_training_with_tar(name):
    @torch.enable_grad()
    def gradients(**more):
        model = make(name).requires_grad_(True)
        if more.pop("checkpointing"):
            model.train().enable_gradient_checkpointing()
        with vk.apply_tar(model, config(name), backend="reference"):
            call(model, name).square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(checkpointing=False), gradients(checkpointing=True)
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_deterministic(name):
    model = make(name)
    with vk.apply_tar(model, config(name)):
        assert torch.equal(call(model, name, batch=2), call(model, name, batch=2))


def test_layer_skip_knows_the_processor():
    """diffusers' LayerSkip of attention asks its registry how to skip a processor."""
    model = make(LATTE)
    stock = call(model, LATTE)
    skip = LayerSkipConfig(
        indices=[0], fqn="temporal_transformer_blocks", skip_attention=True, skip_ff=False
    )
    with vk.apply_tar(model, config(LATTE)):
        apply_layer_skip(model, skip)
        assert (call(model, LATTE) - stock).abs().max() > 1e-3


def test_blocks_that_are_replaced():
    """As FreeNoise does."""
    name = "UNetMotionModel"
    model = make(name)
    with vk.apply_tar(model, TAR) as handle:
        expected = call(model, name)
        for block in (model.down_blocks[0], model.up_blocks[0]):
            for module in block.motion_modules:
                module.transformer_blocks[0] = copy.deepcopy(module.transformer_blocks[0])
        assert not all(ours(model))
        assert torch.equal(call(model, name), expected)
        assert all(ours(model))
        assert len(handle.layers) == KINDS[name].layers
    assert in_place(model)
