"""Which launches are compiled: those of the shipped configurations, through the real plan."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.codegen.targets import TARGETS
from vstar_kernels.attention.triton import configs, plan, plan_backward
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig
from vstar_kernels.attention.triton.facts import STRIDED, Device, Facts
from vstar_kernels.attention.triton.plan import Launch

BATCH, HEADS = 4096, 8
KEYS = ("architecture", "kind", "frames", "width")  # what a configuration is found by
F16 = torch.float16
INT32_TENSORS = ("columns",)  # others that are not the call's are float32
LONG = 1024  # frames of a stream launch


@dataclass(frozen=True)
class Variant:
    """What a call may ask for beyond its sizes and type."""

    name: str
    form: str = "gaussian"
    per_head: bool = False
    stat: str = "row_max"
    clamp: bool = False
    negative: bool = False
    even: bool = True
    wide: bool = False  # 64-bit offsets
    map: bool = False  # the mean map too, or its gradient
    grad_values: bool = False  # of Δ's values, backward
    half: torch.dtype = torch.bfloat16  # of the two 16-bit types


GAUSSIAN = Variant("gaussian")
DENSE = Variant("dense, tensor", "dense", stat="tensor", negative=True, even=False)
MAP = replace(DENSE, name="map", map=True)
GRADIENTS = Variant("gradients", even=False)
MAP_GRADIENT = Variant("map's gradient", "dense", stat="map_max", even=False, map=True)
VALUES = replace(MAP_GRADIENT, name="values' gradient", grad_values=True)
# What every shipped configuration must be able to run, by (kernel, backward): the commonest call,
# and those that take the most registers and shared memory.
ALWAYS = {
    ("tile", False): (GAUSSIAN, DENSE, MAP),
    ("stream", False): (GAUSSIAN, MAP),
    ("tile", True): (MAP_GRADIENT, VALUES, GRADIENTS),
    ("stream", True): (VALUES, GRADIENTS),
}
# All pairs of options, each in one of these; for a few rows.
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
    Variant("symmetric, gradients", "symmetric", stat="tensor", clamp=True, grad_values=True),
    Variant("signed, gradients", "signed", True, "row_max", True, wide=True, grad_values=True),
)
PAIRED = ("sm_90", "gfx942")  # one of each vendor, for whose representative rows the pairs are
REPRESENTATIVE = {("16-bit", 16, 64), ("16-bit", None, 48)}
# Head sizes that fill a width only in part.
PARTIAL = {16: 8, 48: 40, 64: 56, 80: 72, 96: 88, 128: 120, 160: 136, 256: 200}


@dataclass(frozen=True)
class Row:
    """One row of the table of configurations."""

    architecture: str
    kind: str
    frames: int | None  # None: the stream kernel
    width: int
    config: TileConfig | StreamConfig
    backward: bool = False

    @property
    def kernel(self) -> str:
        """Which table the row is in."""
        return "tile" if isinstance(self.config, TileConfig) else "stream"


@dataclass(frozen=True)
class Case:
    """One kernel to compile."""

    row: Row
    variant: Variant
    head_dim: int
    kernel: str  # as launches() calls it
    launch: Launch
    dtypes: tuple[torch.dtype | None, ...]  # of the launch's tensors; None for unused ones

    @property
    def config(self) -> TileConfig | StreamConfig:
        """The kernel's own configuration, or else the row's."""
        config = self.row.config
        return config.of(self.kernel) if isinstance(config, StreamConfig) else config

    @property
    def name(self) -> str:
        """For people."""
        row = self.row
        frames = "" if row.frames is None else f" N={row.frames}"
        size = f"{row.architecture} {self.kernel} {row.kind}{frames} D={self.head_dim}"
        return f"{size} {self.variant.name}"

    def __reduce__(self) -> tuple[Callable[..., Case], tuple[object, ...]]:
        """Kernels cannot be sent to other processes; what they are made from can."""
        return one_case, (self.row, self.variant, self.head_dim, self.kernel)


def rows() -> list[Row]:
    """Every shipped configuration."""
    found = []
    for file, backward in ((configs.FILE, False), (configs.BACKWARD_FILE, True)):
        tables = json.loads(file.read_text())
        found += [
            Row(**{key: row.pop(key, None) for key in KEYS}, config=kind(**row), backward=backward)
            for kernel, kind in (("tile", TileConfig), ("stream", configs.stream_config))
            for row in tables[kernel]
        ]
    return found


def cases(row: Row, variant: Variant, head_dim: int | None = None) -> list[Case]:
    """The launches of one call; none where the plan has another kernel for it."""
    call = facts(row, variant, head_dim or row.width)
    return [
        Case(row, variant, call.shape[-1], name, launch, _types(call, launch))
        for name, launch in launches(row, call).items()
    ]


def one_case(row: Row, variant: Variant, head_dim: int, kernel: str) -> Case:
    """The one of a call's launches that has this name."""
    return next(case for case in cases(row, variant, head_dim) if case.kernel == kernel)


def launches(row: Row, call: Facts) -> dict[str, Launch]:
    """A call's launches by name."""
    if row.backward:
        return _backward_launches(row.config, call)
    return _forward_launches(row.config, call)


def _forward_launches(config: TileConfig | StreamConfig, call: Facts) -> dict[str, Launch]:
    if isinstance(config, TileConfig):
        if not call.map_block:
            return {"tile": plan.tile_launch(call, config)}
        if config.rows == configs.padded_frames(call.shape[-3]) <= plan.LARGEST_MAP_TILE:
            return {"tile": plan.tile_with_map(call, config).forward}
        return {}
    found = {"stream": plan.stream_launch(call, config, save=call.map_block > 0)}
    if call.stat == "map_max":
        found["map_max"] = plan.map_max_launch(call, config)
    return found


def _backward_launches(config: TileConfig | StreamConfig, call: Facts) -> dict[str, Launch]:
    if isinstance(config, TileConfig):
        if call.grad_values and not plan_backward.sums_values(call):
            return {}
        return {"tile_backward": plan_backward.tile_plan(call, config).gradients}
    found: dict[str, Launch | None] = dict(vars(plan_backward.stream_plan(call, config)))
    if call.map_block:  # the forward call's, which takes the gradients' configuration
        found = {"maps": plan.strips(call, config)[0], **found}
    # The last ones need most: what is not fit fails early.
    return {name: launch for name, launch in reversed(found.items()) if launch is not None}


def _types(call: Facts, launch: Launch) -> tuple[torch.dtype | None, ...]:
    types: dict[str, torch.dtype | None] = dict.fromkeys(STRIDED, call.dtype)
    types |= dict.fromkeys(INT32_TENSORS, torch.int32) | dict.fromkeys(launch.unused)
    return tuple(types.get(name, torch.float32) for name in launch.tensors)


def shipped(row: Row) -> list[Case]:
    """What a configuration must compile to without fault; of some, in all pairs of options."""
    found = [case for variant in ALWAYS[row.kernel, row.backward] for case in cases(row, variant)]
    if (row.kind, row.frames, row.width) not in REPRESENTATIVE:
        return [case for case in found if not light(case)]
    if row.architecture not in PAIRED:
        return found
    pairs = BACKWARD_PAIRS if row.backward else PAIRS
    partial = replace(pairs[-1], name=f"{pairs[-1].name}, partial")
    more = [cases(row, variant) for variant in pairs] + [cases(row, partial, PARTIAL[row.width])]
    return found + list(itertools.chain.from_iterable(more))


def light(case: Case) -> bool:
    """Whether a kernel needs less than another of the same row that does what it does and more."""
    return case.kernel == "map_max" or (case.kernel == "statistics" and not case.variant.map)


def facts(row: Row, variant: Variant, head_dim: int) -> Facts:
    """A call on contiguous ``(batch, frames, heads, head_dim)`` tensors that takes these paths."""
    frames = LONG if row.frames is None else row.frames
    frames -= not variant.even
    dtype = variant.half if row.kind == "16-bit" else torch.float32
    batch = BATCH * 32 * 128 if variant.wide else BATCH * 128 // frames
    shape = (batch, frames, HEADS, head_dim)
    strides = (frames * HEADS * head_dim, HEADS * head_dim, head_dim, 1)
    values = {
        "gaussian": (0, 0, 0),
        "none": (0, 0, 0),
        "symmetric": (0, 0, 1),
        "signed": (0, frames - 1, 1),
        "dense": (0, frames, 1),
    }[variant.form]
    if variant.per_head:
        values = (frames * frames, *values[1:])
    stat_strides = (frames * HEADS, HEADS, 1) if variant.stat == "tensor" else ()
    target = TARGETS[row.architecture]
    return Facts(
        device=Device(row.architecture, target.shared_program, target.processors),
        dtype=dtype,
        ieee=row.kind == "ieee",
        shape=shape,
        strides=(strides,) * (len(STRIDED) if row.backward else 4),
        scale=(-1 if variant.negative else 1) * head_dim**-0.5,
        strength=1.0,
        form=variant.form,
        sigma=1.0 if variant.form == "gaussian" else 0.0,
        values_strides=values,
        per_head=variant.per_head,
        stat=variant.stat,
        stat_strides=stat_strides,
        clamp=variant.clamp,
        map_block=int(variant.map),
        grad_values=variant.grad_values,
        grad_stat_strides=stat_strides if row.backward else (),
    )


def subset(every: list[Case]) -> list[Case]:
    """A few of them, of the models' commonest sizes, that show all of :func:`shown`: greedily."""
    left = {id(case): (case, shown(case)) for case in every if case.row.width in (48, 64)}
    missing = set().union(*(shows for _, shows in left.values()))
    found = []
    while missing:
        case, shows = max(left.values(), key=lambda pair: len(pair[1] & missing))
        missing -= shows
        found.append(case)
    return found


def shown(case: Case) -> set[tuple[object, ...]]:
    """What compiling a case shows to work: pairs of target, kernel and type, lengths, variants."""
    row = case.row
    return {
        (row.architecture, case.kernel),
        (row.architecture, row.kind, row.kernel, row.backward),
        (row.kind, case.kernel),
        (row.architecture, row.frames, row.backward),
        ("variant", case.variant.name),
        *((row.architecture, x) for x in ALWAYS[row.kernel, row.backward] if x == case.variant),
    }
