import ctypes
import itertools
import json
import os
import re
from pathlib import Path

import pytest
import torch

from tests.attention.cpu_call import Call
from tests.helpers import run_python
from vstar_kernels.attention import native
from vstar_kernels.attention.native import FORM_NUMBERS, STAT_NUMBERS

forward = torch.ops.vstar_kernels.cpu_forward


@pytest.mark.skipif(bool(native.load().problems), reason="no native library")
def test_the_environment_forces_an_instruction_set():
    """The last one, which is not the best where there are several."""
    isa = native.load().isas[-1]
    code = "from vstar_kernels.attention import native; print(native.load().isa)"
    run = run_python(code, VSTAR_KERNELS_CPU_ISA=isa)
    assert run.stdout.strip() == isa, run.stderr


def test_pairs_of_bfloat16_are_first_where_they_are_faster():
    isas = native.load().isas
    if "avx512_bf16" not in isas:
        pytest.skip("this processor has no AVX512_BF16")
    pairs, floats = isas.index("avx512_bf16"), isas.index("avx512")
    assert (pairs < floats) == ("AuthenticAMD" in Path("/proc/cpuinfo").read_text())


def test_unknown_instruction_set_is_an_error(isa):
    with pytest.raises(ValueError, match="instruction set must be one of"):
        native.load().select_isa("sse9")


def test_a_library_that_does_not_load_is_named(tmp_path, monkeypatch):
    broken = tmp_path / native.load().path.name
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    library = native.load.__wrapped__()
    assert "did not load" in library.problems[0]
    assert library.isa is None
    assert library.isas == []


def test_a_missing_library_tells_what_the_build_said(tmp_path, monkeypatch):
    (tmp_path / "build.json").write_text(json.dumps({"built": False, "reason": "no compiler"}))
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    assert native.load.__wrapped__().problems[0].endswith("no compiler")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text(""),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_text('{"built": true}'),
        lambda path: path.write_text('{"reason": 3}'),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere"),
        lambda path: os.mkfifo(path),
    ],
)
def test_a_damaged_build_record_is_told(tmp_path, monkeypatch, damage):
    damage(tmp_path / "build.json")
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    (problem,) = native.load.__wrapped__().problems
    assert re.search(r"build.json (cannot be read|is damaged).*; .*install", problem), problem


def test_a_library_that_was_built_and_is_gone(tmp_path, monkeypatch):
    (tmp_path / "build.json").write_text(json.dumps({"built": True, "reason": "from source"}))
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    (problem,) = native.load.__wrapped__().problems
    assert re.search(r"it was built, and is gone; .*install", problem), problem


def test_a_build_record_cannot_write_to_the_terminal(tmp_path, monkeypatch):
    (tmp_path / "build.json").write_text(json.dumps({"reason": "no\x1b[31m compiler\n"}))
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    assert native.load.__wrapped__().problems[0].endswith("no?[31m compiler?")


def test_a_checkout_that_was_not_built_names_cause_and_cure(tmp_path, monkeypatch):
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(native, "DIRECTORY", tmp_path / "vstar_kernels" / "lib")
    (problem,) = native.load.__wrapped__().problems
    assert f"{tmp_path} is a source checkout that was not built" in problem
    assert "build it ('make setup' or 'pip install --no-build-isolation -e .'" in problem
    assert "start Python in another folder" in problem


def test_a_library_built_from_other_sources_is_not_called(monkeypatch):
    """Its operators would take their arguments for others."""
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    library = native.load.__wrapped__()
    if library.path.exists():
        assert "was built from other sources" in library.problems[0]
        assert "make setup" in library.problems[0]
        assert library.handle is None


REPORT = """
import warnings, torch
import vstar_kernels as vk
q = torch.ones(1, 4, 1, 8)
print(vk.backends.available()["cpu"], vk.info()["native library"])
with warnings.catch_warnings(record=True) as found:
    vk.tar_attention(q, q, q)
print(found[0].category.__name__, found[0].message)
try:
    vk.tar_attention(q, q, q, backend="cpu")
except ValueError as error:
    print("error", error)
"""


@pytest.mark.skipif(bool(native.load().problems), reason="no native library")
def test_a_wrong_instruction_set_in_the_environment_is_told():
    run = run_python(REPORT, VSTAR_KERNELS_CPU_ISA="non\x1bsense")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("VSTAR_KERNELS_CPU_ISA must be one of") == 4
    assert "\x1b" not in run.stdout
    assert "SlowBackendWarning" in run.stdout


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form": "none", "stat": "none"},
        {"form": "symmetric"},
        {"form": "dense", "heads": 3},
        {"stat": "tensor"},
    ],
)
@pytest.mark.parametrize("with_map", [False, True])
def test_opcheck(options, with_map):
    arguments = Call(2, 6, 3, 8, **options).forward_arguments(with_map)
    torch.library.opcheck(forward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_library_defines_what_python_defines(isa):
    """The schemas of programs without Python are those of programs with it."""
    schema = native.load().handle.vstar_kernels_schema
    schema.restype = ctypes.c_char_p
    texts = [x.decode() for x in itertools.takewhile(bool, map(schema, itertools.count()))]
    assert len(texts) == 6
    for text in texts:
        found = torch._C.parse_schema(f"vstar_kernels::{text}")
        assert found == getattr(torch.ops.vstar_kernels, text.split("(")[0]).default._schema


@pytest.mark.skipif(bool(native.load().problems), reason="no native library")
def test_operators_that_python_has_defined_are_not_defined_again():
    code = """import ctypes, vstar_kernels as vk
print(ctypes.CDLL(str(vk.backends.native_library())).vstar_kernels_define_operators())"""
    run = run_python(code)
    assert run.stdout == "1\n", run.stderr


SYMMETRIC, DENSE = FORM_NUMBERS["symmetric"], FORM_NUMBERS["dense"]
TENSOR = STAT_NUMBERS["tensor"]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.rand(6, 3, 8)}, "query must be 4-D or 5-D"),
        ({"key": torch.rand(2, 6, 3, 9)}, "key must have query's shape"),
        ({"value": torch.rand(2, 6, 3, 8).half()}, "value must have query's type"),
        ({"out": torch.rand(2, 6, 8, 3).mT}, "out must be contiguous in head_dim"),
        ({"delta": torch.rand(1, 9)}, "must be odd in length and reach all frames"),
        ({"delta": torch.rand(1, 12)}, "must be odd in length and reach all frames"),
        ({"delta": torch.rand(5), "form": SYMMETRIC}, "must reach all frames"),
        ({"delta": torch.rand(2, 11)}, "1 or 3 heads, got 2"),
        ({"delta": torch.rand(3, 5, 5), "form": DENSE}, "dense delta must be"),
        ({"delta": torch.rand(3, 6, 6)}, "a table, of 1 or 2 dimensions, got 3"),
        ({"delta": torch.rand(36), "form": DENSE}, "a matrix, of 2 or 3 dimensions, got 1"),
        ({"delta": torch.rand(1, 11).double()}, "delta must be a float32 tensor"),
        ({"delta": None}, "form 1 to 4 goes with delta"),
        ({"form": 0}, "form 1 to 4 goes with delta"),
        ({"form": 5}, "form must be 0 to 4, got 5"),
        ({"stat": 4}, "stat must be 0 to 3, got 4"),
        ({"stat": TENSOR}, "goes with stat_tensor"),
        ({"stat": TENSOR, "stat_tensor": torch.rand(2, 5, 3)}, "without head_dim"),
    ],
)
def test_direct_calls_cannot_leave_their_tensors(changes, message):
    names = [argument.name for argument in forward.default._schema.arguments]
    named = dict(zip(names, Call(2, 6, 3, 8).forward_arguments(), strict=True))
    with pytest.raises(RuntimeError, match=message):
        forward(*{**named, **changes}.values())
