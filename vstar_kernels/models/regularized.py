"""One model under TAR: its processors, and the hook that sets them before each forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from vstar_kernels.analysis.maps import Level
from vstar_kernels.models import lvdm
from vstar_kernels.models import unet as diffusers
from vstar_kernels.models.config import TARConfig, Treatment
from vstar_kernels.models.copies import CopiedAfter, CopiedHook, remove_copied_hooks
from vstar_kernels.models.hooks import Argument, HookHandle
from vstar_kernels.models.layers import RegularizedLayer, TemporalLayer, is_lvdm, temporal_layers
from vstar_kernels.models.positions import Positions
from vstar_kernels.models.schedule import StepGate

PLAIN = Treatment()


class RegularizedModel(HookHandle):
    """TAR on one model. It is itself the hook, on the whole model, that runs before each forward.

    It makes sure that every layer still has our processor, which much in diffusers replaces, looks
    up whether the step is regularized, and sets the processors accordingly.

    Args:
        name: The model's name in its pipeline.
        model: The model.
        config: What to do; every key matches a layer, see :meth:`check_keys`.
        gate: When to do it.
        backend, stock_elsewhere, extend_positions: See :func:`vstar_kernels.apply_tar`.

    Raises:
        ValueError: A layer has a processor that cannot be replaced, or the model has TAR already.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        config: TARConfig,
        gate: StepGate,
        *,
        backend: str | None,
        stock_elsewhere: bool,
        extend_positions: bool,
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.layers = temporal_layers(model)
        self.peers: list[RegularizedModel] = [self]  # the models under the same handle
        self._config = config
        self._treatments = config.treatments
        self._gate = gate
        self._backend = backend
        self._stock_elsewhere = stock_elsewhere
        self._front_end: ModuleType = lvdm if is_lvdm(model) else diffusers
        self._positions = Positions(model, extend=extend_positions)
        self._processors: dict[nn.Module, Any] = {}
        self._made: WeakSet[Any] = WeakSet()  # a model may keep a processor, and put it back later
        self._running = False
        parameters = list(inspect.signature(type(model).forward).parameters)
        self._sample = Argument(model, parameters[1])
        self._timestep = Argument(model, parameters[2])
        self._step = Argument(model, "step_index") if "step_index" in parameters else None
        self._width: int | None = None
        is_latte = hasattr(model, "temp_pos_embed")
        self._patch_size: Any = model.config.patch_size if is_latte else 1  # type: ignore[union-attr]
        # torch.compile is to run them, not to trace them into a graph for each step. (Decorators
        # would import torch._dynamo with this package.)
        self._untraced_before = torch.compiler.disable(self._before)
        self.untraced_after = torch.compiler.disable(self._after)
        self._check_free()

    def install(self) -> None:
        """Put the processors and the hooks in."""
        remove_copied_hooks(self.model)
        self._install_processors()
        self._hooks.append(self.model.register_forward_pre_hook(self, with_kwargs=True))
        after = _After(self)
        self._hooks.append(self.model.register_forward_hook(after, always_call=True))

    def remove(self) -> None:
        """Take the hooks off and put back each processor that is still in its place."""
        super().remove()
        for module, processor in self._processors.items():
            if self._front_end.get_processor(module) is processor:
                self._front_end.set_processor(module, processor.previous)
        self._processors = {}
        for processor in self._made:
            processor.stock, processor.owner = True, None

    def check_running(self) -> None:
        """Raise RuntimeError outside of a forward pass of the model."""
        if not self._running:
            raise RuntimeError(
                "temporal attention under apply_tar was called without its model's hooks, which "
                "tell it the step: call the model itself, not its forward()"
            )

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before each forward pass."""
        self._untraced_before(args, kwargs)

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running = False
        self._keep_installed()
        sample: Tensor = self._sample.get(args, kwargs)
        self._width = sample.shape[-1]
        treatments = {layer.name: self._treatment(layer) for layer in self.layers}
        self._check_widths()
        on = self._gate.is_on(self._timestep.get(args, kwargs), self._announced(args, kwargs))
        for layer in self.layers:
            processor = self._processors[layer.module]
            treatment = treatments[layer.name] if on else PLAIN
            processor.bias, processor.override = treatment.bias, treatment.override
            processor.stock = self._stock_elsewhere and treatment is PLAIN
        self._positions.fit(sample)
        self._running = True

    def _after(self) -> None:
        """After a forward pass, even one that raised."""
        self._positions.restore()
        # Gradient checkpointing calls the layers again.
        self._running = self._running and torch.is_grad_enabled()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a copy of the model, a hook that refuses to run."""
        return CopiedHook, ()

    def describe(self) -> Iterator[RegularizedLayer]:
        """The layers that are regularized; with a configuration by width, after a forward."""
        for layer in self.layers:
            treatment = self._treatment(layer)
            if treatment is not PLAIN:
                yield RegularizedLayer(
                    self.name,
                    layer.name,
                    layer.level,
                    layer.place,
                    self.width(layer.level),
                    treatment.bias,
                    treatment.override,
                )

    def keys(self) -> set[int]:
        """The levels or widths at which it has layers; no widths before a forward pass."""
        keys = (self._key(layer) for layer in self.layers)
        return {key for key in keys if key is not None}

    def width(self, level: Level) -> int | None:
        """The width at a level in the last forward pass."""
        if self._width is None:
            return None
        # A transformer's patches are its pixels; a UNet's levels halve, rounding up.
        halvings = 0 if level == "init" else level
        return -(-(self._width // self._patch_size) // 2**halvings)

    def _key(self, layer: TemporalLayer) -> int | None:
        """What the configuration may call the layer."""
        if layer.level == "init" and not self._config.include_init:
            return None
        if self._config.key == "width":
            return self.width(layer.level)
        return 0 if layer.level == "init" else layer.level

    def _treatment(self, layer: TemporalLayer) -> Treatment:
        key = self._key(layer)
        return PLAIN if key is None else self._treatments.get(key, PLAIN)

    def _check_widths(self) -> None:
        """Every width has a layer in some model under the handle, all of the same latents."""
        if self._config.key == "level":
            return
        for peer in self.peers:
            peer._width = self._width
        check_keys(self._treatments, self.peers, "width")

    def _announced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        step = kwargs.get("step_index") if self._step is None else self._step.get(args, kwargs)
        return None if step is None else int(step)

    def _keep_installed(self) -> None:
        if not all(self._is_installed(layer) for layer in self.layers):
            self.layers = temporal_layers(self.model)
            self._install_processors()

    def _is_installed(self, layer: TemporalLayer) -> bool:
        try:
            in_place = self.model.get_submodule(layer.name) is layer.module
        except AttributeError:
            return False
        processor = self._processors.get(layer.module)
        return in_place and self._front_end.get_processor(layer.module) is processor

    def _install_processors(self) -> None:
        found = {layer.module: self._front_end.get_processor(layer.module) for layer in self.layers}
        for layer in self.layers:
            if reason := self._front_end.why_not_replace(found[layer.module]):
                raise ValueError(f"{layer.name} cannot be regularized: {reason}")
        self._processors = {
            layer.module: self._install_processor(layer, found[layer.module])
            for layer in self.layers
        }
        self._positions.find(self.layers)

    def _install_processor(self, layer: TemporalLayer, found: Any) -> Any:
        """Ours where it is, or put in; it knows what to put back in the end."""
        if getattr(found, "owner", None) is self:
            return found
        processor = self._front_end.make_processor(layer.module, self._backend)
        processor.owner = self
        processor.previous = found
        if isinstance(found, diffusers.TARAttnProcessor):
            # Left behind by another handle, or ours as diffusers re-creates it: empty.
            ours = self._processors.get(layer.module)
            processor.previous = ours.previous if ours else found.previous or found
        self._made.add(processor)
        self._front_end.set_processor(layer.module, processor)
        return processor

    def _check_free(self) -> None:
        for hook in self.model._forward_pre_hooks.values():
            if isinstance(hook, RegularizedModel):
                raise ValueError(
                    f"this {type(self.model).__name__} is under apply_tar already: remove() that "
                    "handle first"
                )


def check_keys(treatments: Mapping[int, Any], models: list[RegularizedModel], kind: str) -> None:
    """Raise unless each level or width has a layer in one of the models.

    Raises:
        ValueError: One has none.
    """
    present = set[int]().union(*(model.keys() for model in models))
    for key in treatments:
        if key not in present:
            raise ValueError(
                f"no temporal attention has {kind} {key}: the {kind}s are "
                f"{', '.join(map(str, sorted(present)))}"
            )


@dataclass
class _After:
    """The hook after each forward pass."""

    model: RegularizedModel

    def __call__(self, *_: object) -> None:
        self.model.untraced_after()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return CopiedAfter, ()
