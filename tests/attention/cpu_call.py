"""Direct calls of the CPU operators, their gradients by kernel and by autograd of the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import vstar_kernels as vk
from vstar_kernels import testing
from vstar_kernels.attention.schemas import STAT_NUMBERS, STAT_TENSOR


class Call:
    """One call: its inputs as the operators take them, its gradients by kernel and by autograd."""

    def __init__(
        self,
        *shape,
        dtype=torch.float32,
        form="table",
        heads=1,
        stat="row_max",
        strength=0.7,
        scale=0.3,
        clamp=False,
        detach=False,
        with_map=True,
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
            sequences = math.prod(shape[1:-3]) * shape[-2]
            sizes = (shape[0], self.frames, self.frames)
            self.grad_map = sequences * torch.randn(sizes, generator=generator)
        self.bias = None
        if form == "table":
            self.bias = torch.rand(heads, 2 * self.frames + 3, generator=generator)
        elif form == "dense":
            self.bias = torch.rand(heads, self.frames, self.frames, generator=generator)
        self.stat, self.stat_values = stat, None
        if stat == "tensor":  # of an odd layout, with both signs
            reverse = torch.randn(shape[:-1][::-1], generator=generator)
            self.stat_values = reverse.permute(*reversed(range(reverse.ndim)))
        self.strength, self.scale, self.clamp, self.detach = strength, scale, clamp, detach

    def gradients(self) -> dict[str, Tensor]:
        """The kernel's. They start as NaN, so that an element left unwritten shows."""
        named = {"query": self.query, "key": self.key, "value": self.value}
        grads = {name: torch.full_like(x, math.nan) for name, x in named.items()}
        for name, x in (("bias", self.bias), ("stat", self.stat_values)):
            if x is not None:
                grads[name] = torch.full_like(x, math.nan)
        torch.ops.vstar_kernels.cpu_backward(
            *(grads.get(name) for name in ("query", "key", "value", "bias", "stat")),
            self.grad_out,
            self.grad_map,
            *self.arguments(),
            self.detach,
        )
        return grads

    def forward(self) -> tuple[Tensor, Tensor]:
        """The kernel's output and map."""
        out = torch.full_like(self.query, math.nan)
        mean_map = torch.full((self.query.shape[0], self.frames, self.frames), math.nan)
        torch.ops.vstar_kernels.cpu_forward(out, mean_map, *self.arguments())
        return out, mean_map

    def autograd(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The reference's gradients by autograd, each tensor of the call changed first."""
        named = {"query": self.query, "key": self.key, "value": self.value}
        named |= {"bias": self.bias, "stat": self.stat_values}
        leaves = {
            name: change(x.detach()).requires_grad_() for name, x in named.items() if x is not None
        }
        stat = leaves["stat"].float() if "stat" in leaves else self.stat
        out, mean_map = vk.reference.tar_attention(
            *(leaves[name] for name in ("query", "key", "value")),
            self.bias_object(leaves.get("bias"), stat),
            scale=self.scale,
            return_map=True,
        )
        outputs, grads = [out], [change(self.grad_out).to(out)]
        if self.grad_map is not None:
            outputs, grads = [*outputs, mean_map], [*grads, change(self.grad_map).to(mean_map)]
        results = torch.autograd.grad(
            outputs, list(leaves.values()), grads, allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, results, strict=True))

    def arguments(self):
        number = STAT_TENSOR if self.stat == "tensor" else STAT_NUMBERS[self.stat]
        return (
            *(self.query, self.key, self.value, self.bias, self.stat_values),
            *(self.scale, self.strength, number, self.clamp),
        )

    def bias_object(self, bias: Tensor | None, stat: str | Tensor) -> vk.attention.bias.Bias | None:
        if bias is None:
            return None
        options = {
            "strength": self.strength,
            "stat": stat,
            "clamp_negative": self.clamp,
            "detach_stat": self.detach,
        }
        bias = bias if bias.shape[0] > 1 else bias[0]
        if self.bias.ndim == 2:
            return vk.ToeplitzBias(bias.flip(-1), signed=True, **options)
        return vk.DenseBias(bias.mT, **options)


def assert_gradients(call: Call) -> None:
    """The kernel's gradients are as exact as :func:`testing.assert_gradients` asks."""
    testing.assert_gradients(call.gradients(), call.autograd)


def assert_map(call: Call) -> None:
    """The kernel's mean map is as exact as :func:`testing.assert_map` asks."""
    leaves = [x.double() for x in (call.query, call.key, call.value)]
    bias = call.bias_object(
        None if call.bias is None else call.bias.double(),
        call.stat if call.stat_values is None else call.stat_values,
    )
    _, expected = testing.oracle(*leaves, bias, scale=call.scale, return_map=True)
    testing.assert_map(call.forward()[1], expected, frames=call.frames)
