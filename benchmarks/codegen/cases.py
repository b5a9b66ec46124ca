"""Which kernels are compiled: the launches of every shipped configuration, in several variants.

This is the only module here that knows how the package builds its launches.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from benchmarks.codegen.targets import TARGETS
from vstar_kernels.attention.call import Call, Gradients, Options, Wanted
from vstar_kernels.attention.triton import (
    configs,
    devices,
    maps,
    plan,
    stream,
    stream_backward,
    tile,
    tile_backward,
)
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig
from vstar_kernels.attention.triton.devices import Device
from vstar_kernels.attention.triton.launches import Launch
from vstar_kernels.attention.triton.plan import PlanKey
from vstar_kernels.cli.options import integer, parsed

BATCH, HEADS = 4096, 5  # a call of another number of heads takes the same kernels
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

    @property
    def has_sweeps(self) -> bool:
        """Whether it is for a stream's gradients, each of which may have a configuration."""
        return self.family == "stream" and self.backward


@dataclass(frozen=True)
class Selection:
    """Which configurations a command is for, and in how many processes it compiles."""

    target: tuple[Literal[configs.ARCHITECTURES], ...] = configs.ARCHITECTURES
    """Architectures."""
    kind: tuple[Literal[configs.KINDS], ...] = configs.KINDS
    """Kinds of products."""
    width: tuple[Literal[configs.WIDTHS], ...] = configs.WIDTHS
    """Head sizes."""
    jobs: Annotated[int, parsed(integer(1), "N")] = 1
    """Processes that compile."""

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
        return Key(self.architecture, self.kind, self.frames, self.width, self.backward)


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
    saved: bool = False  # backward: the forward pass saved row statistics
    half: str = "bfloat16"  # which of the two 16-bit types

    def dtype(self, kind: str) -> torch.dtype:
        """Returns the type of queries, keys and values."""
        return getattr(torch, self.half) if kind == "16-bit" else torch.float32


def read_variants() -> list[list[Variant]]:
    """Returns the three groups of variants that ``variants.json`` describes."""
    groups = json.loads(Path(__file__).with_name("variants.json").read_text()).values()
    return [[Variant(name, **options) for name, options in group.items()] for group in groups]


# Each pair of options is in one of PAIRS, which only a few configurations are compiled in.
(GAUSSIAN, DENSE, MAP, MAP_GRADIENT, VALUES, GRADIENTS), PAIRS, BACKWARD_PAIRS = read_variants()
# What every shipped configuration must be able to run, by (family, backward), but for what a tile
# is unfit for: the commonest call, and those that take the most registers and shared memory, the
# most demanding of a tile's last.
ALWAYS = {
    ("tile", False): (GAUSSIAN, DENSE, MAP),
    ("stream", False): (GAUSSIAN, MAP),
    ("tile", True): (GRADIENTS, MAP_GRADIENT, VALUES),
    ("stream", True): (VALUES, GRADIENTS),
}
# Of the sweeps that read no map's gradient and no Δ, which have configurations of their own.
DEMANDING_GRADIENTS = Variant(
    "gradients, wide", stat="map_max", clamp=True, negative=True, even=False, wide=True
)
# What a tile may leave to the stream kernels whatever else it does, by its name in ``unfit``.
RARE: dict[str, dict[str, Any]] = {
    "map_max": {"stat": "map_max"},
    "wide": {"wide": True, "stat": "row_max"},  # of both at once tiles have none
}
PAIRED_ARCHITECTURES = ("sm_90", "gfx942")  # one of each vendor
PAIRED_SIZES = {("16-bit", 16, 64), ("16-bit", None, 48)}  # of kind, frames and width
# Head sizes that fill a width only in part.
PARTIAL = {16: 8, 32: 24, 48: 40, 64: 56, 80: 72, 96: 88, 128: 120, 160: 152, 256: 200}


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
        return self.variant.dtype(self.entry.kind)

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
        for family, config in (("tile", configs.tile_config), ("stream", configs.stream_config)):
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
    key = plan_key(entry, variant, head_dim)
    made = make_plan(entry, key)
    found: dict[str, Launch | None]
    if entry.family == "tile":
        found = {"tile_backward" if entry.backward else "tile": made and made.launch}
    elif not entry.backward:
        # Of tensors that are not aligned.
        by_pointers = None if made.attention is made.pointers else made.pointers
        found = {"stream": made.attention, "pointers": by_pointers, "map_max": made.map_max}
    else:
        found = {"grad_delta": made.grad_delta and made.grad_delta.launch}
        found[stream_backward.sweep_name(key, "grad_key")] = made.grad_key
        found[stream_backward.sweep_name(key, "grad_query")] = made.grad_query
        found |= {"statistics": made.statistics, "map_max": made.map_max}
        if key.has_map:  # the forward call's, which takes the gradients' configuration
            found["maps"] = maps.plan_mean_map(key, entry.config)[0].launch
    return {name: launch for name, launch in found.items() if launch is not None}


def make_plan(entry: Entry, key: PlanKey) -> Any:
    """Returns the package's plan of a call; None where it has another family for it."""
    if entry.family == "tile":
        return (tile_backward if entry.backward else tile).plan_tile(key, entry.config)
    return (stream_backward if entry.backward else stream).plan_stream(key, entry.config)


def plan_key(entry: Entry, variant: Variant, head_dim: int) -> PlanKey:
    """Describes a call on contiguous ``(batch, frames, heads, head_dim)`` tensors."""
    frames = (entry.frames or LONG) - (not variant.even)
    batch = BATCH * 32 * 128 if variant.wide else BATCH * 128 // frames
    sizes = {"symmetric": (frames,), "signed": (2 * frames - 1,), "dense": (frames, frames)}
    options = Options(
        form=variant.form,
        sigma=1.0 if variant.form == "gaussian" else 0.0,
        strength=1.0,
        stat=variant.stat,
        clamp_negative=variant.clamp,
        detach_stat=False,
        scale=(-1 if variant.negative else 1) * head_dim**-0.5,
        map_block=int(variant.map),
    )
    with torch.device("meta"):
        query = torch.empty(batch, frames, HEADS, head_dim, dtype=variant.dtype(entry.kind))
        stat = torch.empty(batch, frames, HEADS) if variant.stat == "tensor" else None
        delta = None
        if size := sizes.get(variant.form):
            delta = torch.empty(*(HEADS,) * variant.per_head, *size)
    call = Call(query, query, query, delta, stat, options)
    if entry.backward:
        grad_map = query if variant.map else None
        gradients = Gradients(query, query, query, delta, stat)
        saved = (query,) if variant.saved else ()  # which tensors does not matter
        wanted = Wanted(delta=variant.grad_delta, stat=stat is not None)
        key = plan.backward_key(call, query, saved, query, grad_map, gradients, wanted)
    else:
        key = plan.forward_key(call, query)
    target = TARGETS[entry.architecture]
    device = Device(entry.architecture, target.shared_program, target.processors)
    return key._replace(device=device, ieee=entry.kind == "ieee")


def this_gpu() -> Device:
    """Returns the package's description of the first GPU."""
    return devices.device_of(torch.device("cuda", 0))


def shipped(entry: Entry) -> list[Case]:
    """Returns what a configuration must compile to without fault; all pairs of options for some."""
    variants = ALWAYS[entry.family, entry.backward]
    found = [case for variant in variants for case in cases(entry, variant)]
    if entry.has_sweeps:
        found += cases(entry, DEMANDING_GRADIENTS, PARTIAL[entry.width])
    if entry.family == "tile":
        found += [case for variant in rare(entry).values() for case in cases(entry, variant)]
    if (entry.kind, entry.frames, entry.width) not in PAIRED_SIZES:
        return [case for case in found if not light(case)]
    if entry.architecture not in PAIRED_ARCHITECTURES:
        return found
    pairs = BACKWARD_PAIRS if entry.backward else PAIRS
    partial = replace(pairs[-1], name=f"{pairs[-1].name}, partial")
    more = [cases(entry, variant) for variant in pairs]
    return [*found, *itertools.chain(*more), *cases(entry, partial, PARTIAL[entry.width])]


def rare(entry: Entry) -> dict[str, Variant]:
    """Returns the most demanding of what a tile always runs, with each of ``RARE`` besides.

    Left out is what that has already.
    """
    does = [x for x in ALWAYS["tile", entry.backward] if launches(entry, x, entry.width)]
    return {
        name: replace(does[-1], name=f"{does[-1].name}, {name}", even=False, **options)
        for name, options in RARE.items()
        if not options.items() <= vars(does[-1]).items()
    }


def light(case: Case) -> bool:
    """Tells whether another kernel of the entry does what this one does and more."""
    return case.kernel == "map_max" or (case.kernel == "statistics" and not case.variant.map)


def subset(every: Iterable[Case]) -> list[Case]:
    """Chooses a few cases of the models' commonest sizes that show all that every case shows.

    The choice is greedy: each time a case that shows most of what is missing, of those the one that
    compiles fastest.
    """
    common = sorted((case for case in every if case.entry.width in (48, 64)), key=effort)
    shown = {case: shows(case) for case in common}
    missing, found = set().union(*shown.values()), set()
    while missing:
        best = max(common, key=lambda case: len(shown[case] & missing))
        missing -= shown[best]
        found.add(best)
    return [case for case in common if case in found]


def effort(case: Case) -> tuple[bool, float]:
    """Orders cases by how long they take: NVIDIA's disassembler, then each warp's part of a map."""
    config = case.config
    keys = getattr(config, "keys", case.entry.frames)
    return case.entry.architecture.startswith("sm_"), config.queries * keys / config.warps


def shows(case: Case) -> set[tuple[object, ...]]:
    """Returns what compiling a case shows to work: pairs of a kernel and a type, and so on.

    Each kernel is shown for one architecture of each vendor; each other one has each family.
    """
    entry, always = case.entry, ALWAYS[case.entry.family, case.entry.backward]
    vendor = entry.architecture[:2]
    return {
        (vendor, case.kernel),
        (entry.architecture, entry.family, entry.backward),
        (entry.kind, case.kernel),
        (vendor, entry.kind, entry.family, entry.backward),
        (entry.frames, entry.backward),
        (case.kernel, entry.width),
        ("variant", case.variant),
        *((vendor, x) for x in always if x == case.variant),
    }
