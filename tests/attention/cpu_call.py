"""Direct calls of the CPU operators, their gradients by kernel and by autograd of the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import vstar_kernels as vk
from vstar_kernels import testing
from vstar_kernels.attention.bias import Bias
from vstar_kernels.attention.native import FORM_NUMBERS, STAT_NUMBERS


class Call:
    """One call: its inputs as the operators take them, its gradients by kernel and by autograd."""

    def __init__(
        self,
        *shape,
        dtype=torch.float32,
        form="signed",
        heads=1,
        stat="row_max",
        strength=0.7,
        scale=0.3,
        clamp=False,
        detach=False,
        with_map=True,
        map_heads=False,
        seed=0,
    ):
        # Another seed than that of the inputs, whose query would else be grad_out too.
        generator = torch.Generator().manual_seed(seed + 1)
        self.query, self.key, self.value = testing.inputs(*shape, dtype=dtype, seed=seed)
        self.grad_out = torch.randn(shape, generator=generator).to(dtype)
        self.frames = shape[-3]
        self.grad_map = None
        if with_map:
            # As large as the other gradients, in spite of the mean.
            sequences = math.prod(shape[1:-3]) * (1 if map_heads else shape[-2])
            sizes = (shape[0], *shape[-2:-1] * map_heads, self.frames, self.frames)
            self.grad_map = sequences * torch.randn(sizes, generator=generator)
        self.map_heads = map_heads
        self.form, self.delta = form, None
        if form != "none":
            reach = self.frames + 2  # a table may reach further than the call
            shapes = {
                "symmetric": (reach,),
                "signed": (2 * reach - 1,),
                "dense": (self.frames, self.frames),
            }
            self.delta = torch.rand(heads, *shapes[form], generator=generator)
        self.stat, self.stat_tensor = stat, None
        if stat == "tensor":  # of an odd layout, with both signs
            reverse = torch.randn(shape[:-1][::-1], generator=generator)
            self.stat_tensor = reverse.permute(*reversed(range(reverse.ndim)))
        self.strength, self.scale, self.clamp, self.detach = strength, scale, clamp, detach

    def inputs(self) -> tuple:
        """What both operators take first, from query to clamp_negative."""
        return (
            *(self.query, self.key, self.value, self.delta, self.stat_tensor),
            *(FORM_NUMBERS[self.form], self.strength, STAT_NUMBERS[self.stat], self.clamp),
        )

    def map_options(self) -> tuple:
        """What both operators take last: frames in a block, and whether each head has a map."""
        return 1, self.map_heads

    def forward_arguments(self, with_map: bool = True) -> tuple:
        """The forward operator's, with an output and a map of NaN to write."""
        out = torch.full_like(self.query, math.nan)
        heads = self.query.shape[-2:-1] * self.map_heads
        mean_map = torch.full((len(self.query), *heads, self.frames, self.frames), math.nan)
        mean_map = mean_map if with_map else None
        return out, mean_map, *self.inputs(), self.scale, *self.map_options()

    def backward_arguments(self) -> tuple:
        """The backward operator's, the first five of which are gradients of NaN to write."""
        tensors = (self.query, self.key, self.value, self.delta, self.stat_tensor)
        grads = (None if x is None else torch.full_like(x, math.nan) for x in tensors)
        given = (self.grad_out, self.grad_map, *self.inputs(), self.detach, self.scale)
        return *grads, *given, *self.map_options()

    def gradients(self) -> dict[str, Tensor]:
        """The kernel's gradients, in which an element left unwritten is NaN."""
        arguments = self.backward_arguments()
        torch.ops.vstar_kernels.cpu_backward(*arguments)
        named = zip(("query", "key", "value", "delta", "stat"), arguments, strict=False)
        return {name: grad for name, grad in named if grad is not None}

    def forward(self) -> tuple[Tensor, Tensor]:
        """The kernel's output and map, in which an element left unwritten is NaN."""
        arguments = self.forward_arguments()
        torch.ops.vstar_kernels.cpu_forward(*arguments)
        return arguments[:2]

    def autograd(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The reference's gradients by autograd, each tensor of the call changed first."""
        named = {"query": self.query, "key": self.key, "value": self.value}
        named |= {"delta": self.delta, "stat": self.stat_tensor}
        leaves = {
            name: change(x.detach()).requires_grad_() for name, x in named.items() if x is not None
        }
        stat = leaves["stat"].float() if "stat" in leaves else self.stat
        out, mean_map = vk.reference.tar_attention(
            *(leaves[name] for name in ("query", "key", "value")),
            self.bias_object(leaves.get("delta"), stat),
            scale=self.scale,
            return_map=True,
            map_heads=self.map_heads,
        )
        outputs, grads = [out], [change(self.grad_out).to(out)]
        if self.grad_map is not None:
            outputs, grads = [*outputs, mean_map], [*grads, change(self.grad_map).to(mean_map)]
        results = torch.autograd.grad(
            outputs, list(leaves.values()), grads, allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, results, strict=True))

    def bias_object(self, delta: Tensor | None, stat: str | Tensor) -> Bias | None:
        """The call's bias, with these entries of Δ and this statistic."""
        if delta is None:
            return None
        options = {
            "strength": self.strength,
            "stat": stat,
            "clamp_negative": self.clamp,
            "detach_stat": self.detach,
        }
        delta = delta if delta.shape[0] > 1 else delta[0]
        if self.form == "dense":
            return vk.DenseBias(delta, **options)
        return vk.ToeplitzBias(delta, signed=self.form == "signed", **options)


def assert_gradients(call: Call) -> None:
    """The kernel's gradients are as exact as :func:`testing.assert_gradients` asks."""
    testing.assert_gradients(call.gradients(), call.autograd)


def assert_map(call: Call) -> None:
    """The kernel's mean map is as exact as :func:`testing.assert_map` asks."""
    leaves = [x.double() for x in (call.query, call.key, call.value)]
    bias = call.bias_object(
        None if call.delta is None else call.delta.double(),
        call.stat if call.stat_tensor is None else call.stat_tensor,
    )
    options = {"scale": call.scale, "return_map": True, "map_heads": call.map_heads}
    _, expected = testing.oracle(*leaves, bias, **options)
    testing.assert_map(call.forward()[1], expected, frames=call.frames)
