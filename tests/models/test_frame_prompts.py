import contextlib
import gc
import weakref

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

from examples import tiny
from tests.models import models

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, CHANNELS = models.TOKENS, models.TEXT
FRAMES = 6  # the only number that this Latte takes
NAMES = (
    "UNet3DConditionModel",
    "I2VGenXLUNet",
    "UNetMotionModel",
    "LatteTransformer3DModel",
)
draw = models.noise


@pytest.fixture(scope="module", params=NAMES)
def model(request, one_thread):
    return models.make(request.param)


@pytest.fixture(scope="module")
def unet(one_thread):
    return models.make("UNet3DConditionModel")


def call(model, text, *, module=None, batch=None, **changes):
    """The model's output for ``(batch, tokens, channels)`` text, or a row for each frame."""
    name, batch = type(model).__name__, batch or len(text)
    inputs = models.KINDS[name].inputs(draw(batch, 4, FRAMES, 4, 4, seed=7))
    if name == "UNetMotionModel" and len(text) == batch:
        text = text.repeat_interleave(FRAMES, dim=0)
    inputs |= {"timestep": torch.tensor([3]).expand(batch), "encoder_hidden_states": text}
    with torch.no_grad():
        return (model if module is None else module)(**inputs | changes, return_dict=False)[0]


class FrameTexts:
    """Cross-attention to texts of its own: a second way to the same result."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        context = encoder_hidden_states
        if context is not None:
            context = torch.cat([self.rows, context[:, self.rows.shape[1] :]], dim=1)
        return AttnProcessor2_0()(attn, hidden_states, context, attention_mask)


def call_with_texts(model, rows, text):
    """Every spatial cross-attention attends to ``rows``, in the place of ``text``."""
    if hasattr(model, "caption_projection"):
        rows = model.caption_projection(rows)
    layers = [
        module
        for module in model.modules()
        if getattr(module, "is_cross_attention", False) and hasattr(module, "set_processor")
    ]
    assert layers
    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(FrameTexts(rows))
        return call(model, text)
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)


def assert_same(out, expected, model):
    """Bit for bit, except where the model projects the text: more rows may round otherwise."""
    exact = not hasattr(model, "caption_projection")
    torch.testing.assert_close(out, expected, rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("guided", [False, True])
def test_one_text_in_all_frames_is_the_native_path(model, guided):
    prompt, other, negative = draw(3, 1, TOKENS, CHANNELS).unbind()
    expected = call(model, torch.cat([negative, prompt]) if guided else prompt)
    given = torch.cat([negative, other]) if guided else other
    assert not torch.allclose(call(model, given), expected, atol=1e-5)
    with vk.condition_frames(model, prompt.expand(FRAMES, -1, -1)):
        assert_same(call(model, given), expected, model)


def test_each_frame_has_its_own_text(model):
    texts = draw(FRAMES, TOKENS, CHANNELS)
    text = draw(1, TOKENS, CHANNELS, seed=1)
    expected = call_with_texts(model, texts, text)
    assert not torch.allclose(call(model, text), expected, atol=1e-5)
    with vk.condition_frames(model, texts):
        assert_same(call(model, text), expected, model)


def test_the_unconditional_half_keeps_the_text_that_it_is_given(model):
    texts = draw(FRAMES, TOKENS, CHANNELS)
    given = draw(2, TOKENS, CHANNELS, seed=1)
    rows = torch.cat([given[:1].expand(FRAMES, -1, -1), texts])
    with vk.condition_frames(model, texts):
        assert_same(call(model, given), call_with_texts(model, rows, given), model)


def test_negative_replaces_the_unconditional_half(model):
    texts, negative = draw(2, FRAMES, TOKENS, CHANNELS).unbind()
    given = draw(1, 2, CHANNELS, seed=1).expand(2, -1, -1)  # of other tokens: none are kept
    expected = call_with_texts(model, torch.cat([negative, texts]), draw(2, TOKENS, CHANNELS))
    with vk.condition_frames(model, texts, negative=negative):
        assert_same(call(model, given), expected, model)


def test_several_prompts_with_several_videos_each(model):
    texts = draw(2, FRAMES, TOKENS, CHANNELS)
    given = draw(8, TOKENS, CHANNELS, seed=1)
    rows = torch.cat([given[:4].repeat_interleave(FRAMES, 0), *(texts[i] for i in (0, 0, 1, 1))])
    with vk.condition_frames(model, texts, guidance=True):
        assert_same(call(model, given), call_with_texts(model, rows, given), model)


def test_the_motion_model_takes_a_text_for_each_frame_natively():
    model = models.make("UNetMotionModel")
    texts = draw(2, FRAMES, TOKENS, CHANNELS)
    with vk.condition_frames(model, texts, guidance=False):
        out = call(model, draw(2, TOKENS, CHANNELS, seed=1))
    assert torch.equal(out, call(model, texts.flatten(0, 1), batch=2))


def test_ip_adapters_keep_their_image():
    model = models.make("UNetMotionModel")
    images = [draw(1, 1, 4, CHANNELS, seed=2)]
    model.encoder_hid_proj = torch.nn.Module()
    model.encoder_hid_proj.forward = lambda embeds: [image.flatten(0, 1) for image in embeds]
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    for name, module in model.named_modules():
        if name.endswith("attn2") and module.is_cross_attention:
            ip = IPAdapterAttnProcessor2_0(module.inner_dim, CHANNELS, num_tokens=(4,))
            module.set_processor(ip.requires_grad_(False))
    prompt, other = draw(2, 1, TOKENS, CHANNELS).unbind()
    conditions = {"added_cond_kwargs": {"image_embeds": images}}
    expected = call(model, prompt, **conditions)
    no_image = {"added_cond_kwargs": {"image_embeds": [0 * images[0]]}}
    assert not torch.allclose(call(model, prompt, **no_image), expected, atol=1e-5)
    with vk.condition_frames(model, prompt.expand(FRAMES, -1, -1)):
        assert torch.equal(call(model, other, **conditions), expected)


@pytest.mark.parametrize("make", [tiny.text_to_video, tiny.animatediff])
def test_in_a_pipeline_the_prompt_no_longer_matters(make):
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_frames": 4, "height": 16, "width": 16, "num_inference_steps": 2}

    def sample(prompt):
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, **settings, output_type="latent", generator=generator).frames

    embeddings, _ = pipe.encode_prompt("a cat", "cpu", 1, do_classifier_free_guidance=False)
    expected = sample("a cat")
    with vk.condition_frames(pipe, embeddings.expand(4, -1, -1)):
        assert torch.equal(sample("a dog"), expected)
    assert not torch.equal(sample("a dog"), expected)


def test_half_precision_and_gradients():
    model = models.make("UNet3DConditionModel").bfloat16()
    texts = draw(4, TOKENS, CHANNELS).double().requires_grad_()
    text = draw(1, TOKENS, CHANNELS).bfloat16()
    with vk.condition_frames(model, texts):
        out = model(draw(1, 4, 4, 4, 4).bfloat16(), 3, encoder_hidden_states=text).sample
    assert out.dtype == torch.bfloat16
    out[:, :, 2].float().square().sum().backward()
    assert texts.grad.abs().sum(dim=(1, 2)).gt(0).all()


def test_a_model_that_has_been_compiled_and_called():
    model = models.make_one_block()
    texts, text = draw(FRAMES, TOKENS, CHANNELS), draw(1, TOKENS, CHANNELS, seed=1)
    compiled = torch.compile(model, backend="eager")
    plain = call(model, text)
    with vk.condition_frames(model, texts):
        expected = call(model, text)
    assert not torch.allclose(expected, plain, atol=1e-3)

    torch.testing.assert_close(call(model, text, module=compiled), plain, rtol=0, atol=1e-5)
    with vk.condition_frames(compiled, texts):
        out = call(model, text, module=compiled)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(call(model, text, module=compiled), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tar_first", [True, False])
@pytest.mark.parametrize("tar_leaves_first", [True, False])
def test_it_goes_with_tar_in_any_order(unet, tar_first, tar_leaves_first):
    texts, text = draw(FRAMES, TOKENS, CHANNELS), draw(1, TOKENS, CHANNELS, seed=1)
    makers = {
        "tar": lambda: vk.apply_tar(unet, vk.TARConfig(sigma=1.0, steps=None)),
        "texts": lambda: vk.condition_frames(unet, texts),
    }
    plain = call(unet, text)
    alone = {}
    for name, make in makers.items():
        with make():
            alone[name] = call(unet, text)
    order = ["tar", "texts"] if tar_first else ["texts", "tar"]
    handles = {name: makers[name]() for name in order}
    both = call(unet, text)
    assert all((both - other).abs().max() > 1e-4 for other in (plain, *alone.values()))
    first, last = ("tar", "texts") if tar_leaves_first else ("texts", "tar")
    handles[first].remove()
    assert torch.equal(call(unet, text), alone[last])
    handles[last].remove()
    assert torch.equal(call(unet, text), plain)


def hooks(model):
    return [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_removing_leaves_nothing_behind(model):
    text = draw(1, TOKENS, CHANNELS)
    before = call(model, text)
    handle = vk.condition_frames(model, draw(FRAMES, TOKENS, CHANNELS, seed=1))
    changed = call(model, text)
    assert not torch.equal(changed, before)
    handle.remove()
    handle.remove()
    assert torch.equal(call(model, text), before)
    with pytest.raises(KeyError), vk.condition_frames(model, draw(FRAMES, TOKENS, CHANNELS)):
        raise KeyError
    assert not hooks(model)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_no_context_is_kept_after_a_forward_that_fails(unet, monkeypatch, error):
    contexts = []

    def fail(_):
        raise error

    def see(block, args, kwargs):
        contexts.append(weakref.ref(kwargs["encoder_hidden_states"]))

    monkeypatch.setattr(unet.conv_out, "forward", fail)
    with vk.condition_frames(unet, draw(FRAMES, TOKENS, CHANNELS)):
        seen = unet.mid_block.register_forward_pre_hook(see, with_kwargs=True)
        with contextlib.suppress(error):
            call(unet, draw(1, TOKENS, CHANNELS))
        seen.remove()
        gc.collect()
        assert [context() for context in contexts] == [None]


def test_a_second_handle_must_wait_for_the_first(unet):
    texts = draw(FRAMES, TOKENS, CHANNELS)
    with (
        vk.condition_frames(unet, texts),
        pytest.raises(ValueError, match=r"already.*remove\(\)"),
    ):
        vk.condition_frames(unet, texts)
    vk.condition_frames(unet, texts).remove()


@pytest.mark.parametrize(
    ("embeddings", "options", "message"),
    [
        (draw(FRAMES, TOKENS), {}, r"embeddings must be \(frames, .*got \(6, 3\)"),
        (draw(0, TOKENS, CHANNELS), {}, r"embeddings must be .* none of them 0"),
        (torch.ones(2, 2, 2, dtype=torch.long), {}, "floating-point type, got torch.int64"),
        (
            draw(FRAMES, TOKENS, CHANNELS),
            {"negative": draw(1, TOKENS, CHANNELS)},
            r"negative must have the shape of embeddings, \(6, 3, 24\), got \(1, 3, 24\)",
        ),
        (
            draw(FRAMES, TOKENS, CHANNELS),
            {"negative": draw(FRAMES, TOKENS, CHANNELS), "guidance": False},
            "guidance=False contradicts negative",
        ),
    ],
)
def test_wrong_arguments_are_refused(unet, embeddings, options, message):
    with pytest.raises(ValueError, match=message):
        vk.condition_frames(unet, embeddings, **options)
    assert not hooks(unet)


def test_wrong_kinds_are_refused(unet):
    with pytest.raises(TypeError, match="guidance must be True or False, got str"):
        vk.condition_frames(unet, torch.zeros(4, 3, 32), guidance="no")
    with pytest.raises(TypeError, match=r"embeddings must be a torch\.Tensor, got list"):
        vk.condition_frames(unet, [1.0])
    with pytest.raises(TypeError, match=r"pipe_or_model must be .*got dict"):
        vk.condition_frames({}, draw(FRAMES, TOKENS, CHANNELS))


def test_models_without_text_are_refused():
    with pytest.raises(ValueError, match=r"UNetSpatioTemporalConditionModel, .* has no text"):
        vk.condition_frames(tiny.stable_video_diffusion(), draw(FRAMES, TOKENS, CHANNELS))


@pytest.mark.parametrize(
    ("embeddings", "options", "given", "changes", "message"),
    [
        ((8, 3, 24), {}, (1, 3, 24), {}, "embeddings have 8 frames .* called with 6"),
        ((6, 3, 32), {}, (1, 3, 24), {}, "embeddings have 32 channels .* called with 24"),
        ((6, 3, 24), {}, (3, 3, 24), {}, "batch of 3 with embeddings for 1 .*guidance=True"),
        ((6, 3, 24), {"guidance": True}, (1, 3, 24), {}, "a multiple of 2, .* called with 1"),
        ((2, 6, 3, 24), {"guidance": False}, (3, 3, 24), {}, "multiple of 2, .* called with 3"),
        ((2, 6, 3, 24), {"guidance": True}, (6, 3, 24), {}, "multiple of 4, .* called with 6"),
        ((6, 4, 24), {}, (2, 3, 24), {}, "embeddings have 4 tokens, .* has 3: .*pass negative"),
        ((6, 3, 24), {}, (1, 3, 24), {"encoder_hidden_states": None}, "without encoder_hidden"),
        ((6, 3, 24), {}, (1, 3, 24), {"attention_mask": torch.ones(1, 3)}, "attention_mask"),
    ],
)
def test_calls_that_do_not_fit_are_refused(unet, embeddings, options, given, changes, message):
    with (
        vk.condition_frames(unet, draw(*embeddings), **options),
        pytest.raises(ValueError, match=message),
    ):
        call(unet, draw(*given), **changes)


def test_a_mask_by_position_is_refused():
    latte = models.make("LatteTransformer3DModel")
    text, mask = draw(1, TOKENS, CHANNELS), torch.ones(1, TOKENS)
    with (
        vk.condition_frames(latte, draw(FRAMES, TOKENS, CHANNELS)),
        pytest.raises(ValueError, match="cannot be combined with encoder_attention_mask"),
    ):
        latte(draw(1, 4, FRAMES, 4, 4), torch.tensor([3]), text, mask)


def test_guidance_is_not_guessed_from_halves_that_are_the_same(unet):
    texts, text = draw(FRAMES, TOKENS, CHANNELS), draw(1, TOKENS, CHANNELS).expand(2, -1, -1)
    with (
        vk.condition_frames(unet, texts),
        pytest.raises(ValueError, match=r"both halves .* are the same: pass guidance=True or"),
    ):
        call(unet, text)
    with vk.condition_frames(unet, texts, guidance=False):
        call(unet, text)


def test_the_motion_model_needs_a_text_for_each_frame():
    model = models.make("UNetMotionModel")
    with (
        vk.condition_frames(model, draw(FRAMES, TOKENS, CHANNELS)),
        pytest.raises(ValueError, match="6 rows, got 1"),
    ):
        model(draw(1, 4, FRAMES, 4, 4), 3, encoder_hidden_states=draw(1, TOKENS, CHANNELS))
