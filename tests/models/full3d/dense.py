"""Attention with a rule between frames in float64 over all pairs of tokens, put in by other means.

It stands in the place of PyTorch's attention while a model runs, and knows nothing of routes, of
rules as the package has them or of frame_attention: only the formula of VSTAR's regularization
between frames.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import vstar_kernels as vk
from tests.models.full3d.tiny import Tiny
from vstar_kernels.models.full3d.function_mode import AttentionCall, ExchangedAttention


@dataclass
class Dense:
    """The attention of a tiny model's video layers.

    Args:
        tiny: The model's kind.
        frames: The number of frames that it is called with.
        strength, sigma, stat: Of the regularization.
        layers: The layers that are regularized, by name; None is all.

    Attributes:
        maps: Of each layer the map between frames, ``(batch, heads, frames, frames + 1)``.
    """

    tiny: Tiny
    frames: int | None = None
    strength: float = 0.0
    sigma: float = 1.0
    stat: str = "frame_max"
    layers: Collection[str] | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)

    def run(self, model: nn.Module, seed: int = 1) -> Tensor:
        """Returns the model's output with this in the place of its attention."""
        self.maps = {}
        self._coming = self._calls()
        with ExchangedAttention(self._answer):
            out = self.tiny.run(model, self.frames, seed)
        assert not self._coming, f"{self._coming[0]} was not called"
        return out

    def _calls(self) -> list[tuple[str, int, int]]:
        """Returns the layer, the first sequence and the tokens of each of the calls to come."""
        calls = []
        for name, layout in self.tiny.layouts(self.frames).items():
            if self.tiny.name == "MochiTransformer3DModel":  # a call for each sequence
                for i, valid in enumerate(self.tiny.valid_text or ()):
                    calls.append((name, i, layout.tokens - layout.text_tokens + valid))
            else:
                calls.append((name, 0, layout.tokens))
        return calls

    def _answer(self, call: AttentionCall) -> Tensor:
        queries, keys = call.query.shape[2], call.key.shape[2] - self.tiny.prompt
        if not self._coming or {queries, keys} != {self._coming[0][2]}:
            return call.stock()
        name, _, _ = self._coming.pop(0)
        layout = self.tiny.layouts(self.frames)[name]
        out, map_ = self._attend(call, layout, self.layers is None or name in self.layers)
        self.maps[name] = torch.cat([self.maps[name], map_]) if name in self.maps else map_
        return out.to(call.query.dtype)

    def _attend(
        self, call: AttentionCall, layout: vk.Layout, is_regularized: bool
    ) -> tuple[Tensor, Tensor]:
        group = call.query.shape[1] // call.key.shape[1]
        k, v = (x.repeat_interleave(group, 1).double() for x in (call.key, call.value))
        q = call.query.double()
        logits = q @ k.mT * (call.scale or q.shape[-1] ** -0.5)
        visible = torch.zeros_like(logits)
        if call.attn_mask is not None:
            mask = call.attn_mask
            visible = visible.masked_fill(
                ~mask if mask.dtype == torch.bool else mask < 0, -math.inf
            )
        frame = torch.tensor([run.frame for run in layout.runs for _ in range(run.start, run.end)])[
            : q.shape[2]
        ]
        key_frame = torch.cat([frame.new_full((self.tiny.prompt,), -1), frame])
        if is_regularized:
            logits = logits + self._bias(logits + visible, frame, key_frame, layout)
        weights = (logits + visible).softmax(-1).nan_to_num(0.0)  # a query may see nothing
        onto = [weights[..., key_frame == g].sum(-1) for g in [*range(layout.frames), -1]]
        rows = torch.stack(onto, dim=-1)
        map_ = torch.stack([rows[:, :, frame == f].mean(2) for f in range(layout.frames)], dim=2)
        return weights @ v, map_.float()

    def _bias(self, logits: Tensor, frame: Tensor, key_frame: Tensor, layout: vk.Layout) -> Tensor:
        by_frame = [logits[..., key_frame == g] for g in range(layout.frames)]
        if self.stat == "row_max":
            stat = torch.cat(by_frame, dim=-1).amax(-1)
        else:
            counts = [x.isfinite().sum(-1).clamp(min=1).log() for x in by_frame]
            means = [x.logsumexp(-1) - n for x, n in zip(by_frame, counts, strict=True)]
            stat = torch.stack(means, dim=-1).amax(-1)
        stat = stat.masked_fill(~stat.isfinite(), 0.0)  # where it sees no frame
        times = torch.tensor(layout.coordinates, dtype=torch.float64)
        apart = times[frame][:, None] - times[key_frame]
        delta = torch.exp(-(apart**2) / (2 * self.sigma**2))
        delta = delta * ((frame[:, None] >= 0) & (key_frame >= 0))
        return self.strength * stat[..., None] * delta
