"""Small graphs of ComfyUI's own nodes, as its API takes them, for the checks to put ours into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SVD = "svd.safetensors"
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
MOTION = "v3_sd15_mm.ckpt"
WAN = "wan2.1_t2v_1.3B_fp16.safetensors"
HUNYUAN = "hunyuan_video_t2v_720p_bf16.safetensors"
LTX = "ltxv-2b-0.9.6-dev-04-25.safetensors"
LTX_TEXT = "t5xxl_fp16.safetensors"
WAN_TEXT = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
FILES = (
    ("checkpoints", SVD),
    ("checkpoints", SD15),
    ("animatediff_models", MOTION),
    ("diffusion_models", WAN),
    ("diffusion_models", HUNYUAN),
    ("diffusion_models", LTX),
    ("text_encoders", WAN_TEXT),
    ("text_encoders", LTX_TEXT),
)
SIZE = 64  # pixels
Link = list[Any]  # a node's id and which of its outputs


class Graph(dict[str, dict[str, Any]]):
    """A graph of nodes by id, and how it is sampled; ``add`` returns a node's first output."""

    def __init__(self, cfg: float = 2.5, steps: int = 4) -> None:
        super().__init__()
        self.cfg, self.steps = cfg, steps

    def add(self, node: str, **inputs: Any) -> Link:
        """Adds a node and returns its first output."""
        name = str(len(self) + 1)
        self[name] = {"class_type": node, "inputs": inputs}
        return [name, 0]

    def sample(
        self, model: Link, positive: Link, negative: Link, latent: Link, seed: int = 7
    ) -> str:
        """Adds a sampler and what saves its latents, whose id is returned."""
        samples = self.add(
            "KSampler",
            model=model,
            seed=seed,
            steps=self.steps,
            cfg=self.cfg,
            sampler_name="euler",
            scheduler="normal",
            positive=positive,
            negative=negative,
            latent_image=latent,
            denoise=1.0,
        )
        return self.add("SaveLatent", samples=samples, filename_prefix="check")[0]


Patch = Callable[
    [Graph, Link], Link
]  # what a check does to a model: nodes between it and the sampler


def plain(_: Graph, model: Link) -> Link:
    """Leaves the model as it is."""
    return model


def svd(patch: Patch, frames: int = 8, branches: int = 1) -> tuple[Graph, list[str]]:
    """Returns Stable Video Diffusion's graph, and the ids of the nodes that save latents.

    With two branches the second is of the unpatched model, sampled after the first.
    """
    graph = Graph()
    model = graph.add("ImageOnlyCheckpointLoader", ckpt_name=SVD)
    loader = model[0]
    image = graph.add("EmptyImage", width=SIZE, height=SIZE, batch_size=1, color=0x804020)
    inputs = graph.add(
        "SVD_img2vid_Conditioning",
        clip_vision=[loader, 1],
        init_image=image,
        vae=[loader, 2],
        width=SIZE,
        height=SIZE,
        video_frames=frames,
        motion_bucket_id=127,
        fps=6,
        augmentation_level=0.0,
    )[0]
    sources = [patch(graph, model), model][:branches]
    return graph, [graph.sample(m, [inputs, 0], [inputs, 1], [inputs, 2]) for m in sources]


def animatediff(
    patch: Patch,
    frames: int = 8,
    *,
    patch_first: bool = False,
    context: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    stretch: int = 0,
    effect: float | None = None,
    positive: Callable[[Graph, Link], Link] | None = None,
) -> tuple[Graph, list[str]]:
    """Returns AnimateDiff-Evolved's graph, and the ids of the nodes that save latents.

    Args:
        patch: What is done to the model.
        frames: How many.
        patch_first: Whether that is done before AnimateDiff's own node instead of behind it.
        context: Inputs of its node for sliding context windows.
        settings: Inputs of its node for the sampling's settings.
        stretch: How many positions its motion model gets in addition.
        effect: How much its motion model counts.
        positive: Makes the conditioning of the CLIP.
    """
    graph = Graph(steps=2)
    model = graph.add("CheckpointLoaderSimple", ckpt_name=SD15)
    clip = [model[0], 1]
    inputs: dict[str, Any] = {"model_name": MOTION}
    if stretch:
        pe = graph.add("ADE_AdjustPEFullStretch", pe_stretch=stretch, print_adjustment=False)
        inputs["ad_settings"] = graph.add("ADE_AnimateDiffSettings", pe_adjust=pe)
    motion = graph.add("ADE_LoadAnimateDiffModel", **inputs)
    more = {}
    if effect is not None:
        more["effect_multival"] = graph.add("ADE_MultivalDynamic", float_val=effect)
    motion = graph.add("ADE_ApplyAnimateDiffModelSimple", motion_model=motion, **more)
    options: dict[str, Any] = {"m_models": motion, "beta_schedule": "autoselect"}
    if context is not None:
        options["context_options"] = graph.add("ADE_StandardStaticContextOptions", **context)
    if settings is not None:
        options["sample_settings"] = graph.add("ADE_AnimateDiffSamplingSettings", **settings)
    if patch_first:
        model = patch(graph, model)
    model = graph.add("ADE_UseEvolvedSampling", model=model, **options)
    if not patch_first:
        model = patch(graph, model)
    text = "a candle burns down"
    make = positive or (lambda graph, clip: graph.add("CLIPTextEncode", text=text, clip=clip))
    latent = graph.add("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=frames)
    negative = graph.add("CLIPTextEncode", text="", clip=clip)
    return graph, [graph.sample(model, make(graph, clip), negative, latent)]


def images(
    patch: Patch, batch: int = 2, positive: Callable[[Graph, Link], Link] | None = None
) -> tuple[Graph, list[str]]:
    """Returns the graph of a model of pictures, which has no attention over frames."""
    graph = Graph(steps=1)
    model = graph.add("CheckpointLoaderSimple", ckpt_name=SD15)
    clip = [model[0], 1]
    text = graph.add("CLIPTextEncode", text="a candle", clip=clip)
    latent = graph.add("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=batch)
    texts = positive(graph, clip) if positive else text
    return graph, [graph.sample(patch(graph, model), texts, text, latent)]


def full_3d(
    file: str,
    patch: Patch,
    prompts: Callable[[Graph, Link, Link], tuple[Link, Link]] | None = None,
    negative: Callable[[Graph, Link], Link] | None = None,
    latent_frames: int = 3,
) -> tuple[Graph, list[str]]:
    """Returns the graph of a transformer over all tokens of a video.

    Args:
        file: Of the model.
        patch: What is done to the model.
        prompts: Makes the model, before that, and the positive conditioning of model and CLIP.
        negative: Makes the negative conditioning of the CLIP.
        latent_frames: How many.
    """
    graph = Graph(steps=2)
    model = graph.add("UNETLoader", unet_name=file, weight_dtype="default")
    name, kind = (LTX_TEXT, "ltxv") if file == LTX else (WAN_TEXT, "wan")
    clip = graph.add("CLIPLoader", clip_name=name, type=kind, device="default")
    if prompts is None:
        positive = graph.add("CLIPTextEncode", text="a candle burns down", clip=clip)
    else:
        model, positive = prompts(graph, model, clip)
    make = negative or (lambda graph, clip: graph.add("CLIPTextEncode", text="", clip=clip))
    if file == LTX:
        size = {"width": 2 * SIZE, "height": 2 * SIZE, "length": 8 * latent_frames - 7}
        latent = graph.add("EmptyLTXVLatentVideo", **size, batch_size=1)
    else:
        size = {"width": SIZE, "height": SIZE, "length": 4 * latent_frames - 3}
        latent = graph.add("EmptyHunyuanLatentVideo", **size, batch_size=1)
    return graph, [graph.sample(patch(graph, model), positive, make(graph, clip), latent)]
