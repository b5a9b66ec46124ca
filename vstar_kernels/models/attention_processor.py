"""Temporal attention regularization in diffusers' ``Attention`` modules.

>>> from vstar_kernels.models.attention_processor import TARAttnProcessor
>>> from vstar_kernels.models.front_end import temporal_layers
>>> for layer in temporal_layers(unet):
...     if layer.level == 0:
...         layer.module.set_processor(TARAttnProcessor(vk.GaussianBias(sigma=1.0)))

:func:`vstar_kernels.apply_tar` does this for whole models and pipelines, step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vstar_kernels.models.hooks import Argument, ModelCall, plain_name
from vstar_kernels.models.layers import (
    ColumnController,
    CrossLayer,
    RegularizedAttention,
    WatchedCrossAttention,
)

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


class TARAttnProcessor(RegularizedAttention):
    """An attention processor for the temporal self-attention of diffusers' ``Attention``.

    It takes ``(rows, frames, channels)``, rows being batch × height × width, and returns the same
    shape. Without a bias it computes what ``AttnProcessor2_0`` computes. All attributes may be
    changed between calls.

    Args:
        bias: The regularization; None is plain attention.
        override: ``"identity"`` or ``"uniform"`` instead of the attention map (VSTAR, Fig. 4).
        backend: As for :func:`vstar_kernels.tar_attention`.
    """

    # `Attention.forward` passes on only the keywords that it finds here by name.
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attends over the frames of each row, projections included.

        Raises:
            ValueError: The module or the call asks for more than temporal self-attention; the
                message lists everything that it asks for.
        """
        change = self.regularization()
        if change.stock:
            return self.previous(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        reasons = _why_not(attn, hidden_states, attention_mask)
        if encoder_hidden_states is not None and encoder_hidden_states is not hidden_states:
            reasons.append(
                "cross-attention (encoder_hidden_states of shape "
                f"{tuple(encoder_hidden_states.shape)}): it is for self-attention over frames"
            )
        if reasons:
            raise ValueError(f"{type(self).__name__} does not support {'; '.join(reasons)}")
        return _finish(attn, self.attend(attn, hidden_states, change), hidden_states)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies what was there before, as nothing controls the copy of a model under TAR."""
        if self.previous is None:
            return super().__reduce_ex__(protocol)
        return _same, (self.previous,)


class ColumnAttnProcessor(WatchedCrossAttention):
    """An attention processor for cross-attention to the text, with the maps of some words.

    :func:`vstar_kernels.capture_columns` puts it in. It takes and returns ``(rows, positions,
    channels)``, a row for each frame.
    """

    # `Attention.forward` passes on only the keywords that it finds here by name.
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attends to the text, projections included.

        Raises:
            ValueError: The module or the call asks for more than cross-attention; the message lists
                everything that it asks for.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        columns = self.controller.columns(self.layer, hidden_states, context.shape[1])
        if columns is None:
            return self.previous(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        reasons = _why_not(attn, hidden_states, attention_mask)
        if getattr(attn, "norm_cross", None):
            reasons.append("an attention module with norm_cross")
        if reasons:
            raise ValueError(f"capture_columns does not support {'; '.join(reasons)}")
        out = self.attend(attn, hidden_states, context, columns)
        return _finish(attn, out, hidden_states)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies what was there before, as nothing captures the maps of the copy of a model."""
        return _same, (self.previous,)


def _same(value: Any) -> Any:
    return value


def _finish(attn: Attention, out: Tensor, hidden_states: Tensor) -> Tensor:
    """Returns what comes after attention: the output projection and the residual."""
    for layer in attn.to_out:  # projection, dropout
        out = layer(out)
    if attn.residual_connection:
        out = out + hidden_states
    # Dividing by 1 would be a pass over the memory, which costs as much as small attention.
    return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def _why_not(attn: Attention, hidden_states: Tensor, attention_mask: Tensor | None) -> list[str]:
    """Returns what is asked for that our processors would have to ignore."""
    reasons = []
    if hidden_states.ndim != 3:
        reasons.append(
            "hidden_states other than (rows, frames, channels), "
            f"got shape {tuple(hidden_states.shape)}"
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


class ProcessorFrontEnd:
    """What the front ends of diffusers' models share: layers are ``Attention`` with processors."""

    guides_in_turns = False

    @classmethod
    def self_attentions(cls, model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        """Yields each self-attention module's name, its name without wrappers, and the module."""
        # Temporal transformers can be built to attend to the prompt in attn2.
        return cls._attentions(model, cross=False)

    @classmethod
    def cross_attentions(cls, model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        """Yields the same of each cross-attention module."""
        return cls._attentions(model, cross=True)

    @staticmethod
    def _attentions(model: nn.Module, *, cross: bool) -> Iterator[tuple[str, str, nn.Module]]:
        for name, module in model.named_modules():
            if getattr(module, "is_cross_attention", None) is cross:
                yield name, plain_name(name), module

    def text_blocks(self, model: nn.Module) -> list[nn.Module]:
        """Returns none, where frames have no texts of their own."""
        return []

    def read_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> ModelCall:
        """Returns the facts of a call; diffusers does not tell its models the step."""
        sample = Argument(model, 0).get(args, kwargs)
        return ModelCall(sample, Argument(model, 1).get(args, kwargs), sample.shape[-1])

    def get_attention(self, module: nn.Module) -> Any:
        """Returns the module's processor."""
        return module.processor

    def set_attention(self, module: nn.Module, attention: Any) -> None:
        """Gives the module a processor."""
        module.set_processor(attention)  # type: ignore[operator]

    def make_attention(self, module: nn.Module, backend: str | None) -> TARAttnProcessor:
        """Makes a processor for the module, plain until it is given a bias."""
        return TARAttnProcessor(backend=backend)

    def logit_factors(
        self, module: nn.Module, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Returns queries and keys whose scaled products are a layer's logits, and the scale."""
        return query, key, module.scale

    def watch_cross_attention(
        self, controller: ColumnController, layer: CrossLayer, backend: str | None
    ) -> ColumnAttnProcessor:
        """Makes a processor that gives a layer's column maps to the controller."""
        previous = self.get_attention(layer.module)
        return ColumnAttnProcessor(controller, layer.name, previous, backend)

    def why_not_watch(self, attention: Any) -> str | None:
        """Returns why a processor of cross-attention cannot make way, or None."""
        name = type(attention).__name__
        if isinstance(attention, ColumnAttnProcessor) or name in PLAIN_PROCESSORS:
            return None
        if name.startswith("IPAdapter"):
            return f"it has an {name}, whose attention to images capture_columns has not"
        return f"it has a {name}, which capture_columns would replace"

    def why_not_replace(self, attention: Any) -> str | None:
        """Returns why a processor that is found in a model cannot make way for TAR, or None."""
        if isinstance(attention, TARAttnProcessor):
            return None
        name = type(attention).__name__
        if name in PLAIN_PROCESSORS:
            return None
        if name.startswith("PAG"):
            return (
                f"TAR and perturbed attention guidance ({name}) are both to compute it. Restrict "
                "pag_applied_layers to spatial attention, e.g. 'mid_block.attentions.*attn1': the "
                "default 'mid_block.*attn1' takes motion modules too"
            )
        return f"it has a {name}, which TAR would replace"

    def register(self) -> None:
        """Lets diffusers' LayerSkip skip attention with our processor, as it does with its own.

        Where diffusers is too old to have the registry, it has nothing to register for.
        """
        try:
            from diffusers.hooks._helpers import AttentionProcessorRegistry
            from diffusers.models.attention_processor import AttnProcessor2_0
        except ImportError:
            return
        metadata = AttentionProcessorRegistry.get(AttnProcessor2_0)
        AttentionProcessorRegistry.register(TARAttnProcessor, metadata)
