"""Runs a problem forward: its facts, its plan, its tensors."""

from __future__ import annotations

import contextlib
import functools
import math

import torch
from torch import Tensor
from triton.runtime import driver

from vstar_kernels.attention.allocate import empty_like
from vstar_kernels.attention.bias import Bias, DenseBias, GaussianBias
from vstar_kernels.attention.blocks import block_sums
from vstar_kernels.attention.call import Problem
from vstar_kernels.attention.triton import plan
from vstar_kernels.attention.triton.facts import INT32_MAX, Device, Facts, Strides
from vstar_kernels.attention.triton.plan import MapsLaunch, Plan


def run(problem: Problem) -> Tensor | tuple[Tensor, Tensor]:
    """The output, or ``(output, map)``, of a problem that the backend can run."""
    query = problem.tensors["query"]
    out = empty_like(query)
    if not out.numel():
        return (out, new(query, *problem.map_shape).zero_()) if problem.return_map else out
    tensors = kernel_tensors(problem)
    tensors["out"] = out
    strides = (query.stride(), tensors["k"].stride(), tensors["v"].stride(), out.stride())
    launches = plan.make(facts(problem, strides, tensors["values"].stride()))
    with on(query.device):
        if launches.map_max is not None:
            tensors["maxima"] = tensors["stat"] = new(query, launches.map_max.programs)
            launches.map_max(tensors)
        if problem.return_map:
            return out, _run_with_map(problem, launches, tensors)
        launches.forward(tensors)
    return out


def _run_with_map(problem: Problem, launches: Plan, tensors: dict[str, Tensor]) -> Tensor:
    """Runs the kernels and returns the mean map."""
    query, frames, block = tensors["q"], problem.frames, problem.map_block
    rows = math.prod(problem.shape[:-1])
    share = problem.shape[0] * frames / rows  # 1 / (space · heads)
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


def kernel_tensors(problem: Problem) -> dict[str, Tensor]:
    """The problem's tensors by the names that they have in the kernels."""
    tensors = problem.tensors
    query = tensors["query"]
    values = tensors.get("values", query)
    if values.device != query.device:
        values = values.to(query.device)
    return {
        "q": query,
        "k": tensors["key"],
        "v": tensors["value"],
        "values": values,
        "stat": tensors.get("stat", query),
    }


def facts(problem: Problem, strides: tuple[Strides, ...], values_strides: Strides) -> Facts:
    """What the plan of a problem depends on."""
    bias = problem.bias
    stat: str | Tensor = "none" if bias is None else bias.stat
    form, per_head, values_strides = _form(bias, values_strides)
    return Facts(
        _device(problem.device),
        problem.dtype,
        torch.get_float32_matmul_precision() == "highest",
        problem.shape,
        strides,
        problem.scale,
        0.0 if bias is None else bias.strength,
        form,
        bias.sigma if isinstance(bias, GaussianBias) else 0.0,
        values_strides,
        per_head,
        stat if isinstance(stat, str) else "tensor",
        () if isinstance(stat, str) else stat.stride(),
        bias is not None and bias.clamp_negative,
        problem.map_block if problem.return_map else 0,
    )


def new(like: Tensor, *shape: int) -> Tensor:
    """A float32 tensor for a kernel to fill."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _form(bias: Bias | None, strides: Strides) -> tuple[str, bool, Strides]:
    """Δ's form in the kernels, whether heads differ, and the strides of ``regularization``."""
    if bias is None:
        return "none", False, (0, 0, 0)
    if isinstance(bias, GaussianBias):
        return "gaussian", False, (0, 0, 0)
    if isinstance(bias, DenseBias):
        return "dense", len(strides) == 3, strides if len(strides) == 3 else (0, *strides)
    head = strides[0] if len(strides) == 2 else 0
    if bias.signed:
        return "signed", len(strides) == 2, (head, bias.max_frames - 1, strides[-1])
    return "symmetric", len(strides) == 2, (head, 0, strides[-1])


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
