"""The suites: which cases ``python -m benchmarks run`` measures, made from workloads.json.

A new suite is a function that yields its cases, under :func:`suite`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from benchmarks.cases import Case, Use
from benchmarks.peers import PEERS, VSTAR_KERNELS
from benchmarks.results import Plan, ResultsError, Task
from vstar_kernels.cli.options import integer, option, parsed, several

WORKLOADS = json.loads((Path(__file__).parent / "workloads.json").read_text(encoding="utf-8"))
LONG_HEAD_DIMS = (64, 128)  # workloads.json has the first
LONG_THREAD_FRAMES = 1024
UNET_HEAD_DIM = 64
TINY = (1, 16, 1, 64)  # of a call whose time is nearly all Python's
# Elements of one tensor on a CPU. In float32 four such tensors are more than its caches hold.
CPU_ELEMENTS = 1024 * 16 * 5 * 64
QUICK_ELEMENTS = CPU_ELEMENTS // 4

# Options of counts.
Count = Annotated[int, parsed(integer(1), "N")]
Counts = several(integer(1), "N")


@dataclass(frozen=True)
class Selection:
    """Which cases a run measures, and how. What is not given is chosen for the device."""

    quick: bool = False
    """Measure less of everything, in some 3 minutes."""
    suites: Annotated[tuple[str, ...] | None, option("SUITE ...", default="all")] = None
    """By name; `list` shows them."""
    models: Annotated[tuple[str, ...] | None, option("MODEL ...", default="all")] = None
    """Of benchmarks/workloads.json."""
    frames: Annotated[tuple[int, ...] | None, Counts] = None
    """Numbers of frames of the models' calls."""
    long_frames: Annotated[tuple[int, ...] | None, Counts] = None
    """Numbers of frames of the long suite."""
    dtypes: Annotated[tuple[Literal["float32", "bfloat16", "float16"], ...] | None, option()] = None
    """Types of query, key and value."""
    peers: Annotated[tuple[str, ...] | None, option("PEER ...")] = None
    """Who is compared with vstar_kernels; `list` shows them."""
    device: Annotated[Literal["cpu", "cuda"] | None, option(default="cuda where there is one")] = (
        None
    )
    """Where it is measured."""
    threads: Annotated[int | None, parsed(integer(1), "N"), option(default="PyTorch's")] = None
    """Threads of a CPU."""
    isa: Annotated[Literal["avx512", "avx2"] | None, option()] = None
    """Limit the kernels, PyTorch and MKL to this instruction set."""
    allocators: Annotated[tuple[Literal["warm", "default"], ...] | None, option(default="both")] = (
        None
    )
    """Settings of a CPU's allocator."""
    full_rows: bool = False
    """Take all rows of the models on a CPU too, which takes long."""
    unet_frames: Annotated[tuple[int, ...] | None, Counts] = None
    """Numbers of frames of whole UNets."""
    unet_width: Annotated[int | None, parsed(integer(32), "CHANNELS"), option()] = None
    """Channels of whole UNets at the finest level, really 320."""
    unet_latents: Annotated[tuple[Count, Count] | None, option("HEIGHT WIDTH")] = None
    """Size of whole UNets' latents."""
    rounds: Annotated[int | None, parsed(integer(2), "N"), option()] = None
    """Rounds of all peers in turn, at most."""
    seconds: float | None = None
    """Time for the rounds of a case, about."""

    @property
    def elements(self) -> int | None:
        """Returns how many elements of a tensor bound the batch; None where nothing does."""
        if self.full_rows or self.device != "cpu":
            return None
        return QUICK_ELEMENTS if self.quick else CPU_ELEMENTS

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """Returns 1, 2, 4 and so on up to the run's threads; nothing on a GPU."""
        if self.device != "cpu":
            return ()
        return (
            *(2**i for i in range(self.threads.bit_length()) if 2**i < self.threads),
            self.threads,
        )

    def complete(self) -> Selection:
        """Returns the selection with all that was not given. Raises ResultsError for no GPU."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise ResultsError("--device cuda: torch finds no GPU")
        chosen = DEFAULTS | {"device": device, "threads": torch.get_num_threads()}
        chosen |= (ON_A_CPU if device == "cpu" else {}) | (QUICK if self.quick else {})
        chosen |= {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **chosen)


Make = Callable[..., Case]
Cases = Callable[[Selection, Make], Iterator[Case]]


@dataclass(frozen=True)
class Suite:
    """Cases of one operation, and how the report presents them.

    A suite with a ``plot`` gets one of the time per frame and head, with that caption. One with
    ``default_allocator`` is measured under the allocator's default setting too.
    """

    cases: Cases
    operation: str
    title: str
    note: str = ""
    plot: str = ""
    default_allocator: bool = False


SUITES: dict[str, Suite] = {}


def suite(operation: str, title: str, **presentation: Any) -> Callable[[Cases], Cases]:
    """Makes a suite of the function that yields its cases; :class:`Suite` has the fields."""

    def register(cases: Cases) -> Cases:
        SUITES[cases.__name__] = Suite(cases, operation, title, **presentation)
        return cases

    return register


@suite(
    "forward",
    "The models' calls",
    note="One call at each level; which models make it stands in the run's file.",
    default_allocator=True,
)
def short(selection: Selection, make: Make) -> Iterator[Case]:
    """Every temporal self-attention of the models' denoising steps, up to 128 frames."""
    for frames in selection.frames:
        for model in selection.models:
            for level in WORKLOADS["models"][model]["levels"]:
                use = Use(model, str(level["level"]), level["rows"], level["calls"])
                size = (use.full_batch, frames, level["heads"], level["head_dim"])
                yield make(*size, uses=(use,))


@suite("forward", "Long sequences", plot="Time per frame and head, σ = 1.")
def long(selection: Selection, make: Make) -> Iterator[Case]:
    """Few sequences of many frames."""
    table = WORKLOADS["long"]
    for frames in selection.long_frames:
        for head_dim in LONG_HEAD_DIMS:
            yield make(table["rows"], frames, table["heads"], head_dim)


@suite(
    "step",
    "Whole UNet steps",
    note="ModelScope's UNet with random weights, TAR with σ = 1 on every level but the first "
    "temporal block; batch is its rows at the finest level.",
)
def unet(selection: Selection, make: Make) -> Iterator[Case]:
    """One evaluation of a whole text-to-video UNet, both samples of classifier-free guidance."""
    height, width = selection.unet_latents
    heads = selection.unet_width // UNET_HEAD_DIM
    for frames in selection.unet_frames:
        size = (2 * height * width, frames, heads, UNET_HEAD_DIM)
        yield make(*size, latents=selection.unet_latents)


@suite("backward", "Forward and backward", plot="Time per frame and head, finest levels.")
def backward(selection: Selection, make: Make) -> Iterator[Case]:
    """Forward and gradients of the finest levels."""
    return (case for case in short(selection, make) if case.uses[0].level == "0")


@suite("map", "With the mean map", plot="Time per frame and head, finest levels.")
def maps(selection: Selection, make: Make) -> Iterator[Case]:
    """Forward with the mean map, at the finest levels."""
    return backward(selection, make)


@suite("call", "Overhead of a call", note="One call of many, the CPU's part included.")
def overhead(selection: Selection, make: Make) -> Iterator[Case]:
    """One call on next to nothing."""
    yield make(*TINY)


@suite("forward", "Threads")
def threads(selection: Selection, make: Make) -> Iterator[Case]:
    """The same calls on more and more of a CPU's threads."""
    for frames in (*selection.frames, LONG_THREAD_FRAMES):
        batch = (selection.elements or CPU_ELEMENTS) // (frames * 5 * 64)
        for count in selection.thread_counts:
            yield make(max(1, batch), frames, 5, 64, threads=count)


DEFAULTS: dict[str, Any] = {
    "suites": tuple(SUITES),
    "models": tuple(WORKLOADS["models"]),
    "frames": tuple(WORKLOADS["frames"]),
    "long_frames": tuple(WORKLOADS["long"]["frames"]),
    "dtypes": ("bfloat16",),
    "peers": tuple(name for name, peer in PEERS.items() if not peer.on_request),
    "allocators": ("warm", "default"),
    "unet_frames": (16, 64),
    "unet_width": 320,
    "unet_latents": (40, 64),
    "rounds": 15,
    "seconds": 4.0,
}
ON_A_CPU: dict[str, Any] = {
    "dtypes": ("float32",),
    "unet_frames": (16, 32),
    "unet_width": 64,
    "unet_latents": (20, 32),
}
QUICK: dict[str, Any] = {
    "models": DEFAULTS["models"][:1],
    "frames": (16, 64),
    "long_frames": (1024,),
    "allocators": ("warm",),
    "unet_frames": (16,),
    "unet_latents": (10, 16),
    "rounds": 7,
    "seconds": 0.5,
}


def cases(selection: Selection) -> list[Case]:
    """Returns the cases of a complete selection, each once, with all of its uses."""
    found: dict[Case, Case] = {}
    for name in selection.suites:
        suite = SUITES[name]
        for dtype in selection.dtypes:
            for case in suite.cases(
                selection, functools.partial(Case, name, suite.operation, dtype)
            ):
                case = _bounded(case, selection.elements)
                uses = (*found[case].uses, *case.uses) if case in found else case.uses
                found[case] = replace(case, uses=uses)
    return list(found.values())


def _bounded(case: Case, elements: int | None) -> Case:
    """Returns the case with as large a batch as ``elements`` allow, but at least one."""
    if elements is None or case.operation == "step":
        return case
    return replace(case, batch=min(case.batch, max(1, elements * case.batch // case.elements)))


def tasks(cases: Sequence[Case], device: str, allocators: Iterable[str]) -> tuple[Task, ...]:
    """Returns the cases under each allocator setting that they are measured with, in order."""
    if device == "cuda":
        return tuple(Task(case, "") for case in cases)
    return tuple(
        Task(case, allocator)
        for allocator in allocators
        for case in cases
        if allocator == "warm" or SUITES[case.suite].default_allocator
    )


def plan(selection: Selection) -> Plan:
    """Returns the run that a selection asks for. Raises ResultsError for what does not exist."""
    chosen = selection.complete()
    known = {"suites": SUITES, "models": WORKLOADS["models"], "peers": PEERS}
    for field, names in known.items():
        if unknown := [name for name in getattr(chosen, field) if name not in names]:
            raise ResultsError(
                f"--{field}: there is no {', '.join(unknown)}; known: {', '.join(names)}"
            )
    return Plan(
        device=chosen.device,
        threads=chosen.threads,
        isa=chosen.isa,
        peers=tuple(x for x in PEERS if x in chosen.peers or x == VSTAR_KERNELS),
        rounds=chosen.rounds,
        seconds=chosen.seconds,
        unet_width=chosen.unet_width,
        tasks=tasks(cases(chosen), chosen.device, chosen.allocators),
    )
