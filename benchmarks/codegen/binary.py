"""What a compiled kernel is made of: registers, spills, shared memory, loads, stores, matrix work.

NVIDIA's binaries are read with the ``cuobjdump`` and ``nvdisasm`` that come with Triton, AMD's from
the assembly that Triton keeps. Both name the source line of each instruction, by which the loads of
queries, keys and values, all in ``primitives.load_heads``, are told from those of tables and
statistics. Descriptors are of keys and values alone. Loops are told by their branches, back to
labels above.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from vstar_kernels.attention.triton import primitives

# NVIDIA's assembler drops a place whose line's number is that of the instruction before, even where
# its file is another: the lines of what loads heads get numbers that no file has.
primitives.load_heads.starting_line_number += 1_000_000

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
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
    # Loads of queries, keys and values to shared memory while others compute: those of ``loads``
    # that are such, and those of whole blocks by descriptors.
    asynchronous: int = 0
    load_groups: int = 0  # the most that a pass over a block waits for, one after the other
    in_pass: int = 0  # instructions of the longest loop of matrix instructions, or of all code
    in_lanes: int = 0  # scalar registers that AMD's compiler moved into lanes of vector ones


@dataclass(frozen=True)
class Assembly:
    """How a vendor writes instructions, whose names are words between "." or "_"."""

    place: re.Pattern  # a line that names the file and line which the next instructions are from
    instruction: re.Pattern
    load: re.Pattern
    store: re.Pattern
    matrix: re.Pattern
    shared_store: re.Pattern
    label: re.Pattern  # a line that branches name
    branch: re.Pattern  # with the label that it names
    widths: dict[str, int]  # bytes, by the last word of a load or store that tells

    def read(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yields each instruction's name, and whether it is from ``primitives.load_heads``."""
        return ((name, in_load) for _, name, in_load in self._lines(text) if name)

    def _lines(self, text: str) -> Iterator[tuple[str, str, bool]]:
        """Yields each line with its instruction's name, empty where it has none, and the place."""
        start, lines = primitives.load_heads.starting_line_number, primitives.load_heads.raw_src
        in_load = False
        for line in text.splitlines():
            if found := self.place.match(line):
                in_load = found[1] == "primitives.py" and 0 <= int(found[2]) - start < len(lines)
            found = self.instruction.match(line)
            yield line, found[1] if found else "", in_load

    def count(self, text: str) -> dict[str, Any]:
        """Returns what of a :class:`Binary` follows from its instructions."""
        code = list(self.read(text))
        loads = [(self.width(name), in_load) for name, in_load in code if self.load.match(name)]
        return {
            "instructions": len(code),
            "loads": _count(width for width, in_load in loads if in_load),
            "other_loads": _count(width for width, in_load in loads if not in_load),
            "asynchronous": sum(_runs_ahead(name, in_load) for name, in_load in code),
            "load_groups": self.load_groups(text),
            "in_pass": self.in_pass(text),
            "stores": _count(self.width(name) for name, _ in code if self.store.match(name)),
            "matrix": _count(name.split(".")[0] for name, _ in code if self.matrix.match(name)),
        }

    def load_groups(self, text: str) -> int:
        """Returns the most groups of loads in one pass of an innermost loop of matrix instructions.

        Of queries, keys and values: those that the loop waits for are told apart by the stores to
        shared memory between them, as what is loaded goes there before the next load begins. All
        that go there by themselves, while others compute, are one group.
        """
        return max(map(_groups, self._matrix_loops(text)), default=0)

    def in_pass(self, text: str) -> int:
        """Returns how many instructions one pass of the longest of these loops has.

        Where there is none, all of the code is one pass.
        """
        return max(map(len, self._matrix_loops(text)), default=sum(1 for _ in self.read(text)))

    def _matrix_loops(self, text: str) -> list[list[str]]:
        """Returns what the innermost loops with matrix instructions do, an event an instruction.

        The events of instructions that tell nothing of groups of loads are empty.
        """
        labels, done, found = dict[str, int](), list[str](), list[list[str]]()
        last = 0  # where the last of them ends
        for line, name, in_load in self._lines(text):
            if label := self.label.match(line):
                labels[label[1]] = len(done)
            elif name:
                done.append(self._event(name, in_load))
                if branch := self.branch.search(line):
                    start = labels.get(branch[1], -1)
                    if start >= last and "matrix" in done[start:]:
                        found.append(done[start:])
                        last = len(done)
        return found

    def _event(self, name: str, in_load: bool) -> str:
        """Returns what an instruction does, of what tells groups of loads."""
        if self.matrix.match(name):
            return "matrix"
        if self.shared_store.match(name):
            return "store"
        if _runs_ahead(name, in_load):
            return "asynchronous"
        return "load" if in_load and self.load.match(name) else ""

    def width(self, name: str) -> int:
        """Returns how many bytes a thread loads or stores with one instruction."""
        words = reversed(re.split(r"[._]", name))
        return next(self.widths[word] for word in words if word in self.widths)


SASS = Assembly(
    place=re.compile(r'^\s*//## File ".*?([^/"]+)", line (\d+)'),
    instruction=re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"),
    load=re.compile(r"LDG(STS)?(\.|$)"),
    store=re.compile(r"STG(\.|$)"),
    matrix=re.compile(r"[A-Z]*MMA(\.|$)"),  # HMMA, IMMA, HGMMA, UTCHMMA, UTCQMMA, …
    shared_store=re.compile(r"STSM?(\.|$)"),
    label=re.compile(r"^(\.L_\w+):"),
    branch=re.compile(r"\sBRA\b.*`\((\.L_\w+)\)"),
    widths={
        **{"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32},
        **dict.fromkeys(("LDG", "LDGSTS", "STG"), 4),
    },
)
GCN = Assembly(
    place=re.compile(r"^\s+\.loc\s.*; (\S+?):(\d+):"),
    instruction=re.compile(r"^\s+([a-z]+_[a-z0-9_]+)"),
    load=re.compile(r"(global|buffer|flat)_load_"),
    store=re.compile(r"(global|buffer|flat)_store_"),
    matrix=re.compile(r"v_(mfma|smfmac)_"),
    shared_store=re.compile(r"ds_(write|store)_"),
    label=re.compile(r"^(\.LBB\w+):"),
    branch=re.compile(r"\ss_c?branch\w*\s+(\.LBB\w+)"),
    widths={
        **{"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2},
        **{"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16},
    },
)


def read(kernel: Any) -> Binary:
    """Returns the contents of a kernel that Triton compiled."""
    if "cubin" not in kernel.asm:
        return from_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", "-g", file.name)
    return from_sass(sass, usage, kernel.metadata.shared)


def from_sass(sass: str, usage: str, shared: int) -> Binary:
    """Reads one kernel's ``nvdisasm -c -g`` and ``cuobjdump -res-usage``."""
    numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    local = sum(name.startswith(("LDL", "STL")) for name, _ in SASS.read(sass))
    spilled = max(numbers["STACK"], numbers["LOCAL"], 4 * local)
    return Binary(numbers["REG"], spilled, shared, **SASS.count(sass))


def from_amdgcn(assembly: str, shared: int) -> Binary:
    """Reads one kernel's assembly.

    Scalar registers that overflow go into lanes of vector ones: no spill, as they touch no memory.
    Where those overflow in turn, they count as vector registers' spills.
    """
    numbers = {
        key: int(value) for key, value in re.findall(r"\.(\w+?):?\s+(\d+)$", assembly, re.MULTILINE)
    }
    return Binary(
        registers=numbers["amdhsa_next_free_vgpr"],  # accumulation registers included
        spilled=max(4 * numbers["vgpr_spill_count"], numbers["private_segment_fixed_size"]),
        shared=shared,
        in_lanes=numbers["sgpr_spill_count"],
        **GCN.count(assembly),
    )


def _runs_ahead(name: str, in_load: bool) -> bool:
    """Tells whether an instruction loads to shared memory while others compute."""
    return name.startswith("UTMALDG") or (in_load and name.startswith("LDGSTS"))


def _groups(loop: list[str]) -> int:
    """Returns how many groups of loads a loop has, of the events of one pass."""
    runs = [event for event, _ in itertools.groupby(x for x in loop if x in ("load", "store"))]
    if len(runs) > 1 and runs[0] == runs[-1]:  # the loop goes on at its beginning
        runs.pop()
    return runs.count("load") + ("asynchronous" in loop)


def _count(items: Iterable[Any]) -> Counts:
    return dict(sorted(Counter(items).items()))


def _tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
