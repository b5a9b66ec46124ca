"""The suites: which cases ``python -m benchmarks run`` measures, made from workloads.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Use

WORKLOADS = Path(__file__).parent / "workloads.json"
LONG_HEAD_DIMS = (64, 128)  # workloads.json has the first
LONG_THREAD_FRAMES = 1024
UNET_HEAD_DIM = 64
TINY = (1, 16, 1, 64)  # of a call whose time is nearly all Python's
# Elements of one tensor on a CPU. In float32 four such tensors are more than its caches hold.
CPU_ELEMENTS = 1024 * 16 * 5 * 64
QUICK_ELEMENTS = CPU_ELEMENTS // 4


@dataclass(frozen=True)
class Selection:
    """What of a suite is wanted.

    ``elements`` bounds one tensor's elements by taking fewer rows; None takes all rows.
    """

    models: tuple[str, ...]
    frames: tuple[int, ...]
    long_frames: tuple[int, ...]
    dtypes: tuple[str, ...]
    threads: tuple[int, ...]
    elements: int | None
    unet_frames: tuple[int, ...]
    unet_width: int
    unet_latents: tuple[int, int]


@cache
def workloads() -> dict[str, Any]:
    """workloads.json."""
    return json.loads(WORKLOADS.read_text(encoding="utf-8"))


def short(selection: Selection) -> Iterator[Case]:
    """Every temporal self-attention of the models' denoising steps, up to 128 frames."""
    for dtype in selection.dtypes:
        for frames in selection.frames:
            yield from _levels(selection, "short", "forward", dtype, frames)


def long(selection: Selection) -> Iterator[Case]:
    """Few sequences of many frames."""
    table = workloads()["long"]
    for dtype in selection.dtypes:
        for frames in selection.long_frames:
            for head_dim in LONG_HEAD_DIMS:
                case = Case(
                    "long", "forward", dtype, table["rows"], frames, table["heads"], head_dim
                )
                yield _scaled(case, selection.elements)


def unet(selection: Selection) -> Iterator[Case]:
    """One evaluation of a whole text-to-video UNet, both samples of classifier-free guidance."""
    height, width = selection.unet_latents
    for dtype in selection.dtypes:
        for frames in selection.unet_frames:
            yield Case(
                "unet",
                "step",
                dtype,
                2 * height * width,
                frames,
                selection.unet_width // UNET_HEAD_DIM,
                UNET_HEAD_DIM,
                latents=selection.unet_latents,
            )


def backward(selection: Selection) -> Iterator[Case]:
    """Forward and gradients of the finest levels."""
    return _finest(selection, "backward")


def maps(selection: Selection) -> Iterator[Case]:
    """Forward with the mean map, at the finest levels."""
    return _finest(selection, "maps", "map")


def overhead(selection: Selection) -> Iterator[Case]:
    """One call on next to nothing."""
    for dtype in selection.dtypes:
        yield Case("overhead", "call", dtype, *TINY)


def threads(selection: Selection) -> Iterator[Case]:
    """The same calls on more and more of a CPU's threads."""
    if not selection.threads:
        return
    for dtype in selection.dtypes:
        for frames in (*selection.frames, LONG_THREAD_FRAMES):
            case = Case("threads", "forward", dtype, 2**20, frames, 5, 64)
            case = _scaled(case, selection.elements or CPU_ELEMENTS)
            for count in selection.threads:
                yield replace(case, threads=count)


SUITES: dict[str, Callable[[Selection], Iterator[Case]]] = {
    suite.__name__: suite for suite in (short, long, unet, backward, maps, overhead, threads)
}


def cases(names: Iterable[str], selection: Selection) -> list[Case]:
    """The cases of some suites, each once, with all of its uses."""
    found: dict[Case, Case] = {}
    for name in names:
        for case in SUITES[name](selection):
            uses = (*found[case].uses, *case.uses) if case in found else case.uses
            found[case] = replace(case, uses=uses)
    return list(found.values())


def _levels(
    selection: Selection, suite: str, operation: str, dtype: str, frames: int
) -> Iterator[Case]:
    for model in selection.models:
        for level in workloads()["models"][model]["levels"]:
            use = Use(model, str(level["level"]), level["rows"], level["calls"])
            sizes = (level["rows"], frames, level["heads"], level["head_dim"])
            case = Case(suite, operation, dtype, *sizes, uses=(use,))
            yield _scaled(case, selection.elements)


def _finest(selection: Selection, suite: str, operation: str | None = None) -> Iterator[Case]:
    for dtype in selection.dtypes:
        for frames in selection.frames:
            for case in _levels(selection, suite, operation or suite, dtype, frames):
                if case.uses[0].level == "0":
                    yield case


def _scaled(case: Case, elements: int | None) -> Case:
    """The case with as many rows as ``elements`` allow, but one."""
    if elements is None:
        return case
    return replace(case, batch=min(case.batch, max(1, elements * case.batch // case.elements)))
