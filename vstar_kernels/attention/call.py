"""One call of :func:`vstar_kernels.tar_attention`, checked once, as every backend sees it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from vstar_kernels.attention import bias as bias_forms
from vstar_kernels.attention.bias import (
    Bias,
    check_finite,
    check_flag,
    check_strided,
    shown,
)

LAYOUTS = "(batch, frames, heads, head_dim) or (batch, space, frames, heads, head_dim)"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BIASES = get_args(Bias)
CONSTRUCTORS = {  # of each form of Δ, for messages
    "none": "none (strength 0)",
    "gaussian": "GaussianBias",
    "symmetric": "ToeplitzBias",
    "signed": "ToeplitzBias, signed",
    "dense": "DenseBias",
}


class Options(NamedTuple):
    """All of a call but its tensors, hashable, in the order in which the operator takes them."""

    form: str  # of Δ, one of bias.FORMS
    sigma: float  # of the Gaussian; 0 for the other forms
    strength: float
    stat: str  # one of bias.STATS, or "tensor"
    clamp_negative: bool
    detach_stat: bool
    scale: float
    map_block: int  # frames of a block over which the returned map is summed; 0: no map is returned
    map_heads: bool = False  # whether each head has a map of its own, not all of them one mean


@dataclass(slots=True)
class Call:
    """The tensors and options of one call.

    ``delta`` holds Δ's entries, a table or a matrix as ``options.form`` says, and is None for a
    Gaussian and where nothing is added to the logits. ``stat`` is a statistic that the caller gave.
    ``out`` is where the caller wants the output written.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    delta: Tensor | None
    stat: Tensor | None
    options: Options
    out: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of query, key and value."""
        return self.query.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of query, key and value."""
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        """The device of query, key and value."""
        return self.query.device

    @property
    def frames(self) -> int:
        """N, the number of frames that attend to each other."""
        return self.query.shape[-3]

    @property
    def heads(self) -> int:
        """H, the number of heads."""
        return self.query.shape[-2]

    @property
    def head_dim(self) -> int:
        """D, the size of a head."""
        return self.query.shape[-1]

    @property
    def requires_grad(self) -> bool:
        """Whether any of the tensors requires a gradient."""
        return (
            self.query.requires_grad
            or self.key.requires_grad
            or self.value.requires_grad
            or (self.delta is not None and self.delta.requires_grad)
            or (self.stat is not None and self.stat.requires_grad)
        )

    @property
    def map_shape(self) -> tuple[int, ...]:
        """The returned map's: the batch, with ``map_heads`` the heads, and the blocks of frames."""
        blocks = -(-self.frames // self.options.map_block)
        heads = (self.heads,) if self.options.map_heads else ()
        return self.query.shape[0], *heads, blocks, blocks

    @property
    def delta_per_head(self) -> bool:
        """Whether each head has a Δ of its own."""
        return self.delta is not None and self.delta.ndim == bias_forms.dims(self.options.form) + 1

    def output(self) -> Tensor:
        """Returns the tensor that a kernel writes its output to: the caller's, or a new one."""
        return empty_like(self.query) if self.out is None else self.out

    def delta_matrix(self) -> Tensor:
        """Returns the matrix Δ, ``(N, N)`` or ``(heads, N, N)``, for the reference."""
        return bias_forms.matrix(self.options.form, self.options.sigma, self.delta, self.frames)

    def delta_gradient(self, matrix_gradient: Tensor) -> Tensor:
        """Returns the gradient of ``delta`` for one of the matrix Δ, which has its shape."""
        assert self.delta is not None  # or nobody could want its gradient
        return bias_forms.entries_gradient(self.options.form, self.delta, matrix_gradient)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that there are, by their names in messages."""
        names = ("query", "key", "value", "delta", "stat", "out")
        named = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def describe(self) -> str:
        """Returns a line for each tensor and one for the options, for messages."""
        lines = [
            f"{name}: {tuple(t.shape)}, strides {t.stride()}, {t.dtype}, {t.device}"
            for name, t in self.tensors().items()
        ]
        bias, wants_map = CONSTRUCTORS[self.options.form], self.options.map_block > 0
        asked = f"bias: {bias}, return_map: {wants_map}"
        return "\n".join([*lines, asked + ", map_heads: True" * self.options.map_heads])


class Forward(NamedTuple):
    """What a backend's forward pass gives.

    ``saved`` is what the backend keeps for its own backward pass where it was asked to save.
    """

    out: Tensor  # nothing() where the call asks for none
    mean_map: Tensor | None = None
    saved: tuple[Tensor, ...] = ()


class Wanted(NamedTuple):
    """The gradients that are wanted besides those of query, key and value."""

    delta: bool
    stat: bool


class Gradients(NamedTuple):
    """The gradients of a call's tensors, each of its tensor's shape and type; None: not wanted."""

    query: Tensor
    key: Tensor
    value: Tensor
    delta: Tensor | None = None
    stat: Tensor | None = None


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    scale: float | None,
    map_block: int,
    map_heads: bool = False,
) -> Call:
    """Returns the call that these arguments describe; they are not checked, nor cast."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if bias is None or bias.strength == 0:
        options = Options("none", 0.0, 0.0, "none", False, False, scale, map_block, map_heads)
        return Call(query, key, value, None, None, options)
    stat = bias.stat if isinstance(bias.stat, Tensor) else None
    stat = stat.detach() if stat is not None and bias.detach_stat else stat
    options = Options(*bias.fixed, scale, map_block, map_heads)
    return Call(query, key, value, bias.entries, stat, options)


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = None,
    *,
    scale: float | None = None,
    return_map: bool = False,
    map_heads: bool = False,
    map_block: int = 1,
) -> Call:
    """Returns the call that checked arguments of :func:`vstar_kernels.tar_attention` describe.

    Raises:
        ValueError: An argument is bad.
        TypeError: An argument is of the wrong kind.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_strided(tensor, name)
    if autocasts(query):
        query, key, value = autocast(query), autocast(key), autocast(value)
    shape, dtype, device = query.shape, query.dtype, query.device
    if len(shape) not in (4, 5):
        raise ValueError(f"query must be {LAYOUTS}, got shape {tuple(shape)}")
    if dtype not in DTYPES:
        allowed = ", ".join(str(allowed) for allowed in DTYPES)
        raise ValueError(f"query must be of a floating-point type, {allowed}, got {dtype}")
    if shape[-3] == 0 or shape[-1] == 0:
        raise ValueError(
            f"query must have at least one frame and one element of head_dim, got {tuple(shape)}"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have query's shape {tuple(shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must have query's type {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on query's device {device}, got {tensor.device}")
    if scale is not None:
        check_finite(scale, "scale")
    if bias is not None:
        if not isinstance(bias, BIASES):
            raise TypeError(
                "bias must be a GaussianBias, a ToeplitzBias, a DenseBias or None, "
                f"got {type(bias).__name__}"
            )
        if bias.entries is not None:
            bias.check(shape[-3], shape[-2])
            _check_delta(bias.entries, query)
        if isinstance(bias.stat, Tensor):
            check_stat(bias.stat, query)
    check_flag(return_map, "return_map")
    check_flag(map_heads, "map_heads")
    if map_heads and not return_map:
        raise ValueError("map_heads=True needs return_map=True")
    if isinstance(map_block, bool) or not isinstance(map_block, int):
        raise TypeError(f"map_block must be an integer, got {type(map_block).__name__}")
    if map_block < 1:
        raise ValueError(f"map_block must be at least 1 frame, got {shown(map_block)}")
    if map_block > shape[-3]:
        map_block = shape[-3]  # all frames are one block
    return make_call(query, key, value, bias, scale, map_block if return_map else 0, map_heads)


def autocast(tensor: Tensor) -> Tensor:
    """Casts as autocast casts the arguments of scaled_dot_product_attention."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))
    return tensor


def autocasts(query: Tensor) -> bool:
    """Returns whether autocast is on for a tensor's device."""
    if query.is_cpu:  # which is faster than to make the string that is a device's type
        return torch.is_autocast_enabled("cpu")
    if query.is_cuda:
        return torch.is_autocast_enabled("cuda")
    return has_autocast(query.device) and torch.is_autocast_enabled(query.device.type)


def has_autocast(device: torch.device) -> bool:
    """Returns whether there is autocast for a device: there is none for meta tensors."""
    return device.type != "meta"


def _check_delta(entries: Tensor, query: Tensor) -> None:
    if entries.device == query.device:
        return
    if entries.device.type == "meta":
        raise ValueError(
            f"the bias is on the meta device and holds no numbers, query is on {query.device}"
        )
    if query.device.type == "meta" and entries.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"query is on the meta device, where the bias, on {entries.device}, has no gradient"
        )


def check_stat(stat: Tensor, query: Tensor) -> None:
    """Raises ValueError unless a statistic's shape and device are those of the query's rows."""
    if stat.shape != query.shape[:-1]:
        raise ValueError(
            "a stat tensor must have query's shape without head_dim, "
            f"{tuple(query.shape[:-1])}, got {tuple(stat.shape)}"
        )
    if stat.device != query.device:
        raise ValueError(
            f"a stat tensor must be on query's device {query.device}, got {stat.device}"
        )


# ---- what the backends do alike to their results ----


def empty_like(tensor: Tensor) -> Tensor:
    """Returns ``torch.empty_like(tensor)``, always with head_dim contiguous, as kernels write it.

    The strides of a tensor with expanded dimensions have no order that would mean anything.
    """
    like = torch.empty_like(tensor)
    if like.stride(-1) == 1:
        return like
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def laid_like(tensor: Tensor, values: Tensor) -> Tensor:
    """Returns values in a tensor's type, laid as :func:`empty_like` lays what is of its shape.

    torch.func's tensors cannot be written into one that has not all of their dimensions.
    """
    if torch._C._are_functorch_transforms_active():
        return values.to(tensor.dtype)
    return empty_like(tensor).copy_(values)


def follows_tangents() -> bool:
    """Returns whether there is forward-mode differentiation here, without which nothing is dual."""
    return bool(forward_ad._current_level >= 0)


def carry_tangents(tensors: Iterable[Tensor]) -> bool:
    """Returns whether one of the tensors is dual: forward-mode differentiation follows it.

    Of torch.func's tensors, which may hide duals, all are where it computes tangents.
    """
    if not follows_tangents():
        return False
    for transform in torch._C._functorch.get_interpreter_stack() or ():
        if transform.key() == torch._C._functorch.TransformType.Jvp:
            return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def nothing(like: Tensor) -> Tensor:
    """Returns what stands for a result that was not asked for, an empty float32 tensor."""
    return like.new_empty(0, dtype=torch.float32)


def clamped(stat: Tensor) -> Tensor:
    """Returns max(stat, 0); the gradient passes at 0 too.

    That of ``torch.clamp`` passes up to torch 2.13, and from 2.14 on it does not.
    """
    return torch.where(stat < 0, 0.0, stat)


def block_sums(maps: Tensor, block: int) -> Tensor:
    """Returns the sums of maps ``(…, N, N)`` over blocks of frames; the last may be smaller."""
    if block == 1:
        return maps
    missing = -maps.shape[-1] % block
    blocks = F.pad(maps, (0, missing, 0, missing))
    return blocks.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).sum(dim=(-3, -1))


def block_gradient(gradient: Tensor, block: int, frames: int) -> Tensor:
    """Returns the gradient of maps ``(…, N, N)`` for one of their block sums."""
    if block == 1:
        return gradient
    whole = gradient.repeat_interleave(block, -1).repeat_interleave(block, -2)
    return whole[..., :frames, :frames]
