"""diffusers' pipelines of full-3D transformers in miniature, with random weights.

Every part is real, only narrow; nothing is downloaded. The videos are noise. ``tiny.py`` has the
pipelines of models with temporal layers.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT_CHANNELS = 32
FOUR = (8, 8, 8, 8)  # channels of the four levels of a VAE


def wan(transformers: int = 1) -> WanPipeline:
    """Makes Wan 2.1's; with two transformers Wan 2.2's, of which the second finishes."""
    torch.manual_seed(0)
    models = [WanTransformer3DModel(**_wan()).eval() for _ in range(transformers)]
    return WanPipeline(
        _tokenizer(),
        UMT5EncoderModel(UMT5Config(**_t5())).eval(),
        _wan_vae(),
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        *models,
        boundary_ratio=0.875 if transformers == 2 else None,
    )


def skyreels() -> SkyReelsV2Pipeline:
    """Makes SkyReels-V2's."""
    torch.manual_seed(0)
    return SkyReelsV2Pipeline(
        _tokenizer(),
        UMT5EncoderModel(UMT5Config(**_t5())).eval(),
        SkyReelsV2Transformer3DModel(**_wan()).eval(),
        _wan_vae(),
        UniPCMultistepScheduler(
            flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    )


def anyflow() -> DiffusionPipeline:
    """Makes AnyFlow's, of diffusers 0.39 and later; it is distilled from Wan 2.1."""
    from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

    torch.manual_seed(0)
    return AnyFlowPipeline(
        _tokenizer(),
        UMT5EncoderModel(UMT5Config(**_t5())).eval(),
        AnyFlowTransformer3DModel(**_wan()).eval(),
        _wan_vae(),
        FlowMapEulerDiscreteScheduler(),
    )


def ltx() -> LTXPipeline:
    """Makes LTX-Video's."""
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=FOUR,
        decoder_block_out_channels=FOUR,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_CHANNELS,
    )
    parts = (vae.eval(), _t5_encoder(), _tokenizer(), transformer.eval())
    return LTXPipeline(FlowMatchEulerDiscreteScheduler(), *parts)


def allegro() -> AllegroPipeline:
    """Makes Allegro's."""
    torch.manual_seed(0)
    vae = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=FOUR,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=TEXT_CHANNELS,
    )
    scheduler = EulerAncestralDiscreteScheduler()
    return AllegroPipeline(_tokenizer(), _t5_encoder(), vae.eval(), transformer.eval(), scheduler)


def cosmos() -> CosmosTextToWorldPipeline:
    """Makes Cosmos 1's, with a safety checker that lets everything pass."""
    torch.manual_seed(0)
    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=FOUR,
        decode_block_out_channels=FOUR,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=TEXT_CHANNELS,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,  # resizing it takes torchvision
        extra_pos_embed_type="learnable",
    )
    scheduler = EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras",
        num_train_timesteps=1000, prediction_type="epsilon", rho=7.0, final_sigmas_type="sigma_min",
    )  # fmt: skip
    parts = (_t5_encoder(), _tokenizer(), transformer.eval(), vae.eval(), scheduler)
    return CosmosTextToWorldPipeline(*parts, safety_checker=_NoChecker())


def cogvideox() -> CogVideoXPipeline:
    """Makes CogVideoX-5B's, whose text and video are one sequence."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=FOUR,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT_CHANNELS,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    parts = (_t5_encoder(), vae.eval(), transformer.eval(), CogVideoXDDIMScheduler())
    return CogVideoXPipeline(_tokenizer(), *parts)


def hunyuan() -> HunyuanVideoPipeline:
    """Makes HunyuanVideo's, whose text and video are one sequence."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=FOUR,
        layers_per_block=1,
        norm_num_groups=4,
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_CHANNELS,
        pooled_projection_dim=TEXT_CHANNELS,
        rope_axes_dim=(2, 4, 4),
    )
    size = {"vocab_size": 200, "hidden_size": TEXT_CHANNELS, "intermediate_size": 32}
    llama = LlamaModel(
        LlamaConfig(**size, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=512)
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            **size, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=77,
            bos_token_id=0, eos_token_id=2,
        )
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return HunyuanVideoPipeline(
        llama.eval(), _tokenizer(), transformer.eval(), vae.eval(), scheduler, clip.eval(),
        _tokenizer(77),
    )  # fmt: skip


def mochi() -> MochiPipeline:
    """Makes Mochi's, whose text and video are one sequence."""
    torch.manual_seed(0)
    vae = AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=TEXT_CHANNELS,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    parts = (vae.eval(), _t5_encoder(), _tokenizer(), transformer.eval())
    return MochiPipeline(FlowMatchEulerDiscreteScheduler(), *parts)


class _NoChecker(nn.Module):
    """Lets every prompt and every video pass."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _wan() -> dict[str, Any]:
    """Returns the settings that Wan and SkyReels-V2 share."""
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_CHANNELS,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }


def _wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def _t5() -> dict[str, int]:
    return {
        "vocab_size": 200, "d_model": TEXT_CHANNELS, "d_ff": 32, "d_kv": 16, "num_layers": 1,
        "num_heads": 2,
    }  # fmt: skip


def _t5_encoder() -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_t5())).eval()


def _tokenizer(length: int = 512) -> T5Tokenizer:
    """Makes a tokenizer with the letters for its vocabulary."""
    letters = [("▁", -1.0), *((letter, -1.0) for letter in string.ascii_lowercase)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer([*special, *letters], model_max_length=length)
