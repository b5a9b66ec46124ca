"""A small UNet with the names, shapes and calls of LaVie's base model.

Written for the tests from the structure of github.com/Vchitect/LaVie, ``base/models`` at commit
6ce851e; its code is not copied.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Turns neighbouring channels, the first ``dim`` of them, by angles that grow with the frame.

    It stands for the package ``rotary_embedding_torch``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 1e4 ** (-torch.arange(0, dim, 2) / dim))

    def rotate_queries_or_keys(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * self.freqs.float()
        turned, rest = x[..., : 2 * len(self.freqs)], x[..., 2 * len(self.freqs) :]
        pairs = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2)).contiguous())
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([torch.view_as_real(pairs).flatten(-2).to(x), rest], dim=-1)


class RelativePositionBias(nn.Module):
    """A number for each head and distance of two frames, the same beyond ``reach`` frames."""

    def __init__(self, heads: int, reach: int = 4) -> None:
        super().__init__()
        self.reach = reach
        self.relative_attention_bias = nn.Embedding(2 * reach + 1, heads)

    def forward(self, n: int, device: torch.device) -> Tensor:
        frame = torch.arange(n, device=device)
        distance = (frame - frame[:, None]).clamp(-self.reach, self.reach)
        return self.relative_attention_bias(distance + self.reach).permute(2, 0, 1)


class CrossAttention(nn.Module):
    def __init__(self, query_dim: int, cross_attention_dim: int | None = None) -> None:
        super().__init__()
        self.heads, self.scale = 2, (query_dim // 2) ** -0.5
        self.upcast_attention = False
        self.group_norm = self.added_kv_proj_dim = self._slice_size = None
        self._use_memory_efficient_attention_xformers = False
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(cross_attention_dim or query_dim, query_dim, bias=False)
        self.to_v = nn.Linear(cross_attention_dim or query_dim, query_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(query_dim, query_dim), nn.Dropout(0.0)])

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        return self.scale * query @ key.mT

    def attend(self, hidden_states: Tensor, context: Tensor | None) -> Tensor:
        context = hidden_states if context is None else context
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, x in (
                (self.to_q, hidden_states),
                (self.to_k, context),
                (self.to_v, context),
            )
        )
        out = (self.logits(q, k).softmax(-1) @ v).transpose(1, 2).flatten(-2)
        return self.to_out[1](self.to_out[0](out))

    def forward(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, use_image_num=None
    ) -> Tensor:
        return self.attend(hidden_states, encoder_hidden_states)


class TemporalAttention(CrossAttention):
    def __init__(self, query_dim: int, rotary_emb: nn.Module) -> None:
        super().__init__(query_dim)
        self.time_rel_pos_bias = RelativePositionBias(self.heads)
        self.rotary_emb = rotary_emb

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        rotate = self.rotary_emb.rotate_queries_or_keys
        bias = self.time_rel_pos_bias(query.shape[-2], device=query.device)
        return rotate(self.scale * query) @ rotate(key).mT + bias

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None) -> Tensor:
        return self.attend(hidden_states, encoder_hidden_states)


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim: int, cross_attention_dim: int, rotary_emb: nn.Module) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim)
        self.attn2 = CrossAttention(dim, cross_attention_dim)
        self.attn_temp = TemporalAttention(dim, rotary_emb)
        self.norm1, self.norm2, self.norm_temp = (nn.LayerNorm(dim) for _ in range(3))
        self.ff = nn.Linear(dim, dim)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        timestep=None,
        attention_mask=None,
        video_length=None,
        use_image_num=None,
    ) -> Tensor:
        x = self.attn1(self.norm1(hidden_states), attention_mask=attention_mask) + hidden_states
        x = self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states) + x
        positions = x.shape[1]
        x = x.unflatten(0, (-1, video_length)).transpose(1, 2).flatten(0, 1)
        x = self.attn_temp(self.norm_temp(x)) + x
        x = x.unflatten(0, (-1, positions)).transpose(1, 2).flatten(0, 1)
        return self.ff(x) + x


class Transformer3DModel(nn.Module):
    def __init__(self, dim: int, cross_attention_dim: int, rotary_emb: nn.Module) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, dim)
        block = BasicTransformerBlock(dim, cross_attention_dim, rotary_emb)
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        frames, (height, width) = hidden_states.shape[2], hidden_states.shape[-2:]
        text = encoder_hidden_states.repeat_interleave(frames, dim=0)
        x = self.norm(hidden_states).transpose(1, 2).flatten(0, 1).flatten(2).mT
        for block in self.transformer_blocks:
            x = block(x, encoder_hidden_states=text, video_length=frames)
        x = x.mT.unflatten(-1, (height, width)).unflatten(0, (-1, frames)).transpose(1, 2)
        return SimpleNamespace(sample=x + hidden_states)


class ResnetBlock3D(nn.Module):
    def __init__(self, channels: int, out_channels: int, emb: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 1)
        self.time_emb_proj = nn.Linear(emb, out_channels)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return F.silu(self.conv(x) + self.time_emb_proj(temb)[..., None, None, None])


class CrossAttnBlock3D(nn.Module):
    """Of either way: resnets and transformers by turns, then another resolution if there is one."""

    has_cross_attention = True

    def __init__(self, sizes: list[tuple[int, int]], text: int, rotary: nn.Module) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock3D(*size, 8) for size in sizes])
        self.attentions = nn.ModuleList([Transformer3DModel(x, text, rotary) for _, x in sizes])

    def forward(self, x: Tensor, temb: Tensor, text: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
        pairs = zip(self.resnets, self.attentions, strict=True)
        for index, (resnet, attention) in enumerate(pairs):
            x = torch.cat([x, skips[index]], dim=1) if skips else x
            x = attention(resnet(x, temb), encoder_hidden_states=text).sample
        return x


class UNet3DConditionModel(nn.Module):
    """Two levels of 16 and 32 channels, a transformer of each way down, two up."""

    def __init__(self, cross_attention_dim: int = 24) -> None:
        super().__init__()
        rotary = RotaryEmbedding(4)  # one for all layers
        self.conv_in = nn.Conv3d(4, 16, (1, 3, 3), padding=(0, 1, 1))
        self.time_embedding = nn.Linear(1, 8)

        def block(*sizes: tuple[int, int]) -> CrossAttnBlock3D:
            return CrossAttnBlock3D(list(sizes), cross_attention_dim, rotary)

        self.down_blocks = nn.ModuleList([block((16, 16)), block((16, 32))])
        self.mid_block = block((32, 32))
        self.up_blocks = nn.ModuleList(
            [block((64, 32), (48, 32)), block((48, 16), (32, 16))],
        )
        self.conv_out = nn.Conv3d(16, 4, 1)

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states=None,
        class_labels=None,
        attention_mask=None,
        use_image_num=0,
        return_dict=True,
    ) -> SimpleNamespace | tuple[Tensor]:
        times = torch.as_tensor(timestep, device=sample.device).float().expand(len(sample))
        temb, text = self.time_embedding(times[:, None] / 1000), encoder_hidden_states
        first = self.conv_in(sample)
        fine = self.down_blocks[0](first, temb, text, ())
        frames, height, width = fine.shape[2:]
        half = F.interpolate(fine, (frames, (height + 1) // 2, (width + 1) // 2))
        coarse = self.down_blocks[1](half, temb, text, ())
        x = self.mid_block(coarse, temb, text, ())
        x = F.interpolate(self.up_blocks[0](x, temb, text, (coarse, half)), fine.shape[2:])
        x = self.conv_out(self.up_blocks[1](x, temb, text, (fine, first)))
        return SimpleNamespace(sample=x) if return_dict else (x,)
