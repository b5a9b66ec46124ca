"""Every full-3D transformer that is known, against attention put in by other means."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import vstar_kernels as vk
from tests.models.full3d.dense import Dense
from tests.models.full3d.tiny import TINY, Tiny

pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but"),  # Mochi's
]


class Case(NamedTuple):
    """A tiny model and what it returns by itself."""

    tiny: Tiny
    model: nn.Module
    stock: Tensor

    def assert_runs_as(self, expected: Tensor) -> None:
        """Asserts that the model returns this, but for roundings."""
        out = self.tiny.run(self.model)
        torch.testing.assert_close(out, expected, rtol=0.0, atol=self.tiny.tolerance)


@pytest.fixture(scope="module", params=TINY)
def case(request):
    tiny = TINY[request.param]
    model = tiny.make()
    return Case(tiny, model, tiny.run(model))


def attentions(case):
    """Returns what a handle may change of the layers."""
    modules = [case.model.get_submodule(name) for name in case.tiny.layers]
    return [(type(x), x.processor, dict(vars(x.processor))) for x in modules]


@pytest.fixture(autouse=True)
def restored(case):
    before = attentions(case)
    yield
    for old, new in zip(before, attentions(case), strict=True):
        assert old[0] is new[0]
        assert old[1] is new[1]
        assert old[2] == new[2]
    assert torch.equal(case.tiny.run(case.model), case.stock)


def test_nothing_is_changed_by_a_rule_that_changes_nothing(case):
    with vk.apply_frames(case.model, vk.FrameRule.tar(1.0, strength=0.0)):
        case.assert_runs_as(case.stock)


@pytest.mark.parametrize("stat", ["frame_max", "row_max"])
def test_tar_is_that_of_the_oracle(case, stat):
    expected = Dense(case.tiny, strength=1.0, stat=stat).run(case.model)
    assert (expected - case.stock).abs().max() > 20 * case.tiny.tolerance + 1e-3
    with vk.apply_frames(case.model, vk.FrameRule.tar(1.0, stat=stat)):
        case.assert_runs_as(expected)


def test_only_the_chosen_layers_and_steps_change(case):
    expected = Dense(case.tiny, strength=1.0, layers=case.tiny.layers[1:]).run(case.model)
    rule = vk.FrameRule.tar(1.0)

    def chosen(layer):
        return layer.name in case.tiny.layers[1:]

    with vk.apply_frames(case.model, rule, layers=chosen, steps=1) as handle:
        handle.step = 1
        case.assert_runs_as(expected)
        handle.step = 2
        assert torch.equal(case.tiny.run(case.model), case.stock)


@pytest.mark.parametrize("strength", [None, 1.0])
def test_maps_are_the_means_of_dense_maps(case, strength):
    """Whether a rule is on or not; and watching changes nothing."""
    dense = Dense(case.tiny, strength=strength or 0.0)
    dense.run(case.model)
    rule = vk.FrameRule.tar(1.0)
    handle = None if strength is None else vk.apply_frames(case.model, rule)
    expected = case.tiny.run(case.model)
    with vk.capture_maps(case.model, map_heads=True) as capture:
        assert torch.equal(case.tiny.run(case.model), expected)
    if handle is not None:
        handle.remove()
    assert sorted(item.layer for item in capture.maps) == sorted(case.tiny.layers)
    for item in capture.maps:
        heads = dense.maps[item.layer]
        assert item.coordinates == case.tiny.layouts()[item.layer].coordinates
        close = {"rtol": 0.0, "atol": case.tiny.tolerance}
        torch.testing.assert_close(item.heads, heads, **close)
        torch.testing.assert_close(item.with_text, heads.mean(1), **close)
        assert torch.equal(item.with_text[..., :-1], item.map)
