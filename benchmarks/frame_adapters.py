"""How a peer is asked for attention over frames of tokens: the ``frames`` suite's adapters.

What a peer cannot express it refuses with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import vstar_kernels as vk
from benchmarks.adapters import Attention, AttentionWithMap, Inputs, compiled, sdpa
from vstar_kernels.attention import dispatch
from vstar_kernels.attention.frames import composed
from vstar_kernels.attention.frames.call import FrameCall, check_call


class RefusedError(Exception):
    """A peer cannot express a rule."""


@dataclass(frozen=True)
class Problem:
    """What a peer is to compute, and inputs like those of the timed calls."""

    inputs: Inputs
    layout: vk.Layout
    rule: vk.FrameRule | None
    with_map: bool = False

    @cached_property
    def frames(self) -> Tensor:
        """Returns each token's frame, and F for text, ``(tokens,)`` where the inputs are."""
        runs = self.layout.runs
        numbers = torch.tensor([self.layout.frames if r.frame < 0 else r.frame for r in runs])
        lengths = torch.tensor([run.end - run.start for run in runs])
        return numbers.repeat_interleave(lengths).to(self.inputs[0].device)

    def call(self) -> FrameCall:
        """Returns the checked call."""
        return check_call(*self.inputs, self.layout, self.rule, return_map=self.with_map)

    def attention(self, backend: str) -> AttentionWithMap:
        """Returns this package's operation by a backend."""
        options = {"layout": self.layout, "rule": self.rule, "return_map": self.with_map}
        return partial(vk.frame_attention, **options, backend=backend)

    def table(self, name: str, neutral: float = 0.0) -> Tensor | None:
        """Returns a table of the rule with a last row and column for text, on the device."""
        table = getattr((self.rule or vk.FrameRule()).tables(self.layout, self.layout), name)
        if table is None:
            return None
        padded = torch.nn.functional.pad(table, (0, 1, 0, 1), value=neutral)
        return padded.to(self.inputs[0].device)


def trial(inputs: Inputs) -> Problem:
    """Returns a problem that shows whether a peer can run at all."""
    return Problem(inputs, vk.Layout(vk.Frames(2, inputs[0].shape[1] // 2)), None)


class Kernels:
    """This package's operation by one of its backends, which ``note`` names.

    That is the backend which users get if they name none.
    """

    def __init__(self, problem: Problem, **options: Any) -> None:
        changed = replace(problem, **options)
        call = changed.call()
        self.note = dispatch.FRAME_ATTENTION.choose(call, None)
        self._attend = changed.attention(self.note)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return self._attend(query, key, value)


class Composed(Kernels):
    """This package's rules over another's attention, which ``note`` names."""

    def __init__(self, problem: Problem) -> None:
        call = problem.call()
        if reasons := composed.why_not(call):
            raise RefusedError("; ".join(reasons))
        self.note = composed.engine_for(call).name
        self._attend = problem.attention("composed")


def sdpa_with_bias(problem: Problem) -> Attention:
    """Returns PyTorch's fused attention with the rule as a tensor over all pairs of tokens.

    What does not depend on the logits is made once; a statistic needs all of them at every call.
    """
    if problem.table("factor") is not None:
        raise RefusedError("a bias does not multiply logits")
    frames, like = problem.frames, problem.inputs[0]
    delta, offset = problem.table("delta"), problem.table("offset")
    added = None if offset is None else offset[frames[:, None], frames].to(like)[None, None]
    if delta is None:
        return partial(sdpa, mask=added)
    assert problem.rule is not None
    stat, video = problem.rule.stat, frames < problem.layout.frames
    weights = delta[frames[:, None], frames].to(like)
    log_tokens = torch.log(torch.tensor(problem.layout.frame_tokens)).to(like.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k = (x.transpose(1, 2) for x in (query, key))
        logits = (q @ k.mT)[..., video].float() * query.shape[-1] ** -0.5
        if stat == "frame_max":
            by_frame = logits.unflatten(-1, (problem.layout.frames, -1)).logsumexp(-1)
            found = (by_frame - log_tokens).amax(-1, keepdim=True)
        else:
            found = logits.amax(-1, keepdim=True)
        return sdpa(query, key, value, found.to(query.dtype) * weights)

    return attend


def flex(problem: Problem) -> Attention:
    """Returns FlexAttention: one pass, and for TAR's row maxima another before it."""
    return compiled(flex_passes(problem))


def flex_passes(problem: Problem) -> Attention:
    """Returns the same, not compiled."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    frames, text = problem.frames, problem.layout.frames
    delta, offset = problem.table("delta"), problem.table("offset")
    factor = problem.table("factor", 1.0)
    stat = problem.rule.stat if problem.rule is not None else "none"
    if delta is not None and stat == "frame_max":
        raise RefusedError("returns no log-sum-exp of each frame, which frame_max is made of")
    block_mask = None
    if offset is not None and (offset == -torch.inf).any():
        shown = offset > -torch.inf
        size, device = len(frames), frames.device.type
        block_mask = create_block_mask(
            lambda b, h, i, j: shown[frames[i], frames[j]], None, None, size, size, device
        )
        offset = None  # a mask has no other entries in this suite

    def score(row_max: Tensor | None) -> Callable[..., Tensor] | None:
        def modify(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            f, g = frames[i], frames[j]
            if factor is not None:
                x = torch.where(x > 0, x * factor[0, f, g], x * factor[1, f, g])
            if offset is not None:
                x = x + offset[f, g]
            return x if row_max is None or delta is None else x + row_max[b, h, i] * delta[f, g]

        return modify if factor is not None or offset is not None or row_max is not None else None

    def of_video(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(frames[j] < text, x, -torch.inf)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        row_max = None
        if delta is not None:
            asked = AuxRequest(max_scores=True)
            row_max = flex_attention(q, k, v, score_mod=of_video, return_aux=asked)[1].max_scores
        return flex_attention(q, k, v, score_mod=score(row_max), block_mask=block_mask).transpose(
            1, 2
        )

    return attend


def sage(problem: Problem) -> Attention:
    """Returns SageAttention's attention, without the rule and in 8-bit integers."""
    from sageattention import sageattn

    return partial(sageattn, tensor_layout="NHD")


ULTRAVICO_TOKENS = 1560  # of a frame: Wan at 480 × 832, which its kernel has as a constant


def ultravico(problem: Problem) -> Attention:
    """Returns UltraViCo's kernel: https://github.com/thu-ml/DiT-Extrapolation on the path."""
    from sageattn.core import sage_attention

    if problem.table("factor") is None:
        raise RefusedError("knows no other rule than its own, attenuate")
    if set(problem.layout.frame_tokens) != {ULTRAVICO_TOKENS}:
        raise RefusedError(f"is written for frames of {ULTRAVICO_TOKENS} tokens")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key.clone(), value))  # it changes the keys
        return sage_attention(q, k, v, multi_factor=0.9).transpose(1, 2)

    return attend
