"""A small UNet with the names, shapes and calls of ``lvdm``'s: VideoCrafter and VSTAR.

Written from a description of them, for the tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    def __init__(self, query_dim: int, context_dim: int | None = None, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (query_dim // heads) ** -0.5
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim), nn.Dropout(0.0))

    def forward(self, x, context=None, mask=None, time_index=None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, tokens in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        logits = self.scale * q @ k.mT
        if mask is not None:
            logits = logits.masked_fill(mask == 0, -torch.inf)
        return self.to_out((logits.softmax(-1) @ v).transpose(1, 2).flatten(-2))


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim)
        self.attn2 = CrossAttention(dim, context_dim)
        self.ff = nn.Linear(dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, context=None, time_index=None) -> Tensor:
        x = self.attn1(self.norm1(x), time_index=time_index) + x
        x = self.attn2(self.norm2(x), context=context, time_index=time_index) + x
        return self.ff(self.norm3(x)) + x


class TemporalTransformer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, dim)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(dim)])

    def forward(self, x: Tensor, time_index=None) -> Tensor:
        batch, _, _, height, width = x.shape
        tokens = self.norm(x).permute(0, 3, 4, 2, 1).flatten(0, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, time_index=time_index)
        return tokens.unflatten(0, (batch, height, width)).permute(0, 4, 3, 1, 2) + x


class SpatialTransformer(nn.Module):
    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(dim, context_dim)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        batch, _, frames, height, width = x.shape
        tokens = x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context.repeat_interleave(frames, dim=0))
        return (
            tokens.unflatten(0, (batch, frames))
            .unflatten(2, (height, width))
            .permute(0, 4, 1, 2, 3)
        )


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, emb: int) -> None:
        super().__init__()
        self.in_layers = nn.Conv3d(channels, out_channels, 1)
        self.emb_layers = nn.Linear(emb, out_channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return F.silu(self.in_layers(x) + self.emb_layers(emb)[..., None, None, None])


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv3d(channels, channels, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2)))


class TimestepEmbedSequential(nn.Sequential):
    def forward(self, x, emb, context=None, time_index=None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, TemporalTransformer):
                x = layer(x, time_index=time_index)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """Two levels of 16 and 32 channels, a block of each way down, two up."""

    def __init__(self, context_dim: int = 24) -> None:
        super().__init__()
        emb = 8

        def block(channels: int, out_channels: int, *more: nn.Module) -> TimestepEmbedSequential:
            return TimestepEmbedSequential(
                ResBlock(channels, out_channels, emb),
                SpatialTransformer(out_channels, context_dim),
                TemporalTransformer(out_channels),
                *more,
            )

        self.time_embed = nn.Linear(1, emb)
        self.init_attn = TimestepEmbedSequential(TemporalTransformer(16))
        self.input_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(nn.Conv3d(4, 16, (1, 3, 3), padding=(0, 1, 1))),
                block(16, 16),
                TimestepEmbedSequential(Downsample(16)),
                block(16, 32),
            ]
        )
        self.middle_block = TimestepEmbedSequential(
            ResBlock(32, 32, emb),
            SpatialTransformer(32, context_dim),
            TemporalTransformer(32),
            ResBlock(32, 32, emb),
        )
        self.output_blocks = nn.ModuleList(
            [
                block(32 + 32, 32),
                block(32 + 16, 32, Upsample(32)),
                block(32 + 16, 16),
                block(16 + 16, 16),
            ]
        )
        self.out = nn.Conv3d(16, 4, 1)

    def forward(self, x, timesteps, context=None, step_index=None, **kwargs) -> Tensor:
        emb = self.time_embed(torch.as_tensor(timesteps).to(x.dtype).expand(len(x))[:, None] / 1000)
        size = x.shape[-2:]
        skips = []
        for index, module in enumerate(self.input_blocks):
            x = module(x, emb, context, step_index)
            if index == 0:
                x = self.init_attn(x, emb, context, step_index)
            skips.append(x)
        x = self.middle_block(x, emb, context, step_index)
        for module in self.output_blocks:
            skip = skips.pop()
            # Odd sizes come back even.
            x = module(
                torch.cat([x[..., : skip.shape[-2], : skip.shape[-1]], skip], dim=1),
                emb,
                context,
                step_index,
            )
        return self.out(x[..., : size[0], : size[1]])


class DiffusionWrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = UNetModel()

    def forward(self, x, t, c_crossattn) -> Tensor:
        return self.diffusion_model(x, t, context=torch.cat(c_crossattn, 1))


class LatentDiffusion(nn.Module):
    """VideoCrafter2's noising: the signal is scaled by 1 at first, then less, by 0.7 in the end."""

    parameterization = "eps"
    use_scale = True

    def __init__(self, timesteps: int = 1000, scale_b: float = 0.7, mid_step: int = 400) -> None:
        super().__init__()
        self.model = DiffusionWrapper()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float())
        falling = torch.linspace(1.0, scale_b, mid_step)
        scale = torch.cat([falling, torch.full((timesteps,), scale_b)])[:timesteps]
        self.register_buffer("scale_arr", scale)

    def q_sample(self, x_start, t, noise) -> Tensor:
        signal, noisy = (
            x[t].reshape(-1, *[1] * (x_start.ndim - 1))
            for x in (
                self.alphas_cumprod.sqrt() * self.scale_arr,
                (1 - self.alphas_cumprod).sqrt(),
            )
        )
        return signal * x_start + noisy * noise

    def apply_model(self, x_noisy, t, cond) -> Tensor:
        return self.model(x_noisy, t, **cond)
