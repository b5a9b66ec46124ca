"""Instructions that compute from registers to registers, and those that move between lanes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.emulator.block import LANES, Array, Block, Mask, Step
from benchmarks.emulator.ptx import TYPES, Instruction, Operand, PTXError, Vector

SMALLEST = np.finfo(np.float32).tiny


def widened(kind: str) -> str:
    """Returns the type of twice the bits."""
    return f"{kind[0]}{2 * int(kind[1:])}"


def quotient(x: Array, y: Array) -> Array:
    """Returns x / y, of integers truncated towards zero."""
    if x.dtype.kind == "f":
        return x / y
    y = np.where(y == 0, 1, y)  # threads whose result nobody uses
    floor = x // y
    return floor + ((x % y != 0) & ((x < 0) != (y < 0)))


def remainder(x: Array, y: Array) -> Array:
    """Returns what is left of x after :func:`quotient`."""
    return x - quotient(x, y) * np.where(y == 0, 1, y)


def multiply_add(x: Array, y: Array, z: Array) -> Array:
    """Returns x · y + z, rounded once but for the last bit of few."""
    return (x.astype(np.float64) * y + z).astype(x.dtype)


def ulps(count: int) -> Callable[[Array], Array]:
    """Returns what so many units in the last place are for results in float64."""
    return lambda exact: count * np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


# By how much a result may err: PTX ISA, "Floating Point Instructions", what it says of .approx and
# .full.
LARGEST_ERRORS: dict[str, Callable[[Array], Array]] = {
    "ex2": lambda exact: 2.0**-22 * np.abs(exact),
    "lg2": lambda exact: 2.0**-22 * np.maximum(np.abs(exact), 1.0),
    "sqrt": lambda exact: 2.0**-23 * np.abs(exact),
    "rcp": ulps(1),
    "div": ulps(2),
}


def approximate(name: str, function: Callable[..., Array]) -> Callable[..., Array]:
    """Returns a function of float32 whose results err by up to as much as the ISA lets a GPU's.

    The same result always errs by the same, and its neighbours by something else. Powers of two do
    not err, among them what ex2 is of whole numbers: of a row's largest logit it is 1.
    """
    largest = LARGEST_ERRORS[name]

    def found(*numbers: Array) -> Array:
        exact = function(*[x.astype(np.float64) for x in numbers])
        nearest = exact.astype(np.float32)
        bits = nearest.view(np.uint32)
        scattered = bits * np.uint32(2654435761) >> np.uint32(8)  # Knuth's multiplicative hashing
        share = np.where(bits & np.uint32(0x7FFFFF), scattered / 2.0**23 - 1, 0.0)
        allowed = largest(exact)
        wrong = (exact + share * allowed).astype(np.float32)
        beyond = np.abs(wrong - exact) > allowed  # by rounding
        wrong = np.where(beyond, np.nextafter(wrong, nearest), wrong)
        return np.where(np.isfinite(exact), wrong, nearest)

    return found


def left(x: Array, n: Array) -> Array:
    """Returns x shifted left; nothing of it is left beyond its bits."""
    bits = 8 * x.dtype.itemsize
    n = n.astype(x.dtype)
    return np.where(n < bits, x << np.minimum(n, x.dtype.type(bits - 1)), x.dtype.type(0))


def right(x: Array, n: Array) -> Array:
    """Returns x shifted right, filled with its sign if it has one."""
    bits = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(n, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(n < bits, shifted, x.dtype.type(0))


def field_of(x: Array, start: Array, length: Array) -> Array:
    """Returns bits of x, with the sign of the highest of them if x has one."""
    bits = 8 * x.dtype.itemsize
    start, length = start & 0xFF, length & 0xFF
    if np.any((length == 0) | (length + start > bits)):
        raise PTXError("fields of no bits, or beyond the last, are not emulated")
    above = (bits - length - start).astype(x.dtype)
    return (x << above) >> (bits - length).astype(x.dtype)


UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
}
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": quotient,
    "rem": remainder,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.fmin,
    "max": np.fmax,
}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def comparison(name: str) -> Callable[[Array, Array], Array]:
    """Returns a comparison of setp; one that ends in u holds for NaN, too, and ``ne`` does not."""
    if name in ("nan", "num"):
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == (name == "nan")
    compare = COMPARISONS.get(name.removesuffix("u"))
    if compare is None:
        raise PTXError(f"setp.{name} is not emulated")
    if name.endswith("u"):
        return lambda x, y: compare(x, y) | (x != x) | (y != y)
    return lambda x, y: compare(x, y) & (x == x) & (y == y)


def flushed(x: Array) -> Array:
    """Returns 0 for subnormal numbers."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(x.dtype.type(0), x), x)


def in_turn(function: Callable[[Array, Array], Array], *numbers: Array) -> Array:
    """Returns f(f(x, y), z), of numpy's functions too, which would write to a third argument."""
    return functools.reduce(function, numbers)


def computed(
    function: Callable[..., Array], kinds: list[str], result: Instruction, *, flush: bool = False
) -> Step:
    """Returns the step of a function whose arguments have these types."""
    to, *given = result.operands
    if unknown := [kind for kind in kinds if kind not in TYPES]:
        raise PTXError(f"{result.text}: numbers of type {unknown[0]} are not emulated")

    def step(block: Block, mask: Mask) -> None:
        arguments = [block.read(x, kind) for x, kind in zip(given, kinds, strict=True)]
        if flush:
            arguments = [flushed(x) for x in arguments]
        found = function(*arguments)
        block.write(to, flushed(found) if flush else found, mask)

    return step


def two_at_a_time(function: Callable[..., Array]) -> Callable[..., Array]:
    """Returns a function of float32 for two in each register of 64 bits."""

    def both(*arguments: Array) -> Array:
        found = function(*[x.view(np.float32).reshape(-1, 2) for x in arguments])
        return np.ascontiguousarray(found).view(np.uint64).ravel()

    return both


NOT_EMULATED = {"hi", "sat", "satfinite", "relu", "cc", "rz", "rm", "rp", "rna", "bf16x2", "f16x2"}


def decode_arithmetic(x: Instruction) -> Step:
    """Decodes functions of numbers of one type."""
    kind, flush = x.type, "ftz" in x.modifiers
    function: Callable[..., Array]
    if x.name == "fma":
        function = multiply_add
    elif x.name in UNARY:
        function = np.logical_not if (x.name, kind) == ("not", "pred") else UNARY[x.name]
    else:  # of two numbers, on sm_100 of three too
        two = {"max": np.maximum, "min": np.minimum} if "NaN" in x.modifiers else BINARY
        function = functools.partial(in_turn, two[x.name])
    if {"approx", "full"} & set(x.modifiers):
        if kind != "f32":
            raise PTXError(f"{x.text} is not emulated")
        function = approximate(x.name, function)
    if "wide" in x.modifiers:
        wide = TYPES[widened(kind)]
        return computed(lambda a, b: a.astype(wide) * b.astype(wide), [kind, kind], x)
    count = len(x.operands) - 1
    if kind in HALVES:  # all but the last are of 16 bits
        if x.modifiers[-2] != "f32":
            raise PTXError(f"{x.text} is not emulated")
        return computed(
            lambda *numbers: function(*(from_half(y, kind) for y in numbers[:-1]), numbers[-1]),
            ["u16"] * (count - 1) + ["f32"],
            x,
        )
    if kind == "f32x2":
        return computed(two_at_a_time(function), ["b64"] * count, x)
    return computed(function, [kind] * count, x, flush=flush)


def decode_mad(x: Instruction) -> Step:
    """Decodes integer multiply-adds."""
    kind = x.type
    if "wide" not in x.modifiers:
        return computed(lambda a, b, c: a * b + c, [kind] * 3, x)
    wide = TYPES[widened(kind)]
    return computed(
        lambda a, b, c: a.astype(wide) * b.astype(wide) + c, [kind, kind, widened(kind)], x
    )


def decode_shift(x: Instruction) -> Step:
    """Decodes shl and shr."""
    return computed(left if x.name == "shl" else right, [x.type, "u32"], x)


def decode_bfe(x: Instruction) -> Step:
    """Decodes fields of bits."""
    return computed(field_of, [x.type, "u32", "u32"], x)


def decode_prmt(x: Instruction) -> Step:
    """Decodes bytes of two registers: of four bits three say which, and one asks for its sign."""
    if x.modifiers != ("b32",):
        raise PTXError(f"{x.text} is not emulated")

    def chosen(low: Array, high: Array, which: Array) -> Array:
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        found = np.zeros(1, np.uint64)
        for n in range(4):
            place = which.astype(np.uint64) >> np.uint64(4 * n)
            byte = both >> ((place & np.uint64(7)) * np.uint64(8)) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            byte = np.where(place & np.uint64(8), sign, byte)
            found = found | byte << np.uint64(8 * n)
        return found.astype(np.uint32)

    return computed(chosen, ["b32"] * 3, x)


def decode_setp(x: Instruction) -> Step:
    """Decodes comparisons."""
    if len(x.modifiers) != 2:
        raise PTXError(f"{x.text} is not emulated")
    return computed(comparison(x.modifiers[0]), [x.type, x.type], x)


def decode_selp(x: Instruction) -> Step:
    """Decodes a choice by a predicate."""
    kind = x.type.replace("f", "b")
    return computed(lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"], x)


def decode_mov(x: Instruction) -> Step:
    """Decodes moves, those that join registers and take them apart too."""
    to, given = x.operands
    kind = x.type
    if isinstance(given, Vector):
        part = f"u{int(kind[1:]) // len(given.parts)}"

        def join(block: Block, mask: Mask) -> None:
            parts = np.broadcast_arrays(*[block.read(y, part) for y in given.parts])
            joined = np.stack(parts, -1)
            block.write(to, joined.view(f"u{int(kind[1:]) // 8}").ravel(), mask)

        return join
    if isinstance(to, Vector):
        count = len(to.parts)

        def part_of(block: Block, mask: Mask) -> None:
            whole = np.ascontiguousarray(block.read(given, kind))
            parts = whole.view(f"u{whole.dtype.itemsize // count}").reshape(-1, count)
            for n, register in enumerate(to.parts):
                block.write(register, parts[:, n], mask)

        return part_of
    return computed(lambda y: y, [kind], x)


def bfloat16(x: Array) -> Array:
    """Returns the bits of float32 rounded to bfloat16."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def float16(x: Array) -> Array:
    """Returns the bits of float32 rounded to float16."""
    return x.astype(np.float16).view(np.uint16)


def from_half(bits: Array, kind: str) -> Array:
    """Returns float32 of numbers of 16 bits, "f16" or "bf16"."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


HALVES = {"bf16": bfloat16, "f16": float16}


def decode_cvt(x: Instruction) -> Step:
    """Decodes conversions."""
    *how, to, given = x.modifiers
    if "f64" in (to, given) or ({to, given} & {*HALVES} and "f32" not in (to, given)):
        raise PTXError(f"{x.text} is not emulated")
    if to in ("bf16x2", "f16x2"):
        half = HALVES[to[:-2]]

        def pack(high: Array, low: Array) -> Array:
            upper = half(high).astype(np.uint32) << np.uint32(16)
            return upper | half(low)

        return computed(pack, [given, given], x)
    if to in HALVES:
        return computed(HALVES[to], ["f32"], x)
    if given in HALVES:
        return computed(lambda a: from_half(a, given), ["u16"], x)
    if to == given == "f32":
        rounds = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}
        return computed(rounds[how[0]], [given], x, flush="ftz" in how)
    if given[0] == "f" and to[0] != "f":
        raise PTXError(f"{x.text} is not emulated")
    return computed(lambda a: a.astype(TYPES[to]), [given], x)


def of_whole_warps(x: Instruction, members: Operand, step: Step) -> Step:
    """Returns the step of an instruction for which all lanes of a warp wait for each other."""

    def run(block: Block, mask: Mask) -> None:
        block.refuse_parts_of_warps(mask)
        if np.any(block.read(members, "s32") != -1):
            raise PTXError(f"{x.text}: parts of a warp are not emulated")
        step(block, mask)

    return run


def decode_shfl(x: Instruction) -> Step:
    """Decodes numbers of other lanes."""
    to, given, lane, clamp, members = x.operands
    mode = x.modifiers[1]
    if mode not in ("bfly", "idx") or isinstance(to, Vector):
        raise PTXError(f"{x.text} is not emulated")

    def step(block: Block, mask: Mask) -> None:
        own = block.thread % LANES
        asked = block.read(lane, "s32").astype(np.int64)
        if np.any(block.read(clamp, "u32") != LANES - 1):
            raise PTXError(f"{x.text}: parts of a warp are not emulated")
        other = own ^ asked if mode == "bfly" else block.everywhere(asked) % LANES
        values = block.everywhere(block.read(given, "b32"))
        block.write(to, values[block.thread - own + other], mask)

    return of_whole_warps(x, members, step)


def decode_elect(x: Instruction) -> Step:
    """Decodes the choice of one lane of each warp, the first."""
    leader, told = x.operands[0].parts  # type: ignore[union-attr]

    def step(block: Block, mask: Mask) -> None:
        block.write(leader, np.zeros(1, np.uint32), mask)
        block.write(told, block.thread % LANES == 0, mask)

    return of_whole_warps(x, x.operands[1], step)


REDUCTIONS: dict[str, Any] = {"add": np.add, "max": np.fmax, "min": np.fmin}


def decode_redux(x: Instruction) -> Step:
    """Decodes sums and extremes of a warp's numbers."""
    to, given, members = x.operands
    reduce = REDUCTIONS[x.modifiers[1]].reduce

    def step(block: Block, mask: Mask) -> None:
        values = block.everywhere(block.read(given, x.type)).reshape(-1, LANES)
        block.write(to, np.repeat(reduce(values, 1), LANES), mask)

    return of_whole_warps(x, members, step)


def decode_nothing(x: Instruction) -> Step:
    """Decodes what changes nothing where all threads run together."""
    return lambda block, mask: None


def strictly(decode: Callable[[Instruction], Step]) -> Callable[[Instruction], Step]:
    """Returns a decoder that refuses modifiers by which the result would be another."""

    def decode_strictly(x: Instruction) -> Step:
        packs = x.name == "cvt" and x.modifiers[0] == "rn" and x.modifiers[-1] == "f32"
        allowed = {"bf16x2", "f16x2"} if packs else set()
        if set(x.modifiers) & (NOT_EMULATED - allowed):
            raise PTXError(f"{x.text} is not emulated")
        return decode(x)

    return decode_strictly


DECODERS = {
    **dict.fromkeys([*UNARY, *BINARY, "fma"], decode_arithmetic),
    "mad": decode_mad,
    "shl": decode_shift,
    "shr": decode_shift,
    "bfe": decode_bfe,
    "prmt": decode_prmt,
    "setp": decode_setp,
    "selp": decode_selp,
    "mov": decode_mov,
    "cvt": decode_cvt,
    "cvta": decode_mov,
    "shfl": decode_shfl,
    "elect": decode_elect,
    "redux": decode_redux,
    "fence": decode_nothing,
}
DECODERS = {name: strictly(decode) for name, decode in DECODERS.items()}
