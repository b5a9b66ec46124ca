"""The maps between a grid image's frames, for ``capture_maps`` (ETC, Fig. 11)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.analysis.maps import frame_map
from vstar_kernels.attention.frames.layout import Layout
from vstar_kernels.models.front_end import modules_of
from vstar_kernels.models.grid.apply import grid_model_of
from vstar_kernels.models.grid.model import GridModel, GridRegularization
from vstar_kernels.models.layers import OVERRIDE_MAPS, Regularization


def find_grids(pipe_or_model: Any) -> dict[str, GridModel]:
    """Returns what ``apply_grid`` put on the models of a pipeline, by their names there."""
    modules = modules_of(pipe_or_model)
    found = {name: grid_model_of(module) for name, module in modules.items()}
    return {
        name: grid
        for name, grid in found.items()
        if grid is not None and grid.model is modules[name]
    }


def overridden_map(change: Regularization, batch: int, heads: int | None) -> tuple[Tensor, int]:
    """Returns the map that takes the place of a layer's own, as :func:`grid_map` returns maps.

    Args:
        change: How the layer attends.
        batch: Of the maps.
        heads: Of the maps; None for their mean.
    """
    layout = _layout(change)
    assert change.override is not None
    map_ = nn.functional.pad(OVERRIDE_MAPS[change.override](layout.frames), (0, 1))
    shape = (batch,) if heads is None else (batch, heads)
    return map_.repeat(*shape, 1, 1), layout.frame_tokens[0]


def grid_map(
    change: Regularization,
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    heads: bool,
    max_rows: int,
) -> tuple[Tensor, int]:
    """Returns the map between frames in the order of time, and of how many tokens it is the mean.

    Args:
        change: How the layer attends.
        query, key: ``(batch, tokens, heads, head_dim)``, in the image's order.
        scale, heads, max_rows: Of :func:`vstar_kernels.analysis.maps.frame_map`.

    Returns:
        ``(batch, frames, frames + 1)``, or ``(batch, heads, frames, frames + 1)``; there is no
        text in the last column.

    Raises:
        RuntimeError: The model is no longer under ``apply_grid``.
    """
    layout = _layout(change)
    rule = change.rule if isinstance(change, GridRegularization) else None
    found, positions = frame_map(
        query, key, layout, rule, scale=scale, heads=heads, max_rows=max_rows
    )
    by_time = torch.tensor(layout.order(), device=found.device)
    text = torch.tensor([layout.frames], device=found.device)
    return found[..., by_time, :][..., torch.cat([by_time, text])], positions


def _layout(change: Regularization) -> Layout:
    if not isinstance(change, GridRegularization) or change.layout is None:
        raise RuntimeError(
            "apply_grid was removed while its maps are captured: remove capture_maps first"
        )
    return change.layout
