"""What diffusers does to a model under a rule: the rule goes on, and comes off cleanly."""

import copy
import pickle

import pytest
import torch

import vstar_kernels as vk
from tests.models.full3d.tiny import TINY
from tests.versions import offloads_to_the_cpu

pytest.importorskip("diffusers")
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

pytestmark = pytest.mark.usefixtures("one_thread")
WAN = TINY["wan"]
RULE = vk.FrameRule.tar(1.0)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MATH = AttentionBackendName._NATIVE_MATH


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def expected():
    """What a tiny Wan returns by itself, and under the rule."""
    model = WAN.make()
    stock = WAN.run(model)
    with vk.apply_frames(model, RULE):
        return stock, WAN.run(model)


@pytest.fixture
def model(expected):
    model = WAN.make()
    yield model
    torch.testing.assert_close(WAN.run(model), expected[0], **CLOSE)


@pytest.fixture
def backends():
    """What ``set_attention_backend`` changes for the whole process."""
    before = attention_dispatch._AttentionBackendRegistry._active_backend
    yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(before)


def attentions(model):
    return [model.get_submodule(name) for name in WAN.layers]


def named_backends(model):
    return [getattr(attn.processor, "_attention_backend", None) for attn in attentions(model)]


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_attention_backend_that_the_user_sets(model, expected, when):
    """It computes what is not changed, and is what the model has in the end."""
    seen = []

    def spy(**arguments):
        seen.append(arguments)
        return attention_dispatch._native_math_attention(**arguments)

    registry = attention_dispatch._AttentionBackendRegistry
    own, registry._backends[MATH] = registry._backends[MATH], spy
    try:
        if when == "before":
            model.set_attention_backend("_native_math")
        with vk.apply_frames(model, RULE, layers=[1], steps=0) as handle:
            handle.step = 0
            WAN.run(model)
            if when == "after":
                model.set_attention_backend("_native_math")
            seen.clear()
            WAN.run(model)
            assert len(seen) == 3  # two layers of cross-attention, and one of the video's
            handle.step = 1
            torch.testing.assert_close(WAN.run(model), expected[0], **CLOSE)
            assert len(seen) == 7
        assert named_backends(model) == [MATH] * 2
        model.reset_attention_backend()
    finally:
        registry._backends[MATH] = own


def test_the_context_manager_of_backends(model, expected):
    with vk.apply_frames(model, RULE) as handle, attention_backend("_native_math"):
        torch.testing.assert_close(WAN.run(model), expected[1], **CLOSE)
        handle.remove()
        torch.testing.assert_close(WAN.run(model), expected[0], **CLOSE)


def test_a_backend_that_is_set_and_reset_while_a_rule_is_on(model, expected):
    with vk.apply_frames(model, RULE):
        model.reset_attention_backend()
        assert torch.equal(WAN.run(model), expected[1])
    assert named_backends(model) == [None, None]


@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx"])
def test_fused_projections(name):
    tiny = TINY[name]
    model = tiny.make()
    stock = tiny.run(model)
    with vk.apply_frames(model, RULE):
        changed = tiny.run(model)
    fuse = getattr(model, "fuse_qkv_projections", None)
    if fuse is None:
        pytest.skip(f"{tiny.name} cannot be fused")
    with vk.apply_frames(model, RULE) as handle:
        model.fuse_qkv_projections()
        torch.testing.assert_close(tiny.run(model), changed, **CLOSE)
        handle.remove()
        torch.testing.assert_close(tiny.run(model), stock, **CLOSE)
    with vk.apply_frames(model, RULE):
        model.unfuse_qkv_projections()
        torch.testing.assert_close(tiny.run(model), changed, **CLOSE)
    torch.testing.assert_close(tiny.run(model), stock, **CLOSE)


def test_processors_that_are_replaced(model, expected):
    with vk.apply_frames(model, RULE):
        old = [attn.processor for attn in attentions(model)]
        model.set_attn_processor({name: WanAttnProcessor() for name in model.attn_processors})
        assert torch.equal(WAN.run(model), expected[1])
    assert not any(vars(attn.processor) for attn in attentions(model))
    for attn, processor in zip(attentions(model), old, strict=True):
        attn.processor = processor  # what has been replaced is as it was, too
    assert named_backends(model) == [None, None]


def test_layers_that_share_a_processor_are_refused(model):
    model.set_attn_processor(WanAttnProcessor())
    with pytest.raises(ValueError, match=r"1\.attn1 has the same processor object as blocks\.0"):
        vk.apply_frames(model, RULE)
    assert not vars(model.blocks[0].attn1.processor)
    assert not model._forward_pre_hooks


def test_processors_that_no_backend_reaches_are_refused(model):
    class Own:
        def __call__(self, attn, hidden_states, *_, **__):
            return hidden_states

    own = model.blocks[0].attn1.processor
    model.blocks[0].attn1.processor = Own()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1 has a Own, which does not go through"):
        vk.apply_frames(model, RULE)
    model.blocks[0].attn1.processor = own


def test_layerwise_casting():
    model = WAN.make()
    skipped = ("patch_embedding", "condition_embedder", "norm")
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=skipped)
    stock = WAN.run(model)
    with vk.apply_frames(model, RULE):
        changed = WAN.run(model)
    assert torch.equal(WAN.run(model), stock)
    assert (changed - stock).abs().max() > 1e-3
    again = WAN.make()
    with vk.apply_frames(again, RULE):
        apply_layerwise_casting(
            again, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=skipped
        )
        assert torch.equal(WAN.run(again), changed)


@offloads_to_the_cpu
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading(model, expected, level, when):
    cpu = torch.device("cpu")
    kinds = {"num_blocks_per_group": 1} if level == "block_level" else {}

    def offload():
        apply_group_offloading(model, cpu, cpu, offload_type=level, **kinds)

    if when == "before":
        offload()
    with vk.apply_frames(model, RULE):
        if when == "after":
            offload()
        assert torch.equal(WAN.run(model), expected[1])


TIMES = {"current_timestep_callback": lambda: TIME[0]}
TIME = [300]  # of the forward pass that runs
CACHES = {
    "pyramid attention broadcast": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("blocks",),
        **TIMES,
    ),
    "first block": FirstBlockCacheConfig(threshold=10.0),
    "taylorseer": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "mag": MagCacheConfig(
        threshold=10.0, max_skip_steps=1, retention_ratio=0.0, num_inference_steps=4,
        mag_ratios=torch.ones(4),
    ),
    "faster": FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 500),
        spatial_attention_block_identifiers=("blocks.*attn1",),
        attention_weight_callback=lambda _: 1.0,
        tensor_format="BCFHW",
        is_guidance_distilled=True,
        **TIMES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
def test_caches(expected, cache):
    """What a cache does not skip is changed; what it kept of a changed step, it uses again."""
    runs = {}
    for rule in (None, RULE):
        model = WAN.make()
        handle = None if rule is None else vk.apply_frames(model, rule)
        model.enable_cache(CACHES[cache])
        with model.cache_context("cond"):
            runs[rule] = []
            for TIME[0] in (900, 300, 299, 298):
                runs[rule].append(WAN.run(model))
        if handle is not None:
            handle.remove()
        assert named_backends(model) == [None, None]
    torch.testing.assert_close(runs[None][0], expected[0], **CLOSE)
    torch.testing.assert_close(runs[RULE][0], expected[1], **CLOSE)
    for stock, changed in zip(*runs.values(), strict=True):
        assert (changed - stock).abs().max() > 1e-3


def test_perturbed_guidance_still_skips_the_scores(model):
    with AttentionScoreSkipFunctionMode():
        expected = WAN.run(model)
    with vk.apply_frames(model, RULE), AttentionScoreSkipFunctionMode():
        assert torch.equal(WAN.run(model), expected)


def test_adapters(model, expected):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    with vk.apply_frames(model, RULE):
        model.add_adapter(config)
        adapted = WAN.run(model)
        assert (adapted - expected[1]).abs().max() > 1e-3
        model.disable_adapters()
        torch.testing.assert_close(WAN.run(model), expected[1], **CLOSE)
        model.enable_adapters()
    with vk.apply_frames(model, RULE):
        torch.testing.assert_close(WAN.run(model), adapted, **CLOSE)
        model.delete_adapters("default")
        torch.testing.assert_close(WAN.run(model), expected[1], **CLOSE)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_stock_and_says_so(model, expected, way):
    model.blocks[1].attn1.processor._attention_backend = MATH
    with vk.apply_frames(model, RULE):
        twin = way(model)
        with pytest.raises(RuntimeError, match=r"copy of one under apply_frames.*\(copy, …\)"):
            WAN.run(twin)
        assert named_backends(twin) == [None, MATH]
        with vk.apply_frames(twin, RULE):
            assert torch.equal(WAN.run(twin), expected[1])
        torch.testing.assert_close(WAN.run(twin), expected[0], **CLOSE)
        assert torch.equal(WAN.run(model), expected[1])
    assert type(twin) is type(model)


def test_a_copy_of_a_processor_has_what_was_there_before(model):
    with vk.apply_frames(model, RULE):
        for attn in attentions(model):
            assert not vars(copy.deepcopy(attn.processor)).get("_attention_backend")
        model.blocks[0].attn1.processor._attention_backend = MATH
        WAN.run(model)
        assert copy.deepcopy(model.blocks[0].attn1.processor)._attention_backend is MATH


def test_saving_and_loading(model, expected, tmp_path):
    with vk.apply_frames(model, RULE):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(WAN.run(loaded), expected[0], **CLOSE)
    with vk.apply_frames(loaded, RULE):
        torch.testing.assert_close(WAN.run(loaded), expected[1], **CLOSE)


def test_gradients_at_strength_0():
    """Gradient checkpointing calls the layers again in the backward pass."""

    @torch.enable_grad()
    def gradients(model, checkpointing):
        model.requires_grad_(True).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**WAN.call())[0].square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    stock = gradients(WAN.make(), checkpointing=False)
    for checkpointing in (False, True):
        model = WAN.make()
        rule = vk.FrameRule.tar(1.0, strength=0.0)
        with vk.apply_frames(model, rule, backend="reference"):
            found = gradients(model, checkpointing)
        assert found.keys() == stock.keys()
        for key, gradient in stock.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5)


def test_backends_are_used_again(model):
    """What is registered with diffusers does not grow."""
    registry = attention_dispatch._AttentionBackendRegistry._backends
    listed = set(AttentionBackendName.__members__)
    for _ in range(2):
        with vk.apply_frames(model, RULE):
            count = len(registry)
    assert len(registry) == count
    assert set(AttentionBackendName.__members__) == listed
