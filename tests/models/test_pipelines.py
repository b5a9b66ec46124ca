"""Whole pipelines: with our processors at strength 0 they are stock, and TAR goes on throughout."""

import functools

import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import diffusers
from diffusers import (
    AnimateDiffPAGPipeline,
    AnimateDiffPipeline,
    AnimateDiffSparseControlNetPipeline,
    AnimateDiffVideoToVideoPipeline,
    DiffusionPipeline,
)
from PIL import Image

from examples import tiny
from tests.models.models import SPARSE
from tests.versions import offloads_to_the_cpu
from vstar_kernels.models.attention_processor import TARAttnProcessor
from vstar_kernels.models.front_end import models_with_temporal_attention, temporal_layers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
PLAIN = vk.TARConfig(1.0, strength=0.0, steps=None)
# The random weights' attention is weak.
TAR = vk.TARConfig(1.0, strength=20.0, steps=1)
STEPS = 2


@functools.cache
def image():
    return Image.new("RGB", (16, 16), (90, 120, 30))


def run(pipe, **changes):
    """A short video's latents."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # I2VGen-XL draws the image's latents without the generator
    settings = {
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "height": 16,
        "width": 16,
    }
    name = type(pipe).__name__
    if name == "StableVideoDiffusionPipeline":
        settings |= {"image": image(), "num_frames": 4}
    elif name == "LattePipeline":
        settings |= {"prompt": "a cat", "video_length": 16, "clean_caption": False}
    elif name == "AnimateDiffVideoToVideoPipeline":
        settings |= {"prompt": "a cat", "video": [image()] * 4}
    else:
        settings |= {"prompt": "a cat", "num_frames": 4}
    if name == "I2VGenXLPipeline":
        settings |= {"image": image(), "clip_skip": None}
    out = pipe(**settings | changes)
    frames = out.frames
    return frames if torch.is_tensor(frames) else torch.stack(list(frames))


def assert_tar_survives(pipe, **changes):
    """Strength 0 is stock; TAR is on in every temporal layer and changes the result."""
    stock = run(pipe, **changes)
    with vk.apply_tar(pipe, PLAIN):
        torch.testing.assert_close(run(pipe, **changes), stock, **CLOSE)
    with vk.apply_tar(pipe, TAR):
        out = run(pipe, **changes)
        assert all_ours(pipe)
    assert (out - stock).abs().max() > 10 * CLOSE["atol"]
    torch.testing.assert_close(run(pipe, **changes), stock, **CLOSE)
    assert out.isfinite().all()
    return out


def all_ours(pipe):
    return all(
        isinstance(layer.module.processor, TARAttnProcessor)
        for model in models_with_temporal_attention(pipe).values()
        for layer in temporal_layers(model)
    )


@pytest.mark.parametrize(
    "make",
    [tiny.text_to_video, tiny.animatediff, tiny.i2vgen_xl, tiny.stable_video_diffusion, tiny.latte],
)
def test_each_pipeline(make):
    assert_tar_survives(make())


@pytest.mark.parametrize(
    "name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"]
)
def test_schedulers_that_call_the_model_twice_in_a_step(name):
    pipe = tiny.animatediff()
    more = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **more)
    seen = []
    config = vk.TARConfig(1.0, steps=lambda step, timestep: seen.append(step) or False)
    with vk.apply_tar(pipe, config):
        run(pipe, num_inference_steps=4)
    assert seen == ([0, 1, 1, 2, 3] if name == "PNDMScheduler" else [0, 0, 1, 1, 2, 2, 3])


def test_free_init_restarts_the_gate():
    pipe = tiny.animatediff()
    for fast in (False, True):
        pipe.enable_free_init(num_iters=2, use_fast_sampling=fast)
        seen = []
        config = vk.TARConfig(1.0, steps=lambda step, timestep: seen.append(step) or True)  # noqa: B023
        with vk.apply_tar(pipe, config):
            run(pipe, num_inference_steps=4)
        assert seen == ([0, 1, 0, 1, 2, 3] if fast else [0, 1, 2, 3] * 2)
        pipe.disable_free_init()
    pipe.enable_free_init(num_iters=2)
    assert_tar_survives(pipe)


def test_free_noise():
    pipe = tiny.animatediff()
    plain = vk.apply_tar(pipe, PLAIN)
    reference = tiny.animatediff()
    settings = {"num_frames": 8, "generator": None}

    def both(pipe):
        return run(pipe, **settings | {"generator": torch.Generator().manual_seed(1)})

    for change in (
        lambda pipe: pipe.enable_free_noise(context_length=4, context_stride=2),
        lambda pipe: pipe.enable_free_noise_split_inference(16, 4),
    ):
        change(pipe)
        change(reference)
        torch.testing.assert_close(both(pipe), both(reference), **CLOSE)
        assert all_ours(pipe)
    plain.remove()
    with vk.apply_tar(pipe, TAR):
        assert (both(pipe) - both(reference)).abs().max() > 1e-3


def test_free_noise_during_tar():
    pipe = tiny.animatediff()
    with vk.apply_tar(pipe, TAR):
        before = run(pipe)
        pipe.enable_free_noise(context_length=4, context_stride=2)
        torch.testing.assert_close(run(pipe), before, **CLOSE)  # one window
        long = run(pipe, num_frames=40)  # beyond the 32 positions, in windows
        assert long.shape[2] == 40
        pipe.disable_free_noise()
        torch.testing.assert_close(run(pipe), before, **CLOSE)
        assert all_ours(pipe)
    assert not any(isinstance(p, TARAttnProcessor) for p in pipe.unet.attn_processors.values())


def test_prompts_by_frame():
    pipe = tiny.animatediff()
    pipe.enable_free_noise(context_length=4, context_stride=2)
    assert_tar_survives(pipe, num_frames=6, prompt={0: "a cat", 3: "a dog"})


def test_beyond_the_positions():
    pipe = tiny.animatediff()
    with vk.apply_tar(pipe, TAR), pytest.raises(ValueError, match="motion_max_seq_length"):
        run(pipe, num_frames=40)
    with vk.apply_tar(pipe, TAR, extend_positions=True):
        assert run(pipe, num_frames=40).shape[2] == 40


def test_ip_adapters():
    pipe = tiny.animatediff()
    encoder, processor = tiny._image_encoder()
    pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    with vk.apply_tar(pipe, TAR):
        before = run(pipe)
        pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
        pipe.set_ip_adapter_scale(0.5)
        adapted = run(pipe, ip_adapter_image=image())
        assert all_ours(pipe)
        assert (adapted - before).abs().max() > 1e-3
        pipe.unload_ip_adapter()
        torch.testing.assert_close(run(pipe), before, **CLOSE)
        assert all_ours(pipe)
    assert not any(isinstance(p, TARAttnProcessor) for p in pipe.unet.attn_processors.values())


def ip_adapter_weights(unet):
    """As in a file: a projection of the image, and keys and values of each cross-attention."""
    width = unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    projection = {
        "proj.weight": draw(4 * width, tiny.TEXT_CHANNELS),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    weights, key = {}, 1
    for name in unet.attn_processors:
        if "attn2" in name and "motion_modules" not in name:
            channels = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            for kind in ("k", "v"):
                weights[f"{key}.to_{kind}_ip.weight"] = draw(channels, width)
            key += 2
    return {"image_proj": projection, "ip_adapter": weights}


def test_perturbed_attention_guidance():
    parts = tiny.animatediff().components
    pipe = AnimateDiffPAGPipeline(**parts, pag_applied_layers="mid_block.attentions.*attn1")
    assert_tar_survives(pipe, pag_scale=3.0)
    # The default takes motion modules, too.
    pipe.set_pag_applied_layers("mid_block.*attn1")
    with (
        vk.apply_tar(pipe, TAR),
        pytest.raises(
            ValueError,
            match=r"mid_block\.motion_modules.* TAR and perturbed .*Restrict pag_applied_layers",
        ),
    ):
        run(pipe, pag_scale=3.0)


def sparse_pipeline():
    parts = dict(tiny.animatediff().components)
    settings = SPARSE | {
        "cross_attention_dim": tiny.TEXT_CHANNELS,
        "block_out_channels": tiny.WIDTHS,
        "use_simplified_condition_embedding": True,
        "concat_conditioning_mask": True,
        "conditioning_channels": 4,
    }
    torch.manual_seed(0)
    controlnet = diffusers.SparseControlNetModel(**settings).eval()
    for parameter in controlnet.controlnet_down_blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    parts.pop("feature_extractor"), parts.pop("image_encoder")
    return AnimateDiffSparseControlNetPipeline(**parts, controlnet=controlnet)


def test_sparse_control():
    pipe = sparse_pipeline()
    control = {"conditioning_frames": [image()], "controlnet_frame_indices": [0]}
    stock = run(pipe, **control)
    with vk.apply_tar(pipe, PLAIN):
        torch.testing.assert_close(run(pipe, **control), stock, **CLOSE)
    with vk.apply_tar(pipe, TAR) as handle:
        assert {layer.model for layer in handle.layers} == {"unet", "controlnet"}
        assert (run(pipe, **control) - stock).abs().max() > 1e-3


def test_video_to_video_counts_the_whole_schedule():
    pipe = AnimateDiffVideoToVideoPipeline(**tiny.animatediff().components)
    seen = []
    config = vk.TARConfig(1.0, steps=lambda step, timestep: seen.append(step) or True)
    with vk.apply_tar(pipe, config):
        run(pipe, num_inference_steps=4, strength=0.5)
    assert seen == [2, 3]


@offloads_to_the_cpu
def test_offloading():
    pipe = tiny.animatediff()
    with vk.apply_tar(pipe, TAR):
        expected = run(pipe)
        pipe.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
        )
        torch.testing.assert_close(run(pipe), expected, **CLOSE)


def test_saving_a_pipeline(tmp_path):
    pipe = tiny.animatediff()
    stock = run(pipe)
    with vk.apply_tar(pipe, TAR):
        out = run(pipe)
        pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is AnimateDiffPipeline
    torch.testing.assert_close(run(loaded), stock, **CLOSE)
    with vk.apply_tar(loaded, TAR):
        torch.testing.assert_close(run(loaded), out, **CLOSE)


def test_without_guidance_and_with_several_prompts():
    pipe = tiny.animatediff()
    assert len(assert_tar_survives(pipe, prompt=["a cat", "a dog"])) == 2
    assert_tar_survives(pipe, guidance_scale=1.0)


def test_frame_prompts_and_tar_together():
    pipe = tiny.text_to_video()
    embeddings = torch.randn(4, tiny.TEXT_TOKENS, tiny.TEXT_CHANNELS)
    with vk.condition_frames(pipe, embeddings):
        stock = run(pipe)
        with vk.apply_tar(pipe, TAR):
            assert (run(pipe) - stock).abs().max() > 1e-3
        torch.testing.assert_close(run(pipe), stock, **CLOSE)
