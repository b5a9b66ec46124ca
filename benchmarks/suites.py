"""The suites: which cases ``python -m benchmarks run`` measures, made from workloads.json.

A new suite is a function that yields its cases, and a line in ``SUITES``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from benchmarks.cases import Case, Use
from benchmarks.frames import RULES, layout_of, visible_share
from benchmarks.peers import PEERS, VSTAR_KERNELS
from benchmarks.results import Plan, ResultsError, Task
from vstar_kernels.cli.options import amount, integer, option, parsed, several

WORKLOADS = json.loads((Path(__file__).parent / "workloads.json").read_text(encoding="utf-8"))
LONG_HEAD_DIMS = (64, 128)  # workloads.json has the first
LONG_THREAD_FRAMES = 1024
UNET_HEAD_DIM = 64
# Elements of one tensor on a CPU. In float32 four such tensors are more than its caches hold.
CPU_ELEMENTS = 1024 * 16 * 5 * 64
QUICK_ELEMENTS = CPU_ELEMENTS // 4
# Tokens × channels of a whole block on a CPU: a second or two.
CPU_CHANNELS = 2048 * 1536
# Tokens and heads of attention over frames on a CPU: a tenth of a second or so for plain attention.
CPU_TOKENS, CPU_HEADS = 4096, 2
QUICK_TOKENS = 2048

# Of frames.RULES, those that whole blocks are measured under.
BLOCK_RULES = ("tar", "tar-row-max")

Allocator = Literal["warm", "default"]
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
    device: Annotated[Literal["cpu", "cuda"] | None, option(default="cuda if there is one")] = None
    """Where it is measured."""
    threads: Annotated[int | None, parsed(integer(1), "N"), option(default="PyTorch's")] = None
    """Threads of a CPU."""
    isa: Annotated[Literal["avx512", "avx2"] | None, option()] = None
    """Limit the kernels, PyTorch and MKL to this instruction set."""
    allocators: Annotated[tuple[Allocator, ...] | None, option(default="both")] = None
    """Settings of a CPU's allocator."""
    full_rows: bool = False
    """Take all rows of the models on a CPU too, which takes long."""
    unet_frames: Annotated[tuple[int, ...] | None, Counts] = None
    """Numbers of frames of whole UNets."""
    unet_width: Annotated[int | None, parsed(integer(32), "CHANNELS"), option()] = None
    """Channels of whole UNets at the finest level, really 320."""
    unet_latents: Annotated[tuple[Count, Count] | None, option("HEIGHT WIDTH")] = None
    """Size of whole UNets' latents."""
    transformers: Annotated[tuple[str, ...] | None, option("MODEL ...", default="all")] = None
    """Models whose attention over frames is measured; the dit of workloads.json."""
    rules: Annotated[tuple[str, ...] | None, option("RULE ...", default="all")] = None
    """Rules between frames; of benchmarks/frames.py."""
    rounds: Annotated[int | None, parsed(integer(2), "N"), option()] = None
    """Rounds of all peers in turn, at most."""
    seconds: Annotated[float | None, parsed(amount, "SECONDS"), option()] = None
    """Time for the rounds of a case, about."""

    @property
    def elements(self) -> int | None:
        """Returns how many elements of a tensor bound the batch; None where nothing does."""
        if self.full_rows or self.device != "cpu":
            return None
        return QUICK_ELEMENTS if self.quick else CPU_ELEMENTS

    @property
    def channels(self) -> int | None:
        """Returns how many tokens × channels a block has at most; None where nothing bounds it."""
        if self.full_rows or self.device != "cpu":
            return None
        return CPU_CHANNELS // 4 if self.quick else CPU_CHANNELS

    @property
    def tokens(self) -> int | None:
        """Returns how many tokens attend to each other at most; None where nothing bounds them."""
        if self.full_rows or self.device != "cpu":
            return None
        return QUICK_TOKENS if self.quick else CPU_TOKENS

    def complete(self) -> Selection:
        """Returns the selection with all that was not given. Raises ResultsError for no GPU."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise ResultsError("--device cuda: torch finds no GPU")
        chosen = DEFAULTS | {"device": device, "threads": torch.get_num_threads()}
        chosen |= (ON_A_CPU if device == "cpu" else {}) | (QUICK if self.quick else {})
        return replace(self, **chosen | {k: x for k, x in vars(self).items() if x is not None})


Make = Callable[..., Case]  # of a suite's operation and type, from the rest


def short(selection: Selection, make: Make) -> Iterator[Case]:
    """Every temporal self-attention of the models' denoising steps, up to 128 frames."""
    for frames in selection.frames:
        for model in selection.models:
            for level in WORKLOADS["models"][model]["levels"]:
                use = Use(model, str(level["level"]), level["rows"], level["calls"])
                yield make(level["rows"], frames, level["heads"], level["head_dim"], uses=(use,))


def long(selection: Selection, make: Make) -> Iterator[Case]:
    """Few sequences of many frames."""
    table = WORKLOADS["long"]
    for frames in selection.long_frames:
        for head_dim in LONG_HEAD_DIMS:
            yield make(table["rows"], frames, table["heads"], head_dim)


def unet(selection: Selection, make: Make) -> Iterator[Case]:
    """One evaluation of a whole text-to-video UNet, both samples of classifier-free guidance."""
    height, width = latents = selection.unet_latents
    heads = selection.unet_width // UNET_HEAD_DIM
    for frames in selection.unet_frames:
        yield make(2 * height * width, frames, heads, UNET_HEAD_DIM, latents=latents)


def backward(selection: Selection, make: Make) -> Iterator[Case]:
    """Forward and gradients of the finest levels."""
    return (case for case in short(selection, make) if case.uses[0].level == "0")


def maps(selection: Selection, make: Make) -> Iterator[Case]:
    """Forward with the mean map, at the finest levels."""
    return backward(selection, make)


def overhead(selection: Selection, make: Make) -> Iterator[Case]:
    """One call on next to nothing."""
    yield make(1, 16, 1, 64)  # its time is nearly all Python's


def threads(selection: Selection, make: Make) -> Iterator[Case]:
    """The same calls on more and more of a CPU's threads."""
    if selection.device != "cpu":
        return
    most = selection.threads
    counts = [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
    for frames in (*selection.frames, LONG_THREAD_FRAMES):
        batch = (selection.elements or CPU_ELEMENTS) // (frames * 5 * 64)
        for count in counts:
            yield make(max(1, batch), frames, 5, 64, threads=count)


def frames(selection: Selection, make: Make) -> Iterator[Case]:
    """Attention over frames of tokens in video transformers, under each of the rules."""
    for model in selection.transformers:
        shape = WORKLOADS["dit"]["models"][model]
        full = tuple(shape[name] for name in ("text_first", "frames", "tokens", "text_last"))
        heads, layout = shape["heads"], full
        most = selection.tokens
        if most is not None and (share := most / layout_of(*full).tokens) < 1:
            heads = min(heads, CPU_HEADS)
            smaller = (max(1, round(share * n)) if n else 0 for n in (full[0], *full[2:]))
            first, tokens, last = smaller
            layout = (first, full[1], tokens, last)
        count = layout_of(*layout).tokens
        measured = (count / layout_of(*full).tokens) ** 2 * heads / shape["heads"]
        use = Use(model, f"{full[1]} × {full[2]}", 1, shape["calls"], measured)
        for name in selection.rules:
            yield make(
                1,
                count,
                heads,
                shape["head_dim"],
                layout=layout,
                rule=name,
                visible=visible_share(layout_of(*layout), RULES[name].make(full[1])),
                uses=(use,),
            )


def transformers(selection: Selection, make: Make) -> Iterator[Case]:
    """A block of a video transformer on a CPU, the whole model on a GPU, under TAR."""
    for model, described in WORKLOADS["dit-model"]["models"].items():
        if model not in selection.transformers:
            continue
        shape = WORKLOADS["dit"]["models"][model]
        full = tuple(shape[name] for name in ("text_first", "frames", "tokens", "text_last"))
        heads, head_dim = shape["heads"], shape["head_dim"]
        height, width = described["grid"]
        most = selection.channels
        share = 1.0 if most is None else most / (heads * head_dim * layout_of(*full).tokens)
        if share < 1:
            height, width = (max(1, round(n * share**0.5)) for n in (height, width))
        layout = (full[0], full[1], height * width, full[3])
        count = layout_of(*layout).tokens
        measured = min(1.0, (count / layout_of(*full).tokens) ** 2)
        for name in selection.rules:
            if name not in BLOCK_RULES:
                continue
            case = make(
                1,
                count,
                heads,
                head_dim,
                layout=layout,
                latents=(2 * height, 2 * width),
                rule=name,
                uses=(Use(model, f"{full[1]} × {full[2]}", 1, shape["calls"], measured),),
            )
            yield case if selection.device == "cpu" else replace(case, operation="model")


def cross(selection: Selection, make: Make) -> Iterator[Case]:
    """Cross-attention to a text, with the maps of four words, at each level of UNets."""
    table = WORKLOADS["cross"]
    for frames in table["frames"][: 1 if selection.quick else None]:
        for model in table["models"]:
            if model not in selection.models or frames not in selection.frames:
                continue
            for level in WORKLOADS["models"][model]["levels"]:
                if level["level"] == "init":  # which has no cross-attention
                    continue
                yield make(
                    frames,
                    level["rows"] // 2,
                    level["heads"],
                    level["head_dim"],
                    keys=table["keys"],
                    columns=table["columns"],
                    uses=(Use(model, str(level["level"]), frames, level["calls"] // 2),),
                )


def cross_backward(selection: Selection, make: Make) -> Iterator[Case]:
    """The same with the gradient of the query, at the finest levels."""
    return (case for case in cross(selection, make) if case.uses[0].level == "0")


@dataclass(frozen=True)
class Suite:
    """Cases of one operation, and how the report presents them.

    A suite with a ``plot`` gets one of the time per frame and head, with that caption. One with
    ``default_allocator`` is measured under the allocator's default setting too.
    """

    cases: Callable[[Selection, Make], Iterator[Case]]
    operation: str
    title: str
    note: str = ""
    plot: str = ""
    default_allocator: bool = False


ONE_CALL = "One call at each level; which models make it stands in the run's file."
WHOLE_UNET = (
    "ModelScope's UNet with random weights, TAR with σ = 1 on every level but the first "
    "temporal block; batch is its rows at the finest level."
)
WHOLE_BLOCK = (
    "One block at the real width with random weights on a CPU, on a GPU one evaluation of all "
    "blocks; of one side of guidance. SDPA without TAR is the model as it is."
)
FINEST = "Time per frame and head, finest levels."
SUITES = {
    "short": Suite(short, "forward", "The models' calls", ONE_CALL, default_allocator=True),
    "long": Suite(long, "forward", "Long sequences", plot="Time per frame and head, σ = 1."),
    "unet": Suite(unet, "step", "Whole UNet steps", WHOLE_UNET),
    "backward": Suite(backward, "backward", "Forward and backward", plot=FINEST),
    "maps": Suite(maps, "map", "With the mean map", plot=FINEST),
    "overhead": Suite(
        overhead, "call", "Overhead of a call", "One call of many, the CPU's part included."
    ),
    "threads": Suite(threads, "forward", "Threads"),
    "frames": Suite(frames, "frames", "Attention over frames of tokens"),
    "dit-model": Suite(transformers, "block", "Video transformers", WHOLE_BLOCK),
    "cross": Suite(cross, "cross", "Attention to a text, with maps of words"),
    "cross-backward": Suite(
        cross_backward, "cross-backward", "The same, with the gradient of the query"
    ),
}
DEFAULTS: dict[str, Any] = {
    "suites": tuple(SUITES),
    "models": tuple(WORKLOADS["models"]),
    "frames": tuple(WORKLOADS["frames"]),
    "long_frames": tuple(WORKLOADS["long"]["frames"]),
    "transformers": tuple(WORKLOADS["dit"]["models"]),
    "rules": tuple(RULES),
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
    "transformers": DEFAULTS["transformers"][:1],
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
            make = functools.partial(Case, name, suite.operation, dtype)
            for case in suite.cases(selection, make):
                if selection.elements and suite.operation not in ("step", "block"):
                    batch = max(1, selection.elements * case.batch // case.elements)
                    case = replace(case, batch=min(case.batch, batch))
                uses = found[case].uses if case in found else ()
                found[case] = replace(case, uses=uses + case.uses)
    return list(found.values())


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
    known = {
        "suites": SUITES,
        "models": WORKLOADS["models"],
        "transformers": WORKLOADS["dit"]["models"],
        "rules": RULES,
        "peers": PEERS,
    }
    for field, names in known.items():
        if unknown := ", ".join(x for x in getattr(chosen, field) if x not in names):
            raise ResultsError(f"--{field}: there is no {unknown}; known: {', '.join(names)}")
    own = {
        "peers": tuple(x for x in PEERS if x in chosen.peers or x == VSTAR_KERNELS),
        "tasks": tasks(cases(chosen), chosen.device, chosen.allocators),
    }
    shared = {x.name: getattr(chosen, x.name) for x in fields(Plan) if x.name not in own}
    return Plan(**shared, **own)
