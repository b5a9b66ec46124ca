"""Attention of others that returns its log-sum-exp: what the composed backend is made of.

An engine computes plain attention, softmax(scale · QKᵀ)V, and the logarithm of every row's
denominator. ``ENGINES`` is the whole table, in the order of preference. PyTorch's own switches
choose among them, as they do for scaled_dot_product_attention: under
``torch.nn.attention.sdpa_kernel(SDPBackend.CUDNN_ATTENTION)`` only cuDNN's is taken, and
``torch.nn.attention.activate_flash_attention_impl("FA3")`` puts another kernel below PyTorch's
flash attention.

The engines for GPUs are called as their schemas and documentation say. No GPU has run them here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vstar_kernels.attention.frames.call import FrameCall

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

# Of query, key and value, as (batch, tokens, heads, head_dim), the scale, and how many of the keys
# each batch element has, int32 (batch,), or None for all. Returns the output, of query's shape and
# type, and the log-sum-exp in float32, (batch, heads, tokens); of a row without keys it is -inf.
Attend = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Engine:
    """One way of computing attention and its log-sum-exp, and what it takes.

    ``enabled`` is PyTorch's switch for its kind. ``predicate`` is PyTorch's own answer whether its
    kernel takes a call, on top of what is listed here. ``module`` has to be importable.
    ``takes_lengths``: numbers of keys that differ in the batch, without reading them back.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    head_dim_step: int
    max_head_dim: int
    oldest_gpu: tuple[int, int]  # compute capability; of no meaning on a CPU
    enabled: Callable[[], bool]
    attend: Attend
    predicate: Callable[..., bool] | None = None
    module: str = ""
    takes_lengths: bool = False

    def unavailable(self) -> list[str]:
        """Returns the reasons why it cannot run anything here; none if it can."""
        if self.module and not _installed(self.module):
            return [f"{self.module} is not installed"]
        if self.device == "cuda" and not torch.cuda.is_available():
            return ["torch finds no GPU"]
        if not self.enabled():
            return ["torch.nn.attention.sdpa_kernel has switched it off"]
        return []

    def why_not(self, call: FrameCall) -> list[str]:
        """Returns the reasons why it cannot compute the attention of this call's tensors."""
        if call.device.type != self.device:
            return [f"takes {self.device} tensors, query is on {call.device}"]
        if reasons := self.unavailable():
            return reasons
        reasons = [*self._hardware(call), *self._sizes(call)]
        if not reasons and self.predicate is not None:
            q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
            grouped = call.heads != call.key_heads
            parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, grouped)
            if not self.predicate(parameters, False):
                name = f"torch.backends.cuda.{self.predicate.__name__}"
                reasons.append(f"{name} says no (with debug=True it says why)")
        return reasons

    def _hardware(self, call: FrameCall) -> list[str]:
        if self.device != "cuda" or torch.version.hip:
            return []
        found = torch.cuda.get_device_capability(call.device)
        if found >= self.oldest_gpu:
            return []
        oldest = ".".join(map(str, self.oldest_gpu))
        return [f"needs compute capability {oldest}, {call.device} has {found[0]}.{found[1]}"]

    def _sizes(self, call: FrameCall) -> list[str]:
        reasons = []
        if call.dtype not in self.dtypes:
            allowed = ", ".join(map(str, self.dtypes))
            reasons.append(f"takes {allowed}, query is {call.dtype}")
        if call.head_dim > self.max_head_dim:
            reasons.append(f"takes head_dim up to {self.max_head_dim}, query has {call.head_dim}")
        if call.head_dim % self.head_dim_step:
            step = self.head_dim_step
            reasons.append(f"takes head_dim in multiples of {step}, query has {call.head_dim}")
        for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
            stride = tensor.stride(-1)
            if stride != 1 and call.head_dim > 1:
                reasons.append(f"takes contiguous head_dim, {name} has stride {stride} in it")
        if call.key_lengths is not None and self.device == "cuda" and not self.takes_lengths:
            reasons.append("takes no key_lengths without waiting for the GPU to tell them")
        return reasons


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _aten(name: str, *arguments: Any) -> Attend:
    """Returns the adapter of an operator of PyTorch's, which takes and gives (B, H, S, D)."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert lengths is None
        operator = getattr(torch.ops.aten, name)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse = operator(q, k, v, *arguments, scale=scale)[:2]
        # cuDNN's has a last dimension of 1; efficient attention pads the rows to a multiple of 32.
        return out.transpose(1, 2), lse.flatten(2)[..., : query.shape[1]]

    return attend


def _flash_attn(module: str) -> Attend:
    """Returns the adapter of the flash-attn packages, versions 2 and 3.

    Their function for a key-value cache is the one that takes a number of keys of each batch
    element and returns the log-sum-exp in both versions. One split: a merge is made here anyway.
    """

    def attend(
        query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        function = importlib.import_module(module).flash_attn_with_kvcache
        options = {"softmax_scale": scale, "num_splits": 1, "return_softmax_lse": True}
        out, lse = function(query, key, value, cache_seqlens=lengths, **options)[:2]
        if lengths is not None:  # version 2 says +inf of a row without keys, version 3 -inf
            lse = lse.masked_fill((lengths == 0)[:, None, None], float("-inf"))
        return out, lse

    return attend


# Hopper's own kernels first, then what PyTorch brings. head_dim: as the operators themselves take
# it; scaled_dot_product_attention pads it for some.
ENGINES = (
    Engine(
        "flash-attn 3", "cuda", HALVES, 8, 256, (9, 0), torch.backends.cuda.flash_sdp_enabled,
        _flash_attn("flash_attn_interface"), module="flash_attn_interface", takes_lengths=True,
    ),
    Engine(
        "cudnn", "cuda", HALVES, 8, 256, (8, 0), torch.backends.cuda.cudnn_sdp_enabled,
        _aten("_scaled_dot_product_cudnn_attention", None, True),
        torch.backends.cuda.can_use_cudnn_attention,
    ),
    Engine(
        "flash-attn 2", "cuda", HALVES, 8, 256, (8, 0), torch.backends.cuda.flash_sdp_enabled,
        _flash_attn("flash_attn"), module="flash_attn", takes_lengths=True,
    ),
    Engine(
        "flash", "cuda", HALVES, 8, 256, (8, 0), torch.backends.cuda.flash_sdp_enabled,
        _aten("_scaled_dot_product_flash_attention"), torch.backends.cuda.can_use_flash_attention,
    ),
    Engine(
        "efficient", "cuda", FLOATS, 8, 256, (5, 0), torch.backends.cuda.mem_efficient_sdp_enabled,
        _aten("_scaled_dot_product_efficient_attention", None, True),
        torch.backends.cuda.can_use_efficient_attention,
    ),
    Engine(
        "flash for CPUs", "cpu", FLOATS, 1, 1 << 16, (0, 0), torch.backends.cuda.flash_sdp_enabled,
        _aten("_scaled_dot_product_flash_attention_for_cpu"),
    ),
)  # fmt: skip
