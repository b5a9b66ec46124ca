"""Takes the maps out of a model's forward passes, without replacing anything in it.

Hooks watch the queries and keys of each temporal attention layer, and the map is computed from them
next to what the model computes. Whatever else is done to the model meanwhile, in whatever order, is
seen as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vstar_kernels.analysis.maps import AttentionMap, mean_map
from vstar_kernels.attention.bias import Bias
from vstar_kernels.models.config import Override
from vstar_kernels.models.hooks import Argument
from vstar_kernels.models.layers import TemporalLayer, temporal_layers
from vstar_kernels.models.lvdm import LvdmTARForward
from vstar_kernels.models.schedule import _one_value
from vstar_kernels.models.unet import TARAttnProcessor

if TYPE_CHECKING:
    from vstar_kernels.models.capture import MapCapture

Selected = Callable[[TemporalLayer], bool]
OVERRIDES: dict[Override, Callable[[int], Tensor]] = {
    "identity": torch.eye,
    "uniform": lambda frames: torch.full((frames, frames), 1 / frames),
}


class Watch:
    """The hooks on one model. Those on its layers last for one forward pass, so that layers and
    projections that are replaced between two of them (FreeNoise, LoRA) are found again.

    Args:
        capture: Says which steps it wants, and takes the maps.
        name: The model's name in its pipeline.
        model: The model.
        selected: Which of its layers to watch.
        max_rows, differentiable: See :func:`vstar_kernels.capture_maps`.
    """

    def __init__(
        self,
        capture: MapCapture,
        name: str,
        model: nn.Module,
        selected: Selected,
        max_rows: int,
        differentiable: bool,
    ) -> None:
        self._capture = capture
        self._name = name
        self._model = model
        self._selected = selected
        self._max_rows = max_rows
        self._differentiable = differentiable
        self._running = False  # not where gradient checkpointing calls the layers again
        self._sample, self._timestep = Argument(model, 0), Argument(model, 1)
        self._hooks: list[Any] = []
        self._pending: set[str] = set()  # layers whose call is still to come
        self._batch = 0
        self._when: tuple[int | None, float] = (None, 0.0)

    def install(self) -> list[Any]:
        """Put the hooks on the model; how to remove them."""
        return [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._check),
            self._model.register_forward_hook(self._end, always_call=True),
        ]

    def _end(self, *_: object) -> None:
        """After a forward pass, or what it raised."""
        self._running = False
        if not self._keeps_graph():
            self.unwatch()

    def unwatch(self) -> None:
        """Take the hooks off the layers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.unwatch()
        self._running = True
        self._pending = set()
        timestep = self._timestep.get(args, kwargs)
        step = self._capture.find_step(timestep)
        if not self._capture.wants(step):
            return
        self._when = step, _one_value(timestep)
        self._batch = self._sample.get(args, kwargs).shape[0]
        for layer in filter(self._selected, temporal_layers(model)):
            self._pending.add(layer.name)
            self._watch(layer)

    def _check(self, *_: object) -> None:
        if self._pending:
            raise RuntimeError(
                f"{min(self._pending)} was not called in this forward pass, or is compiled: give "
                "capture_maps layers= that leave it out"
            )

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
            with torch.set_grad_enabled(self._keeps_graph()):
                found = self._mean_map(layer, shape, projected)
            projected.clear()
            # Gradient checkpointing wants the same operations again, but not their result.
            if self._running:
                self._add(layer, *found)

        self._hooks += [
            module.to_q.register_forward_hook(keep("query")),
            module.to_k.register_forward_hook(keep("key")),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    def _keeps_graph(self) -> bool:
        return self._differentiable and torch.is_grad_enabled()

    def _mean_map(
        self, layer: TemporalLayer, shape: torch.Size, projected: dict[str, Tensor]
    ) -> tuple[Tensor, int]:
        """The map of one call, from ``(rows, frames, channels)``, and of how many positions."""
        rows, frames, _ = shape
        if rows % self._batch or (self._running and layer.name not in self._pending):
            raise RuntimeError(
                f"{layer.name} was called with a part of the video (FreeNoise, split inference), "
                "and capture_maps cannot put the parts together"
            )
        module: Any = layer.module
        bias, override = _treatment(module)
        if override is not None:
            replaced = OVERRIDES[override](frames)
            return replaced.repeat(self._batch, 1, 1), rows // self._batch
        if set(projected) != {"query", "key"}:
            raise RuntimeError(
                f"{layer.name} did not call its to_q and to_k, from which capture_maps takes the "
                "map: undo what computes them otherwise (fuse_qkv_projections)"
            )
        query, key = (
            projected[name].unflatten(0, (self._batch, -1)).unflatten(-1, (module.heads, -1))
            for name in ("query", "key")
        )
        if bias is not None and isinstance(bias.stat, Tensor):
            bias = replace(bias, stat=bias.stat.unflatten(0, (self._batch, -1)))
        return mean_map(query, key, bias, module.scale, max_rows=self._max_rows)

    def _add(self, layer: TemporalLayer, map_: Tensor, positions: int) -> None:
        self._pending.remove(layer.name)
        where = (self._name, layer.name, layer.level, layer.place)
        kept = map_ if self._differentiable else map_.cpu()
        self._capture.add(AttentionMap(*where, *self._when, kept, positions))


def _treatment(module: Any) -> tuple[Bias | None, Override | None]:
    """What TAR did in the call that has just ended: its bias, and what replaced the map."""
    processor = getattr(module, "processor", None) or module.forward
    if not isinstance(processor, TARAttnProcessor | LvdmTARForward) or processor.stock:
        return None, None
    return processor.bias, processor.override
