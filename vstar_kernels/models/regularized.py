"""One model under TAR: the attention of its layers, and the hooks around its forward passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from vstar_kernels.models.classes import ClassChange
from vstar_kernels.models.config import TARConfig, check_present, width_at
from vstar_kernels.models.forwards import (
    ForwardPass,
    ForwardPasses,
    called_without_hooks,
    unwatch,
    watch,
)
from vstar_kernels.models.front_end import FrontEnd, find_front_end
from vstar_kernels.models.hooks import CopiedHook, Hooks, ModelCall, put_back, take_off
from vstar_kernels.models.layers import (
    PLAIN,
    STOCK,
    Regularization,
    RegularizedAttention,
    RegularizedLayer,
    TemporalLayer,
    Traced,
)
from vstar_kernels.models.positions import Positions, Tables
from vstar_kernels.models.schedule import StepGate
from vstar_kernels.models.text import share_text, unshare_text

_INSTALLING = threading.RLock()


class RegularizedPass(ForwardPass):
    """How one forward pass is regularized.

    Args:
        layers: The change to the attention of each layer, by the layer's name.
        tables: Longer positions than the model has, where the sample needs them.
        traced: What compiled code asks for the change to the attention, by the layer's name.
    """

    def __init__(
        self, layers: Mapping[str, Regularization], tables: Tables, traced: Mapping[str, Traced]
    ) -> None:
        super().__init__()
        self.layers = layers
        self.tables = tables
        self._traced = traced
        for name, there in traced.items():
            there.change = layers[name]

    def end(self) -> None:
        """Ends it, for compiled code too."""
        super().end()
        for there in self._traced.values():
            there.change = None
        self._traced = {}

    def is_like(self, other: Any) -> bool:
        """Returns whether another pass has the same regularizations and positions."""
        return _same_values(self.layers, other.layers) and _same_values(self.tables, other.tables)


def _same_values(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(one[key] is other[key] for key in one)


class RegularizedModel:
    """TAR on one model; itself the hook on the whole model that runs before each forward pass.

    It makes sure that every layer still has our attention, which much in diffusers replaces, looks
    up whether the step is regularized, and begins the :class:`RegularizedPass`.

    Args:
        name: The model's name in its pipeline.
        model: The model.
        config: What to do; every key matches a layer, see :meth:`check_keys`. None changes nothing.
        gate: When to do it.
        front_end: What knows the model; None finds it.
        backend, stock_elsewhere, extend_positions: See :func:`vstar_kernels.apply_tar`.

    Raises:
        ValueError: No front end knows the model, a layer's attention cannot be replaced, or the
            model has TAR already.
    """

    applied_by = "apply_tar"  # the public function, in messages
    attention = "temporal attention"  # what it is done to

    def __init__(
        self,
        name: str,
        model: nn.Module,
        config: TARConfig | None,
        gate: StepGate,
        *,
        front_end: FrontEnd | None = None,
        backend: str | None,
        stock_elsewhere: bool,
        extend_positions: bool,
    ) -> None:
        self.name = name
        self.model = model
        self.front_end = find_front_end(model) if front_end is None else front_end
        self.layers = list(self.front_end.layers(model))
        self.peers: list[RegularizedModel] = [self]  # the models under the same handle
        self._config = config
        self._regularizations = {} if config is None else config.regularizations
        self._gate = gate
        self._backend = backend
        self._off = STOCK if stock_elsewhere else PLAIN
        self._passes: ForwardPasses[RegularizedPass] = ForwardPasses(
            f"{self.applied_by} was removed from this {type(model).__name__} while it ran, in "
            "another thread: a part of its layers was regularized and a part was not"
        )
        self._positions = Positions(model, extend=extend_positions, tables=self._tables)
        self._hooks = Hooks()
        self._lock = threading.RLock()  # of what is installed
        self._removed = False
        # All that were ever put in: a model may keep one, and put it back later.
        self._made: WeakSet[RegularizedAttention] = WeakSet()
        self._replaced: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
        self._width: int | None = None  # of the last forward pass, for descriptions
        # torch.compile is to run it, not to trace it into a graph for each step. (A decorator would
        # import torch._dynamo with this package.)
        self._untraced_before = torch.compiler.disable(self._before)
        self._check_free()

    def install(self) -> None:
        """Puts the attentions and the hooks in."""
        with _INSTALLING:
            self._check_free()
            take_off(self.model, lambda hook: isinstance(hook, CopiedHook))
            self._hooks.before(self.model, self)
        self.front_end.register()
        watch(self.model, self._passes)
        _RESETTING.put_on(self.model)
        if self._off is PLAIN:  # or what is not regularized is left to the model
            share_text(self.model, self)
        with self._lock:
            self._install_attentions()

    def remove(self) -> None:
        """Takes the hooks off, and puts back what each attention replaced that is still there."""
        with self._lock:
            put_back(
                self._close,
                self._hooks.remove,
                self._put_attentions_back,
                self._positions.restore,
                lambda: unshare_text(self.model, self),
                lambda: _RESETTING.take_off(self.model),
                lambda: unwatch(self.model, self._passes),
            )

    def _close(self) -> None:
        self._removed = True
        self._passes.close()

    def regularization(self, layer: str) -> Regularization:
        """Returns the change to a layer's attention in the forward pass that calls the layer.

        Raises:
            RuntimeError: The layer is called outside of a forward pass of the model.
        """
        forward = self._passes.current()
        if forward is not None:
            return forward.layers[layer]
        if self._removed:
            return STOCK
        raise called_without_hooks(self.model, self.attention, self.applied_by)

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Runs before each forward pass; returns its arguments where they are changed.

        ``kwargs`` are missing where another thread has just taken the hook off.
        """
        return None if kwargs is None else self._untraced_before(args, kwargs)

    def _before(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        with self._lock:
            if self._removed:
                return None
            self._keep_installed()
        call = self.front_end.read_call(self.model, args, kwargs)
        layers = self._changes(call)
        forward = self._make_pass(layers, self._positions.fit(call.sample))
        for peer in self.peers:  # which share the latents
            peer._width = call.width
        self._passes.begin(forward)
        return None

    def _changes(self, call: ModelCall) -> dict[str, Regularization]:
        """Returns the change to each layer's attention in a forward pass, by the layer's name."""
        layers = {layer.name: self._regularization(layer, call.width) for layer in self.layers}
        self._check_widths(call.width)
        if not self._gate.is_on(self.model, call.timestep, call.step):
            layers = dict.fromkeys(layers, PLAIN)
        return {name: self._off if x is PLAIN else x for name, x in layers.items()}

    def _make_pass(self, layers: Mapping[str, Regularization], tables: Tables) -> RegularizedPass:
        return RegularizedPass(layers, tables, self._traced())

    def _traced(self) -> dict[str, Traced]:
        found = {x.name: self.front_end.get_attention(x.module) for x in self.layers}
        return {name: x.traced for name, x in found.items() if self._is_ours(x)}

    def _tables(self) -> Tables | None:
        forward = self._passes.current()
        return None if forward is None else forward.tables

    def reset_processors(self, reset: Callable[[], None]) -> None:
        """Runs what resets the model's processors, as if TAR were not there; TAR stays."""
        with self._lock:
            try:
                self._put_attentions_back()
                reset()
            finally:
                self._install_attentions()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Becomes a hook that refuses to run in a copy of the model."""
        return CopiedHook, (self.applied_by,)

    def describe(self) -> Iterator[RegularizedLayer]:
        """Yields the layers that are regularized; by width they are known after a forward pass."""
        for layer in self.layers:
            regularization = self._regularization(layer, self._width)
            if regularization is not PLAIN:
                yield RegularizedLayer(
                    self.name,
                    layer.name,
                    layer.level,
                    layer.place,
                    width_at(layer.level, self._width),
                    regularization.bias,
                    regularization.override,
                )

    def keys(self, width: int | None = None) -> set[int]:
        """Returns the levels at which it has layers, or the widths if level 0 has ``width``."""
        keys = (self._key(layer, width) for layer in self.layers)
        return {key for key in keys if key is not None}

    def _key(self, layer: TemporalLayer, width: int | None) -> int | None:
        return None if self._config is None else self._config.key_of(layer, width)

    def _regularization(self, layer: TemporalLayer, width: int | None) -> Regularization:
        key = self._key(layer, width)
        return PLAIN if key is None else self._regularizations.get(key, PLAIN)

    def _check_widths(self, width: int) -> None:
        """Raises unless every width has a layer in a model under the handle; they share latents."""
        if self._config is not None and self._config.key == "width":
            check_keys(self._regularizations, self.peers, "width", width)

    def _keep_installed(self) -> None:
        if not all(self._is_installed(layer) for layer in self.layers):
            self.layers = list(self.front_end.layers(self.model))
            self._install_attentions()

    def _is_installed(self, layer: TemporalLayer) -> bool:
        try:
            in_place = self.model.get_submodule(layer.name) is layer.module
        except AttributeError:
            return False
        return in_place and self._is_ours(self.front_end.get_attention(layer.module))

    def _is_ours(self, attention: Any) -> bool:
        return isinstance(attention, RegularizedAttention) and attention.controller is self

    def _install_attentions(self) -> None:
        found = {layer.module: self.front_end.get_attention(layer.module) for layer in self.layers}
        for layer in self.layers:
            if reason := self.front_end.why_not_replace(found[layer.module]):
                raise ValueError(f"{layer.name} cannot be regularized: {reason}")
        for layer in self.layers:
            self._install_attention(layer, found[layer.module])
        self._positions.find(self.layers)

    def _install_attention(self, layer: TemporalLayer, found: Any) -> None:
        """Puts ours in unless it is there; it knows what to put back in the end."""
        if self._is_ours(found):
            found.layer = layer.name  # which may have changed: split inference wraps modules
            return
        attention = self.front_end.make_attention(layer.module, self._backend)
        attention.controller, attention.layer = self, layer.name
        attention.previous = found
        if isinstance(found, RegularizedAttention):
            # Left behind by another handle, or ours as diffusers re-creates it: empty.
            attention.previous = self._replaced.get(layer.module, found.previous or found)
        # Noted before it is done, so that it can be undone at any time.
        self._made.add(attention)
        self._replaced[layer.module] = attention.previous
        self.front_end.set_attention(layer.module, attention)

    def _put_attentions_back(self) -> None:
        for module in list(self._replaced):
            attention = self.front_end.get_attention(module)
            if self._is_ours(attention):
                self.front_end.set_attention(module, attention.previous)
        if self._removed:
            for attention in list(self._made):
                attention.stock = True
                attention.controller = None

    def _check_free(self) -> None:
        for hook in self.model._forward_pre_hooks.values():
            if isinstance(hook, RegularizedModel):
                raise ValueError(
                    f"this {type(self.model).__name__} is under {hook.applied_by} already: "
                    "remove() that handle first"
                )


def check_keys(
    wanted: Mapping[int, Any],
    models: Sequence[RegularizedModel],
    kind: str,
    width: int | None = None,
) -> None:
    """Raises unless each level or width has a layer in one of the models.

    Args:
        wanted: What is wanted, by level or width.
        models: The models under a handle.
        kind: ``"level"`` or ``"width"``.
        width: Of level 0, for widths.

    Raises:
        ValueError: One has none.
    """
    present = set[int]().union(*(model.keys(width) for model in models))
    check_present(wanted, present, kind, models[0].attention)


def _resetting(base: Any) -> dict[str, Callable[..., Any]]:
    """Returns a ``set_default_attn_processor`` that leaves TAR in place and resets the rest.

    diffusers' own refuses a model that has any processor that it does not know.
    """

    def reset(model: nn.Module) -> None:
        for hook in model._forward_pre_hooks.values():
            if isinstance(hook, RegularizedModel):
                hook.reset_processors(lambda: base.set_default_attn_processor(model))
                return
        base.set_default_attn_processor(model)

    name = "set_default_attn_processor"
    return {name: reset} if hasattr(base, name) else {}


_RESETTING = ClassChange(_resetting)
