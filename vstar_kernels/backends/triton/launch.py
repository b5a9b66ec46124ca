"""Runs a problem: its facts, its plan, its tensors."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor
from triton.runtime import driver

from vstar_kernels.backends.triton import plan
from vstar_kernels.backends.triton.plan import Device, Facts, Strides
from vstar_kernels.bias import Bias, DenseBias, GaussianBias
from vstar_kernels.problem import Problem


def run(problem: Problem) -> Tensor:
    """The output of a problem that the backend can run."""
    tensors = problem.tensors
    query = tensors["query"]
    out = torch.empty_like(query)
    if out.stride(-1) != 1:  # of a query with expanded dimensions, whose order means nothing
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    values = tensors.get("values", query)
    if values.device != query.device:
        values = values.to(query.device)
    stat = tensors.get("stat", query)
    launches = plan.make(facts(problem, out.stride(), values.stride()))
    with _on(query.device):
        if launches.map_max is not None:
            stat = query.new_empty(launches.map_max.programs, dtype=torch.float32)
            launches.map_max(query, tensors["key"], stat)
        launches.forward(query, tensors["key"], tensors["value"], out, values, stat)
    return out


def facts(problem: Problem, out_strides: Strides, values_strides: Strides) -> Facts:
    """What the plan of a problem depends on."""
    tensors, bias = problem.tensors, problem.bias
    strides = (
        tensors["query"].stride(),
        tensors["key"].stride(),
        tensors["value"].stride(),
        out_strides,
    )
    stat: str | Tensor = "none" if bias is None else bias.stat
    form, values_strides = _form(bias, values_strides)
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
        stat if isinstance(stat, str) else "tensor",
        () if isinstance(stat, str) else stat.stride(),
        bias is not None and bias.clamp_negative,
    )


def _form(bias: Bias | None, strides: Strides) -> tuple[str, Strides]:
    """Δ's form in the kernels, and the strides of its values as ``regularization`` reads them."""
    if bias is None:
        return "none", (0, 0, 0)
    if isinstance(bias, GaussianBias):
        return "gaussian", (0, 0, 0)
    if isinstance(bias, DenseBias):
        return "dense", strides if len(strides) == 3 else (0, *strides)
    head = strides[0] if len(strides) == 2 else 0
    if bias.signed:
        return "signed", (head, bias.max_frames - 1, strides[-1])
    return "symmetric", (head, 0, strides[-1])


@functools.cache
def _device(device: torch.device) -> Device:
    if device.type == "cpu":  # interpreted: any architecture's configuration does
        return Device("sm_80", plan.INT32_MAX, processors=1)
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


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
