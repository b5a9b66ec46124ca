"""The C++ library (bindings/): its operators' schemas, finding and loading it, or saying why not.

The schemas are defined here and the library only implements them, so that nothing is missing or
defined twice without it. Its operators take their output from the caller: allocating inside costs a
small call several microseconds. The library holds no Python: torch loads it and its operators, and
ctypes calls the few C functions that choose an instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LIBRARY = torch.library.Library("vstar_kernels", "DEF")

# Δ comes as the bias objects hold it, and its gradient goes back so: bindings/delta.h.
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? delta, Tensor? stat_tensor, int form, "
    "float strength, int stat, bool clamp_negative"
)
LIBRARY.define(f"cpu_forward(Tensor(a!) out, Tensor(b!)? map, {_INPUTS}, float scale) -> ()")
LIBRARY.define(
    "cpu_backward(Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, "
    "Tensor(d!)? grad_delta, Tensor(e!)? grad_stat, Tensor grad_out, Tensor? grad_map, "
    f"{_INPUTS}, bool detach_stat, float scale) -> ()"
)
for _name in ("cpu_forward", "cpu_backward"):
    # They write what they are given and return nothing.
    torch.library.register_fake(f"vstar_kernels::{_name}", lambda *arguments: None, lib=LIBRARY)

# The numbers of vstar::Form in bindings/delta.h and of vstar::Stat in bindings/types.h.
FORM_NUMBERS = {"none": 0, "gaussian": 1, "symmetric": 2, "signed": 3, "dense": 4}
STAT_NUMBERS = {"none": 0, "row_max": 1, "map_max": 2, "tensor": 3}

DIRECTORY = Path(__file__).parents[1] / "lib"
ISA_VARIABLE = "VSTAR_KERNELS_CPU_ISA"


@dataclass(frozen=True)
class Native:
    """The loaded library, or the reasons there is none."""

    path: Path
    handle: ctypes.CDLL | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def isas(self) -> list[str]:
        """The instruction sets that this processor can execute, best first."""
        if self.handle is None:
            return []
        names = map(self.handle.vstar_kernels_isa, itertools.count())
        return [name.decode() for name in itertools.takewhile(bool, names)]

    @property
    def isa(self) -> str | None:
        """The instruction set in use."""
        return self.handle.vstar_kernels_selected_isa().decode() if self.handle else None

    def select_isa(self, name: str) -> None:
        """Uses another instruction set from the next call on.

        Raises:
            ValueError: This processor cannot execute it.
        """
        if self.handle is None or self.handle.vstar_kernels_select_isa(name.encode()):
            raise ValueError(f"the instruction set must be one of {self.isas}, got {name!r}")


def build_record() -> dict[str, Any]:
    """Returns what the build wrote, ``{"built": bool, "reason": str}``; empty if it never ran."""
    path = DIRECTORY / "build.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def load() -> Native:
    """Loads the library, once.

    Raises:
        ValueError: ``VSTAR_KERNELS_CPU_ISA`` names an instruction set that cannot run here.
    """
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    path = DIRECTORY / f"libvstar_kernels{suffix}"
    if not path.exists():
        reason = build_record().get("reason", "the package was not built")
        return Native(path, problems=[f"no native library at {path}: {reason}"])
    try:
        torch.ops.load_library(path)
        handle = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        return Native(path, problems=[f"the native library did not load: {error}"])
    handle.vstar_kernels_isa.restype = ctypes.c_char_p
    handle.vstar_kernels_selected_isa.restype = ctypes.c_char_p
    native = Native(path, handle)
    if wanted := os.environ.get(ISA_VARIABLE):
        if wanted not in native.isas:
            raise ValueError(
                f"{ISA_VARIABLE} must be one of {', '.join(native.isas)} on this processor, "
                f"got {wanted!r}"
            )
        native.select_isa(wanted)
    return native
