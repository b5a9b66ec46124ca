import math

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import transformers

from examples import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE, PATCH, CHANNELS = 32, 8, 24
SENTENCES = {"general": ["plain", "usual"], "metamorphic": ["time lapse", "sped up", "change"]}


@pytest.fixture(scope="module")
def clip(one_thread):
    """A small CLIP with random weights, and its processor."""
    torch.manual_seed(0)
    tokenizer = tiny._tokenizer()
    common = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 16, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
    vision = {"hidden_size": 16, "image_size": SIZE, "patch_size": PATCH}
    config = transformers.CLIPConfig(
        text_config=common | text, vision_config=common | vision, projection_dim=CHANNELS
    )
    side = {"height": SIZE, "width": SIZE}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side)
    return transformers.CLIPModel(config).eval(), transformers.CLIPProcessor(images, tokenizer)


def video(frames=5):
    return torch.rand(frames, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def expected_cosines(clip, texts):
    """CLIP's own logits, of 8-bit images, divided by its temperature."""
    from PIL import Image

    model, processor = clip
    images = [
        Image.fromarray((255 * frame).round().byte().permute(1, 2, 0).numpy()) for frame in video()
    ]
    given = processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        return model(**given).logits_per_image / model.logit_scale.exp()


@pytest.mark.parametrize("batch_size", [2, 16])
def test_clip_vl_is_clips_own_cosine(clip, batch_size):
    texts = ["a cat", "a dog runs"]
    expected = expected_cosines(clip, texts)
    for index, text in enumerate(texts):
        found = vk.analysis.clip_vl(video(), text, *clip, batch_size=batch_size)
        torch.testing.assert_close(found.per_frame, expected[:, index], rtol=0, atol=3e-3)
        assert found.score == pytest.approx(float(found.per_frame.mean()), rel=1e-6)
    each = [texts[i] for i in (0, 1, 1, 0, 1)]
    found = vk.analysis.clip_vl(video(), each, *clip, batch_size=batch_size)
    chosen = expected[torch.arange(5), torch.tensor([0, 1, 1, 0, 1])]
    torch.testing.assert_close(found.per_frame, chosen, rtol=0, atol=3e-3)
    assert expected.diff(dim=1).abs().min() > 0.01  # so that mixing them up is seen


def test_clip_in_another_type_and_older_transformers(clip, monkeypatch):
    model, processor = clip
    expected = vk.analysis.clip_vl(video(), "a cat", model, processor)

    class Older:  # whose features are tensors
        device, dtype = model.device, torch.float64

        def get_image_features(self, pixel_values):
            assert pixel_values.dtype == torch.float64
            return model.get_image_features(pixel_values.float()).pooler_output

        def get_text_features(self, **given):
            return model.get_text_features(**given).pooler_output

    found = vk.analysis.clip_vl(video(), "a cat", Older(), processor)
    torch.testing.assert_close(found.per_frame, expected.per_frame)


def test_long_texts_are_cut_and_counts_checked(clip):
    long = "a very long description of a cat " * 30
    assert vk.analysis.clip_vl(video(), long, *clip).per_frame.shape == (5,)
    with pytest.raises(ValueError, match="one for each of the 5 frames, got 2"):
        vk.analysis.clip_vl(video(), ["a", "b"], *clip)


def retriever(*logits):
    def run(frames, sentences):
        assert frames.shape == (5, 3, 40, 48)
        assert sentences == [*SENTENCES["general"], *SENTENCES["metamorphic"]]
        return torch.tensor(logits)

    return run


def test_mt_score_adds_up_the_likeliest_sentences():
    shares = torch.tensor([0.1, 0.25, 0.05, 0.4, 0.2])
    run = retriever(*(10 + shares.log()).tolist())
    found = vk.analysis.mt_score(video(), run, **SENTENCES, top=None)
    torch.testing.assert_close(found.probabilities, shares)
    assert (found.general, found.score) == pytest.approx((0.35, 0.65), abs=1e-6)
    top = vk.analysis.mt_score(video(), run, **SENTENCES, top=3)
    assert (top.general, top.score) == pytest.approx((0.25, 0.6), abs=1e-6)
    torch.testing.assert_close(top.probabilities, shares)
    assert vk.analysis.mt_score(video(), run, **SENTENCES).score == found.score  # 5 of 5


def test_wrong_retrievals_are_refused():
    with pytest.raises(ValueError, match=r"logit for each of the 5 sentences, got \[0"):
        vk.analysis.mt_score(video(), lambda f, s: torch.zeros(4), **SENTENCES)
    with pytest.raises(ValueError, match=r"got \(1, 5\)"):
        vk.analysis.mt_score(video(), lambda f, s: torch.zeros(1, 5), **SENTENCES)
    with pytest.raises(ValueError, match=r"a finite logit .* nan"):
        vk.analysis.mt_score(video(), lambda f, s: torch.zeros(5) / 0, **SENTENCES)
    with pytest.raises(ValueError, match="these look like the cosines themselves"):
        vk.analysis.mt_score(video(), lambda f, s: torch.full((5,), 0.3), **SENTENCES)
    with pytest.raises(ValueError, match=r"from -100 to 100, got .*120"):
        vk.analysis.mt_score(video(), lambda f, s: torch.full((5,), 120.0), **SENTENCES)
    with pytest.raises(
        ValueError, match="general must be a list of at least one sentence, got 'x'"
    ):
        vk.analysis.mt_score(video(), retriever(), general="x", metamorphic=["y"])
    with pytest.raises(ValueError, match=r"metamorphic must be .*, got \[\]"):
        vk.analysis.mt_score(video(), retriever(), general=["x"], metamorphic=[])
    with pytest.raises(ValueError, match="top must be 1 to 5"):
        vk.analysis.mt_score(video(), retriever(), **SENTENCES, top=6)


def test_the_frechet_distance_of_a_scaled_and_shifted_copy():
    """|shift|² + (scale − 1)² tr S in closed form."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    features = (torch.randn(500, 6, generator=generator) @ mixing).double()
    trace = float(features.mT.cov().trace())
    frechet = vk.analysis.frechet_distance
    assert frechet(features, features) == pytest.approx(0, abs=1e-9 * trace)
    shift = torch.arange(6.0).double()
    expected = float(shift.square().sum()) + 0.25 * trace
    assert frechet(features, 1.5 * features + shift + 0.5 * 0) == pytest.approx(
        expected + float(((0.5 * features.mean(0) + shift).square() - shift.square()).sum()),
        rel=1e-9,
    )
    other = torch.randn(400, 6, generator=generator)
    assert frechet(features, other) == pytest.approx(frechet(other, features), rel=1e-6)
    # Of one dimension: (μ₁ − μ₂)² + (s₁ − s₂)².
    one, two = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [8.0]])
    assert frechet(one, two) == pytest.approx((2 - 4) ** 2 + (2**0.5 - 32**0.5) ** 2)
    # Fewer samples than channels: covariances without full rank.
    assert frechet(features[:3], features[3:6]) > 0


@pytest.mark.parametrize(
    ("one", "other", "error", "message"),
    [
        (torch.ones(1, 4), torch.ones(3, 4), ValueError, r"one must be .* got \(1, 4\)"),
        (torch.ones(3, 4), torch.ones(3), ValueError, "other must be"),
        (torch.ones(3, 4), torch.ones(3, 5), ValueError, "got 4 and 5"),
        (torch.ones(3, 4), [1.0], TypeError, "other must be a torch.Tensor, got list"),
        (torch.tensor([[1.0], [math.nan]]), torch.ones(3, 1), ValueError, "one must be finite"),
        (torch.ones(3, 1), torch.tensor([[math.inf], [1.0]]), ValueError, "other must .* 1 sample"),
    ],
)
def test_bad_features(one, other, error, message):
    with pytest.raises(error, match=message):
        vk.analysis.frechet_distance(one, other)
