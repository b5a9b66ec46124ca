"""The operations as PyTorch's transformations see them: each one operation with a gradient.

``torch.compile`` and tensors that are not plain take an operator, such as
``vstar_kernels::attention``, whose backend is chosen when it runs. ``torch.func``, which does not
see through that operator's gradient, takes a function around it. Eager autograd takes a function
without the operator, which would cost a small call several times its own time. A call that needs
none of them does without, unless a ``TorchDispatchMode`` is on: that would see no operation where
Triton's kernels are launched, and elsewhere what a backend is made of.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Protocol, get_type_hints

import torch
from torch import Tensor

from vstar_kernels.attention import dispatch, flops
from vstar_kernels.attention.call import (
    Call,
    Gradients,
    Options,
    Wanted,
    empty_like,
    follows_tangents,
    nothing,
)
from vstar_kernels.attention.columns.call import (
    ColumnCall,
    ColumnGradients,
    ColumnOptions,
    ColumnWanted,
)
from vstar_kernels.attention.frames.call import (
    FrameCall,
    FrameGradients,
    FrameOptions,
    FrameWanted,
)
from vstar_kernels.attention.frames.cost import kept_pairs
from vstar_kernels.attention.native import LIBRARY

PLAIN = (Tensor, torch.nn.Parameter)
ATTENDED = ("query", "key", "value")  # whose gradients are laid as call.empty_like lays them


class AnyCall(Protocol):
    """What is the same of the calls of all operations."""

    query: Tensor
    key: Tensor

    @property
    def requires_grad(self) -> bool:
        """Whether any of the tensors requires a gradient."""

    @property
    def map_shape(self) -> tuple[int, ...]:
        """The shape of the returned map."""


def needed(call: AnyCall) -> bool:
    """Returns whether a call has to go through its operation's :class:`Operator`."""
    return (torch.is_grad_enabled() and call.requires_grad) or traced(call) or _func_is_active()


def traced(call: AnyCall) -> bool:
    """Returns whether a call is traced or watched, not only run, or its tensors have no numbers."""
    query = call.query
    return (
        torch.compiler.is_compiling()
        or type(query) not in PLAIN
        or query.is_meta
        or _watched()
        or (type(call.key) not in PLAIN and spread(call))
    )


def _watched() -> bool:
    """Returns whether a ``TorchDispatchMode`` is on, which is to see one operator for the call."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    flops.make_known()
    return True


def spread(call: AnyCall) -> bool:
    """Returns whether a call's tensors are spread over processes: whether they are DTensors.

    In compiled code they are what the rules of :mod:`vstar_kernels.attention.dtensor` say, which an
    eager call or ``dtensor.register()`` has registered.
    """
    if type(call.query) in PLAIN and type(call.key) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # without which there are none
    if module is None or torch.compiler.is_compiling():
        return False
    return isinstance(call.query, module.DTensor) or isinstance(call.key, module.DTensor)


def _func_is_active() -> bool:
    return torch._C._are_functorch_transforms_active()


def _func_makes_functional() -> bool:
    """Returns whether the outermost of torch.func's transformations is ``functionalize``."""
    outermost = torch._C._functorch.peek_interpreter_stack()
    return outermost.key() == torch._C._functorch.TransformType.Functionalize


class Operator:
    """An operation's operator, its gradient, and what runs one of them.

    The operator takes a call's tensors, query, key and value first, then the fields of its options
    in their order, and the backend. It returns the output and the map, empty where there is none.
    The gradient's operator takes the same first: torch 2.11 finds DTensors by the first argument.

    Args:
        operation: The operation and its backends.
        name: The operator's, in the library ``vstar_kernels``.
        tensors: The names and types of a call's tensors in its order, as a schema has them.
        call, options, wanted, gradients: The classes of the operation's calls.
        shared: Of the tensors, those that are the same for the whole batch.
        pairs: How many pairs of a query and a key are multiplied, of all heads and sequences.
        has_map: Whether options ask for a map.
        keeps_out: Whether the output is kept for the gradient, and given to it.
    """

    def __init__(
        self,
        operation: dispatch.Operation[Any, Any, Any],
        name: str,
        tensors: dict[str, str],
        call: Callable[..., Any],
        options: type[Any],
        wanted: type[Any],
        gradients: type[Any],
        shared: tuple[str, ...],
        pairs: Callable[[Any], int],
        has_map: Callable[[Any], bool],
        keeps_out: bool = True,
    ) -> None:
        self.operation, self.name, self.tensors = operation, name, tuple(tensors)
        self.call, self.options = call, options
        self.has_map, self.has_out, self.keeps_out = has_map, operation.has_out, keeps_out
        self.wanted, self.gradients, self.pairs = wanted, gradients, pairs
        self.shared = {self.tensors.index(x) for x in shared}
        self.graded = tuple(self.tensors.index(x) for x in gradients._fields)
        # A statistic's name and the tensor that it may be are both called stat.
        typed = [f"{kind} {x}{'_tensor' * (x == 'stat')}" for x, kind in tensors.items()]
        typed += [f"{kind.__name__} {x}" for x, kind in get_type_hints(options).items()]
        arguments = ", ".join([*typed, "str? backend"])
        flags = "".join(f", bool {x}_wanted" for x in wanted._fields)
        results = ", ".join(["Tensor"] * len(self.graded))
        self._define(
            name,
            f"({arguments}) -> (Tensor, Tensor)",
            self._run,
            self._fake,
            self._vmap,
            self._keep,
            _gradient,
        )
        self._define(
            f"{name}_backward",
            f"({arguments}, Tensor? grad_out, Tensor? grad_map, Tensor? out{flags}) -> ({results})",
            self._run_backward,
            self._fake_backward,
            self._vmap_backward,
            _keep_nothing,
            self._refuse_second_derivative,
        )
        self.forward_operator = getattr(torch.ops.vstar_kernels, name)
        self.backward_operator = getattr(torch.ops.vstar_kernels, f"{name}_backward")
        flops.FORMULAS[self.forward_operator] = self.flops
        flops.FORMULAS[self.backward_operator] = self.backward_flops

    def _define(
        self,
        name: str,
        schema: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        vmap: Callable[..., Any],
        setup: Callable[..., Any],
        gradient: Callable[..., Any],
    ) -> None:
        qualified = f"vstar_kernels::{name}"
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        torch.library.register_autograd(qualified, gradient, setup_context=setup, lib=LIBRARY)
        torch.library.register_vmap(qualified, vmap, lib=LIBRARY)

    def __call__(self, call: Any, backend: str | None) -> Tensor | tuple[Tensor, Tensor]:
        """Returns what the public function returns, where :func:`needed`.

        ``backend`` None leaves the choice to the moment when the operator runs.
        """
        if torch.compiler.is_compiling() and follows_tangents():
            # A graph would hold the operator, which drops them. Where it need not be whole, torch
            # runs the function as it is instead.
            raise NotImplementedError(
                f"{self.operation.name} has no forward-mode derivative under torch.compile: "
                "compute tangents (torch.func.jvp, jacfwd) outside of the compiled function"
            )
        tensors = [getattr(call, name) for name in self.tensors]
        if spread(call):
            from vstar_kernels.attention import dtensor

            tensors = dtensor.arrive(self, call)
        if _func_is_active() and not torch.compiler.is_compiling() and type(call.query) in PLAIN:
            out, mean_map = self.under_func(*tensors, *call.options, backend)
        elif traced(call):
            out, mean_map = self.forward_operator(*tensors, *call.options, backend)
        else:
            return _Eager.apply(*tensors, call.options, backend, self)
        return self.asked(call.options, out, mean_map)

    def asked(self, options: Any, out: Tensor, mean_map: Any) -> Any:
        """Returns the output, the map or both, whatever options ask for."""
        return self.operation.results(options, out, mean_map if self.has_map(options) else None)

    def split(self, arguments: tuple[Any, ...]) -> tuple[Any, str | None]:
        """Returns the call and the backend that an operator's arguments are."""
        tensors, options = arguments[: len(self.tensors)], arguments[len(self.tensors) : -1]
        return self.call(*tensors, self.options(*options)), arguments[-1]

    # ---- its operations ----

    def flops(self, *arguments: Any, out_val: Any = None) -> int:
        """Returns the operations of QKᵀ and of PV, if it is wanted, as SDPA's are counted."""
        call, _ = self.split(arguments)
        return self._flops(call, 2 if self.has_out(call.options) else 1)

    def backward_flops(self, *arguments: Any, out_val: Any = None) -> int:
        """Returns the operations of QKᵀ again, dP, dQ, dK and dV."""
        call, _ = self.split(self._split_backward(arguments)[0])
        return self._flops(call, 5 if self.has_out(call.options) else 3)

    def _flops(self, call: Any, products: int) -> int:
        return 2 * products * self.pairs(call) * int(call.query.shape[-1])

    # ---- the operator ----

    def _run(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        call, name = self.split(arguments)
        out, mean_map, _ = self.operation.run(self.operation.choose(call, name), call)
        return out, nothing(out) if mean_map is None else mean_map

    def _fake(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        call, _ = self.split(arguments)
        query = call.query
        out = empty_like(query) if self.has_out(call.options) else nothing(query)
        if not self.has_map(call.options):
            return out, nothing(query)
        return out, query.new_empty(call.map_shape, dtype=torch.float32)

    def lowered(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Returns what the operator does, by the C++ operator: what it is in a graph without ours.

        Raises:
            ValueError: The C++ kernels cannot compute the call, with every reason.
        """
        from torch._subclasses.functional_tensor import dispatch_functionalize  # is slow to import

        # A graph that is decomposed has no operators any more that write their arguments.
        run: Callable[..., Any] = dispatch_functionalize(self._run)
        with torch.no_grad():  # or they could be asked for gradients, which the graph has none of
            return run(*arguments[:-1], "cpu")

    def under_func(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Runs the operator as the outermost of torch.func's transformations can follow it.

        Compiled code has the operator alone, of which torch maps over the batch by ``_vmap``.
        """
        if not _func_is_active() or _func_makes_functional() or torch.compiler.is_compiling():
            return self.forward_operator(*arguments)
        return _ForFunc.apply(*arguments, self)

    def backward_under_func(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Runs the gradient's operator as :meth:`under_func` does the other one."""
        if not _func_is_active() or _func_makes_functional():
            return self.backward_operator(*arguments)
        return _BackwardForFunc.apply(*arguments, self)

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        self._refuse_mapped(in_dims)
        results = self.under_func(*self._fold(arguments, in_dims, info.batch_size))
        options = self.options(*arguments[len(self.tensors) : -1])
        there = (self.has_out(options), self.has_map(options))
        return self._unfold(results, there, info.batch_size)

    # ---- its gradient ----

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps what the gradient needs of the operator's arguments and results."""
        count = len(self.tensors)
        ctx.save_for_backward(*inputs[:count], output[0] if self.keeps_out else None)
        ctx.options, ctx.backend = self.options(*inputs[count:-1]), inputs[-1]
        ctx.chosen = None  # when the gradient is computed
        ctx.operator = self
        ctx.set_materialize_grads(False)

    def _split_backward(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the forward's arguments, the gradients of results, the output, what is wanted."""
        count = len(self.tensors) + len(self.options._fields) + 1
        grad_out, grad_map, out, *wanted = arguments[count:]
        return arguments[:count], grad_out, grad_map, out, self.wanted(*wanted)

    def _run_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        given, grad_out, grad_map, out, wanted = self._split_backward(arguments)
        call, name = self.split(given)
        chosen = self.choose_backward(call, name, wanted)
        gradients = self.operation.run_backward(chosen, call, out, (), grad_out, grad_map, wanted)
        return self._as_results(call.query, gradients)

    def choose_backward(self, call: Any, name: str | None, wanted: Any) -> str:
        """Returns the name of the backend that computes these gradients; of None, the first.

        What runs below autograd sees no tensor that requires a gradient, so that the forward pass
        of a graph may be a backend's that has none. Backends are asked with tensors that do.
        """
        needed = {x: getattr(wanted, x, True) for x in self.gradients._fields}
        tensors = {x: getattr(call, x) for x in needed}
        with torch.enable_grad():
            asked = {
                x: tensor.detach().requires_grad_(needed[x])
                for x, tensor in tensors.items()
                if tensor is not None
            }
            return self.operation.choose(dataclasses.replace(call, **asked), name)

    def _fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        *_, wanted = self._split_backward(arguments)
        made = []
        for name, place in zip(self.gradients._fields, self.graded, strict=True):
            make = empty_like if name in ATTENDED else torch.empty_like
            keep = getattr(wanted, name, True) and arguments[place] is not None
            made.append(make(arguments[place]) if keep else None)
        return self._as_results(arguments[0], self.gradients(*made))

    def _as_results(self, query: Tensor, gradients: Any) -> tuple[Tensor, ...]:
        """Returns gradients as an operator does: none missing; contiguous, but of ATTENDED."""
        return tuple(
            nothing(query) if x is None else x if name in ATTENDED else x.contiguous()
            for name, x in zip(self.gradients._fields, gradients, strict=True)
        )

    def _vmap_backward(
        self, info: Any, in_dims: tuple[Any, ...], *arguments: Any
    ) -> tuple[Any, Any]:
        self._refuse_mapped(in_dims)
        *_, wanted = self._split_backward(arguments)
        there = tuple(getattr(wanted, name, True) for name in self.gradients._fields)
        if any(place in self.shared and x for place, x in zip(self.graded, there, strict=True)):
            self._refuse_mapped(None)
        gradients = self.backward_under_func(*self._fold(arguments, in_dims, info.batch_size))
        return self._unfold(gradients, there, info.batch_size)

    def _unfold(self, results: tuple[Tensor, ...], there: tuple[bool, ...], size: int) -> Any:
        """Returns those results that are there with the mapped dimension first, and its place."""
        pairs = zip(results, there, strict=True)
        mapped = tuple(x.unflatten(0, (size, -1)) if is_there else x for x, is_there in pairs)
        return mapped, tuple(0 if is_there else None for is_there in there)

    def _fold(self, arguments: tuple[Any, ...], in_dims: tuple[Any, ...], size: int) -> list[Any]:
        """Returns arguments with the mapped dimension in each tensor's batch, but shared ones."""

        def fold(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        pairs = enumerate(zip(arguments, in_dims, strict=True))
        return [x if i in self.shared else fold(x, dim) for i, (x, dim) in pairs]

    def _refuse_mapped(self, in_dims: tuple[Any, ...] | None) -> None:
        """Raises if a tensor is mapped over that the batch shares, or, of None, its gradient is."""
        if in_dims is None or any(in_dims[place] is not None for place in self.shared):
            raise NotImplementedError(
                f"vmap of {self.operation.name}'s kernels maps over the batch; the entries of a "
                "bias are the same for all of it, and so is their gradient; backend='reference' "
                "maps over both"
            )

    def _refuse_second_derivative(self, ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"{self.operation.name}'s kernels have no second derivative; backend='reference' has"
        )


def _gradient(ctx: Any, grad_out: Tensor | None, grad_map: Tensor | None) -> tuple[Any, ...]:
    """Returns the gradients of a node's inputs, in their order: the tensors, then the rest."""
    operator: Operator = ctx.operator
    count, needs = len(operator.tensors), ctx.needs_input_grad
    kept_tensors = ctx.saved_tensors  # once: a checkpoint computes them
    tensors, (out, *saved) = kept_tensors[:count], kept_tensors[count:]
    # The gradient of an empty result means nothing.
    grad_out = grad_out if operator.has_out(ctx.options) else None
    grad_map = grad_map if operator.has_map(ctx.options) else None
    if grad_out is None and grad_map is None:
        return (None,) * len(needs)
    fields = operator.gradients._fields
    kept = dict(zip(fields, (needs[place] for place in operator.graded), strict=True))
    wanted = operator.wanted(**{x: kept[x] for x in operator.wanted._fields})
    gradients: tuple[Tensor | None, ...]
    arguments = (*tensors, *ctx.options, ctx.backend, grad_out, grad_map, out, *wanted)
    if _func_is_active():
        gradients = operator.backward_under_func(*arguments)
    elif (
        torch.is_grad_enabled()  # create_graph
        or type(tensors[0]) not in PLAIN  # traced
        or tensors[0].is_meta  # there is nothing to compute
        or any(map(_is_batched, (grad_out, grad_map)))
        or _watched()
    ):
        gradients = operator.backward_operator(*arguments)
    else:
        call = operator.call(*tensors, ctx.options)
        chosen = ctx.chosen or operator.choose_backward(call, ctx.backend, wanted)
        gradients = operator.operation.run_backward(
            chosen, call, out, tuple(saved), grad_out, grad_map, wanted
        )
    result: list[Tensor | None] = [None] * len(needs)
    for place, gradient, keep in zip(operator.graded, gradients, kept.values(), strict=True):
        result[place] = gradient if keep else None
    return tuple(result)


def _is_batched(gradient: Tensor | None) -> bool:
    """Returns whether it is many gradients: of ``is_grads_batched``, which is not torch.func's."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps nothing: there is no second derivative that could want it."""


# ---- the functions around the operators ----


class _Eager(torch.autograd.Function):
    """One forward and one backward pass of a backend, without the operator."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        *tensors, options, backend, operator = arguments
        call = operator.call(*tensors, options)
        ctx.chosen = backend
        out, mean_map, saved = operator.operation.run(backend, call, save=True)
        ctx.save_for_backward(*tensors, out if operator.keeps_out else None, *saved)
        ctx.options, ctx.backend, ctx.operator = options, backend, operator
        ctx.set_materialize_grads(False)
        value = operator.tensors.index("value")
        others = (needs for place, needs in enumerate(ctx.needs_input_grad) if place != value)
        if mean_map is not None and not any(others):
            ctx.mark_non_differentiable(mean_map)
        return operator.asked(options, out, mean_map)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_map: Tensor | None = None) -> Any:
        if not ctx.operator.has_out(ctx.options):  # then the map is the only result
            return _gradient(ctx, None, grad)
        return _gradient(ctx, grad, grad_map)


class _ForFunc(torch.autograd.Function):
    """The operator for torch.func, which does not see through ``register_autograd``."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *others, operator = arguments
        return operator.forward_operator(*others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *others, operator = inputs
        operator._keep(ctx, tuple(others), output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_map: Tensor | None) -> Any:
        return _gradient(ctx, grad_out, grad_map)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        *others, operator = arguments
        return operator._vmap(info, in_dims[:-1], *others)


class _BackwardForFunc(torch.autograd.Function):
    """The operator's gradient for torch.func."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *others, operator = arguments
        return operator.backward_operator(*others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operator = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.operator._refuse_second_derivative(ctx, *gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        *others, operator = arguments
        return operator._vmap_backward(info, in_dims[:-1], *others)


# ---- the operations ----

attention = Operator(
    dispatch.TAR_ATTENTION,
    "attention",
    {"query": "Tensor", "key": "Tensor", "value": "Tensor", "delta": "Tensor?", "stat": "Tensor?"},
    Call,
    Options,
    Wanted,
    Gradients,
    shared=("delta",),
    pairs=lambda call: call.query.numel() // call.head_dim * call.frames,
    has_map=lambda options: options.map_block > 0,
)

frame_attention = Operator(
    dispatch.FRAME_ATTENTION,
    "frame_attention",
    {
        "query": "Tensor",
        "key": "Tensor",
        "value": "Tensor",
        "key_lengths": "Tensor?",
        "stat": "Tensor?",
        "query_runs": "Tensor",
        "key_runs": "Tensor",
        "delta": "Tensor?",
        "offset": "Tensor?",
        "factor": "Tensor?",
        "factor_span": "Tensor?",
        "band": "Tensor?",
    },
    FrameCall,
    FrameOptions,
    FrameWanted,
    FrameGradients,
    shared=(
        "query_runs", "key_runs", "delta", "offset", "factor", "factor_span", "band",
    ),
    pairs=lambda call: call.batch * kept_pairs(call),
    has_map=lambda options: options.mean_map != "none",
)  # fmt: skip

column_attention = Operator(
    dispatch.COLUMN_ATTENTION,
    "column_attention",
    {"query": "Tensor", "key": "Tensor", "value": "Tensor?", "columns": "Tensor"},
    ColumnCall,
    ColumnOptions,
    ColumnWanted,
    ColumnGradients,
    shared=(),
    pairs=lambda call: call.batch * call.heads * call.queries * call.keys,
    has_map=lambda options: True,
    keeps_out=False,
)
