"""A model's mean attention maps while it samples (VSTAR, arXiv 2403.13501, Figs. 3, 10, S.10).

Nothing in the model is replaced. Hooks watch the queries and keys of each temporal attention layer,
and the map is computed from them next to what the model computes. Whatever else is done to the
model meanwhile, in whatever order, is seen as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.analysis.maps import (
    AttentionMap,
    FrameMap,
    Level,
    Place,
    find_maps,
    mean_map,
)
from vstar_kernels.attention.bias import check_flag
from vstar_kernels.attention.frames.layout import Layout, check_count
from vstar_kernels.models.conditional import in_conditional_passes
from vstar_kernels.models.forwards import ForwardPass, ForwardPasses, unwatch, watch
from vstar_kernels.models.front_end import (
    FrontEnd,
    find_front_end,
    models_with_temporal_attention,
    temporal_layers,
)
from vstar_kernels.models.full3d.apply import chooser, find_full3d
from vstar_kernels.models.full3d.capture import FrameWatch
from vstar_kernels.models.full3d.config import checked_layers
from vstar_kernels.models.full3d.families import Family, known_models
from vstar_kernels.models.full3d.seats import FrameLayer
from vstar_kernels.models.grid.capture import find_grids, grid_map, overridden_map
from vstar_kernels.models.grid.model import GridFrontEnd
from vstar_kernels.models.hooks import (
    Argument,
    Hooks,
    ModelCall,
    is_compiled,
    put_back,
)
from vstar_kernels.models.layers import (
    OVERRIDE_MAPS,
    PLAIN,
    LayerChoice,
    RegularizedAttention,
    TemporalLayer,
    layer_chooser,
)
from vstar_kernels.models.schedule import (
    ChosenSteps,
    SteppedHandle,
    as_indices,
    scheduler_of,
    timestep_value,
)
from vstar_kernels.models.sharded.parts import running_part

Layer = TemporalLayer | FrameLayer
Chooses = Callable[[Layer], bool]


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
    watches: list[ModelWatch | FrameWatch] = [
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


class MapCapture(SteppedHandle):
    """The maps that :func:`capture_maps` captures: a context manager, with :meth:`remove`.

    Attributes:
        chooses, max_rows, differentiable: See ``layers`` and the others of :func:`capture_maps`.
        steps: Which steps, and what they are known by.
    """

    def __init__(
        self,
        steps: ChosenSteps,
        chooses: Chooses,
        max_rows: int,
        differentiable: bool,
    ) -> None:
        super().__init__(steps.announced)
        self.chooses = chooses
        self.max_rows = max_rows
        self.differentiable = differentiable
        self.steps = steps
        self._maps: dict[tuple[Any, ...], AttentionMap] = {}
        self._lock = threading.RLock()  # of the maps
        self._watches: list[ModelWatch | FrameWatch] = []

    def install(self, watches: list[ModelWatch | FrameWatch]) -> MapCapture:
        """Puts on what watches the models; what has been put on is taken off if one cannot be.

        Returns itself, so that no interrupt comes between the last of them and what takes it off.
        """
        self._watches = watches
        try:
            for watch_ in watches:
                watch_.install()
            return self
        except BaseException:
            self.remove()
            raise

    @property
    def maps(self) -> list[AttentionMap]:
        """The maps captured so far, in the order of the layers' first calls.

        Warns where there are none because the model was called at no step that ``steps`` names.
        """
        if not self._maps:
            self.steps.warn_without_maps()
        return list(self._maps.values())

    def mean(
        self,
        *,
        level: Level | None = None,
        place: Place | None = None,
        step: int | None = None,
        model: str | None = None,
        branch: int | None = 0,
    ) -> Tensor:
        """Returns the mean of the maps of a level, place, step and model, each None for all.

        ``branch`` is the side of guidance (see :class:`AttentionMap`), None for both.

        Returns:
            ``(batch, frames, frames)``; the batch is not averaged.

        Raises:
            ValueError: There is none.
        """
        maps = find_maps(
            self._maps.values(), level=level, place=place, step=step, model=model, branch=branch
        )
        return torch.stack([item.map for item in maps]).mean(dim=0)

    def clear(self) -> None:
        """Forgets the maps captured so far; the next call is the first of its step."""
        with self._lock:
            self._maps = {}
            self.steps.forget()
        for watch_ in self._watches:
            watch_.passes.turns.forget()

    def remove(self) -> None:
        """Takes the hooks off, and keeps the maps; nothing happens the second time."""
        super().remove()
        put_back(*(watch_.remove for watch_ in self._watches))

    def add(self, found: Sequence[AttentionMap]) -> None:
        """Keeps the maps of a forward pass, or takes each into the mean of its kind."""
        with self._lock:
            maps = dict(self._maps)
            for new in found:
                key = (new.model, new.layer, new.step, new.timestep, new.branch)
                if key in maps:
                    maps[key] = replace(maps[key])
                    maps[key].add(new)
                else:
                    maps[key] = new
            self._maps = maps  # all of them, or where something is raised none


class _WatchedPass(ForwardPass):
    """One forward pass of a model whose maps are watched, and the maps that it has given so far.

    Args:
        call: The facts of the call.
        step: The index of the denoising step, if it is known.
        branch: The side of guidance, see :class:`AttentionMap`.
        wanted: The names of the layers that are to be captured.
        keeps_graph: Whether the maps are in autograd's graph.
    """

    def __init__(
        self,
        call: ModelCall,
        step: int | None,
        branch: int,
        wanted: set[str],
        *,
        keeps_graph: bool,
    ) -> None:
        super().__init__()
        self.batch: int = call.sample.shape[0]
        self.step = step
        self.branch = branch
        self.timestep = timestep_value(call.timestep)
        self.wanted = wanted
        self.keeps_graph = keeps_graph
        self.uncalled = set(wanted)
        self.maps: list[AttentionMap] = []
        # By thread, as backward passes of several devices may call one layer again at a time.
        self.projected: dict[tuple[int, str, str], Tensor] = {}

    def end(self) -> None:
        """Lets go of what it holds of the model's activations."""
        super().end()
        self.maps, self.projected = [], {}

    def take_projected(self, layer: str) -> dict[str, Tensor]:
        """Returns what a layer's projections have made in this thread, and forgets it."""
        thread = threading.get_ident()
        found = {name: self.projected.pop((thread, layer, name), None) for name in ("query", "key")}
        return {name: output for name, output in found.items() if output is not None}

    def is_like(self, other: Any) -> bool:
        """Returns whether a layer that is called again has a map of the same kind in both."""
        return bool(
            (self.batch, self.wanted, self.keeps_graph)
            == (other.batch, other.wanted, other.keeps_graph)
        )

    @property
    def is_running(self) -> bool:
        """Whether it has not ended; gradient checkpointing calls layers after that."""
        return self.ended is None


class ModelWatch:
    """The hooks on one model and its layers, which capture the maps of its forward passes.

    :meth:`install` and :meth:`remove` are for all forward passes, :meth:`during` for a single one.

    Args:
        capture: What takes the maps, and says which ones it wants.
        name: The model's name in its pipeline.
        model: The model.
        front_end: What knows it.
        heads: Whether to keep the map of each head.

    Attributes:
        passes: Its forward passes.
    """

    def __init__(
        self,
        capture: MapCapture,
        name: str,
        model: nn.Module,
        front_end: FrontEnd,
        *,
        heads: bool = False,
    ) -> None:
        self._capture = capture
        self._name = name
        self._model = model
        self._front_end = front_end
        self._heads = heads
        self.passes: ForwardPasses[_WatchedPass] = ForwardPasses()
        self._hooks = Hooks()
        self._layers: dict[str, _LayerWatch] = {}
        self._lock = threading.RLock()  # of the hooks
        self._removed = False

    def install(self) -> None:
        """Puts the hooks on the model; those on its layers come with the first forward pass."""
        watch(self._model, self.passes)
        self._hooks.before(self._model, self._begin)
        self._hooks.after(self._model, self._end)

    def remove(self) -> None:
        """Takes all hooks off; nothing happens the second time."""
        with self._lock:
            put_back(
                self._close,
                self._hooks.remove,
                *(layer.hooks.remove for layer in self._layers.values()),
                lambda: unwatch(self._model, self.passes),
            )

    @contextmanager
    def during(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Captures the maps of one call of the model, for who wraps its calls; no other follows.

        Args:
            args, kwargs: What the model is called with.
        """
        outer = self.passes.enter()
        try:
            self._begin(self._model, args, kwargs)
            yield
            self._end()
        finally:
            put_back(
                self._close,
                lambda: self.passes.leave(outer, failed=False),
                *(layer.hooks.remove for layer in self._layers.values()),
            )

    def _close(self) -> None:
        self._removed = True
        self.passes.close()

    def _begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        if kwargs is None:  # another thread has just taken the hook off
            return
        call = self._front_end.read_call(model, args, kwargs)
        step = self._capture.steps.find(self._model, call.timestep, call.step)
        is_wanted = self._capture.steps.wants(step) and not in_conditional_passes()
        wanted = self._watch_layers() if is_wanted else set()
        keeps_graph = self._capture.differentiable and torch.is_grad_enabled()
        in_turns = self._front_end.guides_in_turns
        branch = call.branch
        if in_turns:
            scheduler = self._capture.steps.find_scheduler(self._model)
            branch = self.passes.turns.branch(call.timestep, call.sample, scheduler)
        self.passes.begin(_WatchedPass(call, step, branch, wanted, keeps_graph=keeps_graph))

    def _end(self, *_: object) -> None:
        forward = self.passes.current()
        if forward is None or forward.is_cut:
            return
        if forward.uncalled:
            raise RuntimeError(
                f"{min(forward.uncalled)} was not called in this forward pass, or is compiled: "
                "give capture_maps layers= that leave it out"
            )
        self._capture.add(forward.maps)

    def _watch_layers(self) -> set[str]:
        """Puts hooks on the layers that are to be captured, where they have none yet.

        Layers and projections may have been replaced since the last forward pass (FreeNoise, LoRA).
        """
        layers = [x for x in self._front_end.layers(self._model) if self._capture.chooses(x)]
        with self._lock:
            for layer in [] if self._removed else layers:
                old = self._layers.get(layer.name)
                if old is None or not old.is_on(layer):
                    new = _LayerWatch(self, layer)
                    self._layers[layer.name] = new  # before the hooks, so that they can be undone
                    if old is not None:
                        old.hooks.remove()
                    new.install()
        return {layer.name for layer in layers}

    def current(self) -> _WatchedPass | None:
        """Returns the forward pass in which a layer is called; None where it is not captured."""
        forward = self.passes.current()
        return None if forward is None or self._removed else forward

    def mean_map(
        self,
        layer: TemporalLayer,
        forward: _WatchedPass,
        shape: torch.Size,
        projected: dict[str, Tensor],
    ) -> tuple[Tensor, int]:
        """Returns the map of a layer's call and the number of positions that it is the mean of.

        Args:
            layer: The layer.
            forward: The forward pass that it is called in.
            shape: Of its input, ``(rows, frames, channels)``; of what it projects, where that is
                known, as motion modules of ComfyUI are given frames as rows.
            projected: The outputs of its query and key projections, by name.
        """
        rows, frames, _ = shape
        batch, part = forward.batch, running_part(self._model)
        if rows % batch or (forward.is_running and layer.name not in forward.uncalled):
            raise RuntimeError(
                f"{layer.name} was called with a part of the video (FreeNoise, split inference), "
                "and capture_maps cannot put the parts together"
            )
        module: Any = layer.module
        attention = self._front_end.get_attention(module)
        is_ours = isinstance(attention, RegularizedAttention)
        regularization = attention.regularization() if is_ours else PLAIN
        is_grid = isinstance(self._front_end, GridFrontEnd)
        if regularization.override is not None:
            if is_grid:
                return overridden_map(regularization, batch, module.heads if self._heads else None)
            map_ = OVERRIDE_MAPS[regularization.override](frames)
            maps = (batch, module.heads) if self._heads else (batch,)
            map_ = map_.repeat(*maps, 1, 1)
            return (map_, rows // batch) if part is None else part.mean(map_, rows // batch)
        if set(projected) != {"query", "key"}:
            raise RuntimeError(
                f"{layer.name} did not call its to_q and to_k, from which capture_maps takes the "
                "map: undo what computes them otherwise (fuse_qkv_projections)"
            )
        query, key = (
            projected[name].unflatten(0, (batch, -1)).unflatten(-1, (module.heads, -1))
            for name in ("query", "key")
        )
        query, key, scale = self._front_end.logit_factors(module, query, key)
        most: dict[str, Any] = {"max_rows": self._capture.max_rows, "heads": self._heads}
        if is_grid:
            q, k = query[:, 0], key[:, 0]
            return grid_map(regularization, q, k, scale, **most)
        bias = regularization.bias
        if bias is not None and isinstance(bias.stat, Tensor):
            bias = replace(bias, stat=bias.stat.unflatten(0, (batch, -1)))
        if part is None:
            return mean_map(query, key, bias, scale, **most)
        return part.mean(*mean_map(query, key, bias, scale, **most))

    def add(
        self, layer: TemporalLayer, forward: _WatchedPass, mean: Tensor, positions: int
    ) -> None:
        """Keeps the map of a layer's call until the forward pass has ended well."""
        forward.uncalled.remove(layer.name)
        found = mean if self._capture.differentiable else mean.cpu()
        common: dict[str, Any] = {
            "model": self._name,
            "layer": layer.name,
            "level": layer.level,
            "place": layer.place,
            "step": forward.step,
            "timestep": forward.timestep,
            "branch": forward.branch,
            "positions": positions,
        }
        between, by_head = (found.mean(1), found) if self._heads else (found, None)
        if not isinstance(self._front_end, GridFrontEnd):
            forward.maps.append(AttentionMap(**common, map=between, heads=by_head))
            return
        forward.maps.append(
            FrameMap(
                **common,
                map=between[..., :-1],
                text=between[..., -1],
                heads=by_head,
                coordinates=tuple(map(float, range(found.shape[-2]))),
            )
        )


class _LayerWatch:
    """The hooks on one layer.

    Args:
        model: What takes the maps of the layer.
        layer: The layer.
    """

    def __init__(self, model: ModelWatch, layer: TemporalLayer) -> None:
        self.hooks = Hooks()
        self._model = model
        self._layer = layer
        self._modules = self._modules_of(layer)
        self._hidden_states = Argument(layer.module, 0)

    def is_on(self, layer: TemporalLayer) -> bool:
        """Returns whether the hooks are on the modules that the layer has now."""
        now = self._modules_of(layer)
        return all(one is other for one, other in zip(now, self._modules, strict=True))

    def install(self) -> None:
        """Puts the hooks on."""
        module, to_q, to_k = self._modules
        self.hooks.after(to_q, self._keep("query"))
        self.hooks.after(to_k, self._keep("key"))
        self.hooks.after(module, self._after)

    @staticmethod
    def _modules_of(layer: TemporalLayer) -> tuple[Any, Any, Any]:
        return layer.module, layer.module.to_q, layer.module.to_k

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(projection: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            forward = self._model.current()
            if forward is not None and output is not None and self._layer.name in forward.wanted:
                forward.projected[threading.get_ident(), self._layer.name, name] = output

        return hook

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        forward = self._model.current()
        if forward is None or self._layer.name not in forward.wanted:
            return
        projected = forward.take_projected(self._layer.name)
        # Gradient checkpointing wants the operations again that are in the graph, not their result.
        if not forward.is_running and not forward.keeps_graph:
            return
        given = self._hidden_states.get(args, kwargs)
        shape = projected.get("query", given).shape
        with torch.set_grad_enabled(forward.keeps_graph and torch.is_grad_enabled()):
            mean, positions = self._model.mean_map(self._layer, forward, shape, projected)
        if forward.is_running:
            self._model.add(self._layer, forward, mean, positions)
