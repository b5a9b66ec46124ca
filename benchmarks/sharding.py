"""``python -m benchmarks.sharding``: what sharding the frames of a video costs, on paper.

Each model of published size runs on the meta device, where tensors have no numbers, as the first of
P processes: under ``shard_frames``, whose exchanges then only count their bytes. So what is counted
is what the same code sends. Of the rest, operations and bytes that live at a time are counted, too;
seconds are those divided by rates that the options name. Nothing is measured. Prints Markdown.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vstar_kernels as vk
from benchmarks.report.tables import Table
from benchmarks.unet import SAMPLES, TEXT_TOKENS, unet3d
from vstar_kernels.cli.options import read_options
from vstar_kernels.models.sharded.apply import spread
from vstar_kernels.models.sharded.ranks import Ranks

GIB, GB = 2**30, 1e9
SIZES = (1, 2, 4, 8, 16, 32, 64)
FRAMES = (16, 64)
LATENTS = (40, 64)  # of 320 × 512 pixels


@dataclass(frozen=True)
class Options:
    """Count what sharding the frames of a video costs, for models of published size."""

    models: tuple[str, ...] = ("ModelScope", "AnimateDiff", "SVD", "I2VGen-XL", "Latte")
    frames: tuple[int, ...] = FRAMES
    processes: tuple[int, ...] = SIZES
    tflops: float = 989.0
    """Of a GPU, dense in bfloat16 (NVIDIA's data sheet of H100 and H200 SXM)."""
    achieved: float = 0.4
    """The share of them that a model is taken to reach."""
    nvlink: float = 450.0
    """GB/s that a GPU sends within a node (data sheet: 900 in both directions)."""
    infiniband: float = 50.0
    """GB/s that a GPU sends to other nodes (400 Gb/s for each)."""
    latency: float = 25e-6
    """Seconds that each exchange takes besides its bytes."""
    json: Path | None = None
    """A file for the figures."""


@dataclass(frozen=True)
class Model:
    """A model, and what it is called with.

    ``inputs`` returns that for latents ``(batch, 4, frames, height, width)``.
    """

    make: Callable[[int], nn.Module]
    inputs: Callable[[Tensor], dict[str, Any]]


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def _diffusers(name: str, **settings: Any) -> Callable[[int], nn.Module]:
    def make(frames: int) -> nn.Module:
        import diffusers

        more = {"video_length": frames} if name.startswith("Latte") else {}
        return getattr(diffusers, name)(**settings | more)

    return make


def _text(x: Tensor, name: str, channels: int, *, each: bool = False) -> dict[str, Any]:
    rows = len(x) * x.shape[2] if each else len(x)
    return {name: x, "encoder_hidden_states": _empty(rows, TEXT_TOKENS, channels)}


def _image_and_text(x: Tensor) -> dict[str, Any]:
    more = {"fps": torch.empty(len(x), device="meta"), "image_latents": x}
    return {**_text(x, "sample", 1024), **more, "image_embeddings": _empty(len(x), 1024)}


def _image(x: Tensor) -> dict[str, Any]:
    sample = torch.cat([x, x], 1).transpose(1, 2)
    text, ids = _empty(len(x), 1, 1024), _empty(len(x), 3)
    return {"sample": sample, "encoder_hidden_states": text, "added_time_ids": ids}


_LATTE = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "attention_bias": True,
    "sample_size": 64,
    "patch_size": 2,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
}
MODELS = {
    "ModelScope": Model(lambda frames: unet3d(320), lambda x: _text(x, "sample", 1024)),
    "AnimateDiff": Model(
        _diffusers("UNetMotionModel", cross_attention_dim=768, motion_max_seq_length=256),
        lambda x: _text(x, "sample", 768, each=True),
    ),
    "SVD": Model(_diffusers("UNetSpatioTemporalConditionModel"), _image),
    "I2VGen-XL": Model(_diffusers("I2VGenXLUNet"), _image_and_text),
    "Latte": Model(
        _diffusers("LatteTransformer3DModel", **_LATTE),
        lambda x: _text(x, "hidden_states", 4096),
    ),
}


@dataclass
class Count:
    """What one process does in one evaluation of a model, for a video under guidance."""

    model: str
    frames: int
    processes: int
    flops: int = 0
    weights: int = 0  # bytes
    activations: int = 0  # bytes that live at a time, at most
    sent: dict[str, int] = field(default_factory=dict)  # bytes, by what for
    exchanges: int = 0


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that live at a time; views of one storage once."""

    def __init__(self) -> None:
        super().__init__()
        self._holders: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.live = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if not self._holders[key]:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.most = max(self.most, self.live)
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key)

    def _release(self, key: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self.live -= self._sizes.pop(key)


class _Fused(TorchFunctionMode):
    """Takes attention for one operation that holds no map, as on a GPU, and counts its products."""

    flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (
            (kwargs or {}).get(name, args[place] if place < len(args) else None)
            for place, name in enumerate(("query", "key", "value"))
        )
        *rows, queries, channels = query.shape
        self.flops += 4 * math.prod(rows) * queries * key.shape[-2] * channels
        return query.new_empty(*rows, queries, value.shape[-1])


@torch.no_grad()
def count(name: str, frames: int, processes: int, latents: tuple[int, int] = LATENTS) -> Count:
    """Returns what the first of some processes does, under TAR on every level."""
    model = _model(name, frames)
    sample = _empty(SAMPLES, 4, frames, *latents)
    inputs = MODELS[name].inputs(sample) | {"timestep": torch.empty(SAMPLES, device="meta")}
    ranks = Ranks(0, processes)
    handle = spread({"": model}, ranks) if processes > 1 else contextlib.nullcontext()
    live, fused, operations = _Live(), _Fused(), FlopCounterMode(display=False)
    with handle, vk.apply_tar(model, vk.TARConfig(1.0, steps=None)), fused, operations, live:
        model(**inputs)
    return Count(
        name,
        frames,
        processes,
        operations.get_total_flops() + fused.flops,
        sum(p.numel() * p.element_size() for p in model.parameters()),
        live.most,
        dict(ranks.sent),
        sum(ranks.exchanges.values()),
    )


@functools.lru_cache(maxsize=1)
def _model(name: str, frames: int) -> nn.Module:
    with torch.device("meta"):
        made = MODELS[name].make(frames).eval()
    return made.to("meta", torch.bfloat16)  # all of it: some buffers are made elsewhere


@dataclass(frozen=True)
class Estimate:
    """The seconds of one evaluation, on paper."""

    compute: float
    nvlink: float  # of exchanges, if all processes are within one node
    infiniband: float  # if each is in a node of its own

    @property
    def fastest(self) -> float:
        """Within one node."""
        return self.compute + self.nvlink

    @property
    def slowest(self) -> float:
        """Between nodes."""
        return self.compute + self.infiniband


def estimate(found: Count, options: Options) -> Estimate:
    """Returns the seconds of an evaluation by the options' rates."""
    waiting, sent = found.exchanges * options.latency, sum(found.sent.values())
    return Estimate(
        found.flops / (options.tflops * 1e12 * options.achieved),
        sent / (options.nvlink * GB) + waiting,
        sent / (options.infiniband * GB) + waiting,
    )


def table(counts: list[Count], options: Options) -> Table:
    """Returns a row for each count."""
    single = {(x.model, x.frames): estimate(x, options) for x in counts if x.processes == 1}
    rows = []
    for found in counts:
        times, sent = estimate(found, options), found.sent
        alone = single.get((found.model, found.frames))
        gains = (alone.compute / t if alone else math.nan for t in (times.fastest, times.slowest))
        rows.append(
            [
                found.model,
                str(found.frames),
                str(found.processes),
                f"{(found.weights + found.activations) / GIB:.1f}",
                f"{sent.get('all-to-all', 0) / 1e6:,.0f}",
                f"{sent.get('halo', 0) / 1e6:,.0f}",
                f"{sum(sent.values()) / 1e6:,.0f}",
                str(found.exchanges),
                *(f"{1e3 * t:,.1f}" for t in (times.compute, times.nvlink, times.infiniband)),
                *(f"{gain:.1f}×" for gain in gains),
            ]
        )
    head = [
        "model", "frames", "GPUs", "GiB a GPU", "all-to-all, MB", "halo, MB", "sent, MB",
        "exchanges", "compute, ms", "NVLink, ms", "InfiniBand, ms", "gain, NVLink",
        "gain, InfiniBand",
    ]  # fmt: skip
    return Table("", head, rows)


def where_it_pays(counts: list[Count], options: Options) -> Table:
    """Returns, by model and frames, how many processes are faster, and how many half efficient."""
    single = {(x.model, x.frames): estimate(x, options) for x in counts if x.processes == 1}
    rows = []
    for (model, frames), alone in single.items():
        cells = [model, str(frames)]
        for seconds in ("fastest", "slowest"):
            gains = {
                x.processes: alone.compute / getattr(estimate(x, options), seconds)
                for x in counts
                if (x.model, x.frames) == (model, frames) and x.processes > 1
            }
            cells.append(_most(size for size, gain in gains.items() if gain > 1))
            cells.append(_most(size for size, gain in gains.items() if gain >= size / 2))
            best = max(gains, key=gains.__getitem__)
            cells.append(f"{gains[best]:.1f}× ({best})")
        rows.append(cells)
    kinds = ("faster up to", "half efficient up to", "best gain (GPUs)")
    head = [
        "model",
        "frames",
        *(f"{kind}, {of}" for of in ("NVLink", "InfiniBand") for kind in kinds),
    ]
    return Table("", head, rows)


def _most(sizes: Iterator[int]) -> str:
    return str(max(sizes, default="–"))


def main() -> None:
    """Prints both tables."""
    options = read_options(Options, prog="python -m benchmarks.sharding")
    counts = []
    for name in options.models:
        for frames in options.frames:
            for processes in options.processes:
                if processes <= frames:
                    print(f"{name}, {frames} frames, {processes}", file=sys.stderr)
                    counts.append(count(name, frames, processes))
    print(where_it_pays(counts, options).markdown())
    print()
    print(table(counts, options).markdown())
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(x) for x in counts], indent=1))


if __name__ == "__main__":
    main()
