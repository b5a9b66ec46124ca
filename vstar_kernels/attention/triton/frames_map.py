"""The frame map: sums of its rows' masses, which :mod:`frames_forward` leaves by tiles of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vstar_kernels.attention.triton import frames_plan, plan
from vstar_kernels.attention.triton.devices import DeviceTables
from vstar_kernels.attention.triton.frames_plan import FramesKey
from vstar_kernels.attention.triton.frames_slots import TileTables
from vstar_kernels.attention.triton.launches import Launch


class Tensors(NamedTuple):
    """What the kernel reads and writes."""

    mass: Any  # (batch · heads, entries, columns): what each tile leaves for its rows' frames
    first: Any  # (frames + 1,): where each query frame's entries begin in ``entry``
    entry: Any  # the entries, by query frames
    weight: Any  # (frames,): of a frame's sum
    map: Any  # (batch, [heads,] frames, columns)


@triton.jit(do_not_specialize=["summed_heads", "entries", "frames", "columns"])
def map_kernel(t, summed_heads, entries, frames, columns, COLUMNS: tl.constexpr):
    """One row of the frame map: sums a query frame's entries over ``summed_heads`` heads."""
    i_frame = tl.program_id(0) % frames
    i_map = (tl.program_id(0) // frames).to(tl.int64)  # (batch, heads / summed_heads)
    first = tl.load(t.first + i_frame)
    end = tl.load(t.first + i_frame + 1)
    weight = tl.load(t.weight + i_frame)
    for start in tl.range(0, columns, COLUMNS, num_stages=1):
        o_column = start + tl.arange(0, COLUMNS)
        b_sum = tl.zeros((COLUMNS,), tl.float32)
        for n in tl.range(i_map * summed_heads, (i_map + 1) * summed_heads, num_stages=1):
            for i in tl.range(first, end, num_stages=1):
                o_mass = (n * entries + tl.load(t.entry + i)) * columns + o_column
                b_sum += tl.load(t.mass + o_mass, mask=o_column < columns, other=0.0)
        o_map = (i_map * frames + i_frame) * columns + o_column
        tl.store(t.map + o_map, b_sum * weight, mask=o_column < columns)


@dataclass(frozen=True)
class MapPlan:
    """The map's sums over entries and heads: one launch, after the masses are there."""

    launch: Launch
    mass: tuple[int, ...]  # the shape of the masses

    def to(self, device: torch.device) -> MapPlan:
        """Returns the same with the tables on a device."""
        return replace(self, launch=self.launch.to(device))

    def zeros(self, device: torch.device) -> Tensor:
        """Returns masses for the forward pass to fill, where slots are."""
        return torch.zeros(self.mass, dtype=torch.float32, device=device)

    def sums(self, mass: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns the map."""
        found = plan.new(mass, *shape)
        self.launch.on(mass=mass, map=found)
        return found


def plan_map(key: FramesKey, made: TileTables) -> MapPlan:
    """Returns the launch that sums a call's map."""
    summed = key.heads if key.options.mean_map == "mean" else 1
    entries, columns = made.entry_frame.numel(), key.key_frames + 1
    tables = {
        "first": made.frame_first,
        "entry": made.frame_entries,
        "weight": frames_plan.frame_weights(key),
    }
    launch = Launch(
        map_kernel,
        key.batch * key.heads // summed * key.frames,
        Tensors(*(True for _ in Tensors._fields)),
        (summed, entries, key.frames, columns),
        {"COLUMNS": min(128, triton.next_power_of_2(columns)), "num_warps": 1},
        DeviceTables(tables),
    )
    return MapPlan(launch, (key.batch, key.heads, entries, columns))
