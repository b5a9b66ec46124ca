"""The text of PTX as kernels: parameters, instructions and their operands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KINDS = {"u": "u", "b": "u", "s": "i", "f": "f"}
# What numbers of each type are kept as; "f32x2" are two in one register.
TYPES = {
    f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}")
    for letter, kind in KINDS.items()
    for bits in (8, 16, 32, 64)
    if (letter, bits) != ("f", 8)
} | {"pred": np.dtype(bool)}


class PTXError(ValueError):
    """PTX that cannot be read, or has something that is not emulated."""


class Register(NamedTuple):
    """A register, a special register, or a name that stands for an address."""

    name: str
    dtype: np.dtype | None = None  # of its bits; None of what has no declaration


class Immediate(NamedTuple):
    """A number by its bits."""

    bits: int


class Vector(NamedTuple):
    """Registers in braces, or the two of ``a|b``."""

    parts: tuple[Operand, ...]


class Address(NamedTuple):
    """What stands in brackets: a register or name and an offset in bytes.

    Of a tensor map there are coordinates besides, the innermost dimension's first.
    """

    base: Register
    offset: int
    coordinates: tuple[Operand, ...]


Operand = Register | Immediate | Vector | Address


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``guard`` is the register that says whether a thread runs it."""

    name: str  # what stands before the first dot
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool  # the guard
    target: str  # of a branch
    text: str
    source: str  # the line of the kernel's source, if it is known

    @property
    def type(self) -> str:
        """The last modifier."""
        return self.modifiers[-1]


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter: its bytes, and where they lie."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Kernel:
    """A kernel's parameters and code; ``labels`` are indices of instructions."""

    name: str
    parameters: tuple[Parameter, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @property
    def parameter_bytes(self) -> int:
        """The bytes of all parameters."""
        return max((x.offset + x.size for x in self.parameters), default=0)


def read(text: str) -> Kernel:
    """Reads the only kernel of a module.

    Raises:
        PTXError: There is none, or it cannot be read.
    """
    found = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{", text, re.DOTALL)
    if not found:
        raise PTXError("there is no .entry in this PTX")
    body = text[found.end() : _end_of_scope(text, found.end())]
    instructions, labels = _Body().read(body)
    parameters = tuple(_parameters(found[2]))
    return Kernel(found[1], parameters, tuple(instructions), labels)


def _end_of_scope(text: str, start: int) -> int:
    depth = 1
    for brace in re.finditer(r"//[^\n]*|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return start + brace.start()
    raise PTXError("a kernel of this PTX has no end")


def _parameters(text: str) -> Iterator[Parameter]:
    end = 0
    for line in filter(None, (x.strip() for x in text.split(","))):
        found = re.fullmatch(
            r"\.param(?: \.align (\d+))? \.(\w)(\d+)(?: \.ptr.*?)? (\w+?)(?:\[(\d+)\])?", line
        )
        if not found:
            raise PTXError(f"not a parameter: {line}")
        align, _, bits, name, count = found.groups()
        size = int(bits) // 8
        offset = -(-end // int(align or size)) * int(align or size)
        end = offset + size * int(count or 1)
        yield Parameter(name, offset, end - offset)


LINE = re.compile(r"\s*\.loc\b[^\n/]*(?://\s*(\S+))?[^\n]*\n")
COMMENT = re.compile(r"\s*//[^\n]*\n?")
LABEL = re.compile(r"\s*([\w$]+):(?!:)")
BRACE = re.compile(r"\s*([{}])")
STATEMENT = re.compile(r"\s*((?:[^;/]|/(?!/))+);")
DECLARATION = re.compile(r"\.reg \.(\w+)\s+(.*)")
PARTS = re.compile(r"(?:@(!?)(\S+)\s+)?(\S+)\s*(.*)", re.DOTALL)


class _Body:
    """Reads a kernel's body, from one statement to the next."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.types: dict[str, np.dtype] = {}  # of registers, by their names without numbers
        # Braces around inline assembly: its labels and registers are its own.
        self.scopes: list[tuple[int, set[str]]] = [(0, set())]
        self.count = 0
        self.source = ""

    def read(self, text: str) -> tuple[list[Instruction], dict[str, int]]:
        position = 0
        while text[position:].strip():
            position = self._read_one(text, position)
        return self.instructions, self.labels

    def _read_one(self, text: str, position: int) -> int:
        if found := LINE.match(text, position):
            self.source = found[1] or self.source
        elif (found := COMMENT.match(text, position)) or (found := BRACE.match(text, position)):
            if found[0].strip() == "{":
                self.count += 1
                self.scopes.append((self.count, set(re.findall(r"^\s*(\w+):", text, re.M))))
            elif found[0].strip() == "}":
                self.scopes.pop()
        elif found := LABEL.match(text, position):
            self.labels[self._scoped(found[1])] = len(self.instructions)
        elif found := STATEMENT.match(text, position):
            self._statement(found[1].strip())
        else:
            raise PTXError(f"cannot read PTX from here: {text[position : position + 80]!r}")
        return found.end()

    def _scoped(self, name: str) -> str:
        number, names = self.scopes[-1]
        return f"{name}@{number}" if name in names else name

    def _statement(self, text: str) -> None:
        if found := DECLARATION.match(text):
            kind, names = found.groups()
            for name in (x.strip() for x in names.split(",")):
                stem = name.split("<")[0]
                if stem == name:
                    self.scopes[-1][1].add(name)
                width = TYPES[kind]
                bits = width if kind == "pred" else np.dtype(f"u{width.itemsize}")
                self.types[self._scoped(stem)] = bits
        elif not text.startswith("."):  # pragmas
            self._instruction(text)

    def _instruction(self, text: str) -> None:
        parts = PARTS.fullmatch(text)
        assert parts is not None
        negated, guard, opcode, rest = parts.groups()
        name, *modifiers = opcode.split(".")
        target = self._scoped(rest.strip()) if name == "bra" else ""
        operands = () if target else tuple(self._operand(x) for x in _split(rest))
        given = self._register(guard) if guard else None
        self.instructions.append(
            Instruction(
                name, tuple(modifiers), operands, given, bool(negated), target,
                " ".join(text.split()), self.source,
            )
        )  # fmt: skip

    def _register(self, name: str) -> Register:
        name = self._scoped(name)
        return Register(name, self.types.get(re.sub(r"\d+$", "", name), self.types.get(name)))

    def _operand(self, text: str) -> Operand:
        if text[0] == "{":
            return Vector(tuple(self._operand(x) for x in _split(text[1:-1])))
        if text[0] == "[":
            place, *coordinates = _split(text[1:-1])
            base, _, offset = place.partition("+")
            given = tuple(y for x in coordinates for y in self._operand(x).parts)
            return Address(self._register(base.strip()), int(offset.strip() or "0", 0), given)
        if "|" in text:
            return Vector(tuple(self._operand(x) for x in text.split("|")))
        if re.fullmatch(r"0[fd][0-9A-Fa-f]+", text):
            return Immediate(int(text[2:], 16))
        if re.match(r"-?\d", text):
            return Immediate(int(text.rstrip("U"), 0))
        return self._register(text)


def _split(text: str) -> list[str]:
    """Splits operands at commas that stand in no bracket."""
    found = re.findall(r"\s*((?:[^,{}\[\]]|\{[^}]*\}|\[(?:[^\]])*\])+)", text)
    return [x.strip() for x in found if x.strip()]
