"""One call of column_attention: what is drawn, and how kernels run it between guard pages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.case import DTYPES, MOST_ELEMENTS, RESULTS, Layout, Runner, layouts
from tests.fuzz.guarded import Guarded
from vstar_kernels.attention import native
from vstar_kernels.attention.call import empty_like
from vstar_kernels.attention.columns import cpu, reference
from vstar_kernels.attention.columns.call import ColumnCall, ColumnOptions, ColumnWanted
from vstar_kernels.testing import EPS, assert_columns, assert_gradients

INPUTS = ("query", "key", "value")


@dataclass(frozen=True)
class ColumnCase:
    """Everything about one call; its repr makes it again."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    count: int  # of the columns
    dtype: str
    query: Layout
    key: Layout
    value: Layout | None  # None: maps alone
    zeros: float  # the share of the columns' weights that are 0
    by_sequence: bool  # whether each sequence has columns of its own
    out_flush_end: bool
    columns_flush_end: bool
    scale: float
    grad_out: Layout | None  # None: the output has no gradient
    has_grad_maps: bool
    wanted: tuple[bool, bool, bool]  # gradients of query, key, value
    isa: str
    threads: int
    seed: int


@st.composite
def column_cases(draw) -> ColumnCase:
    usual = st.sampled_from([8, 16, 40, 64, 72, 80, 128, 160])
    head_dim, heads = draw(st.one_of(usual, st.integers(1, 70))), draw(st.integers(1, 5))
    queries = draw(st.one_of(st.integers(1, 40), st.integers(1, 300)))
    keys = draw(st.one_of(st.just(77), st.integers(1, 40), st.integers(1, 300)))
    batch = draw(st.integers(1, 3))
    if batch * max(queries, keys) * heads * head_dim > MOST_ELEMENTS:
        batch, heads = 1, min(heads, 2)
    layout = layouts(3)
    return ColumnCase(
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        head_dim=head_dim,
        count=draw(st.one_of(st.integers(1, 9), st.integers(1, 80))),
        dtype=draw(st.sampled_from(list(DTYPES))),
        query=draw(layout),
        key=draw(layout),
        value=draw(st.none() | layout),
        zeros=draw(st.sampled_from([0.0, 0.9, 0.99, 1.0])),
        by_sequence=draw(st.booleans()),
        out_flush_end=draw(st.booleans()),
        columns_flush_end=draw(st.booleans()),
        scale=draw(st.sampled_from([0.125, 0.125, 0.5, -0.3, 0.0, 1e-20])),
        grad_out=draw(st.none() | layout),
        has_grad_maps=draw(st.booleans()),
        wanted=draw(st.tuples(*[st.booleans()] * 3)),
        isa=draw(st.sampled_from(native.load().isas)),
        threads=draw(st.sampled_from([1, 2, 3])),
        seed=draw(st.integers(0, 1 << 30)),
    )


class ColumnRunner(Runner):
    """Runs cases in memory that it keeps."""

    def __init__(self) -> None:
        names = (*INPUTS, "columns", "maps", "grad_out", "grad_maps", *RESULTS)
        self._guarded = {name: Guarded(8 << 20) for name in names}

    def run(self, case: ColumnCase) -> None:
        """Raise AssertionError unless the kernels err about as little as the plain formula."""
        generator = torch.Generator().manual_seed(case.seed)
        call = self._call(case, generator)
        copies = {
            name: x.clone(memory_format=torch.contiguous_format)
            for name, x in call.tensors().items()
        }
        alone = replace(call, **copies)
        native.load().select_isa(case.isa)
        torch.set_num_threads(case.threads)
        results = iter(RESULTS)  # in the order in which they are allocated

        def guarded_output(x: Tensor) -> Tensor:
            guarded = self._guarded[next(results)]
            return guarded.tensor(tuple(x.shape), empty_like(x).stride(), x.dtype,
                                  case.out_flush_end)  # fmt: skip

        def guarded_maps(shape: tuple[int, ...], **options: object) -> Tensor:
            strides = (shape[1] * shape[2], shape[2], 1)
            return self._guarded["maps"].tensor(shape, strides, torch.float32, case.out_flush_end)

        with mock.patch.object(cpu, "empty_like", guarded_output):
            with mock.patch.object(torch, "empty", guarded_maps):
                out, maps, _ = cpu.forward(call)
            if case.value is None:
                next(results)
            torch.set_num_threads(1)  # the oracle is small
            assert maps is not None
            found = maps if case.value is None else (out, maps)
            arguments = (alone.query, alone.key, alone.value)
            assert_columns(found, *arguments, alone.columns, scale=case.scale)
            torch.set_num_threads(case.threads)
            self._check_gradients(case, call, alone, generator)
        torch.set_num_threads(1)
        for name, x in call.tensors().items():
            assert torch.equal(x, copies[name]), f"the kernel wrote {name}"
        for name, guarded in self._guarded.items():
            assert guarded.untouched(), f"the kernel wrote beside {name}"

    def _call(self, case: ColumnCase, generator: torch.Generator) -> ColumnCall:
        dtype, drawn = DTYPES[case.dtype], {}
        for name in INPUTS:
            layout = getattr(case, name)
            if layout is None:
                drawn[name] = None
                continue
            tokens = case.queries if name == "query" else case.keys
            shape = (case.batch, tokens, case.heads, case.head_dim)
            drawn[name] = self._strided(name, shape, layout, dtype, 1.0, generator)
        shape = (case.batch if case.by_sequence else 1, case.keys, case.count)
        kept = torch.rand(shape, generator=generator) >= case.zeros
        columns = torch.randn(shape, generator=generator) * kept
        columns = self._guarded["columns"].copy(columns, case.columns_flush_end)
        columns = columns.expand(case.batch, -1, -1)
        options = ColumnOptions(case.scale, case.value is not None)
        return ColumnCall(**drawn, columns=columns, options=options)

    def _check_gradients(self, case, call, alone, generator) -> None:
        grad_out, grad_maps = None, None
        if case.grad_out is not None and call.value is not None:
            shape = tuple(call.query.shape)
            grad_out = self._strided("grad_out", shape, case.grad_out, call.dtype, 1.0, generator)
        if case.has_grad_maps:  # as large as the output's, in spite of the mean
            drawn = case.heads * torch.randn(call.map_shape, generator=generator)
            grad_maps = self._guarded["grad_maps"].copy(drawn, case.out_flush_end)
        query, key, value = case.wanted
        wanted = ColumnWanted(query, key, value and call.value is not None, False)
        found = cpu.backward(call, None, (), grad_out, grad_maps, wanted)
        names = [name for name in INPUTS if getattr(wanted, name)]
        gradients = {name: getattr(found, name) for name in names}
        torch.set_num_threads(1)

        def compute(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
            changed = {name: change(x) for name, x in alone.tensors().items()}
            grads = (None if x is None else change(x) for x in (grad_out, grad_maps))
            exact = reference.backward(replace(alone, **changed), None, (), *grads, wanted)
            return {name: getattr(exact, name) for name in names}

        size = math.sqrt(max(call.query.numel(), call.key.numel()) * call.keys)
        largest = call.columns.abs().max().item()
        bounds = {"equal_terms": call.keys, "vanishing": 16 * EPS * size * max(1.0, largest)}
        assert_gradients(gradients, compute, **bounds)
