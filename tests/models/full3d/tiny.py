"""Tiny full-3D transformers of diffusers with random weights, their inputs and their layouts.

Each is the real class in a configuration that is made in milliseconds. What a model does is not
looked at; where its attention happens, and how its tokens lie, is that of the real weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vstar_kernels as vk
from tests.versions import is_before

HEIGHT, WIDTH, PLACES = 4, 6, 6  # of the latents, and the tokens of a frame at patches of 2 × 2
BATCH = 2
_SEED = threading.Lock()  # all threads share what is seeded


@dataclass(frozen=True)
class Tiny:
    """A tiny model: how to make it, and what to call it with.

    Attributes:
        name: Its class in diffusers.
        settings: Its configuration.
        inputs: Returns the keyword arguments of a call, for a number of frames.
        layout: Returns the layout of its video self-attention, for a number of frames.
        layers: The names of its video self-attention modules, in the order of their calls.
        frames: The usual number of latent frames.
        batch: How many sequences ``inputs`` returns.
        valid_text: How many of the tokens of text, which are then last, exist in each sequence;
            None where all do.
        causal: How many frames see one another, where later frames are masked; 0 where none are.
        own: The layouts of those layers whose sequence is another than the rest's.
        prompt: How many tokens of text are keys and no queries, before all others.
        tolerance: By how much its output may differ where attention is computed otherwise.
        setup: What is done to the model once it is made.
        since: The first version of diffusers that has its class.
    """

    name: str
    settings: dict[str, Any]
    inputs: Callable[[int], dict[str, Any]]
    layout: Callable[[int], vk.Layout]
    layers: tuple[str, ...]
    frames: int = 3
    batch: int = BATCH
    valid_text: tuple[int, ...] | None = None
    causal: int = 0
    own: dict[str, Callable[[int], vk.Layout]] = field(default_factory=dict)
    prompt: int = 0
    tolerance: float = 3e-6
    setup: Callable[[Any], object] = field(default=lambda model: None)
    since: str = "0"

    def make(self, seed: int = 0, **changes: Any) -> nn.Module:
        """Returns the model, the same one for the same seed; skips the test where it is too new."""
        if is_before("diffusers", self.since):
            pytest.skip(f"diffusers has {self.name} since {self.since}")
        import diffusers

        with _SEED, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = getattr(diffusers, self.name)(**self.settings | changes).eval()
            for parameter in model.parameters():
                if not parameter.any():  # an output or a modulation that begins as nothing
                    nn.init.normal_(parameter, std=0.3)
        self.setup(model)
        return model

    def layouts(self, frames: int | None = None) -> dict[str, vk.Layout]:
        """Returns the layout of each layer."""
        made = {name: self.own.get(name, self.layout) for name in self.layers}
        return {name: layout(frames or self.frames) for name, layout in made.items()}

    def call(self, frames: int | None = None, seed: int = 1) -> dict[str, Any]:
        """Returns the keyword arguments of a call, the same ones for the same seed."""
        with _SEED, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.inputs(frames or self.frames) | {"return_dict": False}

    def run(self, model: nn.Module, frames: int | None = None, seed: int = 1) -> Tensor:
        """Returns the model's output, of the video where it has others."""
        with torch.no_grad():
            out = model(**self.call(frames, seed))
        while isinstance(out, tuple | list):
            out = out[0]
        return out


def latents(channels: int) -> Callable[[int], dict[str, Any]]:
    """Returns what makes a sample of ``(batch, channels, frames, height, width)``."""
    return lambda frames: {
        "hidden_states": torch.randn(BATCH, channels, frames, HEIGHT, WIDTH),
        "timestep": torch.tensor([300] * BATCH),
    }


def text(tokens: int, width: int) -> Tensor:
    return torch.randn(BATCH, tokens, width)


def also(
    inputs: Callable[[int], dict[str, Any]], more: Callable[[int], dict[str, Any]]
) -> Callable[[int], dict[str, Any]]:
    return lambda frames: inputs(frames) | more(frames)


def video(frames: int) -> vk.Layout:
    return vk.Layout(vk.Frames(frames, PLACES))


def video_then_text(tokens: int) -> Callable[[int], vk.Layout]:
    return lambda frames: vk.Layout(vk.Frames(frames, PLACES), vk.Text(tokens))


def text_then_video(tokens: int, patch: int = 1) -> Callable[[int], vk.Layout]:
    return lambda frames: vk.Layout(vk.Text(tokens), vk.Frames(-(-frames // patch), PLACES))


def named(pattern: str, count: int = 2) -> tuple[str, ...]:
    return tuple(pattern.format(i) for i in range(count))


def padded(*counts: int, of: int) -> Tensor:
    """Returns masks of padded text with so many valid tokens."""
    return (torch.arange(of) < torch.tensor(counts)[:, None]).long()


# ---- Wan and what is made of it ----

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
WITH_IMAGE = {"image_dim": 16, "added_kv_proj_dim": 24}
BLOCKS = named("blocks.{}.attn1")


def wan_text(frames: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(7, 16)}


def wan_image(frames: int) -> dict[str, Any]:
    # The processor takes the last 512 keys of cross-attention for text.
    return {
        "encoder_hidden_states": text(512, 16),
        "encoder_hidden_states_image": text(9, 16),
    }


def wan_animate(frames: int) -> dict[str, Any]:
    return {
        "pose_hidden_states": torch.randn(BATCH, 4, frames - 1, HEIGHT, WIDTH),
        "face_pixel_values": torch.randn(BATCH, 3, 4 * (frames - 2) + 1, 8, 8),
    }


def helios(frames: int) -> dict[str, Any]:
    """A first frame that is kept, five frames of history, the oldest four as one, and new ones."""
    return {
        "encoder_hidden_states": text(7, 16),
        "indices_hidden_states": torch.arange(9, 9 + frames).expand(BATCH, -1),
        "indices_latents_history_short": torch.tensor([[0, 7, 8]] * BATCH),
        "indices_latents_history_mid": torch.tensor([[5, 6]] * BATCH),
        "indices_latents_history_long": torch.tensor([[1, 2, 3, 4]] * BATCH),
        "latents_history_short": torch.randn(BATCH, 4, 3, HEIGHT, WIDTH),
        "latents_history_mid": torch.randn(BATCH, 4, 2, HEIGHT, WIDTH),
        "latents_history_long": torch.randn(BATCH, 4, 4, HEIGHT, WIDTH),
    }


def helios_layout(frames: int) -> vk.Layout:
    return vk.Layout(
        vk.Frames(1, 1, first=2.5),  # 1 to 4, in patches of 8 × 8
        vk.Frames(1, 2, first=5.5),  # 5 and 6, in patches of 4 × 4
        vk.Frames(1, PLACES, first=0),
        vk.Frames(2, PLACES, first=7),
        vk.Frames(frames, PLACES, first=9),
    )


# ---- HunyuanVideo and what is made of it ----

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
HUNYUAN_BLOCKS = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")


def hunyuan(frames: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(8, 16),
        "encoder_attention_mask": padded(8, 5, of=8),
        "pooled_projections": torch.randn(BATCH, 8),
        "guidance": torch.tensor([6.0] * BATCH),
    }


def framepack(frames: int) -> dict[str, Any]:
    """History of four frames as one, of two as one, and two whole frames, before the new ones."""
    return hunyuan(frames) | {
        "image_embeds": text(3, 6),
        "indices_latents": torch.arange(8, 8 + frames),
        "latents_clean": torch.randn(BATCH, 4, 2, HEIGHT, WIDTH),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": torch.randn(BATCH, 4, 2, HEIGHT, WIDTH),
        "indices_latents_history_2x": torch.tensor([5, 6]),
        "latents_history_4x": torch.randn(BATCH, 4, 4, HEIGHT, WIDTH),
        "indices_latents_history_4x": torch.tensor([1, 2, 3, 4]),
    }


def framepack_layout(frames: int) -> vk.Layout:
    return vk.Layout(
        vk.Frames(1, 1, first=2.5),
        vk.Frames(1, 2, first=5.5),
        vk.Frames(1, PLACES, first=0),
        vk.Frames(1, PLACES, first=7),
        vk.Frames(frames, PLACES, first=8),
        vk.Text(11),  # an image's 3 and a prompt's 8
    )


def hunyuan15(frames: int) -> dict[str, Any]:
    return {
        "timestep": torch.tensor([300.0] * BATCH),
        "encoder_hidden_states": text(6, 16),
        "encoder_attention_mask": padded(4, 6, of=6).float(),
        "encoder_hidden_states_2": text(4, 8),
        "encoder_attention_mask_2": padded(3, 1, of=4).float(),
        "image_embeds": torch.zeros(BATCH, 3, 12),
    }


# ---- CogVideoX and ConsisID ----

COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": WIDTH,
    "sample_height": HEIGHT,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": 5,
    "use_rotary_positional_embeddings": True,
}


def cogvideox(patch: int) -> Callable[[int], dict[str, Any]]:
    """Frames come before channels; those that fill up a patch, the pipeline adds in front."""

    def inputs(frames: int) -> dict[str, Any]:
        angles = torch.randn(-(-frames // patch) * PLACES, 16)
        return {
            "hidden_states": torch.randn(BATCH, -(-frames // patch) * patch, 4, HEIGHT, WIDTH),
            "encoder_hidden_states": text(5, 8),
            "timestep": torch.tensor([300] * BATCH),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }

    return inputs


# ---- others ----


def ltx(frames: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(BATCH, frames * PLACES, 4),
        "encoder_hidden_states": text(7, 16),
        "encoder_attention_mask": torch.ones(BATCH, 7),
        "timestep": torch.tensor([300] * BATCH),
        "num_frames": frames,
        "height": HEIGHT // 2,
        "width": WIDTH // 2,
    }


def ltx2(frames: int) -> dict[str, Any]:
    return {
        **{name: x for name, x in ltx(frames).items() if name != "encoder_attention_mask"},
        "audio_hidden_states": torch.randn(BATCH, 9, 4),
        "audio_encoder_hidden_states": text(7, 16),
        "audio_num_frames": 9,
    }


def mochi(frames: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(8, 16),
        "encoder_attention_mask": padded(8, 5, of=8).bool(),
    }


def allegro(frames: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": torch.randn(BATCH, 1, 7, 16),
        "attention_mask": torch.ones(BATCH, frames, HEIGHT, WIDTH),
        "encoder_attention_mask": torch.ones(BATCH, 7),
    }


def cosmos(frames: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(7, 32), "timestep": torch.tensor([0.3] * BATCH)}


COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 32,
    "adaln_lora_dim": 4,
    "max_size": (8, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": False,
    "extra_pos_embed_type": "learnable",
}


def cosmos2(frames: int) -> dict[str, Any]:
    """Predict2's video-to-world: each frame has its own timestep, and a mask is a channel.

    The padding mask is left out, as resizing it takes torchvision.
    """
    return {
        "timestep": torch.rand(BATCH, 1, frames, 1, 1),
        "condition_mask": torch.zeros(BATCH, 1, frames, HEIGHT, WIDTH),
        "fps": 16,
    }


def kandinsky(frames: int) -> dict[str, Any]:
    """Channels come last."""
    return {
        "hidden_states": torch.randn(BATCH, frames, HEIGHT, WIDTH, 4),
        "encoder_hidden_states": text(7, 16),
        "timestep": torch.tensor([300.0] * BATCH),
        "pooled_projections": torch.randn(BATCH, 8),
        "visual_rope_pos": (torch.arange(frames), torch.arange(2), torch.arange(3)),
        "text_rope_pos": torch.arange(7),
    }


def kandinsky6(frames: int) -> dict[str, Any]:
    """Kandinsky 5's, with audio; the last frame is a reference, whose time is the first's."""
    return {
        "hidden_states": torch.randn(BATCH, frames, HEIGHT, WIDTH, 9),
        "audio_hidden_states": torch.randn(BATCH, 5, 4),
        "encoder_hidden_states": text(7, 16),
        "timestep": torch.tensor([300.0] * BATCH),
        "pooled_projections": torch.randn(BATCH, 8),
        "visual_rope_pos": (kandinsky6_times(frames), torch.arange(2), torch.arange(3)),
    }


def kandinsky6_times(frames: int) -> Tensor:
    return torch.cat([torch.arange(frames - 1), torch.zeros(1, dtype=torch.long)])


def kandinsky6_layout(frames: int) -> vk.Layout:
    return vk.Layout(vk.Frames(frames - 1, PLACES), vk.Frames(1, PLACES, first=0))


def cosmos3(frames: int) -> dict[str, Any]:
    """A prompt that the rest attends to, a video of which the first frame is given, and sound."""
    prompt, video, sound = 5, frames * PLACES, 4
    length = prompt + video + sound
    noisy = torch.arange(1, frames)
    return {
        "input_ids": torch.randint(0, 32, (prompt,)),
        "text_indexes": torch.arange(prompt),
        "position_ids": torch.arange(length).expand(3, -1),
        "und_len": prompt,
        "sequence_length": length,
        "vision_tokens": [torch.randn(1, 4, frames, HEIGHT, WIDTH)],
        "vision_token_shapes": [(frames, HEIGHT // 2, WIDTH // 2)],
        "vision_sequence_indexes": torch.arange(prompt, prompt + video),
        "vision_mse_loss_indexes": torch.arange(prompt + PLACES, prompt + video),
        "vision_timesteps": torch.full((len(noisy) * PLACES,), 300.0),
        "vision_noisy_frame_indexes": [noisy],
        "sound_tokens": [torch.randn(4, sound)],
        "sound_token_shapes": [(sound, 1, 1)],
        "sound_sequence_indexes": torch.arange(prompt + video, length),
        "sound_mse_loss_indexes": torch.arange(prompt + video, length),
        "sound_timesteps": torch.full((sound,), 300.0),
        "sound_noisy_frame_indexes": [torch.arange(sound)],
    }


def motif(frames: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(8, 16),
        "encoder_attention_mask": padded(8, 5, of=8),
    }


def minimax_h3(frames: int) -> dict[str, Any]:
    """A sequence of text, a reference frame, audio and video; times are in the model's own unit."""
    reference, new = PLACES, frames * PLACES
    tags = torch.tensor([1] * 5 + [0] * reference + [2] * 4 + [0] * new)
    times = torch.cat(
        [
            torch.arange(5),
            torch.full((reference,), 5),
            torch.arange(6, 10),
            torch.arange(6, 6 + frames).repeat_interleave(PLACES),
        ]
    )
    places = torch.arange(len(tags)) % PLACES
    return {
        "hidden_states": torch.randn(BATCH, reference + new, 4),
        "audio_hidden_states": torch.randn(BATCH, 4, 4),
        "encoder_hidden_states": text(5, 16),
        "timestep": torch.tensor([0.3, 1.0]),
        "timestep_indices": (tags != 0).long(),
        "token_tags": tags,
        "position_ids": torch.stack([times, places // 3, places % 3], dim=1),
        **{
            f"{name}_indices": (tags == tag).nonzero().flatten()
            for name, tag in (("video", 0), ("text", 1), ("audio", 2))
        },
    }


def minimax_h3_layout(frames: int) -> vk.Layout:
    return vk.Layout(
        vk.Text(5),
        vk.Frames(1, PLACES, first=5),
        vk.Text(4),
        vk.Frames(frames, PLACES, first=6),
    )


def easyanimate(frames: int) -> dict[str, Any]:
    return {"encoder_hidden_states": text(7, 16)}


TINY: dict[str, Tiny] = {
    "wan": Tiny("WanTransformer3DModel", WAN, also(latents(4), wan_text), video, BLOCKS),
    "wan-i2v": Tiny(
        "WanTransformer3DModel",
        WAN | WITH_IMAGE | {"in_channels": 12},
        also(latents(12), wan_image),
        video,
        BLOCKS,
    ),
    "wan-ti2v": Tiny(
        "WanTransformer3DModel",
        WAN,
        also(latents(4), lambda n: wan_text(n) | {"timestep": torch.full((BATCH, n * PLACES), 3)}),
        video,
        BLOCKS,
    ),
    "wan-vace": Tiny(
        "WanVACETransformer3DModel",
        WAN | {"vace_layers": [0], "vace_in_channels": 8},
        also(
            latents(4),
            lambda n: (
                wan_text(n)
                | {
                    "control_hidden_states": torch.randn(BATCH, 8, n, HEIGHT, WIDTH),
                    "control_hidden_states_scale": torch.ones(1),
                }
            ),
        ),
        video,
        ("vace_blocks.0.attn1", *BLOCKS),
    ),
    "anyflow": Tiny(
        "AnyFlowTransformer3DModel",
        WAN,
        lambda n: {
            "hidden_states": torch.randn(BATCH, n, 4, HEIGHT, WIDTH),
            "timestep": torch.full((BATCH, n), 300.0),
            "r_timestep": torch.full((BATCH, n), 200.0),
            **wan_text(n),
        },
        video,
        BLOCKS,
        since="0.39",
    ),
    "chronoedit": Tiny(
        "ChronoEditTransformer3DModel",
        WAN | WITH_IMAGE | {"in_channels": 12, "rope_temporal_skip_len": 8},
        also(latents(12), wan_image),
        video,
        BLOCKS,
    ),
    "wan-animate": Tiny(
        "WanAnimateTransformer3DModel",
        WAN
        | WITH_IMAGE
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4},
            "motion_encoder_size": 8,
            "motion_style_dim": 4,
            "motion_dim": 2,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        also(latents(12), lambda n: wan_image(n) | wan_animate(n)),
        video,
        BLOCKS,
    ),
    "skyreels-v2": Tiny(
        "SkyReelsV2Transformer3DModel", WAN, also(latents(4), wan_text), video, BLOCKS
    ),
    "skyreels-v2-df": Tiny(
        "SkyReelsV2Transformer3DModel",
        WAN | {"inject_sample_info": True},
        also(
            latents(4),
            lambda n: {
                # Each frame has its own timestep, for one sequence only.
                "hidden_states": torch.randn(1, 4, n, HEIGHT, WIDTH),
                "encoder_hidden_states": text(7, 16)[:1],
                "timestep": torch.randint(1000, (1, n)),
                "enable_diffusion_forcing": True,
                "fps": [1],
            },
        ),
        video,
        BLOCKS,
        batch=1,
    ),
    "skyreels-v2-ar": Tiny(
        "SkyReelsV2Transformer3DModel",
        WAN,
        also(latents(4), wan_text),
        video,
        BLOCKS,
        frames=4,
        causal=2,
        setup=lambda model: model._set_ar_attention(2),
    ),
    "helios": Tiny(
        "HeliosTransformer3DModel",
        {name: x for name, x in WAN.items() if name != "rope_max_seq_len"}
        | {"rope_dim": (4, 4, 4)},
        also(latents(4), helios),
        helios_layout,
        BLOCKS,
    ),
    "hunyuan": Tiny(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN,
        also(latents(4), hunyuan),
        video_then_text(8),
        HUNYUAN_BLOCKS,
        valid_text=(8, 5),
    ),
    "hunyuan-i2v": Tiny(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | {"image_condition_type": "token_replace"},
        also(latents(4), hunyuan),
        video_then_text(8),
        HUNYUAN_BLOCKS,
        valid_text=(8, 5),
    ),
    "framepack": Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | {"has_image_proj": True, "image_proj_dim": 6, "has_clean_x_embedder": True},
        also(latents(4), framepack),
        framepack_layout,
        HUNYUAN_BLOCKS,
        valid_text=(11, 8),
    ),
    "hunyuan-1.5": Tiny(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "rope_axes_dim": (2, 6, 8),
        },
        also(latents(4), hunyuan15),
        video_then_text(13),
        named("transformer_blocks.{}.attn"),
        valid_text=(7, 7),
    ),
    "cogvideox": Tiny(
        "CogVideoXTransformer3DModel",
        COGVIDEOX,
        cogvideox(1),
        text_then_video(5),
        named("transformer_blocks.{}.attn1"),
    ),
    "cogvideox-1.5": Tiny(
        "CogVideoXTransformer3DModel",
        COGVIDEOX | {"patch_size_t": 2, "patch_bias": False},
        cogvideox(2),
        text_then_video(5, patch=2),
        named("transformer_blocks.{}.attn1"),
        frames=5,
    ),
    "consisid": Tiny(
        "ConsisIDTransformer3DModel",
        COGVIDEOX,
        cogvideox(1),
        text_then_video(5),
        named("transformer_blocks.{}.attn1"),
    ),
    "easyanimate": Tiny(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": WIDTH,
            "sample_height": HEIGHT,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
        },
        also(latents(4), easyanimate),
        text_then_video(7),
        named("transformer_blocks.{}.attn1"),
    ),
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 16,
        },
        ltx,
        video,
        named("transformer_blocks.{}.attn1"),
    ),
    "ltx-2": Tiny(
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 16,
            "rope_double_precision": False,
        },
        ltx2,
        video,
        named("transformer_blocks.{}.attn1"),
    ),
    "mochi": Tiny(
        "MochiTransformer3DModel",
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 8,
        },
        also(latents(4), mochi),
        video_then_text(8),
        named("transformer_blocks.{}.attn1"),
        valid_text=(8, 5),
    ),
    "allegro": Tiny(
        "AllegroTransformer3DModel",
        {
            "patch_size": 2,
            "patch_size_t": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_width": WIDTH,
            "sample_height": HEIGHT,
            "sample_frames": 3,
            "caption_channels": 16,
        },
        also(latents(4), allegro),
        video,
        named("transformer_blocks.{}.attn1"),
    ),
    "cosmos": Tiny(
        "CosmosTransformer3DModel",
        COSMOS,
        also(latents(4), cosmos),
        video,
        named("transformer_blocks.{}.attn1"),
    ),
    "cosmos-2": Tiny(
        "CosmosTransformer3DModel",
        COSMOS | {"in_channels": 5, "extra_pos_embed_type": None},
        also(latents(4), lambda n: cosmos(n) | cosmos2(n)),
        video,
        named("transformer_blocks.{}.attn1"),
    ),
    "cosmos-3": Tiny(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 12,
            "hidden_size": 24,
            "intermediate_size": 32,
            "latent_channel": 4,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "patch_latent_dim": 16,
            "rope_axes_dim": (2, 2, 2),
            "sound_dim": 4,
            "sound_gen": True,
            "vocab_size": 32,
        },
        cosmos3,
        video_then_text(4),
        named("layers.{}.self_attn"),
        batch=1,
        prompt=5,
        since="0.39",
    ),
    "kandinsky-5": Tiny(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 8,
            "out_visual_dim": 4,
            "patch_size": (1, 2, 2),
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
        },
        kandinsky,
        video,
        named("visual_transformer_blocks.{}.self_attention"),
        tolerance=5e-4,  # queries and keys are rounded to bfloat16
    ),
    "kandinsky-6": Tiny(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 8,
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
            "in_audio_dim": 4,
            "out_audio_dim": 4,
            "ca_rope": True,
            "cross_gates": True,
        },
        kandinsky6,
        kandinsky6_layout,
        named("visual_transformer_blocks.{}.video_dec_block.self_attention"),
        since="0.42",
    ),
    "motif": Tiny(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_decoder_layers": 1,  # it attends to the other layers' video as well
            "patch_size": 2,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4, 4),
        },
        also(latents(4), motif),
        video_then_text(8),
        (
            "transformer_blocks.0.attn",
            "single_transformer_blocks.0.attn",
            "single_transformer_blocks.1.attn",
        ),
        valid_text=(8, 5),
        own={"single_transformer_blocks.1.attn": lambda n: vk.Layout(*[vk.Frames(n, PLACES)] * 2)},
        since="0.39",
    ),
    "minimax-h3": Tiny(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "hidden_size": 16,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 16,
            "in_channels": 1,
            "audio_in_channels": 4,
            "patch_size": (1, 2, 2),
            "text_dim": 16,
            "freq_dim": 8,
            "time_embed_hidden_dim": 8,
            "time_embed_dim": 8,
            "rope_freq_dim": 2,
        },
        minimax_h3,
        minimax_h3_layout,
        named("transformer_blocks.{}.attn"),
        since="0.40",
    ),
}
