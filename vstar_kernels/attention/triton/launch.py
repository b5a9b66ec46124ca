"""Runs a problem forward: its facts, its plan, its tensors."""

from __future__ import annotations

import contextlib
import functools
import math

import torch
from torch import Tensor
from triton.runtime import driver

from vstar_kernels.attention.bias import table_frames
from vstar_kernels.attention.call import Call, Forward, block_sums, empty_like
from vstar_kernels.attention.triton import plan
from vstar_kernels.attention.triton.facts import INT32_MAX, Device, Facts, Strides
from vstar_kernels.attention.triton.plan import MapsLaunch, Plan


def run(call: Call) -> Forward:
    """Computes the output, and the mean map where it is wanted."""
    query = call.query
    out = empty_like(query)
    if not out.numel():
        return Forward(out, new(query, *call.map_shape).zero_() if call.options.map_block else None)
    tensors = kernel_tensors(call)
    tensors["out"] = out
    strides = (query.stride(), tensors["k"].stride(), tensors["v"].stride(), out.stride())
    launches = plan.make(facts(call, strides, tensors["values"].stride()))
    with on(query.device):
        if launches.map_max is not None:
            tensors["maxima"] = tensors["stat"] = new(query, launches.map_max.programs)
            launches.map_max(tensors)
        if call.options.map_block:
            return Forward(out, _run_with_map(call, launches, tensors))
        launches.forward(tensors)
    return Forward(out)


def _run_with_map(call: Call, launches: Plan, tensors: dict[str, Tensor]) -> Tensor:
    """Runs the kernels and returns the mean map."""
    query, frames, block = tensors["q"], call.frames, call.options.map_block
    rows = math.prod(call.shape[:-1])
    share = call.shape[0] * frames / rows  # 1 / (space · heads)
    if launches.map_sums:
        tensors["map_sums"] = new(query, *launches.map_sums)
        launches.forward(tensors)
        sums = tensors["map_sums"].sum(1)[:, :frames, :frames]
        return block_sums(sums * share, block)
    tensors["lse"], tensors["weights"] = new(query, rows), new(query, rows)
    launches.forward(tensors)
    strips = [run_maps(strip, tensors) for strip in launches.maps]
    return torch.cat([block_sums(strip * share, block) for strip in strips], dim=1)


def run_maps(launch: MapsLaunch, tensors: dict[str, Tensor]) -> Tensor:
    """What a launch of :func:`plan.maps_launch` sums, ``(groups, rows, frames)``."""
    tensors["sums"] = new(tensors["q"], *launch.shape)
    launch(tensors)
    return tensors["sums"].sum(1)


def kernel_tensors(call: Call) -> dict[str, Tensor]:
    """The call's tensors by the names that they have in the kernels."""
    query = call.query
    values = query if call.delta is None else call.delta
    if values.device != query.device:
        values = values.to(query.device)
    return {
        "q": query,
        "k": call.key,
        "v": call.value,
        "values": values,
        "stat": query if call.stat is None else call.stat,
    }


def facts(call: Call, strides: tuple[Strides, ...], values_strides: Strides) -> Facts:
    """What the plan of a call depends on."""
    options = call.options
    return Facts(
        _device(call.device),
        call.dtype,
        torch.get_float32_matmul_precision() == "highest",
        tuple(call.shape),
        strides,
        options.scale,
        options.strength,
        options.form,
        options.sigma,
        _delta_strides(call, values_strides),
        call.delta_per_head,
        options.stat,
        () if call.stat is None else call.stat.stride(),
        options.clamp_negative,
        options.map_block,
    )


def new(like: Tensor, *shape: int) -> Tensor:
    """A float32 tensor for a kernel to fill."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _delta_strides(call: Call, strides: Strides) -> Strides:
    """The strides of ``regularization``: of heads, then as Δ's form reads them."""
    if call.delta is None:
        return (0, 0, 0)
    head = strides[0] if call.delta_per_head else 0
    if call.options.form == "dense":
        return (head, *strides[-2:])
    if call.options.form == "signed":
        return (head, table_frames("signed", call.delta) - 1, strides[-1])
    return (head, 0, strides[-1])


@functools.cache
def _device(device: torch.device) -> Device:
    if device.type == "cpu":  # interpreted: any architecture's configuration does
        return Device("sm_80", INT32_MAX, processors=1)
    properties = driver.active.utils.get_device_properties(device.index)
    return Device(
        _architecture(device), properties["max_shared_mem"], properties["multiprocessor_count"]
    )


def _architecture(device: torch.device) -> str:
    """The one of ``configs.ARCHITECTURES`` whose configurations suit a GPU."""
    if torch.version.hip:
        return "gfx942"
    generation = torch.cuda.get_device_capability(device)[0]
    if generation in (9, 10):
        return f"sm_{generation}0"
    return "sm_80"  # 12.x, consumer Blackwell, has the memory and the matrix instructions of 8.x


def on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Where Triton launches: on the current device."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
