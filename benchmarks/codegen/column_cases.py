"""Which kernels of attention with maps of columns are compiled.

This is the only module here that knows how the package builds their launches.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.codegen.cases import Key
from benchmarks.codegen.targets import TARGETS
from vstar_kernels.attention.triton import columns_backward, columns_forward, configs
from vstar_kernels.attention.triton.columns_plan import ColumnsKey
from vstar_kernels.attention.triton.configs import ColumnsConfig
from vstar_kernels.attention.triton.devices import Device
from vstar_kernels.attention.triton.launches import Launch

BATCH, QUERIES, HEADS, COLUMNS = 32, 2560, 5, 4
KEYS = {"80": 77, "128": 120, "stream": 226}  # of calls, by the end of a table's name
TABLES = (*(f"{x}_{end}" for x in ("forward", "grad_query") for end in KEYS), "grad_key")
# Head sizes that fill a width in part: those of Stable Diffusion's and of Latte's heads.
PARTIAL = {48: 40, 80: 72}
# Of the launches' tensors; the others are float32.
OF_CALL = ("q", "k", "v", "out", "grad_out", "grad_q")


@dataclass(frozen=True)
class Variant:
    """What a call may ask for beyond its sizes and type."""

    name: str
    value: bool = True  # or backward, the output's gradient
    save: bool = False
    wants_keys: bool = False  # dK and dV too, backward
    negative: bool = False  # scale
    wide: bool = False  # 64-bit offsets
    half: str = "bfloat16"  # which of the two 16-bit types

    def dtype(self, kind: str) -> torch.dtype:
        """Returns the type of queries, keys and values."""
        return getattr(torch, self.half) if kind == "16-bit" else torch.float32


def read_variants() -> dict[str, list[Variant]]:
    """Returns the variants that ``column_variants.json`` lists, by the tables' first names."""
    tables = json.loads(Path(__file__).with_name("column_variants.json").read_text())
    return {
        table: [Variant(name, **options) for name, options in variants.items()]
        for table, variants in tables.items()
    }


VARIANTS = read_variants()
WIDE = Variant("64-bit offsets", save=True, wide=True)
COMMON = ("output and maps", "gradients of both", "gradients of keys")  # the commonest


@dataclass(frozen=True)
class ColumnEntry(Key):
    """One line of the file of configurations; ``frames`` is None: there are none."""

    table: str = field(kw_only=True)
    config: ColumnsConfig = field(kw_only=True)

    @property
    def family(self) -> str:
        """The kernels that the configuration is for."""
        return "columns"

    @property
    def variants(self) -> list[Variant]:
        """What the configuration must be able to run."""
        return next(x for name, x in VARIANTS.items() if self.table.startswith(name))


@dataclass(frozen=True)
class ColumnCase:
    """One kernel to compile, as :class:`cases.Case` is. Its launch is made where it is needed."""

    entry: ColumnEntry
    variant: Variant
    head_dim: int
    part: str = ""  # "maps": the second kernel of a forward pass with many keys

    @property
    def kernel(self) -> str:
        """The kernel's name in reports."""
        return f"columns, {self.entry.table}{self.part and ' ' + self.part}"

    @property
    def config(self) -> ColumnsConfig:
        """The entry's configuration."""
        return self.entry.config

    @property
    def dtype(self) -> torch.dtype:
        """The type of queries, keys and values."""
        return self.variant.dtype(self.entry.kind)

    @property
    def launch(self) -> Launch:
        """The kernel with all of its arguments but tensors."""
        found = launches(self.entry, self.variant, self.head_dim)[self.part]
        assert found is not None
        return found

    @property
    def tensor_types(self) -> list[torch.dtype | None]:
        """The types of the launch's tensors, in its order; None for those that it does not use."""
        types = dict.fromkeys(OF_CALL, self.dtype)
        needed = self.launch.needed._asdict()
        return [types.get(name, torch.float32) if needed[name] else None for name in needed]

    @property
    def name(self) -> str:
        """The case in words."""
        size = f"{self.entry.architecture} {self.kernel} {self.entry.kind} D={self.head_dim}"
        return f"{size} {self.variant.name}"


def entries() -> list[ColumnEntry]:
    """Returns every shipped configuration."""
    found = []
    for table, lines in json.loads(configs.COLUMNS_FILE.read_text()).items():
        for line in lines:
            key = [line.pop(name) for name in ("architecture", "kind", "width")]
            found.append(entry(*key, table, ColumnsConfig(**line)))
    return found


def entry(
    architecture: str, kind: str, width: int, table: str, config: ColumnsConfig
) -> ColumnEntry:
    """Returns the entry of a table with a configuration."""
    backward = table.startswith("grad")
    return ColumnEntry(architecture, kind, None, width, backward, table=table, config=config)


def launches(entry: ColumnEntry, variant: Variant, head_dim: int) -> dict[str, Launch | None]:
    """Returns the launches of a call that are an entry's, by the cases' ``part``."""
    key = plan_key(entry, variant, head_dim)
    if not entry.backward:
        forward = columns_forward.plan_columns(key, entry.config)
        return {"": forward.rows, "maps": forward.maps}
    if entry.table == "grad_key":
        return {"": columns_backward.plan_grad_key(key, entry.config)[0]}
    return {"": columns_backward.plan_grad_query(key, entry.config)}


def cases(entry: ColumnEntry, variant: Variant, head_dim: int) -> list[ColumnCase]:
    """Returns the kernels of one call."""
    found = launches(entry, variant, head_dim)
    return [ColumnCase(entry, variant, head_dim, part) for part, launch in found.items() if launch]


def shipped(entry: ColumnEntry) -> list[ColumnCase]:
    """Returns what a configuration must compile to without fault."""
    found = [cases(entry, variant, entry.width) for variant in entry.variants]
    if entry.width == 64 and entry.kind == "16-bit" and not entry.backward:
        found.append(cases(entry, WIDE, entry.width))
    if entry.width in PARTIAL:
        found.append(cases(entry, entry.variants[0], PARTIAL[entry.width]))
    return list(itertools.chain(*found))


def subset(every: list[ColumnCase]) -> list[ColumnCase]:
    """Chooses a few cases of 16 bits and heads of 64, each table's for some architecture."""
    turns = itertools.cycle(configs.ARCHITECTURES)
    chosen = set(zip(turns, TABLES, strict=False)) | {("sm_90", "forward_80")}
    found = {}
    for case in every:
        key = (case.entry.architecture, case.entry.table)
        if key in chosen and (case.entry.kind, case.head_dim) == ("16-bit", 64):
            found.setdefault((*key, case.part), case)
    return list(found.values())


def plan_key(entry: ColumnEntry, variant: Variant, head_dim: int) -> ColumnsKey:
    """Describes a call on contiguous tensors; a text that is the same for all frames."""
    keys = KEYS[entry.table.rsplit("_", 1)[-1]] if entry.table != "grad_key" else KEYS["80"]
    row = (HEADS * head_dim, head_dim)
    of_queries = (2**33 if variant.wide else QUERIES * row[0], *row)
    of_keys = (0, *row)
    target = TARGETS[entry.architecture]
    key = ColumnsKey(
        device=Device(entry.architecture, target.shared_program, target.processors),
        dtype=variant.dtype(entry.kind),
        ieee=entry.kind == "ieee",
        batch=BATCH,
        queries=QUERIES,
        keys=keys,
        heads=HEADS,
        head_dim=head_dim,
        columns=COLUMNS,
        scale=(-1 if variant.negative else 1) * head_dim**-0.5,
        query=of_queries,
        key=of_keys,
        weights=(0, COLUMNS, 1),
        value=of_keys if variant.value else (),
    )
    if not entry.backward:
        return key._replace(out=of_queries if variant.value else (), save=variant.save)
    return key._replace(
        grad_out=of_queries if variant.value else (),
        grad_query=of_queries,
        wants_keys=variant.wants_keys,
    )
