"""VSTAR Apply Prompts over Time on stand-ins of ComfyUI's full-3D transformers."""

import math
import types

import pytest
import torch

import vstar_kernels as vk
from tests.integrations import comfy
from tests.integrations.test_comfyui_tar import is_plain
from vstar_kernels import testing
from vstar_kernels.models.full3d import comfyui_prompts
from vstar_kernels.models.full3d.comfyui_model import OVERRIDE
from vstar_kernels.models.full3d.comfyui_prompts import PromptsWrapper, StageTexts
from vstar_kernels.models.hooks import Hooks

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = (comfy.WanModel, comfy.LTXVModel)
SIGMAS = [4.0, 3.0, 2.0, 1.0, 0.0]
FRAMES = 6  # latent ones
STAGES = "a bud\na half open rose\nan open rose"
EQUAL = [(0, 1), (2, 3), (4, 5)]  # the parts of three stages


class CLIP:
    """Encodes each word of a text as a token; with ``masks``, ends texts with tokens to hide."""

    def __init__(self, masks=False, parts=1):
        self.masks, self.parts = masks, parts

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        words = text.split()
        seed = torch.Generator().manual_seed(sum(map(ord, text)))
        tokens = torch.randn(1, len(words) + 2 * self.masks, comfy.TEXT_CHANNELS, generator=seed)
        more = {"pooled_output": torch.ones(1, 2)}
        if self.masks:
            more["attention_mask"] = torch.ones(1, tokens.shape[1], dtype=torch.long)
            more["attention_mask"][:, len(words) :] = 0
        return [[tokens, more]] * self.parts


def encoded(text, **options):
    """The conditioning of one text, as CLIP Text Encode makes it."""
    return CLIP(**options).encode_from_tokens_scheduled(text)


NEGATIVE = encoded("blurry and bad")


@pytest.fixture(params=MODELS)
def transformer(request):
    torch.manual_seed(0)
    return request.param().eval()


def video(frames=FRAMES, batch=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, frames, 4, 4, generator=generator)


def attentions(transformer, *names):
    return {
        name: module
        for name, module in transformer.named_modules()
        if name.endswith(names or ("cross_attn", "attn2"))
    }


class Recorder:
    """What the projections of attentions returned, and what they returned, call by call."""

    def __init__(self, attentions):
        self.calls, self.hooks = [], Hooks()
        for module in attentions.values():
            parts = {}
            for name in ("q", "k", "v"):
                self.hooks.after(module.get_submodule(name), self.keep(parts, name))
            self.hooks.after(module, self.end(parts))

    def keep(self, parts, name):
        def hook(module, args, kwargs, out):
            parts[name] = out.unflatten(-1, (comfy.HEADS, -1))

        return hook

    def end(self, parts):
        def hook(module, args, kwargs, out):
            self.calls.append((*(parts[x] for x in "qkv"), out.unflatten(-1, (comfy.HEADS, -1))))

        return hook


def layouts(transformer, lengths, times=range(FRAMES), shared=0, reference=0):
    tokens = 4 if isinstance(transformer, comfy.WanModel) else 16
    queries = vk.Layout(vk.Text(reference), *(vk.Frames(1, tokens, first=t) for t in times))
    stages = (vk.Frames(1, n, first=stage) for stage, n in enumerate(lengths))
    return queries, vk.Layout(vk.Text(shared), *stages)


def assert_relayed(call, queries, texts, segments, w=None, sigma=0.5):
    """Asserts Prompt Relay's formula of what was recorded, once by hand and once by the oracle."""
    query, key, value, out = call
    rule = vk.FrameRule.relay(segments, w, sigma)
    testing.assert_frames(out, query, key, value, queries, rule, key_layout=texts)
    penalty = torch.zeros(queries.tokens, texts.tokens, dtype=torch.float64)
    for run in queries.runs:
        for text in texts.runs:
            if run.frame >= 0 and text.frame >= 0:
                first, last = segments[text.frame]
                half = (last - first) / 2 if w is None else w
                past = abs(queries.coordinates[run.frame] - (first + last) / 2) - half
                cost = max(past, 0) ** 2 / (2 * sigma**2)
                penalty[run.start : run.end, text.start : text.end] = -cost
    q, k, v = (x.transpose(1, 2).double() for x in (query, key, value))
    logits = q @ k.mT / math.sqrt(q.shape[-1]) + penalty
    expected = (logits.softmax(-1) @ v).transpose(1, 2).float()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "masks"),
    [
        (comfy.WanModel, False),
        (comfy.VaceWanModel, False),
        (comfy.LTXVModel, False),
        (comfy.LTXVModel, True),
    ],
)
@pytest.mark.parametrize(
    ("inputs", "shared"),
    [({}, 0), ({"sigma": 2.0, "w": 1.0}, 0), ({"prompt": "oil on canvas"}, 3)],
)
def test_cross_attention_is_prompt_relays_and_the_negative_text_stays(
    run, kind, masks, inputs, shared
):
    torch.manual_seed(0)
    transformer = kind().eval()
    model = comfy.ModelPatcher(transformer)
    clip, negative = CLIP(masks), encoded("blurry and bad", masks=masks)
    ours, positive = run("VSTARApplyPrompts", model=model, clip=clip, stages=STAGES, **inputs)
    assert positive[0][1].get("attention_mask", torch.ones(1)).all()
    recorder = Recorder(attentions(transformer))
    (on,) = ours.guide(video(), SIGMAS[-2:], positive=positive, negative=negative)
    calls, recorder.calls = recorder.calls, []
    (off,) = model.guide(video(), SIGMAS[-2:], positive=positive, negative=negative)
    assert torch.equal(on["negative"], off["negative"])
    assert (on["positive"] - off["positive"]).abs().max() > 1e-3
    queries, texts = layouts(transformer, (2, 4, 3), shared=shared)
    relayed = [call for call in calls if call[1].shape[1] == texts.tokens]
    assert len(relayed) == len(calls) / 2 == len(attentions(transformer))
    for call in relayed:
        relay = {name: value for name, value in inputs.items() if name != "prompt"}
        assert_relayed(call, queries, texts, EQUAL, **relay)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("words", [9, 18, 27, 3])
def test_both_sides_in_one_batch(run, transformer, words, repeated):
    """As many tokens, or as ComfyUI repeats those of the shorter text: 9 and 27 are 27."""
    model = comfy.ModelPatcher(transformer)
    ours, positive = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=STAGES)
    assert positive[0][0].shape[1] == 9
    more = {"repeated": repeated, "positive": positive, "negative": encoded("bad " * words)}
    recorder = Recorder(attentions(transformer))
    (on,) = ours.guide(video(batch=2), SIGMAS[-2:], **more)
    calls, recorder.calls = recorder.calls, []
    (off,) = model.guide(video(batch=2), SIGMAS[-2:], **more)
    assert torch.equal(on["negative"], off["negative"])
    assert (on["positive"] - off["positive"]).abs().max() > 1e-3
    queries, texts = layouts(transformer, (2, 4, 3))
    is_batch = repeated or words == 9
    assert [len(call[0]) for call in calls] == ([4, 4] if is_batch else [2] * 4)
    rows = [call for call in calls if is_batch or call[1].shape[1] == 9]
    for q, k, v, out in rows[:2]:
        assert k.shape[1] == (math.lcm(9, words) if repeated else 9)
        assert_relayed((q[-2:], k[-2:, :9], v[-2:, :9], out[-2:]), queries, texts, EQUAL)


def test_outside_of_its_steps_the_model_is_plain(run, transformer):
    model = comfy.ModelPatcher(transformer)
    inputs = {"model": model, "clip": CLIP(), "stages": STAGES}
    ours, positive = run("VSTARApplyPrompts", **inputs, start=0.25, end=0.5)
    more = {"positive": positive, "negative": NEGATIVE}
    ons, offs = (x.guide(video(), SIGMAS, **more) for x in (ours, model))
    same = [torch.equal(a["positive"], b["positive"]) for a, b in zip(ons, offs, strict=True)]
    assert same == [True, False, True, True]
    assert is_plain(transformer)


@pytest.mark.parametrize(
    ("lines", "wan", "ltx"),
    [
        ("0: a\n12: b\n", [(0, 2), (3, 5)], [(0, 1), (2, 5)]),
        ("0: a\n13: b\n20: c", [(0, 3), (4, 4), (5, 5)], [(0, 1), (2, 2), (3, 5)]),
        ("9: a\n17: b", [(0, 4), (5, 5)], [(0, 2), (3, 5)]),
        ("a", [(0, 5)], [(0, 5)]),
        ("a\nb\nc\nd", [(0, 0), (1, 2), (3, 3), (4, 5)], [(0, 0), (1, 2), (3, 3), (4, 5)]),
    ],
)
def test_stages_begin_at_frames_of_the_video(run, transformer, lines, wan, ltx):
    """Of which latent frame n of Wan has those up to 4n, of LTX up to 8n."""
    segments = wan if isinstance(transformer, comfy.WanModel) else ltx
    model = comfy.ModelPatcher(transformer)
    ours, positive = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=lines)
    recorder = Recorder(attentions(transformer))
    ours.guide(video(), SIGMAS[-2:], positive=positive)
    queries, texts = layouts(transformer, [1] * len(segments))
    for call in recorder.calls:
        assert_relayed(call, queries, texts, segments)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("\n".join("abcdefg"), "stages must be as many as the video has latent frames at most, 6"),
        ("0: a\n99: b", "stages must begin before the video ends: stage 2 begins at frame 99, the"),
        ("0: a\n9: b\n10: c", "different latent frames, .* stages 2 and 3 begin at frames 9 and 1"),
    ],
)
def test_stages_that_the_video_has_no_frames_for(run, transformer, lines, message):
    model = comfy.ModelPatcher(transformer)
    ours, positive = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=lines)
    with pytest.raises(ValueError, match=message):
        ours.guide(video(), SIGMAS, positive=positive, negative=NEGATIVE)
    assert is_plain(transformer)


def test_context_windows_keep_the_times_of_their_frames(run, transformer):
    model = comfy.ModelPatcher(transformer)
    ours, positive = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=STAGES)
    recorder = Recorder(attentions(transformer))
    window = types.SimpleNamespace(index_list=[3, 4, 5, 0], total_frames=6)
    more = {"positive": positive, "options": {"context_window": window}}
    ours.guide(video(4), SIGMAS[-2:], **more)
    queries, texts = layouts(transformer, (2, 4, 3), times=window.index_list)
    for call in recorder.calls:
        assert_relayed(call, queries, texts, EQUAL)
    with pytest.raises(ValueError, match="window of 4 latent frames is sampled with 5"):
        ours.guide(video(5), SIGMAS[-2:], **more)

    window.dim = 3
    with pytest.raises(ValueError, match="must be of the video's frames, dimension 2 of the lat"):
        ours.guide(video(4), SIGMAS[-2:], **more)


def test_a_part_of_the_video_has_no_times(run, transformer):
    """As of an area that is a share of the video's length."""
    model = comfy.ModelPatcher(transformer)
    ours, positive = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=STAGES)
    crop, call = slice(2, None), ours.call
    ours.call = lambda latents, *args, **more: call(latents[:, :, crop], *args, **more)
    with pytest.raises(ValueError, match=r"whole video, 6 latent frames, .* an area of 4 of them"):
        ours.guide(video(), SIGMAS[-2:], positive=positive)
    assert is_plain(transformer)


@pytest.mark.parametrize("wrapped", [1, 2])
def test_blocks_that_something_is_around_are_refused(run, transformer, wrapped):
    """Whose layers have other names: some, or all of them, would go without a word."""
    (blocks,) = (x for name, x in transformer.named_children() if name.endswith("blocks"))
    model = comfy.ModelPatcher(transformer)
    ours, positive = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=STAGES)
    (ruled,) = run("VSTARApplyFrameRule", model=model, rule="window", window=1, end=1.0)
    for index in range(wrapped):
        blocks[index] = torch.nn.Sequential(blocks[index])
    found = f"finds its layers in {len(blocks) - wrapped} of the {len(blocks)} blocks"
    for node in (ours, ruled):
        with pytest.raises(ValueError, match=found):
            node.guide(video(), SIGMAS[-2:], positive=positive)
    assert is_plain(transformer)


def test_a_reference_image_before_the_video_hears_all_stages(run):
    torch.manual_seed(0)
    transformer = comfy.WanModel().eval()
    model = comfy.ModelPatcher(transformer)
    ours, ((text, _),) = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=STAGES)
    recorder = Recorder(attentions(transformer))
    ours.call(video(), 1.0, SIGMAS, sides=[0], context=text, reference=2)
    queries, texts = layouts(transformer, (2, 4, 3), reference=2)
    assert len(recorder.calls) == 2
    for call in recorder.calls:
        assert_relayed(call, queries, texts, EQUAL)


@torch.no_grad()
def test_attention_to_an_image_beside_the_text_stays(run):
    torch.manual_seed(0)
    transformer = comfy.WanModel().eval()
    model = comfy.ModelPatcher(transformer)
    ours, ((text, _),) = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=STAGES)
    image, seen = torch.randn(1, 5, comfy.CHANNELS), []
    block = transformer.blocks[0].cross_attn
    hooks = Hooks()
    hooks.after(block, lambda module, args, kwargs, out: seen.append((args[0], out)))
    more = {"sides": [0], "context": text}
    ours.call(video(), 1.0, SIGMAS, clip_fea=image, **more)
    hooks.remove()
    ((hidden, out),) = seen
    query = block.q(hidden.clone()).unflatten(-1, (comfy.HEADS, -1))

    def attend(context, queries, rule=None, **lay):
        key, value = (f(context).unflatten(-1, (comfy.HEADS, -1)) for f in (block.k, block.v))
        return vk.frame_attention(query, key, value, queries, rule, **lay).flatten(2)

    queries, texts = layouts(transformer, (2, 4, 3))
    rule = vk.FrameRule.relay(EQUAL, None, 0.5)
    heard = attend(transformer.text_embedding(text), queries, rule, key_layout=texts)
    plain = attend(image, queries, key_layout=vk.Layout(vk.Text(5)))
    torch.testing.assert_close(out.clone(), plain + heard, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="attends to 9 tokens of 1 sequences, and cannot be tol"):
        ours.call(video(), 1.0, SIGMAS, clip_fea=torch.randn(1, 9, comfy.CHANNELS), **more)
    assert is_plain(transformer)


@pytest.mark.parametrize("first", ["VSTARApplyPrompts", "VSTARApplyFrameRule"])
def test_it_composes_with_a_frame_rule(run, transformer, first):
    """Both are what they are alone, in whichever order."""
    model, positive = comfy.ModelPatcher(transformer), None
    for node in sorted(("VSTARApplyPrompts", "VSTARApplyFrameRule"), key=lambda x: x != first):
        if node == "VSTARApplyPrompts":
            model, positive = run(node, model=model, clip=CLIP(), stages=STAGES)
        else:
            (model,) = run(node, model=model, rule="window", window=1, end=1.0)
    names = ("cross_attn", "attn2"), ("self_attn", "attn1")
    across, own = (Recorder(attentions(transformer, *of_kind)) for of_kind in names)
    model.guide(video(), SIGMAS[-2:], positive=positive)
    queries, texts = layouts(transformer, (2, 4, 3))
    assert len(across.calls) == len(own.calls) == 2
    for call in across.calls:
        assert_relayed(call, queries, texts, EQUAL)
    for query, key, value, out in own.calls:
        testing.assert_frames(out, query, key, value, queries, vk.FrameRule.window(1))


def test_the_backend_is_the_one_that_was_chosen(run, transformer, monkeypatch):
    chosen, attend = [], comfyui_prompts.frame_attention

    def noting(*args, backend, **kwargs):
        chosen.append(backend)
        return attend(*args, backend=backend, **kwargs)

    monkeypatch.setattr(comfyui_prompts, "frame_attention", noting)
    for backend in ("auto", "reference"):
        inputs = {"clip": CLIP(), "stages": STAGES, "backend": backend}
        ours, positive = run("VSTARApplyPrompts", model=comfy.ModelPatcher(transformer), **inputs)
        ours.guide(video(), SIGMAS[-2:], positive=positive)
    assert chosen == [None, None, "reference", "reference"]


def test_a_second_one_takes_the_place_of_the_first(run, transformer):
    model = comfy.ModelPatcher(transformer)
    inputs = {"clip": CLIP(), "stages": STAGES}
    first, _ = run("VSTARApplyPrompts", model=model, **inputs, sigma=3.0)
    second, positive = run("VSTARApplyPrompts", model=first, **inputs)
    once, _ = run("VSTARApplyPrompts", model=model, **inputs)
    (a,), (b,) = (x.guide(video(), SIGMAS[-2:], positive=positive) for x in (second, once))
    assert torch.equal(a["positive"], b["positive"])


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_put_back(run, transformer, monkeypatch, fails):
    def other(func, *args, **kwargs):
        return func(*args, **kwargs) * 2  # of another node

    model = comfy.ModelPatcher(transformer)
    ours, ((context, _),) = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=STAGES)
    options = {OVERRIDE: other, "wrappers": ours.wrappers, "sample_sigmas": None}
    if fails:
        last = list(transformer.children())[-1][-1]
        monkeypatch.setattr(last, "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transformer(video(), 0, context, options)
        monkeypatch.undo()
    else:
        transformer(video(), 0, context, options)
    assert options[OVERRIDE] is other
    assert is_plain(transformer)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: encoded("another text")[0][0],
        lambda text: text[..., :4],
        lambda text: text[:, :-1],
        lambda text: torch.cat([text, text[:, :1]], dim=1),
        lambda text: torch.cat([text[:, :-1], text[:, :1]], dim=1),  # one token is another
    ],
)
def test_another_conditioning_is_refused_before_a_step(run, transformer, monkeypatch, change):
    model = comfy.ModelPatcher(transformer)
    ours, positive = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=STAGES)
    monkeypatch.setattr(transformer, "forward", lambda *args, **kwargs: 1 / 0)
    message = "positive must be the conditioning that VSTAR Apply Prompts over Time returned"
    with pytest.raises(ValueError, match=message):
        ours.guide(video(), SIGMAS, positive=[[change(positive[0][0]), {}]], negative=positive)
    with pytest.raises(ZeroDivisionError):
        ours.guide(video(), SIGMAS, positive=positive, negative=NEGATIVE)


def test_a_text_that_is_changed_on_its_way_is_no_silence(run, transformer):
    model = comfy.ModelPatcher(transformer)
    ours, positive = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=STAGES)

    def change(executor, x, timestep, context, *args, **kwargs):
        return executor(x, timestep, context * 2, *args, **kwargs)

    of_all = {"first": [change], **ours.wrappers[comfy.DIFFUSION_MODEL]}
    ours.wrappers[comfy.DIFFUSION_MODEL] = of_all
    with pytest.raises(RuntimeError, match="another node changes what the model is conditioned on"):
        ours.guide(video(), SIGMAS, positive=positive, negative=NEGATIVE)
    # Of a range of the schedule, the sampler may have run none, and given the model others.
    positive[0][1]["start_percent"] = 0.5
    assert ours.guide(video(), SIGMAS, positive=positive, negative=NEGATIVE)


def test_a_mask_of_the_texts_is_refused(run):
    torch.manual_seed(0)
    transformer = comfy.LTXVModel().eval()
    model = comfy.ModelPatcher(transformer)
    clip = CLIP(masks=True)
    ours, ((text, more),) = run("VSTARApplyPrompts", model=model, clip=clip, stages=STAGES)
    more = {**more, "attention_mask": more["attention_mask"].clone()}
    more["attention_mask"][0, 3] = 0
    with pytest.raises(ValueError, match=r"attn2 masks its attention to the text, \(1, 1, 9\)"):
        ours.guide(video(), SIGMAS, positive=[[text, more]])
    assert is_plain(transformer)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (comfy.WanModel, {"time_dim_concat": video()}, "does not support time_dim_concat"),
        (comfy.LTXVModel, {"keyframe_idxs": video()}, "does not support keyframe_idxs"),
        (comfy.LTXVModel, {"extra": 4}, r"attends from 100 to 9 tokens, and the latents are"),
    ],
)
def test_sequences_of_more_than_the_video_are_refused(run, model, more, message):
    transformer = model().eval()
    inputs = {"model": comfy.ModelPatcher(transformer), "clip": CLIP(), "stages": STAGES}
    ours, ((context, _),) = run("VSTARApplyPrompts", **inputs)
    with pytest.raises(ValueError, match=message):
        ours.call(video(), 1.0, SIGMAS, sides=[0], context=context, **more)
    assert is_plain(transformer)


def test_attention_by_other_means_is_not_silently_plain(run, transformer, monkeypatch):
    model = comfy.ModelPatcher(transformer)
    ours, positive = run("VSTARApplyPrompts", model=model, clip=CLIP(), stages=STAGES)
    own = next(iter(attentions(transformer).values()))
    monkeypatch.setattr(own, "forward", lambda x, *args, **kwargs: x)
    with pytest.raises(RuntimeError, match="attends by something that another node has put"):
        ours.guide(video(), SIGMAS, positive=positive)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"stages": " \n"}, "stages must hold at least one"),
        ({"stages": "0: a\nb"}, "either every stage says its frame"),
        ({"start": 0.4, "end": 0.4}, "start, 0.4, must be before end, 0.4"),
        ({"clip": CLIP(parts=2)}, "VSTAR Apply Prompts over Time needs one"),
        ({"sigma": 0.0}, "sigma must be above 0"),
    ],
)
def test_bad_values_are_refused_at_once(run, inputs, message):
    good = {"model": comfy.ModelPatcher(comfy.WanModel()), "clip": CLIP(), "stages": STAGES}
    with pytest.raises(ValueError, match=message):
        run("VSTARApplyPrompts", **good | inputs)


def test_a_text_of_no_token_is_refused(run):
    class Empty(CLIP):
        def encode_from_tokens_scheduled(self, text):
            ((tokens, more),) = super().encode_from_tokens_scheduled(text)
            return [[tokens, more | {"attention_mask": torch.zeros(1, tokens.shape[1])}]]

    model = comfy.ModelPatcher(comfy.LTXVModel())
    with pytest.raises(ValueError, match="clip masks all tokens of 'a bud'"):
        run("VSTARApplyPrompts", model=model, clip=Empty(), stages=STAGES)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (comfy.HunyuanVideo, r"no HunyuanVideo as model: it is for Wan .* are one sequence"),
        (comfy.UNetModel, "no UNetModel as model: it is for Wan .* takes VSTAR Synopsis"),
    ],
)
def test_models_without_cross_attention_to_text_are_refused_at_once(run, model, message):
    inputs = {"model": comfy.ModelPatcher(model()), "clip": CLIP(), "stages": STAGES}
    with pytest.raises(ValueError, match=message):
        run("VSTARApplyPrompts", **inputs)


def test_a_call_without_options_is_refused():
    texts = StageTexts(torch.ones(1, 2, comfy.TEXT_CHANNELS), (1, 1))
    executor = comfy.WrapperExecutor(None, comfy.WanModel(), [])
    with pytest.raises(ValueError, match="this WanModel is called without transformer_options"):
        PromptsWrapper(texts)(executor, video(), torch.zeros(1), texts.text)
