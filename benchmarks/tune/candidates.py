"""The launch configurations that ``benchmarks.tune`` tries, in order of preference.

Plain data: tiles as (queries, sequences, warps), streams as (queries, keys, warps, stages). What
speaks for an order: a head's narrower part is 16 wide, and a thread of a program should still have
16 bytes of it to load; NVIDIA's larger matrix instructions take 64 rows of four warps (128 on
sm_100); IEEE float32 products keep whole rows of their operands in registers, so their blocks are
small.
"""

from __future__ import annotations

from benchmarks.codegen.cases import Config, Entry, Key
from benchmarks.codegen.targets import TARGETS, VECTOR_BYTES
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig, split

TILES = {
    "16-bit": {
        16: [(16, 4, 4), (16, 4, 2), (16, 8, 4), (16, 2, 2), (16, 2, 1), (16, 1, 1)],
        32: [(32, 2, 4), (32, 2, 2), (32, 1, 2), (32, 1, 1), (16, 1, 2)],
        64: [(64, 1, 4), (64, 1, 2), (32, 1, 4), (32, 1, 2), (16, 1, 4)],
        128: [(128, 1, 8), (64, 1, 4), (64, 1, 8), (128, 1, 4), (32, 1, 4), (32, 1, 8)],
    },
    "tf32": {
        16: [(16, 4, 4), (16, 4, 8), (16, 2, 2), (16, 2, 4), (16, 1, 1), (16, 1, 2)],
        32: [(32, 1, 2), (32, 2, 4), (32, 1, 4), (16, 1, 2), (16, 1, 4), (16, 1, 1)],
        64: [(64, 1, 4), (32, 1, 4), (64, 1, 8), (16, 1, 4), (32, 1, 8)],
        128: [(64, 1, 8), (64, 1, 4), (32, 1, 8), (32, 1, 4), (16, 1, 8)],
    },
    "ieee": {
        16: [(16, 2, 4), (16, 1, 2), (16, 1, 4), (16, 2, 8), (16, 4, 8)],
        32: [(32, 1, 4), (16, 1, 4), (32, 1, 8), (16, 1, 8)],
        64: [(32, 1, 8), (64, 1, 8), (16, 1, 8), (16, 1, 4)],
        128: [(16, 1, 8), (32, 1, 8), (32, 1, 16), (16, 1, 16)],
    },
}
SMALL_STREAMS = [
    (64, 64, 8, 1), (64, 32, 8, 1), (32, 64, 4, 2), (32, 64, 4, 1), (64, 64, 2, 1), (32, 32, 4, 1),
    (32, 32, 2, 1), (16, 16, 4, 1), (16, 32, 1, 1), (16, 16, 2, 1), (16, 16, 1, 1),
]  # fmt: skip
STREAMS = {
    ("sm_80", "16-bit"): [
        (128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2),
        (64, 32, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 2), (32, 32, 2, 2),
        (32, 64, 2, 1),
    ],
    ("sm_90", "16-bit"): [
        (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2),
        (64, 32, 4, 2), (64, 64, 4, 1),
    ],
    ("sm_100", "16-bit"): [
        (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3),
        (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 4, 1),
    ],
    ("gfx942", "16-bit"): [
        (128, 64, 4, 2), (128, 64, 4, 1), (64, 64, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1),
        (128, 128, 4, 1), (64, 64, 2, 1), (32, 64, 2, 1), (64, 32, 1, 1), (32, 32, 1, 1),
    ],
    ("sm_80", "tf32"): [
        (64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2), (64, 32, 4, 1), (32, 32, 4, 2),
    ],
    ("sm_90", "tf32"): [  # in stages, values would be loaded 4 bytes at a time, to be transposed
        (128, 64, 8, 1), (64, 64, 4, 1), (64, 32, 4, 1), (128, 32, 8, 1),
    ],
    ("sm_100", "tf32"): [
        (128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 1), (64, 64, 4, 1), (64, 32, 4, 2),
        (64, 32, 4, 1), (128, 32, 8, 1),
    ],
    ("gfx942", "tf32"): [
        (64, 64, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1), (64, 64, 2, 1), (32, 32, 2, 1),
    ],
}  # fmt: skip
IEEE_STREAMS = {  # by width: what fits hangs on how its parts unroll
    16: [(64, 64, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1)],
    32: [(64, 32, 8, 1), (32, 32, 4, 1)],
    48: [(32, 32, 4, 1), (32, 32, 8, 1)],
    64: [(32, 32, 8, 1), (16, 32, 4, 1)],
    80: [(16, 16, 2, 1), (16, 16, 4, 1)],
    96: [(64, 32, 8, 1), (32, 32, 8, 1), (16, 16, 2, 1)],
    128: [(16, 32, 8, 1), (16, 16, 8, 1)],
    160: [(16, 16, 4, 1), (16, 16, 8, 1)],
    256: [(16, 32, 8, 1), (16, 16, 8, 1)],
}
# For gradients: tiles as (sequences, warps), streams as (queries, keys, warps), in warps of 32. A
# tile keeps four blocks of a sequence and two maps in registers: without matrix instructions none
# fits. Blocks are small for so many warps: a thread may have less than a vector to load.
LEAST_BYTES = 4
BACKWARD_TILES = {
    ("16-bit", 16): [(4, 4), (2, 2), (2, 1), (1, 1), (1, 2)],
    ("16-bit", 32): [(1, 4), (1, 2), (1, 8)],
    ("16-bit", 64): [(1, 8), (1, 4)],
    ("tf32", 16): [(4, 4), (2, 4), (1, 2), (1, 4)],
    ("tf32", 32): [(1, 4), (1, 8)],
    ("tf32", 64): [(1, 8)],
}
BACKWARD_STREAMS = {
    ("16-bit", "narrow"): [(64, 64, 8), (64, 64, 4), (32, 32, 4), (16, 16, 4)],
    ("16-bit", "wide"): [(64, 64, 8), (32, 32, 4), (32, 32, 8), (32, 16, 4), (16, 16, 4)],
    ("16-bit", "widest"): [(32, 16, 4), (16, 16, 4), (16, 16, 2), (32, 16, 8), (16, 16, 8)],
    ("tf32", "narrow"): [(64, 32, 8), (32, 32, 4), (32, 32, 8), (16, 16, 4)],
    ("tf32", "wide"): [(16, 32, 4), (16, 16, 4), (16, 16, 8)],
    ("tf32", "widest"): [(16, 16, 8), (16, 16, 4), (32, 16, 8), (16, 32, 8), (32, 32, 16)],
    ("ieee", "narrow"): [(32, 32, 8), (16, 16, 8), (16, 16, 4), (16, 16, 2)],
    ("ieee", "wide"): [(16, 16, 8), (16, 16, 4)],
    ("ieee", "widest"): [(16, 16, 8), (16, 16, 4), (16, 16, 16)],
}

# Larger tiles spill whatever the configuration: bytes of one of a sequence's tensors, and elements
# where products have no matrix instructions.
LARGEST_TILE = 40 * 1024
LARGEST_TILE_WITHOUT_MATRIX = 32 * 64
# Registers of a thread that a block's outputs may take, of those it can have.
OUTPUT_REGISTERS = {"sm_80": 96, "sm_90": 128, "sm_100": 128, "gfx942": 128}
OUTPUT_REGISTERS_WITHOUT_MATRIX = 40


def candidates(key: Key) -> list[Entry]:
    """Returns the entries to try, best first; the ``shared`` of their ``config`` is not known."""
    if key.backward:
        found = backward_tiles(key) if key.frames else backward_streams(key)
    else:
        found = tiles(key) if key.frames else streams(key)
    return [Entry(**vars(key), config=config) for config in found]


def tiles(key: Key) -> list[Config]:
    """Returns those for tiles; none where a tile would be too large."""
    elements = key.frames * key.width
    without_matrix = key.kind == "ieee" and key.architecture != "gfx942"
    if elements * itemsize(key) > LARGEST_TILE:
        return []
    if without_matrix and elements > LARGEST_TILE_WITHOUT_MATRIX:
        return []
    return [
        TileConfig(queries, sequences, warps, shared=0)
        for queries, sequences, warps in TILES[key.kind][key.frames]
        if bytes_to_load(key, queries * sequences, warps) >= VECTOR_BYTES
    ]


def streams(key: Key) -> list[Config]:
    """Returns those for any number of frames."""
    if key.kind == "ieee":
        preferred, registers = IEEE_STREAMS[key.width], OUTPUT_REGISTERS_WITHOUT_MATRIX
    else:
        preferred = STREAMS[key.architecture, key.kind]
        registers = OUTPUT_REGISTERS[key.architecture]
    lanes = TARGETS[key.architecture].lanes
    return [
        StreamConfig(queries, keys, warps, stages, shared=0)
        for queries, keys, warps, stages in dict.fromkeys([*preferred, *SMALL_STREAMS])
        if queries * key.width <= registers * lanes * warps
        and bytes_to_load(key, min(queries, keys), warps) >= VECTOR_BYTES
    ]


def backward_tiles(key: Key) -> list[Config]:
    """Returns those for the gradients of tiles, whose map is one block."""
    return [
        TileConfig(key.frames, sequences, warps, shared=0)
        for sequences, warps in in_own_warps(key, BACKWARD_TILES.get((key.kind, key.frames), []))
        if bytes_to_load(key, key.frames * sequences, warps) >= LEAST_BYTES
    ]


def backward_streams(key: Key) -> list[Config]:
    """Returns those for the gradients of any number of frames."""
    heads = "narrow" if key.width <= 64 else "wide" if key.width <= 128 else "widest"
    return [
        StreamConfig(queries, keys, warps, stages=1, shared=0)
        for queries, keys, warps in in_own_warps(key, BACKWARD_STREAMS[key.kind, heads])
        if bytes_to_load(key, min(queries, keys), warps) >= LEAST_BYTES
    ]


def itemsize(key: Key) -> int:
    """Returns the bytes of a number."""
    return 2 if key.kind == "16-bit" else 4


def bytes_to_load(key: Key, rows: int, warps: int) -> int:
    """Returns what every thread has to load of the narrower part of so many rows."""
    narrower = min(filter(None, split(key.width)))
    return rows * narrower * itemsize(key) // (warps * TARGETS[key.architecture].lanes)


def in_own_warps(key: Key, sizes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Replaces warps of 32 by warps of the architecture with as many threads."""
    ratio = TARGETS[key.architecture].lanes // 32
    return list(dict.fromkeys((*blocks, max(1, warps // ratio)) for *blocks, warps in sizes))
