"""Runs the backward pass of a problem."""

from __future__ import annotations

import torch
from torch import Tensor

from vstar_kernels.attention.call import Call, Gradients, Wanted, empty_like
from vstar_kernels.attention.triton import launch, plan_backward
from vstar_kernels.attention.triton.facts import STRIDED, Facts, five, sequences
from vstar_kernels.attention.triton.launch import new, on, run_maps
from vstar_kernels.attention.triton.plan_backward import StreamPlan, TilePlan


def run(
    call: Call,
    out: Tensor,
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """The gradients of a call; see :class:`dispatch.Backend`."""
    grad_query, grad_key, grad_value = map(empty_like, (call.query, call.key, call.value))
    query = call.query
    if grad_out is None:
        grad_out = torch.zeros_like(query)
    elif grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    tensors = launch.kernel_tensors(call) | {
        "out": out,
        "grad_out": grad_out,
        "grad_q": grad_query,
        "grad_k": grad_key,
        "grad_v": grad_value,
    }
    if grad_map is not None:
        tensors["grad_map"] = grad_map.contiguous()
    if call.stat is not None:
        tensors["grad_stat"] = torch.empty_like(call.stat)
    grad_delta = torch.zeros_like(call.delta) if wanted.delta and call.delta is not None else None
    if query.numel():
        facts = _facts(call, tensors, wanted, has_map=grad_map is not None)
        with on(query.device):
            grad_matrix = _launch(facts, tensors)
        if grad_matrix is not None:
            grad_delta = call.delta_gradient(grad_matrix if call.delta_per_head else grad_matrix[0])
    grad_stat = tensors.get("grad_stat") if wanted.stat else None
    return Gradients(grad_query, grad_key, grad_value, grad_delta, grad_stat)


def _facts(call: Call, tensors: dict[str, Tensor], wanted: Wanted, *, has_map: bool) -> Facts:
    strides = tuple(tensors[name].stride() for name in STRIDED)
    made = launch.facts(call, strides, tensors["values"].stride())
    return made._replace(
        map_block=call.options.map_block if has_map else 0,
        detach=call.options.detach_stat,
        grad_values=wanted.delta,
        grad_stat_strides=tensors["grad_stat"].stride() if "grad_stat" in tensors else (),
    )


def _launch(facts: Facts, tensors: dict[str, Tensor]) -> Tensor | None:
    """Runs the kernels; returns dΔ, ``(1 or heads, frames, frames)``, where it is wanted."""
    launches = plan_backward.make(facts)
    if isinstance(launches, TilePlan):
        frames = facts.shape[-3]
        tensors["grad_values"] = new(tensors["q"], *launches.grad_values)
        launches.gradients(tensors)
        return tensors["grad_values"].sum(0)[..., :frames, :frames] if facts.grad_values else None
    return _sweep(facts, launches, tensors)


def _sweep(facts: Facts, launches: StreamPlan, tensors: dict[str, Tensor]) -> Tensor | None:
    query = tensors["q"]
    rows = (sequences(facts), facts.shape[-3])
    for name in ("lse", "weights", "inner", "d_weights"):
        tensors[name] = new(query, *rows)
    tensors["columns"] = torch.empty(rows, dtype=torch.int32, device=query.device)
    if launches.map_max is not None:
        maxima = new(query, launches.map_max.programs)
        launches.map_max(tensors | {"maxima": maxima})
        tensors["stat"] = maxima.view(rows[0], -1).amax(1)
    launches.statistics(tensors)
    through_maximum = facts.stat == "map_max" and facts.form != "none"
    if through_maximum:
        row_max, tensors["weights"] = tensors["weights"], tensors["stat"].repeat_interleave(rows[1])
    launches.rows(tensors)
    if through_maximum and not facts.detach:
        _through_map_max(facts, tensors, row_max)
    launches.columns(tensors)
    if launches.grad_values is None:
        return None
    return run_maps(launches.grad_values, tensors)


def _through_map_max(facts: Facts, tensors: dict[str, Tensor], row_max: Tensor) -> None:
    """All of a map's weight gradients go to the one logit that is its maximum."""
    row = row_max.argmax(1, keepdim=True)  # the first of equal ones
    total = tensors["d_weights"].sum(1, keepdim=True)
    if facts.clamp:
        total = torch.where(row_max.amax(1, keepdim=True) >= 0, total, 0.0)
    tensors["d_weights"] = torch.zeros_like(row_max).scatter_(1, row, total)
    column = tensors["columns"].gather(1, row)
    _, space, _, heads, _ = five(facts.shape)
    sequence = torch.arange(row.shape[0], device=row.device)
    place = sequence // heads
    index = (place // space, place % space, row[:, 0], sequence % heads)
    key_index = (*index[:2], column[:, 0].long(), index[3])
    grad_query, key = (_five_d(tensors[name]) for name in ("grad_q", "k"))
    grad_query[index] += (facts.scale * total * key[key_index].float()).to(grad_query.dtype)


def _five_d(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 5 else tensor.unsqueeze(1)
