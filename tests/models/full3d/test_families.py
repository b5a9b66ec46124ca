"""What is known of each family, against what is written down of the tiny models."""

from __future__ import annotations

import pytest

from tests.models.full3d.tiny import TINY
from vstar_kernels.models.full3d.families import FAMILIES, find_family
from vstar_kernels.models.full3d.layouts import Call

pytest.importorskip("diffusers")


def test_every_known_class_has_a_tiny_model():
    known = {name for family in FAMILIES for name in family.classes}
    assert known == {tiny.name for tiny in TINY.values()}


@pytest.mark.parametrize("name", TINY)
def test_layers_and_layouts(name):
    tiny = TINY[name]
    model = tiny.make()
    family = find_family(model)
    layers = family.find_layers(model)
    assert sorted(layer.name for layer in layers) == sorted(tiny.layers)
    assert [layer.index for layer in layers] == list(range(len(layers)))
    for frames in (4, 8):
        reading = family.read(Call(model, (), tiny.call(frames)))
        read = {layer.name: reading.of(layer).layout for layer in layers}
        assert read == tiny.layouts(frames)
