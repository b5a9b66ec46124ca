"""One model under TAR: the attention of its layers, and the hooks around its forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from vstar_kernels.analysis.maps import Level
from vstar_kernels.models.config import TARConfig
from vstar_kernels.models.front_end import find_front_end
from vstar_kernels.models.hooks import HookHandle
from vstar_kernels.models.layers import (
    PLAIN,
    Regularization,
    RegularizedAttention,
    RegularizedLayer,
    TemporalLayer,
)
from vstar_kernels.models.positions import Positions
from vstar_kernels.models.schedule import StepGate


class RegularizedModel(HookHandle):
    """TAR on one model; itself the hook on the whole model that runs before each forward pass.

    It makes sure that every layer still has our attention, which much in diffusers replaces, looks
    up whether the step is regularized, and sets the attentions accordingly.

    Args:
        name: The model's name in its pipeline.
        model: The model.
        config: What to do; every key matches a layer, see :meth:`check_keys`.
        gate: When to do it.
        backend, stock_elsewhere, extend_positions: See :func:`vstar_kernels.apply_tar`.

    Raises:
        ValueError: No front end knows the model, a layer's attention cannot be replaced, or the
            model has TAR already.
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
        self.front_end = find_front_end(model)
        self.layers = list(self.front_end.layers(model))
        self.peers: list[RegularizedModel] = [self]  # the models under the same handle
        self._config = config
        self._regularizations = config.regularizations
        self._gate = gate
        self._backend = backend
        self._stock_elsewhere = stock_elsewhere
        self._positions = Positions(model, extend=extend_positions)
        self._attentions: dict[nn.Module, RegularizedAttention] = {}
        # All that were ever put in: a model may keep one, and put it back later.
        self._made: WeakSet[RegularizedAttention] = WeakSet()
        self._running = False
        self._width: int | None = None
        # torch.compile is to run them, not to trace them into a graph for each step. (Decorators
        # would import torch._dynamo with this package.)
        self._untraced_before = torch.compiler.disable(self._before)
        self.untraced_after = torch.compiler.disable(self._after)
        self._check_free()

    def install(self) -> None:
        """Puts the attentions and the hooks in."""
        _remove_copied_hooks(self.model)
        self.front_end.register()
        self._install_attentions()
        self._hooks.append(self.model.register_forward_pre_hook(self, with_kwargs=True))
        after = _After(self)
        self._hooks.append(self.model.register_forward_hook(after, always_call=True))

    def remove(self) -> None:
        """Takes the hooks off, and puts back what each attention replaced that is still there."""
        super().remove()
        for module, attention in self._attentions.items():
            if self.front_end.get_attention(module) is attention:
                self.front_end.set_attention(module, attention.previous)
        self._attentions = {}
        for attention in self._made:
            attention.stock, attention.controller = True, None

    def check_running(self) -> None:
        """Raises RuntimeError outside of a forward pass of the model."""
        if not self._running:
            raise RuntimeError(
                "temporal attention under apply_tar was called without its model's hooks, which "
                "tell it the step: call the model itself, not its forward()"
            )

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before each forward pass."""
        self._untraced_before(args, kwargs)

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running = False
        self._keep_installed()
        call = self.front_end.read_call(self.model, args, kwargs)
        self._width = call.width
        regularizations = {layer.name: self._regularization(layer) for layer in self.layers}
        self._check_widths()
        on = self._gate.is_on(call.timestep, call.step)
        for layer in self.layers:
            attention = self._attentions[layer.module]
            regularization = regularizations[layer.name] if on else PLAIN
            attention.bias, attention.override = regularization.bias, regularization.override
            attention.stock = self._stock_elsewhere and regularization is PLAIN
        self._positions.fit(call.sample)
        self._running = True

    def _after(self) -> None:
        """Ends the forward pass, even one that raised."""
        self._positions.restore()
        # Gradient checkpointing calls the layers again.
        self._running = self._running and torch.is_grad_enabled()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Becomes a hook that refuses to run in a copy of the model."""
        return _CopiedHook, ()

    def describe(self) -> Iterator[RegularizedLayer]:
        """Yields the layers that are regularized; by width they are known after a forward pass."""
        for layer in self.layers:
            regularization = self._regularization(layer)
            if regularization is not PLAIN:
                yield RegularizedLayer(
                    self.name,
                    layer.name,
                    layer.level,
                    layer.place,
                    self.width(layer.level),
                    regularization.bias,
                    regularization.override,
                )

    def keys(self) -> set[int]:
        """Returns the levels or widths at which it has layers; no widths before a forward pass."""
        keys = (self._key(layer) for layer in self.layers)
        return {key for key in keys if key is not None}

    def width(self, level: Level) -> int | None:
        """Returns the width at a level in the last forward pass."""
        if self._width is None:
            return None
        halvings = 0 if level == "init" else level
        return -(-self._width // 2**halvings)  # rounded up

    def _key(self, layer: TemporalLayer) -> int | None:
        """Returns the level or width by which the configuration may name the layer."""
        if layer.level == "init" and not self._config.include_init:
            return None
        if self._config.key == "width":
            return self.width(layer.level)
        return 0 if layer.level == "init" else layer.level

    def _regularization(self, layer: TemporalLayer) -> Regularization:
        key = self._key(layer)
        return PLAIN if key is None else self._regularizations.get(key, PLAIN)

    def _check_widths(self) -> None:
        """Raises unless every width has a layer in a model under the handle; they share latents."""
        if self._config.key == "level":
            return
        for peer in self.peers:
            peer._width = self._width
        check_keys(self._regularizations, self.peers, "width")

    def _keep_installed(self) -> None:
        if not all(self._is_installed(layer) for layer in self.layers):
            self.layers = list(self.front_end.layers(self.model))
            self._install_attentions()

    def _is_installed(self, layer: TemporalLayer) -> bool:
        try:
            in_place = self.model.get_submodule(layer.name) is layer.module
        except AttributeError:
            return False
        attention = self._attentions.get(layer.module)
        return in_place and self.front_end.get_attention(layer.module) is attention

    def _install_attentions(self) -> None:
        found = {layer.module: self.front_end.get_attention(layer.module) for layer in self.layers}
        for layer in self.layers:
            if reason := self.front_end.why_not_replace(found[layer.module]):
                raise ValueError(f"{layer.name} cannot be regularized: {reason}")
        self._attentions = {
            layer.module: self._install_attention(layer.module, found[layer.module])
            for layer in self.layers
        }
        self._positions.find(self.layers)

    def _install_attention(self, module: nn.Module, found: Any) -> RegularizedAttention:
        """Puts ours in unless it is there; it knows what to put back in the end."""
        if isinstance(found, RegularizedAttention) and found.controller is self:
            return found
        attention = self.front_end.make_attention(module, self._backend)
        attention.controller = self
        attention.previous = found
        if isinstance(found, RegularizedAttention):
            # Left behind by another handle, or ours as diffusers re-creates it: empty.
            before = self._attentions.get(module)
            attention.previous = before.previous if before else found.previous or found
        self._made.add(attention)
        self.front_end.set_attention(module, attention)
        return attention

    def _check_free(self) -> None:
        for hook in self.model._forward_pre_hooks.values():
            if isinstance(hook, RegularizedModel):
                raise ValueError(
                    f"this {type(self.model).__name__} is under apply_tar already: remove() that "
                    "handle first"
                )


def check_keys(wanted: Mapping[int, Any], models: list[RegularizedModel], kind: str) -> None:
    """Raises unless each level or width has a layer in one of the models.

    Raises:
        ValueError: One has none.
    """
    present = set[int]().union(*(model.keys() for model in models))
    for key in wanted:
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
        return _CopiedAfter, ()


class _CopiedHook:
    """The hook that a copy of a model under ``apply_tar`` has before each forward pass.

    The copy is stock, as nobody holds a handle on it; lest that go unnoticed, it does not run until
    it has been under ``apply_tar`` itself.
    """

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        raise RuntimeError(
            f"this {type(model).__name__} is a copy of one under apply_tar, made without TAR: "
            "apply_tar(copy, …) regularizes it, and remove() of that handle makes it stock"
        )


class _CopiedAfter:
    """The hook that such a copy has after each forward pass: it has no state to put back."""

    def __call__(self, *_: object) -> None:
        pass


def _remove_copied_hooks(model: nn.Module) -> None:
    for hooks, flags, kind in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, _CopiedHook),
        (model._forward_hooks, model._forward_hooks_always_called, _CopiedAfter),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key], flags[key]
