"""What ComfyUI's contract with its node packs is, by small stand-ins with its names and calls.

They are written from what the interfaces promise, not from ComfyUI's code, which is GPL:
``integrations/comfyui/check.py`` runs the same nodes in the real program.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

DIFFUSION_MODEL = "diffusion_model"
HEADS, DIM_HEAD = 2, 8
CHANNELS = HEADS * DIM_HEAD
TEXT_CHANNELS = 6


def attention_pytorch(q, k, v, heads, mask=None, **kwargs):
    """Plain attention, as ComfyUI's functions of this name compute it."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.dim_head = HEADS, DIM_HEAD
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(CHANNELS, CHANNELS, bias=False))
        self.to_out = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.Dropout(0.0))

    def forward(self, x, context=None, value=None, mask=None, transformer_options={}):  # noqa: B006
        context = x if context is None else context
        value = context if value is None else value
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(value)
        return self.to_out(attention_pytorch(q, k, v, self.heads, mask))


class VersatileAttention(nn.Module):
    """A motion module's attention: its rows are ``(batch · frames, positions, channels)``."""

    def __init__(self, cross=False):
        super().__init__()
        self.is_cross_attention = cross
        self.actual_attention = attention_pytorch
        self.heads, self.dim_head, self.scale = HEADS, DIM_HEAD, 1.5
        for name in ("to_q", "to_k", "to_v", "to_out"):
            setattr(self, name, nn.Linear(CHANNELS, CHANNELS, bias=False))

    def forward(self, hidden_states, mask=None, video_length=None):
        x = hidden_states.unflatten(0, (-1, video_length)).transpose(1, 2).flatten(0, 1)
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        k *= self.scale
        out = self.to_out(self.actual_attention(q, k, v, self.heads, mask))
        positions = hidden_states.shape[1]
        return out.unflatten(0, (-1, positions)).transpose(1, 2).flatten(0, 1)


class BasicTransformerBlock(nn.Module):
    """One block of a ``time_stack``, with the patches that others put on its attention."""

    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(), CrossAttention()

    def forward(self, x, context, options):
        patch = options.get("patches_replace", {}).get("attn1")
        if patch is not None:
            x = x + patch(x)
        else:
            kwargs = {}
            for change in options.get("patches", {}).get("attn1_patch", []):
                kwargs["context"], kwargs["value"] = change(x)
            x = x + self.attn1(x, transformer_options=options, **kwargs)
        return x + self.attn2(x, context=context)


class SpatialVideoTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([CrossAttention()])
        self.time_stack = nn.ModuleList([BasicTransformerBlock()])

    def forward(self, h, options, frames):
        height, width = h.shape[2:]
        x = h.flatten(2).mT
        x = x + self.transformer_blocks[0](x)
        over_time = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        over_time = self.time_stack[0](over_time, over_time[:, :1], options)
        x = over_time.unflatten(0, (-1, height * width)).transpose(1, 2).flatten(0, 1)
        return x.mT.unflatten(2, (height, width))


class VanillaTemporalModule(nn.Module):
    """What AnimateDiff-Evolved injects into a block."""

    def __init__(self):
        super().__init__()
        self.attention_blocks = nn.ModuleList([VersatileAttention(), VersatileAttention()])
        self.attention_blocks.append(VersatileAttention(cross=True))
        self.video_length = 0
        self.view_length = None  # FreeNoise's windows within a motion module
        self.effect = 1.0

    def forward(self, h, options, frames):
        if self.effect == 0:
            return h
        x = h.flatten(2).mT
        length = self.view_length or self.video_length
        for attention in self.attention_blocks[:2]:
            views = x.unflatten(0, (-1, self.video_length)).split(length, dim=1)
            outs = [
                attention(v.flatten(0, 1), video_length=v.shape[1]).unflatten(0, v.shape[:2])
                for v in views
            ]
            x = x + torch.cat(outs, dim=1).flatten(0, 1)
        return x.mT.unflatten(2, h.shape[2:])


class Downsample(nn.Module):
    def forward(self, h, options, frames):
        return F.avg_pool2d(h, 2)


class Upsample(nn.Module):
    def forward(self, h, options, frames):
        return F.interpolate(h, scale_factor=2.0)


class TimestepEmbedSequential(nn.Sequential):
    def forward(self, h, options, frames):
        for layer in self:
            h = layer(h, options, frames)
        return h


class Conv(nn.Conv2d):
    def forward(self, h, options, frames):
        return super().forward(h)


class UNetModel(nn.Module):
    """Two levels, the coarser one in ``middle_block`` too."""

    def __init__(self, attention=SpatialVideoTransformer, frames=8):
        super().__init__()
        self.default_num_video_frames = frames
        block = TimestepEmbedSequential
        self.input_blocks = nn.ModuleList(
            [
                block(Conv(4, CHANNELS, 1)),
                block(attention()),
                block(Downsample()),
                block(attention()),
            ]
        )
        self.middle_block = block(attention())
        self.output_blocks = nn.ModuleList([block(attention(), Upsample()), block(attention())])
        self.out = nn.Conv2d(CHANNELS, 4, 1)
        for module in self.modules():
            if isinstance(module, VanillaTemporalModule):
                module.video_length = frames  # which AnimateDiff-Evolved sets before each call

    def forward(
        self,
        x,
        timesteps=None,
        context=None,
        y=None,
        control=None,
        transformer_options={},  # noqa: B006
        **kwargs,
    ):
        wrappers = transformer_options.get("wrappers", {}).get(DIFFUSION_MODEL, {})
        found = [wrapper for of_key in wrappers.values() for wrapper in of_key]
        executor = WrapperExecutor(self._forward, self, found)
        return executor.execute(x, timesteps, context, y, control, transformer_options, **kwargs)

    def _forward(self, x, timesteps, context, y, control, transformer_options, **kwargs):
        frames = kwargs.get("num_video_frames", self.default_num_video_frames)
        h = x
        for layer in (*self.input_blocks, self.middle_block, *self.output_blocks):
            h = layer(h, transformer_options, frames)
        return self.out(h)


class WrapperExecutor:
    """Calls wrappers in order, each of which calls the rest."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, list(wrappers)

    def __call__(self, *args, **kwargs):
        return WrapperExecutor(self.original, self.class_obj, self.wrappers[1:]).execute(
            *args, **kwargs
        )

    def execute(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](self, *args, **kwargs)


class ModelPatcher:
    """A model in a graph: clones share the UNet, and have their own wrappers and options."""

    def __init__(self, unet):
        self.model = types.SimpleNamespace(diffusion_model=unet)
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self):
        new = ModelPatcher(self.model.diffusion_model)
        new.wrappers = {
            kind: {key: list(found) for key, found in keys.items()}
            for kind, keys in self.wrappers.items()
        }
        new.model_options = {"transformer_options": dict(self.model_options["transformer_options"])}
        return new

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def get_model_object(self, name):
        assert name == "diffusion_model"
        return self.model.diffusion_model

    def sample(self, latents, sigmas, *, frames=None, sides=(1, 0), options=None, **kwargs):
        """Returns what the UNet says at each sigma but the last, with both sides of guidance."""

        def run():
            outs = []
            for sigma in sigmas[:-1]:
                outs.append(self.call(latents, sigma, sigmas, frames, sides, options, **kwargs))
            return outs

        outer = self.wrappers.get("outer_sample", {})
        found = [wrapper for of_key in outer.values() for wrapper in of_key]
        return WrapperExecutor(run, self, found).execute()

    def guide(self, latents, sigmas, *, repeated=False, options=None, **conditionings):
        """Returns what the model says of each conditioning, by its name, at each sigma.

        Those of equally many tokens are one batch, the last first. Others are, too, where they may
        be ``repeated`` until they are; else the model is called for each.
        """
        conds = {
            name: [{"cross_attn": text, **more} for text, more in conditioning]
            for name, conditioning in conditionings.items()
        }
        sides = list(enumerate(cond for (cond,) in conds.values()))[::-1]

        def run(noise):
            return [each(sigma) for sigma in sigmas[:-1]]

        def each(sigma):
            length = math.lcm(*(cond["cross_attn"].shape[1] for _, cond in sides))
            batches: dict[Any, Any] = {}
            for side, cond in sides:
                text, mask = cond["cross_attn"], cond.get("attention_mask")
                text = text.repeat(1, length // text.shape[1], 1) if repeated else text
                batch = batches.setdefault((text.shape, mask is None), [])
                batch.append((side, text.expand(len(latents), -1, -1), mask))
            outs = {}
            for batch in batches.values():
                numbers, texts, masks = zip(*batch, strict=True)
                more = {} if masks[0] is None else {"attention_mask": torch.cat(masks)}
                more |= {"context": torch.cat(texts), "sides": numbers, "options": options}
                out = self.call(latents, sigma, sigmas, **more).chunk(len(batch))
                outs |= dict(zip(numbers, out, strict=True))
            return {name: outs[side] for side, name in enumerate(conds)}

        outer = self.wrappers.get("outer_sample", {})
        found = [wrapper for of_key in outer.values() for wrapper in of_key]
        return WrapperExecutor(run, types.SimpleNamespace(conds=conds), found).execute(latents)

    def call(
        self,
        latents,
        sigma,
        sigmas,
        frames=None,
        sides=(1, 0),
        options=None,
        context=None,
        **kwargs,
    ):
        unet = self.model.diffusion_model
        transformer_options = {
            **self.model_options["transformer_options"],
            "wrappers": self.wrappers,
            "sigmas": torch.as_tensor(sigma).reshape(1),
            "sample_sigmas": torch.as_tensor(sigmas),
            "cond_or_uncond": list(sides),
            **(options or {}),
        }
        if frames is not None:  # which Stable Video Diffusion is told, and AnimateDiff is not
            kwargs["num_video_frames"] = frames
        x = torch.cat([latents] * len(sides))
        timesteps = transformer_options["sigmas"].expand(len(x))
        with torch.inference_mode():
            return unet(
                x, timesteps, context=context, transformer_options=transformer_options, **kwargs
            )


class _Kind:
    """A type of sockets: ``io.Model.Input("model", tooltip=…)``."""

    def __init__(self, io_type):
        self.io_type = io_type

    def Input(self, id, **settings):  # noqa: N802
        return types.SimpleNamespace(id=id, io_type=self.io_type, **settings)

    def Output(self, id=None, display_name=None, **settings):  # noqa: N802
        return types.SimpleNamespace(id=id, io_type=self.io_type, display_name=display_name)


class Schema:
    def __init__(self, node_id, display_name, category, description, inputs, outputs, **more):
        self.node_id, self.display_name, self.category = node_id, display_name, category
        self.description, self.inputs, self.outputs, self.more = description, inputs, outputs, more


class NodeOutput:
    def __init__(self, *args, ui=None):
        self.args, self.ui = args, ui

    def __getitem__(self, index):
        return self.args[index]


class PreviewImage:
    def __init__(self, image, animated=False, cls=None):
        self.image = image


KINDS = {
    "Model": "MODEL",
    "Clip": "CLIP",
    "Image": "IMAGE",
    "Latent": "LATENT",
    "Conditioning": "CONDITIONING",
    "Int": "INT",
    "Float": "FLOAT",
    "String": "STRING",
    "Boolean": "BOOLEAN",
    "Combo": "COMBO",
}


def modules() -> dict[str, types.ModuleType]:
    """Returns the modules of ComfyUI that the nodes import, by name."""
    io = types.SimpleNamespace(
        **{name: _Kind(io_type) for name, io_type in KINDS.items()},
        Custom=_Kind,
        Schema=Schema,
        NodeOutput=NodeOutput,
        ComfyNode=type("ComfyNode", (), {}),
    )
    made = {
        name: types.ModuleType(name)
        for name in ("comfy", "comfy.patcher_extension", "comfy_api", "comfy_api.latest")
    }
    latest: Any = made["comfy_api.latest"]
    latest.io, latest.ui = io, types.SimpleNamespace(PreviewImage=PreviewImage)
    latest.ComfyExtension = type("ComfyExtension", (), {})
    extension: Any = made["comfy.patcher_extension"]
    extension.WrappersMP = types.SimpleNamespace(
        DIFFUSION_MODEL=DIFFUSION_MODEL, OUTER_SAMPLE="outer_sample"
    )
    return made


def optimized_attention(q, k, v, heads, mask=None, transformer_options=None, **kwargs):
    """ComfyUI's attention, which an override may take over."""
    override = (transformer_options or {}).get("optimized_attention_override")
    kwargs = {"mask": mask, "transformer_options": transformer_options, **kwargs}
    if override is not None:
        return override(plain_attention, q, k, v, heads, **kwargs)
    return plain_attention(q, k, v, heads, **kwargs)


def plain_attention(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask.unsqueeze(1)
    scale = kwargs.get("scale")
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


class WanSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))

    def forward(self, x, context=None, mask=None, image=None, transformer_options=None):
        context = x if context is None else context
        q, k, v = self.q(x), self.k(context), self.v(context)
        more = {"heads": HEADS, "transformer_options": transformer_options}
        if image is None:
            return optimized_attention(q, k, v, mask=mask, **more)
        seen = optimized_attention(q, self.k(image), self.v(image), **more)  # first, as Wan does
        return seen + optimized_attention(q, k, v, mask=mask, **more)


class WanAttentionBlock(nn.Module):
    """Its cross-attention, where there is no text, is to as many tokens as the video has."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.cross_attn = WanSelfAttention(), WanSelfAttention()

    def forward(self, x, options, context=None, image=None):
        x = x + self.self_attn(x, transformer_options=options)
        context = x.flip(1) if context is None else context
        return x + self.cross_attn(x, context, image=image, transformer_options=options)


class Transformer(nn.Module):
    """What the full-3D models below share: patches of ``(1, 2, 2)`` if not told otherwise."""

    patch_size = (1, 2, 2)

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv3d(4, CHANNELS, self.patch_size, self.patch_size)
        self.text_embedding = nn.Linear(TEXT_CHANNELS, CHANNELS)

    def forward(self, x, timestep, context=None, transformer_options={}, **kwargs):  # noqa: B006
        wrappers = transformer_options.get("wrappers", {}).get(DIFFUSION_MODEL, {})
        found = [wrapper for of_key in wrappers.values() for wrapper in of_key]
        executor = WrapperExecutor(self._forward, self, found)
        return executor.execute(x, timestep, context, transformer_options, **kwargs)

    def _forward(self, x, timestep, context, transformer_options, **kwargs):
        # To whole patches, as ComfyUI pads.
        pad = [-size % step for size, step in zip(x.shape[2:], self.patch_size, strict=True)]
        x = F.pad(x, (0, pad[2], 0, pad[1], 0, pad[0]))
        if context is not None:
            kwargs["context"] = self.text_embedding(context)
        return self.blocks_of(self.embed(x).flatten(2).mT, transformer_options, **kwargs)


class WanModel(Transformer):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([WanAttentionBlock(), WanAttentionBlock()])

    def blocks_of(self, x, options, reference=0, context=None, clip_fea=None, **kwargs):
        x = torch.cat([x[:, :reference].flip(1), x], dim=1)  # a reference image comes first
        for block in self.blocks:
            x = block(x, options, context, clip_fea)
        return x[:, reference:]


class VaceWanModel(WanModel):
    def __init__(self):
        super().__init__()
        self.vace_blocks = nn.ModuleList([WanAttentionBlock()])

    def blocks_of(self, x, options, context=None, **kwargs):
        x = x + self.vace_blocks[0](x.flip(1), options, context)
        return super().blocks_of(x, options, context=context, **kwargs)


class DoubleStreamBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, x, mask, options):
        qkv = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + optimized_attention(
            *qkv, HEADS, skip_reshape=True, mask=mask, transformer_options=options
        )


class HunyuanVideo(Transformer):
    """Text first, of which the last tokens may be masked."""

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList([DoubleStreamBlock()])
        self.single_blocks = nn.ModuleList([DoubleStreamBlock()])

    def blocks_of(self, x, options, text=3, mask=None, **kwargs):
        x = torch.cat([x[:, :text] * 0.5, x], dim=1)
        for block in (*self.double_blocks, *self.single_blocks):
            x = block(x, mask, options)
        return x[:, text:]


class LTXBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = WanSelfAttention(), WanSelfAttention()

    def forward(self, x, options, context=None, mask=None):
        x = x + self.attn1(x, transformer_options=options)
        context = x.flip(1) if context is None else context
        return x + self.attn2(x, context, mask, transformer_options=options)


class LTXVModel(Transformer):
    patch_size = (1, 1, 1)  # which ComfyUI's has no attribute for

    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([LTXBlock(), LTXBlock()])

    def blocks_of(self, x, options, extra=0, context=None, attention_mask=None, **kwargs):
        x = torch.cat([x, x[:, :extra]], dim=1)
        mask = attention_mask
        if mask is not None:
            mask = (mask - 1).to(x.dtype)[:, None] * torch.finfo(x.dtype).max
        for block in self.transformer_blocks:
            x = block(x, options, context, mask)
        return x[:, : x.shape[1] - extra]
