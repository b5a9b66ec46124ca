"""``GridVideo`` on tiny image pipelines."""

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from examples import tiny
from vstar_kernels.analysis import from_grid, mixed_embedding
from vstar_kernels.methods.grid.video import decode_latents

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
PROMPT = "a kite rises"
SMALL = {"frames": 6, "height": 16, "width": 8, "seed": 3, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe():
    made = tiny.stable_diffusion()
    made.set_progress_bar_config(disable=True)
    return made


def sdxl():
    torch.manual_seed(0)
    like = tiny.stable_diffusion()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
    )
    settings = like.text_encoder.config.to_dict() | {"projection_dim": 32}
    second = CLIPTextModelWithProjection(CLIPTextConfig(**settings)).eval()
    parts = (like.vae, like.text_encoder, second, like.tokenizer, like.tokenizer, unet)
    made = StableDiffusionXLPipeline(*parts, like.scheduler, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_video(pipe):
    made = vk.GridVideo(pipe)(PROMPT, **SMALL)
    assert len(made.frames) == 6
    assert {frame.size for frame in made.frames} == {(8, 16)}
    assert (made.seed, made.config, made.layers, made.maps) == (3, None, [], None)
    assert list(made.synopsis.stages) == [PROMPT]
    assert not pipe.unet._forward_pre_hooks


def test_it_is_the_pipelines_own_image_of_the_grid(pipe):
    """By hand: the embedded latents under the stock UNet, cut into frames and decoded."""
    found = vk.GridVideo(pipe)(PROMPT, **SMALL, output_type="latent").frames
    embedding = mixed_embedding(2, 3, 8, 4, 4)
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + embedding, *args[1:]), kwargs), with_kwargs=True
    )
    image = pipe(
        PROMPT,
        height=32,
        width=24,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=2,
        guidance_scale=7.0,
        output_type="latent",
    ).images
    hook.remove()
    expected = from_grid(image, 2, 3)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    pixels = vk.GridVideo(pipe)(PROMPT, **SMALL, output_type="pt").frames
    one = decode_latents(pipe, found[4:5])
    torch.testing.assert_close(pixels[4], (one[0] / 2 + 0.5).clamp(0, 1))
    whole = vk.GridVideo(pipe, decode="grid")(PROMPT, **SMALL, output_type="pt").frames
    together = from_grid(decode_latents(pipe, image), 2, 3)[0]
    torch.testing.assert_close(whole, (together / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)


def test_tar_and_maps(pipe):
    config = vk.TARConfig(sigma=0.5, steps=None)
    with_tar = vk.GridVideo(pipe, config)(PROMPT, **SMALL, maps=[1])
    plain = vk.GridVideo(pipe)(PROMPT, **SMALL, maps=True)
    assert {layer.level for layer in with_tar.layers} == {0}
    assert {item.step for item in with_tar.maps.maps} == {1}
    assert {item.step for item in plain.maps.maps} == {0, 1}
    level = {"level": 0, "step": 1}
    ours, theirs = (x.maps.mean(**level).diagonal(0, 1, 2).mean() for x in (with_tar, plain))
    assert ours > theirs


def test_the_speed_of_a_trained_embedding(pipe, tmp_path):
    torch.manual_seed(0)
    embedding = vk.GridEmbedding(
        gain="learned", theta=500.0, index="time", fps=vk.FPSEmbedding.for_unet(pipe.unet)
    )
    torch.nn.init.normal_(embedding.fps.layers[-1].weight)
    torch.nn.init.ones_(embedding.gain)
    embedding.save(tmp_path / "embedding.safetensors")
    loaded = vk.GridEmbedding.load(tmp_path / "embedding.safetensors")
    more = {**SMALL, "output_type": "latent"}
    videos = [
        vk.GridVideo(pipe, embedding=x)(PROMPT, **more, fps=fps).frames
        for x, fps in ((embedding, 30), (loaded, 30), (embedding, 8))
    ]
    assert torch.equal(videos[0], videos[1])
    assert (videos[0] - videos[2]).abs().max() > 1e-3
    assert repr(loaded) == repr(embedding)
    (tmp_path / "other").write_bytes(b"0" * 20)
    with pytest.raises(ValueError, match="other holds no GridEmbedding"):
        vk.GridEmbedding.load(tmp_path / "other")
    save_file({"gain": torch.ones(())}, tmp_path / "other")
    with pytest.raises(ValueError, match="no GridEmbedding: ValueError: its metadata is of some"):
        vk.GridEmbedding.load(tmp_path / "other")


def test_sdxl():
    made = vk.GridVideo(sdxl(), vk.TARConfig({1: 1.0}, steps=None))(PROMPT, **SMALL)
    assert len(made.frames) == 6
    assert {layer.level for layer in made.layers} == {1}


@pytest.mark.parametrize("decode", ["frames", "grid"])
def test_the_vae_is_in_float32_while_it_decodes_alone(decode, monkeypatch):
    made = sdxl()
    made.vae.half()
    casts, seen, stock_to, stock = [], [], made.vae.to, made.vae.decode
    monkeypatch.setattr(made.vae, "to", lambda dtype: casts.append(dtype) or stock_to(dtype))

    def record(latents, return_dict):
        seen.append((latents.dtype, made.vae.dtype))
        return stock(latents, return_dict=return_dict)

    def fail(latents, return_dict):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(made.vae, "decode", record)
    latents = torch.randn(6, 4, 4, 4).half()
    apart = decode == "frames"
    assert decode_latents(made, latents, apart=apart).dtype == torch.float32
    assert seen == [(torch.float32, torch.float32)] * (6 if apart else 1)
    assert casts == [torch.float32, torch.float16]
    monkeypatch.setattr(made.vae, "decode", fail)
    with pytest.raises(torch.OutOfMemoryError):
        vk.GridVideo(made, decode=decode)(PROMPT, **SMALL)
    assert {p.dtype for p in made.vae.parameters()} == {torch.float16}


def test_a_safety_checker_sees_frames(pipe, monkeypatch):
    seen = []

    def check(image, device, dtype):
        seen.append(image.shape)
        return torch.zeros_like(image), [False] * len(image)

    monkeypatch.setattr(pipe, "safety_checker", check)
    monkeypatch.setattr(pipe, "run_safety_checker", check)
    frames = vk.GridVideo(pipe)(PROMPT, **SMALL, output_type="pt").frames
    assert seen == [(6, 3, 16, 8)]
    assert torch.equal(frames, torch.full((6, 3, 16, 8), 0.5))


@pytest.mark.parametrize(
    ("make", "more", "error", "message"),
    [
        ({"pipe": 3}, {}, TypeError, "StableDiffusionPipeline.* got int"),
        ({"config": 3}, {}, TypeError, "config must be .* got int"),
        ({"embedding": None}, {}, TypeError, "embedding must be .* got NoneType"),
        ({"decode": "both"}, {}, ValueError, "decode must be 'frames' or 'grid', got 'both'"),
        ({"rows": 4}, {}, ValueError, "rows must divide the 6 frames, got 4"),
        ({}, {"prompt": 3}, TypeError, "prompt must be a text, got int"),
        ({}, {"prompt": vk.Synopsis("a", ["b", "c"])}, ValueError, "2 stages, is for VSTAR"),
        ({}, {"frames": 0}, ValueError, "frames must be at least 1"),
        ({}, {"height": 10}, ValueError, "height of a frame must be a multiple of 4, .* got 10"),
        ({}, {"seed": -1}, ValueError, "seed must be from 0"),
        ({}, {"latents": 1}, ValueError, "latents is set here: give seed"),
        ({}, {"num_frames": 16}, TypeError, "takes no argument 'num_frames'"),
        ({}, {"num_inference_steps": 0}, ValueError, "num_inference_steps must be at least 1"),
        ({}, {"guidance_scale": "a"}, TypeError, "guidance_scale must be a number, got str"),
        ({}, {"maps": "all"}, TypeError, "maps must be True, False or indices .* got str"),
        ({}, {"maps": [99]}, ValueError, "maps must be of steps below num_inference_steps, 2"),
    ],
)
def test_bad_arguments(pipe, make, more, error, message):
    with pytest.raises(error, match=message):
        vk.GridVideo(**{"pipe": pipe, **make})(**{"prompt": PROMPT, **SMALL, **more})
