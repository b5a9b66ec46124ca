"""``apply_frames``: which models, layers, heads and steps, with which rule, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vstar_kernels as vk
from tests.models.full3d.dense import Dense
from tests.models.full3d.tiny import PLACES, TINY
from tests.versions import is_before
from vstar_kernels.models.full3d.model import for_heads

pytest.importorskip("diffusers")
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models import attention_dispatch

pytestmark = pytest.mark.usefixtures("one_thread")
WAN = TINY["wan"]
RULE = vk.FrameRule.tar(1.0)
CLOSE = {"rtol": 0.0, "atol": 3e-6}


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return WAN.make()


@pytest.fixture(scope="module")
def stock(model):
    return WAN.run(model)


@pytest.fixture(autouse=True)
def restored(model, stock):
    yield
    assert torch.equal(WAN.run(model), stock)
    assert not model._forward_pre_hooks


@pytest.fixture
def scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    return scheduler


def run_at(model, timestep, **more):
    inputs = WAN.call() | {"timestep": timestep} | more
    return model(**inputs)[0]


def ruled(model, rule=RULE, **options):
    with vk.apply_frames(model, rule, **options):
        return WAN.run(model)


class Pipeline:
    """A pipeline of a transformer or two, as Wan 2.2 has them."""

    def __init__(self, scheduler, *transformers):
        self.scheduler = scheduler
        names = ("transformer", "transformer_2")
        self.components = {"vae": nn.Linear(1, 1), **dict(zip(names, transformers, strict=False))}
        self._current_timestep = None

    def run(self, timestep, tiny=WAN, told=None):
        self._current_timestep = timestep
        inputs = tiny.call() | {"timestep": timestep.expand(2) if told is None else told}
        transformers = (x for name, x in self.components.items() if name != "vae")
        return [transformer(**inputs)[0] for transformer in transformers]


# ---- steps ----


def test_a_share_of_the_schedule(model, stock, scheduler):
    changed = ruled(model)
    stock_at = [run_at(model, t.expand(2)) for t in scheduler.timesteps]
    with vk.apply_frames(model, RULE, steps=0.3, scheduler=scheduler):
        for step, timestep in enumerate(scheduler.timesteps):
            out = run_at(model, timestep.expand(2))
            assert torch.equal(out, stock_at[step]) == (step >= 3)
    assert not torch.equal(changed, stock)


def test_both_transformers_of_a_pipeline(model, scheduler):
    pipe = Pipeline(scheduler, model, WAN.make(seed=1))
    stock = pipe.run(scheduler.timesteps[2])
    with vk.apply_tar(pipe, vk.FrameTAR()) as handle:
        for out, plain in zip(pipe.run(scheduler.timesteps[2]), stock, strict=True):
            assert (out - plain).abs().max() > 1e-3
        stock_later = pipe.run(scheduler.timesteps[3])
        assert [layer.model for layer in handle.layers] == ["transformer"] * 2 + [
            "transformer_2"
        ] * 2
        description = handle.describe().splitlines()
    assert torch.equal(pipe.run(scheduler.timesteps[3])[1], stock_later[1])
    assert len(description) == 3
    assert description[0].endswith("in the first 30% of the steps")
    assert description[2] == (
        "  transformer_2 (Wan): 2 of 2 layers: blocks.0.attn1, blocks.1.attn1"
    )
    for out, plain in zip(pipe.run(scheduler.timesteps[2]), stock, strict=True):
        assert torch.equal(out, plain)


def test_the_step_is_that_of_the_noisiest_tokens(model, scheduler):
    """As Wan 2.2 TI2V calls it: the tokens of the first frame, a condition, are at 0."""
    t = scheduler.timesteps
    times = torch.cat([torch.zeros(PLACES), t[4].expand(2 * PLACES)]).expand(2, -1)
    plain = run_at(model, times)
    for steps, is_on in ((3, False), (4, True)):
        with vk.apply_frames(model, RULE, steps=steps, scheduler=scheduler):
            assert torch.equal(run_at(model, times), plain) == (not is_on)


def test_where_the_model_is_told_another_measure_of_noise(scheduler):
    """Cosmos Predict2 is told σ/(σ + 1), and its pipeline knows the timestep."""
    tiny = TINY["cosmos"]
    pipe = Pipeline(scheduler, tiny.make())
    call = {"tiny": tiny, "told": torch.tensor([0.7, 0.7])}
    plain = pipe.run(scheduler.timesteps[0], **call)[0]
    with vk.apply_frames(pipe, RULE, steps=0):
        assert not torch.equal(pipe.run(scheduler.timesteps[0], **call)[0], plain)
        assert torch.equal(pipe.run(scheduler.timesteps[1], **call)[0], plain)


def test_a_scheduler_that_is_none(model):
    with pytest.raises(TypeError, match=r"scheduler must have timesteps, as .* got int"):
        vk.apply_frames(model, RULE, steps=0.5, scheduler=3)


def test_an_unknown_step_is_an_error(model):
    for options in ({"steps": 0.3}, {"rule": lambda step, timestep: RULE}):
        rule = options.pop("rule", RULE)
        with (
            vk.apply_frames(model, rule, **options),
            pytest.raises(ValueError, match=r"needs the step of each forward pass: give"),
        ):
            WAN.run(model)


def test_a_rule_for_each_step(model, stock, scheduler):
    calls = []

    def rule(step, timestep):
        calls.append((step, timestep))
        return (None, RULE, vk.FrameRule.window(0))[step]

    expected = [stock, ruled(model), ruled(model, vk.FrameRule.window(0))]
    with vk.apply_frames(model, rule) as handle:
        for step in (2, 0, 1):
            handle.step = step
            assert torch.equal(WAN.run(model), expected[step])
        assert "rule, at all steps" in handle.describe()
    assert calls == [(2, 300.0), (0, 300.0), (1, 300.0)]
    with (
        vk.apply_frames(model, lambda step, timestep: "tar", scheduler=scheduler),
        pytest.raises(TypeError, match=r"must return a FrameRule or None, got str"),
    ):
        run_at(model, scheduler.timesteps[:1].expand(2))


# ---- layers and heads ----


def test_layers_by_index_and_by_name(model, stock):
    second = Dense(WAN, strength=1.0, layers=["blocks.1.attn1"]).run(model)
    for layers in ([1], range(1, 2), lambda layer: layer.name.startswith("blocks.1.")):
        torch.testing.assert_close(ruled(model, layers=layers), second, **CLOSE)
    with vk.apply_frames(model, RULE, layers=[1, 1]) as handle:
        assert [layer.index for layer in handle.layers] == [1]
        assert not vars(model.blocks[0].attn1.processor)


def test_some_heads_follow_a_rule(model, stock):
    def maps(heads):
        with (
            vk.apply_frames(model, RULE + vk.FrameRule.window(1), layers=[0], heads=heads),
            vk.capture_maps(model, layers=[0], map_heads=True) as capture,
        ):
            WAN.run(model)
        return capture.maps[0].heads

    with vk.capture_maps(model, layers=[0], map_heads=True) as capture:
        WAN.run(model)
    plain, both, one = capture.maps[0].heads, maps(None), maps([1])
    torch.testing.assert_close(maps([0, 1]), both, **CLOSE)
    torch.testing.assert_close(one[:, 1], both[:, 1], **CLOSE)
    torch.testing.assert_close(one[:, 0], plain[:, 0], **CLOSE)
    assert (one - both).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["cosmos-3", "kandinsky-6"])
def test_heads_where_modules_call_them_otherwise(name):
    """All that there are by their indices, and no more."""
    tiny = TINY[name]
    model = tiny.make()
    count = tiny.settings.get("num_attention_heads", 2)
    with vk.apply_frames(model, RULE):
        expected = tiny.run(model)
    with vk.apply_frames(model, RULE, heads=range(count)):
        torch.testing.assert_close(tiny.run(model), expected, **CLOSE)
    with pytest.raises(ValueError, match=f"index {count}, .* has {count} heads"):
        vk.apply_frames(model, RULE, heads=[count])


def test_heads_of_attention_that_does_not_say_how_many_it_has():
    model = WAN.make()
    del model.blocks[0].attn1.heads
    with pytest.raises(ValueError, match=r"heads= needs to know how many .* has none of heads, "):
        vk.apply_frames(model, RULE, heads=[0])
    with vk.apply_frames(model, RULE):  # all of them need no number
        pass


def test_heads_of_a_model_that_masks_by_itself():
    """A rule for some heads, and the model's own mask for all of them."""
    tiny = TINY["skyreels-v2-ar"]
    model = tiny.make()
    with vk.apply_frames(model, RULE):
        expected = tiny.run(model)
    with vk.apply_frames(model, RULE, heads=[0, 1]):
        torch.testing.assert_close(tiny.run(model), expected, **CLOSE)


@pytest.mark.parametrize(
    "rule",
    [
        vk.FrameRule.attenuate(0.9, window=2),
        vk.FrameRule.band(1),
        RULE + vk.FrameRule.band(1),
    ],
)
def test_rules_that_some_heads_cannot_follow_alone(model, rule):
    with (
        vk.apply_frames(model, rule, heads=[0]),
        pytest.raises(ValueError, match=r"heads= takes rules of biases and masks of frames"),
    ):
        WAN.run(model)


def test_identity_for_some_heads_is_refused(model):
    with (
        vk.apply_frames(model, vk.FrameRule.identity(), heads=[0]),
        pytest.raises(ValueError, match=r"cannot be combined with FrameRule.identity"),
    ):
        WAN.run(model)


def test_guidance_in_one_batch(model):
    """Both sides of guidance follow the rule, each as it does by itself."""
    inputs = WAN.call()
    with vk.apply_frames(model, RULE):
        both = model(**inputs)[0]
        for i in range(2):
            half = {
                name: x[i : i + 1] if isinstance(x, torch.Tensor) else x
                for name, x in inputs.items()
            }
            torch.testing.assert_close(model(**half)[0], both[i : i + 1], **CLOSE)


# ---- what is refused ----


def test_two_rules_on_one_model_are_refused(model):
    with (
        vk.apply_frames(model, RULE),
        pytest.raises(ValueError, match=r"under apply_frames already: remove\(\) that handle"),
    ):
        vk.apply_frames(model, RULE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "tar"}, TypeError, r"rule must be a FrameRule or a callable .*, got str"),
        ({"layout": 3}, TypeError, r"layout must be a Layout or None, got int"),
        ({"steps": 2.0}, ValueError, r"in \(0, 1\], got 2.0"),
        ({"layers": "all"}, TypeError, r"layers must be indices or None, got str"),
        ({"layers": []}, ValueError, r"layers names none"),
        ({"layers": [-1]}, ValueError, r"an index of layers must be at least 0, got -1"),
        ({"layers": [2]}, ValueError, r"index 2, WanTransformer3DModel has 2 layers"),
        ({"layers": lambda layer: False}, ValueError, r"layers chooses none"),
        ({"heads": [2]}, ValueError, r"heads names index 2, WanTransformer3DModel has 2 heads"),
        ({"heads": [0.5]}, TypeError, r"an index of heads must be an integer, got float"),
        ({"backend": "fast"}, ValueError, r"fast"),
    ],
)
def test_bad_arguments(model, options, error, message):
    rule = options.pop("rule", RULE)
    with pytest.raises(error, match=message):
        vk.apply_frames(model, rule, **options)


def test_a_diffusers_that_is_too_old_is_named(model, monkeypatch):
    monkeypatch.delattr(attention_dispatch._AttentionBackendRegistry, "_supports_context_parallel")
    monkeypatch.delattr(
        type(model.blocks[0].attn1.processor), "_attention_backend"
    )  # as HunyuanVideo's
    with pytest.raises(ImportError, match=r"^diffusers is \S+, .* need 0\.37 or later"):
        vk.apply_frames(model, RULE)


def test_models_that_are_not_known():
    with pytest.raises(ValueError, match=r"Linear is or holds no full-3D.*MochiTransformer3DModel"):
        vk.apply_frames(nn.Linear(1, 1), RULE)
    with pytest.raises(ValueError, match=r"SimpleNamespace is or holds no full-3D"):
        vk.apply_frames(SimpleNamespace(components={"vae": nn.Linear(1, 1)}), RULE)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module or a diffusers pipeline"):
        vk.apply_frames("wan", RULE)


def test_a_configuration_for_temporal_attention_is_refused(model):
    for config in ("64D1", vk.TARConfig(1.0)):
        with pytest.raises(ValueError, match=r"full-3D transformer.*give apply_tar a vk.FrameTAR"):
            vk.apply_tar(model, config)
    with pytest.raises(ValueError, match=r"extend_positions is for temporal attention"):
        vk.apply_tar(model, vk.FrameTAR(), extend_positions=True)


@pytest.mark.parametrize("layout", [vk.Layout(vk.Frames(3, 5)), vk.Layout(vk.Frames(2, PLACES))])
def test_a_layout_that_does_not_fit_is_an_error(model, layout):
    with (
        vk.apply_frames(model, RULE, layout=layout),
        pytest.raises(ValueError, match=rf"called with 18 queries, but .* says {layout.tokens}"),
    ):
        WAN.run(model)


def test_a_sequence_that_is_not_what_the_arguments_say(model):
    """TAR is never silently off: a model that adds tokens to the video's raises."""

    class More(type(model)):
        def forward(self, *args, **kwargs):
            add = self.patch_embedding.register_forward_hook(
                lambda module, args, out: torch.cat([out, out[:, :, :1]], dim=2)
            )
            try:
                return super().forward(*args, **kwargs)
            finally:
                add.remove()

    more = More.from_config(model.config)
    rope = more.rope.forward
    more.rope.forward = lambda x: rope(torch.cat([x, x[:, :, :1]], dim=2))
    with (
        vk.apply_frames(more, RULE),
        pytest.raises(ValueError, match=r"attn1 was called with 24 queries, but latents of shape"),
    ):
        WAN.run(more)


def test_a_layout_in_the_place_of_what_the_call_says(model, stock):
    """Frames that are two and two the same: a rule of one frame sees the twin as well."""
    tokens = [vk.Frames(1, PLACES), vk.Frames(2, PLACES, first=0, step=5)]
    twins = ruled(model, vk.FrameRule.window(0), layout=vk.Layout(*tokens))
    assert not torch.equal(twins, ruled(model, vk.FrameRule.window(0)))
    assert not torch.equal(twins, stock)


def test_a_model_of_a_class_that_is_not_known(model, stock):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **inputs):
            return self.inner(**inputs)

    other, layout = Other(), WAN.layout(3)
    with vk.apply_frames(other, RULE, layout=layout) as handle:
        out = other(**WAN.call())[0]
        assert "of a class that is not known: 2 of 2 layers" in handle.describe()
    torch.testing.assert_close(out, ruled(model), **CLOSE)
    with pytest.raises(ValueError, match=r"others, a layout="):
        vk.apply_frames(other, RULE)


@pytest.mark.skipif(is_before("diffusers", "0.39"), reason="LTX-2 has no mask before 0.39")
def test_a_mask_that_nothing_accounts_for_is_an_error():
    tiny = TINY["ltx-2"]
    model, inputs = tiny.make(), tiny.call()
    inputs["video_self_attention_mask"] = torch.ones(2, 18, 18)
    with (
        vk.apply_frames(model, RULE),
        pytest.raises(ValueError, match=r"attn1 masks its attention.*would leave the mask out"),
    ):
        model(**inputs)


def test_forward_without_the_model_s_hooks_is_an_error(model):
    with (
        vk.apply_frames(model, RULE),
        pytest.raises(RuntimeError, match=r"not its forward\(\)"),
    ):
        model.forward(**WAN.call())


def test_a_trained_bias_of_some_heads_is_read_at_every_call(model):
    """And has its gradient, as often as it is asked for; the other heads have none of it."""
    frames = WAN.layout(WAN.frames).frames
    table = torch.zeros(frames, frames, requires_grad=True)
    rule = vk.FrameRule.bias(table) + vk.FrameRule.window(1)
    options = {"layers": [0], "heads": [0], "backend": "reference"}
    with torch.enable_grad(), vk.apply_frames(model, rule, **options):
        before = WAN.run(model)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(model(**WAN.call())[0].square().sum(), table)
        assert gradient.abs().max() > 1e-6
        with torch.no_grad():
            table.copy_(torch.randn(table.shape) * 5)
        table.requires_grad_(False)  # frozen, it goes on being read
        found = WAN.run(model)
    assert (found - before).abs().max() > 1e-4
    fixed = vk.FrameRule.bias(table.detach().clone()) + vk.FrameRule.window(1)
    with vk.apply_frames(model, fixed, **options):
        torch.testing.assert_close(WAN.run(model), found, **CLOSE)


def test_rules_of_some_heads_do_not_depend_on_defaults():
    """Nor does what is kept of them for later calls."""
    layout, rule = vk.Layout(vk.Frames(3, 4)), vk.FrameRule.tar(0.7) + vk.FrameRule.window(1)
    for_heads.cache_clear()
    with torch.device("meta"), FakeTensorMode():
        for_heads(rule, (0,), 2, layout, None)
    found = for_heads(rule, (0,), 2, layout, None).tables(layout)
    for table, expected in zip(found[:2], rule.tables(layout)[:2], strict=True):
        assert torch.equal(table, torch.stack([expected, torch.zeros(3, 3)]))
