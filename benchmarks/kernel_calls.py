"""``python -m benchmarks.kernel_calls``: a call of every kernel at odd sizes, for a sanitizer.

Nothing is compared here, and little is launched besides: under compute-sanitizer each launch takes
hundreds of times as long. The first call that raises ends the program, as after a fault of memory
access nothing runs any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import vstar_kernels as vk
from vstar_kernels.cli.options import read_options

HEADS = 3
# Frames of a tile of several sequences, of tiles that are not full, and of a stream.
FRAMES = (15, 33, 100, 131)
HEAD_DIMS = (40, 72)


@dataclass(frozen=True)
class Options:
    """Call every kernel once."""

    device: Literal["cuda", "cpu"] = "cuda"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


def drawn(options: Options, *shape: int) -> Tensor:
    """Returns random numbers that want a gradient."""
    dtype = getattr(torch, options.dtype)
    return torch.randn(shape).to(options.device, dtype).requires_grad_()


def calls(options: Options) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields names and calls: the forward and the backward pass, with and without maps."""
    backend = "triton" if options.device == "cuda" else "cpu"

    def both(*results: Tensor, of: list[Tensor]) -> None:
        torch.autograd.grad(results, of, [torch.ones_like(x) for x in results])

    for frames in FRAMES:
        for head_dim in HEAD_DIMS:
            for with_map in (False, True):

                def tar(
                    frames: int = frames, dim: int = head_dim, with_map: bool = with_map
                ) -> None:
                    qkv = [drawn(options, 5, frames, HEADS, dim) for _ in range(3)]
                    stat = "map_max" if with_map else "row_max"
                    bias = vk.GaussianBias(1.5, stat=stat)
                    found = vk.tar_attention(*qkv, bias, return_map=with_map, backend=backend)
                    both(*(found if with_map else (found,)), of=qkv)

                shown = " and the map" if with_map else ""
                yield f"tar_attention, {frames} frames of {head_dim}{shown}", tar
    for keys in (77, 131):

        def columns(keys: int = keys) -> None:
            qkv = [drawn(options, 2, n, HEADS, 40) for n in (133, keys, keys)]
            chosen = torch.eye(keys, 4).to(options.device)
            found = vk.column_attention(*qkv, chosen, backend=backend)
            both(*found, of=qkv[:1])
            both(*vk.column_attention(*qkv, chosen, backend=backend), of=qkv)

        yield f"column_attention, {keys} keys", columns
    for tokens in (9, 70):  # of a frame: its slots are revisited, or split
        for rule in (vk.FrameRule.tar(1.0), vk.FrameRule.window(1), None):

            def frame(tokens: int = tokens, rule: vk.FrameRule | None = rule) -> None:
                layout = vk.Layout(vk.Text(5), vk.Frames(4, tokens))
                qkv = [drawn(options, 1, layout.tokens, HEADS, 40) for _ in range(3)]
                found = vk.frame_attention(*qkv, layout, rule, return_map=True, backend=backend)
                both(*found, of=qkv)

            yield f"frame_attention, {tokens} tokens a frame, {rule}", frame


def main(arguments: list[str] | None = None) -> None:
    """Makes the calls, and says which."""
    options = read_options(Options, arguments, prog="python -m benchmarks.kernel_calls")
    torch.manual_seed(0)
    for name, call in calls(options):
        print(name, flush=True)
        call()
        if options.device == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
