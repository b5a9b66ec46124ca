"""A model's mean attention maps while it samples (VSTAR, arXiv 2403.13501, Figs. 3, 10, S.10).

Nothing in the model is replaced: watches see its layers, and compute the maps next to what it
computes. Whatever else is done to the model meanwhile, in whatever order, is seen as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from vstar_kernels.attention.bias import check_flag
from vstar_kernels.attention.frames.layout import Layout, check_count
from vstar_kernels.models.front_end import (
    find_front_end,
    models_with_temporal_attention,
    temporal_layers,
)
from vstar_kernels.models.full3d.apply import chooser, find_full3d
from vstar_kernels.models.full3d.capture import FrameWatch
from vstar_kernels.models.full3d.config import checked_layers
from vstar_kernels.models.full3d.families import Family, known_models
from vstar_kernels.models.grid.capture import find_grids
from vstar_kernels.models.hooks import is_compiled
from vstar_kernels.models.layers import LayerChoice, layer_chooser
from vstar_kernels.models.map_capture import Chooses, MapCapture, Watch
from vstar_kernels.models.schedule import ChosenSteps, as_indices, scheduler_of
from vstar_kernels.models.temporal_capture import ModelWatch


def capture_maps(
    pipe_or_model: Any,
    *,
    steps: Collection[int] | None = None,
    layers: LayerChoice = None,
    scheduler: Any = None,
    max_rows: int = 256,
    differentiable: bool = False,
    map_heads: bool = False,
    layout: Layout | None = None,
) -> MapCapture:
    """Collects the mean temporal attention maps of a model while it runs.

    >>> with vk.capture_maps(pipe, steps=[0, 13], layers=lambda layer: layer.level == 0) as capture:
    ...     video = pipe(prompt).frames
    >>> capture.mean(place="up", step=13)  # (2, 16, 16): without and with the prompt

    Where the model is called for each side of guidance in turn (lvdm, Wan), a map's ``branch`` says
    which. A model that no pipeline calls, without a ``scheduler`` whose timesteps are set for each
    run, needs :meth:`MapCapture.clear` between runs that begin alike.

    Of a full-3D transformer (Wan, HunyuanVideo and what else :func:`vstar_kernels.apply_frames`
    knows) and of an image UNet under :func:`vstar_kernels.apply_grid` these are maps between
    frames, :class:`~vstar_kernels.analysis.FrameMap`.

    It sees what runs: under :func:`vstar_kernels.apply_tar` or ``apply_frames`` the changed map A′,
    elsewhere the plain A. The model's output stays the same, bit for bit. Each map is computed a
    second time for it: of all positions where one of the kernels gives maps, otherwise by the
    reference from some of them, at equal distances.

    Memory is ``layers × steps × batch × frames² × 4`` bytes: choose ``layers`` and ``steps`` for
    long videos.

    Args:
        pipe_or_model: As for :func:`vstar_kernels.apply_tar`, but not compiled.
        steps: Indices of denoising steps; None is all.
        layers: Whether to capture a :class:`TemporalLayer`, or a layer of a full-3D transformer,
            which has a ``name`` and an ``index``; or levels and names of layers, ``[0, "init"]``,
            and of a full-3D transformer indices. None is all, ``transformer_in`` too. Layers of a
            full-3D transformer that a cache skips give no map.
        scheduler: Tells the step of a timestep; None is the pipeline's own. A model by itself needs
            it for ``steps``, unless :attr:`MapCapture.step` is set.
        max_rows: For the reference, from how many rows (batch × positions) of a layer a map is
            computed at most; at least one position of each batch element.
        differentiable: Keep the maps on the model's device and in autograd's graph, wherever
            gradients are enabled. Call ``backward()`` before the handle is removed: a model with
            gradient checkpointing then runs its layers again.
        map_heads: Keep the map of each head too: ``AttentionMap.heads``.
        layout: Of full-3D transformers, which frame each token belongs to, where that is not what
            the model's arguments say.

    Returns:
        A handle: a context manager, with ``remove()``, which keeps its maps afterwards.

    Raises:
        TypeError: ``pipe_or_model`` or another argument is of the wrong kind.
        ValueError: It has no temporal attention or is compiled, ``layers`` chooses none or names
            what there is not, or ``max_rows`` is less than 1. At a forward pass: the step
            cannot be known, or the tokens are not those of the layout.
        RuntimeError: At a forward pass: a layer was not called, or its projections were not
            (``fuse_qkv_projections``), or it was called several times (FreeNoise).
    """
    check_count(max_rows, "max_rows", 1)
    check_flag(differentiable, "differentiable")
    check_flag(map_heads, "map_heads")
    wanted = as_indices("steps", steps, "indices of denoising steps or None")
    full3d = find_full3d(pipe_or_model, layout)
    grids = {} if full3d else find_grids(pipe_or_model)
    models = {name: grid.model for name, grid in grids.items()}
    if not full3d and not grids:
        models = _temporal_models(pipe_or_model)
    if layout is not None and not full3d:
        raise ValueError("layout is for full-3D transformers, of which there is none")
    for name, model in {**models, **{name: model for name, (model, _) in full3d.items()}}.items():
        if is_compiled(pipe_or_model, name, model):
            raise ValueError(f"maps of a compiled {type(model).__name__} cannot be captured")
    every: list[Any] = [
        layer
        for name, model in models.items()
        for layer in (grids[name].layers if name in grids else temporal_layers(model))
    ]
    every += [layer for model, family in full3d.values() for layer in family.find_layers(model)]
    chooses = _chooser(layers, full3d, every)
    if not any(chooses(layer) for layer in every):
        raise ValueError("layers chooses none of the temporal attention layers")

    capture = MapCapture(
        ChosenSteps(wanted, scheduler_of(pipe_or_model, scheduler)),
        chooses,
        max_rows,
        differentiable,
    )
    watches: list[Watch] = [
        ModelWatch(
            capture,
            name,
            model,
            grids[name].front_end if name in grids else find_front_end(model),
            heads=map_heads,
        )
        for name, model in models.items()
    ]
    watches += [
        FrameWatch(capture, name, model, family, layout=layout, heads=map_heads)
        for name, (model, family) in full3d.items()
    ]
    return capture.install(watches)


def _temporal_models(pipe_or_model: Any) -> dict[str, nn.Module]:
    try:
        return models_with_temporal_attention(pipe_or_model)
    except ValueError as error:
        raise ValueError(f"{error}; full-3D transformers that are: {known_models()}") from None


def _chooser(
    layers: Any, full3d: dict[str, tuple[nn.Module, Family]], every: Sequence[Any]
) -> Chooses:
    if not full3d:
        return layer_chooser(layers, every)
    layers = checked_layers(layers)
    found: list[Any] = [chooser(layers, family, model) for model, family in full3d.values()]
    return found[0]  # as all of them do: by what they are asked of, or by the same indices
