"""How the operators run on DTensors: by batch, space or queries, and heads, each process its part.

PyTorch asks a sharding rule which placements of an operator's tensors give which of its results.
Attention is independent for each batch element, each position of space and each head, so that it
can be sharded along those without a word between processes. What processes share, such as the
entries of Δ, gets a gradient that is a partial sum; a mean map over sharded heads or space is a
partial mean. Frames, and the tokens that are attended to, cannot be sharded: a softmax is over all.

The rules are registered when the first DTensor arrives; nothing here is imported before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._api import _FromTorchTensor
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from vstar_kernels.attention import bias

if TYPE_CHECKING:
    from vstar_kernels.attention.autograd import Operator

Rule = tuple[Sequence[Placement | None], list[Placement | None]]  # of the results, of the arguments


@dataclass(frozen=True)
class Way:
    """One way to shard an operator over the processes of one dimension of a mesh.

    Attributes:
        name: What is sharded, in messages.
        tensors: The dimension in which each of the call's tensors is sharded; those that are not
            named here are the same in all processes.
        out: The dimension of the output that is sharded.
        map: That of the map; None where each process has a map of its part, of which the mean over
            processes is meant.
    """

    name: str
    tensors: dict[str, int] = field(default_factory=dict)
    out: int = 0
    map: int | None = None


def _attention_ways(call: Any) -> list[Way]:
    heads = call.query.ndim - 2
    attended = ("query", "key", "value", "stat")
    per_head = {} if call.delta is None else {"delta": 0}
    if call.delta is not None and call.delta.ndim == bias.dims(call.options.form):
        per_head = {}
    map_dim = 1 if call.options.map_heads else None
    ways = [
        Way("batch", dict.fromkeys(attended, 0), 0, 0),
        Way("heads", dict.fromkeys(attended, heads) | per_head, heads, map_dim),
    ]
    if call.query.ndim == 5:
        ways.append(Way("space", dict.fromkeys(attended, 1), 1))
    return ways


def _frame_ways(call: Any) -> list[Way]:
    batch = ("query", "key", "value", "key_lengths", "stat")
    heads = dict.fromkeys(("query", "key", "value", "stat"), 2)
    # Of tables with heads: (heads, F_q, F_k), and the factors' (2, heads, F_q, F_k).
    for name, dim in (("delta", 0), ("offset", 0), ("factor", 1)):
        table = getattr(call, name)
        if table is not None and table.ndim == dim + 3:
            heads[name] = dim
    map_dim = 1 if call.options.mean_map == "heads" else None
    return [Way("batch", dict.fromkeys(batch, 0), 0, 0), Way("heads", heads, 2, map_dim)]


def _column_ways(call: Any) -> list[Way]:
    return [
        Way("batch", dict.fromkeys(("query", "key", "value", "columns"), 0), 0, 0),
        Way("queries", {"query": 1}, 1, 1),
        Way("heads", dict.fromkeys(("query", "key", "value"), 2), 2),
    ]


_WAYS = {
    "attention": _attention_ways,
    "frame_attention": _frame_ways,
    "column_attention": _column_ways,
}


def arrive(operator: Operator, call: Any) -> list[Tensor | None]:
    """Returns a call's tensors as DTensors, for the operator, whose rules are then registered.

    What is no DTensor is taken to be the same in all processes, and its gradient is summed.

    Raises:
        ValueError: A tensor is sharded along a dimension that the operation cannot be sharded
            along, or two are on different meshes.
    """
    _register(operator)
    tensors: dict[str, Any] = {name: getattr(call, name) for name in operator.tensors}
    spread = {name: x for name, x in tensors.items() if isinstance(x, DTensor)}
    first, mesh = next((name, x.device_mesh) for name, x in spread.items())
    for name, x in spread.items():
        if x.device_mesh != mesh:
            raise ValueError(
                f"{name} must be on {first}'s device mesh {mesh}, got one on {x.device_mesh}"
            )
    _check(operator, call, spread)
    everywhere = (Replicate(),) * mesh.ndim
    return [
        # DTensor.from_local would move tables from the CPU, where the backends take them.
        x if x is None or isinstance(x, DTensor) else _FromTorchTensor.apply(
            x, mesh, everywhere, False
        )
        for x in tensors.values()
    ]  # fmt: skip


def register() -> None:
    """Registers the rules of all operations, for torch.compile, which cannot while it traces."""
    from vstar_kernels.attention import autograd

    for operator in (autograd.attention, autograd.frame_attention, autograd.column_attention):
        _register(operator)


def _check(operator: Operator, call: Any, spread: dict[str, Any]) -> None:
    ways = _WAYS[operator.name](call)
    for name, x in spread.items():
        allowed = {way.tensors[name]: way.name for way in ways if name in way.tensors}
        for mesh_dim, placement in enumerate(x.placements):
            if not isinstance(placement, Shard):
                continue
            dim = placement.dim % x.ndim
            if dim not in allowed:
                can = ", ".join(f"Shard({d}) ({what})" for d, what in sorted(allowed.items()))
                raise ValueError(
                    f"{operator.operation.name} cannot be sharded along dimension {dim} of {name}, "
                    f"{tuple(x.shape)}: a softmax is over all frames or tokens at once. Allowed: "
                    f"{can or 'none'}; .redistribute() it first"
                )
            parts = x.device_mesh.size(mesh_dim)
            if allowed[dim] == "heads" and not _heads_divide(call, parts):
                raise ValueError(
                    f"the {call.query.shape[2]} heads of {name}, which read {call.key.shape[2]} of "
                    f"keys, cannot be sharded over {parts} processes: both must be multiples of it"
                )


def _heads_divide(call: Any, parts: int) -> bool:
    """Returns whether each process has the keys' heads that its queries' heads read."""
    dim = call.query.ndim - 2
    heads, key_heads = call.query.shape[dim], call.key.shape[dim]
    return bool(heads == key_heads or key_heads % parts == 0)


def _rules(operator: Operator, call: Any, mesh: Any) -> list[Way]:
    """Returns the ways in which a call can be sharded over any dimension of a mesh."""
    ways = []
    for way in _WAYS[operator.name](call):
        size = call.query.shape[way.tensors["query"]]
        # The mean of means of parts is that of all only where the parts are equal.
        if way.map is None and operator.has_map(call.options) and size % mesh.size():
            continue
        if way.name == "heads" and not _heads_divide(call, mesh.size()):
            continue
        ways.append(way)
    return ways


def _described(operator: Operator, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """Returns what is known of a call by an operator's arguments, whose tensors have no numbers."""
    tensors = dict(zip(operator.tensors, arguments, strict=False))
    options = operator.options(*arguments[len(tensors) : -1])
    return SimpleNamespace(**tensors, options=options), tensors


def _placements(tensors: dict[str, Any], way: Way | None) -> list[Placement | None]:
    sharded = {} if way is None else way.tensors
    return [
        None if x is None else Shard(sharded[name]) if name in sharded else Replicate()
        for name, x in tensors.items()
    ]


@functools.cache
def _register(operator: Operator) -> None:
    """Registers the rules of an operator and of its gradient's, once."""

    def forward_rule(*arguments: Any) -> list[Rule]:
        call, tensors = _described(operator, arguments)
        rest = [None] * (len(arguments) - len(tensors))
        rules: list[Rule] = []
        for way in (None, *_rules(operator, call, call.query.mesh)):
            out = _result(way, "out", there=operator.has_out(call.options))
            mean_map = _result(way, "map", there=operator.has_map(call.options))
            rules.append(([out, mean_map], [*_placements(tensors, way), *rest]))
        return rules

    def backward_rule(*arguments: Any) -> list[Rule]:
        given, grad_out, grad_map, out, wanted = operator._split_backward(arguments)
        call, tensors = _described(operator, given)
        rest = [None] * (len(given) - len(tensors))
        rules: list[Rule] = []
        for way in (None, *_rules(operator, call, call.query.mesh)):
            results = [
                None if grad_out is None else _result(way, "out", there=True),
                None if grad_map is None else _map_gradient(way),
                None if out is None else _result(way, "out", there=operator.has_out(call.options)),
            ]
            gradients = [
                _gradient(
                    way, name, there=getattr(wanted, name, True) and tensors[name] is not None
                )
                for name in operator.gradients._fields
            ]
            flags = [None] * len(wanted)
            rules.append((gradients, [*_placements(tensors, way), *rest, *results, *flags]))
        return rules

    propagator = DTensor._op_dispatcher.sharding_propagator
    for operation, rule in (
        (operator.forward_operator.default, forward_rule),
        (operator.backward_operator.default, backward_rule),
    ):
        register_sharding(operation)(rule)
        # Which results there are depends on options that are no integers, too.
        propagator.op_to_schema_info[operation] = RuntimeSchemaInfo(0, None, needs_pytree=True)


def _result(way: Way | None, which: str, *, there: bool) -> Placement:
    """Returns the placement of the output or the map; of an empty one where it is not there."""
    if way is None or not there:
        return Replicate()
    if which == "out":
        return Shard(way.out)
    return Partial("avg") if way.map is None else Shard(way.map)


def _map_gradient(way: Way | None) -> Placement:
    """Returns the placement of a map's gradient; of a mean map each process takes its share of it.

    That is the gradient divided by their number, which a partial sum is made of.
    """
    if way is None:
        return Replicate()
    return Partial("sum") if way.map is None else Shard(way.map)


def _gradient(way: Way | None, name: str, *, there: bool) -> Placement:
    if way is None or not there:
        return Replicate()
    return Shard(way.tensors[name]) if name in way.tensors else Partial()
