"""The maps of temporal attention layers while their model samples, for ``capture_maps``.

Hooks watch the queries and keys of each layer, and the map is computed from them next to what the
model computes. Of an image UNet under ``apply_grid`` these are the layers of spatial attention.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vstar_kernels.analysis.maps import AttentionMap, FrameMap, mean_map
from vstar_kernels.models.conditional import in_conditional_passes
from vstar_kernels.models.forwards import ForwardPass, ForwardPasses, unwatch, watch
from vstar_kernels.models.front_end import FrontEnd
from vstar_kernels.models.grid.capture import grid_map, overridden_map
from vstar_kernels.models.grid.model import GridFrontEnd
from vstar_kernels.models.hooks import Argument, Hooks, ModelCall, put_back
from vstar_kernels.models.layers import OVERRIDE_MAPS, PLAIN, RegularizedAttention, TemporalLayer
from vstar_kernels.models.map_capture import MapCapture
from vstar_kernels.models.schedule import timestep_value
from vstar_kernels.models.sharded.parts import running_part


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
