"""The launch configurations that ``benchmarks.tune`` tries, in order of preference.

Plain data: tiles as (rows, sequences, warps), streams as (rows, keys, warps, stages). What speaks
for an order: a head's narrowest part is 16 wide, and a thread of a program should still have 16
bytes of it to load; NVIDIA's larger matrix instructions take 64 rows of four warps (128 on sm_100);
IEEE float32 products keep whole rows of their operands in registers, so their blocks are small.
"""

from __future__ import annotations

from collections.abc import Sequence

from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig, split
from vstar_kernels.attention.triton.facts import VECTOR_BYTES

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


# Of the gradients: tiles as (sequences, warps), streams as (rows, keys, warps), in warps of 32. A
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


def tiles(architecture: str, kind: str, frames: int, width: int) -> list[TileConfig]:
    """To try for tiles of so many frames. ``shared`` is not known yet."""
    elements = frames * width
    if elements * (2 if kind == "16-bit" else 4) > LARGEST_TILE:
        return []
    if kind == "ieee" and architecture != "gfx942" and elements > LARGEST_TILE_WITHOUT_MATRIX:
        return []
    return [
        TileConfig(rows, sequences, warps, shared=0)
        for rows, sequences, warps in TILES[kind][frames]
        if bytes_to_load(architecture, kind, width, rows * sequences, warps) >= VECTOR_BYTES
    ]


# Registers of a thread that a block's outputs may take, of those it can have.
OUTPUT_REGISTERS = {"sm_80": 96, "sm_90": 128, "sm_100": 128, "gfx942": 128}
OUTPUT_REGISTERS_WITHOUT_MATRIX = 40


def streams(architecture: str, kind: str, width: int) -> list[StreamConfig]:
    """To try for any number of frames. ``shared`` is not known yet."""
    lanes, most = (64 if architecture == "gfx942" else 32), OUTPUT_REGISTERS[architecture]
    if kind == "ieee":
        most = OUTPUT_REGISTERS_WITHOUT_MATRIX
    first = IEEE_STREAMS[width] if kind == "ieee" else STREAMS[architecture, kind]
    sizes = dict.fromkeys([*first, *SMALL_STREAMS])
    return [
        StreamConfig(rows, keys, warps, stages, shared=0)
        for rows, keys, warps, stages in sizes
        if rows * width <= most * lanes * warps
        and bytes_to_load(architecture, kind, width, min(rows, keys), warps) >= VECTOR_BYTES
    ]


def backward_tiles(architecture: str, kind: str, frames: int, width: int) -> list[TileConfig]:
    """To try for the gradients of tiles, whose map is one block. ``shared`` is not known yet."""
    sizes = _in_own_warps(architecture, BACKWARD_TILES.get((kind, frames), []))
    return [
        TileConfig(frames, sequences, warps, shared=0)
        for sequences, warps in sizes
        if bytes_to_load(architecture, kind, width, frames * sequences, warps) >= LEAST_BYTES
    ]


def backward_streams(architecture: str, kind: str, width: int) -> list[StreamConfig]:
    """To try for the gradients of any number of frames. ``shared`` is not known yet."""
    heads = "narrow" if width <= 64 else "wide" if width <= 128 else "widest"
    sizes = _in_own_warps(architecture, BACKWARD_STREAMS[kind, heads])
    return [
        StreamConfig(rows, keys, warps, stages=1, shared=0)
        for rows, keys, warps in sizes
        if bytes_to_load(architecture, kind, width, min(rows, keys), warps) >= LEAST_BYTES
    ]


def _in_own_warps(architecture: str, sizes: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """As many threads in warps of 64, on AMD."""
    if architecture != "gfx942":
        return sizes
    return list(dict.fromkeys((*blocks, max(1, warps // 2)) for *blocks, warps in sizes))


def bytes_to_load(architecture: str, kind: str, width: int, rows: int, warps: int) -> int:
    """What every thread has to load of the narrower part of so many rows."""
    part = min(filter(None, split(width)))
    threads = warps * (64 if architecture == "gfx942" else 32)
    return rows * part * (2 if kind == "16-bit" else 4) // threads
