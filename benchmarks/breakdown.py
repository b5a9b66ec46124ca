"""``python -m benchmarks.breakdown``: where a call of the CPU kernels spends its time.

Samples the stages of the kernel (bindings/microkernels.h and packing.h) with Linux's ``perf``,
which must be installed and allowed, on one thread. Prints a Markdown table of each stage's part.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from benchmarks.report.tables import Table
from vstar_kernels.cli.options import integer, parsed, read_options, several

SECONDS = 3.0
REPORT = shlex.split("perf report --stdio --sort symbol --percent-limit 0.05 --field-separator ;")
# A function belongs to the first stage whose pattern its name has; Python and PyTorch have none.
STAGES = {
    "pack queries": "::pack_queries",
    "pack K and V": "::pack_rows",
    "logits": "::logits_",
    "bias and maximum": "::add_bias",
    "exponential and sum": "::exponentiate",
    "values": "::product_tile",
    "the rest": "vstar::",
}
BACKWARD_STAGES = {
    "pack queries and gradients": "::pack_queries",
    "pack K and V": "::pack_rows",
    "logits, gradient of the weights": "::logits_",
    "bias and maximum": "::add_bias",
    "exponential and sum": "::exponentiate",
    "gradient of the logits": r"::(row_argmax|softmax_gradient|dot_delta)",
    "gradients of Q, K and V": "::product_tile",
    "the rest": "vstar::",
}
RUN = """
import time, torch, vstar_kernels as vk
torch.set_num_threads(1)
inputs = torch.randn(3, {batch}, {frames}, 5, {head_dim}).to(torch.{dtype}).unbind()
bias = vk.GaussianBias(1.0)
if {backward}:
    for tensor in inputs:
        tensor.requires_grad_()
out = vk.tar_attention(*inputs, bias, backend="cpu")
gradient = torch.randn_like(out)
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    if {backward}:
        torch.autograd.grad(out, inputs, gradient, retain_graph=True)
    else:
        vk.tar_attention(*inputs, bias, backend="cpu")
"""


@dataclass(frozen=True)
class Options:
    """Show where a call of the CPU kernels spends its time."""

    frames: Annotated[tuple[int, ...], several(integer(1), "N")] = (16, 32, 64, 128, 1024)
    head_dim: Annotated[int, parsed(integer(1), "D")] = 64
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    backward: bool = False
    """The backward pass, without the forward pass before it."""


def stage_parts(options: Options, frames: int) -> dict[str, float]:
    """Returns each stage's part of the kernel's samples in one case, of 1."""
    stages = BACKWARD_STAGES if options.backward else STAGES
    code = RUN.format(
        batch=max(1, 4096 // frames),  # a few MB, as a level of a model hands over
        frames=frames,
        head_dim=options.head_dim,
        dtype=options.dtype,
        backward=options.backward,
        seconds=SECONDS,
    )
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder, "perf.data"))
        record = ["perf", "record", "--quiet", "--output", data, sys.executable, "-c", code]
        subprocess.run(record, check=True)
        report = subprocess.check_output(
            [*REPORT, "--input", data], text=True, stderr=subprocess.PIPE
        )
    found: Counter[str] = Counter()
    for percent, symbol in re.findall(r"^\s*([\d.]+)%\s*;(.*)$", report, re.MULTILINE):
        for stage in [name for name, part in stages.items() if re.search(part, symbol)][:1]:
            found[stage] += float(percent)
    return {stage: found[stage] / found.total() for stage in stages}


def main() -> None:
    """Prints the table."""
    options = read_options(Options, prog="python -m benchmarks.breakdown")
    if shutil.which("perf") is None:
        raise SystemExit("perf was not found (Debian: linux-perf)")
    try:
        columns = [stage_parts(options, n) for n in options.frames]
    except subprocess.CalledProcessError as error:
        failed = f"{error.cmd[0]} {error.cmd[1]} failed"
        raise SystemExit(f"{failed}: {error.stderr}" if error.stderr else failed) from None
    name = f"backward, {options.dtype}" if options.backward else options.dtype
    head = (f"{name}, D = {options.head_dim}", *(f"N = {n}" for n in options.frames))
    rows = [(stage, *(f"{column[stage]:.0%}" for column in columns)) for stage in columns[0]]
    print(Table("", head, rows).markdown())


if __name__ == "__main__":
    main()
