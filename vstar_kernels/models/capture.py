"""A model's mean attention maps while it samples (VSTAR, arXiv 2403.13501, Figs. 3, 10, S.10).

Nothing in the model is replaced. Hooks watch the queries and keys of each temporal attention layer,
and the map is computed from them next to what the model computes. Whatever else is done to the
model meanwhile, in whatever order, is seen as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vstar_kernels.analysis.maps import AttentionMap, Level, Place, mean_map
from vstar_kernels.models.front_end import (
    FrontEnd,
    find_front_end,
    models_with_temporal_attention,
    temporal_layers,
)
from vstar_kernels.models.hooks import Argument, HookHandle, ModelCall, is_compiled
from vstar_kernels.models.layers import (
    OVERRIDE_MAPS,
    PLAIN,
    RegularizedAttention,
    TemporalLayer,
)
from vstar_kernels.models.schedule import find_step, scheduler_of, timestep_value

Chooses = Callable[[TemporalLayer], bool]


def capture_maps(
    pipe_or_model: Any,
    *,
    steps: Collection[int] | None = None,
    layers: Callable[[TemporalLayer], bool] | None = None,
    scheduler: Any = None,
    max_rows: int = 256,
    differentiable: bool = False,
) -> MapCapture:
    """Collects the mean temporal attention maps of a model while it runs.

    >>> with vk.capture_maps(pipe, steps=[0, 13], layers=lambda layer: layer.level == 0) as capture:
    ...     video = pipe(prompt).frames
    >>> capture.mean(place="up", step=13)  # (2, 16, 16): without and with the prompt

    It sees what runs: under :func:`vstar_kernels.apply_tar` the regularized map A′, elsewhere the
    plain A. The model's output stays the same, bit for bit. Each map is computed a second time for
    it: of all positions where one of the kernels gives maps, otherwise by the reference from some
    of them, at equal distances.

    Memory is ``layers × steps × batch × frames² × 4`` bytes: choose ``layers`` and ``steps`` for
    long videos.

    Args:
        pipe_or_model: As for :func:`vstar_kernels.apply_tar`, but not compiled.
        steps: Indices of denoising steps; None is all.
        layers: Whether to capture a :class:`TemporalLayer`; None is all, ``transformer_in`` too.
        scheduler: Tells the step of a timestep; None is the pipeline's own. A model by itself needs
            it for ``steps``, unless :attr:`MapCapture.step` is set.
        max_rows: For the reference, from how many rows (batch × positions) of a layer a map is
            computed at most; at least one position of each batch element.
        differentiable: Keep the maps on the model's device and in autograd's graph, wherever
            gradients are enabled. Call ``backward()`` before the handle is removed: a model with
            gradient checkpointing then runs its layers again.

    Returns:
        A handle: a context manager, with ``remove()``, which keeps its maps afterwards.

    Raises:
        TypeError: ``pipe_or_model`` is of the wrong kind.
        ValueError: It has no temporal attention or is compiled, or ``layers`` chooses none, or
            ``max_rows`` is less than 1. At a forward pass: the step cannot be known.
        RuntimeError: At a forward pass: a layer was not called, or its projections were not
            (``fuse_qkv_projections``), or it was called several times (FreeNoise).
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    models = models_with_temporal_attention(pipe_or_model)
    for name, model in models.items():
        if is_compiled(pipe_or_model, name, model):
            raise ValueError(f"maps of a compiled {type(model).__name__} cannot be captured")
    chooses = layers or (lambda layer: True)
    if not any(chooses(layer) for model in models.values() for layer in temporal_layers(model)):
        raise ValueError("layers chooses none of the temporal attention layers")

    get_scheduler = scheduler_of(pipe_or_model, scheduler)
    return MapCapture(models, steps, chooses, get_scheduler, max_rows, differentiable)


class MapCapture(HookHandle):
    """The maps that :func:`capture_maps` captures: a context manager, with :meth:`remove`.

    Attributes:
        step: The step that the caller announces, which goes before the scheduler's; None for that.
        chooses, max_rows, differentiable: See ``layers`` and the others of :func:`capture_maps`.
    """

    def __init__(
        self,
        models: dict[str, nn.Module],
        steps: Collection[int] | None,
        chooses: Chooses,
        get_scheduler: Callable[[], Any],
        max_rows: int,
        differentiable: bool,
    ) -> None:
        super().__init__()
        self.step: int | None = None
        self.chooses = chooses
        self.max_rows = max_rows
        self.differentiable = differentiable
        self._steps = steps
        self._get_scheduler = get_scheduler
        self._maps: dict[tuple[Any, ...], AttentionMap] = {}
        self._watches = [_ModelWatch(self, name, model) for name, model in models.items()]
        for watch in self._watches:
            self._hooks += watch.install()

    @property
    def maps(self) -> list[AttentionMap]:
        """The maps captured so far, in the order of the layers' first calls."""
        return list(self._maps.values())

    def mean(
        self,
        *,
        level: Level | None = None,
        place: Place | None = None,
        step: int | None = None,
        model: str | None = None,
    ) -> Tensor:
        """Returns the mean of the maps of a level, place, step and model, each None for all.

        Returns:
            ``(batch, frames, frames)``; the batch is not averaged.

        Raises:
            ValueError: There is none.
        """
        wanted = {"level": level, "place": place, "step": step, "model": model}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        maps = [m.map for m in self.maps if all(getattr(m, k) == v for k, v in wanted.items())]
        if maps:
            return torch.stack(maps).mean(dim=0)
        asked = ", ".join(f"{name} {value}" for name, value in wanted.items()) or "any layer"
        there = (
            f"{name}s {', '.join(sorted({str(getattr(m, name)) for m in self.maps})) or 'none'}"
            for name in ("level", "place", "step", "model")
        )
        raise ValueError(f"no map of {asked} was captured: there are {'; '.join(there)}")

    def clear(self) -> None:
        """Forgets the maps captured so far."""
        self._maps.clear()

    def remove(self) -> None:
        """Takes the hooks off, and keeps the maps; nothing happens the second time."""
        super().remove()
        for watch in self._watches:
            watch.unwatch()

    def find_step(self, timestep: Any) -> int | None:
        """Returns the step of a forward pass, None if it is not known.

        Raises:
            ValueError: It is not known, and ``steps`` asks for it.
        """
        if self.step is not None:
            return self.step
        scheduler = self._get_scheduler()
        if scheduler is not None:
            return find_step(timestep, scheduler)
        if self._steps is not None:
            raise ValueError(
                "steps needs the step of each forward pass: give capture_maps the scheduler=, "
                "announce it by capture.step = i, or use steps=None for all steps"
            )
        return None

    def wants(self, step: int | None) -> bool:
        """Returns whether a step's maps are captured."""
        return self._steps is None or step in self._steps

    def add(self, new: AttentionMap) -> None:
        """Keeps a map, or takes it into the mean of those of its layer and step."""
        key = (new.model, new.layer, new.step, new.timestep)
        if key in self._maps:
            self._maps[key].add(new.map)
        else:
            self._maps[key] = new


class _ModelWatch:
    """The hooks on one model, which begin and end the watch over each of its forward passes.

    Args:
        capture: What takes the maps, and says which ones it wants.
        name: The model's name in its pipeline.
        model: The model.
    """

    def __init__(self, capture: MapCapture, name: str, model: nn.Module) -> None:
        self._capture = capture
        self._name = name
        self._model = model
        self._front_end = find_front_end(model)
        self._forward: _WatchedForward | None = None

    def install(self) -> list[RemovableHandle]:
        """Puts the hooks on the model, and returns what removes them."""
        return [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._check),
            self._model.register_forward_hook(self._end, always_call=True),
        ]

    def unwatch(self) -> None:
        """Takes the hooks off the layers."""
        if self._forward is not None:
            self._forward.remove()
        self._forward = None

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.unwatch()
        call = self._front_end.read_call(model, args, kwargs)
        step = self._capture.find_step(call.timestep)
        if self._capture.wants(step):
            self._forward = _WatchedForward(self._capture, self._name, self._front_end, call, step)
            self._forward.watch(list(self._front_end.layers(model)))

    def _check(self, *_: object) -> None:
        if self._forward is not None:
            self._forward.check_complete()

    def _end(self, *_: object) -> None:
        """Ends the forward pass, even one that raised."""
        if self._forward is not None:
            self._forward.running = False
            if not self._forward.keeps_graph():
                self.unwatch()


class _WatchedForward(HookHandle):
    """One forward pass of a model, with the hooks on its layers.

    They last for one pass, so that layers and projections that are replaced between two of them
    (FreeNoise, LoRA) are found again.

    Args:
        capture: What takes the maps.
        model_name: The model's name in its pipeline.
        front_end: The model's.
        call: The facts of the call.
        step: The index of the denoising step, if it is known.

    Attributes:
        running: Whether the pass has not ended; gradient checkpointing calls layers after that.
    """

    def __init__(
        self,
        capture: MapCapture,
        model_name: str,
        front_end: FrontEnd,
        call: ModelCall,
        step: int | None,
    ) -> None:
        super().__init__()
        self.running = True
        self._capture = capture
        self._model_name = model_name
        self._front_end = front_end
        self._batch: int = call.sample.shape[0]
        self._step = step
        self._timestep = timestep_value(call.timestep)
        self._uncalled: set[str] = set()

    def watch(self, layers: list[TemporalLayer]) -> None:
        """Puts hooks on those of the model's layers that are to be captured."""
        for layer in filter(self._capture.chooses, layers):
            self._uncalled.add(layer.name)
            self._watch(layer)

    def check_complete(self) -> None:
        """Raises RuntimeError if a layer was not called."""
        if self._uncalled:
            raise RuntimeError(
                f"{min(self._uncalled)} was not called in this forward pass, or is compiled: give "
                "capture_maps layers= that leave it out"
            )

    def keeps_graph(self) -> bool:
        """Returns whether the maps are in autograd's graph."""
        return self._capture.differentiable and torch.is_grad_enabled()

    def _watch(self, layer: TemporalLayer) -> None:
        module: Any = layer.module
        projected: dict[str, Tensor] = {}
        hidden_states = Argument(module, 0)

        def keep(name: str) -> Callable[..., None]:
            def hook(projection: nn.Module, args: Any, output: Tensor) -> None:
                projected[name] = output

            return hook

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            shape = hidden_states.get(args, kwargs).shape
            with torch.set_grad_enabled(self.keeps_graph()):
                mean, positions = self._mean_map(layer, shape, projected)
            projected.clear()
            # Gradient checkpointing wants the same operations again, but not their result.
            if self.running:
                self._add(layer, mean, positions)

        self._hooks += [
            module.to_q.register_forward_hook(keep("query")),
            module.to_k.register_forward_hook(keep("key")),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    def _mean_map(
        self, layer: TemporalLayer, shape: torch.Size, projected: dict[str, Tensor]
    ) -> tuple[Tensor, int]:
        """Returns the map of a layer's call and the number of positions that it is the mean of.

        Args:
            layer: The layer.
            shape: Of its input, ``(rows, frames, channels)``.
            projected: The outputs of its query and key projections, by name.
        """
        rows, frames, _ = shape
        if rows % self._batch or (self.running and layer.name not in self._uncalled):
            raise RuntimeError(
                f"{layer.name} was called with a part of the video (FreeNoise, split inference), "
                "and capture_maps cannot put the parts together"
            )
        module: Any = layer.module
        attention = self._front_end.get_attention(module)
        is_ours = isinstance(attention, RegularizedAttention)
        regularization = attention.regularization() if is_ours else PLAIN
        if regularization.override is not None:
            map_ = OVERRIDE_MAPS[regularization.override](frames)
            return map_.repeat(self._batch, 1, 1), rows // self._batch
        if set(projected) != {"query", "key"}:
            raise RuntimeError(
                f"{layer.name} did not call its to_q and to_k, from which capture_maps takes the "
                "map: undo what computes them otherwise (fuse_qkv_projections)"
            )
        query, key = (
            projected[name].unflatten(0, (self._batch, -1)).unflatten(-1, (module.heads, -1))
            for name in ("query", "key")
        )
        bias = regularization.bias
        if bias is not None and isinstance(bias.stat, Tensor):
            bias = replace(bias, stat=bias.stat.unflatten(0, (self._batch, -1)))
        return mean_map(query, key, bias, module.scale, max_rows=self._capture.max_rows)

    def _add(self, layer: TemporalLayer, mean: Tensor, positions: int) -> None:
        self._uncalled.remove(layer.name)
        self._capture.add(
            AttentionMap(
                model=self._model_name,
                layer=layer.name,
                level=layer.level,
                place=layer.place,
                step=self._step,
                timestep=self._timestep,
                map=mean if self._capture.differentiable else mean.cpu(),
                positions=positions,
            )
        )
