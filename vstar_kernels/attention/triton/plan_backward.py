"""What to launch for the gradients of a call."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from vstar_kernels.attention.triton import configs
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig
from vstar_kernels.attention.triton.facts import Facts, five, kind, sequences
from vstar_kernels.attention.triton.plan import (
    PROGRAMS_PER_PROCESSOR,
    Launch,
    MapsLaunch,
    blocks,
    launch,
    map_max_launch,
    maps_launch,
    parts,
)
from vstar_kernels.attention.triton.stream_backward import (
    columns_kernel,
    rows_kernel,
    statistics_kernel,
)
from vstar_kernels.attention.triton.tile_backward import tile_backward_kernel

# Frames, and those by the head's width, up to which the sum of dΔ fits the registers beside a tile.
LARGEST_VALUES_TILE = 32
LARGEST_VALUES_TILE_ELEMENTS = 32 * 128


@dataclass(frozen=True)
class TilePlan:
    """One launch; with ``grad_values`` it leaves sums of dΔ of that shape."""

    gradients: Launch
    grad_values: tuple[int, ...] = ()


@dataclass(frozen=True)
class StreamPlan:
    """Three sweeps; before them one for the maps' maxima, after them one for Δ's gradient."""

    map_max: Launch | None
    statistics: Launch
    rows: Launch
    columns: Launch
    grad_values: MapsLaunch | None


@functools.lru_cache(maxsize=4096)
def make(facts: Facts) -> TilePlan | StreamPlan:
    """The plan of a backward pass."""
    architecture, frames, head_dim = facts.device.architecture, facts.shape[-3], facts.shape[-1]
    tile = configs.tile_backward(architecture, kind(facts), frames, head_dim)
    if facts.grad_values and not sums_values(facts):
        tile = None
    if tile is not None and tile.shared <= facts.device.shared:
        return tile_plan(facts, tile)
    return stream_plan(facts, configs.stream_backward(architecture, kind(facts), head_dim))


def sums_values(facts: Facts) -> bool:
    """Whether a tile leaves registers for the sum of dΔ over sequences."""
    padded = configs.padded_frames(facts.shape[-3])
    elements = padded * configs.width(facts.shape[-1])
    return padded <= LARGEST_VALUES_TILE and elements <= LARGEST_VALUES_TILE_ELEMENTS


def delta_groups(facts: Facts) -> int:
    """How many different Δ there are: one for each head, or one."""
    return five(facts.shape)[3] if facts.per_head else 1


def tile_plan(facts: Facts, config: TileConfig) -> TilePlan:
    """The tile kernel with a configuration, which need not be the one in the table."""
    padded = configs.padded_frames(facts.shape[-3])
    step = delta_groups(facts)
    packed = 1 if facts.grad_values else config.sequences
    programs = -(-sequences(facts) // packed)
    shape: tuple[int, ...] = ()
    if facts.grad_values:
        chunks = -(-facts.device.processors * PROGRAMS_PER_PROCESSOR // step)
        chunks = min(chunks, sequences(facts) // step)
        programs = chunks * step
        shape = (chunks, step, padded, padded)
    gradients = launch(
        tile_backward_kernel,
        programs,
        facts,
        unused={
            "stat": facts.stat != "tensor",
            "grad_values": not facts.grad_values,
            "grad_stat": facts.stat != "tensor" or facts.form == "none" or facts.detach,
            "grad_map": not facts.map_block,
        },
        step=step,
        FRAMES=padded,
        SEQUENCES=packed,
        EVEN=facts.shape[-3] == padded,
        num_warps=config.warps,
    )
    return TilePlan(gradients, shape)


def stream_plan(facts: Facts, config: StreamConfig) -> StreamPlan:
    """The stream kernels with a configuration, which need not be the one in the table."""
    frames, split = facts.shape[-3], parts(facts)
    grad_values = None
    if facts.grad_values:
        groups = delta_groups(facts)
        grad_values = maps_launch(
            facts,
            config.of("grad_values"),
            groups=groups,
            count=sequences(facts) // groups,
            stride=1,
            step=groups,
            first_row=0,
            rows=frames,
            OF_DELTA=True,
            **split,
        )

    plain = facts.form == "none"
    constant = plain or facts.stat == "none" or facts.detach  # no gradient through the statistic

    def sweep(kernel: Any, name: str, side: str, **unused: bool) -> Launch:
        own = config.of(name)
        programs = sequences(facts) * -(-frames // getattr(own, side))
        unused |= {"grad_map": not facts.map_block, "weights": plain}
        return launch(kernel, programs, facts, unused=unused, **blocks(facts, own), **split)

    return StreamPlan(
        map_max_launch(facts, config.of("map_max"), **split) if facts.stat == "map_max" else None,
        sweep(
            statistics_kernel,
            "statistics",
            "rows",
            stat=plain or facts.stat in ("none", "row_max"),
            columns=plain,
        ),
        sweep(
            rows_kernel,
            "rows",
            "rows",
            grad_stat=constant or facts.stat != "tensor",
            columns=constant or facts.stat != "row_max",
            d_weights=constant or facts.stat == "tensor",
        ),
        sweep(
            columns_kernel,
            "columns",
            "keys",
            columns=constant or facts.stat == "tensor",
            d_weights=constant or facts.stat == "tensor",
        ),
        grad_values,
    )
