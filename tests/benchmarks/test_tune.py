"""Which launch configurations the tuner chooses."""

import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from benchmarks.codegen import cases
from benchmarks.codegen.binary import Binary
from benchmarks.codegen.cases import Key
from benchmarks.tune import candidates, choose
from vstar_kernels.attention.triton import configs
from vstar_kernels.attention.triton.configs import StreamConfig


def test_the_tuner_writes_what_it_read(tmp_path, monkeypatch):
    entries, names = cases.entries(), ("FILE", "BACKWARD_FILE")
    before = {name: getattr(configs, name).read_text() for name in names}
    for name, text in before.items():
        monkeypatch.setattr(configs, name, tmp_path / name)
        getattr(configs, name).write_text(text)
    choose.write({})
    assert {name: getattr(configs, name).read_text() for name in names} == before
    for n in (0, len(entries) - 1):
        key = entries[n].key
        choose.write({key: None})
        assert cases.entries() == entries[:n] + entries[n + 1 :]
        choose.write({key: entries[n]})
        assert cases.entries() == entries


def test_the_tuner_prefers_headroom_and_skips_what_is_unfit(monkeypatch):
    key = Key("sm_90", "16-bit", 64, 64)
    sizes = [(64, 1, 4), (64, 1, 2), (32, 1, 4), (32, 1, 2)]
    monkeypatch.setitem(candidates.SIZES["tile"], "16-bit 64", sizes)
    rooms = dict(zip(sizes, (0.0, 0.5, 0.9, 1.1), strict=True))

    def size(entry):
        return entry.config.queries, entry.config.sequences, entry.config.warps

    unfit = set()
    monkeypatch.setattr(choose, "headroom", lambda entry: rooms[size(entry)])
    monkeypatch.setattr(choose, "fit", lambda entry: None if size(entry) in unfit else entry)
    assert size(choose.predicted(key)) == (32, 1, 2)
    unfit.add((32, 1, 2))
    assert size(choose.predicted(key)) == (32, 1, 4)
    rooms[64, 1, 2] = 2.0
    assert size(choose.predicted(key)) == (64, 1, 2)
    unfit.update(sizes)
    assert choose.predicted(key) is None


def test_the_tuner_gives_a_kernel_that_no_fit_candidate_serves_its_own(monkeypatch):
    key = Key("sm_80", "tf32", None, 256, backward=True)
    wide, small, other = (StreamConfig(*x, 1, 0) for x in ((32, 16, 8), (16, 16, 8), (16, 32, 8)))
    monkeypatch.setattr(candidates, "streams", lambda key: [wide, small, other])
    large = 120 * 1024  # too much for some GPUs that the rows serve
    shared = {
        wide: {
            "grad_delta": 4096,
            "maps": 4096,
            "statistics": 4096,
            "grad_key": large,
            "grad_query": large,
        },
        small: {
            "grad_delta": None,
            "maps": 64,
            "statistics": 64,
            "grad_key": 512,
            "grad_query": 256,
        },
        other: {
            "grad_delta": 2048,
            "maps": None,
            "statistics": None,
            "grad_key": None,
            "grad_query": 1,
        },
    }

    def inspect_fit(case):
        taken = shared[replace(case.entry.config, shared=0)][case.kernel]
        return taken and Binary(40, 0, taken, 5, {16: 1}, {}, {}, {})

    monkeypatch.setattr(choose, "inspect_fit", inspect_fit)
    own = {"grad_delta": replace(wide, shared=4096)}
    assert choose.predicted(key).config == replace(small, shared=512, overrides=own)
    shared[wide] = shared[other]
    shared[other]["grad_delta"] = None
    assert choose.predicted(key) is None
    assert choose.combined(replace(key, backward=False)) is None


def test_no_candidate_is_taken_for_a_tile_that_is_too_large():
    assert candidates.candidates(Key("sm_90", "16-bit", 128, 256)) == []
    assert candidates.candidates(Key("sm_90", "ieee", 128, 64)) == []
    assert candidates.candidates(Key("gfx942", "ieee", 128, 64))
    streams = candidates.candidates(Key("sm_80", "ieee", None, 256))
    assert all(isinstance(x.config, StreamConfig) for x in streams)
