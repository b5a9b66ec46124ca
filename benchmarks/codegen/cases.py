"""Which kernels are compiled: the launches of every shipped configuration, in several variants.

This is the only module here that knows how the package builds its launches.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch

from benchmarks.codegen.targets import TARGETS
from vstar_kernels.attention.call import Options
from vstar_kernels.attention.triton import (
    configs,
    maps,
    plan,
    stream,
    stream_backward,
    tile,
    tile_backward,
)
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig
from vstar_kernels.attention.triton.plan import Device, Launch, PlanKey
from vstar_kernels.attention.triton.stream import StreamPlan
from vstar_kernels.attention.triton.tile import TilePlan

BATCH, HEADS = 4096, 8
LONG = 1024  # frames of a call of the stream kernels
# Of the launches' tensors, those of the call's type; the others are float32, or int32.
OF_CALL = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
INT32_TENSORS = ("argmax",)
Config = TileConfig | StreamConfig


@dataclass(frozen=True)
class Key:
    """What the package looks a configuration up by; ``frames`` is None for the stream kernels."""

    architecture: str
    kind: str
    frames: int | None
    width: int
    backward: bool = False

    @property
    def family(self) -> str:
        """The kernels that the configuration is for: "tile" or "stream"."""
        return "stream" if self.frames is None else "tile"


@dataclass(frozen=True)
class Selection:
    """Which configurations a command is for."""

    target: tuple[Literal[configs.ARCHITECTURES], ...] = configs.ARCHITECTURES
    """Architectures."""
    kind: tuple[Literal[configs.KINDS], ...] = configs.KINDS
    """Kinds of products."""
    width: tuple[Literal[configs.WIDTHS], ...] = configs.WIDTHS
    """Head sizes."""

    def has(self, key: Key) -> bool:
        """Tells whether a key's configuration is one of them."""
        wanted = key.kind in self.kind and key.width in self.width
        return wanted and key.architecture in self.target


@dataclass(frozen=True)
class Entry(Key):
    """One line of the files of configurations."""

    config: Config = field(kw_only=True)

    @property
    def key(self) -> Key:
        """What the line is found by."""
        return Key(*(getattr(self, field.name) for field in fields(Key)))


@dataclass(frozen=True)
class Variant:
    """What a call may ask for beyond its sizes and type."""

    name: str
    form: str = "gaussian"
    per_head: bool = False
    stat: str = "row_max"
    clamp: bool = False
    negative: bool = False  # scale
    even: bool = True  # frames fill their blocks
    wide: bool = False  # 64-bit offsets
    map: bool = False  # the mean map too, or its gradient
    grad_delta: bool = False  # Δ's gradient too, backward
    half: torch.dtype = torch.bfloat16  # which of the two 16-bit types


GAUSSIAN = Variant("gaussian")
DENSE = Variant("dense, tensor", "dense", stat="tensor", negative=True, even=False)
MAP = replace(DENSE, name="map", map=True)
GRADIENTS = Variant("gradients", even=False)
MAP_GRADIENT = Variant("map's gradient", "dense", stat="map_max", even=False, map=True)
VALUES = replace(MAP_GRADIENT, name="values' gradient", grad_delta=True)
# What every shipped configuration must be able to run, by (family, backward): the commonest call,
# and those that take the most registers and shared memory.
ALWAYS = {
    ("tile", False): (GAUSSIAN, DENSE, MAP),
    ("stream", False): (GAUSSIAN, MAP),
    ("tile", True): (MAP_GRADIENT, VALUES, GRADIENTS),
    ("stream", True): (VALUES, GRADIENTS),
}
# Each pair of options is in one of these, which only a few configurations are compiled in.
F16 = torch.float16
PAIRS = (
    Variant("uneven", even=False),
    Variant("map max", stat="map_max"),
    Variant("none", "none", stat="none", negative=True, wide=True, half=F16),
    Variant("none, uneven", "none", stat="none", even=False),
    Variant("gaussian, tensor", stat="tensor", clamp=True, negative=True, wide=True),
    Variant("gaussian, none", stat="none", even=False, half=F16),
    Variant("symmetric", "symmetric", False, "row_max", clamp=True, even=False, wide=True),
    Variant("symmetric, heads", "symmetric", True, "map_max", clamp=True, negative=True),
    Variant("symmetric, tensor", "symmetric", True, "tensor", even=False, half=F16),
    Variant("symmetric, none", "symmetric", stat="none", negative=True, wide=True),
    Variant("signed", "signed", True, "row_max", clamp=True, negative=True, even=False),
    Variant("signed, map max", "signed", stat="map_max", even=False, wide=True, half=F16),
    Variant("signed, tensor", "signed", stat="tensor", clamp=True),
    Variant("signed, none", "signed", True, "none", wide=True),
    Variant("dense, map max", "dense", True, "map_max", clamp=True, even=False, wide=True),
    Variant("dense, row max", "dense", half=F16),
    Variant("dense, none", "dense", True, "none", negative=True, even=False),
)
BACKWARD_PAIRS = (
    Variant("none, gradients", "none", stat="none", negative=True, wide=True, map=True, half=F16),
    Variant("symmetric, gradients", "symmetric", stat="tensor", clamp=True, grad_delta=True),
    Variant("signed, gradients", "signed", True, "row_max", True, wide=True, grad_delta=True),
)
PAIRED_ARCHITECTURES = ("sm_90", "gfx942")  # one of each vendor
PAIRED_SIZES = {("16-bit", 16, 64), ("16-bit", None, 48)}  # of kind, frames and width
# Head sizes that fill a width only in part.
PARTIAL = {16: 8, 48: 40, 64: 56, 80: 72, 96: 88, 128: 120, 160: 136, 256: 200}


@dataclass(frozen=True)
class Case:
    """One kernel to compile. Its launch is made where it is needed: kernels cannot be pickled."""

    entry: Entry
    variant: Variant
    head_dim: int
    kernel: str  # a key of launches()

    @property
    def launch(self) -> Launch:
        """The kernel with all of its arguments but tensors."""
        return launches(self.entry, self.variant, self.head_dim)[self.kernel]

    @property
    def dtype(self) -> torch.dtype:
        """The type of queries, keys and values."""
        return self.variant.half if self.entry.kind == "16-bit" else torch.float32

    @property
    def tensor_types(self) -> list[torch.dtype | None]:
        """The types of the launch's tensors, in its order; None for those that it does not use."""
        types = dict.fromkeys(OF_CALL, self.dtype) | dict.fromkeys(INT32_TENSORS, torch.int32)
        needed = self.launch.needed._asdict()
        return [types.get(name, torch.float32) if needed[name] else None for name in needed]

    @property
    def config(self) -> Config:
        """The kernel's own configuration where it has one, or else the entry's."""
        config = self.entry.config
        return config.of_kernel(self.kernel) if isinstance(config, StreamConfig) else config

    @property
    def name(self) -> str:
        """The case in words."""
        entry = self.entry
        frames = "" if entry.frames is None else f" N={entry.frames}"
        size = f"{entry.architecture} {self.kernel} {entry.kind}{frames} D={self.head_dim}"
        return f"{size} {self.variant.name}"


def entries() -> list[Entry]:
    """Returns every shipped configuration."""
    found = []
    for file, backward in ((configs.FILE, False), (configs.BACKWARD_FILE, True)):
        tables = json.loads(file.read_text())
        for family, config in (("tile", TileConfig), ("stream", configs.stream_config)):
            for line in tables[family]:
                key = [line.pop(name, None) for name in ("architecture", "kind", "frames", "width")]
                found.append(Entry(*key, backward, config=config(**line)))
    return found


def cases(entry: Entry, variant: Variant, head_dim: int | None = None) -> list[Case]:
    """Returns the kernels of one call; none where the package has another family for it."""
    head_dim = head_dim or entry.width
    return [Case(entry, variant, head_dim, name) for name in launches(entry, variant, head_dim)]


def launches(entry: Entry, variant: Variant, head_dim: int) -> dict[str, Launch]:
    """Returns the launches of a call by name, those that need the most registers first."""
    key, config = plan_key(entry, variant, head_dim), entry.config
    if isinstance(config, TileConfig):
        if entry.backward:
            backward_tile = tile_backward.plan_tile(key, config)
            return {"tile_backward": backward_tile.launch} if backward_tile else {}
        forward_tile = tile.plan_tile(key, config)
        return {"tile": forward_tile.launch} if forward_tile else {}
    found: dict[str, Launch | None]
    if not entry.backward:
        forward = stream.plan_stream(key, config)
        found = {"stream": forward.attention, "map_max": forward.map_max}
    else:
        backward = stream_backward.plan_stream(key, config)
        names = ("grad_key", "grad_query", "statistics", "map_max")
        found = {name: getattr(backward, name) for name in names}
        if backward.grad_delta is not None:
            found = {"grad_delta": backward.grad_delta.launch, **found}
        if key.has_map:  # the forward call's, which takes the gradients' configuration
            found["maps"] = maps.plan_mean_map(key, config)[0].launch
    return {name: launch for name, launch in found.items() if launch is not None}


def plan_key(key: Key, variant: Variant, head_dim: int, device: Device | None = None) -> PlanKey:
    """Describes a call on contiguous ``(batch, frames, heads, head_dim)`` tensors."""
    target = TARGETS[key.architecture]
    frames = (key.frames or LONG) - (not variant.even)
    batch = BATCH * 32 * 128 if variant.wide else BATCH * 128 // frames
    strides = (frames * HEADS * head_dim, HEADS * head_dim, head_dim, 1)
    delta_shape: tuple[int, ...] = {
        "gaussian": (),
        "none": (),
        "symmetric": (frames,),
        "signed": (2 * frames - 1,),
        "dense": (frames, frames),
    }[variant.form]
    if variant.per_head:
        delta_shape = (HEADS, *delta_shape)
    stat_strides = (frames * HEADS, HEADS, 1) if variant.stat == "tensor" else ()
    gradient = strides if key.backward else ()
    return PlanKey(
        device=device or Device(key.architecture, target.shared_program, target.processors),
        dtype=variant.half if key.kind == "16-bit" else torch.float32,
        ieee=key.kind == "ieee",
        shape=(batch, frames, HEADS, head_dim),
        options=Options(
            form=variant.form,
            sigma=1.0 if variant.form == "gaussian" else 0.0,
            strength=1.0,
            stat=variant.stat,
            clamp_negative=variant.clamp,
            detach_stat=False,
            scale=(-1 if variant.negative else 1) * head_dim**-0.5,
            map_block=int(variant.map),
        ),
        query=strides,
        key=strides,
        value=strides,
        out=strides,
        delta=torch.empty(delta_shape, device="meta").stride(),
        delta_shape=delta_shape,
        stat=stat_strides,
        grad_out=gradient,
        grad_query=gradient,
        grad_key=gradient,
        grad_value=gradient,
        grad_stat=stat_strides if key.backward else (),
        wants_delta=variant.grad_delta,
    )


def this_gpu() -> Device:
    """Returns the package's description of the first GPU."""
    return plan._device(torch.device("cuda", 0))


def gaussian_plan(entry: Entry, traffic: int) -> tuple[TilePlan | StreamPlan, PlanKey]:
    """Returns the plan of a Gaussian call on this GPU that moves ``traffic`` bytes, and its key."""
    key = plan_key(entry, GAUSSIAN, entry.width, this_gpu())
    _, *sizes = key.shape
    batch = max(1, traffic // (4 * torch.Size(sizes).numel() * key.dtype.itemsize))
    key = key._replace(shape=(batch, *sizes))
    if isinstance(entry.config, StreamConfig):
        return stream.plan_stream(key, entry.config), key
    made = tile.plan_tile(key, entry.config)
    assert made is not None  # only the mean map may need another
    return made, key


def shipped(entry: Entry) -> list[Case]:
    """Returns what a configuration must compile to without fault; all pairs of options for some."""
    variants = ALWAYS[entry.family, entry.backward]
    found = [case for variant in variants for case in cases(entry, variant)]
    if (entry.kind, entry.frames, entry.width) not in PAIRED_SIZES:
        return [case for case in found if not light(case)]
    if entry.architecture not in PAIRED_ARCHITECTURES:
        return found
    pairs = BACKWARD_PAIRS if entry.backward else PAIRS
    partial = replace(pairs[-1], name=f"{pairs[-1].name}, partial")
    more = [cases(entry, variant) for variant in pairs]
    return [*found, *itertools.chain(*more), *cases(entry, partial, PARTIAL[entry.width])]


def light(case: Case) -> bool:
    """Tells whether another kernel of the entry does what this one does and more."""
    return case.kernel == "map_max" or (case.kernel == "statistics" and not case.variant.map)


def subset(every: Iterable[Case]) -> list[Case]:
    """Chooses a few cases of the models' commonest sizes that show all that every case shows.

    The choice is greedy: each time a case that shows most of what is missing, of those the one that
    compiles fastest.
    """
    common = (case for case in every if case.entry.width in (48, 64))
    left = sorted(((case, shows(case)) for case in common), key=lambda pair: effort(pair[0]))
    missing = set().union(*(shown for _, shown in left))
    found = []
    while missing:
        case, shown = max(left, key=lambda pair: len(pair[1] & missing))
        missing -= shown
        found.append(case)
    return [case for case, _ in left if case in found]


def effort(case: Case) -> tuple[bool, float]:
    """Orders cases by how long they take: NVIDIA's disassembler, then each warp's part of a map."""
    config, frames = case.config, case.entry.frames
    keys = config.keys if isinstance(config, StreamConfig) else frames
    return case.entry.architecture.startswith("sm_"), config.queries * keys / config.warps


def shows(case: Case) -> set[tuple[object, ...]]:
    """Returns what compiling a case shows to work: pairs of target, kernel and type, and so on."""
    entry, always = case.entry, ALWAYS[case.entry.family, case.entry.backward]
    return {
        (entry.architecture, case.kernel),
        (entry.architecture, entry.kind, entry.family, entry.backward),
        (entry.kind, case.kernel),
        (entry.architecture, entry.frames, entry.backward),
        (case.kernel, entry.width),
        ("variant", case.variant),
        *((entry.architecture, x) for x in always if x == case.variant),
    }
