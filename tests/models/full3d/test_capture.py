"""``capture_maps`` on full-3D transformers: which maps there are, and of what."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import vstar_kernels as vk
from tests.models.full3d.test_function_mode import LAYOUT, OwnAttention
from tests.models.full3d.tiny import TINY
from tests.models.models import KINDS
from vstar_kernels.analysis import FrameMap, map_figures, mean_maps
from vstar_kernels.analysis.maps import frame_map
from vstar_kernels.models.full3d import capture as frames_capture
from vstar_kernels.models.full3d.apply import apply_frames

pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")

WAN = TINY["wan"]
RULE = vk.FrameRule.tar(1.0)


class Scheduler:
    order = 1

    def __init__(self, *timesteps):
        self.timesteps = torch.tensor(timesteps)


@pytest.fixture
def wan():
    return WAN.make()


def call(model, timestep=300, seed=1, **changes):
    inputs = WAN.call(seed=seed) | {"timestep": torch.tensor([timestep] * 2)} | changes
    with torch.no_grad():
        return model(**inputs)[0]


def test_steps_layers_and_sides_of_guidance(wan):
    """Samplers call the model with the prompt, without it and perturbed, on the same latents."""
    chosen = {"steps": [1], "layers": [1], "scheduler": Scheduler(500, 300, 100)}
    with vk.capture_maps(wan, **chosen) as capture:
        for timestep in (500, 300, 100):
            for _ in range(3):
                call(wan, timestep, encoder_hidden_states=torch.randn(2, 7, 16))
    found = [
        (item.layer, item.step, item.timestep, item.branch, item.calls) for item in capture.maps
    ]
    assert found == [("blocks.1.attn1", 1, 300.0, branch, 1) for branch in (0, 1, 2)]
    assert all(isinstance(item, FrameMap) for item in capture.maps)
    assert capture.maps[0].heads is None
    assert capture.maps[0].positions == 6
    assert torch.equal(capture.mean(step=1), capture.maps[0].map)
    (mean,) = map_figures(mean_maps(capture, by=()))
    assert mean.diagonalness.shape == (2,)


def test_maps_of_the_same_step_are_averaged(wan):
    with vk.capture_maps(wan, layers=[0], map_heads=True) as capture:
        for seed in (1, 2):
            call(wan, seed=seed)
    ones = []
    for seed in (1, 2):
        with vk.capture_maps(wan, layers=[0], map_heads=True) as one:
            call(wan, seed=seed)
        ones += one.maps
    (item,) = capture.maps
    assert item.calls == 2
    for name in ("map", "text", "heads", "with_text"):
        mean = torch.stack([getattr(one, name) for one in ones]).mean(0)
        torch.testing.assert_close(getattr(item, name), mean)
    with vk.capture_maps(wan, layers=[0]):
        call(wan)
        with pytest.raises(ValueError, match=r"at 0, 1, 2 and is now of frames at 0, 1, 2, 3:"):
            WAN.run(wan, frames=4)


@pytest.mark.parametrize("rule_first", [True, False])
def test_capture_and_rule_come_and_go_in_any_order(wan, rule_first):
    stock = call(wan)
    expected = []
    for rule in (None, RULE):
        handle = None if rule is None else apply_frames(wan, rule)
        with vk.capture_maps(wan) as capture:
            call(wan)
        expected.append([item.map for item in capture.maps])
        if handle is not None:
            changed = call(wan)
            handle.remove()
    plain, ruled = expected
    assert not torch.equal(plain[0], ruled[0])

    first = apply_frames(wan, RULE) if rule_first else vk.capture_maps(wan)
    second = vk.capture_maps(wan) if rule_first else apply_frames(wan, RULE)
    capture = second if rule_first else first
    assert torch.equal(call(wan), changed)
    assert all(torch.equal(item.map, x) for item, x in zip(capture.maps, ruled, strict=True))
    first.remove()
    if rule_first:
        capture.clear()
        assert torch.equal(call(wan), stock)
        assert all(torch.equal(item.map, x) for item, x in zip(capture.maps, plain, strict=True))
    else:
        assert torch.equal(call(wan), changed)
        assert len(capture.maps) == 2
    second.remove()
    assert torch.equal(call(wan), stock)


def test_layers_that_a_cache_skips_give_no_map(wan):
    from diffusers import FirstBlockCacheConfig

    wan.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    with vk.capture_maps(wan, scheduler=Scheduler(500, 300)) as capture:
        for timestep in (500, 300):
            with wan.cache_context("cond"):
                call(wan, timestep)
    found = [(item.layer, item.timestep) for item in capture.maps]
    assert found == [("blocks.0.attn1", 500), ("blocks.1.attn1", 500), ("blocks.0.attn1", 300)]


def test_threads_capture_each_its_own(wan):
    timesteps = (500, 300, 100)
    expected = {}
    for seed in range(4):
        with vk.capture_maps(wan) as capture:
            for timestep in timesteps:
                call(wan, timestep, seed)
        expected |= {(seed, item.timestep, item.layer): item.map for item in capture.maps}

    def run(seed):
        capture.step = seed
        for timestep in timesteps:
            call(wan, timestep, seed)

    with vk.capture_maps(wan) as capture, ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    found = {(item.step, item.timestep, item.layer): item.map for item in capture.maps}
    assert len(capture.maps) == len(expected)
    for key, map_ in expected.items():  # a thread may share its sums with others
        torch.testing.assert_close(found[key], map_)


def test_a_failed_pass_leaves_no_map(wan):
    with vk.capture_maps(wan) as capture:
        wan.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(wan)
    assert not capture.maps


def test_the_layout_of_the_caller_goes_before_the_calls(wan):
    halves = vk.Layout(vk.Frames(6, 3))
    with vk.capture_maps(wan, layers=[0], layout=halves) as capture:
        call(wan)
    assert capture.maps[0].map.shape == (2, 6, 6)
    message = "18 queries, but the layout= of capture_maps says 12"
    wrong = vk.Layout(vk.Frames(2, 6))
    with vk.capture_maps(wan, layout=wrong), pytest.raises(ValueError, match=message):
        call(wan)


class Pipeline:
    """A sampler that calls its model once for each side of guidance, and may be stopped between."""

    def __init__(self, model):
        self.transformer = model
        self.components = {"transformer": model}
        self.scheduler = Scheduler(300)

    def __call__(self, stopped=False):
        self.scheduler.timesteps = torch.tensor([300])
        call(self.transformer)
        if stopped:
            raise KeyboardInterrupt
        call(self.transformer, encoder_hidden_states=torch.randn(2, 7, 16))


@pytest.mark.parametrize("name", ["cosmos-3", "kandinsky-6"])
def test_sides_of_guidance_whose_prompts_differ(name):
    """Other texts on the same latents, step by step, as the pipelines of these models call them."""
    tiny = TINY[name]
    model, inputs = tiny.make(), tiny.call()
    text = "input_ids" if "input_ids" in inputs else "encoder_hidden_states"
    told = "vision_timesteps" if "vision_timesteps" in inputs else "timestep"
    with vk.capture_maps(model, layers=[0], scheduler=Scheduler(300, 100)) as capture:
        for timestep in (300.0, 100.0):
            for prompt in (inputs[text], inputs[text].flip(0)):
                with torch.no_grad():
                    model(**inputs | {text: prompt, told: torch.full_like(inputs[told], timestep)})
    found = [(item.step, item.timestep, item.branch) for item in capture.maps]
    assert found == [(0, 300.0, 0), (0, 300.0, 1), (1, 100.0, 0), (1, 100.0, 1)]


def test_a_side_of_guidance_without_the_controls_is_one_of_the_same_step():
    """Cosmos 3's transfer calls it with control and target, with the target alone, and again."""
    tiny = TINY["cosmos-3"]
    model, alone = tiny.make(), tiny.call()
    target = alone["vision_tokens"][0]
    places, frames = alone["vision_sequence_indexes"], target.shape[2]
    more = len(places)
    both = alone | {
        "position_ids": torch.arange(alone["sequence_length"] + more).expand(3, -1),
        "sequence_length": alone["sequence_length"] + more,
        "vision_tokens": [torch.randn_like(target), target],
        "vision_token_shapes": alone["vision_token_shapes"] * 2,
        "vision_sequence_indexes": torch.cat([places, places + more]),
        "vision_mse_loss_indexes": alone["vision_mse_loss_indexes"] + more,
        "vision_noisy_frame_indexes": [torch.arange(0), *alone["vision_noisy_frame_indexes"]],
        "sound_sequence_indexes": alone["sound_sequence_indexes"] + more,
        "sound_mse_loss_indexes": alone["sound_mse_loss_indexes"] + more,
    }
    with vk.capture_maps(model, layers=[0], scheduler=Scheduler(300)) as capture, torch.no_grad():
        for inputs in (both, alone, both):
            model(**inputs)
    assert [(item.step, item.branch) for item in capture.maps] == [(0, 0), (0, 1), (0, 2)]
    assert {item.coordinates for item in capture.maps} == {tuple(map(float, range(frames)))}


@pytest.mark.parametrize("name", ["wan", "cosmos-3"])
@pytest.mark.parametrize("differentiable", [False, True])
def test_checkpoints_under_a_rule(name, differentiable):
    tiny, gradients = TINY[name], []
    for is_checkpointed in (False, True):
        model = tiny.make().train()
        if is_checkpointed:
            model.enable_gradient_checkpointing()
        with (
            vk.apply_frames(model, RULE),
            vk.capture_maps(model, differentiable=differentiable) as capture,
        ):
            out = model(**tiny.call())[0]
            loss = (out[0] if isinstance(out, list) else out).square().sum()
            if differentiable:
                loss = loss + sum(item.map.square().sum() for item in capture.maps)
            loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.0, atol=0.0)


def test_a_run_begins_with_the_conditional_side_whatever_came_before(wan):
    pipe = Pipeline(wan)
    with vk.capture_maps(pipe, layers=[0]) as capture:
        with pytest.raises(KeyboardInterrupt):
            pipe(stopped=True)
        pipe()
        pipe()
    assert [(item.branch, item.calls) for item in capture.maps] == [(0, 3), (1, 2)]


def test_a_call_that_fails_is_no_side_of_guidance(wan):
    with vk.capture_maps(wan, layers=[0]) as capture:
        hook = wan.proj_out.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(wan)
        hook.remove()
        call(wan)
        call(wan)
        assert [item.branch for item in capture.maps] == [0, 1]
        capture.clear()  # the same video again, of a model that no pipeline calls
        call(wan)
    assert [item.branch for item in capture.maps] == [0]


def test_frames_at_other_timesteps_are_no_side_of_guidance(wan):
    """Diffusion forcing: the noisiest frame of both steps is the same, and so are the latents."""
    tokens = wan.patch_embedding(WAN.call()["hidden_states"])[0, 0].numel()
    one, other = torch.full((2, 2, tokens), 300.0)
    other[:, : tokens // 2] = 0.0
    with vk.capture_maps(wan, layers=[0]) as capture:
        for timestep in (one, other, other):
            with torch.no_grad():
                wan(**WAN.call() | {"timestep": timestep})
    assert {item.timestep for item in capture.maps} == {300.0}
    assert [(item.branch, item.calls) for item in capture.maps] == [(0, 2), (1, 1)]


def test_an_unknown_model_is_captured_by_the_layout_of_the_caller():
    """With a rule and without; it is told no timestep."""
    torch.manual_seed(0)
    model, x = nn.Sequential(OwnAttention(), OwnAttention()), torch.randn(2, 11, 8)
    expected = model(x)
    query, key, value = model[0].qkv(x)
    for rule in (None, RULE):
        handle = None if rule is None else vk.apply_frames(model, rule, layout=LAYOUT)
        with vk.capture_maps(model, layout=LAYOUT) as capture:
            out = model(x)
            model(x)
        _, map_ = vk.frame_attention(query, key, value, LAYOUT, rule, return_map=True)
        assert [(item.layer, item.calls) for item in capture.maps] == [("0", 2), ("1", 2)]
        torch.testing.assert_close(capture.maps[0].with_text, map_)
        if handle is None:
            assert torch.equal(out, expected)
        else:
            assert not torch.equal(out, expected)
            handle.remove()
    assert torch.equal(model(x), expected)


class OwnNames(nn.Module):
    """A model that may be called without a timestep, or with latents by a name of its own."""

    def __init__(self):
        super().__init__()
        self.attention = OwnAttention()

    def forward(self, x, timestep=None, hidden_states=None):
        return self.attention(x if hidden_states is None else hidden_states)


@pytest.mark.parametrize("given", ["timestep", "hidden_states"])
def test_calls_that_do_not_tell_the_side_of_guidance_are_all_the_first(given):
    told = {"timestep": 300.0, "hidden_states": torch.randn(2, 11, 8)}
    with vk.capture_maps(model := OwnNames(), layout=LAYOUT) as capture:
        for _ in range(2):
            model(torch.randn(2, 11, 8), **{given: told[given]})
    assert [(item.branch, item.calls) for item in capture.maps] == [(0, 2)]


def test_what_cannot_be_captured_is_an_error(wan):
    with pytest.raises(ValueError, match="layers chooses none"):
        vk.capture_maps(wan, layers=lambda layer: False)
    latte = KINDS["LatteTransformer3DModel"].make()
    for model, layers, error, message in (
        (wan, [0, 99], ValueError, r"layers names index 99, .* has 2 layers .* \(0 to 1\)"),
        (wan, 0, TypeError, "layers must be indices or None, got int"),
        (wan, "ab", TypeError, "layers must be indices or None, got str"),
        (wan, [True], TypeError, "an index of layers"),
        (latte, [1], ValueError, "layers names 1, which there is not: the levels are 0"),
    ):
        with pytest.raises(error, match=message):
            vk.capture_maps(model, layers=layers)
    with pytest.raises(ValueError, match="layout is for full-3D transformers"):
        vk.capture_maps(SimpleNamespace(components={"unet": latte}), layout=LAYOUT)
    unknown = pytest.raises(ValueError, match="steps needs the step")
    with vk.capture_maps(wan, steps=[0]), unknown:
        call(wan)
    with pytest.raises(ValueError, match=r"has no temporal self-attention .* WanTransformer3DMod"):
        vk.capture_maps(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="compiled"):
        vk.capture_maps(torch.compile(wan, backend="eager"))


def test_gradients_reach_the_sample_through_maps_and_checkpoints(wan):
    inputs = WAN.call() | {"hidden_states": WAN.call()["hidden_states"].requires_grad_()}
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            wan.train().enable_gradient_checkpointing()
        with vk.capture_maps(wan, layers=[1], differentiable=True) as capture:
            wan(**inputs)
            value = capture.maps[0].map.diagonal(dim1=1, dim2=2).sum()
            gradients.append(torch.autograd.grad(value, inputs["hidden_states"])[0])
            assert len(capture.maps) == 1
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_a_checkpoint_does_not_compute_maps_again_that_are_not_in_the_graph(wan, monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return frame_map(*args, **options)

    monkeypatch.setattr(frames_capture, "frame_map", counted)
    wan.train().enable_gradient_checkpointing()
    with vk.capture_maps(wan):
        wan(**WAN.call())[0].sum().backward()
    assert len(calls) == 2


def test_a_model_that_is_watched_cannot_be_copied_and_later_can(wan):
    stock = call(wan)
    with vk.capture_maps(wan):
        call(wan)
        with pytest.raises(TypeError, match="MapCapture cannot be pickled or copied"):
            copy.deepcopy(wan)
    for made in (copy.deepcopy(wan), pickle.loads(pickle.dumps(wan))):
        assert torch.equal(call(made), stock)


@pytest.mark.parametrize("rule", [None, RULE, vk.FrameRule.band(1), vk.FrameRule.identity()])
def test_some_rows_stand_for_all_where_only_the_reference_runs(rule):
    """The reference takes some tokens of each frame, but where the rule asks for places."""
    torch.manual_seed(0)
    layout = vk.Layout(vk.Text(3), vk.Frames(2, 8), vk.Frames(2, 1, first=1.0, step=4.0))
    query, key = torch.randn(2, 2, 21, 2, 4, dtype=torch.float64)
    options = {"return_map": True, "map_heads": True, "backend": "reference"}
    _, every = vk.frame_attention(query, key, key, layout, rule, **options)
    found, positions = frame_map(query, key, layout, rule, heads=True, max_rows=24)
    if rule is None or rule is RULE:
        assert positions == 4
        # The tokens of frame 0 that were taken, and all that frame 5.0, of one token, has.
        chosen = torch.tensor([3 + i for i in (1, 3, 5, 7)])
        kept = vk.Layout(vk.Frames(1, 4))
        _, some = vk.frame_attention(
            query[:, chosen], key, key, kept, rule, key_layout=layout, **options
        )
        torch.testing.assert_close(found[:, :, :1], some)
        torch.testing.assert_close(found[:, :, 2:], every[:, :, 2:])
    else:
        assert positions == 9
        torch.testing.assert_close(found, every)
