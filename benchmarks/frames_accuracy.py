"""``python -m benchmarks.frames_accuracy``: what frame_attention's backends err by, at most.

One small call for each rule, type and backend that runs here, against the dense formula in float64
on the same inputs, which are already rounded to the type. Beside them is the error of the dense
formula in that type (``eager_frames`` of ``vstar_kernels.testing``). Prints a Markdown table. With
``TRITON_INTERPRET=1`` the Triton kernels run too, interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

import vstar_kernels as vk
from benchmarks.report.tables import Table
from vstar_kernels.attention import dispatch, triton
from vstar_kernels.cli.options import read_options
from vstar_kernels.testing import eager_frames, inputs, largest_error

RULES = {
    "none": vk.FrameRule(),
    "bias": vk.FrameRule.tar(1.0, stat="none"),
    "TAR, frame_max": vk.FrameRule.tar(1.0),
    "TAR, row_max": vk.FrameRule.tar(1.0, stat="row_max"),
    "window, sink": vk.FrameRule.window(1, sink=1),
    "band": vk.FrameRule.band(9),
    "attenuate": vk.FrameRule.attenuate(0.9, 4),
    "all of them": (
        vk.FrameRule.tar(1.0)
        + vk.FrameRule.window(2, sink=1)
        + vk.FrameRule.band(20)
        + vk.FrameRule.attenuate(0.9, 2)
    ),
}


@dataclass(frozen=True)
class Options:
    """Compare frame_attention's backends with the formula in float64."""

    frames: int = 8
    tokens: int = 45
    """Of a frame."""
    text: int = 7
    heads: int = 2
    head_dim: int = 64
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = (
        "float32",
        "bfloat16",
        "float16",
    )
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def measure(options: Options) -> Iterator[list[str]]:
    """Yields a row for each type and rule: the errors of the formula and of each backend."""
    layout = vk.Layout(vk.Text(options.text), vk.Frames(options.frames, options.tokens))
    shape = (1, layout.tokens, options.heads, options.head_dim)
    for dtype in options.dtypes:
        query, key, value = inputs(*shape, dtype=getattr(torch, dtype))
        for name, rule in RULES.items():
            exact = eager_frames(query.double(), key.double(), value.double(), layout, rule)
            plain = eager_frames(query, key, value, layout, rule)
            given = (*(x.to(options.device) for x in (query, key, value)), layout, rule)
            reasons = vk.backends.why_not_frames(*given)
            cells = [f"{largest_error(plain, exact):.1e}"]
            for backend in backends():
                if reasons[backend] or _is_truncated(backend, dtype):
                    cells.append("–")
                    continue
                out = vk.frame_attention(*given, backend=backend)
                cells.append(f"{largest_error(out.cpu(), exact):.1e}")
            yield [dtype, name, *cells]


def backends() -> list[str]:
    """Returns the backends that run here, in the order of preference."""
    modules = dispatch.FRAME_ATTENTION.backends
    return [name for name, module in modules.items() if not module.unavailable()]


def _is_truncated(backend: str, dtype: str) -> bool:
    """Whether the error would be the interpreter's, which truncates to bfloat16."""
    return backend == "triton" and dtype == "bfloat16" and triton.interpreted()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    options = read_options(Options, arguments, prog="python -m benchmarks.frames_accuracy")
    head = ["type", "rule", "dense formula", *backends()]
    if triton.interpreted():
        head = ["triton, interpreted" if name == "triton" else name for name in head]
    print(Table("", head, list(measure(options)), words=2).markdown())


if __name__ == "__main__":
    main()
