"""Video transformers with random weights at their real width; a block or a step as an operation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import vstar_kernels as vk
from benchmarks.adapters import Attention
from benchmarks.cases import Case
from benchmarks.clock import Tensors, TimedCall
from benchmarks.frame_adapters import Problem
from benchmarks.frames import RULES, layout_of
from benchmarks.peers import COMPOSED, SDPA, Peer
from vstar_kernels.models.full3d.apply import apply_frames
from vstar_kernels.models.full3d.function_mode import AttentionCall, ExchangedAttention
from vstar_kernels.models.hooks import Handle

TEXT_CHANNELS = 4096
TIMESTEP = 500
# Of the type's eps: how far from the reference's the prediction may be, over its norm.
TOLERANCE = 64


class Transformer:
    """One evaluation of a video transformer, of one side of guidance, under a rule by a peer.

    Args:
        case: An operation ``"block"``, with one block of the model alone, or ``"model"``.
        device: Where it is run.
        description: The model's entry in workloads.json's ``dit-model``.
    """

    def __init__(self, case: Case, device: str, description: dict[str, Any]) -> None:
        import diffusers

        torch.manual_seed(0)
        self.case = case
        assert case.layout is not None
        assert case.latents is not None
        rule = RULES[case.rule].make(case.layout[1])
        self._rule = vk.FrameRule() if rule is None else rule
        self._layout = layout_of(*case.layout)
        settings: dict[str, Any] = dict(description["settings"])
        settings["num_layers"] = 1 if case.operation == "block" else description["layers"]
        options: dict[str, Any] = {"device": device, "dtype": case.torch_dtype}
        with torch.device(device):
            model = getattr(diffusers, description["class"])(**settings)
        self._model: Any = model.eval().to(case.torch_dtype)
        before, frames, tokens, _ = case.layout
        channels, size = self._model.config.in_channels, case.latents
        self._arguments: dict[str, Any] = {
            "encoder_hidden_states": torch.randn(1, description["text"], TEXT_CHANNELS, **options),
            "timestep": torch.tensor([TIMESTEP], device=device),
            "return_dict": False,
        }
        if before:  # CogVideoX, whose frames come before channels
            latents = torch.randn(1, frames, channels, *size, **options)
            angles = torch.randn(frames * tokens, case.head_dim, device=device)
            self._arguments["image_rotary_emb"] = (angles.cos(), angles.sin())
        else:
            latents = torch.randn(1, channels, frames, *size, **options)
        self.inputs: list[Tensors] = [(latents,)]
        like = torch.randn(3, *case.shape, **options).unbind()
        self._problem = Problem(like, self._layout, rule)
        self._handle: Handle | None = None
        self._expected: dict[bool, Tensor] = {}

    def offers(self, peer: Peer) -> bool:
        """Returns whether the peer attends over frames of tokens at all."""
        return peer.build_frames is not None

    def timed_call(self, name: str, peer: Peer) -> tuple[TimedCall, str]:
        """Returns a call of the model; a peer of ours is put on as its users do, before each."""
        assert peer.build_frames is not None
        if name == SDPA:  # the model as it is
            return TimedCall(name, self._predict, prepare=self._stock), ""
        attention = peer.build_frames(self._problem)
        note = getattr(attention, "note", "")
        if peer.ours:
            rule = self._rule if peer.tar else vk.FrameRule()
            apply = functools.partial(self._apply, rule, name if name == COMPOSED else note)
            return TimedCall(name, self._predict, prepare=apply), note

        def predict(latents: Tensor) -> Tensor:
            with _instead(attention, self._layout.tokens):
                return self._predict(latents)

        return TimedCall(name, predict, prepare=self._stock), note

    def check(self, peer: Peer, result: Tensor) -> float:
        """Returns the distance from this package's reference in the same model, over its norm.

        Raises AssertionError if it is too large.
        """
        if peer.tar not in self._expected:
            self._apply(self._rule if peer.tar else vk.FrameRule(), "reference")
            self._expected[peer.tar] = self._predict(*self.inputs[0]).double()
            self._stock()
        expected = self._expected[peer.tar]
        error: float = ((result.double() - expected).norm() / expected.norm()).item()
        allowed = TOLERANCE * torch.finfo(result.dtype).eps
        assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
        return error

    def _predict(self, latents: Tensor) -> Tensor:
        out: Tensor = self._model(latents, **self._arguments)[0]
        return out

    def _stock(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _apply(self, rule: vk.FrameRule, backend: str) -> None:
        self._stock()
        self._handle = apply_frames(self._model, rule, backend=backend)


def _instead(attention: Attention, tokens: int) -> ExchangedAttention:
    """Returns a context with another attention where the video attends to itself."""

    def answer(call: AttentionCall) -> Tensor:
        if not call.query.shape[-2] == call.key.shape[-2] == tokens:
            return call.stock()
        heads_last = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        return attention(*heads_last).transpose(1, 2)

    return ExchangedAttention(answer)
