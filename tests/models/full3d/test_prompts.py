"""A text for each latent frame, or for each stage, in transformers with cross-attention to text."""

import copy
from types import SimpleNamespace

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
from tests.models.full3d.tiny import PLACES, TINY

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES = 3

NAMES = ("wan", "wan-i2v", "wan-vace", "skyreels-v2", "anyflow", "cosmos", "ltx", "allegro")


class Models(dict):
    """Models by name, each made when it is asked for: diffusers may be older than some."""

    def __missing__(self, name):
        self[name] = TINY[name].make()
        return self[name]


@pytest.fixture(scope="module")
def models(one_thread):
    return Models()


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


class Folded:
    """Cross-attention with the frames in the batch, each with its own context: a second way."""

    def __init__(self, processor, contexts):
        self.processor, self.contexts = processor, contexts

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
        rotary_emb=None, temb=None, image_rotary_emb=None,
    ):  # fmt: skip
        rows = hidden_states.unflatten(1, (FRAMES, PLACES)).flatten(0, 1)
        tokens = self.contexts.shape[-2]
        image = encoder_hidden_states[:, : encoder_hidden_states.shape[1] - FRAMES * tokens]
        text = encoder_hidden_states[:, image.shape[1] :].unflatten(1, (FRAMES, tokens))
        context = torch.cat([image[:, None].expand(-1, FRAMES, -1, -1), text], 2).flatten(0, 1)
        out = self.processor(attn, rows, context)
        return out.unflatten(0, (-1, FRAMES)).flatten(1, 2)


class Masked:
    """The model's own cross-attention, with a bias on each pair of tokens."""

    def __init__(self, processor, bias):
        self.processor, self.bias = processor, bias

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
        rotary_emb=None,
    ):  # fmt: skip
        return self.processor(attn, hidden_states, encoder_hidden_states, self.bias)


def cross(model):
    return [m for name, m in model.named_modules() if name.endswith("attn2")]


def run(model, inputs):
    return model(**inputs, return_dict=False)[0]


def inputs_of(name, **changes):
    inputs = TINY[name].call(FRAMES)
    inputs.pop("return_dict")
    text = inputs["encoder_hidden_states"]
    inputs["encoder_hidden_states"] = text.flatten(1, -2)
    return inputs | changes


def texts_of(name, stages=FRAMES, batch=2):
    generator = torch.Generator().manual_seed(5)
    tokens, channels = inputs_of(name)["encoder_hidden_states"].shape[1:]
    return torch.randn(batch, stages, tokens, channels, generator=generator)


def with_processors(model, make, inputs):
    layers = cross(model)
    before = [layer.processor for layer in layers]
    try:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = make(processor)
        return run(model, inputs)
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = processor


def side_by_side(name, texts):
    """The call of the model with all texts as one."""
    changes = {"encoder_hidden_states": texts.flatten(1, 2)}
    if "encoder_attention_mask" in inputs_of(name):
        changes["encoder_attention_mask"] = None
    return inputs_of(name, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_each_frame_hears_its_own_text(models, name):
    model, texts = models[name], texts_of(name)
    if name == "wan-i2v":  # whose own processor takes the last 512 tokens for text
        texts = texts[:, :, :512]
    stock = run(model, inputs_of(name))
    expected = with_processors(model, lambda p: Folded(p, texts), side_by_side(name, texts))
    with vk.condition_frames(model, texts, guidance=False):
        out = run(model, inputs_of(name))
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    assert (out - stock).abs().max() > 1e-3
    assert torch.equal(run(model, inputs_of(name)), stock)


@pytest.mark.parametrize("name", ["wan", "ltx", "cosmos"])
def test_one_text_for_all_frames_is_the_native_path(models, name):
    """With any rule: of equal texts it does not matter which a frame hears."""
    model, text = models[name], texts_of(name, stages=1)
    expected = run(model, inputs_of(name, encoder_hidden_states=text[:, 0]))
    for stages, rule in ((FRAMES, None), (2, vk.FrameRule.relay([(0, 0), (1, 2)], None, 0.3))):
        texts = text.expand(-1, stages, -1, -1)
        with vk.condition_frames(model, texts, guidance=False, rule=rule):
            out = run(model, inputs_of(name))
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["wan", "skyreels-v2", "wan-vace"])
def test_prompt_relay(models, name):
    """The penalty on each pair of tokens, as a mask of the model's own attention."""
    model, texts, sigma = models[name], texts_of(name, stages=2), 0.4
    frame = torch.arange(FRAMES).repeat_interleave(PLACES).float()
    past = [(frame - 0).abs(), torch.relu((frame - 1.5).abs() - 0.5)]
    bias = torch.stack([-(x**2) / (2 * sigma**2) for x in past], -1)
    bias = bias.repeat_interleave(texts.shape[2], -1)[None, None]
    expected = with_processors(model, lambda p: Masked(p, bias), side_by_side(name, texts))
    rule = vk.FrameRule.relay([(0, 0), (1, 2)], None, sigma)
    with vk.condition_frames(model, texts, guidance=False, rule=rule):
        out = run(model, inputs_of(name))
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_tokens_that_do_not_exist_are_not_heard(models):
    """LTX: masks that differ by frame and by sequence, of the prompt and of the pipeline's text."""
    model, texts = models["ltx"], texts_of("ltx", batch=1)
    counts = [7, 3, 5]
    mask = (torch.arange(7) < torch.tensor(counts)[:, None])[None]
    given = inputs_of("ltx", encoder_attention_mask=torch.tensor([[1.0] * 7, [1.0] * 4 + [0] * 3]))
    junk = texts.masked_fill(~mask[..., None], 1e3)
    with vk.condition_frames(model, junk, mask=mask):
        out = run(model, given)
    expected_uncond = run(model, given)[0]
    torch.testing.assert_close(out[0], expected_uncond, rtol=0, atol=2e-6)
    # The same texts without the tokens that nobody hears, one frame's text at a time.
    for frame, count in enumerate(counts):
        alone = texts[:, frame, :count].expand(2, -1, -1)
        kept = inputs_of("ltx", encoder_hidden_states=alone, encoder_attention_mask=None)
        first = {}

        def note(module, args, kwargs, output, first=first):
            first.setdefault("out", output)

        hook = cross(model)[0].register_forward_hook(note, with_kwargs=True)
        run(model, kept)
        expected = first.pop("out")[1].unflatten(0, (FRAMES, PLACES))[frame]
        with vk.condition_frames(model, junk, mask=mask):
            run(model, given)
        hook.remove()
        found = first["out"][1].unflatten(0, (FRAMES, PLACES))[frame]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_wan_is_guided_in_turns(models):
    """The second call at a timestep is the unconditional one: it is left alone, or has negative."""
    model, texts, negative = models["wan"], *texts_of("wan", batch=2).unsqueeze(1)
    calls = [
        {
            "hidden_states": inputs_of("wan")["hidden_states"][:1] * t,
            "encoder_hidden_states": text[:, 0],
            "timestep": torch.tensor([t]),
        }
        for t in (9, 5)
        for text in texts_of("wan", stages=1)[:, None]
    ]
    stock = [run(model, call) for call in calls]
    with vk.condition_frames(model, texts, guidance=False):
        prompted = [run(model, call) for call in calls]
    with vk.condition_frames(model, negative, guidance=False):
        negated = [run(model, call) for call in calls]
    expected = [prompted[0], stock[1], prompted[2], stock[3]]
    with_negative = [prompted[0], negated[1], prompted[2], negated[3]]
    for options, wanted in (
        ({}, expected),
        ({"guidance": True}, expected),
        ({"negative": negative}, with_negative),
    ):
        with vk.condition_frames(model, texts, **options):
            for _ in range(2):  # the next video begins with the conditional call again
                for call, out in zip(calls, wanted, strict=True):
                    torch.testing.assert_close(run(model, call), out, rtol=0, atol=2e-6)
    with vk.condition_frames(model, texts):  # a call of perturbed guidance, and none at all
        for index in (0, 1, 0, 2, 2, 0):
            torch.testing.assert_close(run(model, calls[index]), expected[index], rtol=0, atol=2e-6)


def test_a_run_that_is_stopped_does_not_turn_the_sides_of_the_next(models):
    model, texts, negative = models["wan"], *texts_of("wan", batch=2).unsqueeze(1)
    call = {
        "hidden_states": inputs_of("wan")["hidden_states"][:1],
        "encoder_hidden_states": texts[:, 0],
        "timestep": torch.tensor([9]),
    }

    class Pipeline:
        def __init__(self):
            self.components, self.scheduler = {"transformer": model}, SimpleNamespace()

        def __call__(self):
            self.scheduler.timesteps = torch.tensor([9])
            return run(model, call)

    def fail(*_):
        raise KeyboardInterrupt

    with vk.condition_frames(model, texts, negative=negative):
        first = Pipeline()()
        torch.testing.assert_close(Pipeline()(), first, rtol=0, atol=0)
    with vk.condition_frames(model, texts, negative=negative):
        hook = model.blocks[-1].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(model, call)
        hook.remove()
        torch.testing.assert_close(run(model, call), first, rtol=0, atol=0)
        assert not torch.equal(run(model, call), first)  # the unconditional one


def test_ltx_is_guided_in_one_batch(models):
    model, texts = models["ltx"], texts_of("ltx", batch=1)
    given = inputs_of("ltx")
    stock = run(model, given)
    with vk.condition_frames(model, texts.expand(2, -1, -1, -1)):
        both = run(model, given)
    with vk.condition_frames(model, texts, negative=texts.flip(1)) as handle:
        negated = run(model, given)
        handle.remove()
        assert torch.equal(run(model, given), stock)
    with vk.condition_frames(model, texts):
        out = run(model, given)
    torch.testing.assert_close(out[0], stock[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(out[1], both[1], rtol=0, atol=2e-6)
    torch.testing.assert_close(negated[1], both[1], rtol=0, atol=2e-6)
    assert (negated[0] - stock[0]).abs().max() > 1e-4


def test_with_a_rule_between_frames(models):
    """Self-attention under TAR and cross-attention to stages, whichever is taken off first."""
    model, texts = models["wan"], texts_of("wan")
    stock = run(model, inputs_of("wan"))
    tar = vk.apply_frames(model, vk.FrameRule.tar(1.0))
    prompts = vk.condition_frames(model, texts, guidance=False)
    both = run(model, inputs_of("wan"))
    tar.remove()
    alone = run(model, inputs_of("wan"))
    prompts.remove()
    assert torch.equal(run(model, inputs_of("wan")), stock)
    assert min((both - alone).abs().max(), (both - stock).abs().max()) > 1e-4


def test_fused_projections_and_casts_keep_the_texts():
    model = TINY["wan"].make().bfloat16()
    inputs = {n: x.bfloat16() if n != "timestep" else x for n, x in inputs_of("wan").items()}
    texts = texts_of("wan")
    with vk.condition_frames(model, texts, guidance=False):
        expected = run(model, inputs)
        model.fuse_qkv_projections()
        torch.testing.assert_close(run(model, inputs), expected, rtol=0, atol=0.05)
        assert (run(model, inputs) - expected).float().abs().mean() < 2e-3


def test_anyflow_with_an_image_is_refused():
    """Its cross-attention projects the image's tokens as it does the text's."""
    model = TINY["anyflow"].make(image_dim=16)
    inputs = inputs_of("anyflow") | {"encoder_hidden_states_image": torch.randn(2, 9, 16)}
    with (
        vk.condition_frames(model, texts_of("anyflow")),
        pytest.raises(ValueError, match="encoder_hidden_states_image, which must be left out"),
    ):
        run(model, inputs)


def test_the_copy_of_a_model_is_refused(models):
    with (
        vk.condition_frames(models["wan"], texts_of("wan"), guidance=False),
        pytest.raises(TypeError, match="PromptedModel cannot be pickled or copied"),
    ):
        copy.deepcopy(models["wan"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: vk.condition_frames(m["wan"], t[:, :2]), "each of the video's 3 latent"),
        (lambda m, t: vk.condition_frames(m["wan"], t[..., :3]), "embeddings have 3 channels"),
        (
            lambda m, t: vk.condition_frames(m["wan"], t, rule=vk.FrameRule.relay([(0, 1)], 1, 1)),
            "has 1 segments, one for each frame of keys, the keys have 3",
        ),
        (
            lambda m, t: vk.condition_frames(m["ltx"], t[:1, :, :3]),
            "embeddings have 3 tokens, the text of the unconditional half.*has 7",
        ),
        (
            lambda m, t: vk.condition_frames(m["ltx"], t.repeat(2, 1, 1, 1)[:3]),
            "a batch of 2 with embeddings for 3 prompts",
        ),
        (
            lambda m, t: vk.condition_frames(m["ltx"], t, mask=torch.zeros(t.shape[:3])),
            "mask must leave each text a token at least",
        ),
    ],
)
def test_what_does_not_fit_raises_at_the_call(models, call, message):
    with (
        call(models, texts_of("wan")) as handle,
        pytest.raises(ValueError, match=message),
    ):
        run(
            handle.models[0],
            inputs_of("ltx" if "LTX" in type(handle.models[0]).__name__ else "wan"),
        )


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan", "mochi"])
def test_joint_attention_is_refused(name):
    with pytest.raises(ValueError, match="Transformer3DModel has no cross-attention to text"):
        vk.condition_frames(TINY[name].make(), torch.zeros(3, 5, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": 1}, "rule must be a FrameRule, got int"),
        ({"mask": torch.ones(3, 2)}, r"mask must have the shape of embeddings.*\(2, 3, 7\)"),
        ({"mask": [1]}, "mask must be a torch.Tensor, got list"),
        ({"negative_mask": torch.ones(2, 3, 7)}, "negative_mask is for negative, which was not"),
    ],
)
def test_wrong_arguments(models, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        vk.condition_frames(models["wan"], texts_of("wan"), **options)


def test_a_model_has_one_text_for_each_frame(models):
    with (
        vk.condition_frames(models["wan"], texts_of("wan")),
        pytest.raises(ValueError, match="has frame prompts already"),
    ):
        vk.condition_frames(models["wan"], texts_of("wan"))
