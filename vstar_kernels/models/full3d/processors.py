"""Route B: a small processor of ours takes the place of the model's own.

These models call PyTorch's attention themselves, or build a mask over all pairs of tokens for it.
Each class here does what the model's processor does up to its attention, and after it: projections,
norms and rotations are called in the same order, so that adapters, casting and offloading hook into
them as before, and so that what is computed where no rule is on is the same, bit for bit.

They were written after the processors of diffusers 0.42 (Apache-2.0), and are found by their names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor

from vstar_kernels.models.full3d.masks import key_lengths
from vstar_kernels.models.full3d.seats import Seat, attend


class FrameProcessor:
    """A processor that leads a layer's attention to its seat, in the place of the model's own.

    What is read of it or set on it beyond that (an attention backend, a parallel configuration) is
    the model's own processor's, and a copy or a pickle of it is one of that.

    Attributes:
        seat: The layer's; None once the route is taken out: the model's own processor then runs.
        previous: The model's own processor.
    """

    seat: Seat | None
    previous: Any

    def __init__(self, seat: Seat, previous: Any) -> None:
        vars(self).update(seat=seat, previous=previous)

    def leave(self) -> None:
        """Has the model's own processor run, wherever this one is still held on to."""
        vars(self)["seat"] = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "previous" not in vars(self):
            raise AttributeError(name)
        return getattr(self.previous, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.previous, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.previous, memo)

    def __copy__(self) -> Any:
        return copy.copy(self.previous)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self.previous,)


def _same(processor: Any) -> Any:
    return processor


class CogVideoXProcessor(FrameProcessor):
    """CogVideoX and ConsisID: the prompt's tokens stand before the video's."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the video's tokens and the prompt's."""
        seat = self.seat
        if seat is None:
            return self.previous(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        text = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        batch, tokens, _ = hidden_states.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])

        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = (p(hidden_states) for p in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = (_heads_first(x, attn.heads) for x in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if image_rotary_emb is not None:
            _rotate_after(text, query, image_rotary_emb)
            if not attn.is_cross_attention:
                _rotate_after(text, key, image_rotary_emb)

        out = _attend(seat, query, key, value, attention_mask)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        return out[:, text:], out[:, :text]


class EasyAnimateProcessor(FrameProcessor):
    """EasyAnimate: the prompt's tokens stand before the video's, with their own projections or not.

    Its layers are called without a mask.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the video's tokens and the prompt's."""
        seat = self.seat
        if seat is None:
            return self.previous(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        text = encoder_hidden_states.shape[1]
        separate = attn.add_q_proj is not None
        if not separate:
            hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            project(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if separate:
            text_query, text_key, text_value = (
                project(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
                for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            if attn.norm_added_q is not None:
                text_query = attn.norm_added_q(text_query)
            if attn.norm_added_k is not None:
                text_key = attn.norm_added_k(text_key)
            query = torch.cat([text_query, query], dim=2)
            key = torch.cat([text_key, key], dim=2)
            value = torch.cat([text_value, value], dim=2)
        if image_rotary_emb is not None:
            _rotate_after(text, query, image_rotary_emb)
            if not attn.is_cross_attention:
                _rotate_after(text, key, image_rotary_emb)

        out = _attend(seat, query, key, value, attention_mask).flatten(2).to(query.dtype)
        encoder_hidden_states, hidden_states = out[:, :text], out[:, text:]
        if getattr(attn, "to_out", None) is not None:
            hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if getattr(attn, "to_add_out", None) is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states


class MochiProcessor(FrameProcessor):
    """Mochi: each sequence is the video's tokens and then those of its prompt that exist.

    The model's own processor attends to one sequence at a time. Here they go together, padded, and
    as many keys of each exist as it has tokens.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the video's tokens and the prompts', those that exist first, the others 0."""
        seat = self.seat
        if seat is None:
            return self.previous(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        query, key, value = (
            project(hidden_states).unflatten(2, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        text_query, text_key, text_value = (
            project(encoder_hidden_states).unflatten(2, (attn.heads, -1))
            for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        if attn.norm_added_q is not None:
            text_query = attn.norm_added_q(text_query)
        if attn.norm_added_k is not None:
            text_key = attn.norm_added_k(text_key)
        if image_rotary_emb is not None:
            query = _rotate_pairs(query, *image_rotary_emb)
            key = _rotate_pairs(key, *image_rotary_emb)

        video, exists = query.shape[1], attention_mask.bool()
        order = exists.int().argsort(dim=1, descending=True, stable=True)[..., None, None]
        query, key, value = (
            torch.cat([x, text.take_along_dim(order, dim=1)], dim=1)
            for x, text in ((query, text_query), (key, text_key), (value, text_value))
        )
        lengths = video + exists.sum(1, dtype=torch.int32)

        def stock() -> Tensor:
            outs = []
            for i, length in enumerate(lengths.tolist()):
                q, k, v = (x[i : i + 1, :length].transpose(1, 2) for x in (query, key, value))
                out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
                outs.append(F.pad(out, (0, 0, 0, 0, 0, query.shape[1] - length)))
            return torch.cat(outs)

        out = attend(seat, query, key, value, key_lengths=lengths, stock=stock)
        padded = torch.arange(query.shape[1], device=query.device) >= lengths[:, None]
        out = out.masked_fill(padded[..., None, None], 0.0).flatten(2)
        hidden_states, encoder_hidden_states = out[:, :video], out[:, video:]
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if hasattr(attn, "to_add_out"):
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states


class AllegroProcessor(FrameProcessor):
    """Allegro: a bias of −10,000 on keys that do not exist, which must be the last ones."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """Returns the video's tokens."""
        seat = self.seat
        if seat is None:
            return self.previous(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, image_rotary_emb
            )
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, tokens, _ = context.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        query, key, value = (
            _heads_first(x, attn.heads)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        if image_rotary_emb is not None and not attn.is_cross_attention:
            from diffusers.models.embeddings import apply_rotary_emb_allegro

            query, key = (apply_rotary_emb_allegro(x, *image_rotary_emb[:2]) for x in (query, key))

        lengths = None
        if attention_mask is not None and seat.is_taken():
            lengths = key_lengths(attention_mask, seat.layer.name)
        out = _attend(seat, query, key, value, attention_mask, lengths)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).to(query.dtype)))


class CosmosProcessor(FrameProcessor):
    """Cosmos 1, Predict 2 and Transfer 2.5: the dispatcher is called, but is told no backend."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """Returns the video's tokens."""
        seat = self.seat
        if seat is None:
            return self.previous(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.embeddings import apply_rotary_emb

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                apply_rotary_emb(x, image_rotary_emb, use_real=True, use_real_unbind_dim=-2)
                for x in (query, key)
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = attend(
            seat,
            q,
            k,
            v,
            masked=attention_mask is not None,
            stock=lambda: dispatch_attention_fn(q, k, v, attn_mask=attention_mask),
        )
        out = out.flatten(2).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


class HunyuanVideo15Processor(FrameProcessor):
    """HunyuanVideo-1.5: a key length takes the place of masks over all pairs of tokens.

    The model's own processor makes two of them in each call, 24 GiB for 121 frames of 720p, which
    hide the prompt's padding from all queries, and everything from the padding. The model has put
    the tokens that exist first. As keys, the padding is hidden here too. What it receives as a
    query is of no consequence: it is hidden in all later layers as well, and is not a part of the
    video.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the video's tokens and the prompt's."""
        seat = self.seat
        if seat is None:
            return self.previous(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.embeddings import apply_rotary_emb

        query, key, value = (
            project(hidden_states).unflatten(2, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key)
            )
        text_query, text_key, text_value = (
            project(encoder_hidden_states).unflatten(2, (attn.heads, -1))
            for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        if attn.norm_added_q is not None:
            text_query = attn.norm_added_q(text_query)
        if attn.norm_added_k is not None:
            text_key = attn.norm_added_k(text_key)
        query = torch.cat([query, text_query], dim=1)
        key = torch.cat([key, text_key], dim=1)
        value = torch.cat([value, text_value], dim=1)

        text, tokens = encoder_hidden_states.shape[1], query.shape[1]
        exists = F.pad(attention_mask, (tokens - attention_mask.shape[1], 0), value=True).bool()

        def stock() -> Tensor:
            keys = exists[:, None, None].repeat(1, 1, tokens, 1)
            out: Tensor = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=(keys & keys.transpose(2, 3)).bool(),
                backend=self.previous._attention_backend,
                parallel_config=self.previous._parallel_config,
            )
            return out

        lengths = exists.sum(1, dtype=torch.int32)
        out = attend(seat, query, key, value, key_lengths=lengths, stock=stock)
        out = out.flatten(2).to(query.dtype)
        hidden_states, encoder_hidden_states = out[:, :-text], out[:, -text:]
        if getattr(attn, "to_out", None) is not None:
            hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if getattr(attn, "to_add_out", None) is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states


# By the name of the processor whose place they take.
PROCESSORS: dict[str, Callable[[Seat, Any], FrameProcessor]] = {
    "CogVideoXAttnProcessor2_0": CogVideoXProcessor,
    "FusedCogVideoXAttnProcessor2_0": CogVideoXProcessor,
    "EasyAnimateAttnProcessor2_0": EasyAnimateProcessor,
    "MochiAttnProcessor2_0": MochiProcessor,
    "AllegroAttnProcessor2_0": AllegroProcessor,
    "CosmosAttnProcessor2_0": CosmosProcessor,
    "HunyuanVideo15AttnProcessor2_0": HunyuanVideo15Processor,
}


class ProcessorRoute:
    """Route B of one layer; see the file.

    Args:
        seat: The layer's.
        make: Makes the processor for the seat and the one whose place it takes; None looks it up
            in ``PROCESSORS``.
    """

    def __init__(
        self, seat: Seat, make: Callable[[Seat, Any], FrameProcessor] | None = None
    ) -> None:
        self._seat = seat
        self._make = make
        # All that were ever put in: a model may hold on to some, to put them back later (after
        # unfusing its projections).
        self._made: WeakSet[FrameProcessor] = WeakSet()

    def is_in(self) -> bool:
        """Returns whether the layer's processor is one of ours, which leads to the seat."""
        processor = self._seat.layer.module.processor
        return isinstance(processor, FrameProcessor) and processor.seat is self._seat

    def put_in(self) -> None:
        """Gives the layer a processor of ours.

        Raises:
            ValueError: Its processor is none that is known.
        """
        module = self._seat.layer.module
        found = module.processor
        if isinstance(found, FrameProcessor):  # left behind by another handle
            found = found.previous
        make = self._make or PROCESSORS.get(type(found).__name__)
        if make is None:
            raise ValueError(
                f"{self._seat.layer.name} has a {type(found).__name__}, whose place none of ours "
                f"can take: known are {', '.join(PROCESSORS)}"
            )
        made = make(self._seat, found)
        self._made.add(made)  # noted first, so that it can be taken out at any time
        module.processor = made  # Mochi's have no set_processor

    def take_out(self) -> None:
        """Gives the layer its own processor back, unless it has been given another since."""
        module = self._seat.layer.module
        if isinstance(module.processor, FrameProcessor) and module.processor in self._made:
            module.processor = module.processor.previous
        for made in list(self._made):
            made.leave()


def _attend(
    seat: Seat,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attends where the model calls PyTorch itself.

    Args:
        seat: The layer's.
        query, key, value: ``(batch, heads, tokens, head_dim)``.
        mask: The model's own.
        lengths: What says the same as the mask.

    Returns:
        ``(batch, tokens, heads, head_dim)``.
    """

    def stock() -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2)

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    masked = mask is not None and lengths is None
    return attend(seat, q, k, v, key_lengths=lengths, masked=masked, stock=stock)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """Returns ``(batch, heads, tokens, head_dim)``."""
    return x.view(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)


def _rotate_after(text: int, x: Tensor, angles: Any) -> None:
    """Rotates the tokens after the prompt's, in place; ``(batch, heads, tokens, head_dim)``."""
    from diffusers.models.embeddings import apply_rotary_emb

    rotated: Any = apply_rotary_emb(x[:, :, text:], angles)
    x[:, :, text:] = rotated


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns Mochi's rotation of neighbouring channels, in float32."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    rotated = (even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)
    return torch.stack(rotated, dim=-1).flatten(-2)
