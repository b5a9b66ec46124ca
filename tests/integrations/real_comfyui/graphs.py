"""Small graphs of ComfyUI's own nodes, as its API takes them, for the checks to put ours into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SVD = "svd.safetensors"
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
MOTION = "v3_sd15_mm.ckpt"
WAN = "wan2.1_t2v_1.3B_fp16.safetensors"
WAN_TEXT = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
FILES = (
    ("checkpoints", SVD),
    ("checkpoints", SD15),
    ("animatediff_models", MOTION),
    ("diffusion_models", WAN),
    ("text_encoders", WAN_TEXT),
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
    motion = graph.add("ADE_ApplyAnimateDiffModelSimple", motion_model=motion)
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


def images(patch: Patch) -> tuple[Graph, list[str]]:
    """Returns the graph of a model of pictures, which has no attention over frames."""
    graph = Graph(steps=1)
    model = graph.add("CheckpointLoaderSimple", ckpt_name=SD15)
    text = graph.add("CLIPTextEncode", text="a candle", clip=[model[0], 1])
    latent = graph.add("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=2)
    return graph, [graph.sample(patch(graph, model), text, text, latent)]


def wan(patch: Patch, frames: int = 9) -> tuple[Graph, list[str]]:
    """Returns Wan 2.1's graph, and the ids of the nodes that save latents."""
    graph = Graph(steps=2)
    model = graph.add("UNETLoader", unet_name=WAN, weight_dtype="default")
    clip = graph.add("CLIPLoader", clip_name=WAN_TEXT, type="wan", device="default")
    positive = graph.add("CLIPTextEncode", text="a candle burns down", clip=clip)
    negative = graph.add("CLIPTextEncode", text="", clip=clip)
    latent = graph.add(
        "EmptyHunyuanLatentVideo", width=SIZE, height=SIZE, length=frames, batch_size=1
    )
    return graph, [graph.sample(patch(graph, model), positive, negative, latent)]
