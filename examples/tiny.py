"""diffusers' video pipelines in miniature, with random weights: every part real, only narrow.

Each takes a second or two for a short video on a CPU, and needs nothing downloaded. The videos are
noise.
"""

from __future__ import annotations

import string

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    I2VGenXLPipeline,
    I2VGenXLUNet,
    LattePipeline,
    LatteTransformer3DModel,
    MotionAdapter,
    StableDiffusionPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import vstar_kernels as vk

WIDTHS = (32, 64)  # channels of the two levels
TEXT_CHANNELS = 32
TEXT_TOKENS = 16
IMAGE_SIZE = 224  # what the image encoder takes; the SVD pipeline knows no other


def text_to_video() -> TextToVideoSDPipeline:
    """Makes ModelScope's and Zeroscope's: ``UNet3DConditionModel``."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(**_unet("CrossAttnDownBlock3D", "DownBlock3D"))
    return TextToVideoSDPipeline(_vae(), _text_encoder(), _tokenizer(), unet, _scheduler())


def animatediff() -> AnimateDiffPipeline:
    """Makes AnimateDiff's: Stable Diffusion's UNet with a motion adapter, for at most 32 frames."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**_unet("CrossAttnDownBlock2D", "DownBlock2D"))
    adapter = MotionAdapter(
        block_out_channels=WIDTHS,
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_max_seq_length=32,
    )
    parts = (_vae(), _text_encoder(), _tokenizer(), unet, adapter, _scheduler())
    return AnimateDiffPipeline(*parts)


def stable_diffusion() -> StableDiffusionPipeline:
    """Makes Stable Diffusion's, for images: ``UNet2DConditionModel``."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**_unet("CrossAttnDownBlock2D", "DownBlock2D"))
    parts = (_vae(), _text_encoder(), _tokenizer(), unet, _scheduler())
    return StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


def i2vgen_xl() -> I2VGenXLPipeline:
    """Makes I2VGen-XL's: ``I2VGenXLUNet``, conditioned on an image and a prompt."""
    torch.manual_seed(0)
    unet = I2VGenXLUNet(**_unet("CrossAttnDownBlock3D", "DownBlock3D"))
    image_encoder, image_processor = _image_encoder()
    parts = (_vae(), _text_encoder(), _tokenizer(), image_encoder, image_processor)
    return I2VGenXLPipeline(*parts, unet, _scheduler())


def stable_video_diffusion() -> StableVideoDiffusionPipeline:
    """Makes Stable Video Diffusion's: ``UNetSpatioTemporalConditionModel``, given an image."""
    torch.manual_seed(0)
    settings = _unet("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")
    del settings["attention_head_dim"]
    unet = UNetSpatioTemporalConditionModel(
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        **settings | {"in_channels": 8, "out_channels": 4},
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
    )
    image_encoder, image_processor = _image_encoder()
    scheduler = EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True
    )
    return StableVideoDiffusionPipeline(vae, image_encoder, unet, scheduler, image_processor)


def latte() -> LattePipeline:
    """Makes Latte's: ``LatteTransformer3DModel``, for exactly 16 frames."""
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT_CHANNELS,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=200, d_model=TEXT_CHANNELS, d_ff=32, d_kv=16, num_layers=1, num_heads=2)
    )
    letters = [("▁", -1.0), *((letter, -1.0) for letter in string.ascii_lowercase)]
    tokenizer = T5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters])
    return LattePipeline(tokenizer, text_encoder.eval(), _vae(), transformer.eval(), _scheduler())


@torch.no_grad()
def plant_words(pipe: TextToVideoSDPipeline, prompt: str, strength: float = 16.0) -> None:
    """Gives a tiny pipeline cross-attention in which the latents decide every word's map.

    Keys of the prompt's words are orthogonal directions, those of all other tokens are 0, and the
    queries along each direction are a fixed random projection of the features.
    """
    tokens = pipe.tokenizer(prompt, padding="max_length", max_length=TEXT_TOKENS)
    text = pipe.text_encoder(torch.tensor([tokens.input_ids]))[0][0]
    words, generator = prompt.split(), torch.Generator().manual_seed(1)
    for module in pipe.unet.modules():
        if not getattr(module, "is_cross_attention", False):
            continue
        inner, channels = module.to_q.weight.shape
        size = (inner // module.heads, len(words))
        directions, _ = torch.linalg.qr(torch.randn(size, generator=generator))
        keys = torch.zeros(len(text), size[0])
        for word, direction in zip(words, directions.mT, strict=True):
            keys[vk.find_tokens(pipe.tokenizer, prompt, word)] = direction
        projection = torch.randn(len(words), channels, generator=generator) / channels**0.5
        module.to_k.weight.copy_((torch.linalg.pinv(text) @ keys.repeat(1, module.heads)).mT)
        module.to_q.weight.copy_((strength * directions @ projection).repeat(module.heads, 1))


def _unet(cross_attention_block: str, plain_block: str) -> dict:
    """Returns the settings that the UNets share: two levels, the finer one with cross-attention."""
    return {
        "sample_size": 8,
        "block_out_channels": WIDTHS,
        "down_block_types": (cross_attention_block, plain_block),
        "up_block_types": tuple(
            name.replace("Down", "Up") for name in (plain_block, cross_attention_block)
        ),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "cross_attention_dim": TEXT_CHANNELS,
    }


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    ).eval()


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False
    )


def _tokenizer() -> CLIPTokenizer:
    """Makes a tokenizer with the letters for its vocabulary."""
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase + ".,"]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, [], model_max_length=TEXT_TOKENS)


def _text_encoder() -> CLIPTextModel:
    vocabulary_size = len(_tokenizer())
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=TEXT_CHANNELS,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=vocabulary_size - 2,
            eos_token_id=vocabulary_size - 1,
        )
    ).eval()


def _image_encoder() -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=TEXT_CHANNELS,
            intermediate_size=32,
            projection_dim=TEXT_CHANNELS,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=56,
        )
    )
    sides = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=sides)
    return encoder.eval(), processor
