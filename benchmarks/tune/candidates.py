"""The launch configurations that ``benchmarks.tune`` tries, in order of preference.

``candidates.json`` lists them: tiles as (queries, sequences, warps, stages, hoists) by kind of
products and frames, streams as (queries, keys, warps, stages) by architecture and kind. What speaks
for an order: with two stages a tile's loads are under way while the one before is computed; a
head's narrower part is 16 wide, and a thread of a program should still have 16 bytes of it to load,
or of a tile 8;
NVIDIA's larger matrix instructions take 64 rows of four warps (128 on sm_100); on sm_90, TF32
products would load values 4 bytes at a time, to transpose them, if they came in stages. IEEE
float32 products keep whole rows of their operands in registers, so their blocks are small, and
which of the streams fit hangs on how the parts of a width unroll. Where none of those does, a
stream may take a small one.

Of gradients, the streams are listed by kind and how wide a head is, and warps are of 32 threads;
where ``benchmarks.units`` puts them in order, there is one list, and most load a block ahead. A
tile of gradients keeps four blocks of a sequence and two maps in registers: without matrix
instructions none fits. Blocks are small for so many warps: a thread may have less than 16 bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import units
from benchmarks.codegen.cases import Config, Entry, Key
from benchmarks.codegen.targets import TARGETS, VECTOR_BYTES
from vstar_kernels.attention.triton.configs import StreamConfig, TileConfig, split

SIZES = json.loads(Path(__file__).with_suffix(".json").read_text())
LEAST_BYTES = 4  # that a thread loads at a time where it may be less than a vector
# Larger tiles spill whatever the configuration: bytes of one of a sequence's tensors, and elements
# where products have no matrix instructions.
LARGEST_TILE = 64 * 1024
LARGEST_TILE_WITHOUT_MATRIX = 32 * 64
# Registers of a thread that a block's outputs may take, of those it can have.
OUTPUT_REGISTERS = {"sm_80": 96, "sm_90": 128, "sm_100": 128, "gfx942": 128}
OUTPUT_REGISTERS_WITHOUT_MATRIX = 40


def candidates(key: Key) -> list[Entry]:
    """Returns the entries to try, best first; the ``shared`` of their ``config`` is not known."""
    found = tiles(key) if key.frames else streams(key)
    least = VECTOR_BYTES // 2 if key.frames else VECTOR_BYTES
    least = LEAST_BYTES if key.backward else least
    return [Entry(**vars(key), config=x) for x in found if bytes_to_load(key, x) >= least]


def tiles(key: Key) -> list[TileConfig]:
    """Returns the tiles for a number of frames; none where they would be too large."""
    kind = f"{key.kind} {key.frames}"
    if key.backward:
        sizes = in_own_warps(key, SIZES["tile_backward"].get(kind, []))
    elif too_large(key):
        return []
    else:
        sizes = SIZES["tile"][kind]
    return [TileConfig(*size) for size in sizes]


def too_large(key: Key) -> bool:
    """Tells whether no tile could hold so many frames of so wide heads in registers."""
    elements = key.frames * key.width
    without_matrix = key.kind == "ieee" and key.architecture != "gfx942"
    return elements * itemsize(key) > LARGEST_TILE or (
        without_matrix and elements > LARGEST_TILE_WITHOUT_MATRIX
    )


def streams(key: Key) -> list[StreamConfig]:
    """Returns the streams for any number of frames."""
    if key.backward:
        heads = "narrow" if key.width <= 64 else "wide" if key.width <= 128 else "widest"
        name = "16-bit, counted" if units.sweeps_are_counted(key) else f"{key.kind} {heads}"
        sizes = in_own_warps(key, SIZES["stream_backward"][name])
        return [StreamConfig(*size, shared=0) for size in sizes]
    if key.kind == "ieee":
        name, registers = f"ieee {key.width}", OUTPUT_REGISTERS_WITHOUT_MATRIX
    else:
        name, registers = f"{key.architecture} {key.kind}", OUTPUT_REGISTERS[key.architecture]
    sizes = dict.fromkeys(map(tuple, SIZES["stream"][name] + SIZES["stream"]["small"]))
    found = [StreamConfig(*size, shared=0) for size in sizes]
    lanes = TARGETS[key.architecture].lanes
    return [x for x in found if x.queries * key.width <= registers * lanes * x.warps]


def holds_outputs(entry: Entry, kernel: str) -> bool:
    """Tells whether the outputs of a stream's gradients leave a thread registers for the rest."""
    config = entry.config
    rows = {"grad_query": config.queries, "grad_key": 2 * config.keys}
    outputs = rows.get(kernel.removesuffix("_full"), 0) * entry.width
    threads = config.warps * TARGETS[entry.architecture].lanes
    return outputs <= OUTPUT_REGISTERS[entry.architecture] * threads


def bytes_to_load(key: Key, config: Config) -> int:
    """Returns what every thread has to load of the narrower part of a head."""
    tile = isinstance(config, TileConfig)
    rows = config.queries * config.sequences if tile else min(config.queries, config.keys)
    narrower = min(filter(None, split(key.width)))
    return rows * narrower * itemsize(key) // (config.warps * TARGETS[key.architecture].lanes)


def itemsize(key: Key) -> int:
    """Returns the bytes of a number."""
    return 2 if key.kind == "16-bit" else 4


def in_own_warps(key: Key, sizes: list[list[int]]) -> list[tuple[int, ...]]:
    """Replaces warps of 32 by warps of the architecture with as many threads."""
    ratio = TARGETS[key.architecture].lanes // 32
    own = ((rows, blocks, max(1, warps // ratio), *rest) for rows, blocks, warps, *rest in sizes)
    return list(dict.fromkeys(own))
