import json
from dataclasses import fields

import pytest

import vstar_kernels as vk
from vstar_kernels.reading import FormatError

FULL = vk.GuidanceConfig(
    spatial=(0.1, 0.3),
    syntax=None,
    updates=2,
    step_size=3.5,
    decay="linear",
    stop_below=-1.0,
    lambdas=(2.0, 0.5),
    form="mass",
    share=0.5,
    inside=2.0,
    outside=0.0,
    normalize="max",
    distance="cosine",
    window=3,
    margin=0.7,
    size=(16, 24),
    levels=(1, 2),
    places=("down", "mid"),
)


@pytest.mark.parametrize("config", [vk.GuidanceConfig(), FULL])
def test_json(config, tmp_path):
    assert vk.GuidanceConfig.from_json(config.to_json()) == config
    assert set(json.loads(config.to_json())) == {field.name for field in fields(config)}
    config.save(tmp_path / "guidance.json")
    assert vk.GuidanceConfig.load(tmp_path / "guidance.json") == config
    assert vk.GuidanceConfig.from_json('{"updates": 5}') == vk.GuidanceConfig(updates=5)


def test_weights_of_the_steps():
    config = vk.GuidanceConfig(spatial=(0, 0.56), syntax=(0.56, 1), lambdas=(2, 3))
    found = [config.weights(step, 25) for step in range(25)]
    assert found == [(2, 0)] * 14 + [(0, 3)] * 11  # 0.56 × 25 is 14
    assert vk.GuidanceConfig(spatial=None).weights(0, 25) == (0, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spatial": None, "syntax": None}, ValueError, "no step would be guided"),
        ({"spatial": (0.5, 0.5)}, ValueError, r"spatial must be two shares .* \[0.5, 0.5\]"),
        ({"syntax": (0.5, 1.5)}, ValueError, r"syntax must be two shares .* got \[0.5, 1.5\]"),
        ({"syntax": 0.5}, TypeError, "syntax must be a list, got float"),
        ({"spatial": (0, "1")}, TypeError, "spatial must be a number, got str"),
        ({"updates": 0}, ValueError, "updates must be at least 1, got 0"),
        ({"updates": 1.5}, TypeError, "updates must be an integer, got float"),
        ({"step_size": 0}, ValueError, "step_size must be finite and more than 0, got 0"),
        ({"step_size": float("inf")}, ValueError, "step_size must be finite"),
        ({"decay": "cosine"}, ValueError, "decay must be one of 'auto', 'noise', 'linear', got 'c"),
        ({"stop_below": float("nan")}, ValueError, "stop_below must be finite"),
        ({"lambdas": (1,)}, ValueError, "lambdas must be two weights, got 1"),
        ({"lambdas": (1, -1)}, ValueError, "lambdas must be finite and at least 0, got -1"),
        ({"form": "box"}, ValueError, "form must be one of 'topk', 'mass', got 'box'"),
        ({"share": 1.5}, ValueError, r"share must be in \(0, 1\], got 1.5"),
        ({"inside": True}, TypeError, "inside must be a number, got bool"),
        ({"normalize": 3}, ValueError, "normalize must be one of 'max', got 3"),
        ({"distance": "l1"}, ValueError, "distance must be one of 'kl', 'cosine', got 'l1'"),
        ({"window": -1}, ValueError, "window must be at least 0, got -1"),
        ({"margin": 0.0}, ValueError, "margin must be finite and more than 0, got 0.0"),
        ({"size": (1, 2, 3)}, ValueError, r"size must be a level or \(height, width\), got \[1, 2"),
        ({"size": (0, 2)}, ValueError, "size must be at least 1, got 0"),
        ({"size": "level1"}, TypeError, "size must be a list, got str"),
        ({"levels": ()}, ValueError, "levels must name at least one level, got none"),
        ({"levels": (-1,)}, ValueError, "levels must be at least 0, got -1"),
        ({"places": ("left",)}, ValueError, "places must be one of 'down', 'mid', 'up', 'blocks'"),
        ({"places": ()}, ValueError, "places must name at least one place, got none"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        vk.GuidanceConfig(**change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is not JSON"),
        ("[]", "it must be a JSON object, got list"),
        ('{"update": 3}', "update: there is no such field"),
        ('{"updates": "3"}', "updates: Input should be a valid integer, got str"),
        ('{"spatial": [0, 1, 2]}', "spatial must be two shares"),
        ('{"lambdas": [1, null]}', r"lambdas\[1\]: Input should be a valid number, got NoneType"),
        ('{"size": 1.5}', "size: Input should be a valid integer"),
        ('{"size": [4, "4"]}', r"size\[1\]: Input should be a valid integer, got str"),
        ('{"step_size": 1e999}', "step_size: 1e999 is too large"),
        ('{"distance": "l1"}', "distance must be one of"),
        ('{"updates": 3, "updates": 4}', "updates: it is there twice"),
    ],
)
def test_what_is_wrong_with_a_file(text, message):
    with pytest.raises(FormatError, match=message):
        vk.GuidanceConfig.from_json(text)
