"""Sequences spread over processes: Ulysses' exchange, between threads in their place, and rings."""

import threading
from types import SimpleNamespace

import pytest
import torch

import vstar_kernels as vk
from tests.models.full3d.tiny import TINY

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers.models import attention_dispatch

from tests.models.test_threads import together
from vstar_kernels.models.full3d.backend_member import Member
from vstar_kernels.models.full3d.seats import FrameChange, FrameLayer, Reading, Seat

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUT = vk.Layout(vk.Frames(4, 3))
RULE = vk.FrameRule.tar(1.0)
RANK = threading.local()
WAIT = 20


def configuration(**degrees):
    mesh = SimpleNamespace(get_group=lambda: None)
    degrees = {"ring_degree": 1, "ulysses_degree": 1, "ulysses_anything": False} | degrees
    return SimpleNamespace(
        context_parallel_config=SimpleNamespace(**degrees, _ulysses_mesh=mesh, _ring_mesh=mesh)
    )


@pytest.fixture
def member():
    seat = Seat(FrameLayer("blocks.0.attn1", 0, None))
    change = FrameChange(RULE, Reading(LAYOUT, "the test's numbers"), None, "0")
    seat.controller = SimpleNamespace(change=lambda: change)
    member = Member.of(seat, None)
    yield member
    member.retire()


@pytest.fixture
def exchange(monkeypatch):
    """Two threads exchange what two processes would."""
    parts, barrier = [None, None], threading.Barrier(2)

    def all_to_all(x, group):
        parts[RANK.here] = x
        barrier.wait(WAIT)
        out = torch.stack([part[RANK.here] for part in parts])
        barrier.wait(WAIT)
        return out

    monkeypatch.setattr(attention_dispatch, "_all_to_all_single", all_to_all)


@pytest.mark.usefixtures("exchange")
def test_ulysses(member):
    query, key, value = torch.randn(3, 2, LAYOUT.tokens, 4, 8)

    def run(rank):
        RANK.here = rank
        here = slice(6 * rank, 6 * rank + 6)
        parts = (x[:, here] for x in (query, key, value))
        with torch.no_grad():
            return member.attend(*parts, _parallel_config=configuration(ulysses_degree=2))

    out = torch.cat(together(lambda: run(0), lambda: run(1)), dim=1)
    expected = vk.frame_attention(query, key, value, LAYOUT, RULE)
    torch.testing.assert_close(out, expected)


def test_rings_are_refused(member):
    x = torch.randn(1, 6, 4, 8)
    for degrees in ({"ring_degree": 2}, {"ring_degree": 2, "ulysses_degree": 2}):
        with pytest.raises(ValueError, match=r"blocks\.0\.attn1 runs under ring attention"):
            member.attend(x, x, x, _parallel_config=configuration(**degrees))


def test_maps_are_refused(member):
    member.seat.watchers = (SimpleNamespace(),)
    x = torch.randn(1, 6, 4, 8)
    with pytest.raises(ValueError, match=r"a part of .* in each process: use one"):
        member.attend(x, x, x, _parallel_config=configuration(ulysses_degree=2))


def test_rules_that_differ_by_head_are_refused(member):
    tables = torch.randn(4, 4, 4)
    change = FrameChange(
        vk.FrameRule.bias(tables), Reading(LAYOUT, "the test's numbers"), None, "0"
    )
    member.seat.controller = SimpleNamespace(change=lambda: change)
    x = torch.randn(1, 6, 4, 8)
    with pytest.raises(ValueError, match=r"must be the same for all heads, without heads="):
        member.attend(x, x, x, _parallel_config=configuration(ulysses_degree=2))


def test_parallelism_may_be_asked_for_while_a_rule_is_on():
    """diffusers asks the backend that it finds in the layers."""
    model = TINY["wan"].make()
    with vk.apply_frames(model, RULE):
        backend = model.blocks[0].attn1.processor._attention_backend
        registry = attention_dispatch._AttentionBackendRegistry
        assert registry._is_context_parallel_available(backend)
