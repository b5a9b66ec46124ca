"""The operation of the ``frames`` suite: attention over frames of tokens, under a rule.

The shapes are those of workloads.json's ``dit``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import vstar_kernels as vk
from benchmarks.cases import Case
from benchmarks.clock import TimedCall
from benchmarks.frame_adapters import Problem, RefusedError
from benchmarks.operations import Forward
from benchmarks.peers import Peer
from vstar_kernels.testing import ROW_SUM, assert_frames, eager_frames, largest_error

SIGMA = 1.0
SAMPLED_TOKENS = 4  # of each sampled frame, of the first head
# The relative error that integer products are known for; what is worse computes something else.
QUANTISED_ERROR = 0.1


@dataclass(frozen=True)
class Rule:
    """A rule by the number of frames; ``with_map``: the map between frames is returned too."""

    title: str
    make: Callable[[int], vk.FrameRule | None]
    with_map: bool = False


RULES = {
    "none": Rule("none", lambda frames: None),
    "bias": Rule("frame bias", lambda frames: vk.FrameRule.tar(SIGMA, stat="none")),
    "tar": Rule("TAR, frame_max", lambda frames: vk.FrameRule.tar(SIGMA)),
    "tar-row-max": Rule("TAR, row_max", lambda frames: vk.FrameRule.tar(SIGMA, stat="row_max")),
    "attenuate": Rule("attenuate", lambda frames: vk.FrameRule.attenuate(0.9, frames / 2)),
    "window": Rule("window of a quarter", lambda frames: vk.FrameRule.window(frames // 8)),
    "map": Rule("map", lambda frames: None, with_map=True),
}


def layout_of(text_first: int, frames: int, tokens: int, text_last: int) -> vk.Layout:
    """Returns the layout that a case's ``layout`` says."""
    return vk.Layout(vk.Text(text_first), vk.Frames(frames, tokens), vk.Text(text_last))


def visible_share(layout: vk.Layout, rule: vk.FrameRule | None) -> float:
    """Returns the share of all pairs of a query and a key that a rule shows."""
    offset = (rule or vk.FrameRule()).tables(layout, layout).offset
    if offset is None:
        return 1.0
    sizes = torch.tensor(layout.frame_tokens, dtype=torch.float64)
    hidden = sizes @ (offset == -torch.inf).double() @ sizes
    return 1.0 - hidden.item() / layout.tokens**2


class Frames(Forward):
    """One call of attention over frames without gradients."""

    def __init__(self, case: Case, device: str, num_sets: int) -> None:
        super().__init__(case, device, num_sets)
        assert case.layout is not None
        rule = RULES[case.rule]
        self._problem = Problem(
            self._like, layout_of(*case.layout), rule.make(case.layout[1]), rule.with_map
        )

    def offers(self, peer: Peer) -> bool:
        return peer.build_frames is not None

    def timed_call(self, name: str, peer: Peer) -> tuple[TimedCall, str]:
        assert peer.build_frames is not None
        if self._problem.with_map and peer.tar and not peer.ours:
            raise RefusedError("returns no map")
        attention = peer.build_frames(self._problem)
        return TimedCall(name, attention), getattr(attention, "note", "")

    def check(self, peer: Peer, result: Any) -> float:
        out, frame_map = result if isinstance(result, tuple) else (result, None)
        rule = self._problem.rule if peer.tar else None
        tokens, layout = self._sample
        query, found = (x[:, tokens, :1].cpu() for x in (self._like[0], out))
        key, value = (x[:, :, :1].cpu() for x in self._like[1:])
        options = {"key_layout": self._problem.layout}
        exact = eager_frames(query.double(), key.double(), value.double(), layout, rule, **options)
        if peer.quantised:
            error = ((found.double() - exact).norm() / exact.norm()).item()
            assert error <= QUANTISED_ERROR, f"relative error {error:.3g}"
        else:
            assert_frames(found, query, key, value, layout, rule, **options)
        if frame_map is not None:
            error = (frame_map.sum(-1) - 1).abs().max().item()
            # 16-bit engines sum coarser exponentials.
            allowed = ROW_SUM if out.dtype == torch.float32 else 1e-3
            assert error <= allowed, f"a row of the map has the error {error:.3g}"
        return largest_error(found, exact)

    @cached_property
    def _sample(self) -> tuple[Tensor, vk.Layout]:
        """Returns places of some tokens of text and of three frames, and their own layout."""
        layout = self._problem.layout
        chosen = {0, layout.frames // 2, layout.frames - 1}
        places: list[int] = []
        segments: list[vk.Frames | vk.Text] = []
        for run in layout.runs:
            if run.frame < 0 or run.frame in chosen:
                step = max(1, (run.end - run.start) // SAMPLED_TOKENS)
                taken = range(run.start, run.end, step)
                places += taken
                text = run.frame < 0
                first = None if text else layout.coordinates[run.frame]
                segments.append(
                    vk.Text(len(taken)) if text else vk.Frames(1, len(taken), first=first)
                )
        return torch.tensor(places), vk.Layout(*segments)
