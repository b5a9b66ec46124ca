"""One call of frame_attention: what is drawn, and how it is run between guard pages.

The tables are drawn themselves, so that there are more of them than rules make. Every backend that
takes the call runs it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

import vstar_kernels as vk
from tests.fuzz.case import DTYPES, Layout, Runner, layouts
from tests.fuzz.guarded import Guarded
from vstar_kernels.attention import native
from vstar_kernels.attention.call import empty_like
from vstar_kernels.attention.dispatch import FRAME_ATTENTION
from vstar_kernels.attention.frames import reference
from vstar_kernels.attention.frames.call import FrameCall, FrameOptions, FrameWanted
from vstar_kernels.attention.frames.tables import UNBOUNDED
from vstar_kernels.testing import EPS, ROW_SUM, assert_gradients, largest_error

MOST_TOKENS = 300
MOST_ELEMENTS = 40_000  # of query, to keep the oracle quick
TABLES = ("delta", "offset", "factor", "factor_span", "band")
RESULTS = ("out", "grad_query", "grad_key", "grad_value")
# (count, tokens, first, step) of frames; (tokens,) of text
Segment = tuple[int, int, int, int] | tuple[int]


@dataclass(frozen=True)
class FrameCase:
    """Everything about one call; its repr makes it again."""

    segments: tuple[Segment, ...]
    key_segments: tuple[Segment, ...] | None  # None: the queries'
    batch: int
    heads: int
    groups: int  # heads that share a head of the keys
    head_dim: int
    dtype: str
    query: Layout
    key: Layout
    value: Layout
    out_flush_end: bool
    key_lengths: tuple[int, ...] | None
    tables: tuple[str, ...]
    per_head: tuple[str, ...]
    masked: float  # the share of frames that offset hides
    reach: int  # of spans and bands
    stat: str
    stat_layout: Layout
    clamp_negative: bool
    tables_flush_end: bool
    scale: float
    magnitude: float
    mean_map: str
    grad_out: Layout | None  # None: no gradients
    isa: str | None
    threads: int
    seed: int


@st.composite
def segments(draw) -> tuple[Segment, ...]:
    found: list[Segment] = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.sampled_from([True, True, False])):
            count, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 40))
            first, step = draw(st.sampled_from([0, 0, 3])), draw(st.sampled_from([1, 1, -1, 2]))
            found.append((count, tokens, first, step))
        else:
            found.append((draw(st.integers(1, 20)),))
    while layout_of(tuple(found)).tokens > MOST_TOKENS:
        found.pop(0)
        found = found or [(1, 40, 0, 1)]
    return tuple(found)


def layout_of(segments: tuple[Segment, ...]) -> vk.Layout:
    """The layout that segments say."""
    return vk.Layout(*(vk.Text(*x) if len(x) == 1 else vk.Frames(*x) for x in segments))


@st.composite
def frame_cases(draw) -> FrameCase:
    own = draw(segments())
    keys = draw(st.none() | segments())
    heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (3, 3)]))
    usual = st.sampled_from([8, 16, 40, 64, 72, 96, 128, 160, 256])
    head_dim, batch = draw(st.one_of(usual, st.integers(1, 70))), draw(st.integers(1, 3))
    if layout_of(own).tokens * heads * head_dim * batch > MOST_ELEMENTS:
        batch = 1
    length = layout_of(own if keys is None else keys).tokens
    layout = layouts(3)
    tables = tuple(name for name in TABLES if draw(st.booleans()))
    return FrameCase(
        segments=own,
        key_segments=keys,
        batch=batch,
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        dtype=draw(st.sampled_from(list(DTYPES))),
        query=draw(layout),
        key=draw(layout),
        value=draw(layout),
        out_flush_end=draw(st.booleans()),
        key_lengths=draw(
            st.none() | st.tuples(*[st.integers(-1, length + 2) for _ in range(batch)])
        ),
        tables=tables,
        per_head=tuple(name for name in tables[:3] if draw(st.booleans())),
        masked=draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])),
        reach=draw(st.sampled_from([0, 1, 5, 50])),
        stat=draw(st.sampled_from(["none", "row_max", "frame_max", "tensor"])),
        stat_layout=draw(layout),
        clamp_negative=draw(st.booleans()),
        tables_flush_end=draw(st.booleans()),
        scale=draw(st.sampled_from([0.125, 0.125, 0.5, -0.3, 0.0, 1e-20])),
        magnitude=draw(st.sampled_from([1.0, 1.0, 0.01])),
        mean_map=draw(st.sampled_from(["none", "mean", "heads"])),
        grad_out=draw(st.none() | layout),
        isa=draw(st.sampled_from(native.load().isas or [None])),
        threads=draw(st.sampled_from([1, 2, 3])),
        seed=draw(st.integers(0, 1 << 30)),
    )


class FrameRunner(Runner):
    """Runs cases in memory that it keeps."""

    def __init__(self) -> None:
        inputs = ("query", "key", "value", "key_lengths", "stat", "query_runs", "key_runs")
        self._guarded = {
            name: Guarded(8 << 20) for name in (*inputs, *TABLES, "grad_out", *RESULTS)
        }

    def run(self, case: FrameCase) -> None:
        """Raise AssertionError unless each backend errs about as little as the reference."""
        call = self._call(case, torch.Generator().manual_seed(case.seed))
        inputs = (call.query, call.key, call.value)
        copies = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        alone = replace(call, query=copies[0], key=copies[1], value=copies[2])
        if case.isa is not None:
            native.load().select_isa(case.isa)
        torch.set_num_threads(1)
        expected, plain = reference.forward(_in(alone, Tensor.double)), reference.forward(alone)
        for name, backend in FRAME_ATTENTION.backends.items():
            if backend is reference or backend.why_not(call):
                continue
            torch.set_num_threads(case.threads)
            with self._guarded_results(case, backend):
                out, frame_map, _ = backend.forward(call)
                self._check_places(name, out)
                _assert_output(name, alone, out, plain.out, expected.out)
                if frame_map is not None and frame_map.numel():
                    _assert_map(name, alone, frame_map, expected.mean_map)
                differentiable = replace(call, query=call.query.detach().requires_grad_())
                if case.grad_out is not None and not backend.why_not(differentiable):
                    self._check_gradients(case, backend, call, alone, out)
            torch.set_num_threads(1)
            for x, copy in zip(inputs, copies, strict=True):
                assert torch.equal(x, copy), f"{name} wrote an input"
            for what, guarded in self._guarded.items():
                assert guarded.untouched(), f"{name} wrote beside {what}"

    def _call(self, case: FrameCase, generator: torch.Generator) -> FrameCall:
        layout = layout_of(case.segments)
        keys = layout if case.key_segments is None else layout_of(case.key_segments)
        dtype, rows = DTYPES[case.dtype], (case.batch, layout.tokens, case.heads)
        of_keys = (case.batch, keys.tokens, case.heads // case.groups)
        shapes = {"query": rows, "key": of_keys, "value": of_keys}
        drawn = {
            name: self._strided(
                name, (*shape, case.head_dim), getattr(case, name), dtype, case.magnitude, generator
            )
            for name, shape in shapes.items()
        }
        lengths = case.key_lengths
        tables = dict.fromkeys(TABLES) | {
            name: self._copied(name, table, case)
            for name, table in _tables(case, layout.frames, keys.frames, generator).items()
        }
        stat, given = case.stat if tables["delta"] is not None else "none", None
        if stat == "tensor":
            sizes = (*rows, 1)
            given = self._strided("stat", sizes, case.stat_layout, torch.float32, 1.0, generator)
            given = given.squeeze(-1)
        return FrameCall(
            **drawn,
            key_lengths=None
            if lengths is None
            else self._copied("key_lengths", torch.tensor(lengths, dtype=torch.int32), case),
            stat=given,
            query_runs=self._copied("query_runs", layout.run_table(), case),
            key_runs=self._copied("key_runs", keys.run_table(), case),
            **tables,
            options=FrameOptions(
                stat,
                case.clamp_negative and stat != "none",
                case.scale,
                case.mean_map,
                layout.frames,
                keys.frames,
            ),
        )

    def _copied(self, name: str, x: Tensor, case: FrameCase) -> Tensor:
        return self._guarded[name].copy(x, case.tables_flush_end)

    def _guarded_results(
        self, case: FrameCase, backend: object
    ) -> contextlib.AbstractContextManager:
        results = iter(RESULTS)  # in the order in which they are allocated

        def guarded_output(x: Tensor) -> Tensor:
            strides = empty_like(x).stride()
            guarded = self._guarded[next(results)]
            return guarded.tensor(tuple(x.shape), strides, x.dtype, case.out_flush_end)

        return mock.patch.object(backend, "empty_like", guarded_output)

    def _check_places(self, backend: str, *tensors: Tensor) -> None:
        for name, x in zip(RESULTS, tensors, strict=False):
            held = self._guarded[name].holds(x)
            assert held, f"{name} of {backend} is not where the guard pages are"

    def _check_gradients(self, case, backend, call, alone, out) -> None:
        generator = torch.Generator().manual_seed(case.seed + 1)
        shape, dtype = tuple(call.query.shape), call.dtype
        grad_out = self._strided("grad_out", shape, case.grad_out, dtype, 1.0, generator)
        grad_map = None
        if case.mean_map != "none":
            grad_map = call.query.shape[2] * torch.randn(call.map_shape, generator=generator)
        wanted = FrameWanted(False, False, False)
        found = backend.backward(call, out, (), grad_out, grad_map, wanted)
        self._check_places("backward", out, *found[:3])
        assert all(x.isfinite().all() for x in found[:3]), "a gradient is not finite"
        names = ("query", "key", "value")

        def compute(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
            changed = _in(alone, change)
            grads = change(grad_out), None if grad_map is None else change(grad_map)
            result = reference.forward(changed)
            exact = reference.backward(changed, result.out, (), *grads, wanted)
            return dict(zip(names, exact[:3], strict=True))

        size = math.sqrt(call.query.numel() * call.keys)
        bounds = {"equal_terms": call.keys, "vanishing": 16 * EPS * size}
        assert_gradients(dict(zip(names, found[:3], strict=True)), compute, **bounds)


def _in(call: FrameCall, change: Callable[[Tensor], Tensor]) -> FrameCall:
    query, key, value = map(change, (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value)


def _tables(
    case: FrameCase, frames: int, key_frames: int, generator: torch.Generator
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if not frames * key_frames:  # a rule has no tables there
        return found
    for name in case.tables:
        heads = (case.heads,) if name in case.per_head else ()
        shape = (*heads, frames, key_frames)
        if name == "delta":
            found[name] = torch.randn(shape, generator=generator)
        elif name == "offset":
            hidden = torch.rand(shape, generator=generator) < case.masked
            found[name] = torch.randn(shape, generator=generator).masked_fill(hidden, -torch.inf)
        elif name == "factor":
            found[name] = torch.rand(2, *shape, generator=generator) + 0.25
        else:
            bounds = torch.randint(case.reach + 1, (2, frames, key_frames), generator=generator)
            bounds *= torch.tensor([-1, 1])[:, None, None]
            free = torch.rand(bounds.shape, generator=generator) < 0.3
            limits = torch.tensor([-UNBOUNDED, UNBOUNDED])[:, None, None].expand_as(bounds)
            found[name] = torch.where(free, limits, bounds).int()
    if "factor" not in found:
        found.pop("factor_span", None)
    return found


def _roundings(call: FrameCall) -> float:
    """By how much logits of these sizes may err in float32, at most."""
    norms = [x.double().norm(dim=-1).max().item() for x in (call.query, call.key)]
    terms = abs(call.options.scale) * math.prod(norms)
    terms *= 1.0 if call.factor is None else call.factor.abs().max().item()
    if call.delta is not None and call.delta.numel():
        largest = call.delta.abs().max().item()
        given = 0.0 if call.stat is None else call.stat.abs().max().item()
        terms += largest * max(terms, given, 1.0)
    if call.offset is not None and call.offset.numel():
        terms += call.offset.masked_fill(call.offset == -torch.inf, 0.0).abs().max().item()
    return 8 * EPS * (1.0 + terms)


def _assert_output(
    name: str, call: FrameCall, out: Tensor, plain: Tensor, expected: Tensor
) -> None:
    if not out.numel():
        return
    size = call.value.double().abs().max().item()
    eps = torch.finfo(out.dtype).eps
    if name == "composed" and out.dtype != torch.float32:
        eps *= 4  # its engine rounds the weights to 16 bits
    allowed = 2 * largest_error(plain, expected) + 2 * (eps + _roundings(call)) * size
    error = largest_error(out, expected)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def _assert_map(name: str, call: FrameCall, found: Tensor, expected: Tensor) -> None:
    coarse = 1e-4 if name == "composed" and call.dtype != torch.float32 else 0.0
    error = largest_error(found.sum(-1), expected.sum(-1))
    assert error <= ROW_SUM + coarse, f"{name}: a row of the map is off by {error:.3g}"
    error, allowed = largest_error(found, expected), ROW_SUM + coarse + 2 * _roundings(call)
    assert error <= allowed, f"{name}: the map is off by {error:.3g}, allowed {allowed:.3g}"
