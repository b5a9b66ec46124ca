"""``tar_attention`` as PyTorch's transformations see it: one operation with a gradient.

``torch.compile`` and tensors that are not plain take the operator ``vstar_kernels::attention``,
whose backend is chosen when it runs. ``torch.func``, which does not see through that operator's
gradient, takes a function around it. Eager autograd takes a function without the operator, which
would cost a small call several times its own time. A call that needs none of them does without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention import dispatch
from vstar_kernels.attention.call import Call, Gradients, Options, Wanted, empty_like
from vstar_kernels.attention.native import LIBRARY

# A call's tensors, then the fields of Options in their order, and the backend.
_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor? delta, Tensor? stat_tensor, "
    "str form, float sigma, float strength, str stat, bool clamp_negative, bool detach_stat, "
    "float scale, int map_block, str? backend"
)
_TENSORS = 5
LIBRARY.define(f"attention({_CALL}) -> (Tensor, Tensor)")
LIBRARY.define(
    "attention_backward(Tensor? grad_out, Tensor? grad_map, Tensor out, bool delta_wanted, "
    f"bool stat_wanted, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

PLAIN = (Tensor, torch.nn.Parameter)


def needed(call: Call) -> bool:
    """Returns whether a call has to go through :func:`attention`."""
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and call.requires_grad)
        or _func_is_active()
        or type(call.query) not in PLAIN
    )


def attention(call: Call, backend: str | None) -> Tensor | tuple[Tensor, Tensor]:
    """Returns what :func:`vstar_kernels.tar_attention` returns, where :func:`needed`.

    ``backend`` None leaves the choice to the moment when the operator runs.
    """
    tensors = (call.query, call.key, call.value, call.delta, call.stat)
    run: Callable[..., Any]
    if torch.compiler.is_compiling() or type(call.query) not in PLAIN:
        run = torch.ops.vstar_kernels.attention
    elif _func_is_active():
        run = _ForFunc.apply
    elif call.query.is_meta:
        run = torch.ops.vstar_kernels.attention
    else:
        return _Eager.apply(*tensors, call.options, backend)
    out, mean_map = run(*tensors, *call.options, backend)
    return (out, mean_map) if call.options.map_block else out


# ---- the operator and its gradient ----


def _split(arguments: tuple[Any, ...]) -> tuple[Call, str | None]:
    """Returns the call and the backend that an operator's arguments are."""
    query, key, value, delta, stat, *options, backend = arguments
    return Call(query, key, value, delta, stat, Options(*options)), backend


def _nothing(like: Tensor) -> Tensor:
    """Returns what an operator gives for a result that was not asked for."""
    return like.new_empty(0, dtype=torch.float32)


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, name = _split(arguments)
    out, mean_map, _ = dispatch.TAR_ATTENTION.backend(call, name).forward(call)
    return out, _nothing(out) if mean_map is None else mean_map


def _attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, _ = _split(arguments)
    out = empty_like(call.query)
    if not call.options.map_block:
        return out, _nothing(out)
    return out, out.new_empty(call.map_shape, dtype=torch.float32)


def _attention_backward(
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    out: Tensor,
    delta_wanted: bool,
    stat_wanted: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    call, name = _split(arguments)
    backend, wanted = dispatch.TAR_ATTENTION.backend(call, name), Wanted(delta_wanted, stat_wanted)
    gradients = backend.backward(call, out, (), grad_out, grad_map, wanted)
    return _as_results(out, gradients)


def _attention_backward_fake(
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    out: Tensor,
    delta_wanted: bool,
    stat_wanted: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    call, _ = _split(arguments)
    query, key, value = (empty_like(tensor) for tensor in (call.query, call.key, call.value))
    delta = torch.empty_like(call.delta) if delta_wanted and call.delta is not None else None
    stat = torch.empty_like(call.stat) if stat_wanted and call.stat is not None else None
    return _as_results(out, Gradients(query, key, value, delta, stat))


def _as_results(out: Tensor, gradients: Gradients) -> tuple[Tensor, ...]:
    """Returns gradients as an operator does: Δ's and the statistic's contiguous, none missing."""
    *inputs, delta, stat = gradients
    others = (_nothing(out) if x is None else x.contiguous() for x in (delta, stat))
    return (*inputs, *others)


def _backward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.vstar_kernels.attention_backward(*arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], output[0])
    ctx.options, ctx.backend = Options(*inputs[_TENSORS:-1]), inputs[-1]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_map: Tensor | None) -> tuple[Any, ...]:
    """Returns the gradients of a node's inputs, in their order: the tensors, then the rest."""
    query, key, value, delta, stat, out, *saved = ctx.saved_tensors
    tensors = (query, key, value, delta, stat)
    needs = ctx.needs_input_grad
    if not ctx.options.map_block:  # an empty map's gradient means nothing
        grad_map = None
    if grad_out is None and grad_map is None:
        return (None,) * len(needs)
    wanted = Wanted(delta=needs[3], stat=needs[4] and not ctx.options.detach_stat)
    gradients: tuple[Tensor | None, ...]
    arguments = (grad_out, grad_map, out, *wanted, *tensors, *ctx.options, ctx.backend)
    if _func_is_active():
        gradients = _BackwardForFunc.apply(*arguments)
    elif torch.is_grad_enabled() or type(out) not in PLAIN or out.is_meta:
        # create_graph, traced, or there is nothing to compute.
        gradients = _backward_operator(*arguments)
    else:
        call, name = _split((*tensors, *ctx.options, ctx.backend))
        backend = dispatch.TAR_ATTENTION.backend(call, name)
        gradients = backend.backward(call, out, tuple(saved), grad_out, grad_map, wanted)
    kept = (needs[0], needs[1], needs[2], *wanted)
    of_tensors = (g if keep else None for g, keep in zip(gradients, kept, strict=True))
    return (*of_tensors, *(None,) * (len(needs) - _TENSORS))


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps nothing: there is no second derivative that could want it."""


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "tar_attention's kernels have no second derivative; backend='reference' has"
    )


# ---- vmap: what is mapped over becomes part of the batch ----


def _attention_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    _refuse_mapped_delta(in_dims[3])
    folded = _fold(arguments, in_dims, info.batch_size, delta=3)
    out, mean_map = torch.ops.vstar_kernels.attention(*folded)
    out = out.unflatten(0, (info.batch_size, -1))
    if not mean_map.numel():
        return (out, mean_map), (0, None)
    return (out, mean_map.unflatten(0, (info.batch_size, -1))), (0, 0)


def _attention_backward_vmap(
    info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[Any, Any]:
    delta_wanted, delta = arguments[3], 8  # in the order of the operator's schema
    _refuse_mapped_delta(0 if delta_wanted else in_dims[delta])
    folded = _fold(arguments, in_dims, info.batch_size, delta=delta)
    gradients = _backward_operator(*folded)
    mapped = tuple(x.unflatten(0, (info.batch_size, -1)) if x.numel() else x for x in gradients)
    return mapped, tuple(0 if x.numel() else None for x in gradients)


def _fold(
    arguments: tuple[Any, ...], in_dims: tuple[Any, ...], size: int, *, delta: int
) -> list[Any]:
    """Returns arguments with the mapped dimension folded into each tensor's batch, but Δ's."""

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

    pairs = enumerate(zip(arguments, in_dims, strict=True))
    return [x if place == delta else fold(x, dim) for place, (x, dim) in pairs]


def _refuse_mapped_delta(dim: int | None) -> None:
    if dim is not None:
        raise NotImplementedError(
            "vmap of tar_attention maps over the batch; the entries of a bias are the same for all "
            "of it, and so is their gradient"
        )


def _func_is_active() -> bool:
    return torch._C._are_functorch_transforms_active()


# ---- the functions around them ----


class _Eager(torch.autograd.Function):
    """One forward and one backward pass of a backend, without the operator."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        delta: Tensor | None,
        stat: Tensor | None,
        options: Options,
        backend: str,
    ) -> Tensor | tuple[Tensor, Tensor]:
        call = Call(query, key, value, delta, stat, options)
        out, mean_map, saved = dispatch.TAR_ATTENTION.backends[backend].forward(call, save=True)
        ctx.save_for_backward(query, key, value, delta, stat, out, *saved)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return out if mean_map is None else (out, mean_map)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_map: Tensor | None = None) -> Any:
        return _gradient(ctx, grad_out, grad_map)


class _ForFunc(torch.autograd.Function):
    """The operator for torch.func, which does not see through ``register_autograd``."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.vstar_kernels.attention(*arguments)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradient)
    vmap = staticmethod(_attention_vmap)


class _BackwardForFunc(torch.autograd.Function):
    """The operator's gradient for torch.func."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _backward_operator(*arguments)

    setup_context = staticmethod(_keep_nothing)
    backward = staticmethod(_refuse_second_derivative)
    vmap = staticmethod(_attention_backward_vmap)


def _register(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
    setup: Callable[..., Any],
    gradient: Callable[..., Any],
) -> None:
    qualified = f"vstar_kernels::{name}"
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_autograd(qualified, gradient, setup_context=setup, lib=LIBRARY)
    torch.library.register_vmap(qualified, vmap, lib=LIBRARY)


_register("attention", _attention, _attention_fake, _attention_vmap, _setup_context, _gradient)
_register(
    "attention_backward",
    _attention_backward,
    _attention_backward_fake,
    _attention_backward_vmap,
    _keep_nothing,
    _refuse_second_derivative,
)
