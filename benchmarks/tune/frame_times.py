"""How long a call of frame_attention takes with a configuration, by the clock of the benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

import vstar_kernels as vk
from benchmarks.clock import TimedCall, clock_for, time_in_turn
from benchmarks.codegen.frame_cases import FrameEntry
from vstar_kernels.attention.frames.call import check_call
from vstar_kernels.attention.triton import (
    configs,
    descriptors,
    frames,
    frames_plan,
    frames_slots,
    plan,
)
from vstar_kernels.testing import largest_error

BACKEND = "triton"
FRAMES, TOKENS, HEADS = 16, 512, 8
SHORT = 32  # tokens of a frame whose slots are revisited
ROUNDS, SECONDS, SETS = 15, 2.0, 3
# Of the largest number; 16 bits keep eight bits of a weight, TF32 ten of a product's operands.
ERRORS = {"16-bit": 3e-2, "tf32": 2e-2, "ieee": 1e-4}

Function = Callable[..., tuple[Tensor, ...]]


def seconds(entry: FrameEntry, device: str = "cuda", tokens: int = 0) -> float:
    """Returns the median time of a table's commonest call with its entry, checked first.

    Of gradients it is that of both passes. ``tokens`` of a frame: as the table is for, if 0.
    """
    function, layout = timed_function(entry, tokens)
    clock = clock_for(device)
    shape = (3, 1, layout.tokens, HEADS, entry.width)
    dtype = torch.bfloat16 if entry.kind == "16-bit" else torch.float32
    inputs = [
        tuple(x.requires_grad_(entry.backward) for x in torch.randn(shape).to(device, dtype))
        for _ in range(SETS)
    ]
    with using(entry):
        check(entry, function, inputs[0])
        ready = clock.warm_up(TimedCall("candidate", function), inputs)
        (times,) = time_in_turn(
            clock, [ready], len(inputs), rounds=ROUNDS, seconds=SECONDS
        ).values()
    return statistics.median(times)


def timed_function(entry: FrameEntry, tokens: int = 0) -> tuple[Function, vk.Layout]:
    """Returns what is timed for an entry, of queries, keys and values, and its layout."""
    short = entry.table.startswith("revisit")
    layout = vk.Layout(vk.Frames(FRAMES, tokens or (SHORT if short else TOKENS)))
    factor = vk.FrameRule.attenuate(0.9, FRAMES / 4)
    rule = vk.FrameRule()
    if not entry.table.startswith("known"):
        rule += vk.FrameRule.tar(1.0, stat="row_max")
    if entry.table.endswith("_full"):
        rule += factor

    def function(*qkv: Tensor, backend: str = BACKEND) -> tuple[Tensor, ...]:
        out = vk.frame_attention(*qkv, layout, rule, backend=backend)
        return torch.autograd.grad(out, qkv, out.detach()) if entry.backward else (out,)

    return function, layout


@contextmanager
def using(entry: FrameEntry) -> Iterator[None]:
    """Has the package plan with an entry in the place of the shipped one, and in its way."""
    shipped = configs.frames

    def chosen(architecture: str, kind: str, head_dim: int, table: str) -> configs.FramesConfig:
        same = table == entry.table
        return entry.config if same else shipped(architecture, kind, head_dim, table)

    below = float("inf") if entry.table.startswith("revisit") else 0.0
    with ExitStack() as stack:
        stack.enter_context(patch.object(configs, "frames", chosen))
        stack.enter_context(patch.object(configs, "revisit_below", lambda *key: below))
        if not entry.is_described:
            stack.enter_context(patch.object(descriptors, "ARCHITECTURES", ()))
        stack.enter_context(patch.object(plan, "ieee_products", lambda dtype: entry.kind == "ieee"))
        for plans in (frames._forward_plan, frames._backward_plan):
            plans.cache_clear()
            stack.callback(plans.cache_clear)
        yield


def check(entry: FrameEntry, function: Function, inputs: tuple[Tensor, ...]) -> None:
    """Refuses to time a wrong result: the first head is compared with the formula in float64."""
    exact = (x[:, :, :1].detach().double().requires_grad_(entry.backward) for x in inputs)
    for found, expected in zip(
        function(*inputs), function(*exact, backend="reference"), strict=True
    ):
        error = largest_error(found[:, :, :1].detach(), expected.detach())
        allowed = ERRORS[entry.kind] * expected.detach().abs().max().item()
        if not error <= allowed:  # NaN is not either
            raise SystemExit(f"wrong result of {entry}: error {error:.3g}, allowed {allowed:.3g}")


def crossover(split: FrameEntry, revisit: FrameEntry, device: str = "cuda") -> int:
    """Returns how many keys a slot must have for these entries to be faster split than revisited.

    That is the fewest of those tried, or twice the most.
    """
    keys = 0
    for tokens in (8, 16, 32, 64, 128, 256):
        keys = keys_of_a_slot(tokens, split.config.rows)
        if seconds(split, device, tokens) < seconds(revisit, device, tokens):
            return keys
    return 2 * keys


def keys_of_a_slot(tokens: int, rows: int) -> int:
    """Returns what the plan of the timed call compares with ``configs.revisit_below``."""
    layout = vk.Layout(vk.Frames(FRAMES, tokens))
    x = torch.empty(1, layout.tokens, 1, 64, dtype=torch.bfloat16, device="meta")
    call = check_call(x, x, x, layout, vk.FrameRule.tar(1.0, stat="row_max"))
    rule = frames_plan.frames_key(call, x).rule_tables()
    runs = layout.run_table().tolist()
    seen = frames_slots.tile_tables(runs, runs, rule, rows=rows, ordered=False)
    return round(seen.biased_keys_of_a_slot())
