"""What a compiled kernel is made of: registers, spills, shared memory, loads, stores, matrix work.

NVIDIA's binaries are read with the ``cuobjdump`` and ``nvdisasm`` that come with Triton, AMD's from
the assembly that Triton keeps. Both name the source line of each instruction, by which the loads of
queries, keys and values, all in ``pieces.load``, are told from those of tables and statistics.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from vstar_kernels.attention.triton import pieces

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

SASS_PLACE = re.compile(r'^\s*//## File ".*?([^/"]+)", line (\d+)')
SASS_NAME = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
SASS_MATRIX = re.compile(r"[A-Z]*MMA$")  # HMMA, IMMA, HGMMA, UTCHMMA, UTCQMMA, …
SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}

GCN_PLACE = re.compile(r"^\s+\.loc\s.*; (\S+?):(\d+):")
GCN_NAME = re.compile(r"^\s+([a-z]+_[a-z0-9_]+)")
GCN_WIDTHS = {
    **{"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2},
    **{"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16},
}
GCN_LOAD, GCN_STORE = (re.compile(rf"(global|buffer|flat)_{x}_") for x in ("load", "store"))

Counts = dict[Any, int]


@dataclass(frozen=True)
class Binary:
    """One compiled kernel. Widths, a kernel's instructions of each, and bytes are of one thread."""

    registers: int
    spilled: int  # bytes that it keeps in memory for lack of registers
    shared: int  # bytes of a program
    instructions: int  # in the binary: loops count once
    loads: Counts  # of queries, keys and values: width in bytes → instructions
    other_loads: Counts
    stores: Counts
    matrix: Counts  # name → instructions
    in_lanes: int = 0  # scalar registers that AMD's compiler moved into lanes of vector ones


def read(kernel: Any) -> Binary:
    """The contents of a kernel that Triton compiled."""
    if "cubin" not in kernel.asm:
        return from_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", "-g", file.name)
    return from_sass(sass, usage, kernel.metadata.shared)


def from_sass(sass: str, usage: str, shared: int) -> Binary:
    """``nvdisasm -c -g`` and ``cuobjdump -res-usage`` of one kernel."""
    numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    code = list(_instructions(sass, SASS_PLACE, SASS_NAME))
    loads = [(x, p) for x, p in code if x.split(".")[0] in ("LDG", "LDGSTS")]
    local = sum(name.startswith(("LDL", "STL")) for name, _ in code)
    return Binary(
        registers=numbers["REG"],
        spilled=max(numbers["STACK"], numbers["LOCAL"], 4 * local),
        shared=shared,
        instructions=len(code),
        loads=_count(_sass_width(x) for x, place in loads if _in_load(place)),
        other_loads=_count(_sass_width(x) for x, place in loads if not _in_load(place)),
        stores=_count(_sass_width(x) for x, _ in code if x.split(".")[0] == "STG"),
        matrix=_count(y for y in (x.split(".")[0] for x, _ in code) if SASS_MATRIX.match(y)),
    )


def from_amdgcn(assembly: str, shared: int) -> Binary:
    """The assembly of one kernel.

    Scalar registers that overflow go into lanes of vector ones: no spill, as they touch no memory.
    Where those overflow in turn, they count as vector registers' spills.
    """
    numbers = {
        key: int(value) for key, value in re.findall(r"\.(\w+?):?\s+(\d+)$", assembly, re.MULTILINE)
    }
    code = list(_instructions(assembly, GCN_PLACE, GCN_NAME))
    loads = [(x, place) for x, place in code if GCN_LOAD.match(x)]
    return Binary(
        registers=numbers["amdhsa_next_free_vgpr"],  # accumulation registers included
        spilled=max(4 * numbers["vgpr_spill_count"], numbers["private_segment_fixed_size"]),
        shared=shared,
        instructions=len(code),
        loads=_count(_gcn_width(x) for x, place in loads if _in_load(place)),
        other_loads=_count(_gcn_width(x) for x, place in loads if not _in_load(place)),
        stores=_count(_gcn_width(x) for x, _ in code if GCN_STORE.match(x)),
        matrix=_count(x for x, _ in code if x.startswith(("v_mfma_", "v_smfmac_"))),
        in_lanes=numbers["sgpr_spill_count"],
    )


Place = tuple[str, int]


def _instructions(text: str, place: re.Pattern, name: re.Pattern) -> Iterator[tuple[str, Place]]:
    """Each instruction's name with the file and line that it comes from."""
    here = ("", 0)
    for line in text.splitlines():
        if found := place.match(line):
            here = (found[1], int(found[2]))
        elif found := name.match(line):
            yield found[1], here


def _in_load(place: Place) -> bool:
    lines, start = inspect.getsourcelines(pieces.load.fn)
    return place[0] == "pieces.py" and start <= place[1] < start + len(lines)


def _sass_width(name: str) -> int:
    return next((SASS_WIDTHS[x] for x in name.split(".")[1:] if x in SASS_WIDTHS), 4)


def _gcn_width(name: str) -> int:
    return next(GCN_WIDTHS[x] for x in name.split("_") if x in GCN_WIDTHS)


def _count(items: Iterable[Any]) -> Counts:
    return dict(sorted(Counter(items).items()))


def _tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
