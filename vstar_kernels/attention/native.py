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
import threading
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
LIBRARY.define(
    f"cpu_forward(Tensor(a!) out, Tensor(b!)? map, {_INPUTS}, float scale, int map_block, "
    "bool map_by_head) -> ()"
)
LIBRARY.define(
    "cpu_backward(Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, "
    "Tensor(d!)? grad_delta, Tensor(e!)? grad_stat, Tensor grad_out, Tensor? grad_map, "
    f"{_INPUTS}, bool detach_stat, float scale, int map_block, bool map_by_head) -> ()"
)
_FRAME_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? stat_tensor, "
    "Tensor query_runs, Tensor key_runs, Tensor? delta, Tensor? offset, Tensor? factor, "
    "Tensor? factor_span, Tensor? band, int stat, bool clamp_negative, float scale, "
    "bool map_by_head"
)
LIBRARY.define(f"cpu_frames_forward(Tensor(a!) out, Tensor(b!)? map, {_FRAME_INPUTS}) -> ()")
LIBRARY.define(
    "cpu_frames_backward(Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, "
    f"Tensor grad_out, Tensor? grad_map, {_FRAME_INPUTS}) -> ()"
)
_COLUMN_INPUTS = "Tensor query, Tensor key, Tensor? value, Tensor columns, float scale"
LIBRARY.define(f"cpu_columns_forward(Tensor(a!)? out, Tensor(b!)? maps, {_COLUMN_INPUTS}) -> ()")
LIBRARY.define(
    "cpu_columns_backward(Tensor(a!)? grad_query, Tensor(b!)? grad_key, Tensor(c!)? grad_value, "
    f"Tensor? grad_out, Tensor? grad_maps, {_COLUMN_INPUTS}) -> ()"
)
for _name in (
    "cpu_forward", "cpu_backward", "cpu_frames_forward", "cpu_frames_backward",
    "cpu_columns_forward", "cpu_columns_backward",
):  # fmt: skip
    # They write what they are given and return nothing.
    torch.library.register_fake(f"vstar_kernels::{_name}", lambda *arguments: None, lib=LIBRARY)

# The numbers of vstar::Form in bindings/delta.h and of vstar::Stat in bindings/types.h.
FORM_NUMBERS = {"none": 0, "gaussian": 1, "symmetric": 2, "signed": 3, "dense": 4}
STAT_NUMBERS = {"none": 0, "row_max": 1, "map_max": 2, "tensor": 3}
# Those of vstar::FrameStat in bindings/frames.h.
FRAME_STAT_NUMBERS = {"none": 0, "row_max": 1, "frame_max": 2, "tensor": 3}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels take
DIRECTORY = Path(__file__).parents[1] / "lib"
ISA_VARIABLE = "VSTAR_KERNELS_CPU_ISA"
INTERFACE = 5  # of these operators; vstar_kernels_interface() in bindings/dispatch.cpp says it too


@dataclass(frozen=True)
class Native:
    """The loaded library, or the reasons that it cannot be used."""

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
    """Returns what the build wrote, ``{"built": bool, "reason": str}``; empty if it never ran.

    Of a record that cannot be read, the reason says so.
    """
    path = DIRECTORY / "build.json"
    if not os.path.lexists(path):
        return {}
    try:
        # Of a pipe, reading would wait for ever.
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        return {"reason": f"{path} cannot be read ({error}); {_cure()}"}
    if isinstance(record, dict) and isinstance(record.get("reason"), str):
        reason = "".join(x if x.isprintable() else "?" for x in record["reason"])
        return {**record, "reason": reason}
    return {"reason": f"{path} is damaged; {_cure()}"}


@functools.cache
def load() -> Native:
    """Loads the library, once. What is wrong with it, or with its environment, is a problem of it.

    It is not an exception, because ``info`` and ``backends.available`` are there to say it.
    """
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    path = DIRECTORY / f"libvstar_kernels{suffix}"
    if not os.path.exists(path):
        record = build_record()
        reason = record.get("reason") or f"{_what_was_not_built()}; {_cure()}"
        if record.get("built"):
            reason = f"it was built, and is gone; {_cure()}"
        return Native(path, problems=[f"no native library at {path}: {reason}"])
    try:
        torch.ops.load_library(path)
        handle = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        return Native(path, problems=[f"the native library did not load: {error}"])
    # Libraries from before there was such a number are without the function.
    interface = getattr(handle, "vstar_kernels_interface", int)()
    if interface != INTERFACE:
        built = f"{path} was built from other sources (interface {interface}, not {INTERFACE})"
        return Native(path, problems=[f"{built}; {_cure()}"])
    handle.vstar_kernels_isa.restype = ctypes.c_char_p
    handle.vstar_kernels_selected_isa.restype = ctypes.c_char_p
    handle.vstar_kernels_forked(ctypes.c_int64(_forks.thread))
    native = Native(path, handle)
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted and wanted not in native.isas:
        allowed = ", ".join(native.isas)
        problem = f"{ISA_VARIABLE} must be one of {allowed} on this processor, got {wanted!r}"
        return Native(path, handle, [problem])
    if wanted:
        native.select_isa(wanted)
    return native


def _what_was_not_built() -> str:
    if _is_checkout():
        return f"{DIRECTORY.parents[1]} is a source checkout that was not built"
    return "the package was not built"


def _cure() -> str:
    """Returns what makes the library, for messages."""
    if _is_checkout():
        root = DIRECTORY.parents[1]
        return (
            f"build it ('make setup' or 'pip install --no-build-isolation -e .' in {root}), "
            "or, if another vstar_kernels is installed, start Python in another folder to import it"
        )
    return "install the package again, with --no-build-isolation and torch there to build against"


def _is_checkout() -> bool:
    return (DIRECTORY.parents[1] / "setup.py").exists()


# ---- forks before the library is loaded ----


class _Forks:
    """Notices a fork that the library, not loaded yet, cannot notice itself.

    The thread that forks goes on in the child without its team of OpenMP threads, which torch's
    operators may have made; see bindings/schedule.cpp.
    """

    def __init__(self) -> None:
        self.thread = 0  # of this process, that may have lost its team in a fork; 0: none
        self._with_threads = False

    def before(self) -> None:
        """Notes whether the process has more threads than the one that forks."""
        try:
            self._with_threads = len(os.listdir("/proc/self/task")) > 1
        except OSError:
            self._with_threads = True

    def after_in_child(self) -> None:
        """Notes the thread that has forked."""
        if self._with_threads or self.thread:
            self.thread = threading.get_native_id()


_forks = _Forks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_forks.before, after_in_child=_forks.after_in_child)


def refusals(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor | None = None
) -> list[str]:
    """Returns what the kernels of every operation have against a type or strides; none if nothing.

    All are on the CPU and of one type and head size.
    """
    reasons = []
    if query.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        reasons.append(f"takes {allowed}, query is {query.dtype}")
    for name, tensor in (("query", query), ("key", key), ("value", value), ("out", out)):
        stride = 1 if tensor is None else tensor.stride(-1)
        if stride != 1 and query.shape[-1] > 1:
            reasons.append(f"takes contiguous head_dim, {name} has stride {stride} in it")
    return reasons
