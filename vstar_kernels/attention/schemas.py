"""The operators' schemas and fake implementations.

The C++ library only implements these, so that nothing is missing or defined twice without it. They
take their output from the caller: allocating inside costs a small call several microseconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("vstar_kernels", "DEF")

LIBRARY.define(
    "cpu_forward(Tensor(a!) out, Tensor(b!)? map, Tensor query, Tensor key, Tensor value, "
    "Tensor? bias, Tensor? stat_values, float scale, float strength, int stat, "
    "bool clamp_negative) -> ()"
)
LIBRARY.define(
    "cpu_backward(Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, "
    "Tensor(d!)? grad_bias, Tensor(e!)? grad_stat, Tensor grad_out, Tensor? grad_map, "
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? stat_values, float scale, "
    "float strength, int stat, bool clamp_negative, bool detach_stat) -> ()"
)

# The row statistics' numbers in the schemas; vstar::Stat in bindings/types.h.
STAT_NUMBERS = {"none": 0, "row_max": 1, "map_max": 2}
STAT_TENSOR = 3


def _cpu_forward_fake(
    out: Tensor,
    map: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    stat_values: Tensor | None,
    scale: float,
    strength: float,
    stat: int,
    clamp_negative: bool,
) -> None:
    """It writes ``out`` and ``map`` and returns nothing."""


def _cpu_backward_fake(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_bias: Tensor | None,
    grad_stat: Tensor | None,
    grad_out: Tensor,
    grad_map: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    stat_values: Tensor | None,
    scale: float,
    strength: float,
    stat: int,
    clamp_negative: bool,
    detach_stat: bool,
) -> None:
    """It writes the first five and returns nothing."""


torch.library.register_fake("vstar_kernels::cpu_forward", _cpu_forward_fake, lib=LIBRARY)
torch.library.register_fake("vstar_kernels::cpu_backward", _cpu_backward_fake, lib=LIBRARY)
