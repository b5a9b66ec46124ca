"""What is known of each family, against what is written down of the tiny models."""

from __future__ import annotations

import re

import pytest

from tests.models.full3d.tiny import TINY
from vstar_kernels.models.full3d.families import FAMILIES, find_family
from vstar_kernels.models.full3d.layouts import Call

diffusers = pytest.importorskip("diffusers")
# The models of diffusers to which no rule between frames can be applied, or for which it means
# nothing: docs/full-3d.md says why. Joy's are of images, Latte has attention over time alone.
OTHERS = {
    "AnyFlowFARTransformer3DModel",
    "JoyImageEditPlusTransformer3DModel",
    "JoyImageEditTransformer3DModel",
    "Kandinsky6SRTransformer3DModel",
    "LatteTransformer3DModel",
    "SanaVideoTransformer3DModel",
    "SanaWMTransformer3DModel",
    "SanaWMLTX2RefinerTransformer3DModel",
    "WanAnimate2Transformer3DModel",
}


def test_every_known_class_has_a_tiny_model():
    known = {name for family in FAMILIES for name in family.classes}
    assert known == {tiny.name for tiny in TINY.values()}


def test_every_video_transformer_of_diffusers_is_known_or_known_not_to_be():
    names = {x for x in dir(diffusers) if re.search("(Transformer3D(Model)?|OmniTransformer)$", x)}
    known = {name for family in FAMILIES for name in family.classes}
    assert names - known <= OTHERS


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
