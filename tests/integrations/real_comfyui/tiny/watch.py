"""Nodes that watch a model: what its temporal attention computes, and a sampler that fails."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file
from torch import Tensor

SVD_LAYER = re.compile(r"time_stack\.\d+\.attn1$")


class PurposeError(RuntimeError):
    """What a sampler fails with, on purpose."""


def temporal_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields the name and module of each temporal attention of SVD and AnimateDiff-Evolved."""
    for name, module in model.named_modules():
        if type(module).__name__ == "VersatileAttention" or SVD_LAYER.search(name):
            yield name, module


class Recorder:
    """Writes what the attention over frames was given and returned, one file a forward pass.

    It reads queries, keys and values where the layers' own projections return them, and the result
    where their last projection takes it: whoever computes the attention in between cannot tell.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.passes = folder, 0
        folder.mkdir(parents=True)

    def __call__(self, executor: Any, x: Tensor, timesteps: Tensor, *args: Any, **kw: Any) -> Any:
        """Runs a forward pass of a model with all its layers watched."""
        args, kw = [dict(a) if isinstance(a, dict) else a for a in args], dict(kw)
        options = next(a for a in (*args, *kw.values()) if isinstance(a, dict) and "sigmas" in a)
        sigmas, sigma = options["sample_sigmas"], options["sigmas"][0]
        facts = {"step": int((sigmas - sigma).abs().argmin()), "steps": len(sigmas) - 1}
        tensors: dict[str, Tensor] = {}
        layers = list(temporal_layers(executor.class_obj))
        facts["heads"] = {name: module.heads for name, module in layers}
        hooks = [hook for layer in layers for hook in self.watch(*layer, tensors)]
        if not layers:
            patch = getattr(executor.class_obj, "patch_size", None)
            sizes = zip(x.shape[2:], patch or (1, 1, 1), strict=True)
            facts["grid"] = [size // step for size, step in sizes]
            context = next(a for a in (*args, *kw.values()) if isinstance(a, Tensor))
            facts["text"] = context.shape[1]
            facts["sides"] = options["cond_or_uncond"]
            window = options.get("context_window")
            facts["times"] = list(window.index_list if window else range(facts["grid"][0]))
            inner = options.get("optimized_attention_override")
            options["optimized_attention_override"] = partial(self.override, inner, tensors, facts)
        try:
            return executor(x, timesteps, *args, **kw)
        finally:
            for hook in hooks:
                hook.remove()
            file = self.folder / f"{self.passes:03}.safetensors"
            save_file(tensors, file, metadata={"facts": json.dumps(facts)})
            self.passes += 1

    def watch(
        self, name: str, module: torch.nn.Module, tensors: dict[str, Tensor]
    ) -> Iterator[Any]:
        """Yields hooks that put a layer's query, key, value and result into ``tensors``."""
        seen: dict[str, Tensor] = {}

        def projected(part: str, _module: Any, _args: Any, out: Tensor) -> None:
            seen[part] = out

        def done(_module: Any, args: tuple[Tensor]) -> None:
            for part, tensor in (*seen.items(), ("out", args[0])):
                tensors[f"{name}:{part}"] = tensor.detach().clone()

        for part in "qkv":
            linear = getattr(module, f"to_{part}")
            yield linear.register_forward_hook(partial(projected, part))
        yield module.to_out[0].register_forward_pre_hook(done)

    def override(
        self,
        inner: Callable[..., Tensor] | None,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        *args: Any,
        **kw: Any,
    ) -> Tensor:
        """Computes an attention of a full-3D model as it was to be computed.

        It keeps that of all tokens of the video to one another, and to the text's before them; and
        their cross-attention to the text, of which it leaves out what a mask hides from the batch.
        """
        attention = func if inner is None else partial(inner, func)
        out = attention(q, k, v, heads, *args, **kw)
        video = math.prod(facts["grid"])
        kinds = {
            "attention": q.shape == k.shape and q.shape[-2] in (video, video + facts["text"]),
            "cross": q.shape[-2] == video and k.shape[-2] == facts["text"] != video,
        }
        mask = args[0] if args else kw.get("mask")
        if mask is not None and kinds["cross"]:
            shown = (mask == 0).reshape(-1, mask.shape[-1]).any(0)
            k, v = k[..., shown, :], v[..., shown, :]
        for kind in (kind for kind, is_one in kinds.items() if is_one):
            name = f"{kind}{len(facts['heads'])}"
            facts["heads"][name] = heads
            for part, tensor in zip(("q", "k", "v", "out"), (q, k, v, out), strict=True):
                flat = tensor.transpose(1, 2).flatten(2) if tensor.ndim == 4 else tensor
                tensors[f"{name}:{part}"] = flat.detach().clone()
        return out


class Record:
    """Watches the attention over frames of the model that is given, and writes it to a folder."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "watch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"model": ("MODEL",), "name": ("STRING", {"default": "record"})}}

    def watch(self, model: Any, name: str) -> tuple[Any]:
        """Returns the model, watched."""
        recorder = Recorder(Path(folder_paths.get_output_directory(), name))
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "vstar_test", recorder)
        return (model,)


class Fail:
    """Has a model's forward pass fail in the middle: in a layer behind the first attention."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "fail", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"model": ("MODEL",)}}

    def fail(self, model: Any) -> tuple[Any]:
        """Returns the model with a last layer that raises."""

        def wrapper(executor: Any, *args: Any, **kw: Any) -> Any:
            def fail(*_: Any) -> None:
                raise PurposeError("fails on purpose")

            model = executor.class_obj
            names = ("out", "head", "final_layer", "proj_out")
            last = next(getattr(model, name) for name in names if hasattr(model, name))
            hook = last.register_forward_pre_hook(fail)
            try:
                return executor(*args, **kw)
            finally:
                hook.remove()

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "vstar_test", wrapper)
        return (model,)


NODE_CLASS_MAPPINGS = {"VSTARTestRecord": Record, "VSTARTestFail": Fail}
