"""``FrameTAR`` and its JSON."""

import pytest
import torch

import vstar_kernels as vk
from tests.models.full3d.tiny import TINY

WAN = TINY["wan"]


def test_it_is_a_rule_with_steps_layers_and_heads():
    pytest.importorskip("diffusers")
    model = WAN.make()
    config = vk.FrameTAR(2.0, 0.5, stat="row_max", steps=0, layers=[1], heads=[0])
    rule = vk.FrameRule.tar(2.0, 0.5, stat="row_max")
    assert config.rule() == rule
    with vk.apply_frames(model, rule, layers=[1], heads=[0]):
        expected = WAN.run(model)
    stock = WAN.run(model)
    with vk.apply_tar(model, config, backend="reference") as handle:
        for handle.step, wanted in ((0, expected), (1, stock)):
            torch.testing.assert_close(WAN.run(model), wanted, rtol=0.0, atol=3e-6)


@pytest.mark.parametrize(
    "config",
    [
        vk.FrameTAR(),
        vk.FrameTAR(0.5, 2.0, "none", steps=None, layers=range(3, 8, 2), heads=[4, 0]),
        vk.FrameTAR(steps=7),
    ],
)
def test_json_and_back(config, tmp_path):
    pytest.importorskip("pydantic")
    assert vk.FrameTAR.from_json(config.to_json()) == config
    config.save(tmp_path / "tar.json")
    assert vk.FrameTAR.load(tmp_path / "tar.json") == config


def test_fields_that_are_left_out_have_their_defaults():
    pytest.importorskip("pydantic")
    assert vk.FrameTAR.from_json("{}") == vk.FrameTAR()
    assert vk.FrameTAR.from_json('{"sigma": 2}') == vk.FrameTAR(2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"object"),
        ('{"sigma": -1}', r"sigma"),
        ('{"sigma": "1"}', r"sigma"),
        ('{"sigma": NaN}', r"NaN"),
        ('{"stat": "map_max"}', r"stat"),
        ('{"layers": 3}', r"layers"),
        ('{"layers": [true]}', r"layers"),
        ('{"heads": []}', r"heads names none"),
        ('{"steps": 1.5}', r"steps"),
        ('{"width": 64}', r"width"),
    ],
)
def test_bad_json(text, message):
    pytest.importorskip("pydantic")
    with pytest.raises(ValueError, match=message):
        vk.FrameTAR.from_json(text)


@pytest.mark.parametrize("name", ["steps", "layers"])
def test_callables_cannot_be_saved(name):
    pytest.importorskip("pydantic")
    with pytest.raises(ValueError, match=rf"whose {name} is a callable cannot be saved"):
        vk.FrameTAR(**{name: lambda *_: True}).to_json()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": -1.0}, ValueError, r"sigma"),
        ({"strength": float("nan")}, ValueError, r"strength"),
        ({"stat": "map_max"}, ValueError, r"'frame_max', 'row_max', 'none', got 'map_max'"),
        ({"steps": "all"}, TypeError, r"steps"),
        ({"layers": [1.5]}, TypeError, r"an index of layers must be an integer"),
        ({"heads": ()}, ValueError, r"heads names none"),
    ],
)
def test_bad_fields(options, error, message):
    with pytest.raises(error, match=message):
        vk.FrameTAR(**options)
