"""``tar_attention`` as PyTorch's transformations see it: one operation with a gradient.

``torch.compile`` and tensors that are not plain take the operator ``vstar_kernels::attention``,
whose backend is chosen when it runs; ``torch.func``, which does not see through that operator's
gradient, a function around it. Eager autograd takes a function without the operator, which would
cost a small call several times its own time. A call that needs none of them does without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vstar_kernels.attention import dispatch as selection
from vstar_kernels.attention.allocate import empty_like
from vstar_kernels.attention.bias import Bias, DenseBias, GaussianBias, ToeplitzBias
from vstar_kernels.attention.call import Problem
from vstar_kernels.attention.schemas import LIBRARY

# The options of a problem as an operator can take them; `form` is that of Δ. See _problem.
_OPTIONS = (
    "str form, float sigma, float strength, str stat, bool clamp_negative, bool detach_stat, "
    "float scale, int map_block, str? backend"
)
LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? values, Tensor? stat_values, "
    f"{_OPTIONS}) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "attention_backward(Tensor? grad_out, Tensor? grad_map, Tensor out, bool values_wanted, "
    "bool stat_wanted, "
    "Tensor query, Tensor key, Tensor value, Tensor? values, Tensor? stat_values, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


PLAIN = (Tensor, torch.nn.Parameter)


def needed(problem: Problem) -> bool:
    """Whether a call has to go through the operator."""
    return (
        torch.compiler.is_compiling()
        or bool(problem.needs_grad())
        or _func_is_active()
        or type(problem.tensors["query"]) not in PLAIN
    )


def attention(problem: Problem, backend: str | None) -> Tensor | tuple[Tensor, Tensor]:
    """What :func:`vstar_kernels.tar_attention` returns, where :func:`needed`.

    ``backend`` None leaves the choice to the moment when the operator runs.
    """
    names = ("query", "key", "value", "values", "stat")
    tensors = [problem.tensors.get(name) for name in names]
    run: Callable[..., Any]
    if torch.compiler.is_compiling() or type(tensors[0]) not in PLAIN:
        run = torch.ops.vstar_kernels.attention
    elif _func_is_active():
        run = _ForFunc.apply
    else:
        return _Eager.apply(*tensors, problem, backend)
    out, mean_map = run(*tensors, *_options(problem, backend))
    return (out, mean_map) if problem.return_map else out


def _options(problem: Problem, backend: str | None) -> tuple[object, ...]:
    bias = problem.bias
    map_block = problem.map_block if problem.return_map else 0
    if bias is None:
        return "none", 0.0, 0.0, "none", False, False, problem.scale, map_block, backend
    return (
        _form(bias),
        float(bias.sigma) if isinstance(bias, GaussianBias) else 0.0,
        float(bias.strength),
        "tensor" if isinstance(bias.stat, Tensor) else bias.stat,
        bias.clamp_negative,
        bias.detach_stat,
        problem.scale,
        map_block,
        backend,
    )


def _form(bias: Bias) -> str:
    if isinstance(bias, ToeplitzBias):
        return "signed" if bias.signed else "symmetric"
    return "gaussian" if isinstance(bias, GaussianBias) else "dense"


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    values: Tensor | None,
    stat_values: Tensor | None,
    form: str,
    sigma: float,
    strength: float,
    stat: str,
    clamp_negative: bool,
    detach_stat: bool,
    scale: float,
    map_block: int,
    backend: str | None,
) -> Problem:
    """The problem that :func:`_options` took apart."""
    tensors = {"query": query, "key": key, "value": value}
    weight: dict[str, Any] = {
        "strength": strength,
        "stat": stat if stat_values is None else stat_values,
        "clamp_negative": clamp_negative,
        "detach_stat": detach_stat,
    }
    bias: Bias | None = None
    if form == "gaussian":
        bias = GaussianBias(sigma, **weight)
    elif values is not None:
        bias = (
            DenseBias(values, **weight)
            if form == "dense"
            else ToeplitzBias(values, signed=form == "signed", **weight)
        )
    if bias is not None:
        tensors.update(bias.named_tensors())
    return Problem(
        tuple(query.shape),
        query.dtype,
        query.device,
        tensors,
        bias,
        scale,
        return_map=map_block > 0,
        map_block=max(map_block, 1),
    )


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = _problem(*arguments)
    result = selection.backend(problem, arguments[-1]).run(problem)
    return result if isinstance(result, tuple) else (result, _nothing(result))


def _attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = _problem(*arguments)
    out = empty_like(problem.tensors["query"])
    if not problem.return_map:
        return out, _nothing(out)
    return out, out.new_empty(problem.map_shape, dtype=torch.float32)


def _attention_backward(
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    out: Tensor,
    values_wanted: bool,
    stat_wanted: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    problem = _problem(*arguments)
    wanted = {name for name, w in (("values", values_wanted), ("stat", stat_wanted)) if w}
    backend = selection.backend(problem, arguments[-1])
    gradients = backend.backward(problem, out, grad_out, grad_map, wanted)
    for name in wanted:
        gradients[name] = gradients[name].contiguous()
    return tuple(gradients[name] if name in gradients else _nothing(out) for name in _NAMES)


def _attention_backward_fake(
    grad_out: Tensor | None,
    grad_map: Tensor | None,
    out: Tensor,
    values_wanted: bool,
    stat_wanted: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    tensors = _problem(*arguments).tensors
    gradients = {name: empty_like(tensors[name]) for name in ("query", "key", "value")}
    for name, wanted in (("values", values_wanted), ("stat", stat_wanted)):
        if wanted:
            gradients[name] = torch.empty_like(tensors[name], memory_format=torch.contiguous_format)
    return tuple(gradients[name] if name in gradients else _nothing(out) for name in _NAMES)


_MAP_BLOCK, _DETACH_STAT = -2, -4  # their places among the options
_NAMES = ("query", "key", "value", "values", "stat")


def _nothing(like: Tensor) -> Tensor:
    """For an operator's result that was not asked for."""
    return like.new_empty(0, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[0])
    ctx.options = inputs[5:]
    ctx.map_block = ctx.options[_MAP_BLOCK]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_map: Tensor | None) -> tuple[Any, ...]:
    *tensors, out = ctx.saved_tensors
    if not ctx.map_block:  # there is no map, whatever its gradient
        grad_map = None
    wanted = list(ctx.needs_input_grad[:5])
    if ctx.options[_DETACH_STAT]:
        wanted[4] = False
    no_options = (None,) * (len(ctx.needs_input_grad) - 5)
    if grad_out is None and grad_map is None:
        return *(None,) * 5, *no_options
    run: Callable[..., Any] = _attention_backward
    if _func_is_active():
        run = _BackwardForFunc.apply
    elif torch.is_grad_enabled() or type(out) not in PLAIN:  # create_graph, or traced
        run = _backward_operator
    gradients = run(grad_out, grad_map, out, wanted[3], wanted[4], *tensors, *ctx.options)
    kept = (gradient if w else None for gradient, w in zip(gradients, wanted, strict=True))
    return *kept, *no_options


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing is kept for a second derivative."""


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "tar_attention's kernels have no second derivative; backend='reference' has"
    )


def _attention_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """Over the batch: what is mapped becomes part of it."""
    size = info.batch_size
    query, key, value, values, stat_values, *options = arguments
    _refuse_mapped_values(in_dims[3])
    out, mean_map = torch.ops.vstar_kernels.attention(
        _fold(query, in_dims[0], size),
        _fold(key, in_dims[1], size),
        _fold(value, in_dims[2], size),
        values,
        _fold(stat_values, in_dims[4], size),
        *options,
    )
    out = out.unflatten(0, (size, -1))
    if not mean_map.numel():
        return (out, mean_map), (0, None)
    return (out, mean_map.unflatten(0, (size, -1))), (0, 0)


def _attention_backward_vmap(
    info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[Any, Any]:
    size = info.batch_size
    values_wanted = arguments[3]
    _refuse_mapped_values(0 if values_wanted else in_dims[8])
    folded = [
        _fold(x, dim, size) if isinstance(x, Tensor) and place != 8 else x
        for place, (x, dim) in enumerate(zip(arguments, in_dims, strict=True))
    ]
    gradients = torch.ops.vstar_kernels.attention_backward(*folded)
    mapped = tuple(x.unflatten(0, (size, -1)) if x.numel() else x for x in gradients)
    return mapped, tuple(0 if x.numel() else None for x in gradients)


def _fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _refuse_mapped_values(dim: int | None) -> None:
    if dim is not None:
        raise NotImplementedError(
            "vmap of tar_attention maps over the batch; the values of a bias are the same for all "
            "of it, and so is their gradient"
        )


def _backward_operator(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.vstar_kernels.attention_backward(*arguments)


def _func_is_active() -> bool:
    return torch._C._are_functorch_transforms_active()


class _Eager(torch.autograd.Function):
    """A call to a backend, and one to its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        values: Tensor | None,
        stat_values: Tensor | None,
        problem: Problem,
        backend: str,
    ) -> Tensor | tuple[Tensor, Tensor]:
        result = selection.BACKENDS[backend].run(problem)
        out = result[0] if isinstance(result, tuple) else result
        ctx.save_for_backward(query, key, value, values, stat_values, out)
        ctx.options = _options(problem, backend)
        ctx.map_block = ctx.options[_MAP_BLOCK]
        ctx.set_materialize_grads(False)
        return result

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
    """Likewise for its gradient."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _backward_operator(*arguments)

    setup_context = staticmethod(_no_context)
    backward = staticmethod(_no_second_derivative)
    vmap = staticmethod(_attention_backward_vmap)


def _register() -> None:
    for name, run, fake, vmap, setup, gradient in (
        ("attention", _attention, _attention_fake, _attention_vmap, _setup_context, _gradient),
        (
            "attention_backward",
            _attention_backward,
            _attention_backward_fake,
            _attention_backward_vmap,
            _no_context,
            _no_second_derivative,
        ),
    ):
        qualified = f"vstar_kernels::{name}"
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        torch.library.register_autograd(qualified, gradient, setup_context=setup, lib=LIBRARY)
        torch.library.register_vmap(qualified, vmap, lib=LIBRARY)


_register()
