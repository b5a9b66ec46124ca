"""One call of the CPU kernels: what is drawn, and how it is run between guard pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

import vstar_kernels as vk
from tests.fuzz.call import Call, assert_results
from tests.fuzz.guarded import Guarded
from vstar_kernels.attention import call, cpu, native
from vstar_kernels.attention.bias import gaussian_table
from vstar_kernels.attention.call import empty_like
from vstar_kernels.testing import assert_exact

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = ("out", "grad_query", "grad_key", "grad_value")
MOST_ELEMENTS = 40_000  # of query, to keep the oracle quick


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory. Its rows are head_dim's elements; those of a statistic are one.

    ``order`` names the other dimensions from the outermost in memory inwards. A dimension's
    ``steps`` is 0 if it is expanded (stride 0), 2 or 3 if only every second or third entry is used.
    """

    order: tuple[int, ...]
    steps: tuple[int, ...]
    gap: int  # elements between rows
    flush_end: bool

    def strides(self, sizes: tuple[int, ...], row: int) -> tuple[int, ...]:
        strides = [0] * len(sizes)
        reach = row + self.gap
        for d in reversed(self.order):
            strides[d] = reach * self.steps[d]
            reach = max(reach, strides[d] * sizes[d])
        return tuple(strides)


@dataclass(frozen=True)
class Case:
    """Everything about one call; its repr makes it again."""

    shape: tuple[int, ...]
    dtype: str
    query: Layout
    key: Layout
    value: Layout
    out_flush_end: bool
    form: str
    per_head: bool
    delta_dtype: str
    extra: int  # frames that a table reaches beyond the call's
    sigma: float
    strength: float
    stat: str
    stat_layout: Layout
    clamp_negative: bool
    bias_flush_end: bool
    scale: float | None
    magnitude: float
    map_block: int  # 0: no mean map
    map_heads: bool
    grad_out: Layout | None  # None: no gradients
    grad_map: bool
    isa: str
    threads: int
    seed: int

    @property
    def is_mild(self) -> bool:
        """Whether its logits are small enough for the errors of weights and gradients to be."""
        scale = 1.0 if self.scale is None else self.scale * math.sqrt(self.shape[-1])
        return abs(self.strength) <= 1 and abs(scale) <= 2 and self.magnitude <= 1

    @property
    def equal_logits(self) -> int:
        """How many logits of a row are equal, because of scale or layout; 0 where Δ parts them."""
        frames = len(self.shape) - 3
        vanishing = self.scale in (0.0, 1e-20)
        alike = vanishing or self.key.steps[frames] == 0
        biased = self.form != "none" and self.strength != 0
        if vanishing and self.stat in ("row_max", "map_max"):  # one of the logits, times Δ
            biased = False
        return self.shape[frames] if alike and not biased else 0


@st.composite
def layouts(draw, dims: int) -> Layout:
    steps = [1] * dims
    for step in draw(st.lists(st.sampled_from([0, 2, 3]), max_size=2)):
        steps[draw(st.integers(0, dims - 1))] = step
    return Layout(
        order=tuple(draw(st.permutations(range(dims)))),
        steps=tuple(steps),
        gap=draw(st.sampled_from([0, 0, 1, 5])),
        flush_end=draw(st.booleans()),
    )


@st.composite
def shapes(draw) -> tuple[int, ...]:
    frames = draw(st.one_of(st.integers(1, 40), st.integers(1, 100), st.integers(101, 400)))
    usual = st.sampled_from([8, 16, 40, 64, 72, 80, 96, 128, 160, 256])
    head_dim = draw(st.one_of(usual, st.integers(1, 70)))
    outer = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 2)))]
    heads = draw(st.integers(1, 4))
    if frames * head_dim * heads * outer[0] * outer[-1] > MOST_ELEMENTS:
        outer, heads = [1] * len(outer), min(heads, 2)
    return (*outer, frames, heads, head_dim)


@st.composite
def cases(draw) -> Case:
    shape = draw(shapes())
    layout = layouts(len(shape) - 1)
    return Case(
        shape=shape,
        dtype=draw(st.sampled_from(list(DTYPES))),
        query=draw(layout),
        key=draw(layout),
        value=draw(layout),
        out_flush_end=draw(st.booleans()),
        form=draw(st.sampled_from(["gaussian", "toeplitz", "signed", "dense", "none"])),
        per_head=draw(st.booleans()),
        delta_dtype=draw(st.sampled_from([*DTYPES, "float32"])),
        extra=draw(st.sampled_from([0, 0, 1, 7])),
        sigma=draw(st.sampled_from([0.0, 0.3, 1.0, 8.0, 1e4])),
        strength=draw(st.sampled_from([1.0, 0.3, -0.7, 2.5, 0.0, -40.0, 1e3])),
        stat=draw(st.sampled_from(["row_max", "map_max", "none", "tensor"])),
        stat_layout=draw(layout),
        clamp_negative=draw(st.booleans()),
        bias_flush_end=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 1.0, -0.3, 0.0, 1e-20, 30.0])),
        magnitude=draw(st.sampled_from([1.0, 1.0, 0.01, 4.0])),
        map_block=draw(st.sampled_from([0, 0, 1, 2, 5])),
        map_heads=draw(st.booleans()),
        grad_out=draw(st.none() | layout),
        grad_map=draw(st.booleans()),
        isa=draw(st.sampled_from(native.load().isas)),
        threads=draw(st.sampled_from([1, 2, 3])),
        seed=draw(st.integers(0, 1 << 30)),
    )


class Runner:
    """Runs cases in memory that it keeps."""

    def __init__(self) -> None:
        names = ("query", "key", "value", "delta", "gaussian", "stat", "grad_out")
        self._guarded = {name: Guarded(8 << 20) for name in (*names, *RESULTS)}

    def run(self, case: Case) -> None:
        """Raise AssertionError unless the kernels err as little as the plain formula."""
        generator = torch.Generator().manual_seed(case.seed)
        *outer, head_dim = case.shape
        dtype = DTYPES[case.dtype]
        inputs, copies = [], []
        for name in ("query", "key", "value"):
            layout = getattr(case, name)
            x = self._strided(name, (*outer, head_dim), layout, dtype, case.magnitude, generator)
            inputs.append(x)
            copies.append(x.clone(memory_format=torch.contiguous_format))
        bias = self._bias(case, generator)
        native.load().select_isa(case.isa)

        def guarded_gaussian(sigma: float, frames: int) -> Tensor:
            table = gaussian_table(sigma, frames)
            return self._guarded["gaussian"].copy(table, case.bias_flush_end)

        results = iter(RESULTS)  # in the order in which they are allocated

        def guarded_output(x: Tensor) -> Tensor:
            strides = empty_like(x).stride()
            guarded = self._guarded[next(results)]
            return guarded.tensor(tuple(x.shape), strides, x.dtype, case.out_flush_end)

        grads = []
        if case.grad_out is not None:
            grad_out = self._strided("grad_out", case.shape, case.grad_out, dtype, 1.0, generator)
            grads = [grad_out, *self._grad_map(case, generator)]
        with (
            mock.patch.object(call, "empty_like", guarded_output),  # of outputs
            mock.patch.object(cpu, "empty_like", guarded_output),  # of gradients
            mock.patch.object(cpu, "gaussian_table", guarded_gaussian),
        ):
            torch.set_num_threads(case.threads)
            attend = Call(bias, case.scale, case.map_block, case.map_heads, grads)
            out, mean_map, gradients = attend(*inputs, backend="cpu")
            torch.set_num_threads(1)  # the oracle is small
        for name, x in zip(RESULTS, (out, *gradients.values()), strict=False):
            assert self._guarded[name].holds(x), f"{name} is not where the guard pages are"
        for name, guarded in self._guarded.items():
            assert guarded.untouched(), f"the kernel wrote beside {name}"
        for x, copy in zip(inputs, copies, strict=True):
            assert torch.equal(x, copy), "the kernel wrote an input"
        equal_terms = case.equal_logits
        assert_exact(out, *copies, bias, scale=case.scale, equal_terms=equal_terms)
        bounds = {"exact": case.is_mild, "equal_terms": equal_terms}
        assert_results(attend, copies, mean_map, gradients, **bounds)

    def _strided(self, name, shape, layout, dtype, magnitude, generator) -> Tensor:
        """Random numbers in the layout; ``shape``'s last dimension is the row."""
        *outer, row = shape
        strides = (*layout.strides(tuple(outer), row), 1)
        # A stride in a row of one element means nothing, so it may be anything.
        if row == 1:
            strides = (*strides[:-1], 1 + layout.gap)
        kept = [1 if step == 0 else n for n, step in zip(outer, layout.steps, strict=True)]
        x = self._guarded[name].tensor((*kept, row), strides, dtype, layout.flush_end)
        x.copy_(magnitude * torch.randn(*kept, row, generator=generator))
        return x.expand(shape)

    def _grad_map(self, case: Case, generator: torch.Generator) -> list[Tensor]:
        """The gradient of the mean map, as large as the output's in spite of the mean."""
        if not (case.map_block and case.grad_map):
            return []
        *outer, frames, heads, _ = case.shape
        blocks = -(-frames // case.map_block)
        if case.map_heads:
            sequences, shape = math.prod(outer[1:]), (outer[0], heads, blocks, blocks)
        else:
            sequences, shape = math.prod(outer[1:]) * heads, (outer[0], blocks, blocks)
        return [sequences * torch.randn(shape, generator=generator)]

    def _bias(self, case: Case, generator: torch.Generator) -> vk.attention.bias.Bias | None:
        if case.form == "none":
            return None
        *outer, frames, heads, _ = case.shape
        stat: str | Tensor = case.stat
        if stat == "tensor":
            sizes = (*outer, frames, heads, 1)
            stat = self._strided("stat", sizes, case.stat_layout, torch.float32, 2.0, generator)
            stat = stat.squeeze(-1)
        options = {
            "strength": case.strength,
            "stat": stat,
            "clamp_negative": case.clamp_negative,
        }
        if case.form == "gaussian":
            return vk.GaussianBias(case.sigma, **options)
        reach = frames + case.extra
        shape = {"toeplitz": (reach,), "signed": (2 * reach - 1,), "dense": (frames, frames)}
        size = (heads,) * case.per_head + shape[case.form]
        delta = torch.randn(size, generator=generator).to(DTYPES[case.delta_dtype])
        delta = self._guarded["delta"].copy(delta, case.bias_flush_end)
        if case.form == "dense":
            return vk.DenseBias(delta, **options)
        return vk.ToeplitzBias(delta, signed=case.form == "signed", **options)
