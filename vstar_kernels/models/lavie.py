"""The front end of LaVie's base model (arXiv 2309.15103), a UNet with rotary temporal attention.

Its transformer blocks attend over positions, to the text, and last over frames, in ``attn_temp``,
whose logits are not QKᵀ alone: queries and keys are rotated by their frame, and each head has a
learned bias over the distance of two frames. Both are functions of the number of frames, so that
there may be any. The names and formulas are those of the public code, github.com/Vchitect/LaVie,
``base/models`` at commit 6ce851e; there too, no attention has a processor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vstar_kernels.models.hooks import Argument, ModelCall, plain_name
from vstar_kernels.models.layers import (
    ColumnController,
    CrossLayer,
    Regularization,
    TemporalLayer,
)
from vstar_kernels.models.replaced_forward import (
    ColumnForward,
    ForwardFrontEnd,
    TARForward,
    why_not_self_attention,
)
from vstar_kernels.models.unet import level_of

_LAYER = re.compile(
    r"(?P<place>down|mid|up)_blocks?(?:\.(?P<index>\d+))?\."
    r"attentions\.\d+\.transformer_blocks\.\d+\.(?P<kind>attn_temp|attn2)"
)


def logit_factors(module: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, float]:
    """Returns longer queries and keys, whose products are all of a temporal layer's logits.

    φᵢⱼ = R(i) scale·qᵢ · R(j) kⱼ + Bᵢⱼ is the product of [R(i) scale·qᵢ, eᵢ] and [R(j) kⱼ, B.ⱼ],
    where eᵢ is 1 at i and 0 elsewhere: exact, whatever the type.

    Args:
        module: A ``TemporalAttention``.
        query, key: ``(…, frames, heads, head_dim)``.

    Returns:
        Both ``(…, frames, heads, head_dim + frames)``, and a scale of 1.
    """
    if module.upcast_attention:
        query, key = query.float(), key.float()
    query = module.scale * query
    if module.rotary_emb is not None:
        rotate = module.rotary_emb.rotate_queries_or_keys  # of (…, heads, frames, head_dim)
        query, key = (rotate(x.transpose(-3, -2)).transpose(-3, -2) for x in (query, key))
    frames = query.shape[-3]
    relative = module.time_rel_pos_bias(frames, device=query.device)  # (heads, queries, keys)
    one = torch.eye(frames, dtype=query.dtype, device=query.device)[:, None]
    others = relative.permute(2, 0, 1).to(key)  # (keys, heads, queries)
    shape = (*query.shape[:-1], frames)
    return (
        torch.cat([query, one.expand(shape)], dim=-1),
        torch.cat([key, others.expand(shape)], dim=-1),
        1.0,
    )


class LavieTARForward(TARForward):
    """The ``forward`` of a ``TemporalAttention``, regularized.

    It takes ``(rows, frames, channels)``, rows being batch × height × width, and returns the same
    shape. TAR's statistic is that of all of the logits, rotated and with the bias over distances.
    """

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends over the frames of each row, projections included.

        Raises:
            ValueError: The module or the call asks for more than temporal self-attention.
        """
        change = self.regularization()
        if change.stock:
            return self.previous(hidden_states, encoder_hidden_states, attention_mask)
        module: Any = self.module
        reasons = why_not_self_attention(hidden_states, encoder_hidden_states, attention_mask)
        reasons += _why_not(module)
        if reasons:
            raise ValueError(
                f"TAR in {type(module).__name__} does not support {'; '.join(reasons)}"
            )
        return _finish(module, self.attend(module, hidden_states, change))

    def operate(
        self, query: Tensor, key: Tensor, value: Tensor, change: Regularization, scale: float
    ) -> Tensor:
        """Computes attention over frames; all ``(rows, frames, heads, head_dim)``."""
        head_dim = value.shape[-1]
        query, key, scale = logit_factors(self.module, query, key)
        longer = F.pad(value, (0, query.shape[-1] - head_dim)).to(query.dtype)
        out = super().operate(query, key, longer, change, scale)
        return out[..., :head_dim].to(value.dtype)


class LavieColumnForward(ColumnForward):
    """The ``forward`` of a ``CrossAttention`` to the text, with the maps of some words."""

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Attends to the text, projections included.

        Raises:
            ValueError: The module or the call asks for more than cross-attention.
        """
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        columns = self.controller.columns(self.layer, hidden_states, text.shape[1])
        if columns is None:
            return self.previous(hidden_states, encoder_hidden_states, attention_mask, **more)
        module: Any = self.module
        reasons = ["a mask"] if attention_mask is not None else []
        reasons += _extras(module)
        if reasons:
            name = type(module).__name__
            raise ValueError(f"capture_columns in {name} does not support {'; '.join(reasons)}")
        return _finish(module, self.attend(module, hidden_states, text, columns))


def _finish(module: Any, out: Tensor) -> Tensor:
    """Returns what comes after attention: the output projection and its dropout."""
    for layer in module.to_out:
        out = layer(out)
    return out


def _why_not(module: Any) -> list[str]:
    """Returns what a temporal module is that TAR would have to ignore."""
    reasons = _extras(module)
    # Its own code leaves the positions out there.
    if module._use_memory_efficient_attention_xformers:
        reasons.append("xformers in attn_temp (_use_memory_efficient_attention_xformers)")
    if module._slice_size is not None:
        reasons.append("attention slicing (set_attention_slice)")
    return reasons


def _extras(module: Any) -> list[str]:
    names = ("group_norm", "added_kv_proj_dim")
    return [f"an attention module with {x}" for x in names if getattr(module, x) is not None]


class LavieFrontEnd(ForwardFrontEnd):
    """TAR in the ``UNet3DConditionModel`` of LaVie's base model."""

    guides_in_turns = False
    models = (
        "UNet3DConditionModel of LaVie (base; with modules named like "
        "down_blocks.0.attentions.0.transformer_blocks.0.attn_temp)"
    )

    def layers(self, model: nn.Module) -> Iterator[TemporalLayer]:
        """Yields the temporal self-attention modules in the model's order."""
        for name, match, module in _attentions(model, "attn_temp"):
            # LaVie's interpolation model has an attn_temp of another kind.
            if hasattr(module, "time_rel_pos_bias") and hasattr(module, "rotary_emb"):
                level = level_of(match, len(model.down_blocks))  # type: ignore[arg-type]
                yield TemporalLayer(name, level, match["place"], module)  # type: ignore[arg-type]

    def cross_layers(self, model: nn.Module) -> Iterator[CrossLayer]:
        """Yields the cross-attention modules to the text."""
        for name, match, module in _attentions(model, "attn2"):
            level = level_of(match, len(model.down_blocks))  # type: ignore[arg-type]
            yield CrossLayer(name, level, match["place"], module)  # type: ignore[arg-type]

    def text_blocks(self, model: nn.Module) -> list[nn.Module]:
        """Returns the transformer blocks: the modules around them repeat the text for frames."""
        names = (layer.name.rpartition(".")[0] for layer in self.cross_layers(model))
        return [model.get_submodule(name) for name in names]

    def read_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> ModelCall:
        """Returns the facts of a call; the model is not told the step."""
        sample = Argument(model, 0).get(args, kwargs)
        return ModelCall(sample, Argument(model, 1).get(args, kwargs), sample.shape[-1])

    def make_attention(self, module: nn.Module, backend: str | None) -> LavieTARForward:
        """Makes a forward for the module, plain until it is given a bias."""
        return LavieTARForward(module, backend=backend)

    def logit_factors(
        self, module: nn.Module, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Returns queries and keys with the positions in them; see :func:`logit_factors`."""
        return logit_factors(module, query, key)

    def watch_cross_attention(
        self, controller: ColumnController, layer: CrossLayer, backend: str | None
    ) -> LavieColumnForward:
        """Makes a forward that gives a layer's column maps to the controller."""
        previous = self.get_attention(layer.module)
        return LavieColumnForward(layer.module, controller, layer.name, previous, backend)


def _attentions(model: nn.Module, kind: str) -> Iterator[tuple[str, re.Match[str], nn.Module]]:
    """Yields the name of each attention module of a kind, what the name says, and the module."""
    if not isinstance(getattr(model, "down_blocks", None), nn.ModuleList):
        return
    for name, module in model.named_modules():
        match = _LAYER.fullmatch(plain_name(name))
        if match and match["kind"] == kind:
            yield name, match, module
