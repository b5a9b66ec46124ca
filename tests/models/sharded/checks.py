"""What several processes check together: each compares what it gets with what one process has."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import vstar_kernels as vk
from tests.models.models import KINDS, call, make
from vstar_kernels.models.sharded.liveness import PATIENCE, RankFailure

CHECKS: dict[str, Callable[[Any], None]] = {}
PRESET = "64D1_32D2"


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    CHECKS[function.__name__] = function
    return function


def close(actual, expected, most=1e-5) -> None:
    actual, expected = actual.detach(), expected.detach()
    error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1))
    assert error <= most, f"off by {error:.2g}"


@check
@torch.no_grad()
def models(mesh):
    for name in KINDS:
        model = make(name)
        expected = call(model, name, batch=2)
        with vk.shard_frames(model, mesh):
            actual = call(model, name, batch=2)
        close(actual, expected)
        assert torch.equal(call(model, name, batch=2), expected)


# ---- DTensors ----


def whole(x):
    """What a DTensor is in one process, and its gradient."""
    return x.full_tensor()


def inputs(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def compare(mesh, run, tensors, placements, plain, *, exact, exact_plain=False):
    """Compares results and gradients of DTensors with those of tensors, and of plain ones.

    ``tensors`` are placed by ``placements``; ``plain`` are the same in all processes and stay so.
    """
    ours = [
        distribute_tensor(x, mesh, p).requires_grad_()
        for x, p in zip(tensors, placements, strict=True)
    ]
    theirs = [x.clone().requires_grad_() for x in tensors]
    our_plain, their_plain = ([x.clone().requires_grad_() for x in plain] for _ in range(2))
    results = run(*ours, *our_plain), run(*theirs, *their_plain)
    results = [x if isinstance(x, tuple) else (x,) for x in results]
    for one, other in zip(*results, strict=True):
        assert isinstance(one, DTensor)
        same(whole(one), other, exact)
    gradients = inputs(*(x.shape for x in results[1]), seed=1)
    sum((whole(x) * g).sum() for x, g in zip(results[0], gradients, strict=True)).backward()
    sum((x * g).sum() for x, g in zip(results[1], gradients, strict=True)).backward()
    for one, other in zip(ours, theirs, strict=True):
        # Of what all processes have, a gradient may be a sum that is yet to be made.
        assert one.grad.placements in (one.placements, (Partial(),))
        same(whole(one.grad), other.grad, exact)
    for one, other in zip(our_plain, their_plain, strict=True):
        assert not isinstance(one.grad, DTensor)
        same(one.grad, other.grad, exact_plain)


def same(one, other, exact):
    if exact:
        assert torch.equal(one, other), f"off by {float((one - other).abs().max()):.2g}"
    else:
        close(one, other)


@check
def dtensors_tar(mesh):
    size = mesh.size()
    shape = (size, 2 * size, 5, size, 8)
    attended = inputs(shape, shape, shape)
    (shared, per_head, stat) = inputs((5, 5), (size, 5, 5), shape[:-1], seed=2)
    table = inputs((5,), seed=3)[0]

    def run(query, key, value, delta=None, stat="row_max", return_map=False):
        bias = vk.GaussianBias(1.0, stat=stat)
        if delta is not None:
            bias = (vk.ToeplitzBias if delta.ndim == 1 else vk.DenseBias)(delta, stat=stat)
        return vk.tar_attention(query, key, value, bias, return_map=return_map)

    for dim in (0, 1, 3, None):
        placements = [[Replicate() if dim is None else Shard(dim)]] * 3
        by_head = dim == 3
        compare(mesh, run, attended, placements, [], exact=True)
        compare(mesh, run, attended, placements, [shared], exact=True, exact_plain=dim is None)
        compare(mesh, run, attended, placements, [table], exact=True)
        compare(mesh, run, attended, placements, [per_head], exact=True, exact_plain=by_head)
        compare(mesh, run, attended, placements, [shared, stat], exact=True)
        compare(
            mesh, functools.partial(run, return_map=True), attended, placements, [], exact=dim == 0
        )
    # A gradient of the mean map that is sharded itself.
    placed = [distribute_tensor(x, mesh, [Shard(3)]).requires_grad_() for x in attended]
    _, mean_map = run(*placed, return_map=True)
    weights = inputs(mean_map.shape, seed=1)[0]
    (
        mean_map.redistribute(placements=[Shard(0)]) * distribute_tensor(weights, mesh, [Shard(0)])
    ).sum().backward()
    leaves = [x.clone().requires_grad_() for x in attended]
    (run(*leaves, return_map=True)[1] * weights).sum().backward()
    for one, other in zip(placed[:2], leaves[:2], strict=True):
        close(whole(one.grad), other.grad)
    uneven = inputs((2 * size - 1, 5, 3, 8))[0]
    for dim in (0, 2):
        placed = distribute_tensor(uneven, mesh, [Shard(dim)])
        expected = vk.tar_attention(uneven, uneven, uneven, return_map=True)
        actual = vk.tar_attention(placed, placed, placed, return_map=True)
        for one, other in zip(actual, expected, strict=True):
            close(whole(one), other)
    for dim, of in ((1, 4), (3, 4), (2, 5), (4, 5)):
        x = distribute_tensor(torch.zeros((size,) * of), mesh, [Shard(dim)])
        with pytest.raises(ValueError, match=rf"cannot be sharded along dimension {dim} of query"):
            vk.tar_attention(x, x, x)
    x = distribute_tensor(torch.zeros(shape), mesh, [Shard(0)])
    for backend in ("cpu", "reference"):
        assert vk.tar_attention(x, x, x, backend=backend).placements == (Shard(0),)


@check
def dtensors_columns(mesh):
    size = mesh.size()
    query, key, value, columns = inputs(
        (size, 2 * size, size, 8), (size, 3, size, 8), (size, 3, size, 8), (3, 2)
    )
    for dim, others in ((0, Shard(0)), (1, Replicate()), (2, Shard(2)), (None, Replicate())):
        placements = [[Replicate() if dim is None else Shard(dim)], [others], [others]]
        exact = dim in (0, None)  # or the gradients of keys are sums over processes
        attended = [query, key, value]
        with_value = lambda q, k, v: vk.column_attention(q, k, v, columns)  # noqa: E731
        compare(mesh, with_value, attended, placements, [], exact=exact)
        without = lambda q, k: vk.column_attention(q, k, None, columns)  # noqa: E731
        compare(mesh, without, attended[:2], placements[:2], [], exact=exact)
        with pytest.warns(vk.SlowBackendWarning) if dim == 0 else nullcontext():
            compare(mesh, vk.column_attention, attended, placements, [columns], exact=False)
    key = distribute_tensor(torch.zeros(size, size, size, 8), mesh, [Shard(1)])
    with pytest.raises(ValueError, match="cannot be sharded along dimension 1 of key"):
        vk.column_attention(query, key, key, torch.ones(size, 1))


@check
def dtensors_frames(mesh):
    size = mesh.size()
    layout = vk.Layout(vk.Frames(3, 4), vk.Text(2))
    query, key, value = inputs(*[(size, layout.tokens, 2 * size, 8)] * 3)
    shared, per_head = inputs((3, 3), (2 * size, 3, 3), seed=2)
    rules = {
        "tar": lambda: vk.FrameRule.tar(1.0),
        "per head": lambda: vk.FrameRule.bias(per_head),
    }
    lengths = torch.full((size,), layout.tokens - 1, dtype=torch.int32)
    for dim in (0, 2, None):
        placements = [[Replicate() if dim is None else Shard(dim)]] * 3
        for rule in rules.values():
            for options in ({}, {"key_lengths": lengths}, {"return_map": True, "map_heads": True}):
                run = functools.partial(vk.frame_attention, layout=layout, rule=rule(), **options)
                compare(mesh, run, [query, key, value], placements, [], exact=True)
        compare(
            mesh,
            lambda q, k, v, t: vk.frame_attention(q, k, v, layout, vk.FrameRule.bias(t)),
            [query, key, value], placements, [shared], exact=False,
        )  # fmt: skip
        compare(
            mesh,
            lambda q, k, v: vk.frame_attention(q, k, v, layout, rules["tar"](), return_map=True),
            [query, key, value], placements, [], exact=False,
        )  # fmt: skip
    few = inputs(*[(1, layout.tokens, size, 8)] * 2)
    placed = [distribute_tensor(x, mesh, [Shard(2)]) for x in (query[:1], *few)]
    expected = vk.frame_attention(query[:1], *few, layout, rules["tar"]())
    same(whole(vk.frame_attention(*placed, layout, rules["tar"]())), expected, exact=True)
    fewer = inputs((1, layout.tokens, 1, 8))[0]
    placed[1] = placed[2] = distribute_tensor(fewer, mesh, [Replicate()])
    with pytest.raises(ValueError, match=f"heads of query, which read 1 of keys, .* {size} proc"):
        vk.frame_attention(*placed, layout, rules["tar"]())
    x = distribute_tensor(query, mesh, [Shard(1)])
    with pytest.raises(ValueError, match="frame_attention cannot be sharded along dimension 1"):
        vk.frame_attention(x, x, x, layout)


# ---- the last: one of them dies ----


@check
@torch.no_grad()
def a_process_dies(mesh):
    model = make("UNetMotionModel")
    with vk.shard_frames(model, mesh, timeout=20):
        call(model, "UNetMotionModel")
        if mesh.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(RankFailure, match=r"rank 1 \(pid \d+ on .*\) has died") as caught:
            call(model, "UNetMotionModel")
        assert caught.value.ranks == (1,)
        assert time.monotonic() - begun < 20
        time.sleep(2 * PATIENCE if mesh.get_rank() == 0 else 0)  # it keeps the store
