"""VSTAR Apply Frame Rule on stand-ins of ComfyUI's full-3D transformers."""

import pytest
import torch

import vstar_kernels as vk
from tests.integrations import comfy
from tests.integrations.test_comfyui_tar import is_plain
from vstar_kernels.models.full3d.comfyui import FrameRuleWrapper
from vstar_kernels.models.full3d.comfyui_model import OVERRIDE

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MODELS = (comfy.WanModel, comfy.HunyuanVideo, comfy.LTXVModel)
ALWAYS = {"start": 0.0, "end": 1.0}


@pytest.fixture(params=MODELS)
def transformer(request):
    torch.manual_seed(0)
    return request.param().eval()


def video(frames=3, height=5, width=4):
    return torch.randn(1, 4, frames, height, width, generator=torch.Generator().manual_seed(1))


def call(model, sigma=1.0, sigmas=(1.0, 0.0), x=None, **more):
    return model.call(video() if x is None else x, sigma, sigmas, **more)


def frames_of(transformer, x):
    _, height, width = transformer.patch_size
    return vk.Frames(x.shape[2], -(-x.shape[3] // height) * -(-x.shape[4] // width))


def expected(transformer, rule, monkeypatch, mask_text=None, **more):
    """What the model returns with the library's attention in the place of each self-attention."""
    frames = frames_of(transformer, video())

    def attend(q, k, v, heads, mask=None, skip_reshape=False, transformer_options=None):
        if not skip_reshape:
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
        text = q.shape[1] - frames.count * frames.tokens
        layout = vk.Layout(vk.Text(text), frames)
        key_layout = None
        if mask_text:
            keep = [i for i in range(k.shape[1]) if not text - mask_text <= i < text]
            k, v = k[:, keep], v[:, keep]
            key_layout = vk.Layout(vk.Text(text - mask_text), frames)
        lay = {"key_layout": key_layout, "backend": "reference"}
        out = vk.frame_attention(q, k, v, layout, rule, **lay)
        return out.flatten(2).float()

    plain = comfy.optimized_attention
    for name, module in transformer.named_modules():
        module.is_cross = name.endswith(("cross_attn", "attn2"))
    forward = comfy.WanSelfAttention.forward

    def own_forward(self, *args, **kwargs):
        monkeypatch.setattr(comfy, "optimized_attention", plain if self.is_cross else attend)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(comfy.WanSelfAttention, "forward", own_forward)
    monkeypatch.setattr(comfy, "optimized_attention", attend)
    try:
        return call(comfy.ModelPatcher(transformer), **more)
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("inputs", "rule"),
    [
        ({"sigma": 0.7, "strength": 1.5}, vk.FrameRule.tar(0.7, 1.5)),
        ({"rule": "attenuate", "alpha": 0.5, "window": 1}, vk.FrameRule.attenuate(0.5, 1)),
        ({"rule": "window", "window": 1}, vk.FrameRule.window(1)),
    ],
)
def test_a_rule_is_on_self_attention_alone(run, transformer, monkeypatch, inputs, rule):
    model = comfy.ModelPatcher(transformer)
    (ruled,) = run("VSTARApplyFrameRule", model=model, **inputs, **ALWAYS)
    on, plain = call(ruled), call(model)
    assert is_plain(transformer)
    torch.testing.assert_close(on, expected(transformer, rule, monkeypatch), **CLOSE)
    assert (on - plain).abs().max() > 1e-4


def test_json_takes_the_place_of_the_rule_and_strength_0_is_plain(run, transformer):
    model = comfy.ModelPatcher(transformer)
    rule = vk.FrameRule.window(0) + vk.FrameRule.tar(1.0, 2.0)
    (ruled,) = run("VSTARApplyFrameRule", model=model, json=rule.to_json(), **ALWAYS)
    made = ruled.wrappers[comfy.DIFFUSION_MODEL]["vstar_frame_rule"][0]
    assert made._rule == rule
    (off,) = run("VSTARApplyFrameRule", model=ruled, strength=0.0, **ALWAYS)
    torch.testing.assert_close(call(off), call(model), **CLOSE)


def test_steps_and_layers_are_chosen(run, transformer):
    model = comfy.ModelPatcher(transformer)
    sigmas = [4.0, 3.0, 2.0, 1.0, 0.0]
    (ruled,) = run("VSTARApplyFrameRule", model=model, start=0.25, end=0.5)
    on = [not torch.equal(call(ruled, s, sigmas), call(model, s, sigmas)) for s in sigmas[:-1]]
    assert on == [False, True, False, False]
    (first,) = run("VSTARApplyFrameRule", model=model, layers="0", **ALWAYS)
    (both,) = run("VSTARApplyFrameRule", model=model, layers="0-1", **ALWAYS)
    (every,) = run("VSTARApplyFrameRule", model=model, **ALWAYS)
    assert torch.equal(call(both), call(every))
    assert not torch.equal(call(first), call(every))
    (none,) = run("VSTARApplyFrameRule", model=model, layers="1, 2", **ALWAYS)
    with pytest.raises(ValueError, match="layers names 2, and this"):
        call(none)


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_put_back(run, transformer, monkeypatch, fails):
    def other(func, *args, **kwargs):
        return func(*args, **kwargs) * 2  # of another node

    model = comfy.ModelPatcher(transformer)
    (ruled,) = run("VSTARApplyFrameRule", model=model, **ALWAYS)
    options = {OVERRIDE: other, "wrappers": ruled.wrappers, "sample_sigmas": None}
    if fails:
        last = list(transformer.children())[-1][-1]
        monkeypatch.setattr(last, "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transformer(video(), 0, None, options)
        monkeypatch.undo()
    else:
        transformer(video(), 0, None, options)
    assert options[OVERRIDE] is other
    assert is_plain(transformer)


def test_another_nodes_attention_is_left_to_cross_attention(run, monkeypatch):
    torch.manual_seed(0)
    transformer = comfy.WanModel().eval()
    called = []

    def other(func, *args, **kwargs):
        called.append(func)
        return func(*args, **kwargs)

    (ruled,) = run("VSTARApplyFrameRule", model=comfy.ModelPatcher(transformer), **ALWAYS)
    call(ruled, options={OVERRIDE: other})
    assert len(called) == 2  # of four


def test_tokens_before_the_video_belong_to_no_frame(run, monkeypatch):
    torch.manual_seed(0)
    rule = vk.FrameRule.tar(1.0)
    for transformer, more in ((comfy.WanModel(), {"reference": 6}), (comfy.HunyuanVideo(), {})):
        (ruled,) = run("VSTARApplyFrameRule", model=comfy.ModelPatcher(transformer), **ALWAYS)
        on = call(ruled, **more)
        torch.testing.assert_close(on, expected(transformer, rule, monkeypatch, **more), **CLOSE)


def test_text_that_is_masked_is_left_out(run, monkeypatch):
    torch.manual_seed(0)
    transformer = comfy.HunyuanVideo().eval()
    (ruled,) = run("VSTARApplyFrameRule", model=comfy.ModelPatcher(transformer), **ALWAYS)
    frames = frames_of(transformer, video())
    mask = torch.zeros(1, 1, 3 + frames.count * frames.tokens)
    mask[..., 2] = torch.finfo(torch.float32).min
    want = expected(transformer, vk.FrameRule.tar(1.0), monkeypatch, mask_text=1)
    torch.testing.assert_close(call(ruled, mask=mask), want, **CLOSE)
    for wrong in (mask.flip(-1), mask / mask.min() * -2, mask / mask.min() * 2):
        with pytest.raises(ValueError, match=r"double_blocks.0 masks its attention, \(1, 1, "):
            call(ruled, mask=wrong)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (comfy.WanModel, {"time_dim_concat": video()}, "does not support time_dim_concat"),
        (comfy.WanModel, {"context_latents": [video()]}, "does not support context_latents"),
        (comfy.LTXVModel, {"keyframe_idxs": video()}, "does not support keyframe_idxs"),
        (comfy.LTXVModel, {"extra": 4}, r"attends from 64 to 64 tokens, and the latents are"),
        (comfy.WanModel, {"x": torch.randn(1, 4, 6, 6)}, r"is called with \(2, 4, 6, 6\)"),
    ],
)
def test_sequences_of_more_than_the_video_are_refused(run, model, more, message):
    transformer = model().eval()
    (ruled,) = run("VSTARApplyFrameRule", model=comfy.ModelPatcher(transformer), **ALWAYS)
    with pytest.raises(ValueError, match=message):
        call(ruled, **more)
    assert is_plain(transformer)


def test_a_text_after_the_video_is_refused(run):
    """As ComfyUI before 0.20 has it: the rule would take the text for frames."""
    transformer = comfy.HunyuanVideo().eval()
    transformer.double_blocks[0].flipped_img_txt = True
    (ruled,) = run("VSTARApplyFrameRule", model=comfy.ModelPatcher(transformer), **ALWAYS)
    with pytest.raises(ValueError, match="puts the text of HunyuanVideo after the video"):
        call(ruled)
    assert is_plain(transformer)


def test_a_call_without_options_is_refused():
    rule = FrameRuleWrapper(vk.FrameRule.tar(1.0), steps=None)
    executor = comfy.WrapperExecutor(None, comfy.WanModel(), [])
    with pytest.raises(ValueError, match="this WanModel is called without transformer_options"):
        rule(executor, video(), torch.zeros(1))


def test_attention_by_other_means_is_not_silently_plain(run, transformer, monkeypatch):
    (ruled,) = run("VSTARApplyFrameRule", model=comfy.ModelPatcher(transformer), **ALWAYS)
    kinds = (comfy.WanSelfAttention, comfy.DoubleStreamBlock)
    own = next(m for m in transformer.modules() if isinstance(m, kinds))
    monkeypatch.setattr(own, "forward", lambda x, *args, **kwargs: x)
    with pytest.raises(RuntimeError, match="attends by something that another node has put"):
        call(ruled)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"start": 0.4, "end": 0.4}, "start, 0.4, must be before end, 0.4"),
        ({"layers": "first"}, "layers must be numbers from 0"),
        ({"layers": "9-0"}, "layers must name ranges from below, got '9-0'"),
        ({"json": "{}"}, "the rule changes nothing"),
        ({"json": "[1]"}, "not a rule|object|dictionary"),
    ],
)
def test_bad_values_are_refused_at_once(run, inputs, message):
    with pytest.raises(ValueError, match=message):
        run("VSTARApplyFrameRule", model=comfy.ModelPatcher(comfy.WanModel()), **inputs)


def test_models_that_are_not_known_are_refused_at_once(run):
    model = comfy.ModelPatcher(comfy.UNetModel())
    with pytest.raises(ValueError, match=r"knows no UNetModel: it is for Wan \(WanModel"):
        run("VSTARApplyFrameRule", model=model)


def test_what_a_model_asks_of_its_attention_is_honoured(run, monkeypatch):
    """A scale, fewer heads of keys and the shape of the output, as newer models pass them."""
    transformer = comfy.LTXVModel().eval()
    frames = frames_of(transformer, video())
    tokens = frames.count * frames.tokens
    q, k, v = (torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2))
    options = {"scale": 0.2, "enable_gqa": True, "attn_precision": torch.float32}
    seen = []

    def forward(x, transformer_options):
        for shape in ({"skip_reshape": True, "skip_output_reshape": True}, {}):
            given = [q, k, v] if shape else [y.transpose(1, 2).flatten(2) for y in (q, k, v)]
            more = {"transformer_options": transformer_options, **shape, **options}
            seen.append(comfy.optimized_attention(*given, 4, **more))
        return x

    monkeypatch.setattr(transformer.transformer_blocks[0].attn1, "forward", forward)
    (ruled,) = run("VSTARApplyFrameRule", model=comfy.ModelPatcher(transformer), **ALWAYS)
    call(ruled)
    args = [y.transpose(1, 2) for y in (q, k, v)]
    rule = vk.FrameRule.tar(1.0)
    want = vk.frame_attention(*args, vk.Layout(frames), rule, scale=0.2, backend="reference")
    torch.testing.assert_close(seen[0], want.transpose(1, 2), **CLOSE)
    torch.testing.assert_close(seen[1], want.flatten(2), **CLOSE)
