"""Maps of whole pipelines: steps, sides of guidance, and both transformers of Wan 2.2."""

from __future__ import annotations

import pytest
import torch

import vstar_kernels as vk
from tests.versions import is_before

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from examples import tiny_transformers as tiny

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:CPU Autocast only supports"),
]
STEPS = 3
SETTINGS = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": STEPS,
    "output_type": "latent",
}
# The models called in each step, and the batch of each call.
CALLS = {"wan": (2, 1), "cogvideox": (1, 2), "cosmos": (2, 1), "ltx": (1, 2), "hunyuan": (1, 1)}


def sample(pipe, name):
    pipe.set_progress_bar_config(disable=True)
    settings = SETTINGS if name == "hunyuan" else SETTINGS | {"max_sequence_length": 12}
    generator = torch.Generator().manual_seed(3)
    return pipe("a kite rises over a beach", generator=generator, **settings).frames[0]


@pytest.mark.parametrize("name", CALLS)
def test_each_step_and_side_of_guidance_has_its_map(name):
    pipe = getattr(tiny, name)()
    expected = sample(pipe, name)
    sides, batch = CALLS[name]
    with vk.capture_maps(pipe, steps=[1, 2], layers=[0]) as capture:
        assert torch.equal(sample(pipe, name), expected)
    found = [(item.model, item.step, item.branch, item.calls) for item in capture.maps]
    branches = range(sides)
    assert found == [("transformer", step, side, 1) for step in (1, 2) for side in branches]
    assert all(len(item.map) == batch for item in capture.maps)
    rows = torch.stack([item.with_text.sum(-1) for item in capture.maps])
    torch.testing.assert_close(rows, torch.ones(rows.shape))
    plain = capture.mean(branch=None)
    handle = vk.apply_frames(pipe, vk.FrameRule.tar(1.0, strength=20.0), steps=1)
    with handle, vk.capture_maps(pipe, steps=[1, 2], layers=[0]) as capture:
        assert not torch.equal(sample(pipe, name), expected)
    own = [capture.mean(step=step, branch=None).diagonal(dim1=1, dim2=2).sum() for step in (1, 2)]
    assert own[0] > own[1]  # the rule's last step, and the first without it
    assert own[0] > plain.diagonal(dim1=1, dim2=2).sum()


def test_both_transformers_of_wan():
    pipe = tiny.wan(transformers=2)
    with vk.capture_maps(pipe, layers=[0]) as capture:
        sample(pipe, "wan")
    models = {item.model for item in capture.maps}
    assert models == {"transformer", "transformer_2"}
    assert {item.step for item in capture.maps} == set(range(STEPS))
    assert len(capture.maps) == 2 * STEPS


@pytest.mark.skipif(is_before("diffusers", "0.42"), reason="its blocks were others")
def test_a_modular_pipeline(monkeypatch):
    """Of blocks, whose guider calls the model for one side of guidance after the other."""
    from diffusers.modular_pipelines import WanBlocks
    from diffusers.modular_pipelines.wan import encoders

    fixer = type("ftfy", (), {"fix_text": staticmethod(lambda text: text)})
    monkeypatch.setattr(encoders, "ftfy", fixer, raising=False)
    parts, pipe = tiny.wan().components, WanBlocks().init_pipeline()
    pipe.update_components(**{x: parts[x] for x in pipe.component_names if parts.get(x)})

    def video():
        settings = {**SETTINGS, "output_type": "pt", "output": "videos", "max_sequence_length": 12}
        return pipe(prompt="a kite", generator=torch.Generator().manual_seed(3), **settings)

    expected = video()
    with vk.capture_maps(pipe, steps=[1, 2], layers=[0]) as capture:
        torch.testing.assert_close(video(), expected, rtol=0.0, atol=0.0)
    found = [(item.model, item.step, item.branch) for item in capture.maps]
    assert found == [("transformer", step, side) for step in (1, 2) for side in (0, 1)]
    with vk.apply_tar(pipe, vk.FrameTAR(strength=20.0, steps=1)):
        assert (video()[0] - expected[0]).abs().max() > 1e-3
    torch.testing.assert_close(video(), expected, rtol=0.0, atol=0.0)
