"""What to launch for a call, forward: kernels, their grids, and every argument but the tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vstar_kernels.attention.triton import configs
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig
from vstar_kernels.attention.triton.facts import (
    Facts,
    arguments,
    constants,
    five,
    kind,
    sequences,
)
from vstar_kernels.attention.triton.maps import maps_kernel
from vstar_kernels.attention.triton.stream import map_max_kernel, stream_kernel
from vstar_kernels.attention.triton.tile import tile_kernel

# Of grids whose programs go through many sequences; more than are resident at a time.
PROGRAMS_PER_PROCESSOR = 8
LARGEST_MAP_TILE = 64  # frames: beyond, the map's sum does not fit the registers beside the rest
MAP_STRIP = 512  # rows of the map that are summed at a time, where it is summed over blocks


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid. Called with tensors by name, of which it takes its own.

    The kernel gets None for the ``unused`` ones, which its constants make it leave alone, so that
    it does not compile if it touches one of them after all. Every other tensor must be there.
    """

    kernel: Any
    programs: int
    tensors: tuple[str, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    unused: frozenset[str]

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        if missing := [x for x in self.tensors if x not in self.unused and tensors.get(x) is None]:
            raise ValueError(f"{self.kernel.__name__} needs {', '.join(missing)}, given none")
        named = (None if name in self.unused else tensors[name] for name in self.tensors)
        self.kernel[(self.programs,)](*named, *self.arguments, **self.constants)


def launch(
    kernel: Any, programs: int, facts: Facts, *, unused: dict[str, bool], **more: Any
) -> Launch:
    """A kernel's launch, whose parameters are found by their names: ``more`` and from the facts.

    ``unused`` says of tensors that are not always needed whether the constants make the kernel
    leave them alone; Δ's values are found unused here.
    """
    constant = {**constants(facts), **more}
    argument = {**arguments(facts), **more}
    parameters = [name for name in kernel.arg_names if not name.isupper()]
    unused = {"values": facts.form in ("none", "gaussian")} | unused
    return Launch(
        kernel,
        programs,
        tuple(name for name in parameters if name not in argument),
        tuple(argument[name] for name in parameters if name in argument),
        {
            name: value
            for name, value in constant.items()
            if name == "num_warps" or (name.isupper() and name in kernel.arg_names)
        },
        frozenset(name for name, condition in unused.items() if condition),
    )


@dataclass(frozen=True)
class Plan:
    """A call's launches. ``map_max``, if any, comes first and leaves one number a program.

    Where the mean map is wanted, ``forward`` leaves sums of A′ of the shape ``map_sums``, or else
    saves what the launches in ``maps`` need to compute them, one for each strip of rows.
    """

    forward: Launch
    map_max: Launch | None = None
    map_sums: tuple[int, ...] = ()
    maps: tuple[MapsLaunch, ...] = ()


@dataclass(frozen=True)
class MapsLaunch(Launch):
    """A launch that leaves sums of maps, ``(groups, chunks, rows, frames)``, in "sums"."""

    shape: tuple[int, int, int, int] = (0, 0, 0, 0)


@functools.lru_cache(maxsize=4096)
def make(facts: Facts) -> Plan:
    """The plan of a call."""
    architecture, frames, head_dim = facts.device.architecture, facts.shape[-3], facts.shape[-1]
    tile = configs.tile(architecture, kind(facts), frames, head_dim)
    if tile is not None and tile.shared <= facts.device.shared:
        if not facts.map_block:
            return Plan(tile_launch(facts, tile))
        if tile.rows == configs.padded_frames(frames) <= LARGEST_MAP_TILE:
            return tile_with_map(facts, tile)
    stream = configs.stream(architecture, kind(facts), head_dim)
    map_max = map_max_launch(facts, stream) if facts.stat == "map_max" else None
    maps: tuple[MapsLaunch, ...] = ()
    if facts.map_block:
        maps = strips(facts, configs.stream_backward(architecture, kind(facts), head_dim))
    return Plan(stream_launch(facts, stream, save=bool(maps)), map_max, maps=maps)


def tile_launch(facts: Facts, config: TileConfig) -> Launch:
    """The tile kernel with a configuration, which need not be the one in the table."""
    padded = configs.padded_frames(facts.shape[-3])
    programs = -(-sequences(facts) // config.sequences)
    # A table that all heads share stays in registers where it is small; a Gaussian is computed
    # anew in less time than it would take from the others.
    keep = facts.form in ("symmetric", "signed", "dense") and not facts.per_head
    keep = keep and config.rows == padded <= 64
    if keep:
        programs = min(programs, facts.device.processors * PROGRAMS_PER_PROCESSOR)
    return launch(
        tile_kernel,
        programs,
        facts,
        unused={"stat": facts.stat != "tensor", "map_sums": True},
        chunks=1,
        FRAMES=padded,
        ROWS=config.rows,
        SEQUENCES=config.sequences,
        PERSISTENT=keep,
        MAP=False,
        EVEN=facts.shape[-3] == padded,
        num_warps=config.warps,
    )


def tile_with_map(facts: Facts, config: TileConfig) -> Plan:
    """The tile kernel, whose programs keep the sum of their sequences' maps.

    ``config`` need not be the one in the table; its rows hold the whole map.
    """
    batch, space, frames, heads, _ = five(facts.shape)
    padded = configs.padded_frames(frames)
    tiles = -(-space * heads // config.sequences)
    chunks = min(tiles, -(-facts.device.processors * PROGRAMS_PER_PROCESSOR // batch))
    forward = launch(
        tile_kernel,
        batch * chunks,
        facts,
        unused={"stat": facts.stat != "tensor"},
        chunks=chunks,
        FRAMES=padded,
        ROWS=config.rows,
        SEQUENCES=config.sequences,
        PERSISTENT=False,
        MAP=True,
        EVEN=frames == padded,
        num_warps=config.warps,
    )
    return Plan(forward, map_sums=(batch, chunks, padded, padded))


def stream_launch(facts: Facts, config: StreamConfig, *, save: bool = False) -> Launch:
    """The stream kernel with a configuration, which need not be the one in the table."""
    return launch(
        stream_kernel,
        sequences(facts) * -(-facts.shape[-3] // config.rows),
        facts,
        unused={
            "stat": facts.form == "none" or facts.stat in ("none", "row_max"),
            "lse": not save,
            "weights": not save or facts.form == "none",
        },
        SAVE=save,
        STAGES=config.stages,
        **blocks(facts, config),
    )


def map_max_launch(facts: Facts, config: StreamConfig, **more: Any) -> Launch:
    """The maxima that a stream kernel of the same configuration needs with "map_max"."""
    programs = sequences(facts) * -(-facts.shape[-3] // config.rows)
    constants = {"STAGES": config.stages, **blocks(facts, config), **more}
    return launch(map_max_kernel, programs, facts, unused={}, **constants)


def blocks(facts: Facts, config: StreamConfig) -> dict[str, Any]:
    """The constants of kernels that go through the map by blocks."""
    return {
        "ROWS": config.rows,
        "KEYS": config.keys,
        "EVEN": facts.shape[-3] % max(config.rows, config.keys) == 0,
        "num_warps": config.warps,
    }


def parts(facts: Facts) -> dict[str, int]:
    """A large head's parts, for kernels of gradients and maps; empty: those of ``configs.split``.

    Without matrix instructions a thread multiplies whole rows of a part. Those of a whole head stay
    in registers from one block of the map to the next and leave too few; halves are read again.
    """
    main, rest = configs.split(facts.shape[-1])
    nvidia = facts.device.architecture.startswith("sm_")
    if nvidia and kind(facts) == "ieee" and main >= 128 and not rest:
        return {"MAIN": main // 2, "REST": main // 2}
    return {}


def strips(facts: Facts, config: StreamConfig) -> tuple[MapsLaunch, ...]:
    """The mean map in strips of rows, so that block sums never need all of it.

    ``config`` need not be the one in the table, which is that of the gradients.
    """
    batch, space, frames, heads, _ = five(facts.shape)
    block, config = facts.map_block, config.of("maps")
    strip = frames if block == 1 else block * max(1, MAP_STRIP // block)
    return tuple(
        maps_launch(
            facts,
            config,
            groups=batch,
            count=space * heads,
            stride=space * heads,
            step=1,
            first_row=first_row,
            rows=min(strip, frames - first_row),
            OF_DELTA=False,
            **parts(facts),
        )
        for first_row in range(0, frames, strip)
    )


def maps_launch(
    facts: Facts,
    config: StreamConfig,
    *,
    groups: int,
    count: int,
    rows: int,
    OF_DELTA: bool,
    **more: Any,
) -> MapsLaunch:
    """Sums over ``count`` sequences of each group, in as many chunks as the GPU needs programs."""
    pieces = groups * -(-rows // config.rows) * -(-facts.shape[-3] // config.keys)
    chunks = min(count, -(-facts.device.processors * PROGRAMS_PER_PROCESSOR // pieces))
    made = launch(
        maps_kernel,
        pieces * chunks,
        facts,
        unused={
            "v": not OF_DELTA,
            "grad_out": not OF_DELTA,
            "inner": not OF_DELTA,
            "grad_map": not OF_DELTA or not facts.map_block,
            "weights": facts.form == "none",
        },
        OF_DELTA=OF_DELTA,
        count=count,
        rows=rows,
        chunks=chunks,
        **more,
        **blocks(facts, config),
    )
    return MapsLaunch(**vars(made), shape=(groups, chunks, rows, facts.shape[-3]))
