"""Temporal attention regularization in diffusers' ``Attention`` modules.

>>> from vstar_kernels.models.layers import temporal_layers
>>> from vstar_kernels.models.unet import TARAttnProcessor
>>> for layer in temporal_layers(unet):
...     if layer.level == 0:
...         layer.module.set_processor(TARAttnProcessor(vk.GaussianBias(sigma=1.0)))

:func:`vstar_kernels.apply_tar` does this for whole models and pipelines, step by step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from vstar_kernels.attention.bias import Bias
from vstar_kernels.attention.temporal import tar_attention
from vstar_kernels.models.config import Override

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

# What TAR may take the place of: they all compute plain attention.
PLAIN_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
)


class Owner(Protocol):
    """Who sets a processor's attributes before each forward pass of its model."""

    def check_running(self) -> None:
        """Raise RuntimeError outside of a forward pass, where nobody has set them."""


class TARAttnProcessor:
    """An attention processor for the temporal self-attention of diffusers' ``Attention``.

    It takes ``(rows, frames, channels)``, rows being batch × height × width, and returns the same
    shape. Without a bias it computes what ``AttnProcessor2_0`` computes. All attributes may be
    changed between calls.

    Args:
        bias: The regularization; None is plain attention.
        override: ``"identity"`` or ``"uniform"`` instead of the attention map (VSTAR, Fig. 4).
        backend: As for :func:`vstar_kernels.tar_attention`.
    """

    # Set by the owner, which is what put it into a model: what it took the place of there, and
    # whether to leave calls to that.
    owner: Owner | None = None
    previous: Any = None
    stock: bool = False

    # No argument is needed: diffusers re-creates processors as `processor.__class__()`.
    def __init__(
        self,
        bias: Bias | None = None,
        *,
        override: Override | None = None,
        backend: str | None = None,
    ) -> None:
        self.bias = bias
        self.override = override
        self.backend = backend

    # `Attention.forward` passes on only the keywords that it finds here by name.
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention over the frames of each row, projections included.

        Raises:
            ValueError: The module or the call asks for more than temporal self-attention; the
                message lists everything that it asks for.
        """
        if self.owner is not None:
            self.owner.check_running()
        if self.stock:
            return self.previous(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        reasons = _why_not(attn, hidden_states, encoder_hidden_states, attention_mask)
        if reasons:
            raise ValueError(f"TARAttnProcessor does not support {'; '.join(reasons)}")
        out = attend(attn, hidden_states, self.bias, override=self.override, backend=self.backend)
        for layer in attn.to_out:  # projection, dropout
            out = layer(out)
        if attn.residual_connection:
            out = out + hidden_states
        # Dividing by 1 would be a pass over the memory, which costs as much as small attention.
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a copy of a model that has an owner, what was there before: the copy has none."""
        if self.previous is None:
            return super().__reduce_ex__(protocol)
        return _same, (self.previous,)


def _same(value: Any) -> Any:
    return value


def attend(
    attn: Any,
    hidden_states: Tensor,
    bias: Bias | None,
    *,
    override: Override | None,
    backend: str | None,
) -> Tensor:
    """Self-attention over frames, before the output projection; ``(rows, frames, channels)``.

    Args:
        attn: Has ``to_q``, ``to_k``, ``to_v``, ``heads`` and ``scale``.
        hidden_states: ``(rows, frames, channels)``.
        bias, override, backend: See :class:`TARAttnProcessor`.
    """
    # The projections are called, not read: adapters, casting and offloading hook into the call.
    if override is not None:
        value: Tensor = attn.to_v(hidden_states)
        if override == "identity":
            return value
        return value.mean(dim=1, keepdim=True).expand_as(value)
    q, k, v = (
        project(hidden_states).unflatten(-1, (attn.heads, -1))
        for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    return tar_attention(q, k, v, bias, scale=attn.scale, backend=backend).flatten(-2)


def _why_not(
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
) -> list[str]:
    """What is asked for that TARAttnProcessor would have to ignore; empty if nothing is."""
    reasons = []
    if hidden_states.ndim != 3:
        reasons.append(
            "hidden_states other than (rows, frames, channels), "
            f"got shape {tuple(hidden_states.shape)}"
        )
    if encoder_hidden_states is not None and encoder_hidden_states is not hidden_states:
        reasons.append(
            "cross-attention (encoder_hidden_states of shape "
            f"{tuple(encoder_hidden_states.shape)}): it is for self-attention over frames"
        )
    if attention_mask is not None:
        reasons.append(f"an attention_mask, got shape {tuple(attention_mask.shape)}")
    for name in ("group_norm", "spatial_norm", "norm_q", "norm_k", "added_kv_proj_dim"):
        if getattr(attn, name) is not None:
            reasons.append(f"an attention module with {name}")
    if attn.is_causal:
        reasons.append("causal attention (is_causal)")
    if attn.inner_kv_dim != attn.inner_dim:
        reasons.append(
            "fewer key and value heads than query heads "
            f"({attn.inner_kv_dim} channels for {attn.inner_dim})"
        )
    if attn.to_out is None:
        reasons.append("an attention module without an output projection (pre_only)")
    return reasons


def get_processor(module: nn.Module) -> Any:
    """The module's processor."""
    return module.processor


def set_processor(module: nn.Module, processor: Any) -> None:
    """Give the module a processor."""
    module.set_processor(processor)  # type: ignore[operator]


def make_processor(module: nn.Module, backend: str | None) -> TARAttnProcessor:
    """A processor for the module, plain until it is given a bias."""
    return TARAttnProcessor(backend=backend)


def why_not_replace(processor: Any) -> str | None:
    """Why a processor that is found in a model cannot make way for TAR; None if it can."""
    if isinstance(processor, TARAttnProcessor):
        return None
    name = type(processor).__name__
    if name in PLAIN_PROCESSORS:
        return None
    if name.startswith("PAG"):
        return (
            f"perturbed attention guidance ({name}) is applied to it: restrict pag_applied_layers "
            "to spatial attention, e.g. 'mid_block.attentions.*attn1'"
        )
    return f"it has a {name}, which TAR would replace"


def register_for_layer_skip() -> None:
    """Let diffusers' LayerSkip skip attention with our processor, as it does with its own.

    Where diffusers is too old to have the registry, it has nothing to register for.
    """
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry
        from diffusers.models.attention_processor import AttnProcessor2_0
    except ImportError:
        return
    metadata = AttentionProcessorRegistry.get(AttnProcessor2_0)
    AttentionProcessorRegistry.register(TARAttnProcessor, metadata)
