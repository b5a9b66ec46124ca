"""Which kernels of attention over frames of tokens are compiled.

This is the only module here that knows how the package builds their launches.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.codegen.cases import Key
from benchmarks.codegen.targets import TARGETS
from vstar_kernels.attention.frames.call import FrameOptions
from vstar_kernels.attention.triton import (
    configs,
    descriptors,
    frames_backward,
    frames_forward,
    frames_slots,
)
from vstar_kernels.attention.triton.configs import FramesConfig
from vstar_kernels.attention.triton.devices import Contents, Device
from vstar_kernels.attention.triton.frames_plan import FramesKey, Tables
from vstar_kernels.attention.triton.launches import Launch

BATCH, HEADS, KEY_HEADS = 2, 12, 4
FRAMES, TOKENS, TEXT = 21, 1560, 100  # of one frame, and of text
# Of the launches' tensors; the others are float32.
OF_CALL = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
INT32_TENSORS = (
    "key_lengths", "span", "band", "row_frame", "row_place", "row_order", "key_order", "tiles",
    "biased", "slots", "ranges", "entries", "entry_frame", "stat_frame", "argmax",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What a call may ask for beyond its sizes and type."""

    name: str
    tables: tuple[str, ...] = ()  # of the rule
    stat: str = "none"
    clamp: bool = False
    per_head: bool = False
    lengths: bool = False  # of keys
    interleaved: bool = False  # frames lie in short runs
    map: str = "none"  # or its gradient
    save: bool = False
    negative: bool = False  # scale
    wide: bool = False  # 64-bit offsets
    half: str = "bfloat16"  # which of the two 16-bit types

    def dtype(self, kind: str) -> torch.dtype:
        """Returns the type of queries, keys and values."""
        return getattr(torch, self.half) if kind == "16-bit" else torch.float32


def read_variants() -> dict[str, list[Variant]]:
    """Returns the variants that ``frame_variants.json`` lists, by the table they are for."""
    tables = json.loads(Path(__file__).with_name("frame_variants.json").read_text())
    return {
        table: [
            Variant(name, **{k: tuple(x) if isinstance(x, list) else x for k, x in options.items()})
            for name, options in variants.items()
        ]
        for table, variants in tables.items()
    }


VARIANTS = read_variants()  # what every configuration of a table must be able to run
COMMON = ("row max", "no rule")  # the names of the commonest


@dataclass(frozen=True)
class FrameEntry(Key):
    """One line of the file of configurations; ``frames`` is None, as of any number."""

    table: str = field(kw_only=True)
    config: FramesConfig = field(kw_only=True)

    @property
    def family(self) -> str:
        """The kernels that the configuration is for."""
        return "frames"

    @property
    def is_described(self) -> bool:
        """Whether keys and values come by descriptors."""
        return self.table.endswith("_described")


@dataclass(frozen=True)
class FrameCase:
    """One kernel to compile, as :class:`cases.Case` is. Its launch is made where it is needed."""

    entry: FrameEntry
    variant: Variant
    head_dim: int

    @property
    def kernel(self) -> str:
        """The kernel's name in reports."""
        table = self.entry.table.removesuffix("_full")
        return f"frames, {table.replace('_described', ' by descriptors')}"

    @property
    def config(self) -> FramesConfig:
        """The entry's configuration."""
        return self.entry.config

    @property
    def dtype(self) -> torch.dtype:
        """The type of queries, keys and values."""
        return self.variant.dtype(self.entry.kind)

    @property
    def launch(self) -> Launch:
        """The kernel with all of its arguments but tensors."""
        return _launch(self)

    @property
    def way(self) -> str:
        """How a bias comes to the logits, as the forward kernel takes it."""
        if self.entry.table.startswith("revisit"):
            return "revisit"
        return "split" if self.variant.stat in ("row_max", "frame_max") else "known"

    @property
    def tensor_types(self) -> list[torch.dtype | None]:
        """The types of the launch's tensors, in its order; None for those that it does not use."""
        types = dict.fromkeys(OF_CALL, self.dtype) | dict.fromkeys(INT32_TENSORS, torch.int32)
        types["part"] = frames_forward.part_type(self.dtype)
        needed = self.launch.needed._asdict()
        return [types.get(name, torch.float32) if needed[name] else None for name in needed]

    @property
    def name(self) -> str:
        """The case in words."""
        entry = self.entry
        return (
            f"{entry.architecture} {self.kernel} {entry.kind} D={self.head_dim} {self.variant.name}"
        )


@functools.lru_cache(maxsize=64)  # of the case at hand: its tables of frames take time
def _launch(case: FrameCase) -> Launch:
    key, config = plan_key(case.entry, case.variant, case.head_dim), case.config
    if not case.entry.backward:
        by_descriptors = case.entry.is_described
        made = frames_forward.plan_frames(key, config, case.way, by_descriptors=by_descriptors)
        return made.launch
    made = frames_backward.plan_frames(key, config, config)
    by_rows = case.entry.table.startswith("grad_query")
    return made.grad_query if by_rows else made.grad_key


def entries() -> list[FrameEntry]:
    """Returns every shipped configuration."""
    found = []
    tables = json.loads(configs.FRAMES_FILE.read_text())
    for table in VARIANTS:
        for line in tables[table]:
            key = [line.pop(name) for name in ("architecture", "kind", "width")]
            found.append(entry(*key, table, FramesConfig(**line)))
    return found


def entry(architecture: str, kind: str, width: int, table: str, config: FramesConfig) -> FrameEntry:
    """Returns the entry of a table with a configuration."""
    backward = table.startswith("grad")
    return FrameEntry(architecture, kind, None, width, backward, table=table, config=config)


def has_lines(table: str, architecture: str, kind: str) -> bool:
    """Tells whether a table has lines for an architecture and a kind of products."""
    return not table.endswith("_described") or descriptors.has_descriptors(architecture, kind)


def shipped(entry: FrameEntry) -> list[FrameCase]:
    """Returns what a configuration must compile to without fault."""
    return [FrameCase(entry, variant, entry.width) for variant in VARIANTS[entry.table]]


def subset(every: list[FrameCase]) -> list[FrameCase]:
    """Chooses a few cases of 16 bits: each table's for some architecture, with heads of 64.

    And the commonest call with heads of 128, which leave the fewest registers.
    """
    turns = itertools.cycle(configs.ARCHITECTURES)
    chosen = {
        (next(x for x in turns if has_lines(table, x, "16-bit")), table, 64) for table in VARIANTS
    } | {("sm_90", "known_described", 128)}
    found = {}
    for case in every:
        key = (case.entry.architecture, case.entry.table, case.entry.width)
        if key in chosen and case.entry.kind == "16-bit":
            found.setdefault(key, case)
    return list(found.values())


def plan_key(entry: FrameEntry, variant: Variant, head_dim: int) -> FramesKey:
    """Describes a call on contiguous tensors: 21 frames of 1,560 tokens, and text."""
    tokens = FRAMES * TOKENS + TEXT
    strides, key_strides = (
        (tokens * n * head_dim, n * head_dim, head_dim) for n in (HEADS, KEY_HEADS)
    )
    if variant.wide:
        strides = (2**33, *strides[1:])
    target = TARGETS[entry.architecture]
    runs = Contents.of(_runs(variant))
    made = {name: Contents.of(table) for name, table in _tables(variant).items()}
    key = FramesKey(
        device=Device(entry.architecture, target.shared_program, target.processors),
        dtype=variant.dtype(entry.kind),
        ieee=entry.kind == "ieee",
        batch=BATCH,
        tokens=tokens,
        keys=tokens,
        heads=HEADS,
        key_heads=KEY_HEADS,
        head_dim=head_dim,
        frames=FRAMES,
        key_frames=FRAMES,
        options=FrameOptions(
            variant.stat,
            variant.clamp,
            (-1 if variant.negative else 1) * head_dim**-0.5,
            variant.map,
            FRAMES,
            FRAMES,
        ),
        tables=Tables(runs, runs, **{name: made[name] for name in variant.tables}),
        lengths=variant.lengths,
        query=strides,
        key=key_strides,
        value=key_strides,
        out=strides,
        stat=(tokens * HEADS, HEADS, 1) if variant.stat == "tensor" else (),
        save=variant.save,
    )
    if not entry.backward:
        return key
    return key._replace(
        grad_out=strides,
        grad_query=strides,
        grad_key=key_strides,
        grad_value=key_strides,
        grad_map=variant.map != "none",
    )


def _runs(variant: Variant) -> torch.Tensor:
    step = 20 if variant.interleaved else TOKENS
    lengths = [(frame, step, place) for place in range(0, TOKENS, step) for frame in range(FRAMES)]
    lengths.append((frames_slots.TEXT, TEXT, 0))
    ends = list(itertools.accumulate(tokens for _, tokens, _ in lengths))
    runs = [
        (end - tokens, end, frame, place)
        for (frame, tokens, place), end in zip(lengths, ends, strict=True)
    ]
    return torch.tensor(runs, dtype=torch.int32)


def _tables(variant: Variant) -> dict[str, torch.Tensor]:
    distance = (torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)).float()
    bounds = torch.tensor([-300, 300], dtype=torch.int32)[:, None, None]
    found: dict[str, Any] = {
        "delta": torch.exp(-(distance**2) / 2),
        "offset": torch.where(distance.abs() < 8, 0.0, -math.inf),
        "factor": torch.where(distance.abs() > 3, 0.9, 1.0).expand(2, FRAMES, FRAMES),
        "factor_span": bounds.expand(2, FRAMES, FRAMES),
        "band": bounds.expand(2, FRAMES, FRAMES),
    }
    if variant.per_head:
        found["delta"] = found["delta"].expand(HEADS, FRAMES, FRAMES)
    return {name: table.contiguous() for name, table in found.items()}
